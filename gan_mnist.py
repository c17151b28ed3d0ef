"""A GAN on MNIST: two networks learn from each other until one of them writes digits.

The generator G turns a latent vector z of Gaussian numbers into a picture. The discriminator D
gives a picture a logit: above 0 it takes the picture for real, below 0 for generated. In turns, D
learns to tell real pictures x from generated ones G(z), and G learns to fool D. G never sees a real
picture: all that it learns comes through D's gradient.

    D minimises  E[softplus(-D(x))] + E[softplus(D(G(z)))]        2 log 2 = 1.39 if D only guesses
    G minimises  E[softplus(-D(G(z)))]                            log 2 = 0.69 if D only guesses

With p = sigmoid(D(x)), D's belief that x is real, softplus(-D(x)) is -log p, and softplus(D(x)) is
-log(1 - p). G could maximise D's second term instead, but where D spots the fakes (p near 0) that
is flat and teaches G nothing, while -log p is steep there (Goodfellow et al. 2014, section 3).

    python gan_mnist.py --toy                                 # a minute, no download
    python gan_mnist.py                                       # fully connected networks
    python gan_mnist.py --model conv --out-dir runs/conv      # convolutional networks
    python gan_mnist.py --generate 100                        # pictures from the trained G
"""
import argparse
import io
import os
import random
import sys
import time
import zipfile
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets import MNIST

from common import init_weights, save_grid

def number(kind, least, below=float("inf")):
    """Returns an argparse type: a number of that kind (int or float) in [least, below)."""
    def number(text):
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return kind(text)
    return number


def parse_args(settings=None):
    """Returns the flags; those not given come from a checkpoint's settings, where passed."""
    parser = argparse.ArgumentParser(usage="python gan_mnist.py [flags]; -h lists them")
    flag, count = parser.add_argument, number(int, 1)
    flag("--model", choices=("mlp", "conv"), default="mlp", help="networks (mlp)")
    flag("--epochs", type=count, help="passes over the data (50 for mlp, 20 for conv)")
    flag("--batch-size", type=number(int, 2), default=128, help="real pictures an update (128)")
    flag("--lr", type=number(float, 1e-9), default=1e-3, help="Adam's step, falling to 0 (0.001)")
    flag("--beta1", type=number(float, 0, 1), default=0.5, help="Adam's decay of gradients (0.5)")
    flag("--latent-dim", type=count, default=100, help="numbers in a latent vector z (100)")
    flag("--sample-every", type=count, default=1, help="epochs from one saved grid to the next (1)")
    flag("--data-dir", default="data", help="the data set's folder, filled by download (data)")
    flag("--out-dir", default="runs/gan_mnist", help="where all is written (runs/gan_mnist)")
    flag("--limit", type=count, help="use the first so many pictures only (all)")
    flag("--toy", action="store_true", help="learn digits drawn on the spot, without a download")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="start of the random numbers (0)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (an accelerator if there is one)")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (if native)")
    flag("--compile", action="store_true", help="torch.compile both (wants a C++ compiler)")
    flag("--resume", action="store_true", help="go on with the run in --out-dir")
    flag("--generate", type=count, metavar="N", help="only write N pictures by --out-dir's G")
    parser.set_defaults(**(settings or {}))
    args = parser.parse_args()
    args.epochs = args.epochs or {"mlp": 50, "conv": 20}[args.model]
    return args


