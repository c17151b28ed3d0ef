"""Tests of what a user sees: run them with  python -m unittest  (pytest collects them too).

Trainings are the real command in a process of its own, on --toy pictures or on small files written
here; refusals call main() with the same flags, to spare the start of a process. Nothing is
downloaded.
"""
import contextlib
import csv
import importlib
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

import gan_mnist
from common import init_weights, save_grid

HERE = Path(__file__).resolve().parent
COLUMNS = ["epoch", "loss_d", "loss_g", "acc_real", "acc_fake", "fooled", "diversity", "seconds",
           "images_per_s"]
TINY = ("--toy", "--limit", "200", "--batch-size", "32")
NO_NETWORK = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", no_proxy="")


def run(script, *flags, code=0, cwd=None):
    """Runs a script, asserts its exit code and returns what it printed, errors included."""
    done = subprocess.run([sys.executable, "-W", "error", HERE / script, *map(str, flags)],
                          capture_output=True, text=True, cwd=cwd, timeout=300,
                          env={**os.environ, **NO_NETWORK})
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{flags}: exit code {done.returncode}, not {code}\n{text}"
    assert code == 0 or "Traceback" not in text, text
    return text


def refused(script, *flags, code=1):
    """Calls a script's main(), asserts that it exits with that code and returns the message."""
    errors = io.StringIO()
    with mock.patch("sys.argv", [script, *map(str, flags)]), contextlib.redirect_stderr(errors), \
            mock.patch.dict(os.environ, NO_NETWORK), contextlib.redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(script.removesuffix(".py")).main()
            raise AssertionError(f"{flags} were not refused")
        except SystemExit as stop:  # sys.exit(text) prints the text and exits with code 1
            text = stop.code if isinstance(stop.code, str) else errors.getvalue()
            found = 1 if isinstance(stop.code, str) else stop.code
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
        images = torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
        save_grid(images, self.folder / "new" / "grid.png", columns=3)
        grid = read(self.folder / "new" / "grid.png")
        self.assertEqual(grid.shape, (2 * 6 + 2, 3 * 6 + 2, 3))
        levels = [int(grid[4 + 6 * (i // 3), 4 + 6 * (i % 3), 0]) for i in range(5)]
        self.assertEqual(levels, [0, 128, 255, 0, 255])

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


class MnistTest(Folder):
    """One trained run of each model, looked at from several sides."""

    @classmethod
    def setUpClass(cls):
        cls.runs = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.runs)
        cls.printed = {model: run("gan_mnist.py", *TINY, "--model", model, "--epochs", 3,
                                  "--sample-every", 2, "--latent-dim", 7, "--out-dir",
                                  cls.runs / model) for model in ("mlp", "conv")}

    def copy(self, model="mlp"):
        return shutil.copytree(self.runs / model, self.folder / "copy")

    def test_networks_have_the_promised_shapes(self):
        for model in ("mlp", "conv"):
            pictures = gan_mnist.Generator(model, latent_dim=7)(3 * torch.randn(5, 7))
            self.assertEqual(pictures.shape, (5, 1, 28, 28))
            self.assertLessEqual(pictures.abs().max().item(), 1)
            self.assertEqual(gan_mnist.Discriminator(model)(pictures).shape, (5,))

    def test_a_run_writes_every_file(self):
        for model in ("mlp", "conv"):
            out = self.runs / model
            files = {str(file.relative_to(out).as_posix()) for file in out.rglob("*.*")}
            self.assertEqual(files, {
                "images/real.png", "images/epoch_000.png", "images/epoch_002.png",
                "images/epoch_003.png", "progress.gif", "losses.png", "history.csv",
                "models/generator.pth", "models/discriminator.pth", "models/checkpoint.pth"})
            for grid in (out / "images").iterdir():
                self.assertEqual(read(grid).shape, (242, 242, 3), grid)
            self.assertEqual(frames(out / "progress.gif"), 3)

    def test_history_has_a_row_an_epoch(self):
        with open(self.runs / "mlp" / "history.csv", newline="") as file:
            rows = list(csv.reader(file))
        self.assertEqual(rows[0], COLUMNS)
        self.assertEqual([row[0] for row in rows[1:]], ["1", "2", "3"])
        for row in np.array(rows[1:], dtype=float):
            self.assertTrue((row[1:] > -1e-9).all() and (row[3:6] <= 1).all(), row)
            self.assertAlmostEqual(row[7] * row[8], 6 * 32, delta=0.01)  # 200 // 32 = 6 steps

    def test_every_epoch_prints_its_line(self):
        lines = self.printed["mlp"].splitlines()
        self.assertIn("200 pictures", lines[0])
        self.assertEqual([line.split()[:2] for line in lines[1:]],
                         [["epoch", f"{epoch}/3"] for epoch in (1, 2, 3)])
        for word in ("loss", "right on real", "fooled", "diversity", "pictures/s"):
            self.assertIn(word, lines[1])
        self.assertIn("LOW DIVERSITY", lines[1])  # G has not learned to vary yet

    def test_models_load_by_themselves_and_the_generator_is_the_average(self):
        for model in ("mlp", "conv"):
            models = self.runs / model / "models"
            average = load(models / "generator.pth")
            gan_mnist.Generator(model, latent_dim=7).load_state_dict(average)
            gan_mnist.Discriminator(model).load_state_dict(load(models / "discriminator.pth"))
            checkpoint = load(models / "checkpoint.pth")
            name = "0.weight"
            self.assertTrue(average[name].equal(checkpoint["ema"]["module." + name]))
            self.assertFalse(average[name].equal(checkpoint["generator"][name]))
            for mean in [name for name in average if name.endswith("running_mean")]:
                self.assertGreater(average[mean].abs().max().item(), 0, "buffers are averaged too")

    def test_sampling_is_in_evaluation_mode_and_puts_the_mode_back(self):
        generator = gan_mnist.Generator("conv").train()
        z = torch.randn(4, 100)
        alone, together = gan_mnist.sample(generator, z[:1]), gan_mnist.sample(generator, z)
        torch.testing.assert_close(alone, together[:1])
        self.assertTrue(generator.training)
        self.assertFalse(together.requires_grad)

    def test_a_stopped_and_resumed_run_ends_in_the_same_bytes(self):
        flags = (*TINY, "--epochs", "6", "--latent-dim", "7")
        for model in ("mlp", "conv"):
            whole, cut = self.folder / f"whole {model}", self.folder / f"cut {model}"
            run("gan_mnist.py", *flags, "--model", model, "--out-dir", whole)
            process = subprocess.Popen(
                [sys.executable, HERE / "gan_mnist.py", *flags, "--model", model, "--out-dir", cut],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2):
                process.stdout.readline()  # the second line says that the first epoch is done
            process.send_signal(signal.SIGINT)
            text = "".join(process.communicate(timeout=60))
            self.assertNotIn("Traceback", text)
            self.assertIn(f'python gan_mnist.py --resume --out-dir "{cut}"', text)
            self.assertLess(len(load(cut / "models" / "checkpoint.pth")["history"]), 6)
            run("gan_mnist.py", "--resume", "--out-dir", cut)
            for name in ("generator.pth", "discriminator.pth"):
                self.assertEqual((whole / "models" / name).read_bytes(),
                                 (cut / "models" / name).read_bytes(), f"{model} {name}")
            a, b = (load(out / "models" / "checkpoint.pth") for out in (whole, cut))
            for row, other in zip(a["history"], b["history"], strict=True):
                self.assertEqual(row[:7], other[:7])  # all but the seconds
            np.testing.assert_array_equal(read(whole / "images" / "epoch_006.png"),
                                          read(cut / "images" / "epoch_006.png"))

    def test_resume_takes_flags_from_the_run_but_lets_the_command_line_win(self):
        out = self.copy()
        run("gan_mnist.py", "--resume", "--epochs", 4, "--out-dir", out)
        checkpoint = load(out / "models" / "checkpoint.pth")
        self.assertEqual([row[0] for row in checkpoint["history"]], [1, 2, 3, 4])
        self.assertEqual(checkpoint["settings"]["batch_size"], 32)
        self.assertEqual(checkpoint["settings"]["epochs"], 4)

    def test_resume_mends_what_a_kill_left_half_written(self):
        out = self.copy()
        for name in ("images/epoch_004.png", "progress.gif", "history.csv", "models/generator.pth"):
            (out / name).write_bytes(b"half")
        run("gan_mnist.py", "--resume", "--epochs", 3, "--out-dir", out)  # nothing left to train
        self.assertEqual(frames(out / "progress.gif"), 3)
        for name in ("history.csv", "models/generator.pth"):
            self.assertEqual((out / name).read_bytes(), (self.runs / "mlp" / name).read_bytes())
        run("gan_mnist.py", "--resume", "--epochs", 4, "--out-dir", out)
        self.assertEqual(read(out / "images" / "epoch_004.png").shape, (242, 242, 3))

    def test_the_checkpoint_alone_is_enough_to_resume(self):
        (self.folder / "models").mkdir()
        shutil.copy(self.runs / "mlp" / "models" / "checkpoint.pth", self.folder / "models")
        run("gan_mnist.py", "--resume", "--epochs", 4, "--out-dir", self.folder)
        self.assertEqual(frames(self.folder / "progress.gif"), 1)
        self.assertTrue((self.folder / "images" / "epoch_004.png").exists())

    def test_generate_needs_the_checkpoint_alone(self):
        for model in ("mlp", "conv"):
            out = self.folder / model
            (out / "models").mkdir(parents=True)
            shutil.copy(self.runs / model / "models" / "checkpoint.pth", out / "models")
            run("gan_mnist.py", "--generate", 501, "--out-dir", out, cwd=self.folder)
            self.assertFalse((self.folder / "data").exists())
            pictures = sorted((out / "generated").glob("[0-9]*.png"))
            self.assertEqual([file.name for file in pictures],
                             [f"{i:05d}.png" for i in range(501)])
            pixels = np.stack([read(file) for file in pictures])
            self.assertEqual((pixels.shape, pixels.dtype), ((501, 28, 28), np.uint8))
            self.assertEqual(len({picture.tobytes() for picture in pixels}), 501)
            grid = read(out / "generated" / "grid.png")
            self.assertEqual(grid.shape, (242, 242, 3))
            np.testing.assert_allclose(grid[2:30, 2:30, 0].astype(int), pixels[0], atol=1)
            self.assertEqual(read(out / "generated" / "walk.png").shape, (242, 302, 3))
            before = (out / "generated" / "00000.png").stat().st_mtime_ns
            self.assertIn("generated", refused("gan_mnist.py", "--generate", 2, "--out-dir", out))
            self.assertEqual((out / "generated" / "00000.png").stat().st_mtime_ns, before)

    def test_mnist_is_read_from_files_in_torchvisions_layout(self):
        raw = self.folder / "my data" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (70, 28, 28), dtype=np.uint8)
        for split in ("train", "t10k"):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(
                struct.pack(">IIII", 0x803, 70, 28, 28) + pixels.tobytes())
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(
                struct.pack(">II", 0x801, 70) + bytes(70))
        run("gan_mnist.py", "--data-dir", "my data", "--epochs", 1, "--batch-size", 70, "--out-dir",
            "out", cwd=self.folder)
        real = read(self.folder / "out" / "images" / "real.png")
        for i in (0, 7, 63):
            top, left = 2 + 30 * (i // 8), 2 + 30 * (i % 8)
            np.testing.assert_array_equal(real[top:top + 28, left:left + 28, 1], pixels[i])

    def test_bad_flags_are_refused_with_code_2(self):
        for flags in (("--epochs", 0), ("--batch-size", 1), ("--latent-dim", 0), ("--limit", 0),
                      ("--beta1", 1), ("--beta1", -0.1), ("--lr", 0), ("--lr", "nan"),
                      ("--sample-every", 0), ("--generate", 0), ("--seed", -1), ("--epochs", "ten"),
                      ("--model", "gru")):
            out = self.folder / "out"
            self.assertIn(flags[0], refused("gan_mnist.py", *flags, "--out-dir", out, code=2))
        self.assertIn("--epochs", run("gan_mnist.py", "--epochs", 0, "--out-dir", out, code=2))
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
                "images-idx3-ubyte.gz": ("--data-dir", self.folder / "none", "--out-dir", out),
        }.items():
            self.assertIn(word, refused("gan_mnist.py", *flags))
        self.assertIn("--resume", run("gan_mnist.py", "--toy", "--out-dir", full, code=1))
        self.assertEqual((full / "losses.png").read_text(), "mine")
        self.assertEqual(blocked.read_text(), "mine")
        self.assertEqual([file for file in out.rglob("*") if file.is_file()], [])

    def test_a_checkpoint_of_another_model_or_size_is_refused(self):
        out = self.copy()
        for flags in (("--model", "conv"), ("--latent-dim", 8)):
            for what in (("--resume",), ("--generate", 5)):
                self.assertIn("another", refused("gan_mnist.py", *what, *flags, "--out-dir", out))

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
        torch.save({"script": "gan_mnist", "settings": Payload()}, path)
        payload = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", bytes(flipped), foreign, payload,
                        pickle.dumps(Payload())):
            path.write_bytes(content)
            text = refused("gan_mnist.py", "--resume", "--out-dir", path.parents[1])
            self.assertIn("damaged", text)
            self.assertFalse(trap.exists())
            self.assertEqual(path.read_bytes(), content)

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        out = self.folder / "out"
        text = run("gan_mnist.py", *TINY, "--lr", 1e30, "--out-dir", out, code=1)
        self.assertIn("smaller --lr", text)
        self.assertTrue(all(value.isfinite().all() for value in
                            load(out / "models" / "checkpoint.pth")["ema"].values()))

    def test_a_full_disk_leaves_the_last_checkpoint_whole(self):
        out = self.copy()
        path = out / "models" / "checkpoint.pth"
        before = path.read_bytes()
        (out / "models" / "checkpoint.tmp").mkdir()  # stands in for a disk that takes no more
        text = run("gan_mnist.py", "--resume", "--epochs", 4, "--out-dir", out, code=1)
        self.assertIn("--resume", text)
        self.assertEqual(path.read_bytes(), before)


if __name__ == "__main__":
    unittest.main()
