"""A DCGAN for faces at 64x64: CelebA, and what changes when data is large and the run long.

D learns to tell real pictures from G's, and G to fool D: dcgan_cifar10.py has the rules. New here:
    Decoding    Each file becomes 64x64x3 bytes, once; a batch reads its own from the disk.
    Processes   torchrun starts one a GPU: each takes its share of an epoch, gradients are averaged.

    python dcgan_celeba.py --toy --out-dir runs/toy_celeba      # no download
    python dcgan_celeba.py --epochs 50                          # add --resume or --generate 64
    python dcgan_celeba.py --images FOLDER --out-dir runs/mine  # your own pictures
    torchrun --nproc-per-node 2 dcgan_celeba.py --out-dir runs/two_gpus
"""
import argparse
import hashlib
import io
import os
import socket
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets.utils import download_url

from common import init_weights, save_grid

URL = "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip"  # needs no login
MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"  # of the official img_align_celeba.zip


def number(kind, least, below=float("inf")):
    """Returns an argparse type: a number of that kind (int or float) in [least, below)."""
    def number(text):  # the name that argparse shows in its message
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")
        return kind(text)
    return number


def parse_args(settings=None):
    """Returns the flags; those not given come from a checkpoint's settings, where passed."""
    parser = argparse.ArgumentParser(usage="python dcgan_celeba.py [flags]; -h lists them")
    flag, count = parser.add_argument, number(int, 1)
    flag("--images", metavar="FOLDER", help="folder or .zip to learn from (CelebA)")
    flag("--epochs", type=count, help="passes over the data (50; 12 with --toy)")
    flag("--batch-size", type=number(int, 2), help="pictures per process and update (64; toy 16)")
    flag("--lr", type=number(float, 1e-9), help="learning rate, falling to 0 (4e-4; toy 1e-3)")
    flag("--beta1", type=number(float, 0, 1), default=0.5, help="Adam's beta1 (0.5)")
    flag("--latent-dim", type=count, default=100, help="numbers in a latent vector z (100)")
    flag("--sample-every", type=count, default=1, help="epochs from one saved grid to the next (1)")
    flag("--data-dir", default="data", help="the data set's folder, filled by download (data)")
    flag("--out-dir", default="runs/dcgan_celeba", help="output folder (runs/dcgan_celeba)")
    flag("--limit", type=count, metavar="N", help="use only the first N pictures (all)")
    flag("--toy", action="store_true", help="learn cartoon faces drawn on the spot, no download")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="random seed (0)")
    flag("--device", help="cpu, cuda, cuda:1, mps ... (an accelerator if there is one)")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (if native)")
    flag("--compile", action="store_true", help="torch.compile both (needs a C++ compiler)")
    flag("--resume", action="store_true", help="go on with the run in --out-dir")
    flag("--generate", type=count, metavar="N", help="only draw N pictures by the run in --out-dir")
    args = parser.parse_args(namespace=argparse.Namespace(**(settings or {})))
    n, b, lr = (12, 16, 1e-3) if args.toy else (50, 64, 4e-4)
    args.epochs, args.batch_size, args.lr = args.epochs or n, args.batch_size or b, args.lr or lr
    return args


def decode(open_file, name):
    """Returns a picture as the bytes of 64 x 64 x 3, or None if it is unreadable or below 8x8."""
    with suppress(Exception), open_file(name) as file, Image.open(file) as picture:  # many kinds
        if min(picture.size) >= 8 and picture.mode[0] not in "IF":  # nor 16-bit
            picture.draft(None, (64, 64))  # a JPEG is read at 1/2, 1/4 or 1/8 if that is enough
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
            picture = ImageOps.fit(picture, (64, 64), Image.Resampling.BICUBIC)  # centre crop
            white = Image.new("RGBA", (64, 64), "white")
            return Image.alpha_composite(white, picture).convert("RGB").tobytes()


