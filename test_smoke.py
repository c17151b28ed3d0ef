"""Tests of what a user sees: run them with  python -m unittest  (pytest collects them too).

They run the real commands on --toy pictures or on small files written here; most call main() with
the same flags, to spare the start of a process. Nothing is downloaded.
"""
import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import importlib
import inspect
import io
import math
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # for small networks more threads only wait for each other

import numpy as np
import torch
from PIL import Image
from torch import nn

import dcgan_celeba
import dcgan_cifar10
import gan_fashion
import gan_mnist
from common import init_weights, save_grid

HERE = Path(__file__).resolve().parent
COLUMNS = ["epoch", "loss_d", "loss_g", "acc_real", "acc_fake", "fooled", "diversity", "seconds",
           "images_per_s"]
TINY = ("--toy", "--limit", "200", "--batch-size", "32")
NO_NETWORK = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", no_proxy="")


def run(script, *flags, code=0):
    """Runs a script, asserts its exit code and returns what it printed, errors included."""
    done = subprocess.run([sys.executable, "-W", "error", HERE / script, *map(str, flags)],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, **NO_NETWORK})
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{flags}: exit code {done.returncode}, not {code}\n{text}"
    assert code == 0 or "Traceback" not in text, text
    return text


def call(script, *flags, code=0):
    """Does the same by main() in this process."""
    printed, found = io.StringIO(), 0
    with mock.patch("sys.argv", [script, *map(str, flags)]), warnings.catch_warnings(), \
            mock.patch.dict(os.environ, NO_NETWORK), contextlib.redirect_stdout(printed), \
            contextlib.redirect_stderr(printed):
        warnings.simplefilter("error")
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stop:  # sys.exit(text) prints the text and exits with code 1
            text = isinstance(stop.code, str)
            found = printed.write(stop.code) and 1 if text else stop.code
    text = printed.getvalue()
    assert found == code, f"{flags}: exit code {found}, not {code}\n{text}"
    return text


refused = functools.partial(call, code=1)


def read(path):
    return np.asarray(Image.open(path))


def frames(path):
    with Image.open(path) as picture:
        return picture.n_frames


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


