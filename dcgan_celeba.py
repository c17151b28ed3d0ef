"""A DCGAN for faces, or for your own folder of images. Read dcgan_cifar10.py first.

The same rules, without labels; wider networks, a lower learning rate and beta1 0.5.
- Size: each doubling of --image-size, from 32 to 512 (64 by default), gives G and D one
  more block, twice as wide. The middle square of each image is used, scaled.
- Time, on 23,707 photographs of faces (CelebA has 202,599): an epoch takes two CPU
  cores 3 minutes at size 64, and 13 at 128. For a GPU see README.
- Few images: below 6,400 a batch is 16, not 64. Below 1,600 an epoch shows each image
  several times, for 100 to 199 updates. 100 take the CPU 15 s at 64, 70 s at 128.
  After 50 epochs of 400 photographs at 64: coverage 0.98, copy ratio 1.03.
- Healthy, after --epochs 25 on the 23,707: D is right (acc_real 0.94, acc_fake 0.96),
  but unsure (loss_d 0.88, loss_g 1.10); coverage 0.93, copy ratio 1.04.

    python dcgan_celeba.py                                      # CelebA, for a GPU
    python dcgan_celeba.py --images FOLDER --out-dir runs/mine  # your own images
    python dcgan_celeba.py --images FOLDER --out-dir runs/large --image-size 128
    python dcgan_celeba.py --generate 100 --out-dir runs/mine   # after training
    python dcgan_celeba.py --toy --out-dir runs/faces_toy       # with no download

Elsewhere, with the packages below, this file, common.py and models/generator.pth:

    import dcgan_celeba, torch
    generator = dcgan_celeba.Generator(latent_dim=100, size=64)  # --image-size
    generator.load_state_dict(torch.load("generator.pth", "cpu", weights_only=True))
    images = dcgan_celeba.sample(generator, torch.randn(64, 100))  # in [-1, 1]
"""

import argparse
import copy
import csv
import hashlib
import inspect
import math
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim import Adam
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms import PILToTensor, RandomAffine, ToPILImage

from common import init_weights, save_grid  # DCGAN's initial weights; a grid of images

R1_INTERVAL = 16  # D gets the R1 penalty, see r1_penalty(), at every 16th step:
R1_WEIGHT = 0.8  # 16 x 0.05: rare, so stronger (Karras et al. 2020)
AVERAGE_DECAY = 0.998  # averages over 500 steps or fewer, see update_average()
MIN_EPOCH_STEPS = 100  # few images are shown several times per epoch

# ---- networks (the comments are output shapes for 64 x 64, without the batch's N) ----


class Generator(nn.Sequential):
    """Latent vectors N x latent_dim to images N x 3 x size x size in [-1, 1]."""

    def __init__(self, latent_dim=100, size=64):
        channels = 8 * size  # at 4 x 4; each layer doubles the size and halves them
        layers = [nn.ConvTranspose2d(latent_dim, channels, 4)]  # 512 x 4 x 4
        while channels > 64:  # 256 x 8 x 8, 128 x 16 x 16, 64 x 32 x 32
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1),
            ]
            channels //= 2
        layers += [nn.BatchNorm2d(64), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1)]
        super().__init__(*layers, nn.Tanh())  # 3 x 64 x 64, in [-1, 1]

    def forward(self, z):
        return super().forward(z[:, :, None, None])  # as an image of 1 x 1


