"""A generative adversarial network (GAN, Goodfellow et al. 2014) that writes digits.

Two neural networks play against each other. The generator G turns a list of random
numbers, the latent vector z, into an image. The discriminator D looks at an image x and
answers with one number, the logit, which is above 0 if D takes x for a real image of
the data set, and below 0 if D takes it for a fake by G. The sigmoid function turns the
logit into p(x), a probability between 0 and 1. (A logit of 0 becomes 0.5.)

         z -----> G -----> fake --+
                                  +--> D --> logit --> p(x) = sigmoid(logit)
     MNIST --------------> real --+

Training repeats two updates. The first one changes D's weights: D learns to tell real
images from fakes. The second one changes G's weights: G learns to make fakes that D
takes for real. Each update makes a loss of its own smaller:

    loss_d = -log p(real) - log(1 - p(fake))    small if D is right about both
    loss_g = -log p(fake)                       small if D takes the fake for real

The natural logarithm is meant: -log p is 0 for p = 1, and grows without limit as p
comes near 0. Both losses are means over a batch of images.

G never sees a real image. Everything it learns comes through D. Backpropagation can
compute how D's logit would change if a pixel of the fake were a little brighter, just
as it computes gradients for weights. This is done for each pixel. And as the fake is
the output of G, backpropagation then goes on from its pixels to the weights of G.

Why should this end in good images? D cannot notice every difference. Let us put all
images that look the same to D into a group, and call it a kind of image. D gives the
same p to all images of a kind. If these are, say, three real images and one fake, D's
loss is smallest for p = 3/4. (You can try other values in -3 log p - log(1 - p).) In
general, D's logit is above 0 for a kind with more real images than fakes, and below 0
for a kind with more fakes. G changes its fakes so that the logit grows. So fakes leave
kinds that have too many of them, and move to kinds that have too few. (This is
simplified. In truth the logit changes smoothly from one kind to the next, and its
gradient points the way.) If in the end each kind had as many fakes as real images, D
could only guess: p would be 0.5 for all images, loss_g would be -log 0.5 = 0.69, and
loss_d twice that, 1.39. In practice D always finds some difference, so loss_d ends a
little lower, and loss_g a little higher.

All this works only while D's gradient tells G something useful, and while D learns fast
enough to follow G. So two things can go wrong. (gan_fashion.py shows a third, copies.)

- Mode collapse: G draws only a few different images, whatever z is. In an update of G,
  D's weights stay as they are, and loss_g would be smallest if all fakes became the one
  image that D likes best. Usually D learns in its next updates that most of such images
  are fakes. If D learns this too slowly, G has time to make all its fakes alike before
  D reacts. ("Mode" is another word for a kind of image.)
- D has won: D recognises all fakes for sure, by some small detail, such as a background
  that is not quite black. D's gradient then tells G how to change this detail, but
  nothing about larger faults. loss_d falls towards 0, loss_g grows, and the images stop
  improving.

The results of a run are in the folder runs/gan_mnist, or in the one that --out-dir
names. How do you see whether a run goes well? Look in this order:

1. Look at the grids, files of 64 fakes each: images/epoch_001.png and so on. They
   should get better to the end. If an image is repeated many times, G has collapsed.
2. Look at coverage, which is printed after each epoch. It is the share of the real
   images that have a fake close by. In a healthy run it rises from 0 to about 0.97,
   which other real digits in place of the fakes would also score. If G has collapsed,
   coverage stays low. If it is below 0.2 in the second half of a run, the script warns.
   A high coverage does not mean that the images are sharp.
3. Look at the losses. They only tell who is ahead: if D is, loss_d is small and loss_g
   large. In a healthy run both soon move little, as both networks improve at the same
   time.

All images are drawn by a generator whose weights are averages of G's weights in the
last updates: see update_average().

    python gan_mnist.py --toy --out-dir runs/toy
        synthetic digits, with no download: 2 to 3 minutes on two CPU cores
    python gan_mnist.py
        MNIST, with fully connected networks: 9 minutes
    python gan_mnist.py --model conv --out-dir runs/conv
        MNIST, with convolutional networks: 9 minutes
    python gan_mnist.py --resume --out-dir runs/conv
        goes on after Ctrl-C
    python gan_mnist.py --generate 100
        draws 100 digits, after the second command

To use the averaged generator elsewhere, copy this file, common.py and, from the run's
folder models, generator.pth:

    import gan_mnist, torch
    generator = gan_mnist.MLPGenerator(latent_dim=100)  # ConvGenerator for --model conv
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    images = gan_mnist.sample(generator, torch.randn(64, 100))  # 64 images in [-1, 1]
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
from torchvision.datasets import MNIST
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid

# ---- networks ------------------------------------------------------------------------
# A comment beside a layer is the shape of its output for one image; N is the number of
# images in a batch. The pixels of all images are between -1 (black) and 1 (white).


class MLPGenerator(nn.Sequential):
    """Fully connected: latent vectors N x latent_dim to N x 1 x 28 x 28 in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 256),  # 256
            # BatchNorm brings each of the 256 outputs to mean 0 and variance 1 over the
            # batch, then multiplies it by one learned weight and adds another. So the
            # numbers cannot become huge or tiny from layer to layer, which would make
            # gradients huge or tiny as well.
            nn.BatchNorm1d(256),
            # LeakyReLU has a slope of 0.2 for numbers below 0. ReLU has a slope of 0
            # there, and so lets no gradient pass.
            nn.LeakyReLU(0.2),
            nn.Linear(256, 512),  # 512
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 1024),  # 1024
            nn.BatchNorm1d(1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, 784),  # 784
            nn.Tanh(),  # 784, now between -1 and 1
            nn.Unflatten(1, (1, 28, 28)),  # 1 x 28 x 28
        )


