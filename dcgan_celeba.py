"""A DCGAN for a folder of your own images, or for CelebA's photographs of faces.

Read dcgan_cifar10.py first: networks and training follow the same rules. But there are
no labels here, G's layers are wider, the learning rate is 0.0004, and beta1 is 0.5.
(The last two were found by trying.) New are images of your own, a choice of image
sizes, what to do if you have few images, and several GPUs.

Your images should show one kind of thing, framed alike: faces, leaves on white paper,
houses from the street. (With ten kinds, as in dcgan_cifar10.py, few of the things that
G drew could be recognised.) 300 images are enough to see something, and more are
better. Put them into a folder, with subfolders or without, and type:

    python dcgan_celeba.py --images FOLDER --out-dir runs/mine

The script decodes all images that Pillow can read. (HEIC, the format of iPhones, has to
be converted first.) It takes the middle square of each image, and scales it to 64 x 64
pixels. It leaves out damaged images and prints their names. Some of the squares are in
runs/mine/images/real.png. If they are not what you want, press Ctrl-C, crop your
images, and start again with another --out-dir.

Each time a square is used, it is mirrored with a chance of one half. If a mirror would
spoil your images, as with letters, add --no-flip.

After its first 20 updates a run prints how long an epoch and all 50 epochs will take.
The grids of generated images are in runs/mine/images, one for each epoch. Ctrl-C stops
the run. To continue it after its last whole epoch, type:

    python dcgan_celeba.py --resume --out-dir runs/mine

(A run remembers its flags, and so also the folder of images. If you have moved the
folder, add --images with its new place.)

Without --images, the script learns from CelebA's 202,599 photographs. It downloads them
(1.4 GB) into the folder data, unless they are there already. Keep 6 GB free for the
archive, its unpacked files and the decoded pixels.

How long does it take? If there are few images, an epoch shows all of them several
times, so that it has at least 100 updates. These times are for 64 x 64 pixels on two
cores of an Intel Xeon of 2023, with bfloat16, where an update takes 0.15 seconds:

                  images   updates in an epoch   an epoch takes   50 epochs take
                     100                   100             15 s           13 min
                     300                   112             17 s           14 min
                   1,000                   125             19 s           16 min
                  10,000                   625             94 s           78 min
        CelebA:  202,599                12,662           32 min         26 hours

A batch has only 16 images. On a CPU, an update with 64 images takes about four times as
long, but does not teach four times as much. A GPU computes many images at once, so add
--batch-size 64 or more there. (On an NVIDIA H200, an update with 512 images took only
1.5 times as long as one with 64, with an earlier version of this script.)

What do the numbers mean, without test images? Coverage and the copy ratio are measured
with your training images. To save time, images are compared as thumbnails of 8 x 8
pixels.

- Coverage is the share of your images that have a fake close by. (At 64 x 64 pixels at
  most 1,000 of your images are used for it, and fewer at larger sizes.) As in
  gan_mnist.py, other real images would score about 0.97. A low coverage means that the
  fakes are not as different from each other as your images are. A high one proves
  little: copies of all your images would score high, too.
- The copy ratio is printed at the end. First we measure how far each fake is from the
  training image that is nearest to it, and take the median. Then we do the same for
  real images and their nearest other training image. The copy ratio is the first median
  divided by the second. (200 of each are used.) Near 1, the fakes are new, and towards
  0 they are copies. Well above 1, they do not even resemble your images. If sharp fakes
  score less than about 0.8, look at images/nearest.png. It shows eight fakes above
  their nearest training images, and, after a white row, eight real images above theirs.
- Thumbnails do not show whether fakes are sharp. Early fakes look like faces in fog. In
  fog all pixels have a medium brightness, so it is not very far from any image. Then
  coverage is high, and the copy ratio means nothing: it was 0.7 after 2 epochs, and
  0.98 after 4. So trust both numbers only once the fakes are sharp.
- In the first epochs D is often far ahead, with a fool rate of 0.00 and a loss_g of 3
  to 7. This is no reason to stop.

What is different with few images, say 100 to 1,000? Of those that are nearly the same,
such as photographs of a series, keep one, or the copy ratio would be spoiled. D soon
knows all images by heart, and loss_d comes near 0, as in the first line below. The
losses then look as if D had won. Look at the grids: as long as they get better, train
on.

                                   loss_d  loss_g  coverage  copy ratio
    300 photographs, 50 epochs       0.11    3.19      0.98        1.02
    23,707 photographs, 6 epochs     0.86    1.21      0.92        1.06

(They are cropped photographs of faces, and not those of CelebA. In gan_fashion.py, G
copied when there were only 30 images. With 300 photographs it did not.)

With the 300 photographs, many faces looked cleaner after 15 epochs than after 50. So
look through the grids of your run. If an early one is the best, say epoch_015.png, its
networks are gone, because a run only keeps those of its last epoch. So you have to
train once more. Start the first command below, which repeats the run in a new folder.
(On the same CPU the grids will be the same.) When the line of epoch 15 is printed,
press Ctrl-C. The second command trains no further, but prints the copy ratio and writes
images/nearest.png:

    python dcgan_celeba.py --images FOLDER --out-dir runs/best
    python dcgan_celeba.py --resume --epochs 15 --out-dir runs/best

(Why has the first command no --epochs 15? With it, the learning rate would be 0 after
15 epochs. In a run of 50 epochs it is still at 70 % of its first value there, so the
networks have learned more. With our photographs the shorter run left more noise.)

For few images, many people use differentiable augmentation (Zhao et al. 2020). We tried
it with shifted images: after 25 epochs our faces were more blurred than without it. We
have not tried longer runs.

A larger --image-size adds blocks of layers to both networks: one for 128, two for 256.
Each doubling makes four times as many pixels, and an update takes about four times as
long. For a size of 32 there is one block less, and all layers are narrower. Such
networks learned better from 300 photographs at a higher learning rate: add --lr 0.0016.

A finished run can be resumed with more --epochs. Its learning rate has fallen to 0, and
now jumps up again, so the images may get worse for a while.

    python dcgan_celeba.py --batch-size 64
        CelebA, on a GPU
    python dcgan_celeba.py --images FOLDER --out-dir runs/large --image-size 128
        larger images
    python dcgan_celeba.py --resume --epochs 100 --out-dir runs/mine
        trains a finished run for longer
    python dcgan_celeba.py --generate 100 --out-dir runs/mine
        draws 100 images with a trained generator
    python dcgan_celeba.py --toy --out-dir runs/faces_toy
        synthetic faces, with no download
    torchrun --nproc-per-node 2 dcgan_celeba.py --images FOLDER --batch-size 128
        two GPUs: each of them computes half of every batch

To use the averaged generator elsewhere, copy this file, common.py and, from the run's
folder models, generator.pth:

    import dcgan_celeba, torch
    generator = dcgan_celeba.Generator(latent_dim=100, size=64)  # size: --image-size
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    images = dcgan_celeba.sample(generator, torch.randn(64, 100))  # in [-1, 1]
"""

