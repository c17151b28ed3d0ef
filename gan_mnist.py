"""A generative adversarial network (GAN, Goodfellow et al. 2014) that writes digits.

The generator G turns a latent vector z of normally distributed numbers into an image.
The discriminator D gives an image x a logit, which sigmoid turns into p(x), for D the
probability that x is real. D learns to tell real images from fakes, and G learns to
fool D. G never sees a real image: it learns by the gradient of D's logit.

         z -----> G -----> fake --+
                                  +--> D --> logit --> p(x) = sigmoid(logit)
     MNIST --------------> real --+

    loss_d = -log p(real) - log(1 - p(fake))    low if D is right on both
    loss_g = -log p(fake)                       low if D is fooled (non-saturating loss)

Each -log is a mean binary cross-entropy. The losses do not measure image quality:
- Healthy, as the default run ends: loss_d 1.29, loss_g 0.75 (if p = 0.5: 1.39, 0.69),
  acc_real and acc_fake (D is right) 0.7, fool_rate (D is wrong on fakes) 0.3, coverage
  (real images near a fake) 0.98. That of other real digits is 0.97, of 0s to 3s 0.57.
- D has won (try --lr 0.02 --out-dir runs/won): loss_d and fool_rate go to 0, loss_g up,
  both accuracies to 1, and coverage stays near 0 (below 0.1 the epoch's line warns).
- Mode collapse: a few images fool D. Coverage is far below 0.98, whatever the losses.

    python gan_mnist.py --toy --out-dir runs/toy           # 1:08 min, no download
    python gan_mnist.py                                    # 4:26 min on two CPU cores
    python gan_mnist.py --model conv --out-dir runs/conv   # 8:02 min
    python gan_mnist.py --resume --out-dir runs/conv       # go on; longer: --epochs 30
    python gan_mnist.py --generate 100                     # in runs/gan_mnist/generated

Elsewhere, with the packages below, this file, common.py and models/generator.pth:

    import gan_mnist, torch
    generator = gan_mnist.MLPGenerator(latent_dim=100)  # ConvGenerator for --model conv
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    images = gan_mnist.sample(generator, torch.randn(64, 100))  # 64, in [-1, 1]
"""

import argparse
import copy
import csv
import math
import os
import socket
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim import Adam
from torchvision.datasets import MNIST
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid  # DCGAN's initial weights; a grid of images

R1_INTERVAL = 16  # D gets the R1 penalty, see r1_penalty(), at every 16th step:
R1_WEIGHT = 4.0  # 16 x 0.25: rare, so stronger (Karras et al. 2020)
AVERAGE_DECAY = 0.998  # averages over 500 steps or fewer, see update_average()

# ---- networks (the comments are output shapes, without the batch's N) ----------------


class MLPGenerator(nn.Sequential):
    """Fully connected: latent vectors N x latent_dim to N x 1 x 28 x 28 in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 256),  # 256
            nn.BatchNorm1d(256),  # mean 0, variance 1 in the batch: steadies training
            nn.LeakyReLU(0.2),  # slope 0.2 below 0: gradients always get through
            nn.Linear(256, 512),  # 512
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 1024),  # 1024
            nn.BatchNorm1d(1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, 28 * 28),  # 784
            nn.Tanh(),  # to [-1, 1]
            nn.Unflatten(1, (1, 28, 28)),  # 1 x 28 x 28
        )


class MLPDiscriminator(nn.Sequential):
    """Fully connected: images N x 1 x 28 x 28 in [-1, 1] to logits N x 1."""

    def __init__(self):
        super().__init__(
            nn.Flatten(),  # 784
            nn.Linear(28 * 28, 512),  # 512
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),  # 256
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),  # 1
        )


class ConvGenerator(nn.Sequential):
    """Like MLPGenerator, by transposed convolutions that double height and width."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 512),  # 512
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 64 * 7 * 7),  # 3136
            nn.Unflatten(1, (64, 7, 7)),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),  # 32 x 14 x 14 (kernel, stride, pad)
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # 1 x 28 x 28
            nn.Tanh(),  # to [-1, 1]
        )