class MLPDiscriminator(nn.Sequential):
    """Fully connected: images N x 1 x 28 x 28 in [-1, 1] to logits N x 1."""

    def __init__(self):
        super().__init__(
            # In training, dropout sets about a fifth of the pixels to 0 (grey). Each
            # call of D chooses new pixels. So D cannot recognise fakes by a few pixels,
            # and that keeps it from winning early.
            nn.Dropout(0.2),  # 1 x 28 x 28
            nn.Flatten(),  # 784
            nn.Linear(784, 512),  # 512
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),  # 256
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),  # 1
        )


class ConvGenerator(nn.Sequential):
    """Convolutional: latent vectors N x latent_dim to N x 1 x 28 x 28 in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 512),  # 512
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 3136),  # 3136, which is 64 x 7 x 7
            nn.Unflatten(1, (64, 7, 7)),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            # In a transposed convolution, each input number adds a patch to the output,
            # which is the kernel times this number. With a kernel of 4 x 4, a stride of
            # 2 and a padding of 1, height and width are doubled.
            nn.ConvTranspose2d(64, 32, 4, 2, 1),  # 32 x 14 x 14
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # 1 x 28 x 28
            nn.Tanh(),  # 1 x 28 x 28
        )


class ConvDiscriminator(nn.Sequential):
    """Convolutional: images N x 1 x 28 x 28 in [-1, 1] to logits N x 1."""

    def __init__(self):
        super().__init__(
            nn.Dropout(0.5),  # 1 x 28 x 28; 0.5 was found by trying
            # With this kernel, stride and padding, a convolution halves height and
            # width.
            nn.Conv2d(1, 16, 4, 2, 1),  # 16 x 14 x 14
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1),  # 32 x 7 x 7
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # 1568, which is 32 x 7 x 7
            nn.Linear(1568, 128),  # 128
            nn.LeakyReLU(0.2),
            nn.Linear(128, 1),  # 1
        )


GENERATORS = {"mlp": MLPGenerator, "conv": ConvGenerator}
DISCRIMINATORS = {"mlp": MLPDiscriminator, "conv": ConvDiscriminator}
# Default flags for each pair of networks, found by trying. lr is the learning rate;
# train() explains beta1.
RECIPES = {
    "mlp": {"epochs": 50, "lr": 2e-3, "beta1": 0.5},
    "conv": {"epochs": 16, "lr": 8e-3, "beta1": 0.0},
}

# ---- training ------------------------------------------------------------------------


def train_step(generator, discriminator, opt_g, opt_d, real, z):
    """Updates D once, then G once. Returns both losses, as tensors.

    real: images N x 1 x 28 x 28 in [-1, 1]; z: latent vectors N x latent_dim.
    """
    fake = generator(z)

    # (1) Update D: make loss_d = -log p(real) - log(1 - p(fake)) smaller.
    #
    # Real images and fakes go through D in two separate batches. This matters for
    # --model conv, whose D has BatchNorm, which uses the mean of a batch. In (2) D will
    # be shown a batch of fakes, so it should learn from such batches.
    real_logits = discriminator(real)
    # This update is for D alone, so detach() separates the fakes from G. Without it,
    # loss_d.backward() would go on through G. What G has stored for backpropagation can
    # be used only once, so loss_g.backward() below would raise a RuntimeError.
    fake_logits = discriminator(fake.detach())
    # bce(), the binary cross-entropy, takes logits and labels. Where the label is 1 it
    # computes -log p, and where it is 0, -log(1 - p). Then it takes the mean.
    ones = torch.ones_like(real_logits)
    loss_d = bce(real_logits, ones) + bce(fake_logits, torch.zeros_like(fake_logits))
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()

    # (2) Update G: make loss_g = -log p(fake) smaller.
    #
    # D's weights are frozen. Gradients still flow through D to the fakes and on to G,
    # but none are computed for D's own weights, which saves time.
    discriminator.requires_grad_(False)
    new_fake_logits = discriminator(fake)  # once more, as D has changed in (1)
    # We want -log p(fake), and bce() computes it for the label 1. So the label is 1,
    # although these are fakes. Why not use log(1 - p), which also falls as p rises?
    # Compare how fast both fall if D's logit grows. The derivative of log(1 - p) with
    # respect to the logit is -p. For a fake that D recognises as a fake, this is almost
    # 0: G would learn least from its worst fakes. (This is called saturation.) The
    # derivative of -log p is p - 1. For such a fake, this is almost -1.
    loss_g = bce(new_fake_logits, ones)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)

    return {"loss_d": loss_d.detach(), "loss_g": loss_g.detach()}


def update_average(average, generator, step):
    """Moves each weight of the averaged generator towards the generator's.

    G and D react to each other, so G's weights do not settle, but oscillate around good
    values. The average of the weights of many updates is nearer to these values, and
    gives better images (Yazici et al. 2019). All our images are drawn by this averaged
    generator. It helps at the end of a run, too: the learning rate falls to 0, but too
    late for the weights to settle. step: the number of updates so far, from 1.
    """
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

    Coverage notices what is missing. It does not notice blur: blurred fakes score high.
    Copies of the real images score high, too.
    """
    real = real.flatten(1)
    # The 6th smallest distance, as the smallest is from an image to itself.
    radius = torch.cdist(real, real).kthvalue(6).values  # one for each real image
    distance_of_fake = torch.cdist(real, fake.flatten(1)).amin(1)  # of the nearest
    return (distance_of_fake < radius).float().mean().item()