class Folder(unittest.TestCase):
    """A test with a temporary folder, self.folder, of its own."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)


class CommonTest(Folder):
    def test_grid_maps_minus_one_to_one_exactly_and_creates_the_folder(self):
        images = torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0]).view(5, 1, 1, 1).expand(5, 1, 64, 64)
        save_grid(images, self.folder / "new" / "grid.png", columns=3)
        grid = read(self.folder / "new" / "grid.png")
        self.assertEqual(grid.shape, (2 * 66 + 2, 3 * 66 + 2, 3))
        levels = [int(grid[30 + 66 * (i // 3), 30 + 66 * (i % 3), 0]) for i in range(5)]
        self.assertEqual(levels, [0, 128, 255, 0, 255])

    def test_small_images_are_enlarged_without_smoothing(self):
        images = torch.rand(2, 3, 28, 28).round() * 2 - 1
        save_grid(images, self.folder / "grid.png", columns=1)
        grid = torch.from_numpy(read(self.folder / "grid.png")[2:86, 2:86] / 127.5 - 1)
        expected = images[0].permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1)
        torch.testing.assert_close(grid.float(), expected)

    def test_grid_does_not_stretch_contrast(self):
        save_grid(torch.full((4, 3, 8, 8), 0.2), self.folder / "flat.png", columns=2)
        self.assertEqual(read(self.folder / "flat.png")[5, 5].tolist(), [153, 153, 153])

    def test_grid_keeps_colour(self):
        red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
        save_grid(red, self.folder / "red.png", columns=2)
        self.assertEqual(read(self.folder / "red.png")[5, 5].tolist(), [255, 0, 0])

    def test_grid_refuses_what_it_cannot_draw(self):
        for shape in ((4, 8, 8), (0, 1, 8, 8), (4, 2, 8, 8)):
            with self.assertRaises(ValueError):
                save_grid(torch.zeros(shape), self.folder / "grid.png")
        with self.assertRaises(ValueError):
            save_grid(torch.zeros(4, 1, 8, 8), self.folder / "grid.png", columns=0)

    def test_init_draws_as_the_dcgan_paper_says(self):
        torch.manual_seed(0)
        for layer in (nn.Linear(200, 200), nn.Conv2d(64, 64, 4), nn.ConvTranspose2d(64, 64, 4)):
            layer.apply(init_weights)
            self.assertAlmostEqual(layer.weight.mean().item(), 0, delta=0.001)
            self.assertAlmostEqual(layer.weight.std().item(), 0.02, delta=0.001)
            self.assertEqual(layer.bias.abs().max().item(), 0)
        for layer in (nn.BatchNorm1d(5000), nn.BatchNorm2d(5000)):
            layer.apply(init_weights)
            self.assertAlmostEqual(layer.weight.mean().item(), 1, delta=0.002)
            self.assertAlmostEqual(layer.weight.std().item(), 0.02, delta=0.002)
            self.assertEqual(layer.bias.abs().max().item(), 0)
        nn.Linear(3, 3, bias=False).apply(init_weights)  # no bias: nothing to fail on


class ScriptTests:
    """What all scripts promise, for each of a script's variants; the classes below fill it in.

    script: its file name; variants: name to flags, the default first; columns: of their grids;
    size: of a picture, in pixels; others: flags of networks that the default's run does not have.
    """
    size, scale = 28, 3  # grids show small images three times as large

    @classmethod
    def setUpClass(cls):
        cls.module = importlib.import_module(cls.script.removesuffix(".py"))
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.printed = {name: run(cls.script, *TINY, *flags, "--epochs", 3, "--sample-every", 2,
                                 "--latent-dim", 7, "--out-dir", cls.runs / name)
                       for name, flags in cls.variants.items()}
        cls.default = next(iter(cls.variants))

    def copy(self):
        return shutil.copytree(self.runs / self.default, self.folder / "copy")

    def labels(self, count):
        """Returns what networks and sample() take beside z or x: nothing, or a tuple of labels."""
        return ()

    def grid_shape(self, variant, columns=None):
        rows, cell = self.columns[variant], self.size * self.scale + 2
        return rows * cell + 2, (columns or rows) * cell + 2, 3

    def test_networks_have_the_promised_shapes(self):
        for variant in self.variants:
            generator, discriminator = self.networks(variant)
            labels = self.labels(5)
            pictures = generator(3 * torch.randn(5, 7), *labels)
            self.assertEqual(pictures.shape, (5, self.channels, self.size, self.size))
            self.assertLessEqual(pictures.abs().max().item(), 1)
            self.assertEqual(discriminator(pictures, *labels).shape, (5,))

    def test_a_run_writes_every_file(self):
        for variant in self.variants:
            out = self.runs / variant
            files = {str(file.relative_to(out).as_posix()) for file in out.rglob("*.*")}
            self.assertEqual(files, {
                "images/real.png", "images/epoch_000.png", "images/epoch_002.png",
                "images/epoch_003.png", "progress.gif", "losses.png", "history.csv",
                "models/generator.pth", "models/discriminator.pth", "models/checkpoint.pth"})
            for grid in (out / "images").iterdir():
                self.assertEqual(read(grid).shape, self.grid_shape(variant), grid)
            self.assertEqual(frames(out / "progress.gif"), 3)

    def test_history_has_a_row_an_epoch(self):
        with open(self.runs / self.default / "history.csv", newline="") as file:
            rows = list(csv.reader(file))
        self.assertEqual(rows[0], COLUMNS)
        self.assertEqual([row[0] for row in rows[1:]], ["1", "2", "3"])
        for row in np.array(rows[1:], dtype=float):
            self.assertTrue((row[1:] > -1e-9).all() and (row[3:6] <= 1).all(), row)
            self.assertAlmostEqual(row[7] * row[8], 6 * 32, delta=0.01)  # 200 // 32 = 6 steps

    def test_every_epoch_prints_its_line(self):
        lines = self.printed[self.default].splitlines()
        self.assertIn("200 pictures", lines[0])
        self.assertEqual([line.split()[:2] for line in lines[1:]],
                         [["epoch", f"{epoch}/3"] for epoch in (1, 2, 3)])
        for word in ("loss", "right on real", "fooled", "diversity", "pictures/s"):
            self.assertIn(word, lines[1])
        self.assertIn("LOW DIVERSITY", lines[1])  # G has not learned to vary yet

    def test_models_load_by_themselves_and_the_generator_is_the_average(self):
        for variant in self.variants:
            models = self.runs / variant / "models"
            generator, discriminator = self.networks(variant)
            average = load(models / "generator.pth")
            generator.load_state_dict(average)
            discriminator.load_state_dict(load(models / "discriminator.pth"))
            checkpoint = load(models / "checkpoint.pth")
            name = next(iter(average))
            self.assertTrue(average[name].equal(checkpoint["ema"]["module." + name]))
            self.assertFalse(average[name].equal(checkpoint["generator"][name]))
            for mean in [name for name in average if name.endswith("running_mean")]:
                self.assertGreater(average[mean].abs().max().item(), 0, "buffers are averaged too")

    def test_sampling_is_in_evaluation_mode_and_puts_the_mode_back(self):
        for variant in self.variants:
            generator, z = self.networks(variant)[0].train(), torch.randn(501, 7)
            together = self.module.sample(generator, z, *self.labels(501))  # more than a part
            for i in (0, 500):
                alone = self.module.sample(generator, z[i:i + 1], *self.labels(1))
                torch.testing.assert_close(alone, together[i:i + 1])
            self.assertTrue(generator.training)
            self.assertFalse(together.requires_grad)

    def test_a_stopped_and_resumed_run_ends_in_the_same_bytes(self):
        # Where a shell started the tests in the background, SIGINT is ignored, by children, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for variant, flags in self.variants.items():
            flags = (*TINY, *flags, "--epochs", "6", "--latent-dim", "7")
            whole, cut = self.folder / f"whole {variant}", self.folder / f"cut {variant}"
            call(self.script, *flags, "--out-dir", whole)
            process = subprocess.Popen(
                [sys.executable, HERE / self.script, *flags, "--out-dir", cut],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2):
                process.stdout.readline()  # the second line comes when the first epoch is saved
            windows = os.name == "nt"  # takes no SIGINT from another process
            process.terminate() if windows else process.send_signal(signal.SIGINT)
            text = "".join(process.communicate(timeout=60))
            if not windows:
                self.assertNotIn("Traceback", text)
                self.assertIn(f'python {self.script} --resume --out-dir "{cut}"', text)
            self.assertIn(len(load(cut / "models" / "checkpoint.pth")["history"]), range(1, 6))
            call(self.script, "--resume", "--out-dir", cut)
            for name in ("generator.pth", "discriminator.pth"):
                self.assertEqual((whole / "models" / name).read_bytes(),
                                 (cut / "models" / name).read_bytes(), f"{variant} {name}")
            a, b = (load(out / "models" / "checkpoint.pth") for out in (whole, cut))
            for row, other in zip(a["history"], b["history"], strict=True):
                self.assertEqual(row[:7], other[:7])  # all but the seconds
            np.testing.assert_array_equal(read(whole / "images" / "epoch_006.png"),
                                          read(cut / "images" / "epoch_006.png"))

    def test_resume_takes_flags_from_the_run_but_lets_the_command_line_win(self):
        out = self.copy()
        call(self.script, "--resume", "--epochs", 4, "--out-dir", out)
        checkpoint = load(out / "models" / "checkpoint.pth")
        self.assertEqual([row[0] for row in checkpoint["history"]], [1, 2, 3, 4])
        self.assertEqual(checkpoint["settings"]["batch_size"], 32)
        self.assertEqual(checkpoint["settings"]["epochs"], 4)

    def test_bfloat16_follows_the_machine_unless_it_was_asked_for(self):
        self.assertIsNone(load(self.runs / self.default / "models" / "checkpoint.pth")
                          ["settings"]["bf16"])
        for flag in ("--bf16", "--no-bf16"):
            out = self.folder / flag
            text = call(self.script, *TINY, "--limit", 32, "--epochs", 1, flag, "--out-dir", out)
            text += call(self.script, "--resume", "--epochs", 2, "--out-dir", out)
            self.assertEqual(text.count("bfloat16"), 2 * (flag == "--bf16"))

    def test_a_folder_may_have_any_name_and_the_console_any_encoding(self):
        out = self.folder / "Bilder \u00e4 \u4e2d"
        with mock.patch.dict(os.environ, PYTHONIOENCODING="ascii"):
            run(self.script, *TINY, "--epochs", 1, "--out-dir", out)
        self.assertEqual(frames(out / "progress.gif"), 2)

    def test_resume_mends_what_a_kill_left_half_written(self):
        out = self.copy()
        for name in ("images/epoch_004.png", "progress.gif", "history.csv", "models/generator.pth"):
            (out / name).write_bytes(b"half")
        call(self.script, "--resume", "--epochs", 3, "--out-dir", out)  # nothing left to train
        self.assertEqual(frames(out / "progress.gif"), 3)
        for name in ("history.csv", "models/generator.pth"):
            self.assertEqual((out / name).read_bytes(),
                             (self.runs / self.default / name).read_bytes())
        call(self.script, "--resume", "--epochs", 4, "--out-dir", out)
        self.assertEqual(read(out / "images" / "epoch_004.png").shape,
                         self.grid_shape(self.default))

    def test_the_checkpoint_alone_is_enough_to_resume(self):
        (self.folder / "models").mkdir()
        shutil.copy(self.runs / self.default / "models" / "checkpoint.pth", self.folder / "models")
        call(self.script, "--resume", "--epochs", 4, "--out-dir", self.folder)
        self.assertEqual(frames(self.folder / "progress.gif"), 1)
        self.assertTrue((self.folder / "images" / "epoch_004.png").exists())

    def generated(self, variant, count):
        """Returns the folder that --generate makes of a checkpoint alone, and the files in it."""
        out = self.folder / variant
        (out / "models").mkdir(parents=True)
        shutil.copy(self.runs / variant / "models" / "checkpoint.pth", out / "models")
        data = self.folder / "no data"
        call(self.script, "--generate", count, "--data-dir", data, "--out-dir", out)
        self.assertFalse(data.exists())
        files = sorted((out / "generated").glob("**/[0-9]*.png"), key=lambda file: file.name)
        self.assertEqual([file.name for file in files], [f"{i:05d}.png" for i in range(count)])
        pixels = np.stack([read(file) for file in files])
        self.assertEqual(pixels.shape[1:3], (self.size, self.size))
        self.assertEqual((pixels.ndim, pixels.dtype), (3 if self.channels == 1 else 4, np.uint8))
        self.assertEqual(len({picture.tobytes() for picture in pixels}), count)
        self.assertEqual(read(out / "generated" / "grid.png").shape, self.grid_shape(variant))
        return out / "generated", files

    def test_generate_needs_the_checkpoint_alone(self):
        for variant in self.variants:
            folder, files = self.generated(variant, 23)
            generator = self.networks(variant)[0]
            generator.load_state_dict(load(self.runs / variant / "models" / "generator.pth"))
            torch.manual_seed(0)
            expected = self.module.sample(generator, torch.randn(23, 7), *self.labels(23))
            expected = ((expected + 1) * 127.5).permute(0, 2, 3, 1).numpy()
            pixels = np.stack([read(file) for file in files]).reshape(expected.shape)
            np.testing.assert_allclose(pixels, expected, atol=1.5)
            before = files[0].stat().st_mtime_ns
            text = refused(self.script, "--generate", 2, "--out-dir", folder.parent)
            self.assertIn("generated exists, and nothing is overwritten", text)
            self.assertNotIn("--resume", text)
            self.assertEqual(files[0].stat().st_mtime_ns, before)

    def test_bad_flags_are_refused_with_code_2(self):
        out = self.folder / "out"
        for flags in (("--epochs", 0), ("--batch-size", 1), ("--latent-dim", 0), ("--limit", 0),
                      ("--beta1", 1), ("--beta1", -0.1), ("--lr", 0), ("--lr", "nan"),
                      ("--sample-every", 0), ("--generate", 0), ("--seed", -1), ("--epochs", "ten"),
                      *self.bad_flags):
            self.assertIn(flags[0], refused(self.script, *flags, "--out-dir", out, code=2))
        self.assertIn("--epochs", run(self.script, "--epochs", 0, "--out-dir", out, code=2))
        self.assertFalse(out.exists())

    def test_what_cannot_work_is_refused_before_any_work(self):
        full, blocked = self.folder / "full", self.folder / "a file"
        full.mkdir()
        (full / "losses.png").write_text("mine")
        blocked.write_text("mine")
        out = self.folder / "out"
        for word, flags in {
                "--batch-size": (*TINY, "--limit", 31, "--out-dir", out),
                "--resume": (*TINY, "--out-dir", full),
                "a file": (*TINY, "--out-dir", blocked / "out"),
                "--device": (*TINY, "--device", "cuda:99", "--out-dir", out),
                "nonsense": (*TINY, "--device", "nonsense", "--out-dir", out),
                "checkpoint.pth": ("--resume", "--out-dir", out),
                "train first": ("--generate", 5, "--out-dir", out),
                "--toy": ("--data-dir", self.folder / "none", "--out-dir", out),
                self.data_file: ("--data-dir", self.folder / "none", "--out-dir", out),
        }.items():
            self.assertIn(word, refused(self.script, *flags))
        self.assertIn("--resume", run(self.script, "--toy", "--out-dir", full, code=1))
        self.assertEqual((full / "losses.png").read_text(), "mine")
        self.assertEqual(blocked.read_text(), "mine")
        self.assertEqual([file for file in out.rglob("*") if file.is_file()], [])

    def test_flags_that_a_checkpoint_cannot_take_are_refused(self):
        out = self.copy()
        checkpoint = load(out / "models" / "checkpoint.pth")
        checkpoint["settings"]["toy"] = False
        torch.save(checkpoint, out / "models" / "checkpoint.pth")
        for flags in (*self.others, ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",)):
            for what in (("--resume",), ("--generate", 5)):
                text = refused(self.script, *what, *flags, "--out-dir", out)
                self.assertIn("a run keeps its", text)

    def test_a_damaged_or_foreign_checkpoint_is_refused_and_runs_no_code(self):
        path = self.copy() / "models" / "checkpoint.pth"
        whole, trap = path.read_bytes(), self.folder / "trap"
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(trap),)

        torch.save({"script": "another"}, path)
        foreign = path.read_bytes()
        torch.save({"script": self.script.removesuffix(".py"), "settings": Payload()}, path)
        payload = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", bytes(flipped), foreign, payload,
                        pickle.dumps(Payload())):
            path.write_bytes(content)
            text = refused(self.script, "--resume", "--out-dir", path.parents[1])
            self.assertIn("damaged", text)
            self.assertFalse(trap.exists())
            self.assertEqual(path.read_bytes(), content)

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        out = self.folder / "out"
        text = refused(self.script, *TINY, "--lr", 1e30, "--out-dir", out)
        self.assertIn("smaller --lr", text)
        self.assertTrue(all(value.isfinite().all() for value in
                            load(out / "models" / "checkpoint.pth")["ema"].values()))

    def test_a_full_disk_leaves_the_last_checkpoint_whole(self):
        out = self.copy()
        path = out / "models" / "checkpoint.pth"
        before = path.read_bytes()
        (out / "models" / "checkpoint.tmp").mkdir()  # stands in for a disk that takes no more
        text = refused(self.script, "--resume", "--epochs", 4, "--out-dir", out)
        self.assertIn("--resume", text)
        self.assertEqual(path.read_bytes(), before)

    def write_idx(self, name, count):
        """Writes random pictures in torchvision's layout of MNIST; returns them and the labels."""
        raw, rng = self.folder / "my data" / name / "raw", np.random.default_rng(0)
        raw.mkdir(parents=True)
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for split in ("train", "t10k"):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(
                struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(
                struct.pack(">II", 0x801, count) + labels.tobytes())
        return pixels, labels

    def real(self, *flags):
        """Returns the pictures of images/real.png, row by row, after a run on "my data"."""
        call(self.script, "--data-dir", self.folder / "my data", "--epochs", 1, "--batch-size", 70,
             *flags, "--out-dir", self.folder / "out")
        grid, n = read(self.folder / "out" / "images" / "real.png"), self.size * self.scale
        corners = [(top, left) for top in range(2, len(grid) - 2, n + 2)
                   for left in range(2, grid.shape[1] - 2, n + 2)]
        return [grid[top:top + n:self.scale, left:left + n:self.scale] for top, left in corners]


class RunTests:
    """What every script on the second skeleton promises; a class per script fills it in.

    Two short toy runs, one per variant, are trained once for all tests of a script.
    """

    flags = (
        *("--toy", "--limit", 200, "--batch-size", 32, "--latent-dim", 7),
        *("--epochs", 3, "--sample-every", 2),
    )
    variants = {"plain": (), "classes": ("--conditional",)}
    kept = (("--conditional",), ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",))
    bad_flags = ()
    also_written, killed = (), ("classes",)
    last_lines = 1  # printed after the epochs'

    @classmethod
    def setUpClass(cls):
        cls.module = importlib.import_module(cls.script.removesuffix(".py"))
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.printed = {}
        for name, flags in cls.variants.items():
            flags = (*cls.flags, *flags, "--out-dir", cls.runs / name)
            cls.printed[name] = call(cls.script, *flags)
        cls.default = next(iter(cls.variants))

    def copy_run(self):
        return shutil.copytree(self.runs / self.default, self.folder / "copy")

    def train(self, *flags, code=0):
        """A run of one epoch of three updates in a new folder, self.folder / "out"."""
        flags = ("--limit", 96, "--epochs", 1, "--out-dir", self.folder / "out", *flags)
        return call(self.script, *self.flags, *flags, code=code)

    def resume(self, out, *flags, code=0):
        return call(self.script, "--resume", "--out-dir", out, *flags, code=code)

    def generate(self, variant, count):
        """Generates from a checkpoint alone; returns the run's folder."""
        out = self.folder / variant
        (out / "models").mkdir(parents=True)
        shutil.copy(self.runs / variant / "models" / "checkpoint.pth", out / "models")
        flags = ("--generate", count, "--data-dir", self.folder / "none")
        call(self.script, *flags, "--out-dir", out)
        self.assertIn("rename or delete", call(self.script, *flags, "--out-dir", out, code=1))
        return out

    def epochs(self, out):
        return len(load(out / "models" / "checkpoint.pth")["history"])

    def networks(self):
        """Returns an untrained generator, for z of 7, and a discriminator, per variant."""
        yield self.module.Generator(7), self.module.Discriminator()

    def labels(self, count):
        """Returns what networks take besides images: a tuple, of labels or of nothing."""
        return (torch.arange(count) % 10,)

    def grid(self, rows, columns):
        cell = self.shape[1] * 3 + 2
        return rows * cell + 2, columns * cell + 2, 3

    # -- what a run gives

    def test_a_run_writes_its_files_and_says_where(self):
        for name, text in self.printed.items():
            out = self.runs / name
            self.assertEqual(
                {str(file.relative_to(out).as_posix()) for file in out.rglob("*.*")},
                {
                    *("images/real.png", "images/epoch_000.png", *self.also_written),
                    *("images/epoch_002.png", "images/epoch_003.png"),
                    *("progress.gif", "losses.png", "history.csv"),
                    *("models/generator.pth", "models/discriminator.pth"),
                    "models/checkpoint.pth",
                },
            )
            self.assertEqual(frames(out / "progress.gif"), 3)
            self.assertIn(repr(str(out)), text.splitlines()[-1])

    def test_lines_and_history_have_the_same_numbers(self):
        lines = self.printed[self.default].splitlines()
        self.assertIn("200 images, 6 updates per epoch", lines[0])
        with open(self.runs / self.default / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["epoch"] for row in rows], ["1", "2", "3"])
        for line, row in zip(lines[1 : -self.last_lines], rows, strict=True):
            self.assertTrue(line.startswith(f"epoch {row['epoch']}/3 "))
            for name in ("loss_d", "loss_g"):
                self.assertIn(f"  {name} {float(row[name]):.3f}  ", line)
            for name in ("acc_real", "acc_fake", "fool_rate", "coverage"):
                self.assertTrue(0 <= float(row[name]) <= 1)
                self.assertIn(f"  {name} {float(row[name]):.2f}  ", line)
            images = float(row["seconds"]) * float(row["images_per_s"])
            self.assertAlmostEqual(images, 6 * 32, places=3)
            self.assertIn("LOW COVERAGE", line)  # the generator has learned next to nothing

    # -- what the lesson's functions promise to whoever copies them

    def test_train_step_learns_when_copied_alone(self):
        generator, discriminator = next(self.networks())
        names = {"nn": nn, "torch": torch, "R1_WEIGHT": 0.1}
        names["bce"] = nn.functional.binary_cross_entropy_with_logits
        for part in (self.module.train_step, self.module.r1_penalty):
            exec(inspect.getsource(part), names)
        torch.manual_seed(0)
        generator.apply(init_weights)
        discriminator.apply(init_weights)
        opt_g = torch.optim.Adam(generator.parameters(), 2e-3, (0.5, 0.999))
        opt_d = torch.optim.Adam(discriminator.parameters(), 2e-3, (0.5, 0.999))
        real = torch.ones(16, *self.shape)
        real[:, :, 14:] = -1  # one image, half white and half black
        for i in range(60):
            z, r1 = torch.randn(16, 7), i % 16 == 0
            networks = generator, discriminator, opt_g, opt_d
            names["train_step"](*networks, real, *self.labels(16), z, r1)
        images = self.module.sample(generator, torch.randn(16, 7), *self.labels(16))
        self.assertLess((images - real).abs().mean(), 0.5)

    def test_train_step_updates_each_network_from_its_own_loss_alone(self):
        torch.manual_seed(0)
        for generator, discriminator in self.networks():
            for layer in discriminator:
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
            before = copy.deepcopy(discriminator)
            opt_g = torch.optim.SGD(generator.parameters(), 0.0)
            opt_d = torch.optim.SGD(discriminator.parameters(), 0.1)
            real, z, labels = torch.rand(32, *self.shape), torch.randn(32, 7), self.labels(32)
            result = self.module.train_step(
                generator, discriminator, opt_g, opt_d, real, *labels, z
            )
            bce = nn.functional.binary_cross_entropy_with_logits
            fake, one = generator(z, *labels), torch.ones(32, 1)
            loss_d = bce(before(real, *labels), one)
            loss_d = loss_d + bce(before(fake.detach(), *labels), 1 - one)
            loss_d.backward()
            logits = discriminator(fake, *labels)
            (grad,) = torch.autograd.grad(bce(logits, one), generator[0].weight)
            self.assertAlmostEqual(result["loss_d"].item(), loss_d.item(), places=5)
            self.assertAlmostEqual(result["loss_g"].item(), bce(logits, one).item(), places=5)
            self.assertEqual(result["fool_rate"], (logits > 0).float().mean())
            for new, old in zip(discriminator.parameters(), before.parameters()):
                torch.testing.assert_close(new.grad, old.grad)
            torch.testing.assert_close(generator[0].weight.grad, grad)
            self.assertTrue(all(weight.requires_grad for weight in discriminator.parameters()))

    def test_r1_is_the_squared_gradient_at_real_images(self):
        linear = nn.Linear(math.prod(self.shape), 1)
        penalty = self.module.r1_penalty(
            lambda x, *labels: linear(x.flatten(1)), torch.rand(5, *self.shape), *self.labels(5)
        )
        expected = self.module.R1_WEIGHT * linear.weight.square().sum()
        torch.testing.assert_close(penalty, expected)
        penalty.backward()
        torch.testing.assert_close(
            linear.weight.grad, 2 * self.module.R1_WEIGHT * linear.weight.detach()
        )

    def test_the_average_follows_weights_and_batchnorm(self):
        average, generator = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        for value in (*generator.parameters(), *generator.buffers()):
            value.data.fill_(3)
        start = average.running_mean.item(), average.weight.item()
        self.module.update_average(average, generator, 10_000)
        self.assertAlmostEqual(average.running_mean.item(), start[0] + 0.002 * 3, places=5)
        self.assertAlmostEqual(average.weight.item(), start[1] + 0.002 * 2, places=5)
        self.module.update_average(average, generator, 1)  # the first steps count more
        self.assertGreater(average.weight.item(), 2.5)

    def test_coverage_sees_collapse(self):
        torch.manual_seed(0)
        modes = torch.randn(10, *self.shape)
        real = modes.repeat(30, 1, 1, 1) + 0.1 * torch.randn(300, *self.shape)
        fake = modes.repeat(30, 1, 1, 1) + 0.1 * torch.randn(300, *self.shape)
        coverage = self.module.coverage
        self.assertGreater(coverage(real, fake), 0.95)
        half = fake.view(30, 10, *self.shape)[:, :5].flatten(0, 1)
        self.assertAlmostEqual(coverage(real, half), 0.5, delta=0.05)
        within = fake[:10].repeat(30, 1, 1, 1)  # every class, and one image of each
        self.assertLess(coverage(real, within), 0.3)
        self.assertLess(coverage(real, torch.randn(300, *self.shape)), 0.1)
        self.assertLessEqual(coverage(real[:6], fake), 1)

    def test_an_image_depends_on_its_own_z_alone_and_sampling_keeps_the_mode(self):
        for generator, discriminator in self.networks():
            z, labels = 3 * torch.randn(50, 7), self.labels(50)
            images = self.module.sample(generator.train(), z, *labels)
            self.assertEqual(images.shape, (50, *self.shape))
            self.assertLessEqual(images.abs().max().item(), 1)
            one = self.module.sample(generator, z[:1], *self.labels(1))
            torch.testing.assert_close(one, images[:1])
            self.assertTrue(generator.training)
            self.assertEqual(discriminator(images, *labels).shape, (50, 1))

    # -- stopping and resuming

    def test_a_killed_and_resumed_run_ends_in_the_same_bytes(self):
        for variant in self.killed:
            out = self.folder / variant
            flags = map(str, (*self.flags, *self.variants[variant], "--out-dir", out))
            process = subprocess.Popen(
                [sys.executable, HERE / self.script, *flags],
                stdout=subprocess.PIPE,
                text=True,
            )
            while "epoch 1/3" not in process.stdout.readline():
                self.assertIsNone(process.poll())
            process.kill()
            process.communicate()
            self.assertIn(self.epochs(out), (1, 2))
            self.assertIn("epoch 3/3", self.resume(out))
            for name in ("models/generator.pth", "models/discriminator.pth"):
                whole, resumed = self.runs / variant / name, out / name
                self.assertEqual(whole.read_bytes(), resumed.read_bytes())
            for name in ("images/epoch_003.png", "losses.png", *self.also_written):
                np.testing.assert_array_equal(
                    read(self.runs / variant / name), read(out / name)
                )

    def test_ctrl_c_in_a_copied_script_on_an_old_console_prints_the_command_that_resumes(self):
        shutil.copy(HERE / self.script, self.folder / "my_gan.py")
        shutil.copy(HERE / "common.py", self.folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
        out = self.folder / "Bilder \u00e4"
        (out / "history.csv").mkdir(parents=True)  # its warning names the folder
        process = subprocess.Popen(
            [sys.executable, "my_gan.py", *map(str, self.flags), "--epochs", "1000"]
            + ["--out-dir", out.name],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            text=True,
        )
        while "epoch 2/1000" not in process.stdout.readline():
            self.assertIsNone(process.poll())
        windows = os.name == "nt"  # takes no SIGINT from another process
        process.terminate() if windows else process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[1]
        if not windows:
            self.assertEqual(process.returncode, 1)
            self.assertIn("python my_gan.py --resume --out-dir \"Bilder", text)
            self.assertNotIn("Traceback", text)
            self.assertGreaterEqual(frames(out / "progress.gif"), 2)

    def test_resume_takes_flags_from_the_run_and_the_command_line_wins(self):
        out = self.copy_run()
        text = self.resume(out, "--epochs", 4, "--lr", 1e-4)
        self.assertIn("3 epochs are done; --epochs is 4", text)
        self.assertEqual(self.epochs(out), 4)
        settings = load(out / "models" / "checkpoint.pth")["settings"]
        self.assertEqual((settings["lr"], settings["batch_size"]), (1e-4, 32))
        text = self.resume(out, "--epochs", 2)
        self.assertNotIn("epoch 4", text)
        self.assertIn("4 epochs are done; --epochs is 2", text)
        self.assertEqual(self.epochs(out), 4)

    def test_a_flag_that_the_run_keeps_is_named(self):
        out = self.copy_run()
        checkpoint = load(out / "models" / "checkpoint.pth")
        checkpoint["settings"]["toy"] = False
        torch.save(checkpoint, out / "models" / "checkpoint.pth")
        for flags in self.kept:
            self.assertIn(f"has {flags[0]} ", self.resume(out, *flags, code=1))

    def test_damaged_and_foreign_checkpoints_are_refused_and_run_no_code(self):
        path = self.copy_run() / "models" / "checkpoint.pth"
        whole, trap = path.read_bytes(), self.folder / "trap"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(trap),)

        torch.save({"settings": {"toy": True}}, path)
        foreign = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", foreign, pickle.dumps(Payload())):
            path.write_bytes(content)
            self.assertIn("damaged or not from this script", self.resume(path.parents[1], code=1))
            self.assertFalse(trap.exists())
            self.assertEqual(path.read_bytes(), content)
        self.assertIn("Train first", self.resume(self.folder / "nothing", code=1))

    def test_networks_that_were_edited_since_are_refused_in_a_sentence(self):
        path = self.copy_run() / "models" / "checkpoint.pth"
        checkpoint = load(path)
        checkpoint["average"]["0.weight"] = torch.zeros(1, 1)
        torch.save(checkpoint, path)
        for flags in (("--resume",), ("--generate", 1)):
            text = call(self.script, *flags, "--out-dir", path.parents[1], code=1)
            self.assertIn("edited", text)

    def test_bfloat16_follows_the_machine_unless_it_was_asked_for(self):
        settings = load(self.runs / self.default / "models" / "checkpoint.pth")["settings"]
        self.assertIsNone(settings["bf16"])
        for flag, name in (("--bf16", "bfloat16"), ("--no-bf16", "float32")):
            out = self.folder / flag
            self.assertIn(name, self.train(flag, "--out-dir", out))
            self.assertIn(name, self.resume(out))

    # -- when something is wrong

    def test_out_of_memory_names_a_smaller_batch_and_the_command(self):
        out = self.copy_run()
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        with mock.patch.object(self.module, "train_step", side_effect=error):
            text = self.resume(out, "--epochs", 4, code=1)
        self.assertIn("--batch-size 16", text)
        self.assertIn("--resume", text)
        text = self.train("--latent-dim", 10**13, code=1)  # no machine has that much
        self.assertIn("Out of memory", text)

    def test_a_bug_keeps_its_traceback(self):
        with mock.patch.object(self.module, "train_step", side_effect=RuntimeError("a bug")):
            with self.assertRaisesRegex(RuntimeError, "a bug"):
                self.train()

    def test_a_crash_in_the_first_step_leaves_a_run_that_resumes(self):
        with mock.patch.object(self.module, "train_step", side_effect=KeyboardInterrupt):
            self.assertIn("--resume", self.train(code=1))
        self.assertIn("epoch 1/1", self.resume(self.folder / "out"))

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        text = self.train("--lr", 1e30, code=1)
        self.assertIn("smaller --lr", text)
        average = load(self.folder / "out" / "models" / "checkpoint.pth")["average"]
        self.assertTrue(all(value.isfinite().all() for value in average.values()))

    def test_a_report_that_cannot_be_written_does_not_end_the_run(self):
        out = self.copy_run()
        (out / "history.csv").unlink()
        (out / "history.csv").mkdir()  # stands in for a file that a spreadsheet holds open
        text = self.resume(out, "--epochs", 4)
        self.assertIn("Warning", text)
        self.assertIn("history.csv", text)
        self.assertEqual(self.epochs(out), 4)

    def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_last_one_stays(self):
        out = self.copy_run()
        path = out / "models" / "checkpoint.pth"
        before = path.read_bytes()
        (out / "models" / "checkpoint.pth.tmp").mkdir()  # stands in for a full disk
        self.assertIn("--resume", self.resume(out, "--epochs", 4, code=1))
        self.assertEqual(path.read_bytes(), before)

    def test_flags_out_of_range_are_refused(self):
        out = self.folder / "out"
        for flag, value in (
            *(("--epochs", 0), ("--batch-size", "ten"), ("--latent-dim", 0), ("--limit", 0)),
            *(("--sample-every", 0), ("--generate", 0), ("--beta1", 1), ("--beta1", -0.1)),
            *(("--lr", 0), ("--lr", "nan"), ("--seed", "x"), *self.bad_flags),
        ):
            text = call(self.script, flag, value, "--out-dir", out, code=2)
            self.assertIn(flag, text.splitlines()[-1])
        self.assertFalse(out.exists())

    def test_a_batch_larger_than_the_data_is_refused(self):
        self.assertIn("--batch-size", self.train("--limit", 31, code=1))
        self.assertIn("--batch-size", self.train("--batch-size", 1, code=1))
        self.train("--limit", 2, "--batch-size", 2)

    def test_nothing_that_exists_is_overwritten(self):
        out = self.folder / "out"
        out.mkdir()
        for name in (".DS_Store", "desktop.ini", ".gitkeep"):
            (out / name).touch()  # these are no run
        self.train()
        before = {file: file.read_bytes() for file in out.rglob("*.*")}
        self.assertIn("--resume", self.train(code=1))
        self.assertEqual(before, {file: file.read_bytes() for file in out.rglob("*.*")})
        blocked = self.folder / "a file"
        blocked.write_text("mine")
        self.assertIn("a file", self.train("--out-dir", blocked / "out", code=1))
        self.assertEqual(blocked.read_text(), "mine")

    def test_a_device_that_cannot_be_used_is_refused_or_replaced_if_not_asked_for(self):
        for name in ("cuda:99", "nonsense"):
            self.assertIn(name, self.train("--device", name, code=1))
        self.assertFalse((self.folder / "out").exists())
        gpu = torch.device("cuda:99")  # stands in for one that PyTorch sees and cannot use
        with (
            mock.patch("torch.accelerator.current_accelerator", lambda **_: gpu),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            self.assertEqual(self.module.choose_device(None).type, "cpu")
        self.assertIn("cuda:99 cannot be used", printed.getvalue())

    # -- the data set

    def write_idx(self, pixels, labels):
        """Writes uint8 N x 28 x 28 in MNIST's format; returns the file of the images."""
        raw = self.folder / "data" / self.data_set.__name__ / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        images = struct.pack(">IIII", 0x803, len(pixels), 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 0x801, len(pixels)) + bytes(labels)
        for split in ("train", "t10k"):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
        return raw / "train-images-idx3-ubyte"

    def train_on_files(self, *flags, code=0):
        folders = ("--data-dir", self.folder / "data", "--out-dir", self.folder / "out")
        flags = (*folders, "--epochs", 1, "--batch-size", 64, *flags)
        return call(self.script, *flags, code=code)

    def cells(self, path, columns):
        """Returns the images of a grid as the bytes of H x W x C, before they were enlarged."""
        grid, size = read(path), self.shape[1]
        if self.shape[0] == 1:
            grid = grid[..., :1]
        return [
            grid[top : top + 3 * size : 3, left : left + 3 * size : 3].tobytes()
            for top in range(2, len(grid), 3 * size + 2)
            for left in range(2, columns * (3 * size + 2), 3 * size + 2)
        ]

    def test_without_a_connection_the_files_are_named(self):
        text = self.train_on_files(code=1)
        for word in (self.data_file, str(self.folder / "data"), "--toy"):
            self.assertIn(word, text)

    def test_a_server_that_never_answers_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and is silent
            address = f"http://127.0.0.1:{server.getsockname()[1]}/"
            set_timeout = socket.setdefaulttimeout
            self.addCleanup(set_timeout, None)
            with (
                mock.patch.object(self.data_set, "mirrors", [address], create=True),
                mock.patch.object(self.data_set, "url", address, create=True),
                mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}),
                mock.patch("socket.setdefaulttimeout", lambda s: set_timeout(s / 100)),
                mock.patch.dict(NO_NETWORK, {"no_proxy": "127.0.0.1"}),
            ):
                self.assertIn("timed out", self.train_on_files(code=1))


