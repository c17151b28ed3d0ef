"""A DCGAN in colour, on CIFAR-10 (Radford et al. 2015). Read gan_mnist.py first.

GANs of deep convolutional networks hardly trained before these rules of that paper:

1. No pooling: strided convolutions halve images in D, transposed ones double them in
   G, and so both learn how to resize.
2. No hidden dense layers: convolutions use the same weights all over an image. (G's
   first and D's last, on 1 x 1 and 4 x 4, are dense layers in fact.)
3. BatchNorm after each layer, so that no layer's gradients vanish; but not after G's
   last, D's first and D's last: there images and logits need their own mean and scale.
4. ReLU in G, tanh at its end; LeakyReLU in D, so that gradients get through to G.
5. Weights from N(0, 0.02); Adam with beta1 0.5, rate 0.0002 (here 0 and 0.002).

Not theirs: fewer channels (48 to 192, not 128 to 1024) and kernels of 4, not 5, for a
CPU's sake; the average; R1; and --conditional, which tells G and D an image's class.

Healthy, after 50 epochs: loss_d 0.92, loss_g 1.03, acc_real 0.97, acc_fake 0.97,
fool_rate 0.02, coverage 0.98. D is right on nearly all, but R1 keeps it unsure: p is
about 0.63 for real images and 0.37 for fakes, and G learns (loss_d near 0: D has won).
Coverage with other images in place of fakes: real test images 0.97, the same blurred
1.00, those of three classes 0.97, of one class 0.86, five over and over 0.03. So it
shows a complete collapse, and little else.

    python dcgan_cifar10.py --epochs 7 --out-dir runs/short             # 7 minutes
    python dcgan_cifar10.py                                             # an hour
    python dcgan_cifar10.py --conditional --out-dir runs/cifar_classes  # class by class
    python dcgan_cifar10.py --toy --out-dir runs/cifar_toy              # no download

Elsewhere, with the packages below, this file, common.py and models/generator.pth:

    import dcgan_cifar10, torch
    generator = dcgan_cifar10.Generator(latent_dim=100)
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    labels = torch.zeros(64, dtype=torch.int64)  # --conditional: 0 to 9
    images = dcgan_cifar10.sample(generator, torch.randn(64, 100), labels)  # in [-1, 1]
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
from torchvision.datasets import CIFAR10
from torchvision.transforms import PILToTensor, RandomCrop, ToPILImage

from common import init_weights, save_grid  # DCGAN's initial weights; a grid of images

R1_INTERVAL = 16  # D gets the R1 penalty, see r1_penalty(), at every 16th step:
R1_WEIGHT = 0.8  # 16 x 0.05: rare, so stronger (Karras et al. 2020)
AVERAGE_DECAY = 0.998  # averages over 500 steps or fewer, see update_average()
MIN_EPOCH_STEPS = 100  # few images are repeated to make an epoch of so many updates
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
LETTERS = "AHIMOTUVWX"  # the classes of --toy

# ---- networks (the comments are output shapes, without the batch's N) ----------------


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim, labels N (0 to 9) to images N x 3 x 32 x 32."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.ConvTranspose2d(latent_dim + 10, 192, 4),  # 192 x 4 x 4 (rule 2)
            nn.BatchNorm2d(192),  # rule 3
            nn.ReLU(),  # rule 4
            nn.ConvTranspose2d(192, 96, 4, 2, 1),  # 96 x 8 x 8 (rule 1: stride 2)
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.ConvTranspose2d(96, 48, 4, 2, 1),  # 48 x 16 x 16
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.ConvTranspose2d(48, 3, 4, 2, 1),  # 3 x 32 x 32
            nn.Tanh(),  # to [-1, 1] (rule 4)
        )

    def forward(self, z, labels):
        # The label as a one-hot vector, a 1 among nine 0s.
        z = torch.cat([z, nn.functional.one_hot(labels, 10)], 1)
        return super().forward(z[:, :, None, None])  # as an image of 1 x 1 (rule 2)


class Discriminator(nn.Sequential):
    """Images N x 3 x 32 x 32 in [-1, 1] and labels N to logits N x 1."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 48, 4, 2, 1),  # 48 x 16 x 16 (rule 1: stride 2)
            nn.LeakyReLU(0.2),  # rule 4
            nn.Conv2d(48, 96, 4, 2, 1),  # 96 x 8 x 8
            nn.BatchNorm2d(96),  # rule 3
            nn.LeakyReLU(0.2),
            nn.Conv2d(96, 192, 4, 2, 1),  # 192 x 4 x 4
            nn.BatchNorm2d(192),
            nn.LeakyReLU(0.2),
            nn.Conv2d(192, 10, 4),  # 10 x 1 x 1: one logit per class (rule 2)
            nn.Flatten(),  # 10
        )

    def forward(self, x, labels):
        # Label k picks logit k, which sees real images of class k alone: so fakes with
        # label k must look like them. (Without --conditional it is always logit 0.)
        return super().forward(x).gather(1, labels[:, None])


