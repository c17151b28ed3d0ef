"""Tests of the four scripts. Run them with  python -m unittest  (or pytest).

The lesson is tested by writing it out: the same epoch, average, coverage, grids and
walks are computed here from their formulas, and compared. Files, flags and faults are
tested by running the real commands on --toy images or on small files written here, most
of them by calling main(), as a process takes seconds to start. Nothing is downloaded.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import io
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # small networks: more threads would only wait
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # nowhere
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD

import dcgan_celeba
import dcgan_cifar10
import gan_fashion
import gan_mnist
from common import init_weights, save_grid

HERE = Path(__file__).resolve().parent
# A short run on the CPU, where a resumed run ends in the same bytes.
FLAGS = """--toy --limit 200 --batch-size 32 --latent-dim 7 --epochs 2 --sample-every 3
    --beta1 0.4 --seed 1 --device cpu"""


def call(script, *flags, code=0):
    """Runs a script's main(), asserts its exit code and returns all that it printed.

    flags: strings, which are split into words, and paths.
    """
    printed, found = io.StringIO(), 0
    words = [[flag] if isinstance(flag, Path) else flag.split() for flag in flags]
    with (
        mock.patch("sys.argv", [script, *map(str, sum(words, []))]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("error")
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stop:
            printed.write(str(stop.code))
            found = stop.code if isinstance(stop.code, int) else 1
    text = printed.getvalue()
    assert found == code, f"{flags}: exit code {found}, not {code}\n{text}"
    return text


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=atol)


def distances(image, images):
    """The distances of an image to each of several, all given as rows of numbers."""
    return (images - image).norm(dim=1).sort().values


def coverage_by_hand(real, fakes):
    covered = [
        distances(image, fakes)[0] < distances(image, real)[5]  # [0] is to itself
        for image in real
    ]
    return sum(covered) / len(real)


def descend(network, rate):
    for weight in network.parameters():
        weight.data -= rate * weight.grad


def median_distance(images, training):
    nearest = sorted(distances(image, training)[0] for image in images)
    return nearest[(len(nearest) - 1) // 2]


class Folder(unittest.TestCase):
    """A test with a temporary folder, self.folder, of its own."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.out = self.folder / "out"

    def assert_grid(self, path, images, columns):
        """Asserts that a PNG file shows these images."""
        save_grid(images, self.folder / "expected.png", columns)
        expected = read(self.folder / "expected.png")
        np.testing.assert_allclose(read(path), expected, atol=1)


