"""A GAN that draws clothes (Fashion-MNIST), and how to tell whether training goes well.

Read gan_mnist.py first: the networks resemble its convolutional pair. New here are:

- numbers that tell how far D is ahead, and whether G copies its training images;
- R1, a second loss of D, with which D's gradient stays useful to G. The docstring of
  r1_penalty explains it. R1 also holds D back, so D has no dropout here;
- images of a class that you choose (--conditional).

The new numbers of the printed line are about D's decisions. D takes an image for real
if p is above 0.5, that is, if its logit is above 0.

- acc_real is the share of the real images that D takes for real, before its update.
- acc_fake is the share of the fakes that D takes for fakes, before its update.
- fool_rate is the share of the same fakes that D takes for real after its update. If it
  is 0.00, D is far ahead.

Test images are real images on which neither network is trained. Coverage is the share
of 1,000 test images that have a fake close by. (In gan_mnist.py it is measured with
training images, and copies of them would score high.) Values differ by a hundredth or
two from run to run. 1,000 training images in place of the fakes score 0.98.

At the end of a run the copy ratio is printed. It tells whether G just copies. First we
measure how far each fake is from the training image that is nearest to it, and take the
median. Then we do the same with test images in place of the fakes. The copy ratio is
the first median divided by the second. If it is near 1, fakes differ from the training
images as much as test images do. Exact copies would give 0, and noisy copies a value
between 0 and 1. If it is well above 1, the fakes do not even resemble clothes. (A
median does not notice if only a few fakes are copies.)

Here are the numbers of the last epoch of a healthy run, and of three runs that went
wrong on purpose. The first five are means over the epoch. Coverage and the copy ratio
are those of the averaged generator, which also draws the grids.

                loss_d  loss_g  acc_real  acc_fake  fool_rate  coverage  copy ratio
    healthy       1.15    0.87      0.81      0.82       0.15      0.97        1.04
    collapsed     1.39    0.70      0.08      0.85       0.14      0.11        1.51
    D has won     0.25    2.49      0.99      1.00       0.00      0.01        2.24
    copies        0.26    2.99      1.00      0.99       0.00      0.52        0.51

Look at the grids first, then at coverage, then at the copy ratio. The other numbers
help to understand what happened.

- Healthy: the grid shows different clothes, coverage is high, and the copy ratio is
  near 1. D is ahead: it is right about most images. But it is not sure, as loss_d is
  closer to 1.39, where D only guesses, than to 0. A fool rate of 0.15 is no bad sign. A
  fake need not fool D to be useful: what G learns from is how D's logit changes when
  the pixels of the fake change.
- Collapsed: with --g-steps 20, D learns only once while G learns 20 times. Meanwhile G
  moves all its images to whatever D likes at that moment. The grid repeats a few
  smudges, and coverage is 0.11. (A healthy run has 0.98 after as many epochs.) The
  losses do not show the failure: they are those of a D that only guesses, and a perfect
  game would end in the same way. The accuracies look strange, but for another reason. D
  has learned so little that p is nearly the same for all images, real or fake, and a
  little below 0.5. So nearly all of them count as fakes. If p were a little above 0.5,
  nearly all would count as real.
- D has won: D is right about nearly all images, and sure of it. The grid shows blots,
  and coverage is near 0. We brought this about by --beta1 0.9, which means more
  momentum (see train in gan_mnist.py), and by a learning rate of 0.01 instead of 0.002.
- Copies: there are only 30 training images, and D knows them by heart. So its logit is
  high only near these 30, and its gradient leads each fake to one of them, although G
  never sees them. The first five numbers look as if D had won. But the grid shows
  clothes, and the copy ratio tells that they are noisy copies. In images/nearest.png
  you can compare 16 fakes with the training images that are nearest to them.

    python gan_fashion.py
        healthy: 9 minutes on two CPU cores
    python gan_fashion.py --g-steps 20 --epochs 2 --out-dir runs/collapsed
        collapses: 80 seconds
    python gan_fashion.py --beta1 0.9 --lr 0.01 --epochs 2 --out-dir runs/won
        D wins: 2 minutes
    python gan_fashion.py --limit 30 --batch-size 10 --epochs 45 --out-dir runs/copies
        copies: 2 minutes
    python gan_fashion.py --conditional --out-dir runs/classes
        learns the classes, and draws one class in each row of the grids
    python gan_fashion.py --toy --out-dir runs/fashion_toy
        synthetic letters, with no download

To use the averaged generator elsewhere, copy this file, common.py and, from the run's
folder models, generator.pth:

    import gan_fashion, torch
    generator = gan_fashion.Generator(latent_dim=100)
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    labels = torch.zeros(64, dtype=torch.int64)  # 0 to 9 after --conditional
    images = gan_fashion.sample(generator, torch.randn(64, 100), labels)  # in [-1, 1]
"""

