"""Tests of what a user sees. Run them with  python -m unittest  (or pytest).

They run the real commands on --toy images or on small files written here, most of them
by calling main(), as a process takes seconds to start. Nothing is downloaded.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import importlib
import io
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
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
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import dcgan_celeba
import dcgan_cifar10
import gan_fashion
import gan_mnist
from common import init_weights, save_grid

HERE = Path(__file__).resolve().parent


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


def random_pixels(*shape):
    """Returns random bytes, in images N x H x W x C with a left edge of zeros."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[:, :, 0] = 0
    return pixels


class Folder(unittest.TestCase):
    """A test with a temporary folder, self.folder, of its own."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.out = self.folder / "out"


class CommonTest(Folder):
    def test_a_grid_shows_every_pixel_as_it_is(self):
        images = torch.rand(5, 3, 28, 28) * 2.2 - 1.1  # what is outside is clipped
        save_grid(images, self.out / "grid.png", columns=3)
        grid = read(self.out / "grid.png")
        assert grid.shape == (2 * 86 + 2, 3 * 86 + 2, 3)
        shown = grid[2:86, 88:172]  # the second image, enlarged without smoothing
        expected = images[1].clamp(-1, 1).permute(1, 2, 0) * 127.5 + 127.5
        expected = expected.repeat_interleave(3, 0).repeat_interleave(3, 1)
        np.testing.assert_allclose(shown, expected, atol=0.51)

    def test_weights_are_initialised_as_the_dcgan_paper_says(self):
        torch.manual_seed(0)
        for layer in (
            nn.Linear(200, 200),
            nn.Conv2d(64, 64, 4),
            nn.ConvTranspose2d(64, 64, 4),
            nn.BatchNorm2d(5000),
        ):
            layer.apply(init_weights)
            mean = int("BatchNorm" in str(layer))
            assert abs(layer.weight.mean() - mean) < 0.002, layer
            assert abs(layer.weight.std() - 0.02) < 0.002
            assert not layer.bias.any()


class RunTests:
    """What each of the scripts promises; a class per script fills it in.

    All tests of a class share a short toy run of each variant.
    """

    flags = (  # on the CPU, where a resumed run ends in the same bytes
        "--toy --limit 200 --batch-size 32 --latent-dim 7 --epochs 2 --sample-every 3 "
        "--device cpu"
    )
    variants = {"plain": "", "classes": "--conditional"}
    kept = "--conditional"
    bad_flags = ()
    files = """images/real.png images/epoch_000.png images/epoch_002.png losses.png
        models/generator.pth models/discriminator.pth models/checkpoint.pth
        history.csv progress.gif"""

    @classmethod
    def setUpClass(cls):
        cls.module = importlib.import_module(cls.script.removesuffix(".py"))
        if hasattr(cls.module, "MIN_EPOCH_STEPS"):  # 100 take too long
            patch = mock.patch.object(cls.module, "MIN_EPOCH_STEPS", 1)
            patch.start()
            cls.addClassCleanup(patch.stop)
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.default, cls.last = list(cls.variants)[0], list(cls.variants)[-1]
        cls.printed = {}
        for name, flags in cls.variants.items():
            flags = cls.flags, flags, "--out-dir", cls.runs / name
            cls.printed[name] = call(cls.script, *flags)

    def setUp(self):
        super().setUp()
        # Plots and 1,000 fakes take most of a short run; setUpClass made real ones.
        all_fakes = self.module.sample

        def sample(generator, z, *labels):
            images = all_fakes(generator, z[:100], *(y[:100] for y in labels))
            return images.repeat(10, 1, 1, 1)[: len(z)]

        self.quick = mock.patch.multiple(
            self.module, sample=sample, plot_history=mock.DEFAULT
        )
        self.quick.start()
        self.addCleanup(self.quick.stop)

    def copy_run(self):
        """Copies the default run to self.out; returns the path of its checkpoint."""
        shutil.copytree(self.runs / self.default, self.out)
        return self.out / "models" / "checkpoint.pth"

    def train(self, *flags, code=0):
        """A run of one epoch of three updates in the new folder self.out."""
        flags = (self.flags, "--limit 96 --epochs 1", *flags, "--out-dir", self.out)
        return call(self.script, *flags, code=code)

    def train_on(self, pixels, labels, *flags, code=0):
        """A run of one epoch on images that torchvision is made to read."""

        def read_files(data_set, *_, **__):
            data_set.data, data_set.targets = self.as_torchvision(pixels, labels)

        with mock.patch.object(self.data_set, "__init__", read_files):
            flags = ("--epochs 1 --batch-size 32", *flags, "--out-dir", self.out)
            return call(self.script, *flags, code=code)

    def as_torchvision(self, pixels, labels):
        """Returns images, uint8 N x H x W x C, and labels, as the data set has them."""
        return torch.from_numpy(pixels[..., 0]), torch.from_numpy(labels)

    def resume(self, *flags, code=0):
        return call(self.script, "--resume", *flags, "--out-dir", self.out, code=code)

    def batches(self, run, *flags):
        """Returns a run's batches: what it passes to train_step from real images on."""
        seen, train_step = [], self.module.train_step

        def record(*args):
            seen.append(copy.deepcopy(args[4:]))
            return train_step(*args)

        with mock.patch.object(self.module, "train_step", record):
            run(*flags)
        return list(zip(*seen))

    def networks(self):
        """Yields an untrained generator, for z of 7, and discriminator per variant."""
        yield self.module.Generator(7), self.module.Discriminator()

    def labels(self, count):
        """Returns what networks take besides images: labels in a tuple, or ()."""
        return ()

    # -- what a run gives

    def test_a_run_writes_its_files_and_prints_what_is_in_them(self):
        for name, text in self.printed.items():
            out = self.runs / name
            files = {file.relative_to(out).as_posix() for file in out.rglob("*.*")}
            assert files == set(self.files.split())
            height, width, _ = read(out / "images" / "epoch_002.png").shape
            cell = 3 * self.shape[1] + 2
            assert (height // cell, width // cell) == self.grids[name]
            with Image.open(out / "progress.gif") as picture:
                assert picture.n_frames == 2 and picture.size == (width, height)
            assert "200 images" in text and "LOW COVERAGE" in text  # it learned little
            rows = csv.DictReader((out / "history.csv").read_text().splitlines())
            lines = re.findall("^epoch.*", text, re.M)
            for i, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
                assert f"epoch {i}/2  " in line
                for key in set(row) - {"epoch", "seconds", "images_per_s"}:
                    shown = re.search(f"  {key} (\\S+)  ", line)[1]
                    assert abs(float(shown) - float(row[key])) < 0.006, key
                images = float(row["seconds"]) * float(row["images_per_s"])
                assert round(images) == 6 * 32

    def test_a_run_stopped_by_ctrl_c_ends_as_if_it_had_not_been(self):
        self.quick.stop()
        (self.out / "history.csv").mkdir(parents=True)  # cannot be written
        flags = self.flags, self.variants[self.last], "--out-dir", self.out
        with mock.patch.object(
            self.module, "print_epoch", side_effect=KeyboardInterrupt
        ):
            text = call(self.script, *flags, code=1)
        assert "Warning" in text and "--resume" in text and str(self.out) in text
        assert (self.out / "progress.gif").exists()
        text = self.resume("--device cpu")
        assert re.search("has done 1 of 2 (.*\n)*epoch 2/2 ", text)
        for name in self.files.split()[:6]:  # the others hold times
            old, new = self.runs / self.last / name, self.out / name
            if name.endswith("png"):
                assert old.read_bytes() == new.read_bytes(), name
            else:
                torch.testing.assert_close(load(old), load(new), rtol=0, atol=0)

    def test_a_script_runs_by_itself(self):
        help_text = subprocess.check_output([sys.executable, HERE / self.script, "-h"])
        assert b"--generate" in help_text

    def test_generate_writes_n_images_and_nothing_else_into_a_new_folder(self):
        for variant in self.variants:
            out = self.folder / variant
            shutil.copytree(self.runs / variant / "models", out / "models")
            flags = "--generate 13 --out-dir", out, "--data-dir", self.folder
            call(self.script, *flags)
            self.generate_again(out, *flags)
            files = sorted((out / "generated").rglob("*.*"), key=lambda file: file.name)
            for i, file in enumerate(files):
                k = i % 10
                folder = f"{k}_{self.letters[k]}" if variant == "classes" else ""
                assert file == out / "generated" / folder / f"{i:05d}.png"
                assert read(file).size == math.prod(self.shape)
            assert len({file.read_bytes() for file in files}) == 13
            for name in ("generated_grid.png", "latent_walk.png"):
                assert read(out / name).size > 64 * 9 * math.prod(self.shape)

    def test_the_docstrings_lines_load_the_averaged_generator(self):
        code = textwrap.dedent(self.module.__doc__.split("generator.pth:\n")[1])
        checkpoint, names = load(self.copy_run()), {}
        path = self.out / "models" / "generator.pth"
        code = code.replace("generator.pth", path.as_posix()).replace("100", "7")
        exec(code.replace("size=64", "size=32"), names)
        assert names["images"].shape == (64, *self.shape)
        for name, value in names["generator"].state_dict().items():
            assert value.equal(checkpoint["average"][name])
        assert not value.equal(checkpoint["generator"][name])

    # -- what the lesson's functions promise to whoever copies them

    def test_train_step_follows_its_formulas(self):
        torch.manual_seed(0)
        close = torch.testing.assert_close
        for networks in self.networks():
            for layer in networks[1]:
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
            old_g, old_d = copy.deepcopy(networks)
            opts = [torch.optim.SGD(network.parameters(), 0.1) for network in networks]
            real, z, y = (
                torch.rand(32, *self.shape),
                torch.randn(32, 7),
                self.labels(32),
            )
            result = self.module.train_step(*networks, *opts, real, *y, z, *self.r1)
            fake, one = old_g(z, *y), torch.ones(32, 1)
            loss_d = bce(old_d(real, *y), one) + bce(old_d(fake.detach(), *y), 1 - one)
            loss_d.backward()
            if self.r1:
                self.module.r1_penalty(old_d, real, *y).backward()
            logits = networks[1](fake, *y)
            loss_g = bce(logits, one)
            loss_g.backward(inputs=list(old_g.parameters()))
            close(result["loss_d"], loss_d.detach())
            close(result["loss_g"], loss_g.detach())
            rate = (logits > 0).float().mean()
            assert result.get("fool_rate", rate) == rate
            for network, old in zip(networks, (old_g, old_d)):
                for weight, before in zip(network.parameters(), old.parameters()):
                    close(weight, before - 0.1 * before.grad)

    def test_the_average_follows_weights_and_batchnorm(self):
        average, generator = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        for value in (*generator.parameters(), *generator.buffers()):
            value.data.fill_(3)
        self.module.update_average(average, generator, 10_000)  # starts from 0 and 1
        assert abs(average.running_mean - 0.002 * 3) < 1e-5
        assert abs(average.weight - (1 + 0.002 * 2)) < 1e-5
        self.module.update_average(average, generator, 1)  # the first steps count more
        assert average.weight > 2.5

    def test_coverage_sees_collapse(self):
        torch.manual_seed(0)
        modes = torch.randn(10, *self.shape).repeat(30, 1, 1, 1)
        real, fake = modes + 0.1 * torch.randn(2, 300, *self.shape)
        half = fake[torch.arange(300) % 10 < 5]
        for images, expected in (fake, 0.98), (half, 0.5), (real + 9, 0):
            assert abs(self.module.coverage(real, images) - expected) < 0.15

    def test_an_image_depends_on_its_own_z_alone_and_sampling_keeps_the_mode(self):
        for generator, _ in self.networks():
            z, labels = 3 * torch.randn(50, 7), self.labels(50)
            images = self.module.sample(generator.train(), z, *labels)
            assert images.shape == (50, *self.shape) and images.abs().max() <= 1
            one = self.module.sample(generator, z[:1], *self.labels(1))
            torch.testing.assert_close(one, images[:1])
            assert generator.training

    def test_grids_are_of_the_average(self):
        with mock.patch.object(self.module, "update_average"):  # stays untrained
            self.train()
        grids = [read(self.out / "images" / f"epoch_00{i}.png") for i in (0, 1)]
        np.testing.assert_array_equal(*grids)

    # -- resuming, and when something is wrong

    def test_resume_takes_flags_from_the_run_unless_they_are_given_anew(self):
        path = self.copy_run()
        text = self.resume("--epochs 3 --lr 1e-4")
        assert "has done 2 of 3" in text and "epoch 3/3" in text
        checkpoint = load(path)
        settings = checkpoint["settings"]
        assert (settings["lr"], settings["batch_size"]) == (1e-4, 32)
        settings["toy"] = False
        torch.save(checkpoint, path)
        for flag in self.kept, "--latent-dim 8", "--beta1 0.4", "--toy":
            assert f"has {flag.split()[0]} " in self.resume(flag, code=1)

    def test_a_bad_checkpoint_is_refused_stays_and_runs_no_code(self):
        path, trap = self.copy_run(), self.folder / "trap"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(trap),)

        contents = [path.read_bytes()[:9999]]
        torch.save(Payload(), path)
        contents.append(path.read_bytes())
        for content in contents:
            path.write_bytes(content)
            text = self.resume(code=1)
            assert "damaged or not from this script" in text
            assert path.read_bytes() == content
        assert not trap.exists()
        flags = "--generate 1 --out-dir", trap
        assert "Train first" in call(self.script, *flags, code=1)

    def test_errors_are_explained_and_bugs_are_not_hidden(self):
        assert "smaller --lr" in self.train("--lr 1e30", code=1)
        weights = load(self.out / "models" / "generator.pth").values()
        assert all(value.isfinite().all() for value in weights)
        self.out = self.folder / "bug"
        bug = mock.patch.object(
            self.module, "train_step", side_effect=RuntimeError("x")
        )
        with bug, self.assertRaises(RuntimeError):
            self.train()

    def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(self):
        path = self.copy_run()
        before = path.read_bytes()
        path.with_suffix(".pth.tmp").mkdir()  # stands in for a full disk
        assert "--resume" in self.resume("--epochs 3", code=1)
        assert path.read_bytes() == before

    def test_flags_that_do_not_fit_are_refused(self):
        for flag in (
            *("--epochs 0", "--batch-size 0", "--latent-dim 0", "--limit 0"),
            *("--sample-every 0", "--generate 0", "--beta1 1", "--beta1 -0.1"),
            *("--lr 0", "--lr nan", *self.bad_flags),
        ):
            text = call(self.script, flag, "--out-dir", self.out, code=2)
            assert flag.split()[0] in text.split("error:")[1]
        assert "cuda:99" in self.train("--device cuda:99", code=1)
        assert not self.out.exists()

    def test_a_batch_larger_than_the_data_is_refused(self):
        assert "--batch-size" in self.train("--limit 31", code=1)
        assert "--batch-size" in self.train("--batch-size 1", code=1)
        self.train("--limit 6 --batch-size 6")

    def test_nothing_that_exists_is_overwritten(self):
        self.out.mkdir()
        (self.out / ".DS_Store").touch()  # this is no run
        self.train()
        files = [file for file in self.out.rglob("*") if file.is_file()]
        before = [file.read_bytes() for file in files]
        assert "--resume" in self.train(code=1)
        assert before == [file.read_bytes() for file in files]

    def test_a_failed_download_names_the_files(self):
        flags = "--data-dir", self.folder, "--out-dir", self.out
        text = call(self.script, *flags, code=1)
        for word in (self.data_file, str(self.folder), "--toy"):
            assert word in text
        assert socket.getdefaulttimeout() == 60  # of a server that falls silent

    def generate_again(self, out, *flags):
        old = (out / "generated_grid.png").read_bytes()
        assert "generated_2" in call(self.script, *flags, "--seed 1")
        assert old == (out / "generated_grid.png").read_bytes()
        assert old != (out / "generated_grid_2.png").read_bytes()

        def grey(_, z, *__):
            return torch.full((len(z), *self.shape), 0.0117)  # 128.99 of 255

        with mock.patch.object(self.module, "sample", grey):
            call(self.script, *flags)
        image = next((out / "generated_3").rglob("00000.png"))
        assert (read(image) == 129).all()  # rounded, as in grids

    def test_the_first_grid_depends_on_the_seed_alone(self):
        self.train("--limit 48")
        first = Path("images", "epoch_000.png")
        grids = [read(out / first) for out in (self.out, self.runs / self.default)]
        np.testing.assert_array_equal(*grids)

    def test_few_images_are_repeated_and_scaled_to_the_range_of_tanh(self):
        pixels = random_pixels(16, *self.shape[1:], self.shape[0])
        labels = np.zeros(16, int)
        few = mock.patch.object(self.module, "MIN_EPOCH_STEPS", 4)
        with few, mock.patch("torch.rand", torch.ones):  # none is mirrored
            real, *_ = self.batches(self.train_on, pixels, labels, "--batch-size 8")
        images, counts = torch.cat(real).unique(dim=0, return_counts=True)
        assert counts.tolist() == [2] * 16
        assert images.min() == -1 and images.max() == 1

    def test_resume_starts_a_run_where_there_is_none(self):
        self.out.mkdir()
        text = call(self.script, self.flags, "--resume --out-dir", self.out)
        assert "no run" in text and "epoch 2/2" in text
        flags = self.flags, "--out-dir", self.folder  # holds a folder that holds a run
        assert "epoch 2/2" in call(self.script, *flags)

    def test_a_closed_terminal_or_a_moved_folder_loses_no_epoch(self):
        def move(text, **_):
            if text.startswith("epoch 1"):
                self.out.rename(self.folder / "moved")
            raise OSError("the terminal is closed")

        with mock.patch("builtins.print", side_effect=move):
            call(self.script, self.flags, "--out-dir", self.out)
        assert len(load(self.out / "models" / "checkpoint.pth")["history"]) == 2


