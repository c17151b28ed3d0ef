"""A DCGAN in colour: CIFAR-10, and the rules of Radford et al. 2015 (sections 3 and 4).

    1  No pooling: strided convolutions halve a picture in D, transposed ones double it in G.
    2  No dense hidden layers. (Channels are 48 to 192 here, kernels 4 wide, for speed on a CPU.)
    3  BatchNorm after each hidden layer but D's first.
    4  ReLU in G, tanh at its end; LeakyReLU with a slope of 0.2 in D.
    5  Weights from N(0, 0.02); Adam with beta1 of 0.5, learning rate 0.0002 (here 0.001, falling).
    +  R1, not theirs: without it, from 0.002, BatchNorm showed D whether a batch was real: D won.

    python dcgan_cifar10.py --toy --out-dir runs/toy_cifar10      # no download
    python dcgan_cifar10.py                                       # add --resume or --generate 64
    python dcgan_cifar10.py --conditional --out-dir runs/classes  # a class per row
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
from torchvision.datasets import CIFAR10

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
    parser = argparse.ArgumentParser(usage="python dcgan_cifar10.py [flags]; -h lists them")
    flag, count = parser.add_argument, number(int, 1)
    flag("--conditional", action="store_true", help="show G and D the class of a picture")
    flag("--epochs", type=count, help="passes over the data (50; 12 with --toy)")
    flag("--batch-size", type=number(int, 2), default=64, help="real pictures per update (64)")
    flag("--lr", type=number(float, 1e-9), default=1e-3, help="learning rate, falling to 0 (0.001)")
    flag("--beta1", type=number(float, 0, 1), default=0.5, help="Adam's beta1 (0.5)")
    flag("--latent-dim", type=count, default=100, help="numbers in a latent vector z (100)")
    flag("--sample-every", type=count, default=1, help="epochs from one saved grid to the next (1)")
    flag("--data-dir", default="data", help="the data set's folder, filled by download (data)")
    flag("--out-dir", default="runs/dcgan_cifar10", help="output folder (runs/dcgan_cifar10)")
    flag("--limit", type=count, metavar="N", help="use only the first N pictures (all)")
    flag("--toy", action="store_true", help="learn letters drawn on the spot, without a download")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="random seed (0)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (an accelerator if there is one)")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (if native)")
    flag("--compile", action="store_true", help="torch.compile both (needs a C++ compiler)")
    flag("--resume", action="store_true", help="go on with the run in --out-dir")
    flag("--generate", type=count, metavar="N", help="only draw N pictures by the run in --out-dir")
    args = parser.parse_args(namespace=argparse.Namespace(**(settings or {})))
    args.epochs = args.epochs or (12 if args.toy else 50)
    return args


def load_data(args):
    """Returns the 50,000 training pictures, or toy ones, uint8 N x 3 x 32 x 32, and labels N."""
    if args.toy:  # letters in matplotlib's fonts (not Display), of random colours, places, angles
        files = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuS*[!y].ttf")
        fonts = [ImageFont.truetype(str(file), 26) for file in sorted(files)]
        rng, pictures = np.random.default_rng(0), []
        for i in range(min(args.limit or 6000, 6000)):
            ink, paper = (f"hsl({rng.integers(360)}, 80%, {light}%)" for light in (75, 25))
            tile, place = Image.new("RGB", (32, 32), paper), tuple(rng.uniform(14, 18, 2))
            ImageDraw.Draw(tile).text(place, chr(65 + i % 10), ink, rng.choice(fonts), anchor="mm")
            pictures.append(np.array(tile.rotate(rng.uniform(-12, 12), fillcolor=paper)))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.arange(i + 1) % 10
    try:
        data = CIFAR10(args.data_dir, train=True, download=True)
        data, labels = torch.from_numpy(data.data).contiguous(), torch.tensor(data.targets)
        return data[:args.limit].permute(0, 3, 1, 2), labels[:args.limit]
    except Exception as error:  # torchvision raises many kinds
        sys.exit(f"CIFAR-10 cannot be read from {args.data_dir} nor fetched: {error}\nPut "
                 f"{CIFAR10.filename} there by hand, or try: python dcgan_cifar10.py --toy")


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim, and labels N if classes > 0, to N x 3 x 32 x 32 in [-1, 1]."""
    def __init__(self, latent_dim=100, classes=0):
        up = dict(kernel_size=4, stride=2, padding=1)  # rule 1
        super().__init__(  # rules 2, 3 and 4
            nn.ConvTranspose2d(latent_dim + classes, 192, 4, bias=False),
            nn.BatchNorm2d(192), nn.ReLU(),                                             # 192x4x4
            nn.ConvTranspose2d(192, 96, **up, bias=False), nn.BatchNorm2d(96), nn.ReLU(),   # 96x8x8
            nn.ConvTranspose2d(96, 48, **up, bias=False), nn.BatchNorm2d(48), nn.ReLU(),  # 48x16x16
            nn.ConvTranspose2d(48, 3, **up), nn.Tanh())                                 # 3x32x32
        self.classes = classes

    def forward(self, z, labels=None):
        z = torch.cat([z, one_hot(labels, self.classes)], 1) if self.classes else z
        return super().forward(z[:, :, None, None])  # rule 2: z is a picture of 1x1


