"""Tests of what a user sees. Run them with  python -m unittest  (or pytest).

They run the real commands on --toy images or on small files written here; most call
main() with the same flags, to spare the start of a process. Nothing is downloaded.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import importlib.util
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
import time
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = (
    "1"  # for small networks more threads only wait for each other
)

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
NO_NETWORK = dict(
    http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", no_proxy=""
)


def call(script, *flags, code=0):
    """Runs a script's main(), asserts its exit code and returns all that it printed."""
    printed, found = io.StringIO(), 0
    with (
        mock.patch("sys.argv", [script, *map(str, flags)]),
        warnings.catch_warnings(),
        mock.patch.dict(os.environ, NO_NETWORK),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("error")
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except (
            SystemExit
        ) as stop:  # sys.exit(text) prints the text and exits with code 1
            text = isinstance(stop.code, str)
            found = printed.write(stop.code) and 1 if text else stop.code
    text = printed.getvalue()
    assert found == code, f"{flags}: exit code {found}, not {code}\n{text}"
    return text


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
        images = (
            torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0])
            .view(5, 1, 1, 1)
            .expand(5, 1, 64, 64)
        )
        save_grid(images, self.folder / "new" / "grid.png", columns=3)
        grid = read(self.folder / "new" / "grid.png")
        self.assertEqual(grid.shape, (2 * 66 + 2, 3 * 66 + 2, 3))
        levels = [int(grid[30 + 66 * (i // 3), 30 + 66 * (i % 3), 0]) for i in range(5)]
        self.assertEqual(levels, [0, 128, 255, 0, 255])

    def test_small_images_are_enlarged_without_smoothing(self):
        images = torch.rand(2, 3, 28, 28).round() * 2 - 1
        save_grid(images, self.folder / "grid.png", columns=1)
        grid = torch.from_numpy(read(self.folder / "grid.png")[2:86, 2:86] / 127.5 - 1)
        expected = (
            images[0].permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1)
        )
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
        for layer in (
            nn.Linear(200, 200),
            nn.Conv2d(64, 64, 4),
            nn.ConvTranspose2d(64, 64, 4),
        ):
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


class RunTests:
    """What every script promises; a class per script fills it in.

    Two short toy runs, one per variant, are trained once for all tests of a script.
    """

    flags = (
        *("--toy", "--limit", 200, "--batch-size", 32, "--latent-dim", 7),
        *("--epochs", 3, "--sample-every", 2),
    )
    variants = {"plain": (), "classes": ("--conditional",)}
    kept = (("--conditional",), ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",))
    bad_flags = ()
    also_written = ()
    copied = "train_step", "r1_penalty"
    first_lines, last_lines = 1, 1  # printed before and after the epochs'

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

    def setUp(self):
        super().setUp()
        # Plots and 1,000 fakes take most of a short run; setUpClass made real ones.
        real_sample = self.module.sample

        def sample(generator, z, *labels):
            images = real_sample(generator, z[:100], *(y[:100] for y in labels))
            return images.repeat(math.ceil(len(z) / 100), 1, 1, 1)[: len(z)]

        self.quick = mock.patch.multiple(
            self.module, sample=sample, plot_history=lambda *_: None
        )
        self.quick.start()
        self.addCleanup(self.quick.stop)

    def copy_script(self):
        """Returns the path of a copy, my_gan.py, with common.py beside it."""
        shutil.copy(HERE / "common.py", self.folder)
        return Path(shutil.copy(HERE / self.script, self.folder / "my_gan.py"))

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
        self.assertIn(
            "rename or delete", call(self.script, *flags, "--out-dir", out, code=1)
        )
        return out

    def epochs(self, out):
        return len(load(out / "models" / "checkpoint.pth")["history"])

    def networks(self):
        """Yields an untrained generator, for z of 7, and discriminator a variant."""
        yield self.module.Generator(7), self.module.Discriminator()

    def labels(self, count):
        """Returns what networks take besides images: labels in a tuple, or ()."""
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
        for words in ("200 images", "6 updates"):
            self.assertIn(words, "".join(lines[: self.first_lines]))
        with open(self.runs / self.default / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["epoch"] for row in rows], ["1", "2", "3"])
        for line, row in zip(
            lines[self.first_lines : -self.last_lines], rows, strict=True
        ):
            self.assertTrue(line.startswith(f"epoch {row['epoch']}/3 "))
            for name in ("loss_d", "loss_g"):
                self.assertIn(f"  {name} {float(row[name]):.3f}  ", line)
            for name in ("acc_real", "acc_fake", "fool_rate", "coverage"):
                self.assertTrue(0 <= float(row[name]) <= 1)
                self.assertIn(f"  {name} {float(row[name]):.2f}  ", line)
            images = float(row["seconds"]) * float(row["images_per_s"])
            self.assertAlmostEqual(images, 6 * 32, places=3)
            self.assertIn(
                "LOW COVERAGE", line
            )  # the generator has learned next to nothing

    # -- what the lesson's functions promise to whoever copies them

    def test_train_step_learns_when_copied_alone(self):
        generator, discriminator = next(self.networks())
        names = {"nn": nn, "torch": torch, "R1_WEIGHT": 0.1, "TORCHRUN": False}
        names["bce"] = nn.functional.binary_cross_entropy_with_logits
        for name in self.copied:
            exec(inspect.getsource(getattr(self.module, name)), names)
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
            real, z, labels = (
                torch.rand(32, *self.shape),
                torch.randn(32, 7),
                self.labels(32),
            )
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
            self.assertAlmostEqual(
                result["loss_g"].item(), bce(logits, one).item(), places=5
            )
            self.assertEqual(result["fool_rate"], (logits > 0).float().mean())
            for new, old in zip(discriminator.parameters(), before.parameters()):
                torch.testing.assert_close(new.grad, old.grad)
            torch.testing.assert_close(generator[0].weight.grad, grad)
            self.assertTrue(
                all(weight.requires_grad for weight in discriminator.parameters())
            )

    def test_r1_is_the_squared_gradient_at_real_images(self):
        linear = nn.Linear(math.prod(self.shape), 1)
        penalty = self.module.r1_penalty(
            lambda x, *labels: linear(x.flatten(1)),
            torch.rand(5, *self.shape),
            *self.labels(5),
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
        self.assertAlmostEqual(
            average.running_mean.item(), start[0] + 0.002 * 3, places=5
        )
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

    def stop(self, variant, out, stop):
        """Stops a copy of the script after an epoch; returns its code and errors."""
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # also in the background
        flags = map(str, (*self.flags, *self.variants[variant], "--out-dir", out.name))
        process = subprocess.Popen(
            [sys.executable, self.copy_script().name, *flags],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            text=True,
        )
        while "epoch 1/3" not in process.stdout.readline():
            self.assertIsNone(process.poll())
        stop(process)
        text = process.communicate(timeout=60)[1]
        self.assertIn(self.epochs(out), (1, 2))
        return process.returncode, text

    def check_resumes(self, variant, out):
        self.quick.stop()
        self.assertIn("epoch 3/3", self.resume(out))
        for name in ("models/generator.pth", "models/discriminator.pth"):
            whole, resumed = load(self.runs / variant / name), load(out / name)
            self.assertEqual(list(whole), list(resumed))
            for key in whole:  # not the files: torch notes down names in ASCII alone
                self.assertTrue(whole[key].equal(resumed[key]), key)
        for name in ("images/epoch_003.png", "losses.png", *self.also_written):
            np.testing.assert_array_equal(
                read(self.runs / variant / name), read(out / name)
            )

    def test_ctrl_c_in_a_copied_script_on_an_old_console_and_resuming_to_the_same_end(
        self,
    ):
        variant = list(self.variants)[-1]
        out = self.folder / "Bilder \u00e4"
        (out / "history.csv").mkdir(parents=True)  # its warning names the folder
        windows = os.name == "nt"  # takes no SIGINT from another process
        interrupt = signal.SIGTERM if windows else signal.SIGINT
        code, text = self.stop(
            variant, out, lambda process: process.send_signal(interrupt)
        )
        if not windows:
            self.assertEqual(code, 1)
            self.assertIn('python my_gan.py --resume --out-dir "Bilder', text)
            self.assertNotIn("Traceback", text)
            self.assertTrue((out / "progress.gif").exists())
        self.check_resumes(variant, out)

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
        for content in (
            whole[: len(whole) // 2],
            b"",
            foreign,
            pickle.dumps(Payload()),
        ):
            path.write_bytes(content)
            self.assertIn(
                "damaged or not from this script", self.resume(path.parents[1], code=1)
            )
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
        settings = load(self.runs / self.default / "models" / "checkpoint.pth")[
            "settings"
        ]
        self.assertIsNone(settings["bf16"])
        for flag, name in (("--bf16", "bfloat16"), ("--no-bf16", "float32")):
            out = self.folder / flag
            self.assertIn(name, self.train(flag, "--out-dir", out))
            self.assertIn(name, self.resume(out))

    # -- when something is wrong

    def test_out_of_memory_names_a_smaller_batch_and_the_command(self):
        out = self.copy_run()
        error = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB."
        )
        with mock.patch.object(self.module, "train_step", side_effect=error):
            text = self.resume(out, "--epochs", 4, code=1)
        self.assertIn("--batch-size 16", text)
        self.assertIn("--resume", text)
        text = self.train("--latent-dim", 10**13, code=1)  # no machine has that much
        self.assertIn("Out of memory", text)

    def test_a_bug_keeps_its_traceback(self):
        with mock.patch.object(
            self.module, "train_step", side_effect=RuntimeError("a bug")
        ):
            with self.assertRaisesRegex(RuntimeError, "a bug"):
                self.train()

    def test_a_crash_in_the_first_step_leaves_a_run_that_resumes(self):
        with mock.patch.object(
            self.module, "train_step", side_effect=KeyboardInterrupt
        ):
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
        (
            out / "history.csv"
        ).mkdir()  # stands in for a file that a spreadsheet holds open
        text = self.resume(out, "--epochs", 4)
        self.assertIn("Warning", text)
        self.assertIn("history.csv", text)
        self.assertEqual(self.epochs(out), 4)

    def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_last_one_stays(
        self,
    ):
        out = self.copy_run()
        path = out / "models" / "checkpoint.pth"
        before = path.read_bytes()
        (out / "models" / "checkpoint.pth.tmp").mkdir()  # stands in for a full disk
        self.assertIn("--resume", self.resume(out, "--epochs", 4, code=1))
        self.assertEqual(path.read_bytes(), before)

    def test_flags_out_of_range_are_refused(self):
        out = self.folder / "out"
        for flag, value in (
            *(
                ("--epochs", 0),
                ("--batch-size", "ten"),
                ("--latent-dim", 0),
                ("--limit", 0),
            ),
            *(
                ("--sample-every", 0),
                ("--generate", 0),
                ("--beta1", 1),
                ("--beta1", -0.1),
            ),
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
        gpu = torch.device(
            "cuda:99"
        )  # stands in for one that PyTorch sees and cannot use
        with (
            mock.patch("torch.accelerator.current_accelerator", lambda **_: gpu),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            self.assertEqual(self.module.choose_device(None).type, "cpu")
        self.assertIn("cuda:99 cannot be used", printed.getvalue())

    # -- the data set

    def write_idx(self, pixels, labels):
        """Writes uint8 N x 28 x 28 in MNIST's format; returns the images' file."""
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
        """Returns the images of a grid as bytes of H x W x C, at their own size."""
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
                mock.patch.object(self.module, "URL", address, create=True),
                mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}),
                mock.patch("socket.setdefaulttimeout", lambda s: set_timeout(s / 100)),
                mock.patch.dict(NO_NETWORK, {"no_proxy": "127.0.0.1"}),
            ):
                self.assertIn("timed out", self.train_on_files(code=1))


class MnistTest(RunTests, Folder):
    script, shape, data_set = "gan_mnist.py", (1, 28, 28), gan_mnist.MNIST
    variants = {"mlp": (), "conv": ("--model", "conv")}
    kept = (("--model", "conv"), ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",))
    bad_flags = (("--model", "gru"),)
    data_file = "train-images-idx3-ubyte.gz"

    def networks(self):
        yield gan_mnist.MLPGenerator(7), gan_mnist.MLPDiscriminator()
        yield gan_mnist.ConvGenerator(7), gan_mnist.ConvDiscriminator()

    def labels(self, count):
        return ()

    def test_a_killed_and_resumed_run_ends_in_the_same_bytes(self):
        out = self.folder / "killed"
        self.stop("mlp", out, subprocess.Popen.kill)
        self.check_resumes("mlp", out)
        for name in ("models/generator.pth", "models/discriminator.pth"):
            whole, resumed = self.runs / "mlp" / name, out / name
            self.assertEqual(whole.read_bytes(), resumed.read_bytes())

    def test_grids_are_large_enough_to_see(self):
        for grid in (self.runs / "mlp" / "images").iterdir():
            self.assertEqual(read(grid).shape, self.grid(8, 8))

    def test_readmes_lines_load_the_averaged_generator(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("latent_dim=100", "latent_dim=7").replace(
            "(64, 100)", "(64, 7)"
        )
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
            self.assertEqual(
                [file.name for file in files], [f"{i:05d}.png" for i in range(5)]
            )
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
        images, labels = self.module.load_data(
            argparse.Namespace(toy=True, limit=64), *self.split
        )
        results = []
        for y in (labels, labels.flip(0)):
            out, data = self.folder / str(len(results)), (images, y)
            with mock.patch.object(
                self.module, "load_data", lambda *_, data=data, **__: data
            ):
                self.train("--out-dir", out)
            results.append((out / "models" / "generator.pth").read_bytes())
        self.assertEqual(results[0], results[1])
        plain, classes = (
            self.runs / name / "models" / "generator.pth" for name in self.variants
        )
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
            before = [
                copy.deepcopy(list(x.parameters())) for x in (generator, discriminator)
            ]
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
        with mock.patch.object(
            gan_fashion, "sample", lambda *_: fakes.repeat(5, 1, 1, 1)
        ):
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
        """Writes random images in CIFAR-10's layout, with checksums for torchvision.

        Yields the images, uint8 N x 32 x 32 x 3, and their labels.
        """
        folder, rng = (
            self.folder / "data" / "cifar-10-batches-py",
            np.random.default_rng(0),
        )
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
        letters = (
            letters.view(200, 10, -1, 32, 32).float().mean((0, 2))
        )  # 10 mean letters
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


class CelebaTest(RunTests, Folder):
    script, shape = "dcgan_celeba.py", (3, 32, 32)
    data_set = dcgan_celeba  # stands in for a class of torchvision's
    flags = (*RunTests.flags, "--image-size", 32)
    variants = {"plain": ()}
    kept = (("--image-size", 64), ("--latent-dim", 8), ("--beta1", 0.4), ("--toy",))
    bad_flags = (("--image-size", 100), ("--image-size", 16))
    also_written, first_lines, last_lines = ("images/nearest.png",), 2, 2
    copied = *RunTests.copied, "average_gradients"
    data_file = "img_align_celeba.zip"

    @classmethod
    def setUpClass(cls):
        patch = mock.patch.object(dcgan_celeba, "EPOCH_STEPS", 1)  # 100 would take long
        patch.start()
        cls.addClassCleanup(patch.stop)
        super().setUpClass()

    def copy_script(self):
        copy = super().copy_script()
        text = copy.read_text(encoding="utf-8")
        self.assertIn("EPOCH_STEPS = 100", text)
        copy.write_text(
            text.replace("EPOCH_STEPS = 100", "EPOCH_STEPS = 1"), encoding="utf-8"
        )
        return copy

    def networks(self):
        yield dcgan_celeba.Generator(7, 32), dcgan_celeba.Discriminator(32)

    def labels(self, count):
        return ()

    # -- networks, epochs, generating

    def test_networks_grow_with_the_image_size_and_a_mismatch_is_named(self):
        for size in (64, 128):
            generator, discriminator = dcgan_celeba.Generator(7, size), None
            images = dcgan_celeba.sample(generator, torch.randn(2, 7))
            self.assertEqual(images.shape, (2, 3, size, size))
            discriminator = dcgan_celeba.Discriminator(size)
            self.assertEqual(discriminator(images).shape, (2, 1))
            with self.assertRaisesRegex(ValueError, f"32.*{size}"):
                dcgan_celeba.Discriminator(32)(images)
        self.assertEqual(len(dcgan_celeba.Generator(7, 64)), 14)  # DCGAN's own

    def test_few_images_are_shown_several_times_per_epoch_in_small_batches(self):
        seen = []

        def record(generator, discriminator, opt_g, opt_d, real, *others):
            seen.append(real)
            zero = torch.zeros(())
            return dict.fromkeys(
                "loss_d loss_g acc_real acc_fake fool_rate".split(), zero
            )

        self.images(self.folder / "mine", 20)
        flags = (
            "--images",
            self.folder / "mine",
            "--data-dir",
            self.folder,
            "--no-flip",
        )
        flags += ("--epochs", 1, "--image-size", 32, "--out-dir", self.folder / "out")
        with (
            mock.patch.object(dcgan_celeba, "EPOCH_STEPS", 100),
            mock.patch.object(dcgan_celeba, "train_step", record),
        ):
            text = call(self.script, *flags)
        self.assertIn("100 updates: each image 80 times", text)
        self.assertEqual(torch.stack(seen).shape, (100, 16, 3, 32, 32))
        _, counts = torch.cat(seen).unique(dim=0, return_counts=True)
        self.assertEqual(counts.tolist(), [80] * 20)
        settings = load(self.folder / "out" / "models" / "checkpoint.pth")["settings"]
        self.assertEqual(settings["batch_size"], 16)

    def test_a_batch_larger_than_the_data_is_refused(self):
        self.assertIn("Fewer than 6", self.train("--limit", 5, code=1))
        self.train("--limit", 6)  # each image several times in a batch

    def test_generate_writes_n_images_and_nothing_else_into_a_new_folder(self):
        out = self.generate("plain", 5)
        files = sorted((out / "generated").iterdir())
        self.assertEqual(
            [file.name for file in files], [f"{i:05d}.png" for i in range(5)]
        )
        self.assertEqual({read(file).shape for file in files}, {(32, 32, 3)})
        self.assertEqual(len({file.read_bytes() for file in files}), 5)
        for name in ("generated_grid.png", "latent_walk.png", "images/epoch_000.png"):
            folder = out if "/" not in name else self.runs / "plain"
            self.assertEqual(read(folder / name).shape, self.grid(8, 8))

    def test_the_copy_ratio_tells_copies_from_new_images(self):
        torch.manual_seed(0)
        data = (torch.rand(150, 3, 8, 8) * 255).byte().repeat_interleave(4, 2)
        data = data.repeat_interleave(4, 3)
        new, real = (
            torch.rand(50, 3, 8, 8).repeat_interleave(4, 2) * 2 - 1,
            data / 127.5 - 1,
        )
        args = argparse.Namespace(out_dir=self.folder)
        for fake, low, high in (
            (new.repeat_interleave(4, 3), 0.9, 1.1),
            (real.flip(0)[:50] + 0.01, 0.0, 0.1),
        ):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                dcgan_celeba.check_copies(args, fake, real[:50], data)
            self.assertTrue(low < float(printed.getvalue()[11:15]) < high)
        grid = read(self.folder / "images" / "nearest.png") / 127.5 - 1
        self.assertEqual(grid.shape[1], 8 * 98 + 2)
        np.testing.assert_allclose(grid[98, 50], real[149, :, 0, 16], atol=0.01)

    # -- your own images

    def images(self, folder, count):
        """Writes PNG files of random colours; returns them, N x 32 x 32 x 3."""
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        return pixels

    def load(self, images=None, limit=None, size=32):
        """Returns what load_data reads, N x H x W x 3, and what it printed."""
        flags = dict(toy=False, images=images, limit=limit, image_size=size)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            data = dcgan_celeba.load_data(
                argparse.Namespace(**flags, data_dir=self.folder / "data")
            )
        pixels = data[torch.arange(len(data))].permute(0, 2, 3, 1).numpy()
        self.assertEqual(pixels.dtype, np.uint8)
        return pixels, printed.getvalue()

    def test_images_of_all_kinds_are_read_and_what_cannot_be_is_named(self):
        mine = self.folder / "mine"
        deep = mine / "deeper"
        for folder in (deep, mine / ".ipynb_checkpoints", mine / "__MACOSX"):
            folder.mkdir(parents=True)
            Image.new("RGB", (64, 64)).save(folder / "._hidden.png")
        Image.new("RGB", (64, 64)).save(mine / ".ipynb_checkpoints" / "a.png")
        red, half = (
            Image.new("RGB", (200, 80), "red"),
            Image.new("RGB", (8, 16), "blue"),
        )
        red.paste("blue", (0, 0, 40, 80))  # left of the middle
        half.paste("red", (0, 0, 4, 16))
        half.resize((64, 64)).quantize(2).save(mine / "0 palette.png", transparency=0)
        red.save(deep / "0 wide.JPG", "JPEG", quality=100)
        half.save(deep / "1 blue and red.bmp")
        turned = Image.Exif()
        turned[0x112] = 6  # shown after a quarter turn to the right
        half.resize((300, 600)).save(deep / "2 turned.jpg", exif=turned)
        red.convert("CMYK").save(deep / "3 cmyk.jpg", quality=100)
        Image.new("L", (70, 70), 90).save(deep / "4 grey.webp", lossless=True)
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(deep / "5 transparent.png")
        ramp = np.linspace(0, 65535, 64).astype(np.uint16)
        Image.fromarray(np.tile(ramp, (64, 1))).save(deep / "6 of 16 bits.png")
        half.save(deep / "7 damaged exif.png", exif=b"Exif\0\0damaged")
        whole = (deep / "2 turned.jpg").read_bytes()
        (deep / "8 cut off.jpg").write_bytes(whole[:3000])
        (deep / "8 is heic.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        Image.new("RGB", (7, 100)).save(deep / "8 small.png")
        (deep / "2 caption.txt").write_text("no image, and not counted by --limit")
        (deep / "annotations.json").write_text("{}")
        (deep / "a folder.png").mkdir()
        with contextlib.suppress(OSError):  # Windows wants a privilege for links
            (deep / "loop").symlink_to(mine, target_is_directory=True)
        pixels, text = self.load(mine)
        self.assertEqual(len(pixels), 9)
        for words in (
            "8 cut off.jpg",
            "cannot identify image file",
            "7 x 100 is below 8 x 8",
        ):
            self.assertIn(words, text)
        self.assertNotIn("caption", text)
        palette, wide, sides, turned, cmyk, grey, white, ramp, exif = pixels.astype(int)
        close = functools.partial(np.testing.assert_allclose, atol=6)
        self.assertEqual(sum((palette[16, x] == 255).all() for x in (5, 25)), 1)
        for image in (wide, cmyk):
            close(image, np.broadcast_to([254, 0, 0], (32, 32, 3)))
        for image in (sides, exif):
            close(image[16, [0, 31]], [[255, 0, 0], [0, 0, 255]])
        close(turned[[0, 31], 16], [[254, 0, 0], [0, 0, 254]])
        self.assertTrue((grey == 90).all() and (white == 255).all())
        close(ramp[16, [0, 16, 31], 0], [2, 130, 253])
        self.assertEqual(len(self.load(mine, limit=5)[0]), 5)

    def test_images_are_decoded_once_and_again_when_something_changes(self):
        mine = self.folder / "mine"
        expected = self.images(mine, 5)
        pixels, text = self.load(mine)
        np.testing.assert_array_equal(pixels, expected)
        self.assertIn("of 5 decoded", text)
        pixels, text = self.load(mine)
        np.testing.assert_array_equal(pixels, expected)
        self.assertEqual(text, "")
        np.testing.assert_array_equal(self.load(mine, limit=2)[0], expected[:2])
        self.assertEqual(self.load(mine, size=64)[0].shape, (5, 64, 64, 3))
        shutil.copy(mine / "000.png", mine / "004.png")
        np.testing.assert_array_equal(self.load(mine)[0][4], expected[0])
        (mine / "001.png").unlink()
        np.testing.assert_array_equal(self.load(mine)[0][1], expected[2])

        def decode(file, size):  # whoever edits it is not shown the old images
            return bytes(3 * size**2)

        with mock.patch.object(dcgan_celeba, "decode", decode):
            self.assertEqual(self.load(mine)[0].max(), 0)

    def test_a_failing_disk_stops_the_run_and_is_not_remembered(self):
        flags = ("--images", self.folder / "mine", "--data-dir", self.folder / "data")
        flags += ("--image-size", 32, "--epochs", 1, "--out-dir", self.folder / "out")
        self.images(self.folder / "mine", 6)
        for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):
            with mock.patch.object(Image, "open", side_effect=error):
                text = call(self.script, *flags, code=1)
            self.assertIn(error.strerror if error.args else "Stopped", text)
            self.assertEqual(list((self.folder / "data").iterdir()), [])
        with mock.patch(
            "tempfile.mkdtemp", side_effect=OSError(30, "Read-only file system")
        ):
            text = call(self.script, *flags, code=1)
        self.assertIn("--data-dir and --out-dir", text)
        self.assertIn("6 images", call(self.script, *flags))

    def test_memory_is_bounded_when_decoding_and_when_reading(self):
        self.images(self.folder / "mine", 40)
        running, most, lock = [], [], threading.Lock()

        def decode(file, size):
            with lock:
                running.append(file)
                most.append(len(running))
            time.sleep(0.01)
            with lock:
                running.remove(file)
            return bytes(3 * size**2)

        with (
            mock.patch.object(dcgan_celeba, "decode", decode),
            mock.patch("os.cpu_count", lambda: 64),
        ):
            self.load(self.folder / "mine")
        self.assertIn(max(most), (2, 3, 4))
        if not Path("/proc/self/statm").exists():
            return
        path = self.folder / "large"
        with open(path, "wb") as file:
            file.truncate(30_000 * 64 * 64 * 3)  # 369 MB
        data, pages = dcgan_celeba.DecodedImages(path, 64), []
        path.chmod(0o444)
        self.assertEqual(data[torch.tensor([5])].shape, (1, 3, 64, 64))
        for indices in torch.arange(len(data)).split(100):
            self.assertEqual(data[indices].shape, (100, 3, 64, 64))
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        self.assertLess((max(pages[1:]) - pages[0]) * os.sysconf("SC_PAGE_SIZE"), 100e6)

    def test_folders_that_cannot_be_learned_from_are_refused_by_name(self):
        empty = self.folder / "empty"
        empty.mkdir()
        (empty / "a.heic").write_text("")
        flags = ("--data-dir", self.folder / "data", "--out-dir", self.folder / "out")
        for folder in (empty, self.folder / "missing"):
            text = call(self.script, "--images", folder, *flags, code=1)
            self.assertIn(f"no images in {folder}", text)
        self.assertIn("HEIC", text)
        text = call(self.script, "--images", self.folder, *flags, code=1)
        self.assertIn("must not lie in --images", text)

    def test_a_run_finds_its_images_again_from_another_folder(self):
        self.images(self.folder / "mine", 8)
        flags = ("--image-size", 32, "--epochs", 1, "--out-dir", self.folder / "out")
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        call(self.script, "--images", "mine", *flags)
        os.chdir(here)
        data = ("--data-dir", self.folder / "data")
        self.assertIn(
            "epoch 2/2", self.resume(self.folder / "out", "--epochs", 2, *data)
        )
        (self.folder / "mine").rename(self.folder / "yours")
        text = self.resume(self.folder / "out", "--epochs", 3, *data, code=1)
        self.assertIn(str(self.folder / "mine"), text)

    def test_half_of_the_images_are_mirrored_unless_forbidden(self):
        pixels = self.images(self.folder / "mine", 64)
        plain = {image.tobytes() for image in pixels}
        mirrored = {image.tobytes() for image in pixels[:, :, ::-1]}
        train_step = dcgan_celeba.train_step
        for flags, expected in (((), (32, 32)), (("--no-flip",), (64, 0))):
            batches = []

            def record(*args, batches=batches):
                batches.append(args[4])
                return train_step(*args)

            with mock.patch.object(dcgan_celeba, "train_step", record):
                call(
                    *(self.script, "--images", self.folder / "mine", "--epochs", 1),
                    *(
                        "--data-dir",
                        self.folder,
                        "--image-size",
                        32,
                        "--batch-size",
                        32,
                    ),
                    *(*flags, "--out-dir", self.folder / str(len(flags))),
                )
            layout = torch.channels_last
            self.assertTrue(all(x.is_contiguous(memory_format=layout) for x in batches))
            seen = ((torch.cat(batches) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
            seen = {image.numpy().tobytes() for image in seen}
            self.assertEqual((len(seen & plain), len(seen & mirrored)), expected)

    # -- CelebA

    def test_celeba_is_found_in_every_layout(self):
        expected = self.images(self.folder / "img_align_celeba", 3)
        data = self.folder / "data"
        for place in (
            "celeba/img_align_celeba",
            "img_align_celeba/img_align_celeba",
            ".zip",
        ):
            if place == ".zip":
                data.mkdir()
                shutil.make_archive(
                    data / "img_align_celeba", "zip", self.folder, "img_align_celeba"
                )
            else:
                shutil.copytree(self.folder / "img_align_celeba", data / place)
            np.testing.assert_array_equal(self.load()[0], expected)
            shutil.rmtree(data)

    @contextlib.contextmanager
    def server(self, content, sent):
        """A web server on the loopback address; sends the first bytes of content."""

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
            with (
                mock.patch.multiple(dcgan_celeba, URL=address, MD5=md5),
                mock.patch.dict(os.environ, NO_NETWORK | {"no_proxy": "127.0.0.1"}),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                yield
            server.shutdown()

    def test_celeba_is_fetched_and_nothing_but_the_whole_archive_is_taken_for_it(self):
        expected = self.images(self.folder / "img_align_celeba", 3)
        archive = shutil.make_archive(
            self.folder / "x", "zip", self.folder, "img_align_celeba"
        )
        content = Path(archive).read_bytes()
        for sent, md5 in ((len(content) // 2, None), (len(content), "0" * 32)):
            with self.server(content, sent):
                with mock.patch.object(dcgan_celeba, "MD5", md5 or dcgan_celeba.MD5):
                    for _ in range(
                        2
                    ):  # what the first attempt left is not taken for it
                        with self.assertRaisesRegex(SystemExit, "img_align_celeba.zip"):
                            self.load()

        def unpack(archive, folder):  # until the disk is full
            self.images(Path(folder, "img_align_celeba"), 1)
            raise OSError(28, "No space left on device")

        (self.folder / "data" / "img_align_celeba.zip").write_bytes(content)
        with mock.patch.object(dcgan_celeba, "extract_archive", unpack):
            for _ in range(2):
                with self.assertRaisesRegex(SystemExit, "No space left"):
                    self.load()
        (self.folder / "data" / "img_align_celeba.zip").unlink()
        with self.server(content, len(content)):
            np.testing.assert_array_equal(self.load()[0], expected)
        with self.server(b"", 0):  # no need of it any more
            np.testing.assert_array_equal(self.load()[0], expected)
        damaged = (
            self.folder / "data" / "img_align_celeba.zip"
        )  # as if put there by hand
        shutil.rmtree(self.folder / "data")
        damaged.parent.mkdir()
        damaged.write_bytes(content[:-10])
        with self.assertRaisesRegex(SystemExit, "BadZipFile"):
            self.load()
        self.assertEqual(damaged.read_bytes(), content[:-10])

    # -- several processes

    def test_settings_of_a_cluster_that_is_not_torchrun_are_ignored(self):
        with mock.patch.dict(os.environ, WORLD_SIZE="4", RANK="3", LOCAL_RANK="3"):
            spec = importlib.util.spec_from_file_location("fresh", HERE / self.script)
            fresh = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(fresh)
            with mock.patch("sys.argv", [self.script]):
                args = fresh.parse_args()
        self.assertEqual((args.rank, args.processes), (0, 1))

    @unittest.skipIf(os.name == "nt", "torchrun on Windows needs settings of its own")
    def test_processes_share_each_epoch_learn_the_same_and_resume(self):
        (self.folder / "recorder.py").write_text(
            textwrap.dedent("""
                import os, torch, dcgan_celeba as script
                script.EPOCH_STEPS, seen, z = 1, [], []
                train_step, update = script.train_step, script.update_average

                def record(*args):
                    seen.append(args[4].clone())
                    z.append(args[5])
                    return train_step(*args)

                def keep(average, generator, step):
                    update(average, generator, step)
                    weights = [x.detach().clone() for x in generator.parameters()]
                    torch.save([torch.cat(seen), torch.cat(z), weights],
                               "rank" + os.environ["RANK"])

                script.train_step, script.update_average = record, keep
                if __name__ == "__main__":
                    script.main()
            """)
        )

        def torchrun(*flags):
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                + ["--nproc-per-node=2", "recorder.py", *map(str, flags)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(HERE)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        pixels = self.images(self.folder / "mine", 200)
        flags = (
            "--images",
            "mine",
            "--no-flip",
            "--image-size",
            32,
            "--batch-size",
            32,
        )
        flags += ("--epochs", 2, "--out-dir")
        process = torchrun(*flags, "whole")
        printed, errors = process.communicate(timeout=300)
        self.assertEqual(process.returncode, 0, errors)
        lines = [
            line.split()[:2] for line in printed.splitlines() if line[:5] == "epoch"
        ]
        self.assertEqual(lines, [["epoch", "1/2"], ["epoch", "2/2"]])
        ranks = [load(self.folder / f"rank{i}") for i in (0, 1)]
        for old, new in zip(ranks[0][2], ranks[1][2]):
            self.assertTrue(old.equal(new))
        self.assertFalse(ranks[0][1].equal(ranks[1][1]))  # each has a z of its own
        seen = torch.cat(
            [rank[0].reshape(2, 96, -1) for rank in ranks], 1
        )  # 200 // 64 = 3 steps
        for epoch in seen:
            self.assertEqual(len(epoch.unique(dim=0)), 192)  # no image twice
        self.assertLess(seen.max(), 1.01)
        self.assertEqual(len(pixels), 200)

        process = torchrun(*flags, "cut")
        while not process.stdout.readline().startswith("epoch 1"):
            self.assertIsNone(process.poll())
        process.terminate()
        process.communicate(timeout=60)
        process = torchrun("--resume", "--out-dir", "cut")
        self.assertIn("epoch 2/2", process.communicate(timeout=300)[0])
        for name in ("generator.pth", "discriminator.pth"):
            whole, cut = (
                self.folder / out / "models" / name for out in ("whole", "cut")
            )
            self.assertEqual(whole.read_bytes(), cut.read_bytes())


if __name__ == "__main__":
    unittest.main()
