"""A GAN on Fashion-MNIST, and how to watch one: healthy, collapsed, or told what to draw.

gan_mnist.py explains the game; this is how to read the line of an epoch. Losses of 1.39 = 2 log 2
for D and 0.69 = log 2 for G: D only guesses. "right on": the shares of real and fake pictures that
D judges right; if near 1 for long, G learns little. "fooled": the share of fakes that D takes for
real after its update. "diversity": the standard deviation of a pixel from picture to picture, over
that of real ones (with --conditional, within a class): near 1 in a healthy run. In mode collapse G
draws a few pictures over and over, for nothing in its loss asks for variety. Below 0.5 the line
says LOW DIVERSITY, normal only in the first epochs; but five shapes over and over can still reach
0.8, so look at the grids. The last command makes it collapse. With --conditional, G and D see the
class, one to each row: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot.

    python gan_fashion.py --toy --out-dir runs/toy_fashion  # letters, no download
    python gan_fashion.py                                   # add --resume or --generate 81
    python gan_fashion.py --conditional --out-dir runs/conditional
    python gan_fashion.py --g-steps 10 --limit 12800 --epochs 4 --out-dir runs/collapse
"""
import argparse
import io
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import one_hot, softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import FashionMNIST

from common import init_weights, save_grid


def number(kind, least, below=float("inf")):
    """Returns an argparse type: a number of that kind (int or float) in [least, below)."""
    def number(text):  # the name that argparse shows in its message
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return kind(text)
    return number


def parse_args(settings=None):
    """Returns the flags; those not given come from a checkpoint's settings, where passed."""
    parser = argparse.ArgumentParser(usage="python gan_fashion.py [flags]; -h lists them")
    flag, count = parser.add_argument, number(int, 1)
    flag("--conditional", action="store_true", help="show G and D the class of a picture")
    flag("--g-steps", type=count, default=1, help="updates of G to one of D (1)")
    flag("--epochs", type=count, default=20, help="passes over the data (20)")
    flag("--batch-size", type=number(int, 2), help="real pictures per update (256; 64 with --toy)")
    flag("--lr", type=number(float, 1e-9), default=2e-3, help="learning rate, falling to 0 (0.002)")
    flag("--beta1", type=number(float, 0, 1), default=0.5, help="Adam's beta1 (0.5)")
    flag("--latent-dim", type=count, default=100, help="numbers in a latent vector z (100)")
    flag("--sample-every", type=count, default=2, help="epochs from one saved grid to the next (2)")
    flag("--data-dir", default="data", help="the data set's folder, filled by download (data)")
    flag("--out-dir", default="runs/gan_fashion", help="output folder (runs/gan_fashion)")
    flag("--limit", type=count, metavar="N", help="use only the first N pictures (all)")
    flag("--toy", action="store_true", help="learn letters drawn on the spot, without a download")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="random seed (0)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (an accelerator if there is one)")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (if native)")
    flag("--compile", action="store_true", help="torch.compile both (needs a C++ compiler)")
    flag("--resume", action="store_true", help="go on with the run in --out-dir")
    flag("--generate", type=count, metavar="N", help="only draw N pictures by the run in --out-dir")
    args = parser.parse_args(namespace=argparse.Namespace(**(settings or {})))
    args.batch_size = args.batch_size or (64 if args.toy else 256)
    return args