import argparse
import copy
import csv
import io
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim import Adam
from torchvision.datasets import FashionMNIST
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid

# ---- networks ------------------------------------------------------------------------
# A comment beside a layer is the shape of its output for one image. All convolutions
# have kernels of 4 x 4 pixels, a stride of 2 and a padding of 1.


class Generator(nn.Sequential):
    """Turns latent vectors N x latent_dim and labels N into images N x 1 x 28 x 28.

    Labels are whole numbers from 0 to 9. The images are in [-1, 1].
    """

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim + 10, 512),  # 512; for the 10, see forward()
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 3136),  # 3136
            nn.Unflatten(1, (64, 7, 7)),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),  # 32 x 14 x 14
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # 1 x 28 x 28
            nn.Tanh(),  # 1 x 28 x 28, in [-1, 1]
        )

    def forward(self, z, labels):
        # G gets ten more numbers for the class: the one in the place of the label is 1,
        # and the others are 0. Without --conditional the label is always 0.
        classes = nn.functional.one_hot(labels, 10)
        return super().forward(torch.cat([z, classes], 1))


class Discriminator(nn.Sequential):
    """Turns images N x 1 x 28 x 28 in [-1, 1] and labels N into logits N x 1."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 4, 2, 1),  # 32 x 14 x 14
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # 3136
            nn.Linear(3136, 256),  # 256
            nn.LeakyReLU(0.2),
            nn.Linear(256, 10),  # 10 logits, one for each class
        )

    def forward(self, x, labels):
        # D has ten logits for each image, and gather() keeps only that of its label. So
        # logit k learns from real images of class k, and from fakes that G drew for
        # label k. Class 3 has the dresses. If G draws a boot for label 3, logit 3
        # becomes low for this boot, as none of the real images of class 3 is a boot.
        # (Without --conditional all labels are 0, and only logit 0 is used.)
        return super().forward(x).gather(1, labels[:, None])


# ---- training ------------------------------------------------------------------------


def train_step(generator, discriminator, opt_g, opt_d, real, labels, z, train_d, r1):
    """Updates D, then G. Returns the numbers of this step, as tensors.

    real: images N x 1 x 28 x 28 in [-1, 1]; z: latent vectors N x latent_dim; labels:
    N, the classes of the real images, or all 0; the fakes get the same labels. With
    train_d=False D does not learn in this step. With r1=True it also learns from R1.
    """
    fake = generator(z, labels)

    # (1) Update D: make loss_d = -log p(real) - log(1 - p(fake)) smaller.
    real_logits = discriminator(real, labels)
    fake_logits = discriminator(fake.detach(), labels)
    ones = torch.ones_like(real_logits)
    loss_d = bce(real_logits, ones) + bce(fake_logits, torch.zeros_like(fake_logits))
    if train_d:
        opt_d.zero_grad()
        loss_d.backward()
        if r1:
            # Adds the gradients of a second loss to those of loss_d.
            r1_penalty(discriminator, real, labels).backward()
        opt_d.step()

    # (2) Update G: make loss_g = -log p(fake) smaller. D does not learn from it.
    discriminator.requires_grad_(False)
    new_fake_logits = discriminator(fake, labels)
    loss_g = bce(new_fake_logits, ones)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)

    return {
        "loss_d": loss_d.detach(),  # without R1
        "loss_g": loss_g.detach(),
        "acc_real": (real_logits > 0).float().mean(),  # p > 0.5 where the logit > 0
        "acc_fake": (fake_logits < 0).float().mean(),
        "fool_rate": (new_fake_logits > 0).float().mean(),
    }


R1_INTERVAL = 16  # R1 is computed at every 16th update only, as it is slow
R1_WEIGHT = 0.25 * R1_INTERVAL  # 16 times as large, to make up for it


def r1_penalty(discriminator, real, labels):
    """Returns R1, a second loss for D (Mescheder et al. 2018), for real images.

    It is large if small changes of real images change D's logit much. Take a real
    image. For each pixel we ask how the logit would change if this pixel changed a
    little. These numbers are the logit's gradient with respect to the pixels, and the
    sum of their squares is its squared length. R1 is the mean of this sum over real
    images, times R1_WEIGHT.

    Why does this help G? Without R1, D can tell fakes from real images by fine patterns
    of pixels that nobody would see: a tiny change of such a pattern makes D sure. Then
    D's gradient mostly asks G for other patterns, and hardly for better clothes. With
    R1, it costs D too much to be so sensitive. No tiny change can move its logit much,
    but a large one, such as a missing sleeve, still can. R1 is measured at real images
    only. But the same layers look at fakes, so D becomes less sensitive there, too.

    Try it: set R1_WEIGHT to 0, and train with another --out-dir. Then more of the
    clothes in the grid are torn or smeared, and D gets further ahead: after 10 epochs
    loss_d is 0.44 instead of 1.15, and the fool rate 0.05 instead of 0.15. We also
    measured how long D's gradient is, at real images and at fakes alike: about 10
    without R1, and 0.6 with it. (Coverage hardly notices: it is 0.95 instead of 0.97.)

    R1 takes time, because a gradient has to be differentiated once more. So it is
    computed for half of the batch only, and at every 16th update of D (lazy
    regularization, Karras et al. 2020). The factor of 0.25 was found by trying.
    """
    half = len(real) // 2
    real = real[:half].requires_grad_()  # so that gradients for pixels can be computed
    logits = discriminator(real, labels[:half])
    # We need a gradient for each image, by a single call. So we differentiate the sum
    # of all logits. An image changes only its own logit in this sum, so what we get for
    # its pixels is the gradient of this logit. (In fact BatchNorm mixes the images of a
    # batch a little. In the paper D has no BatchNorm.) With create_graph=True,
    # backward() can then compute how R1 depends on D's weights.
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


def coverage(real, fake):
    """Returns the share of the real images that are covered, between 0 and 1.

    Around each real image, think of a circle that reaches to its fifth-closest other
    real image. The image is covered if at least one fake lies within its circle (Naeem
    et al. 2020). real and fake are N x C x H x W, and are compared pixel by pixel.
    """
    real = real.flatten(1)
    # The 6th smallest distance, as the smallest is from an image to itself.
    radius = torch.cdist(real, real).kthvalue(6).values  # one for each real image
    distance_of_fake = torch.cdist(real, fake.flatten(1)).amin(1)  # of the nearest
    return (distance_of_fake < radius).float().mean().item()


def nearest(images, training):
    """Returns the distances to the nearest training images, and their indices."""
    return torch.cdist(images.flatten(1), training.flatten(1)).min(1)


def copy_ratio(fakes, held_out, training):
    """Returns the copy ratio: near 1 if fakes are new, towards 0 if they are copies.

    It is the median distance of the fakes from their nearest training image, divided by
    the median distance of held-out real images from their nearest training image.
    Neither network is trained on held-out images. All three are N x C x H x W.
    """
    distance = nearest(fakes, training).values.median()
    distance_of_new = nearest(held_out, training).values.median()
    return distance / distance_of_new


def show_nearest(fakes, held_out, training, path):
    """Saves a grid of five rows: 16 fakes, their nearest training images, a gap, 16
    held-out real images, and their nearest training images.

    Even a new image resembles its nearest training image. So look how much the first
    row resembles the second one, and then how much the last but one resembles the last.
    If the first two rows are much more alike, G copies.
    """
    rows = []
    for images in (fakes, held_out):
        images = images[:: len(images) // 16][:16]  # spread over the list
        found = training[nearest(images, training).indices]
        rows += [images, found, torch.ones_like(images)]  # a white row as a gap
    save_grid(torch.cat(rows[:-1]), path, columns=16)


MIN_EPOCH_STEPS = 100


def train_epoch(
    args, epoch, data, labels, generator, discriminator, average, opt_g, opt_d
):
    """Trains for one epoch. Returns the means of the steps' numbers, and the time."""
    start = time.perf_counter()
    # With this seed, a resumed run draws the same random numbers in this epoch as a run
    # that was never stopped.
    torch.manual_seed(args.seed * 10_000 + epoch)
    # `order` is a shuffled list of the indices of images. An epoch shows each image
    # once, or several times if there are so few images that it would have less than
    # MIN_EPOCH_STEPS updates. For 3,200 images there are 2 repeats. randperm() shuffles
    # the numbers from 0 to 6,399. Divided by 3,200, both 7 and 3,207 leave the
    # remainder 7, so image 7 is there twice.
    repeats = math.ceil(MIN_EPOCH_STEPS * args.batch_size / len(data))
    order = torch.randperm(repeats * len(data), device=data.device) % len(data)
    updates = len(order) // args.batch_size  # a last, shorter batch is left out
    total = args.epochs * updates
    step = first = (epoch - 1) * updates
    sums = Counter()  # sums.update() adds the numbers of a step to the sums so far
    for indices in order.split(args.batch_size)[:updates]:
        # The learning rate falls to 0, so that both networks change less and less.
        for opt in opt_d, opt_g:
            opt.param_groups[0]["lr"] = args.lr * (1 - step / total)
        real = data[indices] / 127.5 - 1  # from [0, 255] to [-1, 1], as fakes are
        z = torch.randn(args.batch_size, args.latent_dim, device=data.device)
        y = labels[indices]
        train_d = step % args.g_steps == 0
        r1 = step % (args.g_steps * R1_INTERVAL) == 0
        sums.update(
            train_step(generator, discriminator, opt_g, opt_d, real, y, z, train_d, r1)
        )
        step += 1
        update_average(average, generator, step)
        speed = (step - first) / (time.perf_counter() - start)
        show_progress(step, total, speed)
    row = {"epoch": epoch}
    for name, value in sums.items():
        row[name] = (value / updates).item()
    row["seconds"] = time.perf_counter() - start
    row["images_per_s"] = updates * args.batch_size / row["seconds"]
    return row