import argparse
import copy
import csv
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim import Adam
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid

# torchrun starts this script several times, once for each GPU, and tells each of these
# processes its number (RANK), from 0 up, and how many there are. Process 0 prints, and
# writes the files. Without torchrun there is one process, and its number is 0.
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1

# ---- networks ------------------------------------------------------------------------
# A comment beside a layer is the shape of its output for one image of 64 x 64.


class Generator(nn.Sequential):
    """Turns latent vectors N x latent_dim into images N x 3 x size x size.

    The images are in [-1, 1].
    """

    def __init__(self, latent_dim=100, size=64):
        # The comments are for a size of 64. The first layer makes 4 x 4 pixels. Then
        # each block of layers doubles height and width, and halves the channels, until
        # there are 64 channels at half of the size. So it begins with 64 * size / 8.
        channels = 8 * size
        layers = [nn.ConvTranspose2d(latent_dim, channels, 4)]  # 512 x 4 x 4
        while channels > 64:  # 256 x 8 x 8, then 128 x 16 x 16, then 64 x 32 x 32
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1),
            ]
            channels //= 2
        super().__init__(
            *layers,
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 3, 4, 2, 1),  # 3 x 64 x 64
            nn.Tanh(),  # 3 x 64 x 64, in [-1, 1]
        )

    def forward(self, z):
        return super().forward(z[:, :, None, None])  # z as an image of one pixel


class Discriminator(nn.Sequential):
    """Turns images N x 3 x size x size in [-1, 1] into logits N x 1.

    Raises ValueError for images of another size.
    """

    def __init__(self, size=64):
        # At half of the size there are 48 channels. (G has 64 there. Fewer save time.)
        # Each block halves height and width, and doubles the channels. At 4 x 4 pixels
        # there are 48 * size / 8 channels, which is 6 * size.
        channels = 48
        layers = [nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2)]  # 48 x 32 x 32
        while channels < 6 * size:  # 96 x 16 x 16, then 192 x 8 x 8, then 384 x 4 x 4
            layers += [
                nn.Conv2d(channels, channels * 2, 4, 2, 1),
                nn.BatchNorm2d(channels * 2),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        super().__init__(*layers, nn.Conv2d(channels, 1, 4), nn.Flatten())  # 1
        self.size = size

    def forward(self, x):
        if x.size(3) != self.size:  # there would be several logits, or none
            raise ValueError(f"D is for images of size {self.size}, not {x.size(3)}")
        return super().forward(x)


# ---- training ------------------------------------------------------------------------


def train_step(generator, discriminator, opt_g, opt_d, real, z, r1, bf16):
    """Updates D once, then G once. Returns the numbers of this step, as tensors.

    real: images N x 3 x size x size in [-1, 1]; z: latent vectors N x latent_dim. With
    r1=True D also learns from R1. With bf16=True convolutions are computed in bfloat16.
    """
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)

    # (1) Update D: make loss_d = -log p(real) - log(1 - p(fake)) smaller.
    # If bf16 is True, convolutions in this block use bfloat16, and losses float32.
    # backward() stays outside: it uses for each layer the format that was used here.
    with autocast:
        fake = generator(z)
        real_logits = discriminator(real)
        fake_logits = discriminator(fake.detach())
        ones = torch.ones_like(real_logits)
        zeros = torch.zeros_like(fake_logits)
        loss_d = bce(real_logits, ones) + bce(fake_logits, zeros)
    opt_d.zero_grad()
    loss_d.backward()
    if r1:
        # Adds the gradients of a second loss to those of loss_d.
        r1_penalty(discriminator, real).backward()
    opt_d.step()

    # (2) Update G: make loss_g = -log p(fake) smaller. D does not learn from it.
    discriminator.requires_grad_(False)
    with autocast:
        new_fake_logits = discriminator(fake)
        loss_g = bce(new_fake_logits, ones)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)

    return {
        "loss_d": loss_d.detach(),  # without R1
        "loss_g": loss_g.detach(),
        "acc_real": (real_logits > 0).float().mean(),
        "acc_fake": (fake_logits < 0).float().mean(),
        "fool_rate": (new_fake_logits > 0).float().mean(),
    }