# ---- training ------------------------------------------------------------------------


def train_step(
    generator, discriminator, opt_g, opt_d, real, y, z, r1=False, bf16=False
):
    """Updates D once, then G once, and returns a dict of scalar tensors.

    real: images N x 3 x 32 x 32 in [-1, 1]; y: their labels N, which the fakes get too;
    z: latent vectors N x latent_dim; r1 adds the R1 penalty; bf16: mixed precision.
    """
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)
    # (1) Update D: minimise -log p(real) - log(1 - p(fake)), where p = sigmoid(logit).
    with autocast:
        fake = generator(z, y)
        # In one call BatchNorm would mix real and fake, but in (2) D sees fakes alone.
        real_logits = discriminator(real, y)
        # detach() cuts G off: loss_d is not for G, and (2) needs the fakes' graph.
        fake_logits = discriminator(fake.detach(), y)
        ones = torch.ones_like(real_logits)
        loss_d = bce(real_logits, ones) + bce(fake_logits, 1 - ones)
    opt_d.zero_grad()
    loss_d.backward()
    if r1:
        r1_penalty(discriminator, real, y).backward()  # adds to D's gradients
    opt_d.step()

    # (2) Update G: minimise -log p(fake).
    discriminator.requires_grad_(False)  # saves time: only gradients for G pass through
    with autocast:
        new_fake_logits = discriminator(fake, y)  # D has changed since (1)
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


def r1_penalty(discriminator, real, y):
    """Returns R1_WEIGHT times the mean of |d logit / d image|^2 over real images.

    It flattens D around real images, where a steep D would send fakes to and fro
    (Mescheder et al. 2018). Strictly it needs a D that judges each image by itself.
    Under rule 3, a logit depends on its whole batch, so the gradient at an image also
    has the others' share. Yet it helps in long runs: without it D wins (loss_d is
    0.08 after 30 epochs of --beta1 0.5 --lr 1e-3). In float32: bfloat16 is too coarse.
    """
    real = real[::2].requires_grad_()  # half of the batch, to save time
    logits = discriminator(real, y[::2])
    # Of the sum, row i is logit i's gradient. create_graph: to differentiate it again.
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return R1_WEIGHT * grad.square().sum() / len(real)


def update_average(average, generator, step):
    """Moves the average a little towards the generator (Yazici et al. 2019)."""
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