class ConvDiscriminator(nn.Sequential):
    """Like MLPDiscriminator, by convolutions that halve height and width."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 4, 2, 1),  # 32 x 14 x 14
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # 3136
            nn.Linear(64 * 7 * 7, 256),  # 256
            nn.LeakyReLU(0.2),
            nn.Dropout(0.1),  # zeroes 10 % of the 256: D must not rely on a few
            nn.Linear(256, 1),  # 1
        )


GENERATORS = {"mlp": MLPGenerator, "conv": ConvGenerator}
DISCRIMINATORS = {"mlp": MLPDiscriminator, "conv": ConvDiscriminator}

# ---- training (read first: train_step without r1 and bf16, then train) ---------------


def train_step(generator, discriminator, opt_g, opt_d, real, z, r1=False, bf16=False):
    """Updates D once, then G once, and returns a dict of scalar tensors.

    real: images N x 1 x 28 x 28 in [-1, 1]; z: latent vectors N x latent_dim.
    Two extras, to skip at first: r1, which adds the R1 penalty to D's loss, and bf16:
    bfloat16 mixed precision, in which layers run faster and coarser.
    """
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)
    # (1) Update D: minimise -log p(real) - log(1 - p(fake)), where p = sigmoid(logit).
    with autocast:
        fake = generator(z)
        # Two calls, not one for both: BatchNorm (in ConvDiscriminator) normalises over
        # all images of a call, and in (2) the fakes are alone in theirs, too.
        real_logits = discriminator(real)
        # detach() cuts G off: else loss_d.backward() would run on into G, and free the
        # graph that (2) needs to send loss_g through the same fakes.
        fake_logits = discriminator(fake.detach())
        ones = torch.ones_like(real_logits)
        loss_d = bce(real_logits, ones) + bce(fake_logits, 1 - ones)  # labels 1, 0
    opt_d.zero_grad()
    loss_d.backward()
    if r1:
        r1_penalty(discriminator, real).backward()  # adds to D's gradients
    opt_d.step()

    # (2) Update G: minimise -log p(fake). Where R images are real and F fake, the best
    # D says p = R / (R + F), the higher the more are real. So fakes move to where real
    # ones outnumber them, at best until R = F. Why not minimise log(1 - p(fake)), D's
    # term negated? If D spots the fakes (p near 0), its slope in the logit, -p, is near
    # 0, and G hardly learns: it saturates. That of -log p is p - 1, then near -1.
    discriminator.requires_grad_(False)  # saves time: only gradients for G pass through
    with autocast:
        new_fake_logits = discriminator(fake)  # D has changed since (1)
        loss_g = bce(new_fake_logits, ones)  # low also if all fakes are the same image
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    discriminator.requires_grad_(True)

    return {  # tensors: .item(), which waits for the GPU, comes once per epoch
        "loss_d": loss_d.detach(),  # without R1
        "loss_g": loss_g.detach(),
        "acc_real": (real_logits > 0).float().mean(),  # share with p > 0.5
        "acc_fake": (fake_logits < 0).float().mean(),  # share with p < 0.5
        "fool_rate": (new_fake_logits > 0).float().mean(),  # by the updated D
    }


def r1_penalty(discriminator, real):
    """Returns R1_WEIGHT times the mean of |d logit / d image|^2 over real images.

    In D's loss it flattens D around real images: where D is steep, fakes leap past the
    real ones and back (Mescheder et al. 2018). In float32: bfloat16 is too coarse.
    With BatchNorm in D it is only nearly R1: there a logit depends on the whole batch.
    """
    real = real[::2].requires_grad_()  # half of the batch, to save time
    # Of the sum, row i is logit i's gradient. create_graph: to differentiate it again.
    (grad,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return R1_WEIGHT * grad.square().sum() / len(real)


def update_average(average, generator, step):
    """Moves the averaged generator a little towards the generator; step counts from 1.

    As G and D react to each other, their weights oscillate. The average gives better
    images (Yazici et al. 2019): coverage 0.92, not 0.67, after --epochs 10.
    """
    decay = min(AVERAGE_DECAY, step / (step + 9))  # soon forgets the untrained weights
    new = generator.state_dict()
    for name, value in average.state_dict().items():  # changed in place
        if value.is_floating_point():  # not BatchNorm's counter
            value.lerp_(new[name], 1 - decay)  # decay x value + (1 - decay) x new


def coverage(real, fake):
    """Returns the share of the real images that the fakes cover, in [0, 1].

    A real image is covered if a fake is closer to it than its own 5th nearest real one
    (Naeem et al. 2020). Both are N x C x H x W, compared by pixels: blur scores well.
    """
    real = real.flatten(1)
    radius = torch.cdist(real, real).kthvalue(min(6, len(real))).values  # 1st: itself
    return (torch.cdist(real, fake.flatten(1)).amin(1) < radius).float().mean().item()


def train(args, device, bf16, data, checkpoint):
    """Trains on data, uint8 N x 1 x 28 x 28, and writes all results to args.out_dir.

    checkpoint: dict of a run to resume, or {}. Raises FloatingPointError and OSError.
    """
    torch.manual_seed(args.seed)
    real_images = data[torch.randperm(len(data))[:1000]] / 127.5 - 1
    fixed_z = torch.randn(len(real_images), args.latent_dim)  # the same for all epochs
    generator = GENERATORS[args.model](args.latent_dim).apply(init_weights).to(device)
    discriminator = DISCRIMINATORS[args.model]().apply(init_weights).to(device)
    average = copy.deepcopy(generator)
    # beta1 (mlp 0.5, conv 0) is not 0.9: old gradients mislead, the opponent has moved.
    opt_g = Adam(generator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    opt_d = Adam(discriminator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    modules = {
        "generator": generator,
        "discriminator": discriminator,
        "average": average,
        "opt_g": opt_g,
        "opt_d": opt_d,
    }
    history = checkpoint.get("history", [])
    if checkpoint:
        for name in modules:
            modules[name].load_state_dict(checkpoint[name])
    if not history:
        save_checkpoint(args, modules, history)
        save_grid(real_images[:64], f"{args.out_dir}/images/real.png")
        save_grid(sample(average, fixed_z[:64]), f"{args.out_dir}/images/epoch_000.png")

    epoch_steps = len(data) // args.batch_size  # without the last, shorter batch
    step = len(history) * epoch_steps
    data = data.to(device)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed * 10_000 + epoch)  # the same when resumed
        results = []
        order = torch.randperm(len(data), device=device)
        for indices in order.split(args.batch_size)[:epoch_steps]:
            lr = args.lr * (1 - step / (args.epochs * epoch_steps))  # to 0: both settle
            opt_d.param_groups[0]["lr"] = opt_g.param_groups[0]["lr"] = lr
            r1 = step % R1_INTERVAL == 0  # it is slow: rare but strong will do
            real = data[indices] / 127.5 - 1  # to [-1, 1], like the generator's images
            z = torch.randn(args.batch_size, args.latent_dim, device=device)
            results.append(
                train_step(generator, discriminator, opt_g, opt_d, real, z, r1, bf16)
            )
            step += 1
            update_average(average, generator, step)
            show_progress(args, step, epoch_steps, start)
        fakes = sample(average, fixed_z)  # by the average, not by G
        row = {"epoch": epoch}
        for name in results[0]:
            row[name] = sum(result[name] for result in results).item() / epoch_steps
        row["coverage"] = coverage(real_images, fakes)
        row["seconds"] = time.perf_counter() - start
        row["images_per_s"] = epoch_steps * args.batch_size / row["seconds"]
        if not math.isfinite(sum(row.values())):
            raise FloatingPointError("A loss is not finite: resume with a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes[:64])  # images/, losses.png, history.csv
        save_checkpoint(args, modules, history)  # models/; generator.pth is the average
        print_epoch(args, row)


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z):
    """Returns images N x 1 x 28 x 28 in [-1, 1], on the CPU, for z of N x latent_dim.

    In evaluation mode BatchNorm uses its running statistics; in training mode an image
    would depend on the others in its batch. Afterwards the mode is as it was.
    """
    was_training = generator.training
    generator.eval()
    images = generator(z.to(next(generator.parameters()).device)).cpu()
    generator.train(was_training)
    return images


def generate(args, device, checkpoint):
    """Writes args.generate images, a grid of 64 others and a latent walk."""
    generator = GENERATORS[args.model](args.latent_dim).to(device)
    generator.load_state_dict(checkpoint["average"])
    folder = f"{args.out_dir}/generated"
    if os.path.exists(folder):
        raise FileExistsError(f"{folder} exists: rename or delete it first")
    os.makedirs(folder)
    torch.manual_seed(args.seed + 1)  # not the z of training's grids
    save_grid(sample(generator, torch.randn(64, args.latent_dim)), f"{folder}_grid.png")
    # Each row leads from z1 to z2 on a quarter circle. As cos^2 + sin^2 = 1, its z are
    # normal as in training; halfway on a straight line the variance would be 1/2.
    z1, z2 = torch.randn(2, 8, 1, args.latent_dim)
    angle = torch.linspace(0, math.pi / 2, 10)[:, None]  # 10 x 1, and z1 8 x 1 x dim
    walk = sample(generator, (z1 * angle.cos() + z2 * angle.sin()).flatten(0, 1))
    save_grid(walk, f"{args.out_dir}/latent_walk.png", columns=10)
    for i, z in enumerate(torch.randn(args.generate, 1, args.latent_dim)):
        ToPILImage()((sample(generator, z)[0] + 1) / 2).save(f"{folder}/{i:05d}.png")


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args):
    """Returns the training images, uint8 N x 1 x 28 x 28."""
    if args.toy:
        return draw_digits(args.limit or 6000)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        data = MNIST(args.data_dir, train=True, download=True).data
        assert data.any(), "all pixels are 0"  # of a damaged file
        return data[: args.limit, None]
    except Exception as error:  # torchvision raises many types
        sys.exit(
            f"MNIST could be neither read nor downloaded ({error!r}). If a file in "
            f"{args.data_dir}/MNIST/raw is damaged, delete train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte there and try again. Without internet, put "
            f"{', '.join(name for name, _ in MNIST.resources)} there by hand, or learn "
            f"synthetic digits: python {sys.argv[0]} --toy"
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


def save_checkpoint(args, modules, history):
    """Writes models/: the checkpoint, and both networks by themselves for later use."""
    not_saved = "out_dir device resume generate".split()
    settings = {
        name: value for name, value in vars(args).items() if name not in not_saved
    }
    checkpoint = {"settings": settings, "history": history}
    for name, module in modules.items():
        checkpoint[name] = module.state_dict()
    save(checkpoint["average"], f"{args.out_dir}/models/generator.pth")
    save(checkpoint["discriminator"], f"{args.out_dir}/models/discriminator.pth")
    save(checkpoint, f"{args.out_dir}/models/checkpoint.pth")


def save(content, path):
    """Writes a file atomically: after a kill it is whole, either the old or the new."""
    try:
        torch.save(content, f"{path}.tmp")
    except RuntimeError as error:
        raise OSError(f"{path} could not be written (is the disk full?)") from error
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """Returns the checkpoint and the flags, with its settings in place of defaults."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["settings"]
        args = parse_args(**settings)
        for name in "model", "latent_dim", "beta1", "toy":
            if vars(args)[name] != settings[name]:
                sys.exit(
                    f"This run has --{name.replace('_', '-')} {settings[name]}, which "
                    "stays: leave it out, or start a new run in another --out-dir."
                )
        print(f"The run has done {len(checkpoint['history'])} of {args.epochs} epochs.")
        return checkpoint, args
    except Exception as error:  # torch raises many types
        sys.exit(
            f"{path} is missing, damaged or not from this script ({error!r:.300}). "
            "Train first, or set --out-dir to the folder of a run."
        )


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
        print(f"Warning: {str(error)!a}. The run continues and tries again.")