MIN_EPOCH_STEPS = 100


def train_epoch(args, epoch, data, generator, discriminator, average, opt_g, opt_d):
    """Trains for one epoch. Returns the mean of each loss, and the time."""
    start = time.perf_counter()
    # With this seed, a resumed run draws the same random numbers in this epoch as a run
    # that was never stopped.
    torch.manual_seed(args.seed * 10_000 + epoch)
    # `order` is a shuffled list of the indices of images. An epoch shows each image
    # once, or several times if there are so few images that it would have less than
    # MIN_EPOCH_STEPS updates. With --toy there are 6,400 images and 2 repeats.
    # randperm() shuffles the numbers from 0 to 12,799. Divided by 6,400, both 7 and
    # 6,407 leave the remainder 7, so image 7 is there twice.
    repeats = math.ceil(MIN_EPOCH_STEPS * args.batch_size / len(data))
    order = torch.randperm(repeats * len(data), device=data.device) % len(data)
    updates = len(order) // args.batch_size  # a last, shorter batch is left out
    total = args.epochs * updates
    step = first = (epoch - 1) * updates
    sums = Counter()  # its update() adds the losses of a step to their sums so far
    for indices in order.split(args.batch_size)[:updates]:
        # The learning rate falls to 0, so that both networks change less and less.
        for opt in opt_d, opt_g:
            opt.param_groups[0]["lr"] = args.lr * (1 - step / total)
        real = data[indices] / 127.5 - 1  # from [0, 255] to [-1, 1], as fakes are
        z = torch.randn(args.batch_size, args.latent_dim, device=data.device)
        sums.update(train_step(generator, discriminator, opt_g, opt_d, real, z))
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


