"""A deep convolutional GAN (DCGAN) that draws small colour photographs, on CIFAR-10.

Read gan_mnist.py and gan_fashion.py first: they explain the game, labels, R1 and the
numbers of the printed line. New here are the rules of the DCGAN paper (Radford et al.
2015), some of which you have seen there already, and what makes training fast.

Before that paper, convolutional GANs were hard to train. Its authors found networks
that train more stably. Here are their rules. In the code, a comment names each rule
where it first occurs.

Rule 1. Strides instead of pooling. A pooling layer halves height and width in a fixed
    way. In D, convolutions with a stride of 2 halve them, and learn how to do it. In G,
    transposed convolutions with a stride of 2 double them.
Rule 2. No hidden fully connected layers. Such a layer has separate weights for each
    place in the image. A convolution uses the same few weights everywhere: what it
    learns in one corner of an image, it can use in all others. (G's first layer and D's
    last one are convolutions only in name. They begin or end with a single pixel, so
    they do the same as a fully connected layer.)
Rule 3. BatchNorm in both networks. It keeps the numbers in all layers at one scale, so
    that gradients neither vanish nor explode on their way through many layers. The
    paper leaves it out of G's last layer and of D's first one, because training was
    unstable with it there. We also leave it out of D's last layer. There it would give
    all batches of logits the same mean. D sees real images and fakes in separate
    batches, so it could never say that a whole batch is fake.
Rule 4. ReLU in G, with tanh at its end, as pixels lie in [-1, 1]. LeakyReLU in D: its
    slope is nowhere 0, so that gradients get through D to G. (In G both work: in
    gan_mnist.py and gan_fashion.py G has LeakyReLU.)
Rule 5. Small random weights at the start, with a standard deviation of 0.02. With them
    the numbers that go into G's tanh are near 0 at first. So the first images are
    nearly grey. Near 0 tanh is steep, and lets gradients through.
Rule 6. Adam with a learning rate of 0.0002, and with little momentum: a beta1 of 0.5
    instead of the usual 0.9. Momentum pushes on in the direction of old gradients,
    although the other network has changed since.

Where we differ from the paper:

- There is R1, the learning rate is ten times as high, 0.002, and there is no momentum
  (beta1 is 0). We also tried the paper's way: --lr 2e-4 --beta1 0.5, and R1_WEIGHT = 0
  in the code below. After 7 epochs D was far ahead, with a loss_d of 0.26 instead of
  1.20, and more of the shapes in the grid were torn. We changed three things at once
  there, so this does not tell which of them matters most. We think that it is R1, as
  it keeps D from getting far ahead.
- Layers have 48 to 192 channels, not 128 to 1024, and kernels of 4 x 4, not 5 x 5, so
  that a laptop can train them. Batches have 64 images, not 128.
- The learning rate falls to 0, images are mirrored at random, and all grids are drawn
  by the averaged generator.
- D has ten outputs, one for each class, as in gan_fashion.py. (Liu et al. 2019 call
  this a multi-task discriminator.) Without --conditional only the first one is used.

What makes it fast? All times here were measured on two cores of an Intel Xeon of 2023.

- Channels last. Usually the numbers of an image lie in memory channel after channel:
  first all of its red, then all of its green, then all of its blue. With channels last,
  all channels of a pixel lie side by side. (Within the networks there are up to 192
  channels.) A convolution needs all channels of a pixel together, and now it can read
  them in one piece. The results are the same, apart from rounding. An update is 1.15
  times as fast.
- bfloat16, a number format of 16 bits. Its numbers can be as large or as small as those
  of the usual float32, but have only two to three significant digits. In a block of
  code that begins with autocast, PyTorch computes convolutions in bfloat16. (This is
  called mixed precision.) Then only half as much has to be read from memory, and newer
  processors have special units for bfloat16. The weights themselves, and what Adam
  remembers, stay in float32, because small changes would be lost by rounding. An update
  is 1.35 times as fast with bfloat16, and 1.5 times with channels last as well.

bfloat16 is the default on CPUs that have such units, if PyTorch is 2.11 or newer.
--no-bf16 turns it off. Many GPUs can use it, too, but we have not measured that: try
--bf16.

What to expect from a healthy run, at its last epoch:

                               loss_d  loss_g  acc_real  acc_fake  fool_rate  coverage
     7 epochs                    1.20    0.87      0.75      0.77       0.14      0.97
    50 epochs                    0.91    1.04      0.98      0.98       0.02      0.94
    50 epochs, --conditional     0.86    1.13      0.94      0.95       0.05      0.96

After 50 epochs D is nearly always on the right side of p = 0.5, but it is not sure: a
loss_d of 0.91 means that p is about 0.63 for real images and 0.37 for fakes. So D has
not won. With --conditional D is wrong a little more often, but loss_d is lower, so D
must be surer where it is right. At first sight the images look like photographs, with
natural colours, but without --conditional few objects in them can be recognised. With
it, many horses, cars and ships can be, and some birds.

Coverage, measured with 1,000 training images again, does not tell whether objects can
be recognised. It compares images pixel by pixel, and what counts most then is which
large areas are bright and which are dark. After 50 epochs the images are clearly better
than after 7, although 0.94 is a little less than 0.97. To see what the numbers mean, we
put real photographs in place of the fakes. Photographs of all classes score 0.98.
Photographs of birds alone still score 0.96: many have a plain background, and an image
with little contrast is close to many others. Photographs of trucks alone, with strong
contrasts, score 0.39. The same five photographs, many times each, score 0.02. So late
in a run, a low coverage means that something is wrong, but a high one means little.

    python dcgan_cifar10.py --epochs 7 --out-dir runs/short
        10 minutes on two CPU cores
    python dcgan_cifar10.py
        50 epochs: 70 minutes
    python dcgan_cifar10.py --conditional --out-dir runs/cifar_classes
        learns the classes, and draws one class in each row of the grids: 70 minutes
    python dcgan_cifar10.py --toy --out-dir runs/cifar_toy
        coloured letters, with no download

To use the averaged generator elsewhere, copy this file, common.py and, from the run's
folder models, generator.pth:

    import dcgan_cifar10, torch
    generator = dcgan_cifar10.Generator(latent_dim=100)
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    labels = torch.zeros(64, dtype=torch.int64)  # 0 to 9 after --conditional
    images = dcgan_cifar10.sample(generator, torch.randn(64, 100), labels)  # in [-1, 1]
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
from torchvision.datasets import CIFAR10
from torchvision.transforms import PILToTensor, RandomCrop, ToPILImage

from common import init_weights, save_grid

# ---- networks ------------------------------------------------------------------------
# A comment beside a layer is the shape of its output for one image.


class Generator(nn.Sequential):
    """Turns latent vectors N x latent_dim and labels N into images N x 3 x 32 x 32.

    Labels are whole numbers from 0 to 9. The images are in [-1, 1].
    """

    def __init__(self, latent_dim=100):
        super().__init__(
            # Rule 2: z and the class come as an image of one pixel, with latent_dim +
            # 10 channels. A transposed convolution with a stride of 1 and no padding
            # (the defaults) makes one pixel as large as the kernel, 4 x 4.
            nn.ConvTranspose2d(latent_dim + 10, 192, 4),  # 192 x 4 x 4
            nn.BatchNorm2d(192),  # rule 3
            nn.ReLU(),  # rule 4
            # Rule 1: a stride of 2, with kernels of 4 x 4 pixels and a padding of 1.
            nn.ConvTranspose2d(192, 96, 4, 2, 1),  # 96 x 8 x 8
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.ConvTranspose2d(96, 48, 4, 2, 1),  # 48 x 16 x 16
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.ConvTranspose2d(48, 3, 4, 2, 1),  # 3 x 32 x 32: red, green and blue
            nn.Tanh(),  # 3 x 32 x 32, in [-1, 1]
        )

    def forward(self, z, labels):
        # As in gan_fashion.py, ten more numbers: a 1 in the place of the label, else 0.
        classes = nn.functional.one_hot(labels, 10)
        # [:, :, None, None] makes images of one pixel, N x (latent_dim + 10) x 1 x 1.
        return super().forward(torch.cat([z, classes], 1)[:, :, None, None])


class Discriminator(nn.Sequential):
    """Turns images N x 3 x 32 x 32 in [-1, 1] and labels N into logits N x 1."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 48, 4, 2, 1),  # 48 x 16 x 16
            nn.LeakyReLU(0.2),
            nn.Conv2d(48, 96, 4, 2, 1),  # 96 x 8 x 8
            nn.BatchNorm2d(96),
            nn.LeakyReLU(0.2),
            nn.Conv2d(96, 192, 4, 2, 1),  # 192 x 4 x 4
            nn.BatchNorm2d(192),
            nn.LeakyReLU(0.2),
            nn.Conv2d(192, 10, 4),  # 10 x 1 x 1: a logit for each class (rule 2)
            nn.Flatten(),  # 10
        )

    def forward(self, x, labels):
        # gather() takes, of the ten logits of each image, the one of its class.
        return super().forward(x).gather(1, labels[:, None])