class Discriminator(nn.Sequential):
    """Pictures N x 3 x 32 x 32 in [-1, 1], and labels N if classes > 0, to logits N."""
    def __init__(self, classes=0):
        down = dict(kernel_size=4, stride=2, padding=1)  # rule 1
        super().__init__(  # rules 2, 3 and 4
            nn.Conv2d(3, 48, **down), nn.LeakyReLU(0.2),                                # 48x16x16
            nn.Conv2d(48, 96, **down, bias=False), nn.BatchNorm2d(96), nn.LeakyReLU(0.2),   # 96x8x8
            nn.Conv2d(96, 192, **down, bias=False), nn.BatchNorm2d(192), nn.LeakyReLU(0.2),
            nn.Conv2d(192, max(classes, 1), 4), nn.Flatten())                   # 192x4x4 to 1x1x1

    def forward(self, x, labels=None):
        logits = super().forward(x)  # N x 1, or one for each class, of which the label picks one
        return logits.gather(1, labels[:, None])[:, 0] if logits.size(1) > 1 else logits[:, 0]


@torch.no_grad()
def sample(generator, z, labels=None):
    """Returns pictures N x 3 x 32 x 32, on the CPU, by a Generator for z N x latent_dim, labels N.
    A new Generator needs .load_state_dict(torch.load("models/generator.pth", "cpu")) first."""
    mode, device = generator.training, next(generator.parameters()).device
    generator.eval()  # with BatchNorm's running statistics a picture depends on its own z alone
    parts = zip(*(t.to(device).split(500) for t in (z, labels) if t is not None))
    pictures = torch.cat([generator(*part).float().cpu() for part in parts])
    generator.train(mode)
    return pictures


def train(args, device, bf16, data, labels, checkpoint):
    """Trains on uint8 N x 3 x 32 x 32; raises FloatingPointError if a loss is not finite."""
    if len(data) < args.batch_size:
        sys.exit(f"{len(data)} pictures do not fill a batch: lower --batch-size {args.batch_size}.")
    print(f"{len(data):,} pictures, {device}{', bfloat16' * bf16}, to {args.out_dir!a}")
    torch.manual_seed(args.seed)
    classes, n = (10, 10) if args.conditional else (0, 8)  # grids are n x n, with a class each row
    fixed = torch.randn(1000, args.latent_dim), torch.arange(1000) // n % 10 * args.conditional
    layout = dict(device=device, memory_format=torch.channels_last if device.type != "mps" else
                  torch.contiguous_format)  # channels last is faster; on Macs BatchNorm fails in it
    generator = Generator(args.latent_dim, classes).apply(init_weights).to(**layout)  # rule 5
    discriminator = Discriminator(classes).apply(init_weights).to(**layout)
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
    data, labels, steps = data.to(**layout), labels.to(device), len(data) // args.batch_size

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # resumed or not: the same numbers
        order = torch.randperm(len(data), device=device)[:steps * args.batch_size]
        means = torch.zeros(5, device=device)
        for step, batch in enumerate(order.view(steps, args.batch_size), 1):
            done = (epoch - 1) * steps + step - 1
            for group in opt_g.param_groups + opt_d.param_groups:
                group["lr"] = args.lr * (1 - done / (args.epochs * steps))  # rule 5; falls to 0
            r1, penalty = done % 16 == 0, 0
            x, y = data[batch] / 127.5 - 1, labels[batch]  # x in [-1, 1], the range of G's tanh
            turned = torch.rand(len(x), 1, 1, 1, device=device) < 0.5 * (not args.toy)
            x = torch.where(turned, x.flip(3), x)  # half of them mirrored, but for the toy letters
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
                penalty = 16 * 0.1 / 2 * grad.square().sum((1, 2, 3)).mean()
            opt_d.zero_grad()
            (loss_d + penalty).backward()
            opt_d.step()

            # G: minimise softplus(-D(G(z))) = -log p(G(z)). Where D spots fakes, p near 0,
            # it is steep, and log(1 - p) flat. D is frozen: its own gradients would be thrown away.
            discriminator.requires_grad_(False)
            with autocast:
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
            checkpoint=dict(script="dcgan_cifar10", settings=settings, history=history, **states),
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
        frames = [Image.open(file).copy() for file in files if file.exists()]
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
        if not damaged and checkpoint["script"] == "dcgan_cifar10":
            return checkpoint
    sys.exit(f"{path} is missing, damaged or not dcgan_cifar10.py's: train first or set --out-dir.")


def generate(args, device, checkpoint):
    """Writes args.generate PNG files, a grid and a walk to generated/; OSError if it cannot."""
    ema = AveragedModel(Generator(args.latent_dim, 10 * args.conditional)).to(device)
    ema.load_state_dict(checkpoint["ema"])
    names = ("A B C D E F G H I J" if args.toy else
             "airplane automobile bird cat deer dog frog horse ship truck").split()
    folder, n = Path(args.out_dir, "generated"), 10 if args.conditional else 8
    if folder.exists():
        sys.exit(f"{folder} exists, and nothing is overwritten: rename or delete it first.")
    torch.manual_seed(args.seed)
    z, y = torch.randn(args.generate, args.latent_dim), torch.arange(args.generate) % 10
    for i, one in enumerate(zip(z.split(1), y.split(1))):  # one by one, N may be large
        pixels = ((sample(ema, *one)[0] + 1) * 127.5).round().byte().numpy()
        place = folder / f"{i % 10}_{names[i % 10]}" if args.conditional else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(place / f"{i:05d}.png")
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
        hint = f'\nGo on from the last epoch: python dcgan_cifar10.py --resume --out-dir "{out}"'
        sys.exit(f"\nStopped. {error}{hint if saved.exists() and not args.generate else ''}")


if __name__ == "__main__":
    main()