class CommonTest(Folder):
    def test_a_grid_shows_every_pixel_as_it_is(self):
        for size, scale in (28, 3), (64, 1):
            images = torch.rand(5, 3, size, size) * 2.2 - 1.1  # some is clipped
            save_grid(images, self.out / "grid.png", columns=3)
            grid, cell = read(self.out / "grid.png"), scale * size + 2
            assert grid.shape == (2 * cell + 2, 3 * cell + 2, 3)
            shown = grid[2:cell:scale, cell + 2 : 2 * cell : scale]  # the second image
            expected = (images[1].clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5
            np.testing.assert_allclose(shown, expected, atol=0.51)

    def test_what_is_no_grid_is_refused(self):
        for shape in (3, 8, 8), (1, 2, 8, 8), (0, 3, 8, 8), (1, 1, 8, 8):
            with self.assertRaises(ValueError):
                save_grid(torch.zeros(shape), self.out / "grid.png", len(shape) - 4)

    def test_weights_are_initialised_as_the_dcgan_paper_says(self):
        torch.manual_seed(0)
        for layer in (
            *(nn.Linear(200, 200), nn.Conv2d(64, 64, 4), nn.ConvTranspose2d(64, 64, 4)),
            *(nn.BatchNorm1d(5000), nn.BatchNorm2d(5000)),
        ):
            nn.init.ones_(layer.bias)
            layer.apply(init_weights)
            mean = int("BatchNorm" in str(layer))
            assert abs(layer.weight.mean() - mean) < 0.002, layer
            assert abs(layer.weight.std() - 0.02) < 0.002
            assert not layer.bias.any()

    def test_each_script_runs_by_itself(self):
        for file in HERE.glob("*gan_*.py"):
            printed = io.StringIO()
            with (
                mock.patch("sys.argv", [file.name, "-h"]),
                contextlib.redirect_stdout(printed),
                self.assertRaises(SystemExit),
            ):
                runpy.run_path(str(file), run_name="__main__")
            assert "--generate" in printed.getvalue()


class Script:
    """What each of the four scripts promises; a class for each script fills it in.

    All tests of a class share a short run of each of its variants, in self.runs.
    """

    variants, flags, bad_flags = {"plain": ""}, FLAGS, ()
    g_steps, mirrored, r1, dropout = 1, (False,), 0, {}
    # Of --generate's grid, of walks (rows, columns), and of the coverage of an epoch.
    drawn, walk, fakes = 64, (8, 8), 1000
    real_columns = 8
    switches = ()  # of train_step(), after the images and z
    numbers = "loss_d loss_g acc_real acc_fake fool_rate"
    files = """images/real.png images/epoch_000.png images/epoch_002.png losses.png
        models/generator.pth models/discriminator.pth models/checkpoint.pth
        history.csv progress.gif"""

    @classmethod
    def setUpClass(cls):
        cls.module = importlib.import_module(cls.script.removesuffix(".py"))
        assert cls.module.MIN_EPOCH_STEPS == 100  # which take too long here
        few = mock.patch.object(cls.module, "MIN_EPOCH_STEPS", 1)
        few.start()
        cls.addClassCleanup(few.stop)
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.printed = {
            variant: call(cls.script, cls.flags, flags, "--out-dir", cls.runs / variant)
            for variant, flags in cls.variants.items()
        }

    def setUp(self):
        super().setUp()
        # Curves take most of the time of a short run, and setUpClass has drawn some.
        no_curves = mock.patch.object(self.module, "plot_history")
        no_curves.start()
        self.addCleanup(no_curves.stop)

    def copy_run(self):
        """Copies the first variant's run to self.out. Returns its checkpoint's path."""
        shutil.copytree(self.runs / [*self.variants][0], self.out)
        return self.out / "models" / "checkpoint.pth"

    def train(self, *flags, code=0):
        """Trains for one epoch of two updates in the new folder self.out."""
        flags = self.flags, "--limit 64 --epochs 1", *flags, "--out-dir", self.out
        return call(self.script, *flags, code=code)

    def resume(self, *flags, code=0):
        return call(self.script, "--resume", *flags, "--out-dir", self.out, code=code)

    # -- what differs between the scripts

    def networks(self):
        """Returns pairs of an untrained generator, for z of 7, and discriminator."""
        return [(self.module.Generator(7), self.module.Discriminator())]

    def untrained(self, variant):
        """Returns the pair with which a run begins, if the seed has just been set."""
        generator, discriminator = self.networks()[0]
        return generator.apply(init_weights), discriminator.apply(init_weights)

    def epoch_inputs(self, data):
        """Returns what train_epoch() takes between the epoch and the networks."""
        return (data.repeat(2, 1, 1, 1),)

    def labels(self, count):
        """Returns what networks take besides images: labels in a tuple, or ()."""
        return ()

    def labels_of_fakes(self, variant, count):
        return ()

    def rows(self, images):
        """Returns images as the rows of numbers by which coverage compares them."""
        return images.flatten(1)

    def load_real(self, data, targets, *inputs):
        """Returns what load_data() makes of images that torchvision has read."""

        def read_files(data_set, *_, **__):
            data_set.data, data_set.targets = data, targets

        args = argparse.Namespace(toy=False, data_dir="", limit=9)
        with mock.patch.object(self.data_set, "__init__", read_files):
            return self.module.load_data(args, *inputs)

    def repeated(self, flag):
        """Returns the inputs of an epoch of at least 7 updates on 200 images."""
        self.out = self.folder / f"out {flag}"
        stop = mock.patch.object(
            self.module, "train_epoch", side_effect=KeyboardInterrupt
        )
        with stop as train_epoch, mock.patch.object(self.module, "MIN_EPOCH_STEPS", 7):
            self.train("--limit 200", flag, code=1)
        return train_epoch.call_args.args

    # -- the lesson

    def test_an_epoch_is_what_the_formulas_say(self):
        torch.set_default_dtype(torch.float64)  # so that rounding does not matter
        self.addCleanup(torch.set_default_dtype, torch.float32)
        torch.manual_seed(5)
        data = torch.randint(256, (12, *self.shape), dtype=torch.uint8)
        args = argparse.Namespace(seed=3, epochs=2, batch_size=4, latent_dim=7, lr=0.02)
        args.g_steps = self.g_steps
        cases = [(pair, flip) for flip in self.mirrored for pair in self.networks()]
        for networks, args.flip in cases:
            trained = *networks, copy.deepcopy(networks[0])
            by_hand = copy.deepcopy(trained)
            opts = [SGD(network.parameters(), 9) for network in networks]
            sizes = {"R1_INTERVAL": 2, "MIN_EPOCH_STEPS": 6}
            with mock.patch.multiple(self.module, **sizes, create=True):
                inputs = *self.epoch_inputs(data), *trained, *opts
                row = self.module.train_epoch(args, 2, *inputs)
            means = self.epoch_by_hand(args, data, *by_hand)
            for network, other in zip(trained, by_hand, strict=True):
                close(network.state_dict(), other.state_dict())
            # G's updates have left no gradients in D.
            pairs = zip(trained[1].parameters(), by_hand[1].parameters(), strict=True)
            for weight, other in pairs:
                close(weight.grad, other.grad)
            for i, name in enumerate(self.numbers.split()):
                assert abs(row[name] - means[i]) < 1e-4, name
            assert abs(row["images_per_s"] * row["seconds"] - 24) < 0.01

    def epoch_by_hand(self, args, data, generator, discriminator, average):
        """The second epoch of two, in which 12 images make 6 batches of 4."""
        labels, results = self.labels(12), []
        torch.manual_seed(args.seed * 10_000 + 2)
        order = torch.randperm(24) % 12
        for step in range(6, 12):
            rate = args.lr * (12 - step) / 12
            chosen = order[4 * step - 24 :][:4]
            real = data[chosen] / 255 * 2 - 1
            if args.flip:
                mirror = torch.rand(4) < 0.5
                real[mirror] = real[mirror].flip(3)
            z = torch.randn(4, 7)
            y = [each[chosen] for each in labels]

            fake = generator(z, *y)
            p_real = discriminator(real, *y).sigmoid()
            p_fake = discriminator(fake.detach(), *y).sigmoid()
            loss_d = -p_real.log().mean() - (1 - p_fake).log().mean()
            if step % args.g_steps == 0:
                discriminator.zero_grad()
                loss_d.backward()
                if self.r1 and step % (2 * args.g_steps) == 0:
                    half = real[:2].requires_grad_()
                    logits = discriminator(half, *(each[:2] for each in y)).sum()
                    (slope,) = torch.autograd.grad(logits, half, create_graph=True)
                    (16 * self.r1 * slope.square().sum() / 2).backward()
                descend(discriminator, rate)

            p_new = discriminator(fake, *y).sigmoid()
            loss_g = -p_new.log().mean()
            generator.zero_grad()
            loss_g.backward(inputs=[*generator.parameters()])
            descend(generator, rate)

            keep = (step + 1) / (step + 10)
            states = average.state_dict().values(), generator.state_dict().values()
            for old, new in zip(*states, strict=True):
                if old.is_floating_point():
                    old.copy_(keep * old + (1 - keep) * new)
            rates = p_real > 0.5, p_fake < 0.5, p_new > 0.5
            results.append([loss_d, loss_g, *(each.float().mean() for each in rates)])
        return torch.tensor(results).mean(0)

    def test_a_step_returns_numbers_without_a_graph(self):
        for networks in self.networks():
            opts = [SGD(network.parameters(), 0.1) for network in networks]
            inputs = torch.rand(4, *self.shape), *self.labels(4), torch.randn(4, 7)
            result = self.module.train_step(*networks, *opts, *inputs, *self.switches)
            for value in result.values():
                assert value.shape == () and not value.requires_grad

    def test_the_average_spans_about_500_updates(self):
        average, generator = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        generator.weight.data.fill_(3)
        self.module.update_average(average, generator, 10_000)  # begins at 1
        assert abs(average.weight - (1 + 0.002 * 2)) < 1e-6

    def test_coverage_is_what_its_definition_says(self):
        torch.manual_seed(0)
        shapes = torch.randn(10, *self.shape).repeat(5, 1, 1, 1)
        real, fakes = shapes + torch.randn(2, 50, *self.shape)
        half = fakes[torch.arange(50) % 10 < 5]  # the other shapes are missing
        for images in fakes, half, real + 9:
            expected = coverage_by_hand(self.rows(real), self.rows(images))
            assert abs(self.module.coverage(real, images) - expected) < 1e-6

    def test_strides_slopes_dropout_and_r1_are_as_documented(self):
        for generator, discriminator in self.networks():
            x = torch.rand(4, *self.shape)
            for layer in discriminator:
                before, x = x.size(-1), layer(x)
                if getattr(layer, "stride", 0) == (2, 2):
                    assert x.size(-1) == before / 2
            for layer in *generator, *discriminator:
                assert getattr(layer, "negative_slope", 0.2) == 0.2
            dropped = [layer.p for layer in discriminator if hasattr(layer, "p")]
            assert dropped == self.dropout.get(type(discriminator).__name__, [])
        if self.r1:
            assert self.module.R1_INTERVAL == 16
            assert self.module.R1_WEIGHT == 16 * self.r1

    def test_samples_are_drawn_in_evaluation_mode_and_change_nothing(self):
        for generator, _ in self.networks():
            generator(3 + torch.randn(8, 7), *self.labels(8))  # moves its statistics
            before, z = copy.deepcopy(generator), torch.randn(501, 7)
            images = self.module.sample(generator, z, *self.labels(501))
            assert generator.training and not images.requires_grad
            close(generator.state_dict(), before.state_dict())
            close(images, before.eval()(z, *self.labels(501)).detach())
            assert images.shape == (501, *self.shape) and images.abs().max() <= 1

    def test_a_run_begins_at_its_seed_and_reports_its_averaged_generator(self):
        data, labels = self.toy_images()
        for variant, (rows, columns) in self.grids.items():
            images = self.runs / variant / "images"
            checkpoint = load(self.runs / variant / "models" / "checkpoint.pth")
            torch.manual_seed(1)
            generator, _ = self.untrained(variant)
            z, order = torch.randn(self.fakes, 7), torch.randperm(200)
            y = self.labels_of_fakes(variant, self.fakes)
            first = self.module.sample(generator, z, *y)
            generator.load_state_dict(checkpoint["average"])
            last = self.module.sample(generator, z, *y)
            for name, fakes in ("epoch_000.png", first), ("epoch_002.png", last):
                self.assert_grid(images / name, fakes[: rows * columns], columns)
            shown = self.shown_images(data[order], data, labels)
            self.assert_grid(images / "real.png", shown / 127.5 - 1, self.real_columns)
            for opt in checkpoint["opt_g"], checkpoint["opt_d"]:
                assert opt["param_groups"][0]["betas"] == (0.4, 0.999)
                assert all("exp_avg_sq" in each for each in opt["state"].values())

    def test_generate_draws_a_grid_walks_and_images_from_the_average(self):
        for variant, (rows, columns) in self.grids.items():
            out = self.folder / variant
            shutil.copytree(self.runs / variant / "models", out / "models")
            flags = "--generate 13 --out-dir", out, "--data-dir", self.folder
            call(self.script, *flags)
            generator, _ = self.untrained(variant)
            average = load(out / "models" / "checkpoint.pth")["average"]
            generator.load_state_dict(average)
            sample = functools.partial(self.module.sample, generator)
            torch.manual_seed(1)
            y = self.labels_of_fakes(variant, self.drawn)
            grid = sample(torch.randn(self.drawn, 7), *y)[: rows * columns]
            self.assert_grid(out / "generated_grid.png", grid, columns)
            starts, ends = torch.randn(2, self.walk[0], 1, 7)
            turn = torch.linspace(0, 90, self.walk[1]).deg2rad()[:, None]
            walk = (starts * turn.cos() + ends * turn.sin()).flatten(0, 1)
            walk = sample(walk, *self.labels_of_fakes(variant, len(walk)))
            self.assert_grid(out / "latent_walk.png", walk, self.walk[1])
            y = [torch.arange(13) % (max(each) + 1) for each in y]
            images = sample(torch.randn(13, 7), *y)
            assert len([*(out / "generated").rglob("*.*")]) == 13
            for i, image in enumerate(images):
                k = f"{i % 10}_{self.names[i % 10]}" if variant == "classes" else ""
                shown = read(out / "generated" / k / f"{i:05d}.png").flatten()
                expected = ((image.permute(1, 2, 0) + 1) * 127.5).flatten()
                np.testing.assert_allclose(shown, expected, atol=0.6)
        assert "generated_2" in call(self.script, *flags, "--seed 2")
        self.assert_grid(out / "generated_grid.png", grid, columns)
        with self.assertRaises(AssertionError):  # another seed draws other images
            self.assert_grid(out / "generated_grid_2.png", grid, columns)

    def test_the_docstrings_lines_load_the_averaged_generator(self):
        code = textwrap.dedent(self.module.__doc__.split("generator.pth:\n")[1])
        average, names = load(self.copy_run())["average"], {}
        path = self.out / "models" / "generator.pth"
        code = code.replace("generator.pth", path.as_posix()).replace("100", "7")
        exec(code.replace("size=64", "size=32"), names)
        assert names["images"].shape == (64, *self.shape)
        close(names["generator"].state_dict(), average)

    # -- runs and resuming

    def test_a_run_writes_its_files_and_prints_what_is_in_them(self):
        for variant, text in self.printed.items():
            out = self.runs / variant
            files = {file.relative_to(out).as_posix() for file in out.rglob("*.*")}
            assert files == set(self.files.split())
            with Image.open(out / "progress.gif") as picture:
                assert picture.n_frames == 2
            assert "200 images" in text and "LOW COVERAGE" in text  # it learned little
            with open(out / "history.csv", newline="") as file:
                rows = [*csv.DictReader(file)]
            lines = re.findall("^epoch.*", text, re.M)
            for i, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
                assert f"epoch {i}/2  " in line
                for name in f"{self.numbers} coverage".split():
                    shown = float(re.search(f"{name} (\\S+)", line)[1])
                    assert abs(shown - float(row[name])) < 0.006, name

    def test_a_run_stopped_by_ctrl_c_ends_as_if_it_had_not_been(self):
        (self.out / "history.csv").mkdir(parents=True)  # cannot be written
        variant, flags = [*self.variants.items()][-1]
        flags = self.flags, flags, "--resume --out-dir", self.out
        with mock.patch.object(
            self.module, "print_epoch", side_effect=KeyboardInterrupt
        ):
            text = call(self.script, *flags, code=1)
        for words in "no run", "Warning", "--resume", str(self.out):
            assert words in text
        assert (self.out / "progress.gif").exists()
        assert re.search("has done 1 of 2 (.*\n)*epoch 2/2 ", self.resume())
        for name in self.files.split()[:3]:
            assert (self.out / name).read_bytes() == (
                self.runs / variant / name
            ).read_bytes()
        for name in "models/generator.pth", "models/discriminator.pth":
            old, new = load(self.runs / variant / name), load(self.out / name)
            assert all(old[key].equal(new[key]) for key in old)

    def test_resume_takes_flags_from_the_run_unless_they_are_given_anew(self):
        path = self.copy_run()
        # Coverage is of real images in [-1, 1], as fakes are.
        coverage = mock.patch.object(
            self.module, "coverage", wraps=self.module.coverage
        )
        with coverage as coverage:
            text = self.resume("--epochs 3 --lr 1e-4 --limit 64")
        real, _ = coverage.call_args.args
        assert -1 <= real.min() and 0.5 < real.max() <= 1
        assert "has done 2 of 3" in text and "epoch 3/3" in text
        checkpoint = load(path)
        settings = checkpoint["settings"]
        assert (settings["lr"], settings["batch_size"]) == (1e-4, 32)
        settings["toy"] = False
        torch.save(checkpoint, path)
        for flag in self.kept, "--latent-dim 8", "--beta1 0.5", "--toy":
            assert f"has {flag.split()[0]} " in self.resume(flag, code=1)

    # -- when something is wrong

    def test_a_bad_checkpoint_is_refused_and_stays(self):
        path = self.copy_run()
        torch.save(argparse.Namespace(), path)  # a class of Python's
        for content in path.read_bytes(), path.read_bytes()[:99]:
            path.write_bytes(content)
            assert "damaged or not from this script" in self.resume(code=1)
            assert path.read_bytes() == content
        flags = "--generate 1 --out-dir", self.folder / "new"
        assert "Train first" in call(self.script, *flags, code=1)

    def test_errors_are_explained_and_bugs_are_not_hidden(self):
        assert "smaller --lr" in self.train("--lr 1e30", code=1)
        weights = load(self.out / "models" / "generator.pth").values()
        assert all(value.isfinite().all() for value in weights)
        self.out = self.folder / "bug"
        with mock.patch.object(self.module, "train", side_effect=RuntimeError):
            with self.assertRaises(RuntimeError):
                self.train()

    def test_what_exists_is_never_overwritten_or_lost(self):
        path = self.copy_run()
        before = path.read_bytes()
        assert "--resume" in self.train(code=1)
        path.with_suffix(".pth.tmp").mkdir()  # stands in for a full disk
        assert "--resume" in self.resume("--epochs 3", code=1)
        assert path.read_bytes() == before

    def test_flags_that_do_not_fit_are_refused_before_anything_is_written(self):
        for flag in (
            *("--epochs 0", "--batch-size 0", "--latent-dim 0", "--limit 0"),
            *("--sample-every 0", "--generate 0", "--beta1 1", "--beta1 -0.1"),
            *("--lr 0", "--lr nan", *self.bad_flags),
        ):
            text = call(self.script, flag, "--out-dir", self.out, code=2)
            assert flag.split()[0] in text.split("error:")[1]
        assert "cuda:99" in self.train("--device cuda:99", code=1)
        assert "--batch-size" in self.train("--limit 31", code=1)
        assert "--batch-size" in self.train("--batch-size 1", code=1)
        assert not self.out.exists()

    def test_a_failed_download_names_the_files(self):
        flags = "--data-dir", self.folder, "--out-dir", self.out
        text = call(self.script, *flags, code=1)
        for word in (self.data_file, str(self.folder), "--toy"):
            assert word in text
        assert socket.getdefaulttimeout() == 60  # of a server that falls silent

    def test_a_closed_terminal_or_a_moved_folder_loses_no_epoch(self):
        def move(text, **_):
            if text.startswith("epoch 1"):
                self.out.rename(self.folder / "moved")
            raise OSError("the terminal is closed")

        self.out.mkdir()
        (self.out / ".DS_Store").touch()  # this is no run
        with mock.patch("builtins.print", side_effect=move):
            # Here the batch is as large as the data.
            call(self.script, self.flags, self.smallest, "--out-dir", self.out)
        assert len(load(self.out / "models" / "checkpoint.pth")["history"]) == 2


class MnistTest(Script, Folder):
    script, shape, data_set = "gan_mnist.py", (1, 28, 28), gan_mnist.MNIST
    variants = {"mlp": "", "conv": "--model conv"}
    grids, walk = {"mlp": (8, 8), "conv": (8, 8)}, (8, 10)
    dropout = {"MLPDiscriminator": [0.2], "ConvDiscriminator": [0.5]}
    kept, smallest = "--model conv", "--limit 6 --batch-size 6"
    data_file, numbers = "train-images-idx3-ubyte.gz", "loss_d loss_g"

    def networks(self):
        mlp = gan_mnist.MLPGenerator(7), gan_mnist.MLPDiscriminator()
        return [mlp, (gan_mnist.ConvGenerator(7), gan_mnist.ConvDiscriminator())]

    def untrained(self, variant):
        generator = gan_mnist.GENERATORS[variant](7).apply(init_weights)
        discriminator = gan_mnist.DISCRIMINATORS[variant]()
        return generator, discriminator.apply(init_weights)

    def toy_images(self):
        return gan_mnist.draw_digits(200), None

    def shown_images(self, shuffled, data, labels):
        return shuffled[:64]

    def test_the_defaults_of_each_pair_are_those_of_the_help(self):
        for model, expected in ("mlp", (50, 2e-3, 0.5)), ("conv", (16, 8e-3, 0)):
            with mock.patch("sys.argv", ["gan_mnist.py", "--model", model]):
                args = gan_mnist.parse_args()
            assert (args.epochs, args.lr, args.beta1) == expected

    def test_data_is_read_and_few_images_are_repeated(self):
        pixels = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
        assert self.load_real(pixels, None).equal(pixels[:9, None])
        assert self.repeated("")[2].equal(self.toy_images()[0].repeat(2, 1, 1, 1))


class ClassTests(Script):
    """What the two scripts with --conditional promise besides."""

    variants = {"plain": "", "classes": "--conditional"}
    kept, smallest = "--conditional", "--limit 6 --batch-size 6"

    def labels(self, count):
        return (torch.arange(count) % 10,)

    def labels_of_fakes(self, variant, count):
        classes = 10 if variant == "classes" else 1
        return (torch.arange(count) // self.per_class % classes,)

    def test_each_class_has_images_and_a_logit_of_its_own(self):
        generator, discriminator = self.networks()[0]
        images = self.module.sample(generator, torch.ones(10, 7), torch.arange(10))
        assert len(images.unique(dim=0)) == 10
        logits = discriminator(images[:1].expand(images.shape), torch.arange(10))
        assert len(logits.unique()) == 10

    def test_few_images_are_repeated_with_their_labels_if_conditional(self):
        data, labels = self.toy_images()
        for flag, classes in ("", 1), ("--conditional", 10):
            *_, seen, seen_labels = self.repeated(flag)
            assert seen.equal(data.repeat(2, 1, 1, 1))
            assert seen_labels.equal(labels.repeat(2) % classes)


class FashionTest(ClassTests, Folder):
    script, shape, data_set = "gan_fashion.py", (1, 28, 28), gan_fashion.FashionMNIST
    grids, walk = {"plain": (9, 9), "classes": (10, 10)}, (10, 10)
    drawn, per_class, real_columns, g_steps, r1 = 100, 10, 10, 2, 0.25
    switches = True, True
    names = "ABCDEFGHIJ"
    bad_flags = ("--g-steps 0",)
    data_file = "train-images-idx3-ubyte.gz"
    files = f"{Script.files} images/nearest.png"

    def untrained(self, variant):
        generator = gan_fashion.Generator(7).apply(init_weights)
        return generator, gan_fashion.Discriminator().apply(init_weights)

    def epoch_inputs(self, data):
        return data.repeat(2, 1, 1, 1), self.labels(12)[0].repeat(2)

    def toy_images(self):
        return gan_fashion.draw_letters(200, True)

    def shown_images(self, shuffled, data, labels):
        return torch.cat([data[labels == k][:10] for k in range(10)])

    def test_the_copy_ratio_and_nearest_images_are_what_they_say(self):
        torch.manual_seed(0)
        training, held_out, new = torch.rand(3, 48, 1, 28, 28)
        copies, path = training.flip(0) + 0.01 * new, self.folder / "nearest.png"
        rows, real = training.flatten(1), held_out.flatten(1)
        for fakes in new, copies:
            expected = median_distance(fakes.flatten(1), rows) / median_distance(
                real, rows
            )
            found = gan_fashion.copy_ratio(fakes, held_out, training)
            assert abs(found - expected) < 1e-4
        gan_fashion.show_nearest(copies, held_out, training, path)
        nearest = [(rows - image).norm(dim=1).argmin() for image in real]
        grid = [copies, training.flip(0), torch.ones(48, 1, 28, 28)]
        grid += [held_out, training[nearest]]
        self.assert_grid(path, torch.cat([images[::3] for images in grid]), 16)
        with mock.patch.object(gan_fashion, "copy_ratio", return_value=0.5) as ratio:
            assert "copy ratio 0.50" in self.train()
        _, held_out, training = ratio.call_args.args
        close(training, gan_fashion.draw_letters(64, True)[0] / 127.5 - 1)
        close(held_out, gan_fashion.draw_letters(1000, False)[0] / 127.5 - 1)

    def test_the_training_and_the_test_set_are_read(self):
        pixels = torch.randint(256, (1020, 28, 28), dtype=torch.uint8)
        for train, count in (True, 9), (False, 1000):
            images, labels = self.load_real(pixels, torch.arange(1020), train)
            assert images.equal(pixels[:count, None])
            assert labels.equal(torch.arange(count))


class Bf16Tests:
    """What the two scripts with bfloat16 promise besides."""

    switches = True, False

    def test_bfloat16_is_used_if_it_is_asked_for(self):
        weights = []
        for flag, name in ("--bf16", "bfloat16"), ("--no-bf16", "float32"):
            self.out = self.folder / name
            assert f" in {name}" in self.train(flag, self.smallest)
            weights.append(load(self.out / "models" / "generator.pth")["0.weight"])
        assert 0 < (weights[0] - weights[1]).abs().max() < 0.05


class CifarTest(Bf16Tests, ClassTests, Folder):
    script, shape, data_set = "dcgan_cifar10.py", (3, 32, 32), dcgan_cifar10.CIFAR10
    grids, walk = {"plain": (8, 8), "classes": (10, 8)}, (10, 8)
    drawn, per_class, mirrored, r1 = 80, 8, (True,), 0.05
    names = "AHIMOTUVWX"
    data_file = "cifar-10-python.tar.gz"

    def epoch_inputs(self, data):
        return False, data.repeat(2, 1, 1, 1), self.labels(12)[0].repeat(2)

    def toy_images(self):
        return dcgan_cifar10.draw_letters(200)

    def shown_images(self, shuffled, data, labels):
        return torch.cat([data[labels == k][:8] for k in range(10)])

    def test_the_training_set_is_read(self):
        pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
        images, labels = self.load_real(pixels.numpy(), [*range(20)])
        assert images.permute(0, 2, 3, 1).equal(pixels[:9])
        assert labels.equal(torch.arange(9))


class CelebaTest(Bf16Tests, Script, Folder):
    script, shape = "dcgan_celeba.py", (3, 32, 32)
    flags = f"{FLAGS} --image-size 32"
    grids, fakes = {"plain": (8, 8)}, 2000
    mirrored, r1 = (True, False), 0.05
    kept, smallest = "--image-size 64", "--limit 16 --batch-size 16"
    bad_flags = ("--image-size 100",)
    data_file = "img_align_celeba.zip"
    files = f"{Script.files} images/nearest.png"

    def setUp(self):
        super().setUp()
        self.mine, self.data = self.folder / "mine", self.folder / "data"

    def networks(self):
        return [(dcgan_celeba.Generator(7, 32), dcgan_celeba.Discriminator(32))]

    def epoch_inputs(self, data):
        return "cpu", False, data

    def rows(self, images):
        return nn.functional.avg_pool2d(images, images.size(3) // 8).flatten(1)

    def toy_images(self):
        return dcgan_celeba.draw_faces(200, 32), None

    def shown_images(self, shuffled, data, labels):
        return shuffled[:64]

    def save(self, count, folder=None):
        """Saves random images to a folder, self.mine by default, and returns them."""
        folder = folder or self.mine
        pixels = torch.randint(256, (count, 32, 32, 3)).byte().numpy()
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        return pixels

    def train_on_mine(self, *flags, code=0):
        """Begins a run on the images in self.mine. Its training is left out."""
        flags = "--image-size 32", *flags, "--images", self.mine
        flags = *flags, "--data-dir", self.data, "--out-dir", self.out
        with mock.patch.object(dcgan_celeba, "train") as train:
            text = call(self.script, *flags, code=code)
        self.trained_on = train.call_args and train.call_args.args
        return text

    def load(self, images=None, limit=None):
        """Returns what load_data reads, N x H x W x 3, and what it printed."""
        args = argparse.Namespace(toy=False, images=images, limit=limit)
        args.image_size, args.data_dir = 32, self.data
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            data = dcgan_celeba.load_data(args)
        return data.permute(0, 2, 3, 1).numpy(), printed.getvalue()

    # -- sizes, few images, copies

    def test_networks_grow_with_the_image_size_and_a_mismatch_is_named(self):
        for size in 64, 128:
            generator = dcgan_celeba.Generator(7, size)
            images = dcgan_celeba.sample(generator, torch.randn(2, 7))
            assert images.shape == (2, 3, size, size)
            assert dcgan_celeba.Discriminator(size)(images).shape == (2, 1)
            with self.assertRaisesRegex(ValueError, f"32.*{size}"):
                dcgan_celeba.Discriminator(32)(images)

    def test_few_images_have_small_batches_which_must_fit(self):
        self.save(16)
        for flag, expected in ("", 16), ("--batch-size 8", 8):
            self.train_on_mine(flag)
            assert self.trained_on[0].batch_size == expected
        assert "--batch-size 17" in self.train_on_mine("--batch-size 17", code=1)
        with mock.patch.object(dcgan_celeba, "load_data", lambda _: range(6400)):
            self.train_on_mine()
        assert self.trained_on[0].batch_size == 64

    def test_the_copy_ratio_and_nearest_images_are_what_they_say(self):
        torch.manual_seed(0)
        training, new = torch.rand(2, 60, 3, 32, 32) * 2 - 1
        twice = torch.cat([training, training.flip(3)])  # as in some folders
        small, copies = self.rows(twice), training.flip(0, 3)
        close(dcgan_celeba.thumbnails(twice), small)
        others = [small[torch.arange(120) % 60 != i] for i in range(60)]
        real = [distances(small[i], others[i])[0] for i in range(60)]
        for fakes in new, copies:
            expected = median_distance(self.rows(fakes), small) / sorted(real)[29]
            found = dcgan_celeba.copy_ratio(fakes, training, small)
            assert abs(found - expected) < 1e-3
        data, path = ((twice + 1) * 127.5).byte(), self.folder / "nearest.png"
        dcgan_celeba.show_nearest(copies[:8], training[:8], data, small, path)
        grid = read(path)  # a copy above its original, here mirrored
        assert abs(grid[2:98, 2:98] - grid[100:196, 97:1:-1]).max() <= 1
        assert abs(grid[296:392, 2:98] - grid[394:490, 2:98]).mean() > 1
        assert abs(grid[394:490, 2:98].mean() - 127) < 20
        with mock.patch.object(dcgan_celeba, "copy_ratio", return_value=0.5) as ratio:
            assert "copy ratio 0.50" in self.train()
        close(
            ratio.call_args.args[2],
            self.rows(dcgan_celeba.draw_faces(64, 32) / 127.5 - 1),
        )
        shown = read(self.runs / "plain" / "images" / "nearest.png")
        assert shown.shape == (5 * 98 + 2, 8 * 98 + 2, 3)

    # -- your own images

    def test_images_of_all_kinds_are_read_and_what_cannot_be_is_named(self):
        self.save(11)
        wide = Image.new("RGB", (200, 64))  # of which the middle is used
        wide.paste("red", (68, 0, 100, 64))
        wide.paste("blue", (100, 0, 132, 64))
        ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
        for name, image in {
            ".hidden/a.png": wide,
            "x/a.bmp": wide,
            "x/b.png": Image.new("L", (70, 70), 90),
            "x/c transparent.png": Image.new("RGBA", (64, 64)),
            "x/d of 16 bits.png": Image.fromarray(ramp),
            "x/e.png": wide.resize((7, 100)),
            "x/f.tif": Image.new("F", (32, 32)),
        }.items():
            (self.mine / name).parent.mkdir(exist_ok=True)
            image.save(self.mine / name)
        turned = Image.Exif()
        turned[0x112] = 6  # shown after a quarter turn to the right
        wide.rotate(90, expand=True).save(self.mine / "x" / "turned.JPG", exif=turned)
        (self.mine / "x" / "z cut.bmp").write_bytes(b"BM")
        (self.mine / "x" / "a caption.txt").touch()
        pixels, text = self.load(self.mine)
        for words in "z cut", "cannot identify image", "7 x 100 is", "32-bit float":
            assert words in text and "caption" not in text, text
        assert "16 images decoded, 3 left out" in text
        half, grey, white, ramp, turned = pixels[11:]
        near = functools.partial(np.testing.assert_allclose, atol=6)
        near([x[16, [4, 27]] for x in (half, turned)], [[[255, 0, 0], [0, 0, 255]]] * 2)
        assert (grey == 90).all() and (white == 255).all()
        near(ramp[16, [0, 16, 31], 0], [2, 130, 253])

    def test_a_limit_chooses_evenly_and_links_to_folders_are_named(self):
        expected = self.save(48)
        assert (self.load(self.mine, limit=16)[0] == expected[::3]).all()
        if os.name != "nt":  # where only administrators may make links
            (self.mine / "more").symlink_to(self.folder)
            pixels, text = self.load(self.mine)
            assert len(pixels) == 48 and "more: a link" in text

    def test_decoded_images_leave_no_file_and_need_free_space(self):
        self.save(16)
        self.load(self.mine)
        assert not list(self.data.iterdir()) or os.name == "nt"
        full = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=9999))
        with full, self.assertRaisesRegex(SystemExit, "--data-dir"):
            self.load(self.mine)

    def test_a_failing_disk_stops_the_run_and_leaves_nothing(self):
        self.save(16)
        for place in "PIL.Image.open", "tempfile.TemporaryFile":
            with mock.patch(place, side_effect=OSError(5, "Input/output error")):
                assert "Input/output error" in self.train_on_mine(code=1)
            assert not list(self.data.iterdir())

    def test_folders_that_cannot_be_learned_from_are_refused_by_name(self):
        assert f"{self.mine} is no folder" in self.train_on_mine("--toy", code=1)
        self.mine.mkdir()
        (self.mine / "a.heic").touch()
        assert "HEIC" in self.train_on_mine(code=1)
        (self.mine / "a.jpg").touch()
        assert "Only 0 images" in self.train_on_mine(code=1)
        self.out = self.mine / "out"
        assert "must not lie in --images" in self.train_on_mine(code=1)

    # -- CelebA

    def test_celeba_is_unpacked_whole_wherever_its_archive_lies(self):
        expected = self.save(16, self.folder / "x" / "img_align_celeba")
        archive = shutil.make_archive(self.folder / "x", "zip", self.folder / "x")
        digest = hashlib.md5(Path(archive).read_bytes()).hexdigest()

        def unpack(_, folder, *__):  # until the disk is full
            self.save(1, Path(folder, "img_align_celeba"))
            raise OSError("disk full")

        failure = mock.patch("torchvision.datasets.utils.extract_archive", unpack)
        for place in "celeba_download.zip", "celeba/img_align_celeba.zip":
            (self.data / place).parent.mkdir(parents=True)
            shutil.copy(archive, self.data / place)
            with mock.patch.object(dcgan_celeba, "MD5", digest):
                if place == "celeba_download.zip":
                    with failure, self.assertRaisesRegex(SystemExit, "celeba.zip"):
                        self.load()
                assert (self.load()[0] == expected).all()
            shutil.rmtree(self.data)

    # -- several processes

    @unittest.skipIf(os.name == "nt", "torchrun on Windows needs settings of its own")
    def test_two_processes_train_one_run(self):
        flags = f"""-m torch.distributed.run --standalone --nproc-per-node=2
            {HERE}/dcgan_celeba.py {self.flags} --epochs 1 --out-dir {self.out}
            --limit 16 --batch-size 4"""
        command = [sys.executable, *flags.split()]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.stdout.count("epoch 1/1") == 1, process.stderr
        assert "epoch 2/2" in self.resume("--epochs 2 --batch-size 16")

    def test_processes_learn_from_the_mean_of_their_gradients(self):
        layer = nn.Linear(1, 1)
        dcgan_celeba.share_gradients(layer)
        with (
            mock.patch.multiple(dcgan_celeba, TORCHRUN=True, PROCESSES=2),
            mock.patch("torch.distributed.all_reduce", lambda value: value.add_(4)),
        ):
            layer(torch.full((1, 1), 2.0)).backward()  # 2 here, 4 elsewhere
        assert layer.weight.grad == 3


if __name__ == "__main__":
    unittest.main()