# ---- training ------------------------------------------------------------------------


def train_step(generator, discriminator, opt_g, opt_d, real, labels, z, r1, bf16):
    """Updates D once, then G once. Returns the numbers of this step, as tensors.

    real: images N x 3 x 32 x 32 in [-1, 1]; z: latent vectors N x latent_dim; labels:
    N, the classes of the real images, or all 0; the fakes get the same labels. With
    r1=True D also learns from R1. With bf16=True convolutions are computed in bfloat16.
    """
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)

    # (1) Update D: make loss_d = -log p(real) - log(1 - p(fake)) smaller.
    # If bf16 is True, convolutions in this block use bfloat16, and losses float32.
    # backward() stays outside: it uses for each layer the format that was used here.
    with autocast:
        fake = generator(z, labels)
        real_logits = discriminator(real, labels)
        fake_logits = discriminator(fake.detach(), labels)
        ones = torch.ones_like(real_logits)
        zeros = torch.zeros_like(fake_logits)
        loss_d = bce(real_logits, ones) + bce(fake_logits, zeros)
    opt_d.zero_grad()
    loss_d.backward()
    if r1:
        # Adds the gradients of a second loss to those of loss_d.
        r1_penalty(discriminator, real, labels).backward()
    opt_d.step()

    # (2) Update G: make loss_g = -log p(fake) smaller. D does not learn from it.
    discriminator.requires_grad_(False)
    with autocast:
        new_fake_logits = discriminator(fake, labels)
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