def load_data(args):
    """Returns the 60,000 training pictures, or toy ones, uint8 N x 1 x 28 x 28, and labels N."""
    if args.toy:  # letters in matplotlib's fonts (not Display), at random places and angles
        files = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuS*[!y].ttf")
        fonts = [ImageFont.truetype(str(file), 22) for file in sorted(files)]
        rng, pictures = np.random.default_rng(0), []
        for i in range(min(args.limit or 6000, 6000)):
            tile, place = Image.new("L", (28, 28)), (rng.uniform(12, 16), rng.uniform(12, 16))
            ImageDraw.Draw(tile).text(place, chr(65 + i % 10), 255, rng.choice(fonts), anchor="mm")
            pictures.append(np.array(tile.rotate(rng.uniform(-12, 12))))
        return torch.from_numpy(np.stack(pictures))[:, None], torch.arange(len(pictures)) % 10
    try:
        data = FashionMNIST(args.data_dir, train=True, download=True)
        return data.data[:args.limit, None], data.targets[:args.limit]
    except Exception as error:  # torchvision raises many kinds
        folder, files = Path(args.data_dir, "FashionMNIST", "raw"), dict(FashionMNIST.resources)
        sys.exit(f"Fashion-MNIST cannot be read from {folder} nor fetched: {error}\nPut "
                 f"{', '.join(files)} there by hand, or try: python gan_fashion.py --toy")


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim, and labels N if classes > 0, to N x 1 x 28 x 28 in [-1, 1]."""
    def __init__(self, latent_dim=100, classes=0):
        super().__init__(
            nn.Linear(latent_dim + classes, 512, bias=False), nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2), nn.Linear(512, 64 * 7 * 7, bias=False),
            nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),         # 64x7x7
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32), nn.LeakyReLU(0.2),                                      # 32x14x14
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Tanh())               # 1x28x28
        self.classes = classes

    def forward(self, z, labels=None):
        z = torch.cat([z, one_hot(labels, self.classes)], 1) if self.classes else z
        return super().forward(z)


class Discriminator(nn.Sequential):
    """Pictures N x 1 x 28 x 28 in [-1, 1], and labels N if classes > 0, to logits N."""
    def __init__(self, classes=0):
        super().__init__(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2),                # 32x14x14
            nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64), nn.LeakyReLU(0.2), nn.Flatten(),                        # 64x7x7
            nn.Linear(64 * 7 * 7, 256), nn.LeakyReLU(0.2), nn.Linear(256, max(classes, 1)))

    def forward(self, x, labels=None):
        logits = super().forward(x)  # N x 1, or one for each class, of which the label picks one
        return logits.gather(1, labels[:, None])[:, 0] if logits.size(1) > 1 else logits[:, 0]


@torch.no_grad()
def sample(generator, z, labels=None):
    """Returns pictures N x 1 x 28 x 28, on the CPU, by a Generator for z N x latent_dim, labels N.
    A new Generator needs .load_state_dict(torch.load("models/generator.pth", "cpu")) first."""
    mode, device = generator.training, next(generator.parameters()).device
    generator.eval()  # with BatchNorm's running statistics a picture depends on its own z alone
    parts = zip(*(t.to(device).split(500) for t in (z, labels) if t is not None))
    pictures = torch.cat([generator(*part).float().cpu() for part in parts])
    generator.train(mode)
    return pictures


def train(args, device, bf16, data, labels, checkpoint):
    """Trains on uint8 N x 1 x 28 x 28; raises FloatingPointError if a loss is not finite."""
    if len(data) < args.batch_size:
        sys.exit(f"{len(data)} pictures do not fill a batch: lower --batch-size {args.batch_size}.")
    print(f"{len(data):,} pictures, {device}{', bfloat16' * bf16}, to {args.out_dir!a}")
    torch.manual_seed(args.seed)
    classes, n = (10, 10) if args.conditional else (0, 9)  # grids are n x n, with a class each row
    fixed = torch.randn(1000, args.latent_dim), torch.arange(1000) // n % 10 * args.conditional
    generator = Generator(args.latent_dim, classes).apply(init_weights).to(device)
    discriminator = Discriminator(classes).apply(init_weights).to(device)
    # Chasing D, G's weights circle around a balance: their average is nearer, and what we sample.
    ema = AveragedModel(generator, use_buffers=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    opt_d = torch.optim.Adam(discriminator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    run = dict(generator=generator, discriminator=discriminator, ema=ema, opt_g=opt_g, opt_d=opt_d)
    for name, part in run.items() if checkpoint else ():
        part.load_state_dict(checkpoint[name])
    history, images = checkpoint["history"] if checkpoint else [], Path(args.out_dir, "images")
    save_run(args, run, history)
    if not history:
        rows = [data[labels == k][:n] for k in range(10)] if args.conditional else [data[:n * n]]
        save_grid(torch.cat(rows) / 127.5 - 1, images / "real.png", n)
        save_grid(sample(ema, *fixed)[:n * n], images / "epoch_000.png", n)
    if args.compile:  # in place: the names in the checkpoint stay as they are
        generator.compile(), discriminator.compile()
    spread = lambda x, y: torch.stack([x[y == k].std(0, correction=0) for k in y.unique()]).mean()
    real_spread = spread(data[:10_000] / 127.5, labels[:10_000] * args.conditional).item() or 1
    autocast, began = torch.autocast(device.type, torch.bfloat16, bf16), time.perf_counter()
    data, labels, steps = data.to(device), labels.to(device), len(data) // args.batch_size

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # resumed or not: the same numbers
        order = torch.randperm(len(data), device=device)[:steps * args.batch_size]
        means = torch.zeros(5, device=device)
        for step, batch in enumerate(order.view(steps, args.batch_size), 1):
            done = (epoch - 1) * steps + step - 1
            for group in opt_g.param_groups + opt_d.param_groups:
                group["lr"] = args.lr * (1 - done / (args.epochs * steps))  # falls to 0
            r1, penalty = done % 16 == 0, 0
            x, y = data[batch] / 127.5 - 1, labels[batch]  # x in [-1, 1], the range of G's tanh
            z = torch.randn(args.batch_size, args.latent_dim, device=device)

            # D: minimise softplus(-D(x)) + softplus(D(G(z))) = -log p(x) - log(1 - p(G(z))), where
            # p = sigmoid(D). Real and fake go in apart: BatchNorm sees fakes alone, as in G's step.
            with autocast:
                fake = generator(z, y)  # of the real pictures' classes
                on_fake = discriminator(fake.detach(), y)  # stops at G: its graph serves G's step
                on_real = discriminator.forward(x.requires_grad_(r1), y)  # uncompiled, as R1 needs
            loss_d = softplus(-on_real.float()).mean() + softplus(on_fake.float()).mean()
            if r1:  # R1 (Mescheder et al. 2018) keeps D from growing steep: each 16th step, 16-fold
                grad, = torch.autograd.grad(on_real.sum(), x, create_graph=True)
                penalty = 16 * 0.5 / 2 * grad.square().sum((1, 2, 3)).mean()
            opt_d.zero_grad()
            (loss_d + penalty).backward()
            opt_d.step()

            # G: minimise softplus(-D(G(z))) = -log p(G(z)). Where D spots fakes, p near 0,
            # it is steep, and log(1 - p) flat. D is frozen: its own gradients would be thrown away.
            discriminator.requires_grad_(False)
            for turn in range(args.g_steps):
                with autocast:
                    fake = generator(torch.randn_like(z), y) if turn else fake  # D's first
                    fooled = discriminator(fake, y)
                loss_g = softplus(-fooled.float()).mean()
                opt_g.zero_grad()
                loss_g.backward()
                opt_g.step()
            discriminator.requires_grad_(True)
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(0.998, (done + 1) / (done + 10)))
            ema.update_parameters(generator)  # takes in 9 / (done + 10), at least 0.2 %
            shares = [(logits > 0).float().mean() for logits in (on_real, -on_fake, fooled)]
            means += torch.stack([loss_d.detach(), loss_g.detach(), *shares]) / steps  # no sync
            if sys.stdout.isatty() and step % 10 == 0:
                left, speed = args.epochs * steps - done - 1, step / (time.perf_counter() - began)
                print(f"epoch {epoch}/{args.epochs}  step {step}/{steps}  {left / speed:.0f} s left"
                      f"  {speed * args.batch_size:,.0f} pictures/s    ", end="\r", flush=True)

        pictures, seconds = sample(ema, *fixed), time.perf_counter() - began
        began += seconds
        diversity = (spread(pictures, fixed[1]) / real_spread).item()  # of a class; 0: all alike
        history.append([epoch, *means.tolist(), diversity, seconds, steps * len(z) / seconds])
        if not np.isfinite(history[-1]).all():
            raise FloatingPointError("A loss is not finite: go on with a smaller --lr.")
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_grid(pictures[:n * n], images / f"epoch_{epoch:03d}.png", n)
        save_run(args, run, history)


def save_run(args, run, history):
    """Writes models/, history.csv, losses.png and progress.gif; prints the last epoch's line."""
    out = Path(args.out_dir)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out_dir", "device", "compile", "resume", "generate")}
    states = {name: part.state_dict() for name, part in run.items()}
    for name, content in dict(
            checkpoint=dict(script="gan_fashion", settings=settings, history=history, **states),
            generator=run["ema"].module.state_dict(),
            discriminator=states["discriminator"]).items():
        # Written beside, then renamed: a run cut off at any moment leaves the old file or the new.
        path, buffer = out / "models" / f"{name}.pth", io.BytesIO()
        torch.save(content, buffer)
        path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
        path.with_suffix(".tmp").replace(path)
    if history:
        header = "epoch,loss_d,loss_g,acc_real,acc_fake,fooled,diversity,seconds,images_per_s"
        table = np.array(history)
        np.savetxt(out / "history.csv", table, "%.6g", ",", header=header, comments="")
        axes = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained").subplots()
        axes.plot(table[:, 0], table[:, 1:7], label=header.split(",")[1:7])
        axes.legend(title="by epoch", loc="upper left", bbox_to_anchor=(1, 1))
        axes.figure.savefig(out / "losses.png")
        files = [out / "images" / f"epoch_{i:03d}.png" for i in range(len(history) + 1)]
        frames = [Image.open(file).convert("L") for file in files if file.exists()]
        if frames:  # there are none if only the checkpoint was kept
            frames[0].save(out / "progress.gif", append_images=frames[1:], save_all=True,
                           duration=200, loop=0)
        print("epoch {}/{}  loss D {:.3f} G {:.3f}  right on real {:.2f} fake {:.2f}  fooled {:.2f}"
              "  diversity {:.2f}  {:.1f} s  {:,.0f} pictures/s".format(len(history), args.epochs,
              *history[-1][1:]), " LOW DIVERSITY" * (history[-1][6] < 0.5), flush=True)