class Discriminator(nn.Sequential):
    """Images N x 3 x size x size to logits N x 1; another size raises ValueError."""

    def __init__(self, size=64):
        channels = 48  # narrower than G, for a CPU's sake
        layers = [nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2)]  # 48 x 32 x 32
        while channels < 6 * size:  # 96 x 16 x 16, 192 x 8 x 8, 384 x 4 x 4
            layers += [
                nn.Conv2d(channels, channels * 2, 4, 2, 1),
                nn.BatchNorm2d(channels * 2),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        super().__init__(*layers, nn.Conv2d(channels, 1, 4), nn.Flatten())  # 1
        self.size = size

    def forward(self, x):
        if x.size(3) != self.size:  # there would be several logits, or none
            raise ValueError(f"D is for images of size {self.size}, not {x.size(3)}")
        return super().forward(x)


# ---- training ------------------------------------------------------------------------


def train_step(generator, discriminator, opt_g, opt_d, real, z, r1=False, bf16=False):
    """Updates D once, then G once, and returns a dict of scalar tensors.

    real: images N x 3 x size x size in [-1, 1]; z: latent vectors N x latent_dim;
    r1 adds the R1 penalty; bf16: mixed precision.
    """
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)
    # (1) Update D: minimise -log p(real) - log(1 - p(fake)), where p = sigmoid(logit).
    with autocast:
        fake = generator(z)
        # In one call BatchNorm would mix real and fake, but in (2) D sees fakes alone.
        real_logits = discriminator(real)
        # detach() cuts G off: loss_d is not for G, and (2) needs the fakes' graph.
        fake_logits = discriminator(fake.detach())
        ones = torch.ones_like(real_logits)
        loss_d = bce(real_logits, ones) + bce(fake_logits, 1 - ones)
    opt_d.zero_grad()
    loss_d.backward()
    if r1:
        r1_penalty(discriminator, real).backward()  # adds to D's gradients
    average_gradients(discriminator)  # of all GPUs; does nothing with one
    opt_d.step()

    # (2) Update G: minimise -log p(fake).
    discriminator.requires_grad_(False)  # saves time: only gradients for G pass through
    with autocast:
        new_fake_logits = discriminator(fake)  # D has changed since (1)
        loss_g = bce(new_fake_logits, ones)  # low also if all fakes are the same image
    opt_g.zero_grad()
    loss_g.backward()
    average_gradients(generator)
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

    It flattens D around real images, where a steep D would send fakes to and fro
    (Mescheder et al. 2018); see dcgan_cifar10.py. In float32: bfloat16 is too coarse.
    """
    real = real[::2].requires_grad_()  # half of the batch, to save time
    logits = discriminator(real)
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
    (Naeem et al. 2020). Both are N x C x H x W, compared as thumbnails.
    """
    real = thumbnails(real)
    radius = torch.cdist(real, real).kthvalue(6).values  # 1st: itself
    nearest = torch.cdist(real, thumbnails(fake)).amin(1)
    return (nearest < radius).float().mean().item()


def thumbnails(images):
    """Returns images N x C x H x W as N rows of 8 x 8 pixels, for fast comparisons."""
    return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


def distances(images, small):
    """Returns N x M distances of N images, or mirrored ones, from M thumbnails."""
    plain = torch.cdist(thumbnails(images), small)
    return torch.minimum(plain, torch.cdist(thumbnails(images.flip(3)), small))


def check_copies(args, fake, real, data):
    """Prints the copy ratio, and saves fakes above their nearest training images.

    The ratio: the median distance from a fake to its nearest training image, divided by
    that from a real image to its nearest other. Near 1 fakes are new, near 0 copies.
    """
    parts = torch.arange(len(data)).split(100)  # all at once would not fit into memory
    small = torch.cat([thumbnails(data[part] / 127.5 - 1) for part in parts])
    nearest = distances(fake, small).min(1)
    other = distances(real, small).kthvalue(2).values  # 1st: itself
    pairs = [fake, data[nearest.indices] / 127.5 - 1]  # one above the other
    save_grid(torch.cat(pairs, 2)[:40], f"{args.out_dir}/images/nearest.png")
    print(f"copy ratio {nearest.values.median() / other.median():.2f}: see nearest.png")