R1_INTERVAL = 16  # R1 is computed at every 16th update only, as it is slow
R1_WEIGHT = 0.05 * R1_INTERVAL  # 16 times as large, to make up for it


def r1_penalty(discriminator, real):
    """Returns R1, a second loss for D, for real images.

    It is explained in gan_fashion.py. As there, it is computed for half of the batch,
    which saves time. It is computed in float32, also with bf16.
    """
    half = len(real) // 2
    real = real[:half].requires_grad_()
    logits = discriminator(real)
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return R1_WEIGHT * gradient.square().sum() / half


def update_average(average, generator, step):
    """Moves each weight of the averaged generator towards the generator's."""
    # The new average is keep * average + (1 - keep) * generator. At first keep is
    # small, so that the untrained weights are soon forgotten. After 4,500 steps it is
    # 0.998, and from then on the average spans about the last 500 steps, which is
    # 1 / (1 - 0.998).
    keep = min(0.998, step / (step + 9))
    new = generator.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():  # BatchNorm also has a counter, a whole number
            value.lerp_(new[name], 1 - keep)  # changes the average itself, in place


def thumbnails(images):
    """Shrinks images N x C x H x W to 8 x 8 pixels. Returns them as N x (C * 64)."""
    return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


def coverage(real, fake):
    """Returns the share of the real images that are covered, between 0 and 1.

    Around each real image, think of a circle that reaches to its fifth-closest other
    real image. The image is covered if at least one fake lies within its circle (Naeem
    et al. 2020). real and fake are N x C x H x W, and are compared as thumbnails.
    """
    real = thumbnails(real)
    # The 6th smallest distance, as the smallest is from an image to itself.
    radius = torch.cdist(real, real).kthvalue(6).values  # one for each real image
    distance_of_fake = torch.cdist(real, thumbnails(fake)).amin(1)  # of the nearest
    return (distance_of_fake < radius).float().mean().item()


# Thumbnails of real images that are closer to each other than this are taken for the
# same image. The same photograph, saved again as a JPEG file, is at 0.02 to 0.2, and
# different photographs of faces are hardly ever closer than 0.8.
SAME_IMAGE = 0.2


def nearest(images, training, closest=0.0):
    """Returns the distances to the nearest training images, and their indices.

    images: N x C x H x W; training: the thumbnails of all training images. Of an image
    and its mirror image, the one that is nearer counts. A real image is itself among
    the training images. So that another one is found for it, training images that are
    closer than `closest` are passed over.
    """
    plain = torch.cdist(thumbnails(images), training)
    mirrored = torch.cdist(thumbnails(images.flip(3)), training)
    distance = torch.minimum(plain, mirrored)
    distance[distance < closest] = torch.inf
    return distance.min(1)


def copy_ratio(fakes, real, training):
    """Returns the copy ratio: near 1 if fakes are new, towards 0 if they are copies.

    It is the median distance of the fakes from their nearest training image, divided by
    the median distance of real images from their nearest other training image. fakes
    and real: N x C x H x W; training: the thumbnails of all training images.
    """
    # Each real image is among the training images, and in some folders even twice.
    distance_of_real = nearest(real, training, SAME_IMAGE).values.median()
    return nearest(fakes, training).values.median() / distance_of_real


def show_nearest(fakes, real, data, training, path):
    """Saves a grid of five rows: 8 fakes, their nearest training images, a gap, 8 real
    images, and their nearest other training images.

    If the upper two rows are much more alike than the lower two, G copies. The mirror
    image of a training image may be the nearest, but is not shown mirrored.
    """
    found = data[nearest(fakes, training).indices] / 127.5 - 1
    others = data[nearest(real, training, SAME_IMAGE).indices] / 127.5 - 1
    save_grid(torch.cat([fakes, found, torch.ones_like(fakes), real, others]), path)


MIN_EPOCH_STEPS = 100