class MnistTest(RunTests, Folder):
    script, shape, data_set = "gan_mnist.py", (1, 28, 28), gan_mnist.MNIST
    variants, killed = {"mlp": (), "conv": ("--model", "conv")}, ("mlp", "conv")
    kept = (("--model", "conv"), ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",))
    bad_flags = (("--model", "gru"),)
    data_file = "train-images-idx3-ubyte.gz"

    def networks(self):
        yield gan_mnist.MLPGenerator(7), gan_mnist.MLPDiscriminator()
        yield gan_mnist.ConvGenerator(7), gan_mnist.ConvDiscriminator()

    def labels(self, count):
        return ()

    def test_grids_are_large_enough_to_see(self):
        for grid in (self.runs / "mlp" / "images").iterdir():
            self.assertEqual(read(grid).shape, self.grid(8, 8))

    def test_readmes_lines_load_the_averaged_generator(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("latent_dim=100", "latent_dim=7").replace("(64, 100)", "(64, 7)")
        code = code.replace("runs/gan_mnist", str(self.runs / "mlp").replace("\\", "/"))
        names = {}
        exec(code.replace("digits.png", str(self.folder / "digits.png")), names)
        self.assertEqual(read(self.folder / "digits.png").shape, (690, 690, 3))
        checkpoint = load(self.runs / "mlp" / "models" / "checkpoint.pth")
        for name, value in names["generator"].state_dict().items():
            self.assertTrue(value.equal(checkpoint["average"][name]), name)
        self.assertFalse(value.equal(checkpoint["generator"][name]))

    def test_generate_writes_n_images_and_nothing_else_into_a_new_folder(self):
        for variant in self.variants:
            out = self.generate(variant, 5)
            files = sorted((out / "generated").iterdir())
            self.assertEqual([file.name for file in files], [f"{i:05d}.png" for i in range(5)])
            self.assertEqual({read(file).shape for file in files}, {(28, 28)})
            self.assertEqual(len({file.read_bytes() for file in files}), 5)
            self.assertEqual(read(out / "generated_grid.png").shape, self.grid(8, 8))
            self.assertEqual(read(out / "latent_walk.png").shape, self.grid(8, 10))

    def test_the_convolutional_discriminator_has_dropout(self):
        discriminator, images = gan_mnist.ConvDiscriminator(), torch.rand(5, 1, 28, 28)
        for layer in discriminator:
            layer.train(isinstance(layer, nn.Dropout))
        self.assertFalse(discriminator(images).equal(discriminator(images)))
        with self.assertRaises(TypeError):  # a slice would not hold the trained layers
            discriminator[:-2]

    def test_mnist_is_read_from_its_files(self):
        pixels = np.random.default_rng(0).integers(0, 256, (70, 28, 28), dtype=np.uint8)
        self.write_idx(pixels, bytes(70))
        self.train_on_files("--limit", 64)
        cells = self.cells(self.folder / "out" / "images" / "real.png", 8)
        self.assertEqual(set(cells), {image.tobytes() for image in pixels[:64]})

    def test_a_damaged_data_file_is_named(self):
        pixels = np.full((64, 28, 28), 9, np.uint8)
        file = self.write_idx(pixels, bytes(64))
        file.write_bytes(file.read_bytes()[:25_000])
        self.assertIn(f"delete {file.name}", self.train_on_files(code=1))
        self.write_idx(0 * pixels, bytes(64))
        self.assertIn(f"delete {file.name}", self.train_on_files(code=1))


class ClassTests(RunTests):
    """What the scripts with --conditional promise besides."""

    def test_grids_have_a_row_per_class(self):
        for variant, shape in self.grids.items():
            for file in (self.runs / variant / "images").glob("epoch*.png"):
                self.assertEqual(read(file).shape, self.grid(*shape))

    def test_the_label_changes_image_and_logit(self):
        for generator, discriminator in self.networks():
            z, labels = torch.randn(1, 7).expand(10, 7), torch.arange(10)
            images = self.module.sample(generator, z, labels)
            self.assertEqual(len({image.numpy().tobytes() for image in images}), 10)
            logits = discriminator.eval()(images[:1].expand(10, -1, -1, -1), labels)
            self.assertEqual(logits.unique().numel(), 10)

    def test_without_conditional_the_labels_do_not_matter(self):
        images, labels = self.module.load_data(argparse.Namespace(toy=True, limit=64), *self.split)
        results = []
        for y in (labels, labels.flip(0)):
            out, data = self.folder / str(len(results)), (images, y)
            with mock.patch.object(self.module, "load_data", lambda *_, data=data, **__: data):
                self.train("--out-dir", out)
            results.append((out / "models" / "generator.pth").read_bytes())
        self.assertEqual(results[0], results[1])
        plain, classes = (self.runs / name / "models" / "generator.pth" for name in self.variants)
        self.assertNotEqual(plain.read_bytes(), classes.read_bytes())

    def test_fakes_have_the_labels_of_the_real_images(self):
        class Recorder(nn.Module):
            def __init__(self, network):
                super().__init__()
                self.network, self.seen = network, []

            def forward(self, x, labels):
                self.seen.append(labels)
                return self.network(x, labels)

        generator, discriminator = map(Recorder, next(self.networks()))
        opt_g = torch.optim.SGD(generator.parameters(), 0.1)
        opt_d = torch.optim.SGD(discriminator.parameters(), 0.1)
        real, y = torch.rand(20, *self.shape), torch.randint(10, (20,))
        networks = generator, discriminator, opt_g, opt_d
        self.module.train_step(*networks, real, y, torch.randn(20, 7), True)
        seen = [*generator.seen, *discriminator.seen]
        self.assertEqual(len(seen), 5)
        self.assertTrue(all(labels.equal(y[:: 20 // len(labels)]) for labels in seen))

    def test_generated_images_are_in_folders_of_their_class(self):
        out = self.generate("classes", 13)
        files = sorted((out / "generated").rglob("*.png"), key=lambda file: file.name)
        self.assertEqual(
            [f"{file.parent.name}/{file.name}" for file in files],
            [f"{i % 10}_{self.letters[i % 10]}/{i:05d}.png" for i in range(13)],
        )
        sizes = {tuple(read(file).shape) for file in files}
        self.assertEqual(sizes, {self.shape[1:] + self.shape[:1] * (self.shape[0] > 1)})
        self.assertEqual(len({file.read_bytes() for file in files}), 13)
        rows, columns = self.grids["classes"]
        for name in ("generated_grid.png", "latent_walk.png"):
            self.assertEqual(read(out / name).shape, self.grid(rows, columns))
        self.assertEqual(self.module.CLASSES[0], self.first_class)
        out = self.generate("plain", 3)
        files = sorted(file.name for file in (out / "generated").iterdir())
        self.assertEqual(files, ["00000.png", "00001.png", "00002.png"])

    def check_real_rows(self, pixels, labels, columns):
        """Asserts that real.png has a row per class, which may end in black places."""
        shown = self.cells(self.folder / "out" / "images" / "real.png", columns)
        for k in range(10):
            row = [image.tobytes() for image in pixels[labels == k][:columns]]
            row += [bytes(len(shown[0]))] * (columns - len(row))
            self.assertEqual(shown[k * columns :][:columns], row)


class FashionTest(ClassTests, Folder):
    script, shape, data_set = "gan_fashion.py", (1, 28, 28), gan_fashion.FashionMNIST
    grids = {"plain": (9, 9), "classes": (10, 10)}
    bad_flags = (("--g-steps", 0),)
    also_written, last_lines = ("images/nearest.png",), 2
    letters, first_class, split = "ABCDEFGHIJ", "t-shirt", (True,)
    data_file = "train-images-idx3-ubyte.gz"

    def test_d_learns_at_every_g_steps_th_step_alone(self):
        changes, train_step = [], gan_fashion.train_step

        def record(generator, discriminator, *others):
            before = [copy.deepcopy(list(x.parameters())) for x in (generator, discriminator)]
            result = train_step(generator, discriminator, *others)
            for old, network in zip(before, (generator, discriminator)):
                same = all(x.equal(y) for x, y in zip(old, network.parameters()))
                changes.append(not same)
            return result

        with mock.patch.object(gan_fashion, "train_step", record):
            self.train("--g-steps", 3)
        self.assertEqual(changes[::2], [True, True, True])
        self.assertEqual(changes[1::2], [True, False, False])

    def test_the_copy_ratio_tells_copies_from_new_images(self):
        torch.manual_seed(0)
        training, held_out, new = torch.rand(3, 53, 1, 28, 28)
        path = self.folder / "nearest.png"
        self.assertAlmostEqual(
            gan_fashion.copy_ratio(new, training, held_out, path).item(), 1, delta=0.1
        )
        copies = training.flip(0) + 0.01 * new
        ratio = gan_fashion.copy_ratio(copies, training, held_out, path)
        self.assertLess(ratio, 0.1)
        grid = read(path)[..., 0] / 127.5 - 1  # each fake above its nearest
        self.assertEqual(grid.shape, (170 + 2, 3 * 86 + 2))
        np.testing.assert_allclose(grid[2:86:3, 2:86:3], copies[0, 0], atol=0.01)
        np.testing.assert_allclose(grid[86:170:3, 2:86:3], training[52, 0], atol=0.01)

    def test_a_run_ends_with_its_copy_ratio(self):
        data = gan_fashion.load_data(argparse.Namespace(toy=True, limit=96), True)
        fakes = data[0] / 127.5 - 1
        with mock.patch.object(gan_fashion, "sample", lambda *_: fakes.repeat(5, 1, 1, 1)):
            text = self.train()  # a generator that copies the training images
        self.assertIn("copy ratio 0.0", text.splitlines()[-2])

    def test_data_is_read_and_each_row_of_real_images_is_a_class(self):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (70, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 9, 70)  # no image of the last class
        self.write_idx(pixels, labels.astype(np.uint8))
        self.train_on_files("--limit", 64, "--conditional")
        columns = min(10, np.bincount(labels[:64]).max())
        self.check_real_rows(pixels[:64], labels[:64], columns)

    def test_a_damaged_data_file_is_named(self):
        pixels = np.full((64, 28, 28), 9, np.uint8)
        file = self.write_idx(pixels, bytes(64))
        file.write_bytes(file.read_bytes()[:25_000])
        self.assertIn("Delete", self.train_on_files(code=1))
        self.write_idx(0 * pixels, bytes(64))
        self.assertIn("all pixels are 0", self.train_on_files(code=1))


class CifarTest(ClassTests, Folder):
    script, shape, data_set = "dcgan_cifar10.py", (3, 32, 32), dcgan_cifar10.CIFAR10
    grids = {"plain": (8, 8), "classes": (10, 8)}
    letters, first_class, split = "AHIMOTUVWX", "airplane", ()
    data_file = "cifar-10-python.tar.gz"

    @contextlib.contextmanager
    def cifar(self, count):
        """Writes random images in CIFAR-10's layout, with their checksums for torchvision's.

        Yields the images, uint8 N x 32 x 32 x 3, and their labels.
        """
        folder, rng = self.folder / "data" / "cifar-10-batches-py", np.random.default_rng(0)
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 9, count)
        rows = pixels.transpose(0, 3, 1, 2).reshape(count, 3072)
        half = count // 2
        contents = {
            "data_batch_1": {"data": rows[:half], "labels": labels[:half].tolist()},
            "data_batch_2": {"data": rows[half:], "labels": labels[half:].tolist()},
            "batches.meta": {"label_names": []},
        }
        sums = {}
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        meta = {"filename": "batches.meta", "key": "label_names"}
        meta["md5"] = sums.pop("batches.meta")
        with mock.patch.multiple(
            self.data_set, train_list=list(sums.items()), test_list=[], meta=meta
        ):
            yield pixels, labels

    def test_data_is_read_and_each_row_of_real_images_is_a_class(self):
        with self.cifar(100) as (pixels, labels):
            self.train_on_files("--limit", 70, "--conditional")
        self.check_real_rows(pixels[:70], labels[:70], 8)

    def test_half_of_the_real_images_are_mirrored(self):
        batches, train_step = [], dcgan_cifar10.train_step

        def record(*args):
            batches.append(args[4])
            return train_step(*args)

        with (
            self.cifar(100) as (pixels, _),
            mock.patch.object(dcgan_cifar10, "train_step", record),
        ):
            self.train_on_files("--batch-size", 50)
        layouts = [x.is_contiguous(memory_format=torch.channels_last) for x in batches]
        self.assertEqual(layouts, [True, True])  # faster than the default
        seen = ((torch.cat(batches) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        seen = {image.numpy().tobytes() for image in seen}
        plain = {image.tobytes() for image in pixels}
        mirrored = {image.tobytes() for image in pixels[:, :, ::-1]}
        self.assertEqual((len(seen & plain), len(seen & mirrored)), (50, 50))

    def test_toy_letters_may_be_mirrored(self):
        letters, _ = dcgan_cifar10.load_data(argparse.Namespace(toy=True, limit=2000))
        letters = letters.view(200, 10, -1, 32, 32).float().mean((0, 2))  # 10 mean letters
        letters = letters - letters.mean(0)
        error = (letters - letters.flip(2)).square().mean() / letters.square().mean()
        self.assertLess(error, 0.5)

    def test_grids_and_the_gif_are_in_colour(self):
        out = self.copy_run()
        real = read(out / "images" / "real.png").astype(int)
        self.assertGreater((real.max(2) - real.min(2)).max(), 50)
        shutil.copy(out / "images" / "real.png", out / "images" / "epoch_003.png")
        self.resume(out, "--epochs", 3)  # makes the GIF once more
        with Image.open(out / "progress.gif") as picture:
            picture.seek(2)
            shown = np.asarray(picture.convert("RGB")).astype(int)
        self.assertGreater((shown.max(2) - shown.min(2)).max(), 50)


class CelebaTest(ScriptTests, Folder):
    script, channels, size, scale = "dcgan_celeba.py", 3, 64, 1
    variants, columns = {"plain": ()}, {"plain": 8}
    others, bad_flags = (), ()
    data_file = "img_align_celeba.zip"

    def networks(self, variant):
        return dcgan_celeba.Generator(7), dcgan_celeba.Discriminator()

    def pictures(self, folder, count=3):
        """Writes count random pictures, 64 x 64, to a new folder; returns them, by name."""
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / f"{i:06d}.png")
        return pixels

    def load(self, images=None, limit=None):
        """Returns load_data's pictures, N x 64 x 64 x 3, and what it printed."""
        flags = dict(toy=False, images=images, limit=limit, data_dir=self.folder / "data")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            count, read = dcgan_celeba.load_data(argparse.Namespace(**flags))
        pixels = read(torch.arange(count)).permute(0, 2, 3, 1).numpy()
        self.assertEqual((len(pixels), pixels.dtype), (count, np.uint8))
        return pixels, printed.getvalue()

    def decoded(self):
        """Returns all that load_data has left behind in its folder."""
        return [path for path in (self.folder / "data").glob("*")]

    def test_a_folder_of_any_pictures_is_read(self):
        deep = self.folder / "mine" / "deeper"
        deep.mkdir(parents=True)
        red, half = Image.new("RGB", (200, 80), "red"), Image.new("RGB", (8, 16), "blue")
        red.paste("blue", (0, 0, 40, 80))  # left of the centre crop
        half.paste("red", (0, 0, 4, 16))
        red.save(deep / "0 wide.jpg", quality=100)
        half.save(deep / "1 blue and red.bmp")
        rotated = Image.Exif()
        rotated[0x112] = 6  # shown after a quarter turn to the right
        half.resize((300, 600)).save(deep / "2 turned.jpg", exif=rotated)
        red.convert("CMYK").save(deep / "3 cmyk.jpg", quality=100)
        Image.new("L", (70, 70), 90).save(deep / "4 grey.webp", lossless=True)
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(deep / "5 transparent.png")
        palette = half.resize((64, 64)).quantize(2)
        palette.save(self.folder / "mine" / "0 palette.png", transparency=0)
        (deep / "6 cut off.jpg").write_bytes((deep / "2 turned.jpg").read_bytes()[:3000])
        (deep / "7.txt").write_text("no picture")
        Image.new("RGB", (7, 100)).save(deep / "8 small.png")
        Image.fromarray(np.full((64, 64), 9000, np.uint16)).save(deep / "9 of 16 bits.png")
        (deep / ".hidden.jpg").write_text("not even counted")

        pixels, text = self.load(images=self.folder / "mine")
        self.assertEqual(len(pixels), 7)
        for word in ("11/11", "4 unreadable", "6 cut off.jpg", "7.txt", "8 small.png"):
            self.assertIn(word, text)
        palette, wide, sides, turned, cmyk, grey, transparent = pixels.astype(int)
        close = functools.partial(np.testing.assert_allclose, atol=6)
        close(palette[32, [10, 50]].max(1), [255, 255])
        self.assertEqual(sum((palette[32, x] == 255).all() for x in (10, 50)), 1)
        for picture in (wide, cmyk):
            close(picture, np.broadcast_to([254, 0, 0], (64, 64, 3)))
        close(sides[32, [0, 63]], [[255, 0, 0], [0, 0, 255]])
        close(turned[[0, 63], 32], [[254, 0, 0], [0, 0, 254]])
        self.assertTrue((grey == 90).all() and (transparent == 255).all())

    def test_pictures_are_decoded_once_and_again_when_the_folder_changes(self):
        images = self.folder / "mine"
        expected = self.pictures(images, 5)
        pixels, text = self.load(images)
        np.testing.assert_array_equal(pixels, expected)
        self.assertIn("5/5 decoded", text)
        np.testing.assert_array_equal(self.load(images)[0], expected)
        self.assertEqual(self.load(images)[1], "")  # nothing to decode
        np.testing.assert_array_equal(self.load(images, limit=2)[0], expected[:2])
        shutil.copy(images / "000000.png", images / "000004.png")
        np.testing.assert_array_equal(self.load(images)[0][4], expected[0])
        shutil.copy(images / "000000.png", images / "000005.png")
        self.assertEqual(len(self.load(images)[0]), 6)
        (images / "000001.png").unlink()
        np.testing.assert_array_equal(self.load(images)[0][1], expected[2])

    def test_decoding_that_is_cut_off_leaves_nothing(self):
        flags = ("--images", self.folder / "mine", "--data-dir", self.folder / "data",
                 "--epochs", 1, "--batch-size", 5, "--out-dir", self.folder / "out")
        self.pictures(self.folder / "mine", 5)
        for what, error in (("os.fsync", OSError(28, "No space left on device")),
                            ("dcgan_celeba.np.lib.format.write_array_header_1_0",
                             KeyboardInterrupt())):
            with mock.patch(what, side_effect=error):
                self.assertIn("Stopped", refused(self.script, *flags))
            self.assertEqual(self.decoded(), [])
        self.assertIn("5/5 decoded", call(self.script, *flags))
        self.assertEqual([path.suffix for path in self.decoded()], [".npy"])

    def test_folders_without_pictures_are_refused(self):
        empty, text = self.folder / "empty", self.folder / "text"
        empty.mkdir(), text.mkdir()
        (text / "a.jpg").write_text("no picture")
        archive = shutil.make_archive(self.folder / "photos", "zip", self.folder, "text")
        for folder in (empty, text, self.folder / "missing", archive, text / "a.jpg"):
            self.assertIn(str(folder), refused(
                self.script, "--images", folder, "--data-dir", self.folder / "data",
                "--out-dir", self.folder / "out"))
        for flags in (("--images", self.folder), ("--images", text, "--toy")):
            self.assertIn("--images must not", refused(
                self.script, *flags, "--out-dir", self.folder / "runs" / "mine"))
        self.assertEqual(self.decoded(), [])

    def test_celeba_is_found_in_every_layout(self):
        expected = self.pictures(self.folder / "once")
        name, data = "img_align_celeba", self.folder / "data"
        archive = shutil.make_archive(self.folder / name, "zip", self.folder, "once")
        for place in ("celeba/NAME", "NAME", "NAME/NAME", "celeba/NAME.zip", "NAME.zip"):
            target = data / place.replace("NAME", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copy if target.suffix else shutil.copytree
            copy(archive if target.suffix else self.folder / "once", target)
            pixels, text = self.load()
            np.testing.assert_array_equal(pixels, expected)
            self.assertIn("3/3 decoded", text)
            shutil.rmtree(data)
        data.mkdir()
        (data / f"{name}.zip").write_bytes(Path(archive).read_bytes()[:-10])
        text = refused(self.script, "--data-dir", data, "--out-dir", self.folder / "out")
        self.assertIn("not a whole .zip", text)

    @contextlib.contextmanager
    def server(self, content, sent):
        """A web server on the loopback address; it sends the first bytes of content, then stops."""
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", len(content))
                self.end_headers()
                self.wfile.write(content[:sent])

            def log_message(self, *args):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}/celeba.zip"
            md5 = hashlib.md5(content).hexdigest()
            with mock.patch.multiple(dcgan_celeba, URL=address, MD5=md5), \
                    mock.patch.dict(os.environ, NO_NETWORK | {"no_proxy": "127.0.0.1"}), \
                    contextlib.redirect_stderr(io.StringIO()):
                yield
            server.shutdown()

    def test_celeba_is_fetched_and_nothing_but_the_whole_archive_is_taken_for_it(self):
        expected = self.pictures(self.folder / "once")
        archive = shutil.make_archive(self.folder / "some", "zip", self.folder, "once")
        content = Path(archive).read_bytes()
        with self.server(content, len(content)):
            with mock.patch.object(dcgan_celeba, "MD5", "0" * 32):  # not the archive we know
                self.assert_no_celeba()
            np.testing.assert_array_equal(self.load()[0], expected)
        with self.server(b"", 0):  # no need of it any more
            np.testing.assert_array_equal(self.load()[0], expected)
        shutil.rmtree(self.folder / "data")
        with self.server(content, len(content) // 2):
            self.assert_no_celeba()
        with self.server(content, len(content)):
            np.testing.assert_array_equal(self.load()[0], expected)
        shutil.rmtree(self.folder / "data")
        with self.server(content, 0), mock.patch.object(dcgan_celeba, "URL", "http://127.0.0.1:9"):
            self.assert_no_celeba()  # nobody listens there

    def assert_no_celeba(self):
        for _ in range(2):  # what the first attempt left is not taken for the archive
            with self.assertRaises(SystemExit) as stop:
                self.load()
            for word in ("img_align_celeba.zip", "--images", "--toy", str(self.folder / "data")):
                self.assertIn(word, stop.exception.code)

    @unittest.skipUnless(Path("/proc/self/statm").exists(), "reads the memory in use from /proc")
    def test_memory_does_not_grow_with_the_pictures_that_were_read(self):
        path, count = self.folder / "large.npy", 30_000  # 369 MB
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 64, 64, 3))
        self.pictures(self.folder / "mine")
        with mock.patch.object(dcgan_celeba, "decode_all", lambda *_: path):
            _, read = dcgan_celeba.load_data(argparse.Namespace(
                toy=False, images=self.folder / "mine", limit=None, data_dir=self.folder))
        pages = []
        for batch in torch.arange(count).split(100):
            self.assertEqual(read(batch).shape, (100, 3, 64, 64))
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        self.assertLess((max(pages[1:]) - pages[0]) * os.sysconf("SC_PAGE_SIZE"), 100e6)

    def test_training_shows_d_the_pictures_half_of_them_mirrored(self):
        pixels, batches = self.pictures(self.folder / "mine", 70), []
        forward = dcgan_celeba.Discriminator.forward

        def record(network, x):
            batches.append(x.detach())
            return forward(network, x)

        with mock.patch.object(dcgan_celeba.Discriminator, "forward", record):
            real = self.real("--images", self.folder / "mine")
        np.testing.assert_array_equal(real, pixels[:64])
        self.assertTrue(all(x.is_contiguous(memory_format=torch.channels_last) for x in batches))
        seen = ((batches[1] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        seen, plain, mirrored = ({picture.tobytes() for picture in some}
                                 for some in (seen, pixels, pixels[:, :, ::-1]))
        self.assertEqual((len(seen), seen - plain - mirrored), (70, set()))
        self.assertIn(len(seen & plain), range(15, 56))

    def test_several_processes_are_told_how_to_go_on(self):
        with mock.patch.dict(os.environ, WORLD_SIZE="2"), \
                mock.patch.object(dcgan_celeba, "load_data", side_effect=KeyboardInterrupt):
            text = refused(self.script, "--resume", "--out-dir", self.copy())
        self.assertIn("torchrun --nproc-per-node 2 dcgan_celeba.py --resume", text)

    @unittest.skipIf(os.name == "nt", "torchrun on Windows needs settings of its own")
    def test_processes_share_each_epoch_and_learn_the_same(self):
        recorder, flags = self.folder / "recorder.py", (*TINY, "--epochs", 2, "--latent-dim", 7)
        recorder.write_text(textwrap.dedent("""
            import os, torch, dcgan_celeba as script
            load_data, AveragedModel = script.load_data, script.AveragedModel
            all_reduce, seen, networks, sums = script.distributed.all_reduce, [], [], []

            def recording_load(args):
                count, read = load_data(args)
                return count, lambda index: (seen.append(index), read(index))[1]

            def recording_average(network, **flags):
                networks.append(network)
                return AveragedModel(network, **flags)

            def recording_reduce(tensor):
                sums.append(tensor.clone())
                all_reduce(tensor)

            script.load_data, script.AveragedModel = recording_load, recording_average
            script.distributed.all_reduce = recording_reduce
            script.main()
            seen = torch.stack([index for index in seen if torch.is_tensor(index)])
            torch.save([seen, dict(networks[0].named_parameters()), torch.stack(sums),
                        torch.rand(1)], "rank" + os.environ["RANK"])
        """))

        def torchrun(script, *flags):
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",  # on a free port
                 "--nproc-per-node=2", script, *map(str, flags)], cwd=self.folder, text=True,
                env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

        whole, cut = self.folder / "whole", self.folder / "cut"
        process = torchrun(recorder, *flags, "--out-dir", whole)
        printed, errors = process.communicate(timeout=300)
        self.assertEqual(process.returncode, 0, errors)
        self.assertNotIn("Warning", errors)
        lines = [line.split()[:2] for line in printed.splitlines() if line.startswith("epoch")]
        self.assertEqual(lines, [["epoch", "1/2"], ["epoch", "2/2"]])
        rank0, rank1 = (load(self.folder / f"rank{i}") for i in range(2))
        (seen, weights, sums, chance), (others, same, more, luck) = rank0, rank1
        self.assertEqual((seen.shape, others.shape), ((6, 32), (6, 32)))  # 200 // 64 = 3 an epoch
        for epoch in torch.cat([seen, others], 1).split(3):  # 3 steps
            self.assertEqual(len(epoch.unique()), 192)  # no picture twice
        self.assertTrue(all(weights[name].equal(same[name]) for name in weights))
        self.assertFalse(chance.equal(luck))  # each draws a z of its own
        history = load(whole / "models" / "checkpoint.pth")["history"]
        self.assertAlmostEqual(history[1][7] * history[1][8], 192, delta=0.01)
        np.testing.assert_allclose([row[1:6] for row in history], sums + more, rtol=1e-4)
        self.assertLessEqual(max(share for row in history for share in row[3:6]), 1)

        process = torchrun(HERE / self.script, *flags, "--out-dir", cut)
        while not process.stdout.readline().startswith("epoch"):
            self.assertIsNone(process.poll())
        process.terminate()  # when the first epoch is saved, or about to be
        process.communicate(timeout=60)
        process = torchrun(HERE / self.script, "--resume", "--out-dir", cut)
        self.assertIn("epoch 2/2", process.communicate(timeout=300)[0])
        for name in ("generator.pth", "discriminator.pth"):
            self.assertEqual((whole / "models" / name).read_bytes(),
                             (cut / "models" / name).read_bytes())


if __name__ == "__main__":
    unittest.main()
