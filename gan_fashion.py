"""A GAN that draws clothes, and how to watch one (read gan_mnist.py first).

New here: labels, which tell G and D an image's class (all are 0 without --conditional);
--g-steps, the updates of G per update of D; and numbers that tell more than the losses:
- coverage: the share of 1,000 test images with a fake nearby, see coverage(). With
  training images in place of fakes it is 0.97, with those of five classes 0.66.
- copy ratio, printed at the end: how far fakes are from training images, see
  copy_ratio(). Near 1: as far as new images. Well below: copies. Above: unlike all.

                loss_d  loss_g  acc_real  acc_fake  fool_rate  coverage  copy ratio
    healthy       1.15    0.87      0.81      0.82       0.14      0.96        1.04
    collapsed     1.39    0.70      0.10      0.82       0.17      0.10        1.55
    D has won     0.16    3.34      0.99      1.00       0.00      0.02        2.01
    copies        0.21    2.75      1.00      1.00       0.00      0.57        0.47

Collapsed: while D rests, all fakes run to what it likes; only coverage tells. D has
won: G cannot follow, with Adam's usual momentum at so high a learning rate. Copies: D
knows its 30 images by heart, wins by the numbers, and drives G to them; only the copy
ratio tells.

    python gan_fashion.py                                          # 6:35 min, two cores
    python gan_fashion.py --g-steps 20 --epochs 2 --out-dir runs/collapsed
    python gan_fashion.py --beta1 0.9 --lr 0.01 --epochs 2 --out-dir runs/won
    python gan_fashion.py --limit 30 --batch-size 10 --epochs 1500 --out-dir runs/copies
    python gan_fashion.py --conditional --out-dir runs/classes     # one row per class
    python gan_fashion.py --toy --out-dir runs/fashion_toy         # with no download

Elsewhere, with the packages below, this file, common.py and models/generator.pth:

    import gan_fashion, torch
    generator = gan_fashion.Generator(latent_dim=100)
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    labels = torch.zeros(64, dtype=torch.int64)  # --conditional: 0 to 9
    images = gan_fashion.sample(generator, torch.randn(64, 100), labels)  # in [-1, 1]
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
from torchvision.datasets import FashionMNIST
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid  # DCGAN's initial weights; a grid of images

R1_INTERVAL = 16  # D gets the R1 penalty, see r1_penalty(), at every 16th step:
R1_WEIGHT = 4.0  # 16 x 0.25: rare, so stronger (Karras et al. 2020)
AVERAGE_DECAY = 0.998  # averages over 500 steps or fewer, see update_average()
CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()

# ---- networks (the comments are output shapes, without the batch's N) ----------------


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim, labels N (0 to 9) to images N x 1 x 28 x 28."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim + 10, 512),  # 512, of z and the class
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 3136),  # 3136
            nn.Unflatten(1, (64, 7, 7)),  # 64 x 7 x 7
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),  # 32 x 14 x 14 (kernel, stride, pad)
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # 1 x 28 x 28
            nn.Tanh(),  # to [-1, 1]
        )

    def forward(self, z, labels):
        # The label as a one-hot vector, a 1 among nine 0s.
        return super().forward(torch.cat([z, nn.functional.one_hot(labels, 10)], 1))


class Discriminator(nn.Sequential):
    """Images N x 1 x 28 x 28 in [-1, 1] and labels N to logits N x 1."""

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
            nn.Linear(256, 10),  # 10: real or fake, a logit for each class
        )

    def forward(self, x, labels):
        # Label k picks logit k, which sees real images of class k alone: so fakes with
        # label k must look like them. (Without --conditional it is always logit 0.)
        return super().forward(x).gather(1, labels[:, None])


# ---- training ------------------------------------------------------------------------


def train_step(
    generator, discriminator, opt_g, opt_d, real, y, z, r1=False, bf16=False
):
    """Updates D, or not if opt_d is None, then G; returns a dict of scalar tensors.

    real: images N x 1 x 28 x 28 in [-1, 1]; y: their labels N, which the fakes get too;
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
    if opt_d:
        opt_d.zero_grad()
        loss_d.backward()
        if r1:
            r1_penalty(discriminator, real, y).backward()  # adds to D's gradients
        opt_d.step()

    # (2) Update G: minimise -log p(fake).
    discriminator.requires_grad_(False)  # saves time: only gradients for G pass through
    with autocast:
        new_fake_logits = discriminator(fake, y)  # by D as (1) left it
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

    It flattens D around real images (Mescheder et al. 2018); gan_mnist.py says why, and
    why it is only nearly R1 with BatchNorm in D. In float32: bfloat16 is too coarse.
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