def train_epoch(
    args, epoch, device, bf16, data, generator, discriminator, average, opt_g, opt_d
):
    """Trains for one epoch. Returns the means of the steps' numbers, and the time."""
    start = time.perf_counter()
    # With this seed, a resumed run draws the same random numbers in this epoch as a run
    # that was never stopped.
    torch.manual_seed(args.seed * 10_000 + epoch)
    # `order` is a shuffled list of the indices of images. An epoch shows each image
    # once, or several times if there are so few images that it would have less than
    # MIN_EPOCH_STEPS updates. For 800 images there are 2 repeats. randperm() shuffles
    # the numbers from 0 to 1,599. Divided by 800, both 7 and 807 leave the remainder 7,
    # so image 7 is there twice.
    repeats = math.ceil(MIN_EPOCH_STEPS * args.batch_size / len(data))
    order = torch.randperm(repeats * len(data)) % len(data)
    updates = len(order) // args.batch_size  # a last, shorter batch is left out
    total = args.epochs * updates
    step = first = (epoch - 1) * updates
    # All processes draw the same random numbers, and each uses its part of a batch. If
    # there is one process, that is all of it.
    mine = slice(RANK, None, PROCESSES)
    sums = Counter()  # sums.update() adds the numbers of a step to the sums so far
    for indices in order.split(args.batch_size)[:updates]:
        # The learning rate falls to 0, so that both networks change less and less.
        for opt in opt_d, opt_g:
            opt.param_groups[0]["lr"] = args.lr * (1 - step / total)
        # From [0, 255] to [-1, 1]. Decoded images are channels last, with which
        # BatchNorm failed on Apple's GPUs, so contiguous() undoes it. On other devices
        # the first convolution makes them channels last again.
        real = data[indices[mine]].contiguous().to(device) / 127.5 - 1
        if args.flip:
            # Half of the images are mirrored: more variety for D to learn from.
            mirror = torch.rand(args.batch_size, 1, 1, 1)[mine].to(device) < 0.5
            real = torch.where(mirror, real.flip(3), real)
        z = torch.randn(args.batch_size, args.latent_dim)[mine].to(device)
        r1 = step % R1_INTERVAL == 0
        sums.update(
            train_step(generator, discriminator, opt_g, opt_d, real, z, r1, bf16)
        )
        step += 1
        update_average(average, generator, step)
        speed = (step - first) / (time.perf_counter() - start)
        show_progress(step, updates, total, speed)
    row = {"epoch": epoch}
    for name, value in sums.items():
        row[name] = average_over_processes(value / updates).item()
    row["seconds"] = time.perf_counter() - start
    row["images_per_s"] = updates * args.batch_size / row["seconds"]
    return row


def train(args, device, bf16, data, checkpoint):
    """Trains on images, and writes all results to args.out_dir.

    data: uint8 N x 3 x size x size; bf16: whether to use bfloat16; checkpoint: that of
    the run to continue, or {} to begin one. Raises OSError if a checkpoint cannot be
    written, and FloatingPointError if a loss is not finite.
    """
    torch.manual_seed(args.seed)
    # The weights are channels last, except on Apple's GPUs, where PyTorch's BatchNorm
    # failed with it.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    generator = Generator(args.latent_dim, args.image_size)
    discriminator = Discriminator(args.image_size)
    for network in generator, discriminator:
        network.apply(init_weights).to(device, memory_format=layout)
        share_gradients(network)
    average = copy.deepcopy(generator)
    opt_g, opt_d = (
        Adam(network.parameters(), args.lr, (args.beta1, 0.999), fused=True)
        for network in (generator, discriminator)
    )
    run = {  # all that training changes: for train_epoch() and for checkpoints
        "generator": generator,
        "discriminator": discriminator,
        "average": average,
        "opt_g": opt_g,
        "opt_d": opt_d,
    }
    history = checkpoint.get("history", [])  # a row of numbers for each epoch so far
    if checkpoint:
        for name in run:
            run[name].load_state_dict(checkpoint[name])
        # For each weight Adam remembers two numbers, means of its gradient and of the
        # gradient's square. These have to lie in memory in the same order as the
        # weights, or Adam would use those of another weight. If the run began on an
        # Apple GPU, without channels last, they do not. So they are added to zeros that
        # are laid out like the weights: the sum has the same values, in this order.
        for opt in opt_g, opt_d:
            for weight, moments in opt.state.items():
                for name in "exp_avg", "exp_avg_sq":
                    moments[name] = torch.zeros_like(weight) + moments[name]
    if not RANK:
        save_checkpoint(args, run, history)  # if this is impossible, we know it now

    # All grids are drawn from the same latent vectors, so that they can be compared.
    # There are 1,000 at a size of 64, and fewer of larger images, to save memory.
    fixed_z = torch.randn(64_000 // args.image_size, args.latent_dim)
    # Coverage compares `count` real images with as many fakes.
    count = min(len(data), len(fixed_z))
    real_images = data[torch.randperm(len(data))[:count]] / 127.5 - 1
    fixed_z = fixed_z[: max(count, 200)]  # the grid needs 64, and the copy ratio 200
    if not history and not RANK:
        save_grid(real_images[:64], f"{args.out_dir}/images/real.png")
        save_grid(sample(average, fixed_z[:64]), f"{args.out_dir}/images/epoch_000.png")
    for epoch in range(len(history) + 1, args.epochs + 1):
        row = train_epoch(args, epoch, device, bf16, data, **run)
        fakes = sample(average, fixed_z)
        row["coverage"] = coverage(real_images, fakes[:count])
        if not fakes.isfinite().all():  # a loss, and then all weights, became NaN
            raise FloatingPointError("A loss is not finite: add a smaller --lr")
        history.append(row)
        if not RANK:
            save_reports(args, history, fakes[:64])
            save_checkpoint(args, run, history)
        print_epoch(args, row)

    # Draws the last fakes again. If a finished run is resumed, the loop above does
    # nothing, so there are none yet.
    fakes = sample(average, fixed_z)
    training = torch.cat(  # in parts: all at once could take too much memory
        [thumbnails(part / 127.5 - 1) for part in data.split(100)]
    )
    if not RANK:
        show_nearest(
            fakes[:8],
            real_images[:8],
            data,
            training,
            f"{args.out_dir}/images/nearest.png",
        )
    say(f"copy ratio {copy_ratio(fakes[:200], real_images[:200], training):.2f}")


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z):
    """Returns an image for each latent vector: N x 3 x size x size, on the CPU.

    The images are in [-1, 1], and are drawn by a copy of the generator in evaluation
    mode, in which BatchNorm uses its stored mean and variance, and not the batch's.
    """
    generator = copy.deepcopy(generator).eval()  # the original keeps its mode
    device = next(generator.parameters()).device
    parts = z.to(device).split(50)  # all at once could take too much memory
    return torch.cat([generator(part).cpu() for part in parts])