def load_data(args):
    """Returns MNIST's 60,000 training pictures, or toy ones, as uint8 N x 1 x 28 x 28."""
    if args.toy:  # digits in matplotlib's fonts, each by chance in font, place and angle
        files = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuS*[!y].ttf")
        fonts = [ImageFont.truetype(str(file), 22) for file in sorted(files)]
        rng, pictures = random.Random(0), []
        for i in range(min(args.limit or 6000, 6000)):
            picture, place = Image.new("L", (28, 28)), (rng.uniform(12, 16), rng.uniform(12, 16))
            ImageDraw.Draw(picture).text(place, str(i % 10), 255, rng.choice(fonts), anchor="mm")
            pictures.append(np.array(picture.rotate(rng.uniform(-12, 12))))
        return torch.from_numpy(np.stack(pictures))[:, None]
    try:
        return MNIST(args.data_dir, train=True, download=True).data[:args.limit, None]
    except Exception as error:  # torchvision raises many kinds
        folder, files = Path(args.data_dir, "MNIST", "raw"), [name for name, _ in MNIST.resources]
        sys.exit(f"MNIST cannot be read from {folder}, nor fetched into it: {error}\nPut "
                 f"{', '.join(files)} there by hand, and nothing else, or run without a download: "
                 f"python gan_mnist.py --toy")


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim to pictures N x 1 x 28 x 28 in [-1, 1]."""
    def __init__(self, model="mlp", latent_dim=100):
        if model == "mlp":
            layers = [
                nn.Linear(latent_dim, 256, bias=False), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
                nn.Linear(256, 512, bias=False), nn.BatchNorm1d(512), nn.LeakyReLU(0.2),
                nn.Linear(512, 1024, bias=False), nn.BatchNorm1d(1024), nn.LeakyReLU(0.2),
                nn.Linear(1024, 28 * 28), nn.Unflatten(1, (1, 28, 28))]
        else:
            layers = [
                nn.Linear(latent_dim, 64 * 7 * 7, bias=False), nn.Unflatten(1, (64, 7, 7)),
                nn.BatchNorm2d(64), nn.LeakyReLU(0.2),                                  # 64x7x7
                nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(32), nn.LeakyReLU(0.2),                                  # 32x14x14
                nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1)]                      # 1x28x28
        super().__init__(*layers, nn.Tanh())


class Discriminator(nn.Sequential):
    """Pictures N x 1 x 28 x 28 in [-1, 1] to logits N."""
    def __init__(self, model="mlp"):
        if model == "mlp":
            layers = [
                nn.Flatten(), nn.Linear(28 * 28, 512), nn.LeakyReLU(0.2),
                nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)]
        else:
            layers = [
                nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2),            # 32x14x14
                nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(64), nn.LeakyReLU(0.2),                                  # 64x7x7
                nn.Flatten(), nn.Linear(64 * 7 * 7, 1)]
        super().__init__(*layers, nn.Flatten(0))


@torch.no_grad()
def sample(generator, z):
    """Returns G's pictures, N x 1 x 28 x 28 on the CPU, for latent vectors N x latent_dim.

    In evaluation mode, where BatchNorm uses its running statistics, so that a picture depends on
    its own z alone and not on its batch. Puts the mode back.
    """
    mode, device = generator.training, next(generator.parameters()).device
    generator.eval()
    pictures = generator(z.to(device)).float().cpu()
    generator.train(mode)
    return pictures


def train(args, device, data, checkpoint):
    """Trains on data, uint8 N x 1 x 28 x 28, to epoch args.epochs, from the checkpoint if given.

    Raises FloatingPointError at a loss that is not finite, OSError where a file cannot be written.
    """
    if len(data) < args.batch_size:
        sys.exit(f"{len(data)} pictures do not fill a batch of {args.batch_size}: lower --batch-size.")
    torch.manual_seed(args.seed)
    watched = torch.randn(1000, args.latent_dim)  # the same z for the pictures of every epoch
    generator = Generator(args.model, args.latent_dim).apply(init_weights).to(device)
    discriminator = Discriminator(args.model).apply(init_weights).to(device)
    # G's steps circle around what it is after. Their average is nearer to it, and is what we sample
    # from (Yazici et al. 2019): each step 0.2 % new, and more in the first steps. D never sees it.
    ema = AveragedModel(generator, use_buffers=True, avg_fn=lambda average, new, steps: torch.lerp(
        average.float(), new.float(), (9 / (steps + 10)).clamp(min=0.002)))
    optimizer_g, optimizer_d = (torch.optim.Adam(net.parameters(), betas=(args.beta1, 0.999),
                                                 fused=True) for net in (generator, discriminator))
    parts = dict(generator=generator, discriminator=discriminator, ema=ema,
                 optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    images, history = Path(args.out_dir, "images"), checkpoint["history"] if checkpoint else []
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    else:
        save_run(args, parts, history)
        save_grid(data[:64] / 127.5 - 1, images / "real.png")
        save_grid(sample(ema.module, watched[:64]), images / "epoch_000.png")
    for network in (generator, discriminator) if args.compile else ():
        network.compile()  # in place: the names in the checkpoint stay as they are
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    real_std = (data[:10_000] / 127.5).std(0).mean().item()
    data, steps, began = data.to(device), len(data) // args.batch_size, time.perf_counter()

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # a resumed run draws the same numbers
        order = torch.randperm(len(data), device=device)[:steps * args.batch_size]
        sums, shown = torch.zeros(5, device=device), time.perf_counter()
        for step, batch in enumerate(order.view(steps, args.batch_size), 1):
            for group in optimizer_g.param_groups + optimizer_d.param_groups:
                group["lr"] = args.lr * (1 - (epoch - 1 + (step - 1) / steps) / args.epochs)
            x = (data[batch] / 127.5 - 1).requires_grad_(step % 16 == 1)  # [-1, 1], tanh's range
            z = torch.randn(args.batch_size, args.latent_dim, device=device)

            # D: minimise softplus(-D(x)) + softplus(D(G(z))). Real and fake batches go in one by
            # one, so BatchNorm does not mix their statistics; detach() keeps this loss out of G.
            with autocast:
                fake = generator(z)
                on_real, on_fake = discriminator(x), discriminator(fake.detach())
            loss_d = softplus(-on_real.float()).mean() + softplus(on_fake.float()).mean()
            penalty = 0
            if step % 16 == 1:
                # R1: a fine on D's slope at real pictures, every 16th step but 16 times as high,
                # keeps D from growing steep around them (Mescheder et al. 2018).
                slope, = torch.autograd.grad(on_real.sum(), x, create_graph=True)
                penalty = 16 * 0.5 / 2 * slope.square().sum((1, 2, 3)).mean()
            optimizer_d.zero_grad()
            (loss_d + penalty).backward()
            optimizer_d.step()

            # G: minimise softplus(-D(G(z))): the same fakes, the updated D. D is frozen: gradients
            # pass through it to G, but none are computed for its own weights.
            discriminator.requires_grad_(False)
            with autocast:
                fooled = discriminator(fake)
            loss_g = softplus(-fooled.float()).mean()
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()
            discriminator.requires_grad_(True)
            ema.update_parameters(generator)

            # Summed on the device: reading a number at every step would make the CPU wait for it.
            shares = [(logits > 0).float().mean() for logits in (on_real, -on_fake, fooled)]
            sums += torch.stack([loss_d.detach(), loss_g.detach(), *shares])
            if step == steps or time.perf_counter() - shown > 1:
                shown = time.perf_counter()
                if not sums.isfinite().all():
                    raise FloatingPointError("A loss is not finite: try a smaller --lr.")
                if sys.stdout.isatty():
                    speed, left = step / (shown - began), (args.epochs - epoch + 1) * steps - step
                    print(f"epoch {epoch}/{args.epochs}  step {step}/{steps}  {left / speed:.0f} s "
                          f"left  {speed * args.batch_size:,.0f} pictures/s   ", end="\r", flush=True)

        pictures, seconds = sample(ema.module, watched), time.perf_counter() - began
        began += seconds
        history.append([epoch, *(sums / steps).tolist(), pictures.std(0).mean().item() / real_std,
                        seconds, steps * args.batch_size / seconds])
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_grid(pictures[:64], images / f"epoch_{epoch:03d}.png")
        save_run(args, parts, history)


def save_run(args, parts, history):
    """Writes history.csv, losses.png, progress.gif and models/; prints the last epoch's line."""
    out = Path(args.out_dir)
    if history:
        epoch, loss_d, loss_g, real, fake, fooled, diversity, seconds, speed = history[-1]
        print(f"epoch {epoch}/{args.epochs}  loss D {loss_d:.3f} G {loss_g:.3f}  right on real "
              f"{real:.2f} fake {fake:.2f}  fooled {fooled:.2f}  diversity {diversity:.2f}"
              f"{' LOW' * (diversity < 0.5)}  {seconds:.1f} s  {speed:,.0f} pictures/s", flush=True)
        columns = ["epoch", "loss_d", "loss_g", "acc_real", "acc_fake", "fooled", "diversity",
                   "seconds", "images_per_s"]
        table, figure = np.array(history), matplotlib.figure.Figure(figsize=(10, 4))
        np.savetxt(out / "history.csv", table, "%.6g", ",", header=",".join(columns), comments="")
        for axes, part in zip(figure.subplots(1, 2), (slice(1, 3), slice(3, 7))):
            axes.plot(table[:, 0], table[:, part], label=columns[part])
            axes.legend(title="by epoch")
        figure.savefig(out / "losses.png")
        files = sorted((out / "images").glob("epoch_*.png"), key=lambda file: int(file.stem[6:]))
        first, *others = [Image.open(file).convert("L") for file in files]
        first.save(out / "progress.gif", save_all=True, append_images=others, duration=200, loop=0)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out_dir", "device", "resume", "generate")}
    states = {name: part.state_dict() for name, part in parts.items()}
    for name, content in dict(
            checkpoint=dict(script="gan_mnist", settings=settings, history=history, **states),
            generator=parts["ema"].module.state_dict(),
            discriminator=states["discriminator"]).items():
        # Written beside, then renamed: a run cut off at any moment leaves the old file or the new.
        path, buffer = out / "models" / f"{name}.pth", io.BytesIO()
        torch.save(content, buffer)
        with open(f"{path}.tmp", "wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """Returns the checkpoint; exits if there is none, or none of this script that is whole."""
    try:
        fault = zipfile.ZipFile(path).testzip()  # torch itself does not compare the checksums
        # weights_only admits tensors and plain values alone: a stranger's file cannot run code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not fault and checkpoint["script"] == "gan_mnist":
            return checkpoint
    except Exception as error:  # of many kinds, by where the file is damaged
        fault = error
    sys.exit(f"{path} is not a whole checkpoint of gan_mnist.py ({fault}): name the folder of a "
             f"run with --out-dir, or train first.")


def generate(args, device, checkpoint):
    """Writes args.generate PNG files, a grid and a walk to generated/; OSError if it cannot."""
    ema = AveragedModel(Generator(args.model, args.latent_dim))
    ema.load_state_dict(checkpoint["ema"])
    generator, folder = ema.module.to(device), Path(args.out_dir, "generated")
    folder.mkdir()
    torch.manual_seed(args.seed)
    z = torch.randn(max(args.generate, 64), args.latent_dim)
    for start in range(0, args.generate, 500):
        pictures = sample(generator, z[start:start + 500])[:args.generate - start, 0]
        for i, pixels in enumerate(((pictures + 1) * 127.5).round().byte().numpy(), start):
            Image.fromarray(pixels).save(folder / f"{i:05d}.png")
    save_grid(sample(generator, z[:64]), folder / "grid.png")
    # A row of the walk is a quarter circle from a to b. Every z on it is as Gaussian as those that
    # G learned from; a straight line would cut through the middle, where G saw next to none.
    a, b = torch.randn(2, 8, 1, args.latent_dim)
    angle = torch.linspace(0, torch.pi / 2, 10)[:, None]
    walk = sample(generator, (a * angle.cos() + b * angle.sin()).flatten(0, 1))
    save_grid(walk, folder / "walk.png", columns=10)


def main():
    args, checkpoint = parse_args(), None
    out, saved = Path(args.out_dir), Path(args.out_dir, "models", "checkpoint.pth")
    if args.resume or args.generate:
        checkpoint = load_checkpoint(saved)
        args = parse_args(checkpoint["settings"])
        for name in ("model", "latent_dim"):
            if vars(args)[name] != checkpoint["settings"][name]:
                sys.exit(f"{saved} was trained with another {name}: leave that flag out.")
    elif out.is_dir() and any(path.is_file() for path in out.rglob("*")):
        sys.exit(f"{out} holds a run: add --resume to go on with it, or choose another --out-dir.")
    if args.generate and (out / "generated").exists():
        sys.exit(f"{out / 'generated'} is there already: move it away or delete it first.")
    try:
        device = torch.device(
            args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.ones(1, device=device).cpu()
    except Exception as error:  # of many kinds, by what is missing
        sys.exit(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if args.bf16 is None:  # where it is not native it is slower than float32
        args.bf16 = (torch.cuda.is_bf16_supported(False) if device.type == "cuda" else
                     device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    try:
        if args.generate:
            return generate(args, device, checkpoint)
        (out / "models").mkdir(parents=True, exist_ok=True)
        train(args, device, load_data(args), checkpoint)
    except (KeyboardInterrupt, OSError, FloatingPointError) as error:
        hint = f' Go on from the last epoch by: python gan_mnist.py --resume --out-dir "{out}"'
        sys.exit(f"\nStopped. {error}{hint if saved.exists() else ''}")


if __name__ == "__main__":
    main()