def decode_all(place, root, limit):
    """Returns the path of the .npy, uint8 N x 64 x 64 x 3, of a folder or .zip; None if empty."""
    if place.is_file():
        if not zipfile.is_zipfile(place):
            sys.exit(f"{place} is not a whole .zip: put the whole one there.")
        open_file = (archive := zipfile.ZipFile(place)).open
        files = [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]
    else:
        open_file, tree = (lambda name: open(name, "rb")), os.walk(place, followlinks=True)
        entries = (entry for folder, *_ in tree for entry in os.scandir(folder))
        files = [(e.path, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file()]
    files = sorted(file for file in files if os.path.basename(file[0])[:1] not in ("", "."))[:limit]
    # Another name, so all is decoded again, if a file is new, gone or changed.
    key = hashlib.sha256(repr([os.path.abspath(place), *files]).encode()).hexdigest()[:16]
    path, skipped, began = root / f"decoded_{key}.npy", [], time.perf_counter()
    if path.exists() or not files:
        return path if files else None
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="decoded_") as beside:
        with open(Path(beside, path.name), "wb") as file, ThreadPoolExecutor() as pool:
            file.seek(128)  # numpy pads the header to that; it is written last
            for i in range(0, len(files), 200):
                names = [name for name, *_ in files[i:i + 200]]
                pixels = list(pool.map(lambda name: decode(open_file, name), names))  # on all cores
                skipped += [name for name, found in zip(names, pixels) if not found]
                file.write(b"".join(filter(None, pixels)))
                done, speed = i + len(names), (i + len(names)) / (time.perf_counter() - began)
                line = f"{done:,}/{len(files):,} decoded, {speed:,.0f} pictures/s"
                if sys.stdout.isatty():
                    print(line, end="\r", flush=True)
            header = dict(descr="|u1", fortran_order=False, shape=(done - len(skipped), 64, 64, 3))
            file.seek(0), np.lib.format.write_array_header_1_0(file, header)
            file.flush(), os.fsync(file.fileno())
        print(line, f"{len(skipped)} unreadable", *map(ascii, skipped[:3]), sep=", ")
        if len(skipped) == len(files):
            sys.exit(f"No file in {place} can be read as a picture of at least 8x8.")
        return Path(beside, path.name).replace(path)