def r1_penalty(discriminator, real, labels):
    """Returns R1, a second loss for D, for real images.

    It is explained in gan_fashion.py. As there, it is computed for half of the batch,
    which saves time. The factor, 0.05 here and 0.25 there, was found by trying. R1 is
    computed outside of autocast, and so in float32: bfloat16 is too coarse for the
    gradient of a gradient.
    """
    half = len(real) // 2
    real = real[:half].requires_grad_()
    logits = discriminator(real, labels[:half])
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


MIN_EPOCH_STEPS = 100


def train_epoch(
    args, epoch, bf16, data, labels, generator, discriminator, average, opt_g, opt_d
):
    """Trains for one epoch. Returns the means of the steps' numbers, and the time."""
    start = time.perf_counter()
    # With this seed, a resumed run draws the same random numbers in this epoch as a run
    # that was never stopped.
    torch.manual_seed(args.seed * 10_000 + epoch)
    # `order` is a shuffled list of the indices of images. An epoch shows each image
    # once, or several times if there are so few images that it would have less than
    # MIN_EPOCH_STEPS updates. With --toy there are 6,000 images and 2 repeats.
    # randperm() shuffles the numbers from 0 to 11,999. Divided by 6,000, both 7 and
    # 6,007 leave the remainder 7, so image 7 is there twice.
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
        # Half of the images are mirrored: more variety for D to learn from.
        mirror = torch.rand(args.batch_size, 1, 1, 1, device=data.device) < 0.5
        real = torch.where(mirror, real.flip(3), real)
        z = torch.randn(args.batch_size, args.latent_dim, device=data.device)
        y = labels[indices]
        r1 = step % R1_INTERVAL == 0
        sums.update(
            train_step(generator, discriminator, opt_g, opt_d, real, y, z, r1, bf16)
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


def train(args, device, bf16, data, labels, checkpoint):
    """Trains on data, uint8 N x 3 x 32 x 32, and writes all results to args.out_dir.

    labels: the classes N, 0 to 9; bf16: whether to use bfloat16; checkpoint: that of
    the run to continue, or {} to begin one. Raises OSError if a checkpoint cannot be
    written, and FloatingPointError if a loss is not finite.
    """
    torch.manual_seed(args.seed)
    # Channels last, except on Apple's GPUs, where PyTorch's BatchNorm failed with it.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    generator = Generator(args.latent_dim)
    discriminator = Discriminator()
    for network in generator, discriminator:
        network.apply(init_weights).to(device, memory_format=layout)  # rule 5
    average = copy.deepcopy(generator)
    # Rule 6, but with a higher rate and no momentum: see the docstring.
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
    save_checkpoint(args, run, history)  # if this is impossible, we know it now

    # All grids are drawn from the same latent vectors and the same labels. The labels
    # are eight times 0, eight times 1 and so on. Without --conditional all are 0.
    classes = 10 if args.conditional else 1
    fixed_z = torch.randn(1000, args.latent_dim)
    fixed_labels = torch.arange(1000) // 8 % classes
    real_images = data[torch.randperm(len(data))[:1000]] / 127.5 - 1
    if not history:
        by_class = torch.cat([data[labels == k][:8] for k in range(10)]) / 127.5 - 1
        save_grid(by_class, f"{args.out_dir}/images/real.png")
        path = f"{args.out_dir}/images/epoch_000.png"
        save_rows(args, sample(average, fixed_z, fixed_labels), path)
    images = data.to(device, memory_format=layout)
    labels = (labels % classes).to(device)  # all 0 if classes is 1
    for epoch in range(len(history) + 1, args.epochs + 1):
        row = train_epoch(args, epoch, bf16, images, labels, **run)
        fakes = sample(average, fixed_z, fixed_labels)
        row["coverage"] = coverage(real_images, fakes)
        if not fakes.isfinite().all():  # a loss, and then all weights, became NaN
            raise FloatingPointError("A loss is not finite: add a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes)
        save_checkpoint(args, run, history)
        print_epoch(args, row)


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z, labels):
    """Returns an image for each z and label: N x 3 x 32 x 32 in [-1, 1], on the CPU.

    The images are drawn by a copy of the generator in evaluation mode, in which
    BatchNorm uses its stored mean and variance, and not those of the batch.
    """
    generator = copy.deepcopy(generator).eval()  # the original keeps its mode
    device = next(generator.parameters()).device
    parts = zip(z.to(device).split(500), labels.to(device).split(500))  # saves memory
    return torch.cat([generator(*part).cpu() for part in parts])


CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
LETTERS = "AHIMOTUVWX"  # the classes of --toy; a mirror does not change them


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
    row_labels = torch.arange(80) // 8 % classes  # one class per row
    grid = sample(generator, torch.randn(80, args.latent_dim), row_labels)

    # As in gan_mnist.py, each row of the latent walk leads from z1 to z2. With
    # --conditional, each row is of another class.
    z1, z2 = torch.randn(2, 10, 1, args.latent_dim)  # 10 rows x 1 x latent_dim
    angle = torch.linspace(0, math.pi / 2, 8)[:, None]  # 8 columns x 1
    walk = z1 * angle.cos() + z2 * angle.sin()  # 10 rows x 8 columns x latent_dim
    walk = sample(generator, walk.flatten(0, 1), row_labels)

    suffix = ""
    number = 1
    while os.path.exists(f"{args.out_dir}/generated{suffix}"):
        number += 1
        suffix = f"_{number}"
    folder = f"{args.out_dir}/generated{suffix}"
    labels = torch.arange(args.generate) % classes  # of each class in turn
    images = sample(generator, torch.randn(args.generate, args.latent_dim), labels)
    names = LETTERS if args.toy else CLASSES
    for i, image in enumerate(((images + 1) * 127.5).round().byte()):
        place = f"{folder}/{i % 10}_{names[i % 10]}" if args.conditional else folder
        os.makedirs(place, exist_ok=True)
        ToPILImage()(image).save(f"{place}/{i:05d}.png")
    save_rows(args, grid, f"{args.out_dir}/generated_grid{suffix}.png")
    save_grid(walk, f"{args.out_dir}/latent_walk{suffix}.png")
    return folder


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args):
    """Returns images, uint8 N x 3 x 32 x 32, and labels N, of the training set."""
    if args.toy:
        return draw_letters(args.limit or 6000)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        data = CIFAR10(args.data_dir, train=True, download=True)
    except Exception as error:  # torchvision raises errors of many types
        sys.exit(
            f"CIFAR-10 could be neither read nor downloaded ({error!r}). Delete "
            f"{args.data_dir}/cifar-10-batches-py if it is damaged. Without internet, "
            f"put {CIFAR10.filename} into {args.data_dir} by hand, or learn letters: "
            f'python "{sys.argv[0]}" --toy'
        )
    images = torch.from_numpy(data.data[: args.limit]).permute(0, 3, 1, 2)
    return images, torch.tensor(data.targets[: args.limit])