class R1Tests(RunTests):
    """What the scripts with the R1 penalty promise besides."""

    def test_r1_is_the_squared_gradient_of_each_logit(self):
        real, logits = torch.ones(8, *self.shape), lambda x, *_: 2 * x.sum((1, 2, 3))
        penalty = self.module.r1_penalty(logits, real, *self.labels(8))
        assert abs(penalty / (self.module.R1_WEIGHT * 4 * real[0].numel()) - 1) < 1e-5


class Bf16Tests(R1Tests):
    """What the scripts with bfloat16 promise besides."""

    r1 = (True,)

    def test_bfloat16_is_used_if_it_is_asked_for(self):
        for flag, name in ("--bf16", "bfloat16"), ("--no-bf16", "float32"):
            self.out = self.folder / name
            assert f" in {name}" in self.train(flag)

    def test_some_images_are_mirrored(self):
        pixels, labels = random_pixels(64, *self.shape[1:], 3), np.zeros(64, int)
        real, *_ = self.batches(self.train_on, pixels, labels)
        assert (real[0][:, 0, :, 0] > -1).any(1).unique().tolist() == [False, True]


class MnistTest(RunTests, Folder):
    script, shape, data_set = "gan_mnist.py", (1, 28, 28), gan_mnist.MNIST
    data_file = "train-images-idx3-ubyte.gz"
    variants = {"mlp": "", "conv": "--model conv"}
    kept, r1 = "--model conv", ()
    grids = {"mlp": (8, 8), "conv": (8, 8)}

    def networks(self):
        yield gan_mnist.MLPGenerator(7), gan_mnist.MLPDiscriminator()
        yield gan_mnist.ConvGenerator(7), gan_mnist.ConvDiscriminator()

    def test_the_convolutional_discriminator_has_dropout(self):
        discriminator, images = gan_mnist.ConvDiscriminator(), torch.rand(5, 1, 28, 28)
        for layer in discriminator:
            layer.train(isinstance(layer, nn.Dropout))
        assert not discriminator(images).equal(discriminator(images))