def train(args, device, bf16, data, checkpoint):
    """Trains on data, uint8 N x 3 x size x size: a tensor or DecodedImages.

    checkpoint: dict of a run to resume, or {}. Raises FloatingPointError and OSError.
    """
    # With several GPUs, a process for each runs this, from the same random numbers.
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.image_size)
    discriminator = Discriminator(args.image_size)
    # A pixel's channels side by side in memory: faster, but risky on a Mac's GPU.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    for network in generator, discriminator:
        network.apply(init_weights).to(device, memory_format=layout)
    average = copy.deepcopy(generator)
    # beta1 is 0.5 (0 is no better), not 0.9: old gradients mislead, the opponent moved.
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
    count = 64_000 // args.image_size  # 1,000 at 64 x 64; fewer if larger, for memory
    real_images = data[torch.randperm(len(data))[:count]] / 127.5 - 1
    fixed_z = torch.randn(count, args.latent_dim)  # the same for all epochs
    if not history and RANK == 0:
        save_checkpoint(args, modules, history)
        save_grid(real_images[:64], f"{args.out_dir}/images/real.png")
        save_grid(sample(average, fixed_z[:64]), f"{args.out_dir}/images/epoch_000.png")

    passes = math.ceil(MIN_EPOCH_STEPS * args.batch_size / len(data))  # 400 images: 4
    epoch_steps = passes * len(data) // args.batch_size  # without a last, shorter batch
    print(f"An epoch is {epoch_steps} updates, {passes} x all images.")
    mine = slice(RANK, None, PROCESSES)  # this process's part of a batch: one GPU, all
    step = len(history) * epoch_steps
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(args.seed * 10_000 + epoch)  # the same when resumed
        results = []
        order = torch.cat([torch.randperm(len(data)) for _ in range(passes)])
        for indices in order.split(args.batch_size)[:epoch_steps]:
            lr = args.lr * (1 - step / (args.epochs * epoch_steps))  # to 0: both settle
            opt_d.param_groups[0]["lr"] = opt_g.param_groups[0]["lr"] = lr
            r1 = step % R1_INTERVAL == 0  # it is slow: rare but strong will do
            real = data[indices[mine]].to(device, memory_format=layout) / 127.5 - 1
            if not args.no_flip and torch.rand(1) < 0.5:
                real = real.flip(3)  # half of the batches mirrored: more data
            z = torch.randn(args.batch_size, args.latent_dim)[mine].to(device)
            results.append(
                train_step(generator, discriminator, opt_g, opt_d, real, z, r1, bf16)
            )
            step += 1
            update_average(average, generator, step)
            show_progress(args, step, epoch_steps, start)
        if RANK > 0:  # see average_gradients(); process 0 measures and writes
            continue
        fakes = sample(average, fixed_z)  # by the average, not by G
        row = {"epoch": epoch}
        for name in results[0]:
            row[name] = sum(result[name] for result in results).item() / epoch_steps
        row["coverage"] = coverage(real_images, fakes[: len(real_images)])
        row["seconds"] = time.perf_counter() - start
        row["images_per_s"] = epoch_steps * args.batch_size / row["seconds"]
        if not math.isfinite(sum(row.values())):
            raise FloatingPointError("A loss is not finite: resume with a smaller --lr")
        history.append(row)
        save_reports(args, history, fakes[:64])  # images/, losses.png, history.csv
        save_checkpoint(args, modules, history)  # models/; generator.pth is the average
        print_epoch(args, row)

    if RANK == 0:
        check_copies(args, sample(average, fixed_z[:200]), real_images[:200], data)


# ---- sampling ------------------------------------------------------------------------


@torch.no_grad()
def sample(generator, z):
    """Returns images N x 3 x size x size in [-1, 1], on the CPU, for z N x latent_dim.

    In evaluation mode BatchNorm uses its running statistics; in training mode an image
    would depend on the others in its batch. Afterwards the mode is as it was.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    parts = [generator(part.to(device)).cpu() for part in z.split(64)]  # saves memory
    generator.train(was_training)
    return torch.cat(parts)


def generate(args, device, checkpoint):
    """Writes args.generate images, a grid of others, and a latent walk."""
    generator = Generator(args.latent_dim, args.image_size).to(device)
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
    angle = torch.linspace(0, math.pi / 2, 8)[:, None]  # 8 x 1, and z1 8 x 1 x dim
    z = (z1 * angle.cos() + z2 * angle.sin()).flatten(0, 1)
    save_grid(sample(generator, z), f"{args.out_dir}/latent_walk.png")
    for i, z in enumerate(torch.randn(args.generate, 1, args.latent_dim)):
        ToPILImage()((sample(generator, z)[0] + 1) / 2).save(f"{folder}/{i:05d}.png")


# ---- from here on, nothing is about GANs: data, several GPUs, files, flags, main -----

# 1.4 GB. torchvision's CelebA class fetches from Google Drive, which often refuses.
URL = "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip"
MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"


@dataclass
class DecodedImages:
    """A file of decoded images: data[indices] reads only these, N x 3 x size x size."""

    path: str
    size: int

    def __len__(self):
        return os.path.getsize(self.path) // (3 * self.size**2)

    def __getitem__(self, indices):
        # Mapped anew each time, or all that was ever read would count as memory in use.
        images = np.memmap(self.path, mode="r").reshape(-1, self.size, self.size, 3)
        return torch.from_numpy(images[indices.numpy()]).permute(0, 3, 1, 2)


def find_celeba(data_dir):
    """Returns the folder of CelebA's images, after download if there is none."""
    for folder in f"{data_dir}/celeba", f"{data_dir}/img_align_celeba":
        if os.path.isdir(folder):
            return folder
    archive = f"{data_dir}/img_align_celeba.zip"  # put there by hand
    temporary = f"{data_dir}/celeba.tmp"
    socket.setdefaulttimeout(60)  # a server that is silent for a minute will not answer
    try:
        if os.path.exists(archive):
            extract_archive(archive, temporary)
        else:
            download_and_extract_archive(
                URL, data_dir, temporary, "celeba_download.zip", MD5
            )
        os.rename(temporary, f"{data_dir}/celeba")  # only when it is whole
        return f"{data_dir}/celeba"
    except Exception as error:  # torchvision raises many types
        sys.exit(
            f"CelebA could be neither read nor downloaded ({error!r}). Put its "
            f"img_align_celeba.zip into {data_dir} by hand, or learn from your own "
            f"images, --images FOLDER, or synthetic ones: python {sys.argv[0]} --toy"
        )