def draw_letters(count):
    """Draws letters that a mirror does not change, in varied colours and places."""
    torch.manual_seed(0)
    font = ImageFont.load_default(24)
    images = []
    for i in range(count):
        ink = f"hsl({torch.randint(360, ())}, 80%, 75%)"  # light, on dark paper
        image = Image.new("RGB", (40, 40), f"hsl({torch.randint(360, ())}, 80%, 25%)")
        ImageDraw.Draw(image).text((20, 20), LETTERS[i % 10], ink, font, anchor="mm")
        images.append(PILToTensor()(RandomCrop(32)(image)))
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


def save_rows(args, images, path):
    """Saves a grid of 8 rows of 8, or with --conditional 10 rows, one class per row."""
    rows = 10 if args.conditional else 8
    save_grid(images[: 8 * rows], path)


# ---- reports -------------------------------------------------------------------------


def save_reports(args, history, images):
    """Writes the epoch's grid, losses.png and history.csv. An error is only printed."""
    epoch = len(history)
    try:
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_rows(args, images, f"{args.out_dir}/images/epoch_{epoch:03d}.png")
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
    flag("--epochs", type=positive, help="of at least 100 updates each (50; toy 12)")
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
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where images are or go (%(default)s)")
    flag("--out-dir", default="runs/dcgan_cifar10", help="results (%(default)s)")
    flag("--limit", type=positive, help="use only the first so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic letters, with no download")
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
    args.epochs = args.epochs or (12 if args.toy else 50)
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


def has_bfloat16(device):
    """Tells whether bfloat16 is the default: on CPUs that compute with it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
    return device.type == "cpu" and capabilities.get("avx512_bf16", False)


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
        data, labels = load_data(args)
        if not 6 <= args.batch_size <= len(data):  # coverage() needs 6 images
            sys.exit(
                f"--batch-size has to be from 6 to {len(data)}, not {args.batch_size}."
            )
        bf16 = has_bfloat16(device) if args.bf16 is None else args.bf16
        say(f"{len(data):,} images, on {device} in {'bfloat16' if bf16 else 'float32'}")
        train(args, device, bf16, data, labels, checkpoint)
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