def train(args, device, data, labels, held_out, checkpoint):
    """Trains on data, uint8 N x 1 x 28 x 28, and writes all results to args.out_dir.

    labels: the classes N, 0 to 9; held_out: 1,000 real images in [-1, 1] which are not
    trained on; checkpoint: that of the run to continue, or {} to begin one. Raises
    OSError if a checkpoint cannot be written, and FloatingPointError if a loss is not
    finite.
    """
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim).apply(init_weights).to(device)
    discriminator = Discriminator().apply(init_weights).to(device)
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
    save_checkpoint(args, run, history)  # if this is impossible, we know it now

    # All grids are drawn from the same latent vectors and the same labels. The labels
    # are ten times 0, ten times 1 and so on up to 9, and then from 0 again. Without
    # --conditional all are 0.
    classes = 10 if args.conditional else 1
    fixed_z = torch.randn(1000, args.latent_dim)
    fixed_labels = torch.arange(1000) // 10 % classes
    if not history:
        by_class = torch.cat([data[labels == k][:10] for k in range(10)]) / 127.5 - 1
        save_grid(by_class, f"{args.out_dir}/images/real.png", columns=10)
        fakes = sample(average, fixed_z, fixed_labels)
        save_square(args, fakes, f"{args.out_dir}/images/epoch_000.png")
    images = data.to(device)
    labels = (labels % classes).to(device)  # all 0 if classes is 1
    for epoch in range(len(history) + 1, args.epochs + 1):
        row = train_epoch(args, epoch, images, labels, **run)
        fakes = sample(average, fixed_z, fixed_labels)
        row["coverage"] = coverage(held_out, fakes)
        if not fakes.isfinite().all():  # a loss, and then all weights, became NaN
            raise FloatingPointError("A loss is not finite: add a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes)
        save_checkpoint(args, run, history)
        print_epoch(args, row)

    # Draws the last fakes again. If a finished run is resumed, the loop above does
    # nothing, so there are none yet.
    fakes = sample(average, fixed_z, fixed_labels)
    training = data / 127.5 - 1
    show_nearest(fakes, held_out, training, f"{args.out_dir}/images/nearest.png")
    say(f"copy ratio {copy_ratio(fakes, held_out, training):.2f}")


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z, labels):
    """Returns an image for each z and label: N x 1 x 28 x 28 in [-1, 1], on the CPU.

    The images are drawn by a copy of the generator in evaluation mode, in which
    BatchNorm uses its stored mean and variance, and not those of the batch.
    """
    generator = copy.deepcopy(generator).eval()  # the original keeps its mode
    device = next(generator.parameters()).device
    parts = zip(z.to(device).split(500), labels.to(device).split(500))  # saves memory
    return torch.cat([generator(*part).cpu() for part in parts])


CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()


def generate(args, device, checkpoint):
    """Writes args.generate images, and besides them a grid and a latent walk.

    With --conditional, image 0 is of class 0, image 1 of class 1 and so on, each class
    has its own folder, and each row of the grid and of the walk shows one class.
    Another --seed gives other images. Returns the folder of the images: it is named
    generated, or generated_2 and so on if this run has generated images before.
    """
    generator = Generator(args.latent_dim).to(device)
    generator.load_state_dict(checkpoint["average"])
    torch.manual_seed(args.seed)
    classes = 10 if args.conditional else 1
    row_labels = torch.arange(100) // 10 % classes  # one class per row
    grid = sample(generator, torch.randn(100, args.latent_dim), row_labels)

    # As in gan_mnist.py, each row of the latent walk leads from z1 to z2. With
    # --conditional, each row is of another class.
    z1, z2 = torch.randn(2, 10, 1, args.latent_dim)  # 10 rows x 1 x latent_dim
    angle = torch.linspace(0, math.pi / 2, 10)[:, None]  # 10 columns x 1
    walk = z1 * angle.cos() + z2 * angle.sin()  # 10 rows x 10 columns x latent_dim
    walk = sample(generator, walk.flatten(0, 1), row_labels)

    suffix = ""
    number = 1
    while os.path.exists(f"{args.out_dir}/generated{suffix}"):
        number += 1
        suffix = f"_{number}"
    folder = f"{args.out_dir}/generated{suffix}"
    labels = torch.arange(args.generate) % classes  # of each class in turn
    images = sample(generator, torch.randn(args.generate, args.latent_dim), labels)
    names = "ABCDEFGHIJ" if args.toy else CLASSES
    for i, image in enumerate(((images + 1) * 127.5).round().byte()):
        place = f"{folder}/{i % 10}_{names[i % 10]}" if args.conditional else folder
        os.makedirs(place, exist_ok=True)
        ToPILImage()(image).save(f"{place}/{i:05d}.png")
    save_square(args, grid, f"{args.out_dir}/generated_grid{suffix}.png")
    save_grid(walk, f"{args.out_dir}/latent_walk{suffix}.png", columns=10)
    return folder


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args, train):
    """Returns images, uint8 N x 1 x 28 x 28, and labels N, of training or test set."""
    count = args.limit if train else 1000
    if args.toy:
        return draw_letters(count or 6400, train)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        data = FashionMNIST(args.data_dir, train, download=True)
    except Exception as error:  # torchvision raises errors of many types
        sys.exit(
            f"Fashion-MNIST could be neither read nor downloaded ({error!r}). Delete "
            f"{args.data_dir}/FashionMNIST if its files are damaged. Without internet, "
            f"put {', '.join(name for name, _ in FashionMNIST.resources)} into its "
            f'folder raw by hand, or learn letters: python "{sys.argv[0]}" --toy'
        )
    return data.data[:count, None], data.targets[:count]