def plot_history(history, path):
    """Plots the losses on the left, and what lies between 0 and 1 on the right."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(1.386, color="grey", label="D guesses: 1.39, 0.69")
    left.axhline(0.693, color="grey")
    right.set_ylim(0, 1)
    for name in list(history[0])[1:7]:  # not epoch, seconds and images_per_s
        axes = left if name.startswith("loss") else right
        values = [row[name] for row in history]
        axes.plot(range(1, len(history) + 1), values, marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
        axes.legend()
    figure.savefig(path)


def save_gif(args):
    """Writes progress.gif from the saved grids. An error is only printed."""
    try:
        folder = Path(f"{args.out_dir}/images")
        files = sorted(  # epoch_1000.png after epoch_999.png
            folder.glob("epoch_*.png"), key=lambda file: (len(file.name), file)
        )
        if files:
            Image.open(files[0]).save(
                f"{args.out_dir}/progress.gif",
                append_images=map(Image.open, files[1:]),  # one is open at a time
                save_all=True,
                duration=200,
                loop=0,
            )
    except OSError as error:
        print(f"Warning: {str(error)!a}. progress.gif is missing or old.")


def show_progress(args, step, epoch_steps, start):
    """Rewrites the last line of a terminal."""
    if sys.stdout.isatty():
        speed = (step % epoch_steps or epoch_steps) / (time.perf_counter() - start)
        print(
            f"step {step}/{args.epochs * epoch_steps}  {speed:.1f} steps/s "
            f"{(args.epochs * epoch_steps - step) / speed:.0f} s left   ",
            end="\r",
            flush=True,
        )


def print_epoch(args, row):
    """Prints an epoch's numbers, and a warning if hardly any real image is covered."""
    print(
        f"epoch {row['epoch']}/{args.epochs}  loss_d {row['loss_d']:.3f}  loss_g "
        f"{row['loss_g']:.3f}  acc_real {row['acc_real']:.2f}  acc_fake "
        f"{row['acc_fake']:.2f}  fool_rate {row['fool_rate']:.2f}  coverage "
        f"{row['coverage']:.2f}  {row['seconds']:.1f} s  {row['images_per_s']:,.0f} "
        f"images/s{'  LOW COVERAGE' if row['coverage'] < 0.1 else ''}",
        flush=True,
    )