def train(args, device, bf16, data, labels, checkpoint):
    """Trains on data, uint8 N x 3 x 32 x 32, and writes all results to args.out_dir.

    labels: N, 0 to 9; checkpoint: dict of a run to resume, or {}. Raises
    FloatingPointError and OSError.
    """
    torch.manual_seed(args.seed)
    real_images = data[torch.randperm(len(data))[:1000]] / 127.5 - 1
    fixed_z = torch.randn(1000, args.latent_dim)  # the same for all epochs
    # Without --conditional all labels become 0 (x False), so that they tell nothing.
    fixed_labels = torch.arange(1000) // 8 % 10 * args.conditional  # 8 per class
    generator = Generator(args.latent_dim)
    discriminator = Discriminator()
    # A pixel's channels side by side in memory: faster, but risky on a Mac's GPU.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    for network in generator, discriminator:
        network.apply(init_weights).to(device, memory_format=layout)  # rule 5
    average = copy.deepcopy(generator)
    # beta1 is 0, not 0.9: old gradients mislead, as the opponent has moved since.
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
    fakes = sample(average, fixed_z, fixed_labels)
    shown = 80 if args.conditional else 64  # in a grid of 8 columns
    if not history:
        save_checkpoint(args, modules, history)
        by_class = data[labels.argsort()[:: max(1, len(data) // shown)]] / 127.5 - 1
        save_grid(by_class[:shown], f"{args.out_dir}/images/real.png")
        save_grid(fakes[:shown], f"{args.out_dir}/images/epoch_000.png")

    repeats = math.ceil(MIN_EPOCH_STEPS * args.batch_size / len(data))
    data, labels = data.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    epoch_steps = len(data) // args.batch_size  # without the last, shorter batch
    step = len(history) * epoch_steps
    data = data.to(device, memory_format=layout)
    labels = labels.to(device) * args.conditional
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
            if torch.rand(1) < 0.5:
                real = real.flip(3)  # half of the batches mirrored: more data
            y = labels[indices]
            z = torch.randn(args.batch_size, args.latent_dim, device=device)
            results.append(
                train_step(generator, discriminator, opt_g, opt_d, real, y, z, r1, bf16)
            )
            step += 1
            update_average(average, generator, step)
            show_progress(args, step, epoch_steps, start)
        fakes = sample(average, fixed_z, fixed_labels)  # by the average, not by G
        row = {"epoch": epoch}
        for name in results[0]:
            row[name] = sum(result[name] for result in results).item() / epoch_steps
        row["coverage"] = coverage(real_images, fakes[: len(real_images)])
        row["seconds"] = time.perf_counter() - start
        row["images_per_s"] = epoch_steps * args.batch_size / row["seconds"]
        if not math.isfinite(sum(row.values())):
            raise FloatingPointError("A loss is not finite: resume with a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes[:shown])  # images/, losses.png, history.csv
        save_checkpoint(args, modules, history)  # models/; generator.pth is the average
        print_epoch(args, row)


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z, labels):
    """Returns images N x 3 x 32 x 32 in [-1, 1], on the CPU, for N z and N labels.

    In evaluation mode BatchNorm uses its running statistics; in training mode an image
    would depend on the others in its batch. Afterwards the mode is as it was.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    images = generator(z.to(device), labels.to(device)).cpu()
    generator.train(was_training)
    return images


def generate(args, device, checkpoint):
    """Writes args.generate images (of each class in turn), a grid and a latent walk."""
    generator = Generator(args.latent_dim).to(device)
    generator.load_state_dict(checkpoint["average"])
    folder = f"{args.out_dir}/generated"
    if os.path.exists(folder):
        raise FileExistsError(f"{folder} exists: rename or delete it first")
    torch.manual_seed(args.seed + 1)  # not the z of training's grids
    labels = torch.arange(80) // 8 * args.conditional  # one row per class
    z = torch.randn(80, args.latent_dim)
    save_grid(sample(generator, z, labels), f"{folder}_grid.png")
    # Each row leads from z1 to z2 on a quarter circle. As cos^2 + sin^2 = 1, its z are
    # normal as in training; halfway on a straight line the variance would be 1/2.
    z1, z2 = torch.randn(2, 10, 1, args.latent_dim)
    angle = torch.linspace(0, math.pi / 2, 8)[:, None]  # 8 x 1, and z1 10 x 1 x dim
    z = (z1 * angle.cos() + z2 * angle.sin()).flatten(0, 1)
    save_grid(sample(generator, z, labels), f"{args.out_dir}/latent_walk.png")
    names = LETTERS if args.toy else CLASSES
    for i, z in enumerate(torch.randn(args.generate, 1, args.latent_dim)):
        k = i % 10 * args.conditional
        place = f"{folder}/{k}_{names[k]}" if args.conditional else folder
        os.makedirs(place, exist_ok=True)
        image = sample(generator, z, torch.tensor([k]))[0]
        ToPILImage()((image + 1) / 2).save(f"{place}/{i:05d}.png")


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args):
    """Returns images, uint8 N x 3 x 32 x 32, and labels N, of the training set."""
    if args.toy:
        return draw_letters(args.limit or 6000)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        data = CIFAR10(args.data_dir, download=True)
        images = torch.from_numpy(data.data[: args.limit]).permute(0, 3, 1, 2)
        return images, torch.tensor(data.targets[: args.limit])
    except Exception as error:  # torchvision raises many types
        sys.exit(
            f"CIFAR-10 could be neither read nor downloaded ({error!r}). If a file is "
            f"damaged, delete {args.data_dir}/cifar-10-batches-py and try again. If "
            f"there is no internet, put {CIFAR10.filename} into {args.data_dir} by "
            f"hand, or learn synthetic letters: python {sys.argv[0]} --toy"
        )


def draw_letters(count):
    """Draws letters that a mirror does not change, in varied colours and places."""
    torch.manual_seed(0)
    vary = RandomCrop(32)
    font = ImageFont.load_default(24)
    images = []
    for i in range(count):
        ink = f"hsl({torch.randint(360, ()).item()}, 80%, 75%)"
        paper = f"hsl({torch.randint(360, ()).item()}, 80%, 25%)"
        image = Image.new("RGB", (40, 40), paper)
        ImageDraw.Draw(image).text((20, 20), LETTERS[i % 10], ink, font, anchor="mm")
        images.append(PILToTensor()(vary(image)))
    return torch.stack(images), torch.arange(count) % 10


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
        for name in "conditional", "latent_dim", "beta1", "toy":
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
    epoch = row["epoch"]
    print(
        f"epoch {row['epoch']}/{args.epochs}  loss_d {row['loss_d']:.3f}  loss_g "
        f"{row['loss_g']:.3f}  acc_real {row['acc_real']:.2f}  acc_fake "
        f"{row['acc_fake']:.2f}  fool_rate {row['fool_rate']:.2f}  coverage "
        f"{row['coverage']:.2f}  {row['seconds']:.1f} s  {row['images_per_s']:,.0f} "
        "images/s",
        # In the first half of a run coverage may be low.
        "  LOW COVERAGE" if row["coverage"] < 0.2 and 2 * epoch > args.epochs else "",
        sep="",
        flush=True,
    )


# ---- flags and main ------------------------------------------------------------------


def parse_args(**settings):
    """Returns the flags; settings, of a checkpoint, take the place of the defaults."""
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--conditional", action="store_true", help="show G and D an image's class")
    flag("--epochs", type=positive, help="passes over the data (50; toy 12)")
    flag(
        "--batch-size", type=positive, default=64, help="images per step (%(default)s)"
    )
    flag("--lr", type=float, default=2e-3, help="first learning rate (%(default)s)")
    flag("--beta1", type=float, default=0.0, help="Adam's beta1 (%(default)s)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where images are or go (%(default)s)")
    flag(
        "--out-dir", default=f"runs/{Path(__file__).stem}", help="results (%(default)s)"
    )
    flag("--limit", type=positive, help="use only so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic letters, with no download")
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
    if not args.lr > 0 or not 0 <= args.beta1 < 1:
        parser.error(
            f"--lr {args.lr} is not above 0 or --beta1 {args.beta1} not in [0, 1)"
        )
    args.epochs = args.epochs or (12 if args.toy else 50)
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
            data, labels = load_data(args)
            if not 2 <= args.batch_size <= len(data):
                sys.exit(
                    f"--batch-size {args.batch_size} does not fit: 2 to {len(data)} do."
                )
            print(
                f"{len(data):,} images, {len(data) // args.batch_size} updates per "
                f"epoch, on {device} in {'bfloat16' if bf16 else 'float32'}"
            )
            train(args, device, bf16, data, labels, checkpoint)
        print(f"The results are in {args.out_dir!a}.")
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error, args))
    finally:
        if not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