def load_checkpoint(path):
    """Returns the checkpoint; exits if it is missing, damaged or another script's."""
    with suppress(Exception):  # of many kinds, by what is wrong with the file
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare the checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # it can run no code
        if not damaged and checkpoint["script"] == "gan_fashion":
            return checkpoint
    sys.exit(f"{path} is missing, damaged or not gan_fashion.py's: train first or set --out-dir.")


def generate(args, device, checkpoint):
    """Writes args.generate PNG files, a grid and a walk to generated/; OSError if it cannot."""
    ema = AveragedModel(Generator(args.latent_dim, 10 * args.conditional)).to(device)
    ema.load_state_dict(checkpoint["ema"])
    names = "ABCDEFGHIJ" if args.toy else [s.replace("/top", "") for s in FashionMNIST.classes]
    folder, n = Path(args.out_dir, "generated"), 10 if args.conditional else 9
    if folder.exists():
        sys.exit(f"{folder} exists, and nothing is overwritten: rename or delete it first.")
    torch.manual_seed(args.seed)
    z, y = torch.randn(args.generate, args.latent_dim), torch.arange(args.generate) % 10
    for i, one in enumerate(zip(z.split(1), y.split(1))):  # one by one, N may be large
        pixels = ((sample(ema, *one)[0] + 1) * 127.5).round().byte().numpy()
        place = folder / f"{i % 10}_{names[i % 10]}" if args.conditional else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(place / f"{i:05d}.png")
    z, y = torch.randn(n * n, args.latent_dim), torch.arange(n * n) // n
    save_grid(sample(ema, z, y), folder / "grid.png", n)
    a, b = torch.randn(2, n, 1, args.latent_dim)
    t = torch.linspace(0, torch.pi / 2, n)[:, None]  # quarter circle: a line would come near 0
    save_grid(sample(ema, (a * t.cos() + b * t.sin()).flatten(0, 1), y), folder / "walk.png", n)