def distances(images, others):
    """Returns the N x M distances of N images from M others, compared by pixels."""
    return torch.cdist(images.flatten(1), others.flatten(1))


def coverage(real, fake):
    """Returns the share of the real images that the fakes cover, in [0, 1].

    A real image is covered if a fake is closer to it than its own 5th nearest real one
    (Naeem et al. 2020). Both are N x C x H x W, compared by pixels: blur scores well.
    """
    radius = distances(real, real).kthvalue(6).values  # 1st: itself
    return (distances(real, fake).amin(1) < radius).float().mean().item()


def copy_ratio(fake, training, held_out, path):
    """Returns the copy ratio, and saves fakes above their nearest training images.

    The ratio: the median distance of fakes from their nearest training image, divided
    by that of held-out real images. Slight blur also lowers it: look at the grid.
    """
    nearest = distances(fake, training).min(1)
    save_grid(torch.cat([fake, training[nearest.indices]], 2)[::26], path)  # 39 pairs
    return nearest.values.median() / distances(held_out, training).amin(1).median()


def train(args, device, bf16, data, labels, held_out, checkpoint):
    """Trains on data, uint8 N x 1 x 28 x 28, and writes all results to args.out_dir.

    labels: N, 0 to 9; held_out: real images in [-1, 1] which are not trained on;
    checkpoint: dict of a run to resume, or {}. Raises FloatingPointError and OSError.
    """
    torch.manual_seed(args.seed)
    fixed_z = torch.randn(1000, args.latent_dim)  # the same for all epochs
    # Without --conditional all labels become 0 (x False), so that they tell nothing.
    fixed_labels = torch.arange(1000) // 10 % 10 * args.conditional  # ten per class
    generator = Generator(args.latent_dim).apply(init_weights).to(device)
    discriminator = Discriminator().apply(init_weights).to(device)
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
    shown = args.columns**2  # 81 in a grid, or 100 with --conditional
    if not history:
        save_checkpoint(args, modules, history)
        by_class = data[labels.argsort()[:: max(1, len(data) // shown)]] / 127.5 - 1
        save_grid(by_class[:shown], f"{args.out_dir}/images/real.png", args.columns)
        save_grid(fakes[:shown], f"{args.out_dir}/images/epoch_000.png", args.columns)

    epoch_steps = len(data) // args.batch_size  # without the last, shorter batch
    step = len(history) * epoch_steps
    data = data.to(device)
    labels = labels.to(device) * args.conditional
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed * 10_000 + epoch)  # the same when resumed
        results = []
        order = torch.randperm(len(data), device=device)
        for indices in order.split(args.batch_size)[:epoch_steps]:
            lr = args.lr * (1 - step / (args.epochs * epoch_steps))  # to 0: both settle
            opt_d.param_groups[0]["lr"] = opt_g.param_groups[0]["lr"] = lr
            opt = opt_d if step % args.g_steps == 0 else None  # None: D rests
            r1 = step % (R1_INTERVAL * args.g_steps) == 0  # every 16th update of D
            real = data[indices] / 127.5 - 1  # to [-1, 1], like the generator's images
            y = labels[indices]
            z = torch.randn(args.batch_size, args.latent_dim, device=device)
            results.append(
                train_step(generator, discriminator, opt_g, opt, real, y, z, r1, bf16)
            )
            step += 1
            update_average(average, generator, step)
            show_progress(args, step, epoch_steps, start)
        fakes = sample(average, fixed_z, fixed_labels)  # by the average, not by G
        row = {"epoch": epoch}
        for name in results[0]:
            row[name] = sum(result[name] for result in results).item() / epoch_steps
        row["coverage"] = coverage(held_out, fakes)
        row["seconds"] = time.perf_counter() - start
        row["images_per_s"] = epoch_steps * args.batch_size / row["seconds"]
        if not math.isfinite(sum(row.values())):
            raise FloatingPointError("A loss is not finite: resume with a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes[:shown])  # images/, losses.png, history.csv
        save_checkpoint(args, modules, history)  # models/; generator.pth is the average
        print_epoch(args, row)

    ratio = copy_ratio(
        fakes, data.cpu() / 127.5 - 1, held_out, f"{args.out_dir}/images/nearest.png"
    )
    print(f"copy ratio {ratio:.2f}: see images/nearest.png")


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z, labels):
    """Returns images N x 1 x 28 x 28 in [-1, 1], on the CPU, for N z and N labels.

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
    n = args.columns
    labels = torch.arange(n * n) // n * args.conditional  # one row per class
    images = sample(generator, torch.randn(n * n, args.latent_dim), labels)
    save_grid(images, f"{folder}_grid.png", n)
    # Each row leads from z1 to z2 on a quarter circle. As cos^2 + sin^2 = 1, its z are
    # normal as in training; halfway on a straight line the variance would be 1/2.
    z1, z2 = torch.randn(2, n, 1, args.latent_dim)
    angle = torch.linspace(0, math.pi / 2, n)[:, None]  # n x 1, and z1 n x 1 x dim
    z = (z1 * angle.cos() + z2 * angle.sin()).flatten(0, 1)
    save_grid(sample(generator, z, labels), f"{args.out_dir}/latent_walk.png", n)
    names = "ABCDEFGHIJ" if args.toy else CLASSES
    for i, z in enumerate(torch.randn(args.generate, 1, args.latent_dim)):
        k = i % 10 * args.conditional
        place = f"{folder}/{k}_{names[k]}" if args.conditional else folder
        os.makedirs(place, exist_ok=True)
        image = sample(generator, z, torch.tensor([k]))[0]
        ToPILImage()((image + 1) / 2).save(f"{place}/{i:05d}.png")


# ---- from here on, nothing is about GANs: data, files, flags and main ----------------


def load_data(args, train):
    """Returns images, uint8 N x 1 x 28 x 28, and labels N, of training or test set."""
    count = args.limit if train else 1000
    if args.toy:
        return draw_letters(count or 6000, train)
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        data = FashionMNIST(args.data_dir, train, download=True)
        assert data.data.any(), "all pixels are 0"  # of a damaged file
        return data.data[:count, None], data.targets[:count]
    except Exception as error:  # torchvision raises many types
        sys.exit(
            f"Fashion-MNIST could be neither read nor downloaded ({error!r}). Delete "
            f"{args.data_dir}/FashionMNIST if its files are damaged. Without internet, "
            f"put {', '.join(name for name, _ in FashionMNIST.resources)} into its "
            f"folder raw by hand, or learn letters: python {sys.argv[0]} --toy"
        )


def draw_letters(count, seed):
    """Draws synthetic letters, each a little different in place, size and angle."""
    torch.manual_seed(seed)
    vary = RandomAffine(10, (0.07, 0.07), (0.9, 1.1))  # turn, move, resize
    font = ImageFont.load_default(22)
    images = []
    for i in range(count):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), chr(65 + i % 10), 255, font, anchor="mm")
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
            save_grid(
                images, f"{args.out_dir}/images/epoch_{epoch:03d}.png", args.columns
            )
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
    flag("--conditional", action="store_true", help="show G and D an image's class")
    flag("--g-steps", type=positive, default=1, help="updates of G per one of D (1)")
    flag(
        "--epochs", type=positive, default=10, help="passes over the data (%(default)s)"
    )
    flag(
        "--batch-size", type=positive, default=64, help="images per step (%(default)s)"
    )
    flag("--lr", type=float, default=2e-3, help="first learning rate (%(default)s)")
    flag("--beta1", type=float, default=0.0, help="Adam's beta1 (%(default)s)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=2, help="epochs per grid (%(default)s)"
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
    args.columns = 9 + args.conditional  # in grids; 10 rows of a class each, or 9
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
            data, labels = load_data(args, train=True)
            held_out = load_data(args, train=False)[0] / 127.5 - 1
            if not 2 <= args.batch_size <= len(data):
                sys.exit(
                    f"--batch-size {args.batch_size} does not fit: 2 to {len(data)} do."
                )
            print(
                f"{len(data):,} images, {len(data) // args.batch_size} updates per "
                f"epoch, on {device} in {'bfloat16' if bf16 else 'float32'}"
            )
            train(args, device, bf16, data, labels, held_out, checkpoint)
        print(f"The results are in {args.out_dir!a}.")
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error, args))
    finally:
        if not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