def load_data(args):
    """Returns the number of training pictures, and a function: index to uint8 B x 3 x 64 x 64."""
    if args.toy:  # faces of ellipses, random in colours, place and size
        rng, pictures = np.random.default_rng(0), []
        for _ in range(min(args.limit or 600, 600)):
            x, y, w, h, lips = rng.uniform((118, 118, 60, 80, 4), (138, 138, 85, 105, 20))
            parts = [(0, 0, 256, 256, 85), (0, -h / 3, w + 16, 0.9 * h, 30), (0, 0, w, h, 70),
                     (-w / 2, -20, 14, 18, 0), (w / 2, -20, 14, 18, 0), (0, h / 2, w / 2, lips, 40)]
            draw = ImageDraw.Draw(tile := Image.new("RGB", (256, 256)))
            for right, down, a, b, light in parts:
                draw.ellipse((x + right - a, y + down - b, x + right + a, y + down + b),
                             f"hsl({rng.integers(360)}, 70%, {light}%)")
            pictures.append(np.array(tile.resize((64, 64), Image.Resampling.BOX)))
        return len(pictures), torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).__getitem__
    root, archive = Path(args.data_dir), Path(args.data_dir, "celeba", "img_align_celeba.zip")
    places = [Path(args.images)] if args.images else [  # torchvision's, Kaggle's, the official one
        archive.with_suffix(""), root / "img_align_celeba", archive, root / archive.name]
    for place in filter(Path.exists, places):
        if path := decode_all(place, root, args.limit):
            # Mapped anew for each batch, or all that was ever read would count as memory in use.
            return len(np.load(path, mmap_mode="r")), lambda index: torch.tensor(
                np.load(path, mmap_mode="r")[index]).permute(0, 3, 1, 2)
    if args.images:
        sys.exit(f"--images {args.images} is no folder with files in it, nor a .zip of them.")
    try:
        socket.setdefaulttimeout(60)  # seconds without a byte, instead of waiting for ever
        download_url(URL, archive.parent, archive.name + ".part", MD5)
        archive.with_suffix(".zip.part").replace(archive)
    except Exception as error:  # torchvision raises many kinds
        sys.exit(f"CelebA is not in {root} and cannot be fetched from {URL}: {error}\n"
                 f"Put img_align_celeba.zip, or its folder unpacked, into {root} by hand, or learn "
                 "from your own pictures, --images FOLDER, or try: python dcgan_celeba.py --toy")
    return load_data(args)


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim to pictures N x 3 x 64 x 64 in [-1, 1]."""
    def __init__(self, latent_dim=100):
        up = dict(kernel_size=4, stride=2, padding=1, bias=False)
        super().__init__(
            nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, 512, 4, bias=False),
            nn.BatchNorm2d(512), nn.ReLU(),                                            # 512x4x4
            nn.ConvTranspose2d(512, 256, **up), nn.BatchNorm2d(256), nn.ReLU(),        # 256x8x8
            nn.ConvTranspose2d(256, 128, **up), nn.BatchNorm2d(128), nn.ReLU(),        # 128x16x16
            nn.ConvTranspose2d(128, 64, **up), nn.BatchNorm2d(64), nn.ReLU(),          # 64x32x32
            nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh())                             # 3x64x64


class Discriminator(nn.Sequential):
    """Pictures N x 3 x 64 x 64 in [-1, 1] to logits N."""
    def __init__(self):
        down = dict(kernel_size=4, stride=2, padding=1, bias=False)
        super().__init__(
            nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),                              # 64x32x32
            nn.Conv2d(64, 128, **down), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),        # 128x16x16
            nn.Conv2d(128, 256, **down), nn.BatchNorm2d(256), nn.LeakyReLU(0.2),       # 256x8x8
            nn.Conv2d(256, 512, **down), nn.BatchNorm2d(512), nn.LeakyReLU(0.2),       # 512x4x4
            nn.Conv2d(512, 1, 4), nn.Flatten(0))                                       # 1x1x1


@torch.no_grad()
def sample(generator, z):
    """Returns pictures N x 3 x 64 x 64, on the CPU, by a Generator for z N x latent_dim.
    A new Generator needs .load_state_dict(torch.load("models/generator.pth", "cpu")) first."""
    mode, device = generator.training, next(generator.parameters()).device
    generator.eval()  # with BatchNorm's running statistics a picture depends on its own z alone
    pictures = torch.cat([generator(part.to(device)).float().cpu() for part in z.split(100)])
    generator.train(mode)
    return pictures


def train(args, device, bf16, count, read, checkpoint, rank, world):
    """Trains as process rank of world; raises FloatingPointError if a loss is not finite."""
    steps = count // (per_step := args.batch_size * world)  # per_step: in all processes
    if not steps:
        sys.exit(f"{count} pictures do not fill a batch of {per_step}: lower --batch-size.")
    print(f"{count:,} pictures, {world} x {device}{', bfloat16' * bf16}, to {args.out_dir!a}")
    torch.manual_seed(args.seed)
    fixed_z = torch.randn(256, args.latent_dim)  # the same for the pictures of every epoch
    layout = dict(device=device, memory_format=torch.channels_last if device.type != "mps" else
                  torch.contiguous_format)  # channels last is faster; on Macs BatchNorm fails in it
    generator = Generator(args.latent_dim).apply(init_weights).to(**layout)
    discriminator = Discriminator().apply(init_weights).to(**layout)
    # Chasing D, G's weights circle around a balance: their average is nearer, and what we sample.
    ema = AveragedModel(generator, use_buffers=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    opt_d = torch.optim.Adam(discriminator.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    run = dict(generator=generator, discriminator=discriminator, ema=ema, opt_g=opt_g, opt_d=opt_d)
    for name, part in run.items() if checkpoint else ():
        part.load_state_dict(checkpoint[name])
    history, images = checkpoint["history"] if checkpoint else [], Path(args.out_dir, "images")
    if not rank:
        save_run(args, run, history)
    if not rank and not history:
        save_grid(read(slice(64)) / 127.5 - 1, images / "real.png")
        save_grid(sample(ema, fixed_z[:64]), images / "epoch_000.png")
    if args.compile:  # in place: the names in the checkpoint stay as they are
        generator.compile(), discriminator.compile()
    wrap = nn.parallel.DistributedDataParallel if world > 1 else lambda net: net
    net_g, net_d = wrap(generator), wrap(discriminator)  # averages gradients in backward()
    real_std = read(slice(0, None, count // 1000 + 1)).float().std(0).mean().item() / 127.5 or 1
    autocast, began = torch.autocast(device.type, torch.bfloat16, bf16), time.perf_counter()

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # resumed or not: the same numbers
        order = torch.randperm(count)[:steps * per_step]  # the same in all processes
        torch.manual_seed(args.seed * 10_000 + epoch + rank * 10**8)  # another z in each
        means = torch.zeros(5, device=device)
        for step, batch in enumerate(order.view(steps, world, -1)[:, rank], 1):  # its share
            done = (epoch - 1) * steps + step - 1
            for group in opt_g.param_groups + opt_d.param_groups:
                group["lr"] = args.lr * (1 - done / (args.epochs * steps))  # falls to 0
            r1, penalty = done % 16 == 0, 0
            x = read(batch).to(**layout) / 127.5 - 1  # to [-1, 1], the range of G's tanh
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)  # flip
            z = torch.randn(args.batch_size, args.latent_dim, device=device)

            # D: minimise softplus(-D(x)) + softplus(D(G(z))) = -log p(x) - log(1 - p(G(z))), where
            # p = sigmoid(D). Real and fake go in apart: BatchNorm sees fakes alone, as in G's step.
            with autocast:
                fake = net_g(z)
                on_fake = net_d(fake.detach())  # stops at G: its graph serves G's step
                on_real = discriminator.forward(x.requires_grad_(r1))  # R1: no compile, no DDP
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
                fooled = discriminator(fake)
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
                      f"  {speed * per_step:,.0f} pictures/s    ", end="\r", flush=True)

        if world > 1:
            distributed.all_reduce(means.div_(world))
        pictures, seconds = sample(ema, fixed_z), time.perf_counter() - began
        began += seconds
        diversity = pictures.std(0).mean().item() / real_std  # 0: collapse; misses partial collapse
        history.append([epoch, *means.tolist(), diversity, seconds, steps * per_step / seconds])
        if not np.isfinite(history[-1]).all():
            raise FloatingPointError("A loss is not finite: go on with a smaller --lr.")
        if rank:
            continue  # one process writes
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            save_grid(pictures[:64], images / f"epoch_{epoch:03d}.png")
        save_run(args, run, history)


def save_run(args, run, history):
    """Writes models/, history.csv, losses.png and progress.gif; prints the last epoch's line."""
    out = Path(args.out_dir)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out_dir", "device", "compile", "resume", "generate")}
    states = {name: part.state_dict() for name, part in run.items()}
    for name, content in dict(
            checkpoint=dict(script="dcgan_celeba", settings=settings, history=history, **states),
            generator=run["ema"].module.state_dict(),
            discriminator=states["discriminator"]).items():
        # Written beside, then renamed: a run cut off at any moment leaves the old file or the new.
        path, buffer = out / "models" / f"{name}.pth", io.BytesIO()
        torch.save(content, buffer)
        with open(path.with_suffix(".tmp"), "wb") as file:
            file.write(buffer.getbuffer()), file.flush(), os.fsync(file.fileno())  # to the disk
        path.with_suffix(".tmp").replace(path)
    if history:
        header = "epoch,loss_d,loss_g,acc_real,acc_fake,fooled,diversity,seconds,images_per_s"
        table = np.array(history)
        np.savetxt(out / "history.csv", table, "%.6g", ",", header=header, comments="")
        axes = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained").subplots()
        axes.plot(table[:, 0], table[:, 1:7], label=header.split(",")[1:7])
        axes.legend(title="by epoch", loc="upper left", bbox_to_anchor=(1, 1))
        axes.figure.savefig(out / "losses.png")
        frames = []
        for i in range(len(history) + 1):
            with suppress(OSError):  # there is none, or a power failure cut it off
                frames.append(Image.open(out / "images" / f"epoch_{i:03d}.png").copy())
        if frames:
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
        if not damaged and checkpoint["script"] == "dcgan_celeba":
            return checkpoint
    sys.exit(f"{path} is missing, damaged or not dcgan_celeba.py's: train first or set --out-dir.")