def generate(args, device, checkpoint):
    """Writes args.generate images, and besides them a grid of 64 and a latent walk.

    Another --seed gives other images. Returns the folder of the images: it is named
    generated, or generated_2 and so on if this run has generated images before.
    """
    generator = Generator(args.latent_dim, args.image_size).to(device)
    generator.load_state_dict(checkpoint["average"])
    torch.manual_seed(args.seed)
    grid = sample(generator, torch.randn(64, args.latent_dim))

    # As in gan_mnist.py, each row of the latent walk leads from z1 to z2.
    z1, z2 = torch.randn(2, 8, 1, args.latent_dim)  # 8 rows x 1 x latent_dim
    angle = torch.linspace(0, math.pi / 2, 8)[:, None]  # 8 columns x 1
    walk = z1 * angle.cos() + z2 * angle.sin()  # 8 rows x 8 columns x latent_dim
    walk = sample(generator, walk.flatten(0, 1))

    suffix = ""
    number = 1
    while os.path.exists(f"{args.out_dir}/generated{suffix}"):
        number += 1
        suffix = f"_{number}"
    folder = f"{args.out_dir}/generated{suffix}"
    os.mkdir(folder)
    # One at a time, as many large images would take too much memory.
    for i, z in enumerate(torch.randn(args.generate, 1, args.latent_dim)):
        image = ((sample(generator, z)[0] + 1) * 127.5).round().byte()
        ToPILImage()(image).save(f"{folder}/{i:05d}.png")
    save_grid(grid, f"{args.out_dir}/generated_grid{suffix}.png")
    save_grid(walk, f"{args.out_dir}/latent_walk{suffix}.png")
    return folder


# ---- from here on, nothing is about GANs: data, several GPUs, files, flags and main --

# 1.4 GB. torchvision's CelebA class fetches from Google Drive, which often refuses.
URL = "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip"
MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"


def find_images(folder):
    """Returns the paths of all images in a folder and in its subfolders, sorted.

    Hidden files and folders are left out, and so are links to folders, which may lead
    round in a circle.
    """
    images = []
    for path in sorted(Path(folder).rglob("*")):
        if "/." in f"/{path.relative_to(folder).as_posix()}":
            continue  # hidden
        if path.is_symlink() and path.is_dir():
            say(f"Left out: {path}: a link to a folder")
        # Pillow cannot read HEIC. But then these files are named, and not just skipped.
        is_image = path.suffix.lower() in {".heic", *Image.registered_extensions()}
        if is_image and path.is_file():
            images.append(path)
    return images


def find_celeba(data_dir):
    """Returns the paths of CelebA's images, after a download if there are none."""
    target = f"{data_dir}/celeba_images"
    for folder in target, f"{data_dir}/celeba", f"{data_dir}/img_align_celeba":
        images = find_images(folder)
        if images:
            return images
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        archives = [*Path(data_dir).rglob("img_align_celeba.zip")]
        if archives:  # put there by hand
            extract_archive(archives[0], f"{target}.tmp")
        else:
            download_and_extract_archive(
                URL, data_dir, f"{target}.tmp", "celeba_download.zip", MD5
            )
        os.rename(f"{target}.tmp", target)  # only when it is whole
    except Exception as error:  # torchvision raises errors of many types
        sys.exit(
            f"CelebA could be neither read nor downloaded ({error!r}). Put its "
            f"img_align_celeba.zip into {data_dir} by hand, or use images of your own, "
            f'--images FOLDER, or synthetic ones: python "{sys.argv[0]}" --toy'
        )
    return find_images(target)