def train(args, device, data, checkpoint):
    """Trains on data, uint8 N x 1 x 28 x 28, and writes all results to args.out_dir.

    checkpoint: that of the run to continue, or {} to begin one. Raises OSError if a
    checkpoint cannot be written, and FloatingPointError if a loss is not finite.
    """
    torch.manual_seed(args.seed)
    generator = GENERATORS[args.model](args.latent_dim).apply(init_weights).to(device)
    discriminator = DISCRIMINATORS[args.model]().apply(init_weights).to(device)
    average = copy.deepcopy(generator)
    # Adam steps along a mean of past gradients, its momentum. beta1 is the share of the
    # old mean that is kept at each update. With the usual beta1 of 0.9, the mean spans
    # about ten updates. But the other network has changed since then, so old gradients
    # mislead, and beta1 is 0.5 or 0 here. (fused=True saves time.)
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

    # All epochs use the same latent vectors, so that their grids can be compared. A
    # grid shows the first 64 fakes, and coverage is measured on 1,000.
    fixed_z = torch.randn(1000, args.latent_dim)
    real_images = data[torch.randperm(len(data))[:1000]] / 127.5 - 1
    if not history:
        save_grid(real_images[:64], f"{args.out_dir}/images/real.png")
        save_grid(sample(average, fixed_z[:64]), f"{args.out_dir}/images/epoch_000.png")
    images = data.to(device)
    for epoch in range(len(history) + 1, args.epochs + 1):
        row = train_epoch(args, epoch, images, **run)
        fakes = sample(average, fixed_z)
        row["coverage"] = coverage(real_images, fakes)
        if not fakes.isfinite().all():  # a loss, and then all weights, became NaN
            raise FloatingPointError("A loss is not finite: add a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes[:64])
        save_checkpoint(args, run, history)
        print_epoch(args, row)


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z):
    """Returns an image for each latent vector: N x 1 x 28 x 28 in [-1, 1], on the CPU.

    The images are drawn by a copy of the generator in evaluation mode, in which
    BatchNorm uses the mean and variance that it has stored during training. In training
    mode it would use those of the batch, and each image would depend on the others.
    """
    generator = copy.deepcopy(generator).eval()  # the original keeps its mode
    device = next(generator.parameters()).device
    parts = z.to(device).split(500)  # all at once could take too much memory
    return torch.cat([generator(part).cpu() for part in parts])