# ---- flags and main ------------------------------------------------------------------


def parse_args(**settings):
    """Returns the flags; settings, of a checkpoint, take the place of the defaults."""
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--model", choices=GENERATORS, default="mlp", help="networks (%(default)s)")
    flag("--epochs", type=positive, help="passes over the data (mlp 50, conv 12)")
    flag("--batch-size", type=positive, help="images per step (256; conv, toy 64)")
    flag("--lr", type=float, default=2e-3, help="first learning rate (%(default)s)")
    flag("--beta1", type=float, help="Adam's beta1 (mlp 0.5, conv 0)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where MNIST is or goes (%(default)s)")
    flag(
        "--out-dir", default=f"runs/{Path(__file__).stem}", help="results (%(default)s)"
    )
    flag("--limit", type=positive, help="use only so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic digits, with no download")
    flag("--seed", type=int, default=0, help="random seed (%(default)s)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    flag(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 mixed precision (default: on CPUs that have it)",
    )
    flag("--resume", action="store_true", help="continue the run in --out-dir")
    flag("--generate", type=positive, help="write so many images (--seed 1: others)")
    parser.set_defaults(**settings)
    args = parser.parse_args()
    args.epochs = args.epochs or (50 if args.model == "mlp" else 12)
    if args.beta1 is None:
        args.beta1 = 0.5 if args.model == "mlp" else 0.0
    if not args.lr > 0 or not 0 <= args.beta1 < 1:
        parser.error(
            f"--lr {args.lr} is not above 0 or --beta1 {args.beta1} not in [0, 1)"
        )
    small = args.toy or args.model == "conv"
    args.batch_size = args.batch_size or (64 if small else 256)
    return args