def load_data(args):
    """Returns the training images, uint8 N x 3 x size x size."""
    if args.toy:
        return draw_faces(max(16, args.limit or 600), args.image_size)
    files = find_images(args.images) if args.images else find_celeba(args.data_dir)
    if not files:
        sys.exit(
            f"{args.images or args.data_dir} is no folder, or has no images that "
            "Pillow can read (convert HEIC files first). Name another by --images."
        )
    count = min(len(files), args.limit or len(files))
    files = [files[i * len(files) // count] for i in range(count)]  # evenly spread
    return decode_all(files, args.image_size, args.data_dir)


def decode_all(files, size, folder):
    """Decodes images into a file. Returns them as a tensor, uint8 N x 3 x size x size.

    The file lies in folder, but has no name, so it vanishes when the script ends in
    whatever way. The tensor is not a copy of the file in memory: whatever part of the
    tensor is used is read from the file. With several GPUs each process makes a file of
    its own.
    """
    os.makedirs(folder, exist_ok=True)
    needed = len(files) * 3 * size**2 * PROCESSES / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        sys.exit(
            f"The images need {needed:.1f} GB in {folder}, and {free:.1f} GB are free. "
            "Use another --data-dir, a smaller --image-size or fewer images, --limit."
        )
    say(f"Decoding {len(files):,} images, to {size} x {size}")
    with tempfile.TemporaryFile(dir=folder) as file, ThreadPoolExecutor(4) as pool:
        for i in range(0, len(files), 200):  # not all at once, for the memory
            file.writelines(pool.map(try_decode, files[i : i + 200], [size] * 200))
            if sys.stdout.isatty():
                say(f"{i:,} of {len(files):,}", end="\r")
        file.flush()
        count = file.tell() // (3 * size**2)
        if count < 16:
            sys.exit(f"Only {count} images can be used, and it takes 16 or more.")
        say(f"{count:,} images decoded, {len(files) - count:,} left out")
        pixels = np.memmap(file, shape=(count, size, size, 3))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def try_decode(file, size):
    """Returns what decode() does, or no bytes for an image that is damaged."""
    try:
        return decode(file, size)
    except Exception as error:  # Pillow raises errors of many types
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # the memory or the disk failed, and the image may be good
        say(f"Left out: {file}: {error}")
        return b""


def decode(file, size):
    """Returns the middle square of an image, as the bytes of size x size x 3."""
    with Image.open(file) as image:
        if min(image.size) < 8:
            raise ValueError(f"{image.width} x {image.height} is below 8 x 8")
        if image.mode == "F":
            raise ValueError("32-bit float pixels have no fixed range")
        image.draft("RGB", (size, size))  # decodes a JPEG at 1/2, 1/4, 1/8: faster
        image.load()
        with suppress(Exception):  # if its EXIF data is damaged, it stays unturned
            ImageOps.exif_transpose(image, in_place=True)
        if "I" in image.mode:  # 16 bits of grey (I, I;16 ...), where 65535 becomes 255
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        image = ImageOps.fit(image.convert("RGBA"), (size, size))
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # where it is not transparent
        return white.tobytes()


def draw_faces(count, size):
    """Draws synthetic faces of ellipses, random in colour, place and angle."""
    torch.manual_seed(0)
    vary = RandomAffine(10, (0.08, 0.08))  # turn, move
    images = []
    for _ in range(count):
        image = Image.new("RGB", (64, 64))
        draw = ImageDraw.Draw(image)
        draw.ellipse((12, 4, 52, 60), f"hsl({torch.randint(360, ())}, 60%, 70%)")
        for box in (20, 22, 28, 32), (36, 22, 44, 32), (22, 42, 42, 52):
            draw.ellipse(box, 0)  # eyes and mouth
        images.append(PILToTensor()(vary(image).resize((size, size))))
    return torch.stack(images)


# ---- several GPUs --------------------------------------------------------------------
# All processes begin with the same weights, and each computes gradients for its part of
# every batch. As all of them then learn from the mean of these gradients, their weights
# stay the same. Only BatchNorm's mean and variance are those of a process's own part.


def start_processes(args):
    """Connects the processes, and gives each of them a GPU of its own."""
    if torch.cuda.is_available() and not args.device:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group()
    distributed.barrier()  # all have looked for an old run before one begins to write


def average_over_processes(value):
    """Returns the mean of all processes' values. They are tensors, changed in place."""
    if TORCHRUN:
        distributed.all_reduce(value)  # their sum
        value /= PROCESSES
    return value


def share_gradients(network):
    """Makes backward() average each gradient over all processes, once it is computed.

    R1 calls backward() a second time. Then the sum of the old gradient, which is the
    same in all processes, and of the new one is averaged. DistributedDataParallel does
    the same faster, but it wraps a network, and so renames all its weights.
    """

    def average_gradient(weight):
        average_over_processes(weight.grad)

    for weight in network.parameters():
        weight.register_post_accumulate_grad_hook(average_gradient)


# ---- files ---------------------------------------------------------------------------


def save_checkpoint(args, run, history):
    """Writes models/: the checkpoint, and both networks by themselves for later use."""
    settings = dict(vars(args))
    for name in "out_dir", "device", "resume", "generate":  # not to be remembered
        del settings[name]
    states = {name: part.state_dict() for name, part in run.items()}
    files = {
        "checkpoint": {"settings": settings, "history": history, **states},
        "generator": states["average"],
        "discriminator": states["discriminator"],
    }
    os.makedirs(f"{args.out_dir}/models", exist_ok=True)
    for name, content in files.items():
        path = f"{args.out_dir}/models/{name}.pth"
        buffer = io.BytesIO()  # torch.save itself hides why a file cannot be written
        torch.save(content, buffer)
        # Atomically: after a kill the file is whole, either the old one or the new one.
        Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
        os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """Returns a checkpoint, and the flags with its settings in place of defaults."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        args = parse_args(**checkpoint["settings"])
    except Exception as error:  # a damaged file raises errors of many types
        sys.exit(
            f"{path} is missing, damaged or not from this script ({error!r:.300}). "
            "Train first, or set --out-dir to the folder of a run."
        )
    say(f"The run has done {len(checkpoint['history'])} epochs; {args.epochs} are due.")
    return checkpoint, args


# ---- reports -------------------------------------------------------------------------


def save_reports(args, history, images):
    """Writes the epoch's grid, losses.png and history.csv. An error is only printed."""
    epoch = len(history)
    try:
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_grid(images, f"{args.out_dir}/images/epoch_{epoch:03d}.png")
        plot_history(history, f"{args.out_dir}/losses.png")
        with open(f"{args.out_dir}/history.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(history)
    except OSError as error:
        say(f"Warning: {error}. The run continues, and tries again after an epoch.")


def plot_history(history, path):
    """Plots the losses on the left, and what lies between 0 and 1 on the right."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    # If D only guesses, p is 0.5: -2 log 0.5 is 1.386, and -log 0.5 is 0.693.
    left.set_title("dashed: the losses if D only guessed")
    left.axhline(1.386, color="C0", linestyle="--")
    left.axhline(0.693, color="C1", linestyle="--")
    right.set_ylim(0, 1)
    for name in "loss_d loss_g acc_real acc_fake fool_rate coverage".split():
        axes = left if name.startswith("loss") else right
        values = [None] + [row[name] for row in history]  # there is no epoch 0
        axes.plot(values, ".-", label=name)
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
        axes.legend()
    figure.savefig(path)


def save_gif(args):
    """Writes progress.gif from the saved grids. An error is only printed."""
    try:
        files = sorted(  # epoch_1000.png comes after epoch_999.png
            Path(f"{args.out_dir}/images").glob("epoch_*.png"),
            key=lambda file: (len(file.name), file),
        )
        frames = map(Image.open, files)  # opens one at a time
        first = next(frames, None)
        if first:
            first.save(
                f"{args.out_dir}/progress.gif",
                append_images=frames,
                save_all=True,
                duration=200,
                loop=0,
            )
    except OSError as error:
        say(f"Warning: {error}. So progress.gif is missing or old.")


def say(text, end="\n"):
    """Prints text at once. A terminal that is closed does not end the run."""
    with suppress(OSError, UnicodeError):
        print(text, end=end, flush=True)


def show_progress(step, updates, total, speed):
    """Rewrites the last line of a terminal. speed: updates per second.

    After 20 of the total updates it prints how long an epoch and the run will take.
    """
    if sys.stdout.isatty():
        say(
            f"update {step}/{total}  {speed:.1f} updates/s  "
            f"{(total - step) / speed:.0f} s left   ",
            end="\r",
        )
    if step == 20:
        say(
            f"{updates} updates an epoch, in about {updates / speed:.0f} seconds; "
            f"the whole run takes {total / speed / 60:.1f} minutes"
        )


def print_epoch(args, row):
    """Prints the numbers of an epoch, and a warning if too few real images are covered.

    In the first half of a run coverage may be low, as G has not learned much yet.
    """
    line = (
        f"epoch {row['epoch']}/{args.epochs}  loss_d {row['loss_d']:.3f}  "
        f"loss_g {row['loss_g']:.3f}  acc_real {row['acc_real']:.2f}  "
        f"acc_fake {row['acc_fake']:.2f}  fool_rate {row['fool_rate']:.2f}  "
        f"coverage {row['coverage']:.2f}  "
        f"{row['seconds']:.1f} s  {row['images_per_s']:,.0f} images/s"
    )
    if row["coverage"] < 0.2 and row["epoch"] > args.epochs / 2:
        line += "  LOW COVERAGE"
    say(line)


# ---- flags and main ------------------------------------------------------------------


def parse_args(**settings):
    """Returns the flags. settings: those of a resumed run, in place of the defaults."""
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--images", type=os.path.realpath, help="folder of your own images (CelebA)")
    flag(
        "--image-size",
        type=int,
        choices=[32, 64, 128, 256],
        default=64,
        help="width and height (%(default)s)",
    )
    flag(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the images: not for text (%(default)s)",
    )
    flag("--epochs", type=positive, help="of at least 100 updates each (50; toy 5)")
    flag(
        "--batch-size",
        type=positive,
        default=16,
        help="images per update; on a GPU rather 64 (%(default)s)",
    )
    flag("--lr", type=float, help="first learning rate (4e-4; toy 1e-3)")
    flag("--beta1", type=float, default=0.5, help="Adam's beta1 (%(default)s)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where images are or go (%(default)s)")
    flag("--out-dir", default="runs/dcgan_celeba", help="results (%(default)s)")
    flag("--limit", type=positive, help="use only so many images, evenly chosen (all)")
    flag("--toy", action="store_true", help="learn synthetic faces, with no download")
    flag("--seed", type=int, default=0, help="random seed (%(default)s)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    flag(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 mixed precision (default: on CPUs that have it)",
    )
    flag("--resume", action="store_true", help="continue the run in --out-dir, if any")
    flag("--generate", type=positive, help="write so many images (--seed 1: others)")
    parser.set_defaults(**settings)
    args = parser.parse_args()
    args.epochs = args.epochs or (5 if args.toy else 50)
    if args.lr is None:
        args.lr = 1e-3 if args.toy else 4e-4
    if not (args.lr > 0 and 0 <= args.beta1 < 1 and 0 <= args.seed < 2**32):
        parser.error(
            "--lr has to be above 0, --beta1 in [0, 1) and --seed in [0, 2**32), not "
            f"{args.lr}, {args.beta1} and {args.seed}"
        )
    if args.toy and args.images:
        parser.error("--toy learns synthetic faces: leave out --toy or --images")
    for name in "image_size", "latent_dim", "beta1", "toy":
        if settings and vars(args)[name] != settings[name]:
            sys.exit(
                f"This run has --{name.replace('_', '-')} {settings[name]}, which "
                "stays: leave it out, or start a new run in another --out-dir."
            )
    return args


def positive(text):
    """Returns a flag's text as a whole number from 1 up."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def choose_device(name):
    """Returns the device of that name; without one, the GPU, or else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    try:
        return torch.ones(1, device=name or found or "cpu").device
    except Exception as error:  # torch raises errors of many types
        sys.exit(f"{name or found} cannot be used ({error}). Add --device cpu.")


def has_bfloat16(device):
    """Tells whether bfloat16 is the default: on CPUs that compute with it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
    return device.type == "cpu" and capabilities.get("avx512_bf16", False)


def main():
    args = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # process 0 prints for all
    path = f"{args.out_dir}/models/checkpoint.pth"
    checkpoint = {}
    if args.generate or args.resume and os.path.exists(path):
        checkpoint, args = load_checkpoint(path)
    elif os.path.exists(f"{args.out_dir}/models/generator.pth") or os.path.exists(
        f"{args.out_dir}/images"
    ):
        sys.exit(
            f"{args.out_dir} holds a run. Continue it by --resume, which needs its "
            "models/checkpoint.pth, or name another --out-dir."
        )
    elif args.resume:
        say(f"There is no run in {args.out_dir} yet, so this starts one.")
    if args.images and Path(args.out_dir).resolve().is_relative_to(args.images):
        sys.exit("--out-dir must not lie in --images: what is in it would be learned.")
    if TORCHRUN:
        start_processes(args)
    device = choose_device(args.device)
    try:
        if args.generate:
            say(f"The images are in {generate(args, device, checkpoint)}.")
            return
        data = load_data(args)
        size = args.batch_size
        if size % PROCESSES or not 2 * PROCESSES <= size <= len(data):
            sys.exit(
                f"--batch-size {size} does not fit {len(data)} images: a batch can "
                "have 2 images up to all. (Several GPUs need 2 each, and equal parts.)"
            )
        bf16 = has_bfloat16(device) if args.bf16 is None else args.bf16
        say(
            f"{len(data):,} images, {size} of them in a batch, on {device} in "
            f"{'bfloat16' if bf16 else 'float32'}"
        )
        train(args, device, bf16, data, checkpoint)
        if TORCHRUN:
            distributed.destroy_process_group()
        say(f"The results are in {args.out_dir}.")
    except (
        OSError,
        FloatingPointError,
        torch.OutOfMemoryError,
        KeyboardInterrupt,
    ) as error:  # all others are bugs, and end in a traceback
        again = subprocess.list2cmdline(["python", *sys.argv, "--resume"])
        sys.exit(f"\n{str(error) or 'Stopped'}. To go on: {again}")  # Ctrl-C: no text
    finally:
        if not RANK and not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