def draw_letters(count, train):
    """Draws synthetic letters, each a little different in place, size and angle."""
    torch.manual_seed(1 if train else 0)
    vary = RandomAffine(10, (0.07, 0.07), (0.9, 1.1))  # turn, move, resize
    font = ImageFont.load_default(22)
    images = []
    for i in range(count):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), chr(65 + i % 10), 255, font, anchor="mm")
        images.append(PILToTensor()(vary(image)))
    return torch.stack(images), torch.arange(count) % 10


# ---- files ---------------------------------------------------------------------------


def save_checkpoint(args, run, history):
    """Writes models/: the checkpoint, and both networks by themselves for later use."""
    settings = dict(vars(args))
    for name in ("out_dir", "device", "resume", "generate"):  # not to be remembered
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


def save_square(args, images, path):
    """Saves a grid of 9 x 9, or with --conditional of 10 x 10, one class per row."""
    columns = 10 if args.conditional else 9
    save_grid(images[: columns**2], path, columns)


# ---- reports -------------------------------------------------------------------------


def save_reports(args, history, images):
    """Writes the epoch's grid, losses.png and history.csv. An error is only printed."""
    epoch = len(history)
    try:
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_square(args, images, f"{args.out_dir}/images/epoch_{epoch:03d}.png")
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


