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
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # small networks: more threads would only wait
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # nowhere
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim import Adam

import dcgan_celeba
import dcgan_cifar10
import gan_fashion
import gan_mnist
from common import init_weights, save_grid

HERE = Path(__file__).parent
# A short run on the CPU, where a resumed run ends in the same bytes.
FLAGS = """--toy --limit 19 --batch-size 8 --latent-dim 7 --epochs 2 --sample-every 3
    --lr 0.01 --beta1 0.4 --seed 1 --device cpu"""


def call(module, *flags, code=0):
    """Runs a script's main(), asserts its exit code and returns all that it printed.

    flags: strings, which are split into words, and paths.
    """
    printed, found = io.StringIO(), 0
    words = [[flag] if isinstance(flag, Path) else flag.split() for flag in flags]
    with (
        mock.patch("sys.argv", [module.__file__, *map(str, sum(words, []))]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("error")
        try:
            module.main()
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


close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)


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

    flags, bad_flags, dropout, r1, g_steps, mirrored = FLAGS, (), {}, 0, 1, ()
    numbers = "loss_d loss_g acc_real acc_fake fool_rate"
    switches = ()  # what train_step() takes after z
    # Rows and columns of walks (and in each class those of a variant's grids), classes
    # of each variant, and the images that a grid shows of each.
    walk, classes, per_class = (8, 8), {}, 8
    # How many z are drawn for --generate's grid and for an epoch, and how many fakes of
    # these are compared by coverage.
    drawn, fakes, compared = 64, 1000, 1000
    files = """images/real.png images/epoch_000.png images/epoch_002.png
        models/generator.pth models/discriminator.pth models/checkpoint.pth
        losses.png history.csv progress.gif"""

    @classmethod
    def setUpClass(cls):
        usual = cls.module.MIN_EPOCH_STEPS, getattr(cls.module, "R1_INTERVAL", 16)
        assert usual == (100, 16)  # which would take too long here
        sample = cls.module.sample
        cls.sample = staticmethod(sample)

        def sample_few(generator, *inputs):  # as many as a walk has
            return sample(generator, *(each[: np.prod(cls.walk)] for each in inputs))

        smaller = {"MIN_EPOCH_STEPS": 3, "R1_INTERVAL": 2, "sample": sample_few}
        smaller = mock.patch.multiple(cls.module, create=True, **smaller)
        smaller.start()
        cls.addClassCleanup(smaller.stop)
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.printed = {
            variant: call(cls.module, cls.flags, flags, "--out-dir", cls.runs / variant)
            for variant, flags in cls.variants.items()
        }
        # Curves take most of the time of a short run, and are drawn by now.
        no_curves = mock.patch.object(cls.module, "plot_history")
        no_curves.start()
        cls.addClassCleanup(no_curves.stop)

    def copy_run(self, variant=None):
        """Copies a run to self.out, by default the first. Returns its checkpoint."""
        variant = variant or [*self.variants][0]
        self.out = self.folder / variant
        shutil.copytree(self.runs / variant, self.out)
        return self.out / "models" / "checkpoint.pth"

    def train(self, *flags, code=0):
        """Trains for one epoch of four updates in the new folder self.out."""
        flags = self.flags, "--limit 16 --epochs 1", *flags, "--out-dir", self.out
        return call(self.module, *flags, code=code)

    def resume(self, *flags, code=0):
        return call(self.module, "--resume", *flags, "--out-dir", self.out, code=code)

    def networks(self, variant):
        """Returns an untrained generator, for z of 7, and its discriminator."""
        pair = self.module.Generator(7), self.module.Discriminator()
        return [network.apply(init_weights) for network in pair]

    def labels(self, variant, labels):
        """Returns what networks take besides images: labels in a list, or nothing."""
        return [labels % self.classes[variant]] if self.classes else []

    def compared_images(self, shuffled):
        """Returns the real images with which an epoch's fakes are compared."""
        return shuffled

    # -- the lesson

    def test_a_run_is_what_the_formulas_say(self):
        torch.set_default_dtype(torch.float64)  # so that rounding does not matter
        self.addCleanup(torch.set_default_dtype, torch.float32)
        data, labels = self.toy_images(19)
        for variant, (rows, columns) in self.grids.items():
            self.out = self.folder / variant
            images = self.out / "images"
            self.train("--limit 19 --epochs 2", self.variants[variant])
            checkpoint = load(self.out / "models" / "checkpoint.pth")
            torch.manual_seed(1)
            pair = self.networks(variant)
            average = copy.deepcopy(pair[0])
            opts = [Adam(each.parameters(), betas=(0.4, 0.999)) for each in pair]
            z = torch.randn(self.fakes, 7)[: self.compared + 64]
            y = self.labels(variant, torch.arange(len(z)) // self.per_class)
            fakes = self.module.sample(average, z, *y)
            self.assert_grid(images / "epoch_000.png", fakes[: rows * columns], columns)
            shown = compared = self.compared_images(
                data[torch.randperm(19)] / 127.5 - 1
            )
            if self.classes:
                by_class = [data[labels == k][: self.per_class] for k in range(10)]
                shown = torch.cat(by_class) / 127.5 - 1
            self.assert_grid(images / "real.png", shown, self.per_class)

            # 19 images, each of them twice, make an epoch of 4 batches of 8.
            for step in range(8):
                if step % 4 == 0:
                    results = []
                    torch.manual_seed(10_001 + step // 4)
                    order = torch.randperm(38) % 19
                chosen = order[step % 4 * 8 :][:8]
                real = data[chosen] / 255 * 2 - 1
                if variant in self.mirrored:
                    mirror = torch.rand(8) < 0.5
                    real[mirror] = real[mirror].flip(3)
                for opt in opts:
                    opt.param_groups[0]["lr"] = 0.01 * (8 - step) / 8
                y_real = [each[chosen] for each in self.labels(variant, labels)]
                inputs = real, torch.randn(8, 7), y_real
                results.append(self.step_by_hand(step, *pair, *opts, *inputs))
                keep = (step + 1) / (step + 10)
                new = pair[0].state_dict()
                for name, old in average.state_dict().items():
                    if old.is_floating_point():
                        old.copy_(keep * old + (1 - keep) * new[name])

            trained = {
                "average": average,
                "generator": pair[0],
                "discriminator": pair[1],
            }
            for name, network in trained.items():
                close(checkpoint[name], network.state_dict())
            row = checkpoint["history"][1]
            numbers = [row[name] for name in self.numbers.split()]
            close(torch.tensor(numbers), torch.tensor(results).mean(0)[: len(numbers)])
            fakes = self.module.sample(average, z, *y)
            covered = self.module.coverage(compared, fakes[: self.compared])
            close(row["coverage"], covered)
            close(row["images_per_s"] * row["seconds"], 32.0)
            assert checkpoint["opt_g"]["param_groups"][0]["fused"]  # faster
            self.assert_grid(images / "epoch_002.png", fakes[: rows * columns], columns)

    def step_by_hand(self, step, generator, discriminator, opt_g, opt_d, real, z, y):
        fake = generator(z, *y)
        p_real = discriminator(real, *y).sigmoid()
        p_fake = discriminator(fake.detach(), *y).sigmoid()
        loss_d = -p_real.log().mean() - (1 - p_fake).log().mean()
        if step % self.g_steps == 0:
            opt_d.zero_grad()
            loss_d.backward()
            if self.r1 and step % (2 * self.g_steps) == 0:
                half = real[:4].requires_grad_()
                logits = discriminator(half, *(each[:4] for each in y)).sum()
                (slope,) = torch.autograd.grad(logits, half, create_graph=True)
                (16 * self.r1 * slope.square().sum() / 4).backward()
            opt_d.step()

        p_new = discriminator(fake, *y).sigmoid()
        loss_g = -p_new.log().mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        rates = p_real > 0.5, p_fake < 0.5, p_new > 0.5
        return loss_d.item(), loss_g.item(), *(each.double().mean() for each in rates)

    def test_all_tensors_go_to_the_device_that_is_named(self):
        # Tensors on "meta" have no values, and do not mix with the CPU's: like a GPU's.
        with (
            mock.patch("torch.Tensor.item", return_value=1.0),
            mock.patch("torch.Tensor.cpu", lambda tensor: torch.ones(tensor.shape)),
            mock.patch("torch.autocast"),
            mock.patch.object(self.module, "Adam", lambda *args, fused: Adam(*args)),
        ):
            self.train("--device meta")

    def test_a_step_keeps_no_graph_and_no_gradients_of_g_in_d(self):
        for variant in self.variants:
            pair, y = self.networks(variant), self.labels(variant, torch.arange(4))
            opts = [Adam(network.parameters()) for network in pair]
            gradients = []
            weight = next(pair[1].parameters())
            weight.register_post_accumulate_grad_hook(gradients.append)
            inputs = torch.rand(4, *self.shape), *y, torch.randn(4, 7), *self.switches
            assert pair[1](inputs[0], *y).shape == (4, 1)
            numbers = self.module.train_step(*pair, *opts, *inputs)
            assert not any(number.requires_grad for number in numbers.values())
            assert len(gradients) == 1  # only from D's own loss

    def test_the_average_spans_about_500_updates(self):
        average, generator = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        generator.weight.data.fill_(3)
        self.module.update_average(average, generator, 10_000)  # begins at 1
        assert abs(average.weight - (1 + 0.002 * 2)) < 1e-6

    def test_coverage_counts_real_images_near_which_there_is_a_fake(self):
        # Ten grey images, each brighter by 1 than the last one. The fifth-closest other
        # image differs by 5 from the first and the last one, by 3 from those between.
        real = torch.arange(10.0)[:, None, None, None].expand(10, *self.shape)
        for brightness, expected in (3.4, 0.7), (99.0, 0):
            fakes = torch.full((2, *self.shape), brightness)
            assert abs(self.module.coverage(real, fakes) - expected) < 1e-6

    def test_strides_slopes_and_dropout_are_as_documented(self):
        for variant in self.variants:
            layers = str(self.networks(variant))
            assert set(re.findall("slope=(.*)\\)", layers)) == {"0.2"}
            assert re.findall(r"\bp=([\d.]+)", layers) == self.dropout.get(variant, [])
            for layer in re.findall(".* stride=.2, 2.*", layers):
                assert "kernel_size=(4, 4)" in layer and "padding=(1, 1)" in layer

    def test_samples_are_drawn_in_evaluation_mode_and_change_nothing(self):
        for variant in self.variants:
            y = self.labels(variant, torch.arange(501))
            generator, _ = self.networks(variant)
            z = torch.randn(501, 7)
            generator(3 + z, *y)  # moves its statistics
            before = copy.deepcopy(generator)
            images = self.sample(generator, z, *y)
            assert generator.training and not images.requires_grad
            close(generator.state_dict(), before.state_dict())
            close(images, before.eval()(z, *y).detach())
            assert images.abs().max() <= 1

    def test_generate_draws_a_grid_walks_and_images_from_the_average(self):
        for variant, (rows, columns) in self.grids.items():
            average = load(self.copy_run(variant))["average"]
            flags = "--generate 13 --out-dir", self.out, "--data-dir", self.folder
            call(self.module, *flags)
            generator, _ = self.networks(variant)
            generator.load_state_dict(average)
            sample = partial(self.module.sample, generator)
            torch.manual_seed(1)
            y = self.labels(variant, torch.arange(self.drawn) // self.per_class)
            grid = sample(torch.randn(self.drawn, 7), *y)[: rows * columns]
            self.assert_grid(self.out / "generated_grid.png", grid, columns)
            starts, ends = torch.randn(2, self.walk[0], 1, 7)
            turn = torch.linspace(0, 90, self.walk[1]).deg2rad()[:, None]
            walk = (starts * turn.cos() + ends * turn.sin()).flatten(0, 1)
            y = self.labels(variant, torch.arange(len(walk)) // self.walk[1])
            self.assert_grid(
                self.out / "latent_walk.png", sample(walk, *y), self.walk[1]
            )
            y = self.labels(variant, torch.arange(13))
            images = sample(torch.randn(13, 7), *y).permute(0, 2, 3, 1)
            files = (self.out / "generated").rglob("*.*")
            files = sorted(files, key=lambda file: file.name)
            shown = np.stack([read(file) for file in files]).reshape(images.shape)
            np.testing.assert_allclose(shown, (images + 1) * 127.5, atol=0.6)
            folders = ["generated"] * 13
            if variant == "classes":
                folders = [f"{i % 10}_{self.names[i % 10]}" for i in range(13)]
            assert [file.parent.name for file in files] == folders
        assert "generated_2" in call(self.module, *flags, "--seed 2")
        first, second = map(read, self.out.glob("generated_grid*"))
        assert (first != second).any()  # another seed draws other images

    def test_the_docstrings_lines_load_the_averaged_generator(self):
        code = textwrap.dedent(self.module.__doc__.split("generator.pth:\n")[1])
        average, names = load(self.copy_run())["average"], {}
        path = self.out / "models" / "generator.pth"
        code = code.replace("generator.pth", path.as_posix()).replace("100", "7")
        exec(code.replace("size=64", "size=32"), names)
        close(names["generator"].state_dict(), average)

    # -- runs and resuming

    def test_a_run_writes_its_files_and_prints_what_is_in_them(self):
        for variant, text in self.printed.items():
            out = self.runs / variant
            files = {file.relative_to(out).as_posix() for file in out.rglob("*.*")}
            assert files == set(self.files.split())
            with Image.open(out / "progress.gif") as picture:
                assert picture.n_frames == 2
            with open(out / "history.csv", newline="") as file:
                rows = [*csv.DictReader(file)]
            lines = re.findall(r"^epoch \d/2  .*", text, re.M)
            for line, row in zip(lines, rows, strict=True):
                for name in f"{self.numbers} coverage".split():
                    shown = float(re.search(f"{name} (\\S+)", line)[1])
                    assert abs(shown - float(row[name])) < 0.006
                low = float(row["coverage"]) < 0.2 and row["epoch"] == "2"
                assert line.endswith("LOW COVERAGE") == low

    def test_a_run_stopped_by_ctrl_c_ends_as_if_it_had_not_been(self):
        (self.out / "history.csv").mkdir(parents=True)  # cannot be written
        variant, flags = [*self.variants.items()][-1]
        flags = self.flags, flags, "--resume --out-dir", self.out
        with mock.patch.object(self.module, "print_epoch") as print_epoch:
            print_epoch.side_effect = KeyboardInterrupt
            text = call(self.module, *flags, code=1)
        assert all(words in text for words in ("no run", "Warning", str(self.out)))
        assert (self.out / "progress.gif").exists()
        assert re.search("done 1 epochs; 2 are(.*\n)*epoch 2/2 ", self.resume())
        for name in self.files.split()[:5]:
            expected = (self.runs / variant / name).read_bytes()
            assert (self.out / name).read_bytes() == expected

    def test_resume_takes_flags_from_the_run_unless_they_are_given_anew(self):
        path = self.copy_run()
        text = self.resume("--epochs 3 --lr 1e-4 --limit 20")
        assert "done 2 epochs; 3 are" in text and "epoch 3/3" in text
        checkpoint = load(path)
        settings = checkpoint["settings"]
        assert (settings["lr"], settings["batch_size"]) == (1e-4, 8)
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
        self.out = self.folder / "new"
        assert "Train first" in self.resume("--generate 1", code=1)

    def test_a_loss_that_explodes_is_explained_and_not_saved(self):
        assert "smaller --lr" in self.train("--lr 1e30", code=1)
        weights = load(self.out / "models" / "generator.pth").values()
        assert all(value.isfinite().all() for value in weights)

    def test_what_exists_is_never_overwritten_or_lost(self):
        path = self.copy_run()
        before = path.read_bytes()
        assert "--resume" in self.train(code=1)
        path.with_suffix(".pth.tmp").mkdir()  # stands in for a full disk
        assert "--resume" in self.resume("--epochs 3", code=1)
        assert path.read_bytes() == before

    def test_flags_that_do_not_fit_are_refused_before_anything_is_written(self):
        names = "epochs batch-size latent-dim limit sample-every generate lr".split()
        zeros = [f"--{name} 0" for name in names]
        for flag in *zeros, "--beta1 1", "--lr nan", *self.bad_flags:
            text = call(self.module, flag, "--out-dir", self.out, code=2)
            assert flag.split()[0] in text.split("error:")[1]
        for flag in "--device cuda:99", "--batch-size 17", "--batch-size 1":
            assert flag.split()[1] in self.train(flag, code=1)
        assert not self.out.exists()

    def test_a_failed_download_names_the_files(self):
        folders = "--data-dir", self.folder, "--out-dir", self.out
        text = call(self.module, *folders, code=1)
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
            call(self.module, self.flags, "--out-dir", self.out, "--batch-size 19")
        assert len(load(self.out / "models" / "checkpoint.pth")["history"]) == 2


class DataSetTests(Script):
    """What the three scripts promise whose data sets torchvision downloads."""

    parts = {(): 9}  # what load_data() is called with, and how many images it returns

    def test_the_first_images_of_the_data_set_are_used(self):
        pixels = torch.randint(256, (1020, *self.shape)).byte()

        def read_files(data_set, *_, **__):
            data_set.data = pixels.permute(0, 2, 3, 1).squeeze(3).numpy()
            data_set.targets = [*range(1020)]

        args = argparse.Namespace(toy=False, data_dir="", limit=9)
        with mock.patch.object(self.data_set, "__init__", read_files):
            for inputs, count in self.parts.items():
                found = self.module.load_data(args, *inputs)
                images, labels = found if self.classes else (found, range(9))
                assert np.array_equal(images, pixels[:count])
                assert np.array_equal(labels, range(count))


class MnistTest(DataSetTests, Folder):
    module, shape, data_set = gan_mnist, (1, 28, 28), gan_mnist.MNIST
    variants = {"mlp": "", "conv": "--model conv"}
    grids, walk = dict.fromkeys(variants, (8, 8)), (8, 10)
    dropout, kept = {"mlp": ["0.2"], "conv": ["0.5"]}, "--model conv"
    data_file, numbers = "train-images-idx3-ubyte.gz", "loss_d loss_g"

    def networks(self, variant):
        generator = gan_mnist.GENERATORS[variant](7).apply(init_weights)
        return generator, gan_mnist.DISCRIMINATORS[variant]().apply(init_weights)

    def toy_images(self, count):
        return gan_mnist.draw_digits(count), None

    def test_the_defaults_of_each_pair_are_those_of_the_help(self):
        for model, expected in ("mlp", (50, 2e-3, 0.5)), ("conv", (16, 8e-3, 0)):
            assert tuple(gan_mnist.RECIPES[model].values()) == expected


class ClassTests(DataSetTests):
    """What the two scripts with --conditional promise besides."""

    variants, kept = {"plain": "", "classes": "--conditional"}, "--conditional"
    classes = {"plain": 1, "classes": 10}

    def test_each_class_has_images_and_a_logit_of_its_own(self):
        generator, discriminator = self.networks("classes")
        images = self.module.sample(generator, torch.ones(10, 7), torch.arange(10))
        assert len(images.unique(dim=0)) == 10
        logits = discriminator(images[:1].expand(images.shape), torch.arange(10))
        assert len(logits.unique()) == 10


class FashionTest(ClassTests, Folder):
    module, shape, data_set = gan_fashion, (1, 28, 28), gan_fashion.FashionMNIST
    grids, walk = {"plain": (9, 9), "classes": (10, 10)}, (10, 10)
    drawn, per_class, g_steps, r1, switches = 100, 10, 2, 0.25, (True, False)
    flags, parts = f"{FLAGS} --g-steps 2", {(True,): 9, (False,): 1000}
    names, bad_flags = "ABCDEFGHIJ", ("--g-steps 0",)
    data_file = "train-images-idx3-ubyte.gz"
    files = f"{Script.files} images/nearest.png"

    def networks(self, variant):
        generator = gan_fashion.Generator(7).apply(init_weights)
        return generator, gan_fashion.Discriminator().apply(init_weights)

    def toy_images(self, count):
        return gan_fashion.draw_letters(count, True)

    def compared_images(self, shuffled):
        return gan_fashion.draw_letters(1000, False)[0] / 127.5 - 1

    def test_the_copy_ratio_is_near_0_for_copies_and_near_1_for_new_images(self):
        torch.manual_seed(0)
        training, held_out, new = torch.rand(3, 50, 1, 28, 28)
        copies, path = training.flip(0) + 0.01 * new, self.folder / "nearest.png"
        assert abs(gan_fashion.copy_ratio(new, held_out, training) - 1) < 0.02
        assert abs(gan_fashion.copy_ratio(copies, held_out, training)) < 0.05
        gan_fashion.show_nearest(copies, held_out, training, path)
        nearest = torch.cdist(held_out.flatten(1), training.flatten(1)).argmin(1)
        grid = [copies, training.flip(0), torch.ones(50, 1, 28, 28)]
        grid += [held_out, training[nearest]]
        self.assert_grid(path, torch.cat([images[::3][:16] for images in grid]), 16)
        with mock.patch.object(gan_fashion, "copy_ratio", return_value=0.5) as ratio:
            assert "copy ratio 0.50" in self.train()
        _, held_out, training = ratio.call_args.args
        close(training, gan_fashion.draw_letters(16, True)[0] / 127.5 - 1)
        close(held_out, self.compared_images(None))


class Bf16Tests:
    """What the two scripts with bfloat16 promise besides."""

    flags, switches = f"{FLAGS} --no-bf16", (False, False)

    def test_bfloat16_is_used_if_asked_for_and_channels_last_always(self):
        weights = []
        for flag, name in ("--bf16", "bfloat16"), ("--no-bf16", "float32"):
            self.out = self.folder / name
            assert f" in {name}" in self.train(flag)
            weights.append(load(self.out / "models" / "generator.pth")["0.weight"])
        assert 0 < (weights[0] - weights[1]).abs().mean() < 0.01
        assert weights[0].is_contiguous(memory_format=torch.channels_last)

    def test_adam_goes_on_where_memory_is_laid_out_differently(self):
        with mock.patch("torch.channels_last", torch.contiguous_format):
            self.train()  # as on Apple's GPUs
        self.resume("--epochs 2")
        adam = load(self.out / "models" / "checkpoint.pth")["opt_g"]["state"][0]
        for name in "exp_avg", "exp_avg_sq":
            assert adam[name].is_contiguous(memory_format=torch.channels_last)


class CifarTest(Bf16Tests, ClassTests, Folder):
    module, shape, data_set = dcgan_cifar10, (3, 32, 32), dcgan_cifar10.CIFAR10
    grids, walk = {"plain": (8, 8), "classes": (10, 8)}, (10, 8)
    drawn, mirrored, r1 = 80, ("plain", "classes"), 0.05
    names, data_file = "AHIMOTUVWX", "cifar-10-python.tar.gz"

    def toy_images(self, count):
        return dcgan_cifar10.draw_letters(count)


class CelebaTest(Bf16Tests, Script, Folder):
    module, shape = dcgan_celeba, (3, 32, 32)
    flags = f"{Bf16Tests.flags} --image-size 32"
    variants = {"plain": "", "unflipped": "--no-flip"}
    grids = dict.fromkeys(variants, (8, 8))
    mirrored, r1, fakes, compared = ("plain",), 0.05, 2000, 19
    kept, data_file = "--image-size 64", "img_align_celeba.zip"
    bad_flags = ("--image-size 100", "--toy --images .")
    files = f"{Script.files} images/nearest.png"

    def setUp(self):
        super().setUp()
        self.mine, self.data = self.folder / "mine", self.folder / "data"
        self.images = "--images", self.mine

    def networks(self, variant):
        pair = dcgan_celeba.Generator(7, 32), dcgan_celeba.Discriminator(32)
        return [network.apply(init_weights) for network in pair]

    def toy_images(self, count):
        return dcgan_celeba.draw_faces(count, 32), None

    def save(self, count, folder=None):
        """Saves random images to a folder, self.mine by default, and returns them."""
        folder = folder or self.mine
        pixels = torch.randint(256, (count, 32, 32, 3)).byte().numpy()
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        return pixels

    def train_on_mine(self, *flags, code=0):
        """Begins a run on the images in self.mine. Its training is left out.

        Returns what is printed. self.trained_on is what train() is called with.
        """
        folders = *self.images, "--data-dir", self.data, "--out-dir", self.out
        with mock.patch.object(dcgan_celeba, "train") as train:
            text = call(self.module, "--image-size 32", *flags, *folders, code=code)
        self.trained_on = train.call_args and train.call_args.args
        return text

    def load(self, *flags):
        """Returns the pixels N x H x W x 3 that a run reads, and what it prints."""
        text = self.train_on_mine(*flags)
        return self.trained_on[3].permute(0, 2, 3, 1).numpy(), text

    # -- sizes, few images, copies

    def test_networks_grow_with_the_image_size_and_a_mismatch_is_named(self):
        for size in 64, 128:
            generator = dcgan_celeba.Generator(7, size)
            images = dcgan_celeba.sample(generator, torch.randn(2, 7))
            assert images.shape == (2, 3, size, size)
            assert dcgan_celeba.Discriminator(size)(images).shape == (2, 1)
            with self.assertRaisesRegex(ValueError, f"32.*{size}"):
                dcgan_celeba.Discriminator(32)(images)

    def test_the_copy_ratio_is_near_0_for_copies_and_near_1_for_new_images(self):
        torch.manual_seed(0)
        training, new = torch.rand(2, 60, 3, 32, 32) * 2 - 1
        twice = torch.cat([training, training.flip(3)])  # as in some folders
        copies, small = training.flip(0, 3), dcgan_celeba.thumbnails(twice)
        close(small, nn.functional.avg_pool2d(twice, 4).flatten(1))
        assert abs(dcgan_celeba.copy_ratio(new, training, small) - 1) < 0.05
        assert dcgan_celeba.copy_ratio(copies, training, small) < 0.01
        data, path = ((twice + 1) * 127.5).byte(), self.folder / "nearest.png"
        dcgan_celeba.show_nearest(copies[:8], training[:8], data, small, path)
        rows = read(path)[2:, 2:98].reshape(5, 98, 96, 3)[:, :96]
        fake, found, gap, real, other = rows  # the first image of each
        assert abs(fake - found[:, ::-1]).max() <= 1  # a mirrored copy
        assert (gap == 255).all() and abs(real - other).mean() > 20
        with mock.patch.object(dcgan_celeba, "copy_ratio", return_value=0.5) as ratio:
            assert "copy ratio 0.50" in self.train()
        assert read(self.out / "images" / "nearest.png").shape == (492, 786, 3)
        faces = dcgan_celeba.draw_faces(16, 32) / 127.5 - 1
        close(ratio.call_args.args[2], dcgan_celeba.thumbnails(faces))

    # -- your own images

    def test_images_of_all_kinds_are_read_and_what_cannot_be_is_named(self):
        self.save(11)
        (self.mine / "x").mkdir()
        wide = Image.new("RGB", (200, 64))  # of which the middle is used
        wide.paste("red", (68, 0, 100, 64))
        wide.paste("blue", (100, 0, 132, 64))
        for name, image in {
            "x/.hidden.png": wide,
            "x/a.bmp": wide,
            "x/b.png": Image.new("L", (70, 70), 90),
            "x/c transparent.png": Image.new("RGBA", (64, 64)),
            "x/d of 16 bits.png": Image.new("I;16", (64, 64), 257 * 90),
            "x/e.png": wide.resize((7, 100)),
        }.items():
            image.save(self.mine / name)
        turned = Image.Exif()
        turned[0x112] = 6  # shown after a quarter turn to the right
        wide.rotate(90, expand=True).save(self.mine / "x" / "turned.JPG", exif=turned)
        (self.mine / "x" / "z cut.bmp").write_bytes(b"BM")
        (self.mine / "x" / "a caption.txt").touch()
        pixels, text = self.load()
        for words in "z cut", "cannot identify image", "7 x 100 is":
            assert words in text and "caption" not in text, text
        assert "16 images decoded, 2 left out" in text
        half, grey, white, of_16_bits, turned = pixels[11:]
        assert (grey == 90).all() and (white == 255).all() and (of_16_bits == 90).all()
        for image in half, turned:
            expected = [[255, 0, 0], [0, 0, 255]]
            np.testing.assert_allclose(image[16, [4, 27]], expected, atol=6)

    def test_a_limit_chooses_evenly_and_links_to_folders_are_named(self):
        expected = self.save(48)
        assert (self.load("--limit 16")[0] == expected[::3]).all()
        if os.name != "nt":  # where only administrators may make links
            (self.mine / "more").symlink_to(self.folder)
            pixels, text = self.load()
            assert len(pixels) == 48 and "more: a link" in text

    def test_a_disk_that_is_full_or_fails_stops_the_run_and_leaves_nothing(self):
        self.save(16)
        with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=9999)):
            assert "--data-dir" in self.train_on_mine(code=1)
        for place in "PIL.Image.open", "tempfile.TemporaryFile":
            with mock.patch(place, side_effect=OSError(5, "Input/output error")):
                assert "Input/output error" in self.train_on_mine(code=1)
        assert not list(self.data.iterdir())

    def test_folders_that_cannot_be_learned_from_are_refused_by_name(self):
        assert f"{self.mine} is no folder" in self.train_on_mine(code=1)
        self.mine.mkdir()
        (self.mine / "a.heic").touch()
        text = self.train_on_mine(code=1)
        assert "a.heic: cannot" in text and "Only 0 images" in text, text
        self.out = self.mine / "out"
        assert "must not lie in --images" in self.train_on_mine(code=1)

    # -- CelebA

    def test_celeba_is_unpacked_whole_or_not_at_all(self):
        expected = self.save(16, self.folder / "x" / "img_align_celeba")
        (self.data / "celeba").mkdir(parents=True)
        archive = self.data / "celeba" / "img_align_celeba"
        shutil.make_archive(archive, "zip", self.folder / "x")

        def unpack(_, folder):  # until the disk is full
            self.save(1, Path(folder, "img_align_celeba"))
            raise OSError("disk full")

        self.images = ()
        with mock.patch.object(dcgan_celeba, "extract_archive", unpack):
            assert "celeba.zip" in self.train_on_mine(code=1)
        assert (self.load()[0] == expected).all()

    # -- several processes

    @unittest.skipIf(os.name == "nt", "torchrun on Windows needs settings of its own")
    def test_two_processes_train_one_run(self):
        code = "import dcgan_celeba as m; m.MIN_EPOCH_STEPS = 2; m.main()"
        flags = f"{self.flags} --epochs 1 --out-dir {self.out}"
        torchrun = (
            "-m torch.distributed.run --standalone --nproc-per-node=2 --no-python"
        )
        python = [sys.executable, "-c", code, *flags.split()]
        command = [sys.executable, *torchrun.split(), *python]
        process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert process.stdout.count("epoch 1/1") == 1, process.stderr
        assert "epoch 2/2" in self.resume("--epochs 2")

    def test_processes_learn_from_the_mean_of_their_gradients(self):
        layer = nn.Linear(1, 1)
        dcgan_celeba.share_gradients(layer)
        with (
            mock.patch.multiple(dcgan_celeba, TORCHRUN=True, PROCESSES=2),
            mock.patch("torch.distributed.all_reduce", lambda value: value.add_(4)),
        ):
            layer(torch.full((1, 1), 2.0)).backward()  # 2 here, 4 elsewhere
        assert layer.weight.grad == 3
        with mock.patch.object(dcgan_celeba, "share_gradients") as share:
            self.train()
        assert share.call_count == 2  # once for G, once for D