def main():
    args, checkpoint = parse_args(), None
    out, saved = Path(args.out_dir), Path(args.out_dir, "models", "checkpoint.pth")
    if args.resume or args.generate:
        checkpoint = load_checkpoint(saved)
        args, old = parse_args(checkpoint["settings"]), checkpoint["settings"]
        if any(vars(args)[n] != old[n] for n in ("beta1", "conditional", "latent_dim", "toy")):
            sys.exit(f"{saved}: a run keeps its --beta1, --conditional, --latent-dim and --toy.")
    elif any(path.is_file() and path.suffix != ".tmp" for path in out.rglob("*")):
        sys.exit(f"{out} is not empty: add --resume if it holds a run, or change --out-dir.")
    try:
        device = torch.device(args.device or torch.accelerator.current_accelerator(True) or "cpu")
        torch.ones(1, device=device).cpu()
    except Exception as error:  # of many kinds, by what is missing
        sys.exit(f"--device {args.device or ''} cannot be used: {str(error).splitlines()[0]}")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    native = (torch.cuda.is_bf16_supported(False) if device.type == "cuda"
              else device.type == "cpu" and cpu.get("avx512_bf16", False))
    bf16 = native if args.bf16 is None else args.bf16  # not native: float32 is faster
    try:
        if args.generate:
            return generate(args, device, checkpoint)
        (out / "models").mkdir(parents=True, exist_ok=True)
        train(args, device, bf16, *load_data(args), checkpoint)
    except (KeyboardInterrupt, OSError, FloatingPointError) as error:
        hint = f'\nGo on from the last epoch: python gan_fashion.py --resume --out-dir "{out}"'
        sys.exit(f"\nStopped. {error}{hint if saved.exists() and not args.generate else ''}")


if __name__ == "__main__":
    main()