def show_progress(step, total, speed):
    """Rewrites the last line of a terminal. speed: updates per second."""
    if sys.stdout.isatty():
        say(
            f"update {step}/{total}  {speed:.1f} updates/s  "
            f"{(total - step) / speed:.0f} s left   ",
            end="\r",
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
    flag("--conditional", action="store_true", help="show G and D an image's class")
    flag("--g-steps", type=positive, default=1, help="updates of G per one of D (1)")
    flag(
        "--epochs",
        type=positive,
        default=10,
        help="of at least 100 updates each (%(default)s)",
    )
    flag(
        "--batch-size",
        type=positive,
        default=64,
        help="images per update (%(default)s)",
    )
    flag("--lr", type=float, default=2e-3, help="first learning rate (%(default)s)")
    flag("--beta1", type=float, default=0.0, help="Adam's beta1 (%(default)s)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=2, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where images are or go (%(default)s)")
    flag("--out-dir", default="runs/gan_fashion", help="results (%(default)s)")
    flag("--limit", type=positive, help="use only the first so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic letters, with no download")
    flag("--seed", type=int, default=0, help="random seed (%(default)s)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    flag("--resume", action="store_true", help="continue the run in --out-dir, if any")
    flag("--generate", type=positive, help="write so many images (--seed 1: others)")
    parser.set_defaults(**settings)
    args = parser.parse_args()
    if not (args.lr > 0 and 0 <= args.beta1 < 1 and 0 <= args.seed < 2**32):
        parser.error(
            "--lr has to be above 0, --beta1 in [0, 1) and --seed in [0, 2**32), not "
            f"{args.lr}, {args.beta1} and {args.seed}"
        )
    for name in ("conditional", "latent_dim", "beta1", "toy"):
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


def main():
    args = parse_args()
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
    device = choose_device(args.device)
    try:
        if args.generate:
            say(f"The images are in {generate(args, device, checkpoint)}.")
            return
        data, labels = load_data(args, train=True)
        held_out = load_data(args, train=False)[0] / 127.5 - 1
        if not 2 <= args.batch_size <= len(data):  # BatchNorm needs 2 images
            sys.exit(
                f"--batch-size has to be from 2 to {len(data)}, not {args.batch_size}."
            )
        say(f"{len(data):,} images, on {device}")
        train(args, device, data, labels, held_out, checkpoint)
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
        if not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