class ClassTests(R1Tests):
    """What the scripts with --conditional promise besides."""

    letters = "ABCDEFGHIJ"

    def labels(self, count):
        return (torch.arange(count) % 10,)

    def test_each_class_has_images_and_a_logit_of_its_own(self):
        for generator, discriminator in self.networks():
            y = torch.arange(10)
            images = self.module.sample(generator, torch.ones(10, 7), y)
            assert len(images.unique(dim=0)) == 10
            logits = discriminator.eval()(images[:1].expand(images.shape), y)
            assert len(logits.unique()) == 10

    def test_images_come_with_their_labels_only_with_conditional(self):
        labels = np.arange(32) % 10
        pixels = np.tile(20 * labels.astype(np.uint8), (3, *self.shape[1:], 1)).T
        for flag, sees in ("", 0), ("--conditional", 1):
            self.out = self.folder / str(sees)
            (real,), (y,), *_ = self.batches(self.train_on, pixels, labels, flag)
            assert y.equal(sees * ((real[:, 0, 0, 0] + 1) * 127.5 / 20).round().long())


class FashionTest(ClassTests, Folder):
    script, shape, data_set = "gan_fashion.py", (1, 28, 28), gan_fashion.FashionMNIST
    data_file = "train-images-idx3-ubyte.gz"
    grids = {"plain": (9, 9), "classes": (10, 10)}
    bad_flags, r1 = ("--g-steps 0",), (True, True)
    files = f"{RunTests.files} images/nearest.png"

    def test_d_learns_at_every_g_steps_th_step_alone(self):
        changes, train_step = [], gan_fashion.train_step

        def record(generator, discriminator, *others):
            weight = discriminator[0].weight.clone()
            result = train_step(generator, discriminator, *others)
            changes.append(not weight.equal(discriminator[0].weight))
            return result

        with mock.patch.object(gan_fashion, "train_step", record):
            self.train("--g-steps 3")
        assert changes == [True, False, False]

    def test_the_copy_ratio_tells_copies_from_new_images(self):
        torch.manual_seed(0)
        training, held_out, new = torch.rand(3, 53, 1, 28, 28)
        copies, path = training.flip(0) + 0.01 * new, self.folder / "nearest.png"
        for fake, expected in (new, 1), (copies, 0):
            ratio = gan_fashion.copy_ratio(fake, held_out, training)
            assert abs(ratio - expected) < 0.05
        gan_fashion.show_nearest(copies, held_out, training, path)
        grid = read(path)[2::3, 2::3, 0] / 127.5 - 1  # the first copy
        np.testing.assert_allclose(grid[:28, :28], copies[0, 0], atol=0.01)