def find_images(folder):
    """Returns the paths of all images in a folder and its subfolders, sorted."""
    files = [
        path
        for path in sorted(Path(folder).rglob("*"))  # follows no links to folders
        if path.suffix.lower() in Image.registered_extensions()
        and "/." not in f"/{path.relative_to(folder).as_posix()}"  # not hidden
        and path.is_file()
    ]
    if not files:
        sys.exit(
            f"{folder} is missing, or has no images that Pillow can read (convert HEIC "
            "files first). Name another folder by --images."
        )
    return files


def load_data(args):
    """Returns the training images, uint8 N x 3 x size x size: indexed like a tensor.

    Files are decoded once. Raises OSError and MemoryError if disk or memory fail.
    """
    size = args.image_size
    if args.toy and not args.images:
        return draw_faces(args.limit or 600, size)
    files = find_images(args.images or find_celeba(args.data_dir))[: args.limit]
    # The decoded file's name is a hash of all that it depends on, the code of decode()
    # included: if anything changes, all is decoded again, into another file.
    state = [(str(file), file.stat().st_size, file.stat().st_mtime) for file in files]
    key = f"{state} {size} {inspect.getsource(decode)}".encode()
    path = f"{args.data_dir}/decoded_{hashlib.sha256(key).hexdigest()[:16]}"
    if not os.path.exists(path):
        os.makedirs(args.data_dir, exist_ok=True)
        # The temporary folder is deleted also after an error.
        with tempfile.TemporaryDirectory(dir=args.data_dir) as folder:
            with open(f"{folder}/images", "wb") as out, ThreadPoolExecutor(4) as pool:
                for i in range(0, len(files), 200):  # not all at once, for the memory
                    print(f"{i:,} of {len(files):,} decoded", end="\r", flush=True)
                    out.writelines(
                        pool.map(try_decode, files[i : i + 200], [size] * 200)
                    )
            os.replace(f"{folder}/images", path)
    return DecodedImages(path, size)


def try_decode(file, size):
    """Returns what decode() does, or no bytes for an image that is damaged."""
    try:
        return decode(file, size)
    except Exception as error:  # Pillow raises many types
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # the memory or the disk failed, and the image may be good
        print(f"Left out: {str(file)!a}: {error}")  # !a: ASCII, for any terminal
        return b""


def decode(file, size):
    """Returns the middle of an image, as the bytes of size x size x 3."""
    with Image.open(file) as image:
        if min(image.size) < 8:
            raise ValueError(f"{image.width} x {image.height} is below 8 x 8")
        image.draft("RGB", (size, size))  # decodes a JPEG at 1/2, 1/4, 1/8: faster
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:
            pass  # damaged EXIF: viewers show the image all the same, unturned
        if "I" in image.mode:  # 16 bits of grey (I, I;16 ...), where 65535 becomes 255
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        image = ImageOps.fit(image.convert("RGBA"), (size, size))
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # where it is not transparent
        return white.tobytes()


def draw_faces(count, size):
    """Draws synthetic faces of ellipses, random in colours, place, size and angle."""
    torch.manual_seed(0)
    vary = RandomAffine(10, (0.08, 0.08), (0.8, 1.2))  # turn, move, resize
    images = []
    for _ in range(count):
        image = Image.new("RGB", (64, 64))
        draw = ImageDraw.Draw(image)
        skin = f"hsl({torch.randint(360, ()).item()}, 60%, 70%)"
        draw.ellipse((12, 4, 52, 60), skin)
        for box in (20, 22, 28, 32), (36, 22, 44, 32), (22, 42, 42, 52):
            draw.ellipse(box, 0)  # eyes and mouth
        images.append(PILToTensor()(vary(image).resize((size, size))))
    return torch.stack(images)


# ---- several GPUs --------------------------------------------------------------------

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # True: torchrun started this
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # this process's number, from 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1