def positive(text):
    """Returns a flag's text as a whole number from 1 up."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def choose_device(name):
    """Returns the device of that name; without one, a GPU that works, or the CPU."""
    device = (
        name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    )
    try:
        return torch.ones(1, device=device).device
    except Exception as error:  # torch raises many types
        if name:
            sys.exit(f"--device {name} cannot be used: {error}")
        print(f"Using the CPU, as {device} cannot be used: {error}")
        return torch.device("cpu")


def has_bfloat16(device):
    """Tells whether bfloat16 is the default: on CPUs with it (an H200 was slower)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
    return device.type == "cpu" and capabilities.get("avx512_bf16", False)


def explain(error, args):
    """Returns what to tell the user of an error that is no bug; raises a bug again."""
    reason = str(error) or "Stopped"
    if "to allocate" in reason:  # as torch says of any device
        reason = "Out of memory: use a smaller --batch-size"
    elif "state_dict" in reason:
        reason = "The networks in this script do not fit the checkpoint (edited?)"
    elif not isinstance(error, (KeyboardInterrupt, OSError, FloatingPointError)):
        raise error
    if Path(f"{args.out_dir}/models/checkpoint.pth").exists() and not args.generate:
        reason += f'. Resume: python {sys.argv[0]} --resume --out-dir "{args.out_dir}"'
    return f"\n{reason}"


def main():
    args = parse_args()
    checkpoint = {}
    if args.resume or args.generate:
        checkpoint, args = load_checkpoint(f"{args.out_dir}/models/checkpoint.pth")
    elif any(Path(args.out_dir).rglob("*.p[nt]*")):  # .png and .pth
        sys.exit(f"{args.out_dir} holds a run: add --resume, or another --out-dir.")
    device = choose_device(args.device)
    bf16 = has_bfloat16(device) if args.bf16 is None else args.bf16
    try:
        if args.generate:
            generate(args, device, checkpoint)
        else:
            os.makedirs(f"{args.out_dir}/models", exist_ok=True)
            data = load_data(args)
            if not 2 <= args.batch_size <= len(data):
                sys.exit(
                    f"--batch-size {args.batch_size} does not fit: 2 to {len(data)} do."
                )
            print(
                f"{len(data):,} images, {len(data) // args.batch_size} updates per "
                f"epoch, on {device} in {'bfloat16' if bf16 else 'float32'}"
            )
            train(args, device, bf16, data, checkpoint)
        print(f"The results are in {args.out_dir!a}.")
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error, args))
    finally:
        if not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