class CifarTest(ClassTests, Bf16Tests, Folder):
    script, shape, data_set = "dcgan_cifar10.py", (3, 32, 32), dcgan_cifar10.CIFAR10
    data_file = "cifar-10-python.tar.gz"
    grids = {"plain": (8, 8), "classes": (10, 8)}
    letters = "AHIMOTUVWX"

    def as_torchvision(self, pixels, labels):
        return pixels, labels.tolist()


class CelebaTest(Bf16Tests, Folder):
    script, shape = "dcgan_celeba.py", (3, 32, 32)
    data_set = dcgan_celeba  # stands in for a class of torchvision's
    data_file = "img_align_celeba.zip"
    flags = f"{RunTests.flags} --image-size 32"
    variants, grids = {"plain": ""}, {"plain": (8, 8)}
    kept = "--image-size 64"
    bad_flags = ("--image-size 100",)
    files = f"{RunTests.files} images/nearest.png"

    def setUp(self):
        super().setUp()
        self.mine, self.data = self.folder / "mine", self.folder / "data"

    def networks(self):
        yield dcgan_celeba.Generator(7, 32), dcgan_celeba.Discriminator(32)

    def save(self, count, folder=None):
        """Saves random images to a folder, self.mine by default, and returns them."""
        folder, pixels = folder or self.mine, random_pixels(count, 32, 32, 3)
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        return pixels

    def train_on_mine(self, *flags, code=0):
        """A run of one epoch on the images in self.mine."""
        flags = ("--image-size 32 --epochs 1", *flags, "--images", self.mine)
        flags = (*flags, "--data-dir", self.data, "--out-dir", self.out)
        return call(self.script, *flags, code=code)

    def load(self, images=None, limit=None, size=32):
        """Returns what load_data reads, N x H x W x 3, and what it printed."""
        args = argparse.Namespace(toy=False, images=images, limit=limit)
        args.image_size, args.data_dir = size, self.data
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            data = dcgan_celeba.load_data(args)
        return data.permute(0, 2, 3, 1), printed.getvalue()

    # -- sizes, few images, copies

    def test_networks_grow_with_the_image_size_and_a_mismatch_is_named(self):
        for size in (64, 128):
            generator = dcgan_celeba.Generator(7, size)
            images = dcgan_celeba.sample(generator, torch.randn(2, 7))
            assert images.shape == (2, 3, size, size)
            assert dcgan_celeba.Discriminator(size)(images).shape == (2, 1)
            with self.assertRaisesRegex(ValueError, f"32.*{size}"):
                dcgan_celeba.Discriminator(32)(images)

    def test_few_images_are_repeated_and_scaled_to_the_range_of_tanh(self):
        self.save(20)
        with mock.patch.object(dcgan_celeba, "MIN_EPOCH_STEPS", 5):
            real, *_ = self.batches(self.train_on_mine, "--no-flip")
        seen = torch.stack(real)
        assert seen.min() == -1 and seen.max() == 1
        assert seen.shape == (5, 16, 3, 32, 32)
        counts = seen.flatten(0, 1).unique(dim=0, return_counts=True)[1]
        assert counts.tolist() == [4] * 20

    def test_a_batch_larger_than_the_data_is_refused(self):
        self.save(15)
        assert "16 or more" in self.train_on_mine(code=1)
        assert "--batch-size" in self.train("--limit 31", code=1)
        self.train("--limit 16 --batch-size 16")

    def test_some_images_are_mirrored(self):
        self.save(64)
        for flag, expected in ("", [False, True]), ("--no-flip", [False]):
            self.out = self.folder / f"out{flag}"
            real, *_ = self.batches(self.train_on_mine, "--batch-size 64", flag)
            mirrored = (real[0][:, 0, :, 0] > -1).any(1)
            assert mirrored.unique().tolist() == expected

    def test_the_copy_ratio_tells_copies_from_new_images(self):
        torch.manual_seed(0)
        training, new = torch.rand(2, 60, 3, 32, 32) * 2 - 1
        twice = torch.cat([training, training.flip(3)])  # as in some folders
        small, copies = dcgan_celeba.thumbnails(twice), training.flip(0, 3)
        for fakes, expected in (new, 1), (copies, 0):
            ratio = dcgan_celeba.copy_ratio(fakes, training, small)
            assert abs(ratio - expected) < 0.1
        data, path = ((twice + 1) * 127.5).byte(), self.folder / "nearest.png"
        dcgan_celeba.show_nearest(copies[:8], training[:8], data, small, path)
        grid = read(path)  # a copy above its original, here mirrored
        assert abs(grid[2:98, 2:98] - grid[100:196, 97:1:-1]).max() <= 1
        assert not (grid[296:392, 2:98] == grid[394:490, 2:98]).all()

    # -- your own images

    def test_images_of_all_kinds_are_read_and_what_cannot_be_is_named(self):
        wide = Image.new("RGB", (200, 64))  # of which the middle is used
        wide.paste("red", (68, 0, 100, 64))
        wide.paste("blue", (100, 0, 132, 64))
        turned = Image.Exif()
        turned[0x112] = 6  # shown after a quarter turn to the right
        ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
        for name, image, options in (
            ("a.bmp", wide, {}),
            ("b damaged exif.png", wide, {"exif": b"Exif\0\0damaged"}),
            ("deeper/turned.JPG", wide.rotate(90, expand=True), {"exif": turned}),
            ("f grey.png", Image.new("L", (70, 70), 90), {}),
            ("g transparent.png", Image.new("RGBA", (64, 64)), {}),
            ("h of 16 bits.png", Image.fromarray(ramp), {}),
            ("i small.png", wide.resize((7, 100)), {}),
            (".ipynb_checkpoints/a.png", wide, {}),
        ):
            (self.mine / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(self.mine / name, **options)
        cut_off = (self.mine / "a.bmp").read_bytes()[:3000]
        (self.mine / "j cut off.bmp").write_bytes(cut_off)
        (self.mine / "j is heic.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        Image.new("F", (32, 32), 0.5).save(self.mine / "k floats.tif")
        (self.mine / "a caption.txt").touch()  # not counted by --limit
        for i in range(10):
            shutil.copy(self.mine / "a.bmp", self.mine / f"z{i}.bmp")
        pixels, text = self.load(self.mine)
        for words in "j cut off", "cannot identify image", "7 x 100 is", "32-bit float":
            assert words in text and "caption" not in text, text
        assert "16 images decoded, 4 left out" in text
        *halves, grey, white, ramp = pixels.numpy()[:6]
        close = functools.partial(np.testing.assert_allclose, atol=6)
        close([x[16, [4, 27]] for x in halves], [[[255, 0, 0], [0, 0, 255]]] * 3)
        assert (grey == 90).all() and (white == 255).all()
        close(ramp[16, [0, 16, 31], 0], [2, 130, 253])

    def test_a_limit_chooses_evenly_and_links_to_folders_are_named(self):
        expected = self.save(48)
        pixels, _ = self.load(self.mine, limit=16)
        assert (pixels.numpy() == expected[::3]).all()
        if os.name != "nt":  # where only administrators may make links
            (self.mine / "more").symlink_to(self.folder)
            pixels, text = self.load(self.mine)
            assert len(pixels) == 48 and "more: a link" in text

    def test_decoded_images_leave_no_file_and_need_free_space(self):
        self.save(16)
        pixels, _ = self.load(self.mine)
        assert not list(self.data.iterdir()) or os.name == "nt"
        full = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=9999))
        with full, self.assertRaisesRegex(SystemExit, "--data-dir"):
            self.load(self.mine)

    def test_a_failing_disk_stops_the_run_and_leaves_nothing(self):
        self.save(16)
        for place, error, words in (
            ("PIL.Image.open", OSError(5, "Input/output error"), "Input/output"),
            ("PIL.Image.open", KeyboardInterrupt(), "Stopped"),
            ("tempfile.TemporaryFile", OSError(28, "No space left"), "No space left"),
        ):
            with mock.patch(place, side_effect=error):
                assert words in self.train_on_mine(code=1)
            assert not list(self.data.iterdir())
        assert "16 images" in self.train_on_mine()

    def test_folders_that_cannot_be_learned_from_are_refused_by_name(self):
        assert f"{self.mine} is no folder" in self.train_on_mine("--toy", code=1)
        self.mine.mkdir()
        (self.mine / "a.heic").touch()
        assert "HEIC" in self.train_on_mine(code=1)
        (self.mine / "a.jpg").touch()
        assert "Only 0 images" in self.train_on_mine(code=1)
        self.out = self.mine / "out"
        assert "must not lie in --images" in self.train_on_mine(code=1)

    def test_a_run_finds_its_images_again_from_another_folder(self):
        self.save(16)
        self.addCleanup(os.chdir, HERE)
        os.chdir(self.folder)
        self.mine = Path("mine")
        self.train_on_mine()
        os.chdir(self.out)
        assert "epoch 2/2" in self.resume("--epochs 2")
        assert not Path("data").exists()  # --data-dir is as before, too

    # -- CelebA

    def test_celeba_is_found_in_every_layout(self):
        expected = self.save(16, self.folder / "img_align_celeba")
        for place in ("celeba/img_align_celeba", "img_align_celeba", ".", "celeba"):
            if place in (".", "celeba"):  # in the latter case beside no images
                path = self.data / place / "img_align_celeba"
                shutil.make_archive(path, "zip", self.folder, "img_align_celeba")
            else:
                shutil.copytree(self.folder / "img_align_celeba", self.data / place)
            assert (self.load()[0].numpy() == expected).all()
            shutil.rmtree(self.data)
            self.data.mkdir()

    def test_only_the_whole_archive_is_taken_for_celeba(self):
        expected = self.save(16, self.folder / "x" / "img_align_celeba")
        archive = Path(shutil.make_archive(self.folder / "x", "zip", self.folder / "x"))
        digest = hashlib.md5(archive.read_bytes()).hexdigest()

        def unpack(archive, folder, *_):  # until the disk is full
            self.save(1, Path(folder, "img_align_celeba"))
            raise OSError("disk full")

        handler = http.server.SimpleHTTPRequestHandler
        handler = functools.partial(handler, directory=self.folder)
        patch = functools.partial(mock.patch.object, dcgan_celeba)
        with (
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
            patch("URL", f"http://127.0.0.1:{server.server_port}/x.zip"),
            patch("MD5", digest),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            failure = mock.patch("torchvision.datasets.utils.extract_archive", unpack)
            with failure, self.assertRaisesRegex(SystemExit, "celeba.zip"):
                self.load()
            assert (self.load()[0].numpy() == expected).all()
            server.shutdown()
        assert len(self.load()[0]) == 16  # not downloaded again

    # -- several processes

    @unittest.skipIf(os.name == "nt", "torchrun on Windows needs settings of its own")
    def test_processes_share_batches_learn_the_same_and_resume(self):
        self.save(200)
        code = """
            import os, sys, torch, dcgan_celeba as script
            script.MIN_EPOCH_STEPS, seen, train_step = 1, [], script.train_step

            def record(*args):
                seen.append([args[4].clone(), args[0][0].weight.detach().clone()])
                return train_step(*args)

            script.train_step = record
            script.distributed.destroy_process_group = script.distributed.barrier
            script.main()
            script.distributed.init_process_group = lambda *_, **__: None
            sys.argv[1:] = "--resume --epochs 3 --out-dir out --device cpu".split()
            script.main()
            torch.save([*zip(*seen)], "rank" + os.environ["RANK"])
        """
        (self.folder / "recorder.py").write_text(textwrap.dedent(code))
        flags = """--standalone --nproc-per-node=2 recorder.py --images mine --no-flip
            --image-size 32 --batch-size 64 --epochs 2 --out-dir out --device cpu"""
        process = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *flags.split()],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        printed = re.findall("has done|epoch ./.", process.stdout)  # by one process
        assert printed == "epoch 1/2,epoch 2/2,has done,epoch 3/3".split(",")
        (images, weights), (others, same) = map(load, sorted(self.folder.glob("rank*")))
        assert all(map(torch.equal, weights, same))
        epoch = torch.cat(images[:3] + others[:3])
        assert epoch.unique(dim=0).shape == epoch.shape  # no image twice

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