def average_gradients(network):
    """Gives each process the mean of all processes' gradients, in one message.

        torchrun --nproc-per-node 2 dcgan_celeba.py

    starts two processes, one per GPU, that run this file side by side, each on its part
    of every batch. They begin with the same weights, and so keep the same weights; only
    BatchNorm's statistics are of a process's own part. DistributedDataParallel averages
    inside backward(), but wraps networks, and renames all their weights.
    """
    if TORCHRUN:
        grads = [weight.grad for weight in network.parameters()]
        mean = torch.cat([grad.flatten() for grad in grads]) / PROCESSES
        distributed.all_reduce(mean)  # the sum over all processes
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


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
        for name in "image_size", "latent_dim", "beta1", "toy":
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
    flag(
        "--images", type=os.path.realpath, help="your own images' folder (else: CelebA)"
    )
    flag(
        "--image-size",
        type=int,
        choices=[32, 64, 128, 256, 512],
        default=64,
        help="width and height (%(default)s)",
    )
    flag("--no-flip", action="store_true", help="mirror no image (text, logos)")
    flag("--epochs", type=positive, help="of at least 100 updates each (50; toy 5)")
    flag(
        "--batch-size", type=positive, help="images per step (64; if there are few: 16)"
    )
    flag("--lr", type=float, help="first learning rate (4e-4; toy 1e-3)")
    flag("--beta1", type=float, default=0.5, help="Adam's beta1 (%(default)s)")
    flag("--latent-dim", type=positive, default=100, help="size of z (%(default)s)")
    flag(
        "--sample-every", type=positive, default=1, help="epochs per grid (%(default)s)"
    )
    flag("--data-dir", default="data", help="where images are or go (%(default)s)")
    flag(
        "--out-dir", default=f"runs/{Path(__file__).stem}", help="results (%(default)s)"
    )
    flag("--limit", type=positive, help="use only so many images (all)")
    flag("--toy", action="store_true", help="learn synthetic faces, with no download")
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
    args.epochs = args.epochs or (5 if args.toy else 50)
    if args.lr is None:
        args.lr = 1e-3 if args.toy else 4e-4
    if not args.lr > 0 or not 0 <= args.beta1 < 1:
        parser.error(
            f"--lr {args.lr} is not above 0 or --beta1 {args.beta1} not in [0, 1)"
        )
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
    if "Read-only" in reason:  # file system, as on Kaggle
        reason += ". Name folders that can be written to: --data-dir and --out-dir"
    if Path(f"{args.out_dir}/models/checkpoint.pth").exists() and not args.generate:
        reason += f'. Run {sys.argv[0]} again with --resume --out-dir "{args.out_dir}"'
    return f"\n{reason}"


def main():
    args = parse_args()
    checkpoint = {}
    if args.resume or args.generate:
        checkpoint, args = load_checkpoint(f"{args.out_dir}/models/checkpoint.pth")
    elif any(Path(args.out_dir).rglob("*.p[nt]*")):  # .png and .pth
        sys.exit(f"{args.out_dir} holds a run: add --resume, or another --out-dir.")
    if args.images and Path(args.out_dir).resolve().is_relative_to(args.images):
        sys.exit("--out-dir must not lie in --images: what is in it would be learned.")
    if TORCHRUN and torch.cuda.is_available() and not args.device:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU per process
    device = choose_device(args.device)
    bf16 = has_bfloat16(device) if args.bf16 is None else args.bf16
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one process prints
    try:
        if args.generate:
            generate(args, device, checkpoint)
        else:
            os.makedirs(f"{args.out_dir}/models", exist_ok=True)
            if TORCHRUN:
                distributed.init_process_group(
                    distributed.get_default_backend_for_device(device),  # NCCL or Gloo
                    timeout=timedelta(days=1),
                )
                if not RANK:
                    load_data(args)  # once, decodes the images for all processes
                distributed.barrier()  # wait for it, up to a day
            data = load_data(args)
            if len(data) < 6:  # as coverage() needs
                sys.exit("Fewer than 6 images can be used: name others by --images.")
            if not args.batch_size:
                args.batch_size = 16 if len(data) < 6400 else 64  # few: more updates
            if args.batch_size < PROCESSES:
                sys.exit("--batch-size must be one image or more per process.")
            print(
                f"{len(data):,} images of size {args.image_size}, on {PROCESSES} "
                f"x {device} in {'bfloat16' if bf16 else 'float32'}"
            )
            train(args, device, bf16, data, checkpoint)
            if TORCHRUN:
                distributed.destroy_process_group()
        print(f"The results are in {args.out_dir!a}.")
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error, args))
    finally:
        if not RANK and not args.generate:
            save_gif(args)


if __name__ == "__main__":
    main()