def generate(args, device, checkpoint):
    """Writes args.generate images, and besides them a grid of 64 and a latent walk.

    Another --seed gives other images. Returns the folder of the images: it is named
    generated, or generated_2 and so on if this run has generated images before.
    """
    generator = GENERATORS[args.model](args.latent_dim).to(device)
    generator.load_state_dict(checkpoint["average"])
    torch.manual_seed(args.seed)
    grid = sample(generator, torch.randn(64, args.latent_dim))

    # Each row of the latent walk shows images of vectors a * z1 + b * z2, which lead
    # from z1 (a is 1, b is 0) to z2 (a is 0, b is 1). In training, the numbers of z
    # have a variance of 1. Those of z1 and z2 are independent, so the numbers between
    # them have a variance of a^2 + b^2. This should be 1, too, so a is the cosine of an
    # angle and b its sine. (In the middle of a straight line a and b would be 1/2, and
    # the variance only 1/2.)
    z1, z2 = torch.randn(2, 8, 1, args.latent_dim)  # 8 rows x 1 x latent_dim
    angle = torch.linspace(0, math.pi / 2, 10)[:, None]  # 10 columns x 1
    walk = z1 * angle.cos() + z2 * angle.sin()  # 8 rows x 10 columns x latent_dim
    walk = sample(generator, walk.flatten(0, 1))

    suffix = ""
    number = 1
    while os.path.exists(f"{args.out_dir}/generated{suffix}"):
        number += 1
        suffix = f"_{number}"
    folder = f"{args.out_dir}/generated{suffix}"
    images = sample(generator, torch.randn(args.generate, args.latent_dim))
    os.mkdir(folder)
    for i, image in enumerate(((images + 1) * 127.5).round().byte()):
        ToPILImage()(image).save(f"{folder}/{i:05d}.png")
    save_grid(grid, f"{args.out_dir}/generated_grid{suffix}.png")
    save_grid(walk, f"{args.out_dir}/latent_walk{suffix}.png", columns=10)
    return folder


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args):
    """Returns the training images, uint8 N x 1 x 28 x 28."""
    if args.toy:
        return draw_digits(args.limit or 6400)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        return MNIST(args.data_dir, train=True, download=True).data[: args.limit, None]
    except Exception as error:  # torchvision raises errors of many types
        sys.exit(
            f"MNIST could be neither read nor downloaded ({error!r}). If a file in "
            f"{args.data_dir}/MNIST/raw is damaged, delete train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte there and try again. Without internet, put "
            f"{', '.join(name for name, _ in MNIST.resources)} there by hand, or learn "
            f'synthetic digits: python "{sys.argv[0]}" --toy'
        )


def draw_digits(count):
    """Draws synthetic digits, each a little different in place, size and angle."""
    torch.manual_seed(0)
    vary = RandomAffine(10, (0.07, 0.07), (0.9, 1.1))  # turn, move, resize
    font = ImageFont.load_default(22)
    images = []
    for i in range(count):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), str(i % 10), 255, font, anchor="mm")
        images.append(PILToTensor()(vary(image)))
    return torch.stack(images)


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
    for name, axes in (("loss_d", left), ("loss_g", left), ("coverage", right)):
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
        f"loss_g {row['loss_g']:.3f}  coverage {row['coverage']:.2f}  "
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
    flag("--model", choices=GENERATORS, default="mlp", help="networks (%(default)s)")
    flag("--epochs", type=positive, help="passes over the data (mlp 50, conv 16)")
    flag(
        "--batch-size",
        type=positive,
        default=128,
        help="images per update (%(default)s)",
    )
    flag("--lr", type=float, help="first learning rate (mlp 0.002, conv 0.008)")
    flag("--beta1", type=float, help="Adam's beta1 (mlp 0.5, conv 0)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where MNIST is or goes (%(default)s)")
    flag("--out-dir", default="runs/gan_mnist", help="results (%(default)s)")
    flag("--limit", type=positive, help="use only the first so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic digits, with no download")
    flag("--seed", type=int, default=0, help="random seed (%(default)s)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    flag("--resume", action="store_true", help="continue the run in --out-dir, if any")
    flag("--generate", type=positive, help="write so many images (--seed 1: others)")
    parser.set_defaults(**settings)
    args = parser.parse_args()
    for name, value in RECIPES[args.model].items():
        if vars(args)[name] is None:
            setattr(args, name, value)
    if not (args.lr > 0 and 0 <= args.beta1 < 1 and 0 <= args.seed < 2**32):
        parser.error(
            "--lr has to be above 0, --beta1 in [0, 1) and --seed in [0, 2**32), not "
            f"{args.lr}, {args.beta1} and {args.seed}"
        )
    for name in ("model", "latent_dim", "beta1", "toy"):
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
        data = load_data(args)
        if not 6 <= args.batch_size <= len(data):  # coverage() needs 6 images
            sys.exit(
                f"--batch-size has to be from 6 to {len(data)}, not {args.batch_size}."
            )
        say(f"{len(data):,} images, on {device}")
        train(args, device, data, checkpoint)
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