def generate(args, device, checkpoint):
    """Writes args.generate PNG files, a grid and a walk to generated/; OSError if it cannot."""
    ema = AveragedModel(Generator(args.latent_dim)).to(device)
    ema.load_state_dict(checkpoint["ema"])
    folder = Path(args.out_dir, "generated")
    if folder.exists():
        sys.exit(f"{folder} exists, and nothing is overwritten: rename or delete it first.")
    folder.mkdir()
    torch.manual_seed(args.seed)
    for i, z in enumerate(torch.randn(args.generate, args.latent_dim).split(1)):
        pixels = ((sample(ema, z)[0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
    save_grid(sample(ema, torch.randn(64, args.latent_dim)), folder / "grid.png")
    a, b = torch.randn(2, 8, 1, args.latent_dim)
    t = torch.linspace(0, torch.pi / 2, 10)[:, None]  # quarter circle: a line would come near 0
    save_grid(sample(ema, (a * t.cos() + b * t.sin()).flatten(0, 1)), folder / "walk.png", 10)


def main():
    args, checkpoint = parse_args(), None
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # one process prints
    out, saved = Path(args.out_dir), Path(args.out_dir, "models", "checkpoint.pth")
    if args.resume or args.generate:
        checkpoint = load_checkpoint(saved)
        args, old = parse_args(checkpoint["settings"]), checkpoint["settings"]
        if any(vars(args)[n] != old[n] for n in ("beta1", "latent_dim", "toy")):
            sys.exit(f"{saved}: a run keeps its --beta1, --latent-dim and --toy.")
    elif any(path.is_file() and path.suffix != ".tmp" for path in out.rglob("*")):
        sys.exit(f"{out} is not empty: add --resume if it holds a run, or change --out-dir.")
    if args.images and (args.toy or any(Path(args.images).resolve() in Path(
            path, "file").resolve().parents for path in (out, args.data_dir))):
        sys.exit("--images must not contain --out-dir or --data-dir, nor go with --toy.")
    try:
        if world > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
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
            return rank or generate(args, device, checkpoint)
        (out / "models").mkdir(parents=True, exist_ok=True)
        data = None if rank else load_data(args)  # the others wait below, until all is decoded
        if world > 1:
            kind = "nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"
            distributed.init_process_group(kind, timeout=timedelta(days=1)), distributed.barrier()
        train(args, device, bf16, *(data or load_data(args)), checkpoint, rank, world)
        if world > 1:
            distributed.destroy_process_group()
    except (KeyboardInterrupt, OSError, FloatingPointError) as error:
        start = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
        hint = f'\nGo on from the last epoch: {start} dcgan_celeba.py --resume --out-dir "{out}"'
        sys.exit(f"\nStopped. {error}{hint if saved.exists() and not args.generate else ''}")


if __name__ == "__main__":
    main()
