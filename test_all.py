"""All tests, in the reading order of the files: data, model, losses, sample, fid, train.

    python -m pytest test_all.py           or   python test_all.py -k word

A test's docstring is its claim. Truth comes from closed forms (the Gaussian mixture of losses.py, whose velocity, score
and flow map are known), from golden numbers computed with the official model definitions, or from doing the same thing
two ways. Tolerances: float64 identities 1e-9 and better, float32 against another float32 program 1e-5 of the rms.
"""
import argparse
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before model.py is imported: its kernels then run on a CPU

import data
import fid
import losses
import model
import sample
import train

HERE = Path(__file__).parent
CACHE = os.environ["TRIFLOW_CACHE"] = tempfile.mkdtemp()  # one GlyphNet for all tests, and never the user's
torch.set_num_threads(1)  # two processes often share two cores here, and idle threads that spin make everything slow


# --------------------------------------------------------------------------------------------------------------------
# Toolbox
# --------------------------------------------------------------------------------------------------------------------


def error_of(function, *args, **kwargs) -> str:
    """The message of the ValueError or OSError that a call must raise; it must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def raises(call, *words) -> None:
    """The call raises a ValueError or OSError of one line that has all the words."""
    text = error_of(call)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


def run(*command, script: str = "", **options) -> subprocess.CompletedProcess:
    """Run python (with these arguments) in a process of its own, one thread, from the repository."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    arguments = ["-c", script] if script else list(map(str, command))
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, **options)


def torchrun(processes: int, *command) -> subprocess.CompletedProcess:
    done = run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def tiny(cls=None, **options):
    """A network of 8 x 8 pixels with random weights everywhere, also where adaLN-zero starts with zeros."""
    torch.manual_seed(0)
    net = (cls or model.DiT)(**dict(input_size=8, patch=2, channels=3, width=32, depth=2, heads=2, num_classes=10) | options)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net.eval()


SMALL_SET = Path(tempfile.mkdtemp()) / "glyphs.npz"  # 200 glyphs: read at once, where drawing all 20,000 takes seconds
np.savez(SMALL_SET, **dict(zip(("images", "labels"), (part.numpy() for part in data.glyphs(200)))))

SMALL_ENCODER = f"{SMALL_SET.with_name('encoder.py')}:patches"  # 16 patches and the image, 12 random features of their colours
SMALL_SET.with_name("encoder.py").write_text("""
import torch
def patches(images):
    colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)
    colours = torch.cat([colours.mean(1, keepdim=True), colours], 1)
    return torch.sin(colours @ (7 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(images)))
def image(images):
    return images
""")


model.ZOO["tiny"] = model.ZOO["glyph-S"] | dict(width=48, depth=3)


def tiny_run(out, **options) -> train.Config:
    """A training run of milliseconds a step."""
    defaults = dict(out=str(out), model="tiny", data=str(SMALL_SET), steps=10, batch=8, warmup=2, log_every=2, save_every=100, sample_every=0, score=0,
                    sample_steps=2, decay="constant", device="cpu")
    return train.Config(**defaults | options)


def same(a, b) -> bool:
    """Whether two nested structures of tensors and values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


FLOAT_MODES = losses.Mixture(torch.tensor([[-1.5], [1.5]]), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
TWO_MODES = losses.Mixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64),
                           torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64))


class ExactNet(nn.Module):
    """The exact velocity of a mixture in place of a network: the label is the component, the null label all of them."""
    predict, t_min, null_class = "v", 0.0, True

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.num_classes, self.rows = mixture, len(mixture.weights), 0

    def forward(self, x_t, t, y, r=None):
        self.rows += len(x_t)
        given = self.mixture.velocity(x_t, t, y.clamp_max(self.num_classes - 1))
        return torch.where((y == self.num_classes)[:, None], self.mixture.velocity(x_t, t), given)


# --------------------------------------------------------------------------------------------------------------------
# data.py
# --------------------------------------------------------------------------------------------------------------------


def test_data_glyphs_depend_on_the_seed_only():
    """glyphs(n, seed) is deterministic, a prefix of longer draws, balanced, different for other seeds, and touches no
    global random state."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    x, y = data.glyphs(1500)
    assert torch.equal(before, torch.random.get_rng_state())
    assert x.shape == (1500, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert y.bincount().tolist() == [150] * 10
    assert torch.equal(x[:1100], data.glyphs(1100)[0])
    assert not torch.equal(x, data.glyphs(1500, seed=1)[0])
    assert not torch.equal(x[:500], x[1000:])
    assert data.glyphs(3, size=64)[0].shape == (3, 3, 64, 64)


def test_data_glyphs_have_contrast():
    """Ink and ground differ by at least 0.25 of the range in every channel of every image."""
    x, _ = data.glyphs(2000)
    span = x.flatten(2).amax(2).int() - x.flatten(2).amin(2).int()
    assert span.min() >= 64, span.min()


def test_data_uint8_rule():
    """(127.5 x + 128).clamp(0, 255); all 256 levels survive the way to float and back; NaN is an error."""
    x = torch.tensor([-2, -1, -0.9999, 0, 1, 1.5]).view(1, 1, 1, 6)
    assert data.to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)
    assert "1 of 2 images" in error_of(data.to_uint8, torch.tensor([[0.0, 1.0], [float("nan"), 0]]))


def test_data_draws_do_not_depend_on_the_batch():
    """Sample i's random numbers depend on (seed, purpose, i) only, and are standard normal and uniform."""
    whole, part = data.Draws(3, range(64)), data.Draws(3, [40, 7])
    noise = whole.normal("noise", (3, 8, 8))
    assert torch.equal(noise[[40, 7]], part.normal("noise", (3, 8, 8)))
    assert torch.equal(whole.uniform("time")[[40, 7]], part.uniform("time"))
    assert not torch.equal(noise, whole.normal("other", (3, 8, 8)))
    assert not torch.equal(noise, data.Draws(4, range(64)).normal("noise", (3, 8, 8)))
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
    many = data.Draws(0, range(4000)).uniform("u").sort().values
    assert (many - (torch.arange(4000) + 0.5) / 4000).abs().max() < 0.026  # Kolmogorov-Smirnov at 1 %


def test_data_bank_draws_from_the_class():
    """Candidates are images of the sample's class, each equally often, functions of the position; half of them mirrored
    where images are; a class with few images repeats them."""
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 3, 4, 4)
    images[..., 0] += 100
    source = data.Arrays(images, torch.tensor([0] * 7 + [1] * 3 + [3] * 2), None)
    bank, draws = data.Bank(source, 5, 0), data.Draws(0, range(600))
    y = torch.arange(600) % 4
    y[y == 2] = 1  # no image has this class
    seen = ((bank(y, draws, 3)[:, :, 0, 0, 3] + 1) * 127.5).round()
    counts = [seen[y == k].flatten().long().bincount(minlength=12) for k in range(4)]
    assert counts[0][:7].gt(0).sum() == 5 and counts[0][7:].sum() == 0                # 5 of the 7
    assert counts[0][counts[0] > 0].min() > 60 and (counts[1].nonzero()[:, 0] == torch.tensor([7, 8, 9])).all()
    assert counts[3][10:].sum() == 450
    assert torch.equal(bank(y[5:9], data.Draws(0, range(5, 9)), 3), bank(y, draws, 3)[5:9])
    assert len({tuple(data.Bank(source, 5, seed).items[0, :, 0, 0, 3].sort().values.tolist()) for seed in range(9)}) > 1
    there, turned = (b(y, draws, 3) for b in (bank, data.Bank(source, 5, 0, mirror=True)))
    assert (there[..., 0] > there[..., 3]).all() and 0.45 < (turned[..., 0] > turned[..., 3]).float().mean() < 0.55


def test_data_epochs_are_permutations_and_steps_can_be_sought():
    """Every epoch visits every image once in an order of its own; a stream started later is the tail of the stream,
    whatever the number of workers."""
    n = 20
    epochs = [[data.index_at(n, p, 0) for p in range(k * n, k * n + n)] for k in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2)
    source = data.Arrays(images.contiguous(), torch.arange(n), None)
    positions = [list(range(k, k + 4)) for k in range(0, 40, 4)]
    whole = list(data.stream(source, iter(positions), 0))
    tail = list(data.stream(source, iter(positions[6:]), 0, workers=2))
    assert same(whole[6:], tail)
    assert [int(i) for b, _, _ in whole for i in b[:, 0, 0, 0]] == epochs[0] + epochs[1]


def test_data_mirror_flips_half_of_the_images_by_position():
    images = torch.tensor([0, 1], dtype=torch.uint8).expand(400, 3, 2, 2).contiguous()
    source = data.Arrays(images, torch.zeros(400, dtype=torch.int64), None)
    (flipped, *_), = data.stream(source, [list(range(400))], 0, mirror=True)
    share = flipped[:, 0, 0, 0].float().mean()
    (halves, *_), = data.stream(source, [list(range(100, 300))], 0, mirror=True)
    assert 0.4 < share < 0.6 and torch.equal(flipped[100:300], halves)


def picture(size=(40, 30), colour="red", mode="RGB") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def test_data_image_folders(tmp_path):
    """Class folders in sorted order, or flat for one class; greyscale, alpha, palette, 16-bit and rotated images become
    RGB of one size."""
    for name, image in {"b/grey.png": picture(mode="L"), "b/palette.gif": picture(mode="P"), "a/x.JPEG": picture(),
                        "a/deep.png": Image.fromarray(np.full((30, 40), 65535 // 2, np.uint16)),
                        "a/sub/clear.png": Image.new("RGBA", (33, 50), (255, 0, 0, 0))}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    ds = data.dataset(str(tmp_path), 16)
    assert len(ds) == 5 and ds.classes == ["a", "b"] and ds.shape == (3, 16, 16) and ds.mirror
    items = {n: ds.item(i) for i, n in enumerate(ds.names)}
    assert [label for _, label in items.values()] == [0, 0, 0, 1, 1]
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x, _ in items.values())
    assert (items["a/deep.png"][0] == 127).all() and (items["a/sub/clear.png"][0] == 255).all()
    assert items["b/palette.gif"][0][0].min() > 250 and items["b/palette.gif"][0][1].max() < 5
    for k in range(8):
        (tmp_path / "many" / f"n{k}").mkdir(parents=True)
        picture().save(tmp_path / f"many/n{k}/x.png")
    assert data.dataset(str(tmp_path / "many"), 8).classes == [f"n{k}" for k in range(8)]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(tmp_path / "a")  # how subsets of ImageNet are often laid out
    assert len(data.dataset(str(tmp_path / "links"), 16)) == 3
    assert pickle.loads(pickle.dumps(ds)).item(1)[1] == 0 and pickle.dumps(data._as_it_is)  # for spawned workers
    flat = data.dataset(str(tmp_path / "b"), 16)
    assert flat.num_classes == 1 and len(flat) == 2
    sideways = Image.new("RGB", (40, 20), "red")
    sideways.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left edge belongs on top
    sideways.save(tmp_path / "turned.jpg", exif=exif)
    x = data.decode(tmp_path / "turned.jpg", "turned.jpg", None)
    assert x.shape == (3, 40, 20) and x[2, :15].float().mean() > 200 and x[0, 25:].float().mean() > 200


def test_data_centre_crop_is_adms():
    """Halve by box while twice too large, bicubic to the short side, crop the centre."""
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    x = np.asarray(data.centre_crop(Image.fromarray(ramp), 50))
    assert x.shape == (50, 50, 3)
    assert np.abs(x[25, :, 0] - (np.arange(50) + 25) * 2.0 - 0.5).max() <= 1  # pixel k of 100 averages 2k and 2k+1
    noise = np.random.RandomState(0).randint(0, 256, (100, 100, 3)).astype(np.uint8)
    means = noise.reshape(50, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(data.centre_crop(Image.fromarray(noise), 50)) - means).max() <= 1
    odd = data.centre_crop(Image.new("RGB", (37, 91)), 16)
    assert odd.size == (16, 16)


def test_data_zip_npz_mnist_and_cifar(tmp_path):
    """EDM zips, ADM and plain npz, MNIST idx raw and gzipped, and CIFAR-10 binary give the same images and labels."""
    images = torch.randint(0, 256, (6, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    labels = [2, 0, 1, 1, 0, 2]
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as archive:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            archive.writestr(f"00000/img{i}.png", buffer.getvalue())
        table = [[f"00000/img{i}.png", k] for i, k in enumerate(labels)]
        archive.writestr("dataset.json", json.dumps({"labels": table}))
    np.savez(tmp_path / "adm.npz", arr_0=images, arr_1=np.array(labels))
    np.savez(tmp_path / "plain.npz", images=images.transpose(0, 3, 1, 2), labels=np.array(labels))
    (tmp_path / "test_batch.bin").write_bytes(b"".join(
        bytes([k]) + image.transpose(2, 0, 1).tobytes() for image, k in zip(images, labels)))
    for name in ("edm.zip", "adm.npz", "plain.npz", "test_batch.bin"):
        ds = data.dataset(str(tmp_path / name))
        x, y = next(data.batches(ds, [list(range(6))], workers=2 if name == "edm.zip" else 0))
        assert torch.equal(x, torch.from_numpy(images).permute(0, 3, 1, 2)), name
        assert y.tolist() == labels and ds.num_classes == (10 if "bin" in name else 3), name
    grey = images[:, :28, :28, 0].copy()
    pair = {"images-idx3-ubyte": struct.pack(">4i", 0x803, 6, 28, 28) + grey.tobytes(),
            "labels-idx1-ubyte": struct.pack(">2i", 0x801, 6) + bytes(labels)}
    (tmp_path / "gz").mkdir()
    for name, content in pair.items():
        (tmp_path / f"t10k-{name}").write_bytes(content)
        (tmp_path / "gz" / f"train-{name}.gz").write_bytes(gzip.compress(content))
    for source in (tmp_path / "t10k-images-idx3-ubyte", tmp_path / "gz"):
        ds = data.dataset(str(source))
        assert ds.shape == (3, 28, 28) and not ds.mirror
        assert torch.equal(ds.item(3)[0], torch.from_numpy(grey[3]).expand(3, 28, 28)) and ds.item(3)[1] == 1
    assert data.dataset(str(tmp_path / "gz"), 32).item(0)[0].shape == (3, 32, 32)


def test_data_errors_name_the_file_and_the_fix(tmp_path):
    """Missing, empty, broken and mixed inputs: one line that says what is wrong and where, also from worker processes."""
    assert "no such file" in error_of(data.dataset, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no images found" in error_of(data.dataset, str(tmp_path / "empty"))
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / "set" / name)
    whole = (tmp_path / "set/a/2.png").read_bytes()
    (tmp_path / "set/a/2.png").write_bytes(whole[:60])
    ds = data.dataset(str(tmp_path / "set"), 16)
    for workers in (0, 1):
        assert "a/2.png" in error_of(list, data.batches(ds, [[0, 1]], workers))
    picture((50, 50)).save(tmp_path / "set/a/2.png")
    message = error_of(data.dataset(str(tmp_path / "set")).item, 1)
    assert "40x30" in message and "50x50" in message and "--size" in message
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 3), np.float32))
    assert "float32" in error_of(data.dataset, str(tmp_path / "float.npz"))
    for labels in (np.array([0, -1]), np.array([0.5, 1]), np.array([1])):
        np.savez(tmp_path / "labels.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=labels)
        assert "labels" in error_of(data.dataset, str(tmp_path / "labels.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "float.npz").read_bytes()[:100])
    assert "cut.npz" in error_of(data.dataset, str(tmp_path / "cut.npz"))
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", images=np.array([{}, {}]))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    for name in ("text", "objects", "none", "other"):
        assert f"{name}.npz" in error_of(data.dataset, str(tmp_path / f"{name}.npz"))
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    assert "broken.zip" in error_of(data.dataset, str(tmp_path / "broken.zip"))
    with zipfile.ZipFile(tmp_path / "list.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("dataset.json", "[1, 2]")
    assert "dataset.json" in error_of(data.dataset, str(tmp_path / "list.zip"))
    (tmp_path / "x.bin").write_bytes(bytes(3000))
    assert "3073" in error_of(data.dataset, str(tmp_path / "x.bin"))
    (tmp_path / "t-images-idx3-ubyte").write_bytes(bytes(100))
    assert "labels" in error_of(data.dataset, str(tmp_path / "t-images-idx3-ubyte"))
    for content in (bytes(3), bytes(100)):
        (tmp_path / "t-labels-idx1-ubyte").write_bytes(content)
        (tmp_path / "t-images-idx3-ubyte").write_bytes(content)
        assert "cut short" in error_of(data.dataset, str(tmp_path / "t-images-idx3-ubyte"))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a").mkdir()
    picture().save(tmp_path / "mixed/x.png")
    picture().save(tmp_path / "mixed/a/y.png")
    assert "subfolders" in error_of(data.dataset, str(tmp_path / "mixed"))


def test_data_command_line(capsys):
    """Flags come from the dataclass; dashes are underscores; an unknown flag names its neighbour."""
    cfg = data.parse(train.Config, ["--save-every", "7", "--no-compile", "--lr=1e-3"], "")
    assert cfg.save_every == 7 and cfg.lr == 1e-3 and cfg.compile is False and cfg.batch == train.Config.batch
    assert "did you mean --batch?" in error_of(data.parse, train.Config, ["--bach", "3"], "")
    assert "nonsense" in error_of(data.parse, train.Config, ["--loss", "nonsense"], "")
    done = run("train.py", "--stepz", "3", cwd=HERE)
    assert done.returncode == 2 and done.stderr.strip() == "error: unknown argument --stepz; did you mean --steps?"
    for script in (data, model, losses, sample, fid, train):
        with pytest.raises(SystemExit) as leaving:
            script.main(["--help"])
        assert leaving.value.code == 0 and "--" in capsys.readouterr().out


def test_data_every_option_is_used():
    """No dead options: every field of every config is read somewhere in its file."""
    for module in (data, model, losses, sample, fid, train):
        text = Path(module.__file__).read_text() + (Path(losses.__file__).read_text() if module is train else "")
        for field in dataclasses.fields(module.Config):
            assert re.search(rf"\b(cfg|self\.cfg|now)\.{field.name}\b", text), f"{module.__name__} --{field.name}"


def test_data_required_files_are_explained_and_checked(tmp_path):
    """A missing file gives URL, path, size and digest; a wrong one is refused; nothing is downloaded."""
    path = tmp_path / "weights.bin"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of b"test"
    message = error_of(data.require_file, path, "weights", "https://example.org/w", 4, digest)
    assert all(part in message for part in (str(path), "https://example.org/w", "4 bytes", digest))
    path.write_bytes(b"tes")
    assert "incomplete" in error_of(data.require_file, path, "weights", "url", 4, digest)
    path.write_bytes(b"tesu")
    assert "sha256" in error_of(data.require_file, path, "weights", "url", 4, digest)
    path.write_bytes(b"test")
    assert data.require_file(path, "weights", "url", 4, digest[:8]) == path


def write_safetensors(path, tensors: dict, **header):
    """A .safetensors file; `header` changes entries of its header."""
    entries, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, tensor in tensors.items():
        blobs.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    for name, change in header.items():
        entries[name] = entries[name] | change
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def test_data_safetensors(tmp_path):
    """Tensors come back bit for bit, of every type and at odd places; a header that lies is refused before reading."""
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.randn(2, 1, 3).bfloat16(),
               "d": torch.arange(4), "e": torch.tensor(2.5), "f": torch.empty(0, 3)}
    for padding in ("", "x", "xyz"):  # moves the data to other alignments
        write_safetensors(path, tensors, __metadata__={"note": padding})
        assert same(data.read_safetensors(path), tensors)
    write_safetensors(path, {})
    assert data.read_safetensors(path) == {}
    for change in (dict(dtype="F64"), dict(dtype="X1"), dict(shape=[3, 5]), dict(shape=[-3, -4]), dict(shape="x"), dict(shape=[10 ** 18]),
                   dict(data_offsets=[0, 49]), dict(data_offsets=[4, 52]), dict(data_offsets=[-48, 0]),
                   dict(data_offsets=[10 ** 15, 10 ** 15 + 48]), dict(data_offsets=[48, 0]), dict(data_offsets=[0])):
        write_safetensors(path, tensors, a=change)
        raises(lambda: data.read_safetensors(path), "a.safetensors", "get it again")
    write_safetensors(path, tensors)
    whole = path.read_bytes()
    for content in (b"", b"1234", whole[:100], whole[:-1], struct.pack("<Q", 10 ** 18) + whole[8:],
                    struct.pack("<Q", 20) + b"[" * 20, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"\xff" * 4,
                    struct.pack("<Q", 100_000) + b"[" * 100_000):
        path.write_bytes(content)
        raises(lambda: data.read_safetensors(path), "a.safetensors")


@torch.no_grad()
def test_data_golden_vae():
    """The official SD-VAE's moments and images on formula weights are met to 1e-4; 248 tensors, 83,653,863 values."""
    with torch.device("meta"):
        vae = data.VAE()
    shapes = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    assert len(shapes) == 248 and sum(math.prod(shape) for shape in shapes.values()) == 83_653_863
    vae.load_state_dict(golden_weights(shapes), assign=True)
    at = [0, 1, 170, 256, 511]
    check_golden(vae.moments(wave((1, 3, 64, 64), .0213)), .0562579562, .1794833716, at,
                 [-.1492293477, -.1553669274, -.1140723154, -.0904052705, .1435607672], 1e-4)
    check_golden(vae.decode(wave((1, 4, 8, 8), .37) * vae.scale), -.0735035117, .5905132972, [0, 1, 4096, 6144, 12287],
                 [-.2061313540, -.1775727421, .1083270460, -.3690289557, .2613124549], 1e-4)


@torch.no_grad()
def test_data_vae_files(tmp_path):
    """All layouts load alike: safetensors and .bin, attention under old names and as convolutions, half precision; the
    latent is a draw of the posterior in units of 0.18215."""
    torch.manual_seed(0)
    vae, x = data.VAE((32, 32, 64, 64)).eval(), torch.randn(2, 3, 32, 32)
    new, want = vae.state_dict(), vae.moments(x)
    rename = lambda k: k.replace("to_out.0", "proj_attn").replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")  # noqa: E731
    old = {rename(k): v[:, :, None, None] if "attentions" in k and v.dim() == 2 else v for k, v in new.items()}
    for name, weights in (("new", new), ("old", old), ("half", {k: v.half() for k, v in new.items()})):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
        torch.save(weights, tmp_path / f"{name}.bin")
        for suffix in ("safetensors", "bin"):
            found = data.load_vae(tmp_path / f"{name}.{suffix}").moments(x)
            assert torch.equal(found, want) if name != "half" else (found - want).abs().max() < 1e-2
    assert vae.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 32, 32) and want.shape == (2, 8, 4, 4)
    moments = torch.cat([torch.full((1, 4, 50, 50), 2.), torch.full((1, 4, 50, 50), 2 * math.log(3))], 1)
    z = data.latent(moments, torch.randn(1, 4, 50, 50)) / 0.18215
    assert abs(z.mean() - 2) < .1 and abs(z.std() - 3) < .1
    assert torch.isfinite(data.latent(moments * 1000, torch.ones(1, 4, 50, 50))).all()
    write_safetensors(tmp_path / "other.safetensors", {"a": torch.ones(1)})
    torch.save({k: v for k, v in new.items() if "quant" not in k}, tmp_path / "part.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "new.bin").read_bytes()[:5000])
    for name in ("other.safetensors", "part.bin", "cut.bin"):
        assert name in error_of(data.load_vae, tmp_path / name)
    assert "334,643,276" in error_of(data.load_vae, tmp_path / "absent.safetensors")


@torch.no_grad()
def test_data_encode(tmp_path, capsys):
    """Moments of images and of their mirror images, in shards, whose order is the images'; stopped, it goes on; training
    draws latents from them, one side or the other; what does not belong together is refused."""
    torch.manual_seed(0)
    vae = data.VAE((32, 32, 32, 32)).eval()
    torch.save(vae.state_dict(), tmp_path / "vae.bin")
    images, labels = data.glyphs(11)
    np.savez(tmp_path / "set.npz", images=images.numpy(), labels=labels.numpy())
    flags = [str(tmp_path / "set.npz"), str(tmp_path / "out"), "--vae", str(tmp_path / "vae.bin"), *"--size 32 --batch 3 --shard 4 --workers 0 --device cpu".split()]
    data.main(["encode", *flags])
    shards = sorted((tmp_path / "out").glob("moments_*.npy"))
    assert [len(np.load(p)) for p in shards] == [4, 4, 3] and not list((tmp_path / "out").glob("*.tmp*"))
    assert "11 images as latents (4, 4, 4) of 10 classes" in capsys.readouterr().out
    ds = data.dataset(str(tmp_path / "out"), 32)
    assert len(ds) == 11 and ds.shape == (4, 4, 4) and ds.num_classes == 10 and ds.mirror and [ds.item(i)[1] for i in range(11)] == labels.tolist()
    for i in (0, 4, 10):
        item = ds.item(i)[0]
        assert item.shape == (2, 8, 4, 4) and item.dtype == torch.float16
        for side, image in enumerate((images[i], images[i].flip(2))):
            assert (item[side] - vae.moments(data.to_float(image[None]))[0]).abs().max() < 5e-3
    (items, _, positions), = data.stream(ds, [list(range(200))], 0, mirror=True)
    moments = torch.stack([ds.item(data.index_at(11, p, 0))[0] for p in positions])
    right = (items[:, None] == moments).flatten(2).all(2)
    assert right.any(1).all() and 70 < right[:, 1].sum() < 130
    assert torch.equal(next(data.stream(ds, [positions], 0))[0], moments[:, 0])
    draws = data.Draws(0, range(200))
    x = data.clean(items, draws)
    mean, log_variance = items.float().chunk(2, 1)
    close(x, (mean + (log_variance / 2).exp() * draws.normal("posterior", (4, 4, 4))) * 0.18215, 1e-5)
    (shards[1]).unlink()
    raises(lambda: data.dataset(str(tmp_path / "out"), 32), "moments_00001.npy is missing", "1 of 3")
    before = shards[0].stat().st_mtime_ns
    data.main(["encode", *flags])
    assert shards[1].exists() and shards[0].stat().st_mtime_ns == before and torch.equal(data.dataset(str(tmp_path / "out")).item(5)[0], ds.item(5)[0])
    raises(lambda: data.main(["encode", *flags, "--shard", "5"]), "begun with shard 4, not 5", "new folder")
    raises(lambda: data.main(["encode", *flags, "--size", "36"]), "--size 36", "multiple of 8")
    raises(lambda: data.main(["encode"]), "usage")
    raises(lambda: data.dataset(str(tmp_path / "out"), 64), "encoded at --size 32, not 64")
    (tmp_path / "out/manifest.json").write_text("{}")
    raises(lambda: data.dataset(str(tmp_path / "out"), 32), "manifest.json")


@torch.no_grad()
def test_data_encode_features(tmp_path):
    """A frozen encoder's features stand beside the latents, of both sides of an image, and are found for the images that
    `stream` hands out; a file without them, or another encoder, is not the same set; a wrong encoder is refused."""
    torch.manual_seed(0)
    torch.save(data.VAE((32, 32, 32, 32)).state_dict(), tmp_path / "vae.bin")
    images, labels = data.glyphs(11)
    np.savez(tmp_path / "set.npz", images=images.numpy(), labels=labels.numpy())
    flags = ["encode", str(tmp_path / "set.npz"), str(tmp_path / "out"), "--vae", str(tmp_path / "vae.bin"), "--encoder", SMALL_ENCODER,
             *"--size 32 --batch 3 --shard 4 --workers 0 --device cpu".split()]
    data.main(flags)
    encoder, ds = data.Encoder(SMALL_ENCODER, 32), data.dataset(str(tmp_path / "out"))
    assert encoder.shape == (17, 12) and [f.shape for f in ds.features] == [(4, 2, 17, 12), (4, 2, 17, 12), (3, 2, 17, 12)]
    x = data.to_float(images)
    for mirror in (True, False):
        positions, found = list(range(40, 70)), data.StoredFeatures(ds, mirror)
        (items, *_), = data.stream(ds, [positions], 3, mirror)
        z = found(torch.zeros(1), data.Draws(3, positions))
        assert z.shape == (30, 17, 12) and found.shape == encoder.shape
        sides = [items[k].equal(ds.item(i)[0][1]) for k, i in enumerate(data.index_at(11, p, 3) for p in positions)]
        want = torch.stack([x[data.index_at(11, p, 3)].flip(2) if side else x[data.index_at(11, p, 3)] for p, side in zip(positions, sides)])
        assert any(sides) == mirror and (z - encoder(want)).abs().max() < 1e-3
    raises(lambda: data.main([*flags, "--encoder", ""]), "begun with encoder")
    (tmp_path / "out/moments_00001.npy").unlink()
    before = (tmp_path / "out/features_00000.npy").stat().st_mtime_ns
    data.main(flags)
    assert len(data.dataset(str(tmp_path / "out"))) == 11 and (tmp_path / "out/features_00000.npy").stat().st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*.tmp*"))
    raises(lambda: data.Encoder("none.py:patches", 32), "FILE.py:NAME")
    raises(lambda: data.Encoder(SMALL_ENCODER + "s", 32), "no function patchess")
    raises(lambda: data.Encoder(SMALL_ENCODER.replace(":patches", ":image"), 32), "(1, 3, 32, 32) for 1 images", "1 + patches")


def test_data_run_alone_writes_a_grid(tmp_path, capsys):
    data.main(["--out", str(tmp_path / "d.png"), "--n", "20"])
    shown = capsys.readouterr().out
    assert "20,000 images" in shown and "2,000" in shown
    assert Image.open(tmp_path / "d.png").size[0] > 600


# --------------------------------------------------------------------------------------------------------------------
# model.py
# --------------------------------------------------------------------------------------------------------------------


def golden_weights(shapes: dict) -> dict:
    """The formula weights of the golden numbers: b = sin(12.9898 i + 78.233 k) for the k-th name in sorted order."""
    out = {}
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        b = np.sin(12.9898 * np.arange(math.prod(shape)) + 78.233 * k).reshape(shape)
        if len(shape) >= 2:
            b = 1.5 * b / np.sqrt(b.size / shape[0])
        else:
            b = 1 + b / 2 if name.endswith("running_var") else 1 + b / 10 if name.endswith("weight") else b / 10
        out[name] = torch.from_numpy(b).float()
    return out


def wave(shape, f, phase=0.0):
    return torch.from_numpy(np.sin(f * np.arange(math.prod(shape)) + phase)).float().reshape(shape)


def check_golden(x, mean, rms, at, values, tolerance):
    """Mean, rms and some entries of x equal the recorded ones to `tolerance` of the rms."""
    x = x.double().flatten()
    found = torch.cat([x.mean()[None], x.square().mean().sqrt()[None], x[at]])
    error = (found - torch.tensor([mean, rms, *values], dtype=torch.float64)).abs().max() / rms
    assert error < tolerance, error


GOLDEN_DIT = dict(mean=-0.0488414675, rms=1.9277289440, at=[0, 1, 341, 512, 1023], tolerance=1e-5,
                  values=[-2.7806444168, -0.5940889120, -0.3481149375, -0.4613337815, -2.4208440781])
GOLDEN_SIT = dict(mean=-0.0647085268, rms=1.9310491060, at=[0, 1, 170, 256, 511], tolerance=1e-5,
                  values=[-2.7806115150, -0.5944840908, -2.8435714245, -0.4608496130, -2.9931080341])


def golden_dit() -> model.DiT:
    net = model.DiT(input_size=8, patch=2, channels=4, width=48, depth=2, heads=4, num_classes=10, learn_sigma=True)
    shapes = {k: v.shape for k, v in net.state_dict().items() if k != "pos_embed"}
    net.load_state_dict(golden_weights(shapes) | {"pos_embed": net.pos_embed})
    return net.eval()


@torch.no_grad()
def test_model_golden_dit_and_sit(tmp_path):
    """The official DiT's and SiT's outputs on formula weights are met to 1e-5: the forward pass directly, and SiT also
    through model.load, where v(x, t) = -SiT(x, 1 - t)."""
    x, y = wave((2, 4, 8, 8), .37), torch.tensor([1, 10])
    net = golden_dit()
    check_golden(net.raw(x, torch.tensor([3., 500.]), y), **GOLDEN_DIT)
    check_golden(net.raw(x, torch.tensor([.2, .9]), y)[:, :4], **GOLDEN_SIT)
    torch.save({"ema": net.state_dict()}, tmp_path / "SiT-tiny.pt")
    ours = model.load(tmp_path / "SiT-tiny.pt", heads=4)
    check_golden(-ours(x, torch.tensor([.8, .1]), y), **GOLDEN_SIT)


@torch.no_grad()
def test_model_golden_jit(tmp_path):
    """JiT's output on formula weights, from its class (depth 6, width 48, 4 heads, patch 8, bottleneck 16, 5 tokens of the
    class at block 2), through model.load: the image of its own time, and v = (x_t - image) / max(t, 0.05)."""
    net = model.DiT(**model.JIT | dict(input_size=32, patch=8, width=48, depth=6, heads=4, num_classes=10, bottleneck=16,
                                       context=5, context_start=2))
    state = net.state_dict()
    weights = golden_weights({k: v.shape for k, v in state.items() if k != "pos_embed"}) | {"pos_embed": state["pos_embed"]}
    averages = {f"model_ema{k}": {f"net.{name}": v / k for name, v in weights.items()} for k in (1, 2)}
    torch.save({"model": state} | averages, tmp_path / "checkpoint-last.pth")
    ours = model.load(tmp_path / "checkpoint-last.pth")
    assert ours.config == net.config
    for ema, bias in ((0, state["final_layer.linear.bias"]), (2, weights["final_layer.linear.bias"] / 2)):
        assert model.load(tmp_path / "checkpoint-last.pth", ema).state_dict()["final_layer.linear.bias"].equal(bias)
    torch.save({"model": state} | {"model_ema1": averages["model_ema1"]}, tmp_path / "one.pth")
    raises(lambda: sample.main([str(tmp_path / "one.pth"), "--ema", "2"]), "no second average", "--ema 1")
    x, t, y = wave((2, 3, 32, 32), .37), torch.tensor([.8, .1]), torch.tensor([1, 10])
    image = ours.raw(x, t, y)
    check_golden(image, -5.47272e-05, 2.37329070429, [0, 1, 1000, 3072, 6143],
                 [-3.283140898, 3.305665731, -3.126048565, -1.06448245, 0.840548873], 1e-5)
    assert torch.allclose(ours(x, t, y), (x - image) / t.view(2, 1, 1, 1), atol=1e-4)
    with torch.device("meta"):
        for name, tensors, values in (("JiT-B/16", 183, 131_123_712), ("JiT-L/16", 351, 458_877_664), ("JiT-H/32", 463, None)):
            made = model.create(name)
            trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
            assert len(made.state_dict()) == tensors and trained == (values or trained) and made.shape[1] == 16 * made.patch
        assert sum(p.numel() for p in model.create("JiT-H/16").parameters() if p.requires_grad) == 952_514_368


def test_model_jit_pieces():
    """Rotary positions keep lengths, let products depend on offsets alone, and leave tokens in front where they are; a
    discriminator of this kind is alive and is read out of the class's first token; its file's names load."""
    rope, q, k = model.rope_table(8, 4), torch.randn(1, 1, 18, 8), torch.randn(1, 1, 18, 8)
    turned = model.rotate(q, rope)
    assert torch.equal(turned[:, :, :2], q[:, :, :2]) and torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    same_q, same_k = (model.rotate(part[:, :, :1].expand(-1, -1, 16, -1), rope)[0, 0] for part in (q, k))
    products = (same_q @ same_k.T).view(4, 4, 4, 4)   # (row, column) of q, of k
    assert torch.allclose(products[0, 0, 1, 2], products[1, 1, 2, 3], atol=1e-5)
    assert torch.allclose(products[2, 1, 0, 3], products[3, 0, 1, 2], atol=1e-5)
    assert not torch.allclose(products[0, 0, 1, 2], products[0, 0, 2, 1], atol=1e-3)
    options = dict(norm="rms_weight", rope=True, qk_norm=True, swiglu=True, bottleneck=6, context=3, context_start=1)
    torch.manual_seed(0)
    D = model.Discriminator(input_size=8, channels=3, patch=2, width=32, depth=2, heads=2, num_classes=10, **options)
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
    out, J = model.directional_derivatives(D, x, t, y, torch.randn(2, 4, 3, 8, 8))
    assert J.abs().max() == 0 and not hasattr(D, "dis_embed") and D.final_layer[1].bias is not None
    ((J[0] - 1).square().mean() + (J[1] + 1).square().mean()).backward()
    assert D.blocks[1].adaLN_modulation[1].weight.grad.norm() > 1e-3  # the block where the class's tokens join
    D = tiny(cls=model.Discriminator, **options)
    with torch.no_grad():
        tokens = D.x_embedder(x) + D.pos_embed
        tokens = D.blocks[0](tokens, D.condition(t, y), D.rope)
        tokens = torch.cat([D.y_embedder(y)[:, None] + D.in_context_posemb, tokens], 1)
        token = D.blocks[1](tokens, D.condition(t, y), D.rope)[:, 0]
        token = token / (token.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(D(x, t, y), D.final_layer[1](token)[:, 0], atol=1e-5)
    raises(lambda: tiny(rope=True, width=36, heads=6), "multiple of 4")
    raises(lambda: tiny(context=2, context_start=5), "block 5")


@pytest.mark.parametrize("loss", ["fm", "meanflow", "cafm"])
def test_model_recomputing_blocks(loss):
    """Gradients are the same to the last bit but for cafm's second ones (1e-6), and much less is kept."""
    cfg, draws = train.Config(loss=loss, jumps=0.5, omega=0.8), data.Draws(0, range(16))
    options = losses.LOSSES[loss].generator(dataclasses.asdict(cfg))
    G, D = tiny(depth=8, **options), tiny(cls=model.Discriminator, depth=8)
    x, y, found = torch.randn(16, 3, 8, 8), torch.arange(16) % 10, {}

    def value():
        if loss == "cafm":
            return losses.cafm_D(D, x, y, draws, cfg, G)[0]
        return getattr(losses, loss)(G, x, y, draws, cfg)[0]

    net = D if loss == "cafm" else G
    for recompute in (False, True):
        net.recompute = recompute
        parameters = [p for p in net.parameters() if p.requires_grad]
        found[recompute] = torch.autograd.grad(value(), parameters, allow_unused=True), model.kept_bytes(value)
    for a, b in zip(found[False][0], found[True][0]):
        assert (a is None and b is None) or torch.equal(a, b) or loss == "cafm" and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert loss == "cafm" or found[True][1] < 0.4 * found[False][1], (found[True][1], found[False][1])


@torch.no_grad()
def test_model_mixture_of_experts():
    """Sending tokens to their experts equals the dense sum over all experts with the weights of the others set to 0; with all
    used it is the full mixture. The balance is 1 for even routing and E for one expert, and pushes towards the even."""
    torch.manual_seed(0)
    layer, x = model.MoE(8, 16, 4, 2), torch.randn(3, 5, 8)
    p = layer.gate(x).softmax(-1)
    kept = torch.where(p >= p.topk(2).values[..., 1:], p, 0)
    dense = layer.shared_experts(x) + sum(kept[..., k:k + 1] * expert(x) for k, expert in enumerate(layer.experts))
    assert torch.allclose(layer(x), dense, atol=1e-6)
    assert torch.equal(layer.chosen.sort(-1).values, p.topk(2).indices.sort(-1).values)
    share = 4 * nn.functional.one_hot(p.topk(2).indices, 4).float().mean((0, 1, 2))
    assert abs(layer.balance - (share * p.mean((0, 1))).sum()) < 1e-6
    layer.used = 4
    full = layer.shared_experts(x) + sum(p[..., k:k + 1] * expert(x) for k, expert in enumerate(layer.experts))
    assert torch.allclose(layer(x), full, atol=1e-6) and abs(layer.balance - 1) < 1e-6
    layer.used = 1
    layer.gate.weight.zero_()
    layer.gate.weight[2] = 50 * x[0, 0]
    layer(x[:1, :1].expand(3, 5, 8))
    assert abs(layer.balance - 4) < 1e-3
    layer.gate.weight.copy_(torch.randn(4, 8) * 0.5)
    with torch.enable_grad():
        for _ in range(200):
            layer(x)
            gradient, = torch.autograd.grad(layer.balance, layer.gate.weight)
            layer.gate.weight.data -= 0.5 * gradient
    assert layer.balance < 1.05
    raises(lambda: model.MoE(8, 16, 4, 5), "4 experts of which a token sees 5")
    net = tiny(experts=3)
    x, e, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    seen = []
    hook = net.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].item()))
    shares = model.routing(net, x, e, y, 5)
    hook.remove()
    assert np.allclose(seen, [.1, .3, .5, .7, .9]) and shares["time"].shape == (2, 5, 3) and shares["position"].shape == (2, 16, 3)
    net(0.3 * x + 0.7 * e, torch.full((4,), 0.7), y)
    went = nn.functional.one_hot(net.blocks[1].mlp.chosen, 3).float()
    assert torch.allclose(shares["time"][1, 3], went.mean((0, 1, 2))) and torch.allclose(shares["position"].sum(-1), torch.ones(2, 16))


@torch.no_grad()
def test_model_linear_attention():
    """(f(q) f(k)^T) v normalised, computed the other way round, and the convolution of v; without the latter a permutation
    of tokens permutes the output. A network of it takes over all but attention from an ordinary one."""
    torch.manual_seed(0)
    layer, (q, k, v) = model.LinearAttention(16, 2), torch.randn(3, 2, 2, 9, 8)
    weights = q.relu() @ k.relu().transpose(-2, -1)
    near = torch.stack([layer.dwc(image.T.reshape(1, 8, 3, 3)).reshape(8, 9).T for image in v.flatten(0, 1)]).view_as(v)
    plain = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(layer.attend(q, k, v), plain + near, atol=1e-4)
    layer.dwc.weight.zero_()
    layer.dwc.bias.zero_()
    order, x = torch.randperm(9), torch.randn(2, 9, 16)
    assert torch.allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-5)
    given, net = tiny(), model.DiT(**tiny().config | dict(linear=True))
    own = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(model.tell_times(given, net))
    for key, value in net.state_dict().items():
        assert torch.equal(value, own[key] if ".attn." in key else given.state_dict()[key]), key
    raises(lambda: tiny(linear=True, context=2), "linear attention")


def test_model_names_and_shapes_are_the_official_ones():
    """S/2 and XL/2 have the 132 and 292 tensors of the official files, by name, shape and total count."""
    for name, tensors, values, width, depth in (("SiT-S/2", 132, 32_963_360, 384, 12),
                                                ("SiT-XL/2", 292, 675_129_632, 1152, 28)):
        with torch.device("meta"):
            state = model.create(name, learn_sigma=True).state_dict()
        expected = {"pos_embed": (1, 256, width), "x_embedder.proj.weight": (width, 4, 2, 2),
                    "x_embedder.proj.bias": (width,), "y_embedder.embedding_table.weight": (1001, width),
                    "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
                    "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
                    "final_layer.linear.weight": (32, width), "final_layer.linear.bias": (32,),
                    "final_layer.adaLN_modulation.1.weight": (2 * width, width),
                    "final_layer.adaLN_modulation.1.bias": (2 * width,)}
        for i in range(depth):
            for layer, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
                                         ("adaLN_modulation.1", 6, 1)):
                expected[f"blocks.{i}.{layer}.weight"] = (rows * width, columns * width)
                expected[f"blocks.{i}.{layer}.bias"] = (rows * width,)
        assert {k: tuple(v.shape) for k, v in state.items()} == expected
        with torch.device("meta"):
            norms = [m for m in model.create(name).modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 2 * depth + 1 and all(m.eps == 1e-6 for m in norms)
        assert len(state) == tensors and sum(v.numel() for v in state.values()) == values


def test_model_zoo_counts():
    """The zoo has S, B, L, XL at patches 2, 4, 8; XL/2 costs the paper's 118.6 GFLOPs, glyph-S has 1.32 M values."""
    names = {f"SiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)} | {f"JiT-{s}/{p}" for s in "SBLH" for p in (16, 32)}
    names |= {f"MoE-{s}/2" for s in ("S", "B", "XL")} | {f"LiT-{s}/2" for s in ("S", "B", "L", "XL")}
    assert names | {"glyph-S", "tiny"} == set(model.ZOO)
    with torch.device("meta"):
        xl = model.create("SiT-XL/2")
        glyph = model.create("glyph-S")
    assert abs(model.multiply_adds(xl) / 1e9 - 118.6) < 0.1
    assert sum(p.numel() for p in glyph.parameters()) == 1_322_688
    assert "glyph-S" in error_of(model.create, "SiT-Q/2")
    costs = {}
    for name in ("SiT-S/2", "MoE-S/2", "LiT-S/2", "JiT-S/16"):  # every kind of network can be counted
        with torch.device("meta"):
            costs[name] = model.multiply_adds(model.create(name))
    tokens, width, depth = 256, 384, 12
    experts = 3 * width * (2 * 4 * width + 2 * width) + 8 * width  # two of them and the shared one, and the gate
    assert costs["MoE-S/2"] - costs["SiT-S/2"] == depth * tokens * (experts - 8 * width ** 2)
    assert 0 < costs["LiT-S/2"] and 0 < costs["JiT-S/16"]
    assert "multiple of 8" in error_of(model.create, "SiT-S/8", input_size=28)


@torch.no_grad()
def test_model_fresh_network_is_zero_and_its_blocks_the_identity():
    """adaLN-zero: a fresh network's last layer is exactly 0, and each block returns its input."""
    net = model.create("SiT-S/8", depth=2)
    x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([3, 1000])
    assert net(x, t, y).abs().max() == 0
    tokens = torch.randn(2, 16, 384)
    assert torch.equal(net.blocks[1](tokens, torch.randn(2, 384)), tokens)


@torch.no_grad()
def test_model_pieces_follow_dit():
    """Cosines first; the position table's first half tells the column; patches read (c, p, p) and write (p, p, c);
    rows do not mix; t changes the output."""
    assert model.sinusoid(torch.zeros(1), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert torch.allclose(model.sinusoid(torch.ones(1), 256)[0, [0, 127, 128, 255]],
                          torch.tensor([math.cos(1), math.cos(1e4 ** (-127 / 128)), math.sin(1), math.sin(1e4 ** (-127 / 128))]))
    table = model.position_table(48, 4)[0]
    assert torch.allclose(table.square().sum(1), torch.full((16,), 24.0))
    assert not torch.equal(table[1, :24], table[0, :24]) and torch.equal(table[1, 24:], table[0, 24:])
    net = tiny()
    image = torch.randn(1, 3, 8, 8)
    cut = image.view(3, 4, 2, 4, 2).permute(1, 3, 2, 4, 0).reshape(1, 16, 12)  # token (row, column), value (p, p, c)
    assert torch.equal(net.unpatchify(cut), image)
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([.1, .5, .9]), torch.tensor([0, 5, 10])
    out = net(x, t, y)
    other = net(x, t, torch.tensor([0, 6, 10]))
    assert torch.equal(out[[0, 2]], other[[0, 2]]) and not torch.allclose(out[1], other[1])
    assert not torch.allclose(out, net(x, t + 0.05, y))


def naive(q, k, v):
    """softmax(q k^T / sqrt d) v in the plainest steps there are."""
    S = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    e = torch.exp(S - S.amax(-1, keepdim=True).detach())
    return torch.einsum("bhnm,bhmd->bhnd", e / e.sum(-1, keepdim=True), v)


def attention_inputs(N, M, d, size=1.0, T=2):
    """q, k, v, T tangents of each, and the cotangents G and U of value and tangents, in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, d, dtype=torch.float64) for n in (N, M, M))
    dq, dk, dv = (torch.randn(T, *x.shape, dtype=torch.float64) for x in (q, k, v))
    return size * q, k, v, dq, dk, dv, torch.randn_like(q), torch.randn_like(dq)


def attention_error(body, dtype, *inputs) -> float:
    """Largest relative error of everything one can ask of a body, against the naive steps in float64."""
    model.BODIES["naive"] = naive
    exact = model.attention_derivatives("naive", *inputs)
    found = model.attention_derivatives(body, *(x.to(dtype) for x in inputs))
    del model.BODIES["naive"]
    errors = []
    for name, tensors in found.items():
        for a, b in zip(tensors, exact[name]):
            assert a.dtype == dtype and a.shape == b.shape, name
            errors.append((a.double() - b).norm() / b.norm().clamp_min(1))  # some are 0 where N = 1
    return torch.stack(errors).max().item()  # nan if one is


@pytest.mark.parametrize("body", ["fused", "plain", "recompute"])
def test_model_attention_and_all_its_derivatives(body, monkeypatch):
    """Value, gradients, tangents, gradients of tangents (to q, k, v and to the tangents' inputs) and double backward of
    each body against naive float64 attention, for two tangents at once, cross lengths, large logits and several blocks
    of queries: 1e-10 in float64, 1e-5 in float32. (Fused: value and gradients. Logits of 150 have float32 errors of
    1e-5 themselves: there the bound is twice naive float32's error.)"""
    shapes = [(N, N, d, 1) for N in (1, 17, 64, 257) for d in (8, 32, 64, 72, 80)]
    for N, M, d, size in shapes + [(17, 40, 72, 1), (64, 5, 8, 1), (64, 64, 32, 10), (64, 64, 32, 30)]:
        inputs = attention_inputs(N, M, d, size)
        bound = 1e-5 if size < 30 else 2 * attention_error("naive", torch.float32, *inputs)
        for queries in (256, 16):
            monkeypatch.setattr(model, "QUERIES", queries)
            assert attention_error(body, torch.float64, *inputs) < 1e-10, (N, M, d, size)
            assert attention_error(body, torch.float32, *inputs) < bound, (N, M, d, size)


def test_model_recompute_in_half_precision():
    """In bfloat16 and float16 the recomputing body is as exact as plain steps in that dtype (float32 between products)."""
    inputs = attention_inputs(64, 64, 32)
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        own, plain = (attention_error(body, dtype, *inputs) for body in ("recompute", "plain"))
        assert own < bound and own < 2 * plain, (dtype, own, plain)


def test_model_recompute_passes_gradgradcheck():
    """torch's own numerical checks: backward, forward mode, batched gradients, double backward, and the backward of a
    call with two tangents."""
    q, k, v, dq, dk, dv, *_ = (x[..., :1, :, :].requires_grad_() for x in attention_inputs(5, 3, 4))
    assert torch.autograd.gradcheck(model.attention_recompute, (q, k, v), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(model.attention_recompute, (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: model.Attend.apply(model.TORCH, *x)[:2], (q, k, v, dq, dk, dv))


def test_model_recompute_under_torch_func(monkeypatch):
    """vmap over q, k, v (alone, under jvp, under grad), nested grad: as for plain steps. What is not there is an error."""
    func = torch.func
    stacks = [torch.randn(3, 2, 2, n, 4, dtype=torch.float64) for n in (6, 5, 5)]
    w = [torch.randn_like(x) for x in stacks]
    cases = {
        "vmap": lambda f: func.vmap(f)(*stacks),
        "vmap over q": lambda f: func.vmap(f, (0, None, None))(stacks[0], stacks[1][0], stacks[2][0]),
        "vmap of jvp": lambda f: func.vmap(lambda p, t: func.jvp(f, p, t)[1])(tuple(stacks), tuple(w)),
        "vmap over one tangent": lambda f: func.vmap(lambda t: func.jvp(
            f, tuple(x[0] for x in stacks), (t, w[1][0], w[2][0]))[1])(w[0]),
        "vmap of grad": lambda f: func.vmap(func.grad(lambda *p: f(*p).square().sum()))(*stacks),
        "grad of grad": lambda f: func.grad(lambda q: func.grad(lambda z: f(z, stacks[1][0], stacks[2][0]).square().sum())(
            q).square().sum())(stacks[0][0]),
        "grad of jvp": lambda f: func.grad(lambda q: func.jvp(
            lambda z: f(z, stacks[1][0], stacks[2][0]), (q,), (w[0][0],))[1].square().sum())(stacks[0][0]),
    }
    for name, case in cases.items():
        assert (case(model.attention_recompute) - case(naive)).abs().max() < 1e-11, name
    shapes = []
    monkeypatch.setattr(model.TORCH, "forward", lambda *x: (shapes.append([*x[0].shape[:-2], len(x[3])]), model.pair_forward(*x))[1])
    cases["vmap over one tangent"](model.attention_recompute)
    assert shapes == [[2, 2, 0], [2, 2, 3]], "three tangents share one q, k, v"
    q, k, v = (x[0].requires_grad_() for x in stacks)
    with pytest.raises(NotImplementedError, match="one forward-mode derivative"):
        func.jvp(lambda z: func.jvp(lambda x: model.attention_recompute(x, k, v), (z,), (w[0][0],))[1], (q,), (w[0][0],))
    first, = torch.autograd.grad(model.attention_recompute(q, k, v).square().sum(), q, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        second.square().sum().backward()


def test_model_recompute_keeps_memory_linear_in_tokens():
    """What autograd holds for a double backward: proportional to N for 'recompute', to N^2 for 'plain'."""
    kept = {}
    for body in ("plain", "recompute"):
        for N in (256, 1024, 2048):
            q, k, v, G = torch.randn(4, 1, 1, N, 16).unbind()
            kept[body, N] = model.kept_bytes(model.attention_tasks(body, q, k, v, G)["gradients"])
    row = 4 * 2048 * 16
    assert kept["recompute", 2048] <= 12 * row, "q, k, v, O, G and the gradients"
    for N in (1024, 2048):
        growth = {body: kept[body, N] / kept[body, 256] for body in ("plain", "recompute")}
        assert abs(growth["recompute"] / (N / 256) - 1) < 0.01 and growth["plain"] > 0.9 * (N / 256) ** 2, growth


def test_model_attention_body_is_chosen_in_the_open(monkeypatch):
    """Fused unless asked otherwise, and again after the block, also after an error in it; fused has no forward mode and
    says what to do; derivative routes choose their own body."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    used = []
    for name, body in list(model.BODIES.items()):
        monkeypatch.setitem(model.BODIES, name, lambda q, k, v, name=name, body=body: (used.append(name), body(q, k, v))[1])
    with pytest.raises(NotImplementedError, match="attention_body"):
        torch.func.jvp(model.attention, (q, k, v), (q, k, v))
    with pytest.raises(ZeroDivisionError), model.attention_body("recompute"):
        with model.attention_body("plain"):
            model.attention(q, k, v)
        model.attention(q, k, v)
        1 / 0
    model.attention(q, k, v)
    assert used == ["fused", "plain", "recompute", "fused"]
    raises(lambda: model.attention_body("flash").__enter__(), "'flash'", "recompute")
    D, x, t, y = tiny(cls=model.Discriminator), torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    for call, body in ((lambda: model.input_gradient(D, x, t, y), "plain"),
                       (lambda: model.input_gradient(D, x, t, y, body="recompute"), "recompute"),
                       (lambda: model.input_gradient(D, x, t, y, create_graph=False), "fused"),
                       (lambda: model.time_derivative(tiny(), x, t, y, x, body="recompute"), "recompute"),
                       (lambda: model.directional_derivatives(D, x, t, y, x[None], "forward", "recompute"), "recompute")):
        used.clear()
        call()
        assert used[-2:] == 2 * [body], used


needs_triton = pytest.mark.skipif(model.triton is None, reason="Triton is not installed (pip install triton)")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested compiled, not interpreted")
def test_model_triton_kernels_interpreted():
    """The Triton kernels in Triton's interpreter: everything, as for the other bodies, in float32 and float16, head
    sizes that are no powers of two, cross lengths, ragged tiles, logits of several hundred. (The interpreter cannot do
    bfloat16.) And all outputs of one backward call where value and two tangents have cotangents."""
    for N, M, d, T, dtype, bound in ((17, 17, 8, 2, torch.float32, 1e-5), (33, 20, 72, 1, torch.float32, 1e-5),
                                     (5, 33, 80, 1, torch.float32, 1e-5), (33, 33, 64, 1, torch.float16, 3e-3)):
        inputs = [x[..., :1, :1, :, :] for x in attention_inputs(N, M, d, T=T)]
        assert attention_error("triton", dtype, *inputs) < bound, (N, M, d)
    inputs = attention_inputs(5, 1, 8, size=100)  # some lse are below -88: exp(0 - lse) is inf beyond the edge
    assert attention_error("triton", torch.float32, *inputs) < 1e-2  # saturated: gradients are differences of equals
    *inputs, G, U = attention_inputs(18, 19, 8)
    exact = model.pair_backward(*inputs, *model.pair_forward(*inputs), G, U)
    inputs = [x.float() for x in inputs]
    found = model.triton_backward(*inputs, *model.triton_forward(*inputs), G.float(), U.float())
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(found, exact))


@needs_triton
def test_model_triton_kernels_compile_for_an_h100():
    """Every kernel becomes sm_90 machine code (no GPU is needed for that), for bfloat16 and head size 72."""
    script = """
import triton, model, torch
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
q = torch.empty(1, 1, 1, 72, dtype=torch.bfloat16)
options = model._launch_options(q)
build = {k: options.pop(k) for k in ("num_warps", "num_stages")}
for kernel, more in ((model.forward_kernel, {}), (model.backward_kernel, dict(QUERIES_SIDE=True)),
                     (model.backward_kernel, dict(QUERIES_SIDE=False))):
    constants = options | more | dict(TANGENT=True)
    kinds = dict(N="i32", M="i32", d="i32", s="fp32", lse="*fp32", mu="*fp32", xbar="*fp32", D="*fp32")
    signature = {a: "constexpr" if a in constants else kinds.get(a, "*bf16") for a in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=build)
    print(kernel.__name__, len(made.asm["cubin"]), made.metadata.shared)
    assert made.metadata.shared <= 227 * 1024
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("kernel") == 3, done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("N", [256, 257, 1024, 4096])
def test_model_triton_kernels_on_a_gpu(N):
    """The compiled kernels: everything, in float32 and bfloat16, head sizes 64, 72, 80."""
    for d in (64, 72, 80):
        inputs = [x.cuda() for x in attention_inputs(N, N, d)]
        assert attention_error("triton", torch.float32, *inputs) < 2e-5, d
        assert attention_error("triton", torch.bfloat16, *inputs) < 3e-2, d


def test_model_triton_refusals(monkeypatch):
    """No Triton, no GPU, or float64: one line that names the way out."""
    q = torch.randn(1, 1, 4, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(model, "triton", model.triton or object())
    with model.attention_body("triton"):
        raises(lambda: model.attention(q, q, q), "GPU", "recompute")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        raises(lambda: model.attention(q.double(), q.double(), q.double()), "float64", "recompute")
        monkeypatch.setattr(model, "triton", None)
        raises(lambda: model.attention(q, q, q), "Triton", "recompute")


def golden_pair() -> tuple:
    """The official CAFM generator and discriminator on formula weights, in our time, and their golden inputs."""
    size = dict(input_size=8, patch=2, channels=4, width=48, depth=2, heads=4, num_classes=11, null_class=False)
    nets = model.DiT(**size, learn_sigma=True), model.Discriminator(**size)
    for net, to_our_time in zip(nets, (model.reverse_time, model.turn_time)):
        names = [k for k in net.state_dict() if k not in ("pos_embed", "gradient_square")]
        net.load_state_dict(net.state_dict() | to_our_time(golden_weights({k: net.state_dict()[k].shape for k in names})))
    x, e = wave((2, 4, 8, 8), .37), wave((2, 4, 8, 8), .53, 1.0)
    t, y = torch.tensor([.2, .7]), torch.tensor([1, 10])
    return *nets, losses.interpolate(x, e, t), t, y, e - x


def gradient_norm(loss, net) -> float:
    parts = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
    return torch.cat([part.flatten() for part in parts]).norm().item()


def test_model_golden_cafm():
    """The official CAFM numbers: velocity, D, both directional derivatives, both losses and both gradient norms, by every
    route and body."""
    G, D, x_t, t, y, v = golden_pair()
    u = G(x_t, t, y)
    check_golden(u, 0.0317792402, 1.6248876383, [0, 1, 170, 256, 511],
                 [1.5609451532, -0.2998266816, 2.4345626831, 2.8032081127, 2.0174293518], 1e-5)
    for route, body in (("reverse", "plain"), ("reverse", "recompute"), ("forward", "plain"), ("forward", "recompute")):
        out, J = model.directional_derivatives(D, x_t, t, y, torch.stack([v, u.detach()]), route, body)
        close(out, [-2.4347384, -2.1182718])
        close(J, [[0.2932510, 0.3373561], [-0.5408010, -1.4004097]])
        loss = (J[0] - 1).square().mean() + (J[1] + 1).square().mean() + 1e-3 * out.square().mean()
        close(torch.stack([loss, torch.tensor(gradient_norm(loss, D))]) / torch.tensor([0.6600989, 146.657721]), [1., 1.])
    _, gradient, slope = model.input_gradient(D, x_t, t, y, create_graph=False)
    loss = (model.along(gradient, slope, u) - 1).square().mean()
    close(torch.tensor([loss.item() / 4.0680223, gradient_norm(loss, G) / 55.714905]), [1., 1.])


def test_model_discriminator_is_alive_from_the_start():
    """A fresh D has adaLN-zero's dead gates and a live head: J = 0, and a gradient that ends that."""
    torch.manual_seed(0)
    D = model.Discriminator(input_size=8, channels=3, width=32, depth=2, heads=2, num_classes=10)
    assert D.dis_embed.shape == (32,) and D.final_layer[1].weight.shape == (1, 32) and D.final_layer[1].bias is None
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
    out, J = model.directional_derivatives(D, x, t, y, torch.randn(2, 4, 3, 8, 8))
    assert out.shape == (4,) and J.abs().max() == 0
    ((J[0] - 1).square().mean() + (J[1] + 1).square().mean()).backward()
    assert D.blocks[0].adaLN_modulation[1].weight.grad.norm() > 1e-3
    raises(lambda: model.DiT(norm="batch"), "'batch'", "rms")


class Derivatives:
    """Inputs in float64 for losses on derivatives of a network with random weights everywhere."""

    def __init__(self, net):
        torch.manual_seed(1)
        self.net = net.double()
        shape = (3, *getattr(net, "shape", (2,)))
        self.x_t, self.v, self.u, self.w = torch.randn(4, *shape, dtype=torch.float64).unbind()
        self.t, self.r = torch.tensor([.1, .5, .9], dtype=torch.float64), torch.tensor([0., .2, .6], dtype=torch.float64)
        self.y = torch.tensor([0, 1, 2]) % getattr(net, "num_classes", 1)

    def cafm_D(self, route, body):
        """CAFM's loss of the discriminator, which differentiates derivatives."""
        directions = torch.stack([self.v, self.u])
        if route == "differences":
            out, J = self.net(self.x_t, self.t, self.y), [self.difference(w) for w in directions]
        else:
            out, J = model.directional_derivatives(self.net, self.x_t, self.t, self.y, directions, route, body)
        return (J[0] - 1).square().mean() + (J[1] + 1).square().mean() + 1e-3 * out.square().mean()

    def jvp(self, route, through=lambda tangent: tangent):
        """A loss on a forward-mode derivative, straight from torch.func: without the refusals of model.py."""
        if route == "differences":
            return (self.difference(self.v) - 1).square().mean()
        with model.attention_body("plain"):
            _, J = torch.func.jvp(lambda x, t: self.net(x, t, self.y), (self.x_t, self.t), (self.v, torch.ones_like(self.t)))
        return (through(J) - 1).square().mean()

    def difference(self, w, h=1e-3):
        """The derivative along (w, 1) by four values of the network: error h^4."""
        near, far = (self.net(self.x_t + s * w, self.t + s, self.y) - self.net(self.x_t - s * w, self.t - s, self.y)
                     for s in (h, 2 * h))
        return (8 * near - far) / (12 * h)


def check_parameter_gradient(loss, reference, net, directions=3, step=1e-4, tolerance=1e-5) -> None:
    """d loss / d parameters, by autograd, equals central differences of `reference` along random unit vectors, in float64.

    The test for everything that differentiates a derivative. `reference` is the same loss with its derivatives replaced
    by differences, so that nothing of autograd is on the other side.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    count = sum(p.numel() for p in parameters)
    typical = torch.cat([g.flatten() for g in gradient]).norm().item() / count ** 0.5
    for seed in range(directions):
        rng = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) / count ** 0.5 for p in parameters]
        values = []
        for sign in (1, -2, 1):  # at + step, at - step, and back
            with torch.no_grad():
                for p, d in zip(parameters, direction):
                    p.add_(d, alpha=sign * step)
                values.append(reference().item())
        found = sum((g * d).sum().item() for g, d in zip(gradient, direction))
        difference = (values[0] - values[1]) / (2 * step)
        assert abs(found - difference) < tolerance * typical, f"autograd {found:.9f}, differences {difference:.9f}"


class PointD(nn.Module):
    """A discriminator of points (B, D)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 1))

    def forward(self, x_t, t, y):
        return self.layers(torch.cat([x_t, t[:, None]], 1))[:, 0]


DISCRIMINATORS = {"transformer": lambda: tiny(cls=model.Discriminator),
                  "transformer with LayerNorm": lambda: tiny(cls=model.Discriminator, norm="layer"), "points": PointD}
DERIVATIVE_LOSSES = {  # every loss that differentiates a derivative: name -> (network, loss of Derivatives, by a route)
    **{f"CAFM D, {kind}, reverse, {body}": (make, "reverse", lambda case, route, body=body: case.cafm_D(route, body))
       for kind, make in DISCRIMINATORS.items() for body in ("plain", "recompute")},
    **{f"CAFM D, transformer, forward, {body}": (DISCRIMINATORS["transformer"], "forward",
                                                 lambda case, route, body=body: case.cafm_D(route, body))
       for body in ("plain", "recompute")},
    **{f"jvp, velocity network that predicts {predict}": (lambda predict=predict: tiny(norm="rms", predict=predict),
                                                          "forward", Derivatives.jvp) for predict in ("v", "x")},
    "jvp, points": (lambda: losses.PointNet(2), "forward", Derivatives.jvp),
}


@pytest.mark.parametrize("name", DERIVATIVE_LOSSES)
def test_model_losses_on_derivatives_have_right_gradients(name):
    """Directional finite differences of the loss in parameter space against autograd, in float64."""
    make, route, loss = DERIVATIVE_LOSSES[name]
    case = Derivatives(make())
    check_parameter_gradient(lambda: loss(case, route), lambda: loss(case, "differences"), case.net)


class NoTangent(torch.autograd.Function):
    """Attention whose forward-mode rule is dropped."""
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v):
        return model.attention_plain(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, G):
        return torch.func.vjp(model.attention_plain, *ctx.saved_tensors)[1](G)

    @staticmethod
    def jvp(ctx, dq, dk, dv):
        return torch.zeros_like(dq)


def test_model_finite_differences_catch_what_torch_does_not(monkeypatch):
    """The check above fails for LayerNorm under forward mode, a tangent without a graph, and a dropped jvp rule."""
    def check(case, through=lambda tangent: tangent):
        check_parameter_gradient(lambda: case.jvp("forward", through), lambda: case.jvp("differences"), case.net)

    rms = Derivatives(tiny(norm="rms"))
    check(rms)
    with pytest.raises(AssertionError, match="differences"):
        check(Derivatives(tiny(norm="layer")))
    with pytest.raises(AssertionError, match="differences"):
        check(rms, lambda J: J.detach() + 0 * rms.net(rms.x_t, rms.t, rms.y))
    monkeypatch.setitem(model.BODIES, "plain", NoTangent.apply)
    with pytest.raises(AssertionError, match="differences"):
        check(rms)


def check_input_derivative(case, body) -> None:
    """time_derivative's du/dt equals differences of the network along (v, 1), and has no graph."""
    u, du = model.time_derivative(case.net, case.x_t, case.t, case.y, case.v, body=body)
    assert (u - case.net(case.x_t, case.t, case.y)).abs().max() < 1e-12
    assert not du.requires_grad and (du - case.difference(case.v)).norm() < 1e-7 * du.norm()


def test_model_input_derivatives():
    """d/dt along the flow of every network class, by each body, and the input gradient of D, against differences."""
    for make in (lambda: tiny(), lambda: tiny(norm="rms", predict="x"), lambda: losses.PointNet(2)):
        for body in ("plain", "recompute"):
            check_input_derivative(Derivatives(make()), body)
    for make in DISCRIMINATORS.values():
        case = Derivatives(make())
        out, gradient, slope = model.input_gradient(case.net, case.x_t, case.t, case.y, create_graph=False)
        assert not (out.requires_grad or gradient.requires_grad or slope.requires_grad)
        assert (model.along(gradient, slope, case.w) - case.difference(case.w)).norm() < 1e-7 * slope.norm().clamp_min(1)
    x, v, t, r = (part.double() for part in (case.x_t, case.v, case.t, case.r))
    _, du = model.time_derivative(lambda x, t, y, r: x * (t - r)[:, None] ** 2, x, t, case.y, v, r)
    assert torch.allclose(du, v * (t - r)[:, None] ** 2 + 2 * x * (t - r)[:, None], atol=1e-12)
    case.net.forward = lambda x_t, t, y: x_t.sum(1)  # a network that does not look at the time
    assert model.input_gradient(case.net, case.x_t, case.t, case.y)[2].tolist() == [0, 0, 0]


def test_model_routes_agree():
    """Double backward and mapped forward mode give D, J and the gradient of CAFM's loss equal to 1e-9 in float64."""
    case = Derivatives(tiny(cls=model.Discriminator))
    found = [(case.cafm_D(route, body), torch.autograd.grad(case.cafm_D(route, body), [
        p for p in case.net.parameters() if p.requires_grad])) for route in ("reverse", "forward")
        for body in ("plain", "recompute")]
    for loss, gradient in found[1:]:
        assert abs(loss / found[0][0] - 1) < 1e-9
        assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(gradient, found[0][1]))
    raises(lambda: case.cafm_D("sideways", "plain"), "'sideways'", "reverse")


class CustomOperator(nn.Module):
    def forward(self, x_t, t, y, r=None):
        return torch.ops.triflow_test.cosine(x_t).flatten(1).sum(1) if y is not None else x_t


def test_model_refuses_what_torch_gets_wrong():
    """LayerNorm under a loss on a tangent, custom operators under jvp, DDP inside a derivative, compile around a
    hand-written derivative: an error that names the way out, where torch would return a wrong number."""
    case = Derivatives(tiny(cls=model.Discriminator, norm="layer"))
    raises(lambda: case.cafm_D("forward", "plain"), "LayerNorm", "norm='rms'", "reverse")
    model.time_derivative(tiny(), *(x.float() for x in (case.x_t, case.t)), case.y, case.v.float())  # no loss on it: fine

    @torch.library.custom_op("triflow_test::cosine", mutates_args=())
    def cosine(x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    inputs = case.x_t, case.t, case.y
    _, wrong = torch.func.jvp(torch.ops.triflow_test.cosine, (case.x_t,), (case.v,))
    assert wrong.abs().max() == 0, "torch has learned this; the refusal can go"
    raises(lambda: model.directional_derivatives(CustomOperator(), *inputs, case.v[None], "forward"), "triflow_test::cosine")
    raises(lambda: model.time_derivative(CustomOperator(), *inputs, case.v), "triflow_test::cosine", "jvp")

    for call in (lambda: model.directional_derivatives(case.net, *inputs, case.v[None], "forward"),
                 lambda: model.attention_recompute(*3 * [torch.randn(1, 1, 4, 8)])):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="torch.compile can get wrong"):
            torch.compile(call, backend="eager", fullgraph=True)()


def test_model_derivatives_of_a_compiled_network():
    """torch.compile's wrapper is taken off for the derivative, and the ordinary forward beside it stays compiled."""
    case = Derivatives(tiny(cls=model.Discriminator))
    compiled = torch.compile(case.net, backend="aot_eager")
    want = model.input_gradient(case.net, case.x_t, case.t, case.y)
    assert same(list(want), list(model.input_gradient(compiled, case.x_t, case.t, case.y)))
    case = Derivatives(tiny())
    compiled = torch.compile(case.net, backend="aot_eager")
    _, du = model.time_derivative(compiled, case.x_t, case.t, case.y, case.v)
    assert same(du, model.time_derivative(case.net, case.x_t, case.t, case.y, case.v)[1])
    (compiled(case.x_t, case.t, case.y) - du).square().mean().backward()
    assert case.net.blocks[0].attn.qkv.weight.grad.norm() > 0


ROUTE_SCRIPT = """
import sys, torch, torch.nn as nn, torch.distributed as dist
import data, model, test_all
class Step(nn.Module):  # what DDP wraps: the module that takes the derivative
    def __init__(self, net, name):
        super().__init__()
        self.net, self.name = net, name
    def forward(self, x, t, y, v, u):
        if self.name == "time":
            _, du = model.time_derivative(self.net, x, t, y, v)
            return (self.net(x, t, y) - v + t.view(-1, 1, 1, 1) * du).square().mean()
        out, (real, fake) = model.directional_derivatives(self.net, x, t, y, torch.stack([v, u]), *self.name.split())
        return (real - 1).square().mean() + (fake + 1).square().mean() + 1e-3 * out.square().mean()
data.start_processes("cpu")
torch.manual_seed(1)
x, v, u = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64).unbind()
t, y = torch.rand(4, dtype=torch.float64), torch.arange(4)
mine = slice(2 * data.rank(), 2 * data.rank() + 2)
for name in ("reverse plain", "reverse recompute", "forward plain", "forward recompute", "time"):
    nets = [test_all.tiny(cls=model.DiT if name == "time" else model.Discriminator).double() for _ in range(2)]
    Step(nets[0], name)(x, t, y, v, u).backward()
    wrapped = nn.parallel.DistributedDataParallel(Step(nets[1], name))
    for _ in range(2):  # the second backward pass shows whether the first left DDP in order
        wrapped(*(part[mine] for part in (x, t, y, v, u))).backward()
    for (key, a), b in zip(nets[0].named_parameters(), nets[1].parameters()):
        if a.requires_grad:
            assert (2 * a.grad - b.grad).norm() <= 1e-10 * a.grad.norm(), (name, key)
    try:
        model.input_gradient(nn.parallel.DistributedDataParallel(nets[1]), x, t, y)
        raise SystemExit("a derivative through DDP went unnoticed")
    except ValueError as error:
        assert "gradient exchange" in str(error)
    del wrapped
print("equal", flush=True)
data.stop_processes()
"""


def test_model_derivative_routes_under_two_processes(tmp_path):
    """Two gloo processes give the single process's gradient for double backward, forward tangents and time derivative;
    a derivative taken through DDP's wrapper is refused."""
    (tmp_path / "routes.py").write_text(ROUTE_SCRIPT)
    assert torchrun(2, tmp_path / "routes.py").stdout.count("equal") == 2


def test_model_run_alone_on_a_zoo_network(capsys):
    """`python model.py --model NAME` prints time and memory of every route; a wrong name lists the right ones."""
    model.main(["--model", "glyph-S", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "1.00 x" in printed and printed.count(" MB") == 8
    raises(lambda: model.main(["--model", "SiT-M"]), "SiT-M", "SiT-S/2")


@torch.no_grad()
def test_model_predictions_become_velocities():
    """predict x: v = (x_t - net) / max(t, t_min). predict eps: DiT's noise prediction on its VP schedule, given exactly
    for Gaussian data, becomes that data's exact velocity."""
    net = tiny(predict="x")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([.01, .7]), torch.tensor([1, 2])
    v = net(x, t, y)
    assert torch.allclose(x[0] - 0.05 * v[0], net.raw(x, t, y)[0], atol=1e-5)
    assert torch.allclose(x[1] - 0.7 * v[1], net.raw(x, t, y)[1], atol=1e-5)

    s = 0.7
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    class ExactNoise(model.DiT):
        def raw(self, x, n, y):  # E[e | x] for x = sqrt(abar) x0 + sqrt(1 - abar) e, abar between two steps
            log_snr = torch.log(alpha_bar / (1 - alpha_bar))
            low = n.long().clamp(0, 998)
            a = torch.sigmoid(log_snr[low] + (n - low) * (log_snr[low + 1] - log_snr[low])).view(-1, 1, 1, 1)
            e = (1 - a).sqrt() / (a * s * s + 1 - a) * x
            return torch.cat([e, e], 1)

    dit = ExactNoise(8, 2, 3, 32, 1, 2, num_classes=10, learn_sigma=True, predict="eps")
    t = torch.tensor([.02, .1, .5, .9, .99], dtype=torch.float64)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    tt = t.view(-1, 1, 1, 1)
    exact = (tt - (1 - tt) * s * s) / ((1 - tt) ** 2 * s * s + tt ** 2) * x
    assert (dit(x, t, torch.zeros(5).long()) - exact).abs().max() < 1e-9
    assert np.allclose(model.vp_step(torch.tensor([.1, .5, .9])), [29.9, 258.1, 658.2], atol=0.1)


def test_model_velocity_head_and_guidance_scale():
    """A flow's weights in a network with a second time, a guidance scale and a velocity head are that flow, whatever r and
    w, on both ways; without these options the network has no more weights. Told w = None is w = 1, and other w count; the
    head is another function once its weights are; it is no part of an ordinary call."""
    given, options = tiny(predict="x"), dict(times=2, guided=True, head=1)
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([.2, .5, .9]), torch.tensor([1, 2, 10])
    r, w = t / 2, torch.tensor([1., 2., 4.])
    net = model.DiT(**given.config | options)
    model.load_weights(net, model.tell_times(given, net), "flow")
    u, v = net(x, t, y, r, w, head=True)
    assert torch.equal(u, given(x, t, y)) and torch.equal(v, u)
    assert not [k for k in given.state_dict() if k.startswith(("head", "guide", "jump"))]
    net = tiny(predict="x", **options)
    u, v = net(x, t, y, r, w, head=True)
    assert torch.equal(u, net(x, t, y, r, w)) and (u - v).abs().mean() > 0.1
    assert torch.allclose(net(x, t, y, r), net(x, t, y, r, torch.ones(3)))
    assert torch.allclose(u[0], net(x, t, y, r)[0], atol=1e-6) and (u - net(x, t, y, r))[1:].abs().mean() > 0.01
    net.head_blocks = net.head_layer = None
    assert torch.equal(net(x, t, y, r, w), u)
    raises(lambda: tiny(head=3), "head of 3", "0 to 2")


def test_model_cat_stages_accumulate():
    """Stage k is the sum of the first k heads, which look after floor(k depth / K) blocks; DiT.forward's jump from noise
    is the last stage; only the first `latent` numbers of the noise count, up to their scale, and the label."""
    net = tiny(cls=model.StagedDiT, depth=4, stages=3, latent=12).double()
    e, y, one = torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 7]), torch.ones(2).double()
    with torch.no_grad():
        h = net.stages(e, y)
        assert h.shape == (3, 2, 3, 8, 8) and net.ends == [1, 2, 4]
        assert (e - net(e, one, y) - h[-1]).abs().max() < 1e-12
        numbers = e.flatten(1)
        rest = torch.cat([2 * numbers[:, :12], torch.randn(2, 180)], 1).view_as(e)
        assert (net.stages(rest, y) - h).abs().max() < 1e-4 and (net.stages(-e, y) - h).abs().max() > 0.1
        assert (net.stages(e, 9 - y) - h).abs().max() > 0.1
        for k in range(3):
            net.final_layer[k].linear.bias += 1
            moved = net.stages(e, y) - h
            assert (moved - (torch.arange(3) >= k).view(3, 1, 1, 1, 1).double()).abs().max() < 1e-12
            net.final_layer[k].linear.bias -= 1
        net.blocks[2].attn.proj.bias += 1  # the third block, which only the last head sees
        moved = (net.stages(e, y) - h).flatten(1).abs().amax(1)
        assert moved[0] == moved[1] == 0 and moved[2] > 1e-3


def test_model_cat_scales_do_not_see_each_other():
    """d logit_k / d image_j is exactly 0 for j != k; and one pass over the tokens of all scales, under a block-diagonal
    mask, gives the same logits."""
    D = tiny(cls=model.ScaleDiscriminator, stages=3).double()
    images, y = [torch.randn(2, 3, side, side).double().requires_grad_() for side in (8, 4, 2)], torch.tensor([1, 7])
    out = D(images, y)
    assert out.shape == (2, 3) and (D(images, 9 - y) - out).abs().min() > 1e-6
    for k in range(3):
        gradients = torch.autograd.grad(out[:, k].sum(), images, retain_graph=True, materialize_grads=True)
        assert [bool(g.abs().max() > 0) for g in gradients] == [j == k for j in range(3)]
    sizes = [1 + 16, 1 + 4, 1 + 1]
    mask = torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()
    places = [model.position_table(32, side) + scale for side, scale in zip((4, 2, 1), D.scale_embed)]
    tokens = [torch.cat([token.expand(2, 1, -1), D.x_embedder(x) + place], 1)
              for token, x, place in zip(D.dis_embed, images, places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "attention", lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask))
        x = torch.cat(tokens, 1)
        for block in D.blocks:
            x = block(x, D.norm(D.y_embedder(y)))
    joint = torch.cat([D.final_layer(part[:, 0]) for part in x.split(sizes, 1)], 1)
    assert (joint - out).abs().max() < 1e-12


def test_model_cat_is_alive_from_the_start():
    """Fresh weights: z and the label move images about alike, by half of their small size and more; every weight has a
    gradient; D hears more of places than of random pixels."""
    torch.manual_seed(0)
    G = model.create("glyph-S", stages=3)
    D = model.ScaleDiscriminator(**G.config)
    e, y = torch.randn(4, *G.shape), torch.tensor([0, 0, 1, 1])
    h = G.stages(e, y)
    same_z = G.stages(e[:1].expand_as(e), y)
    by_z, by_label, size = ((h[:, 0] - h[:, 1]).std(), (same_z[:, 0] - same_z[:, 2]).std(), h.std())
    assert 0.5 * size < by_z < 1.3 * by_label and 0.5 * size < by_label < 1.3 * by_z and size < 0.2
    out = D([nn.functional.avg_pool2d(x, 2 ** k) for k, x in enumerate(h.flip(0))], y)
    out.square().sum().backward()
    for net in (G, D):
        assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)
    assert D.x_embedder(torch.randn(2, 3, 32, 32)).std() < 0.3 * D.pos_embed.std()


def test_model_cat_mapping_is_slow():
    """Fresh, a SlowLinear gives numbers of the size of its inputs; a step of Adam moves its product by a hundredth. The
    class enters the mapping with as many numbers as z."""
    torch.manual_seed(0)
    layer, x = model.SlowLinear(64, 64), torch.randn(500, 64)
    assert 0.8 < layer(x).std() < 1.2
    eye = torch.eye(64)
    before = layer(eye).detach() - layer(0 * eye).detach()
    layer(x).square().mean().backward()
    torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=0).step()
    moved = (layer(eye).detach() - layer(0 * eye).detach() - before).abs()
    assert moved.max() < 1.01e-4 and moved.median() > 0.99e-4
    net = model.create("glyph-S", stages=3)
    assert all(type(net.mapping[k]) is model.SlowLinear for k in (0, 2))
    assert net.y_embedder(torch.arange(3)).shape == (3, net.latent)


def test_model_cat_loads_and_refuses(tmp_path):
    """A checkpoint of a staged generator loads as one; sizes that cannot work are named."""
    net = tiny(cls=model.StagedDiT, stages=2, latent=20)
    torch.save({"networks": {"G": {"config": net.config, "weights": net.state_dict()}}, "ema": net.state_dict()},
               tmp_path / "cat.pt")
    again = model.load(tmp_path / "cat.pt")
    e, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 7])
    assert type(again) is model.StagedDiT and again.config == net.config
    assert torch.equal(again.stages(e, y), net.stages(e, y))
    raises(lambda: tiny(cls=model.StagedDiT, stages=3), "3 stages", "2 to 2")
    raises(lambda: tiny(cls=model.StagedDiT, stages=1), "1 stages")
    raises(lambda: tiny(cls=model.StagedDiT, stages=2, latent=193), "latent of 193", "1 to 192")
    raises(lambda: tiny(cls=model.ScaleDiscriminator, stages=4), "8 pixels, halved 3 times", "fewer stages")


@torch.no_grad()
def test_model_times():
    """A network is told no time, t, or (t, t - r), and nothing else; without r it gives the velocity at t. A flow's
    weights become one of the others without a change of the function: at t = 1, and for every r."""
    x, y, (t, s, r) = torch.randn(3, 3, 8, 8), torch.tensor([0, 5, 10]), torch.rand(3, 3)
    none, one, both = (tiny(times=times) for times in (0, 1, 2))
    assert torch.equal(none.raw(x, t, y, r), none.raw(x, s, y, t)) and "t_embedder.mlp.0.weight" not in none.state_dict()
    assert torch.equal(one(x, t, y, r), one(x, t, y)) and not torch.equal(one(x, t, y), one(x, s, y))
    assert not torch.allclose(both(x, t, y, r), both(x, t, y, s)) and torch.equal(both(x, t, y), both(x, t, y, t))
    c = both.y_embedder(y) + both.t_embedder(t) + both.jump_embedder(t - r)
    assert torch.allclose(both.condition(t, y, r), c, atol=1e-6)
    ones = torch.ones(3)
    none.load_state_dict(model.tell_times(one, none))
    assert torch.allclose(none(x, ones, y), one(x, ones, y), atol=1e-5)
    fresh = model.DiT(**both.config)
    fresh.load_state_dict(model.tell_times(one, fresh))
    assert torch.equal(fresh(x, t, y, r), one(x, t, y))
    assert fresh.jump_embedder.mlp[0].weight.abs().max() > 0  # else it would never learn
    raises(lambda: tiny(times=3), "times 3")
    raises(lambda: tiny(times=1, repeats=2), "repeats 2")


@torch.no_grad()
def test_model_deep_generator():
    """R passes through one stack: the k-th is told the time 1 - k / R, the last layer no time; R = 1 is the plain network
    at time 1 but for that. R adds no weights."""
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 5]), torch.rand(2)
    plain, deep = tiny(), {R: tiny(times=0, repeats=R) for R in (1, 2, 3)}
    for R, net in deep.items():
        net.load_state_dict(plain.state_dict())  # the same names
        c, tokens = plain.y_embedder(y), plain.x_embedder(x) + plain.pos_embed
        for k in range(R):
            for block in plain.blocks:
                tokens = block(tokens, c + plain.t_embedder(torch.full((2,), 1 - k / R)))
        assert torch.allclose(net.raw(x, t, y), plain.unpatchify(plain.final_layer(tokens, c)), atol=1e-5), R
    one = deep[1]
    one.final_layer.adaLN_modulation[1].weight.zero_()
    plain.final_layer.adaLN_modulation[1].weight.zero_()  # a last layer that sees no condition
    assert torch.allclose(one.raw(x, t, y), plain.raw(x, torch.ones(2), y), atol=1e-5)


def test_model_classifier():
    """Fresh, it knows nothing and can learn; it looks at the image and at t; names are the official ones."""
    torch.manual_seed(0)
    fresh = model.create("glyph-S", classifier=True)
    x, t, y = torch.randn(4, 3, 32, 32), torch.rand(4), torch.arange(4)
    logits = fresh(x, t)
    assert logits.shape == (4, 10) and (logits - logits[:1]).abs().max() < 1e-6
    nn.functional.cross_entropy(logits, y).backward()
    assert fresh.blocks[0].adaLN_modulation[1].weight.grad.norm() > 1e-3
    names = set(fresh.state_dict()) - set(model.create("glyph-S").state_dict())
    assert names == {"cls_embed", "final_layer.1.weight", "final_layer.1.bias"} and not hasattr(fresh, "y_embedder")
    net, x = tiny(cls=model.Classifier), x[:, :, :8, :8]
    assert not torch.allclose(net(x, t), net(x, 1 - t)) and not torch.allclose(net(x, t), net(x + 1, t))
    assert isinstance(model.from_config(net.config), model.Classifier)


@torch.no_grad()
def test_model_loads_official_afm_files(tmp_path):
    """AFM's layout: no null class, no time for one jump (which gives the image), times a thousand for K of them, a file
    of 4 layers with 2 blocks repeats them; its time is ours."""
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 9]), torch.tensor([.5, 1.])
    for name, options in (("tiny_1nfe_FID2.pth", dict(times=0, predict="x")), ("tiny_2nfe.pth", dict(times=1)),
                          ("tiny_4layer_1nfe.pth", dict(times=0, repeats=2, predict="x"))):
        net = tiny(null_class=False, time_scale=1000.0, **options)
        torch.save(net.state_dict(), tmp_path / name)
        loaded = model.load(tmp_path / name, heads=2)
        assert loaded.config == net.config and torch.equal(loaded(x, t, y), net(x, t, y)), name
    two = model.load(tmp_path / "tiny_2nfe.pth", heads=2)
    assert torch.equal(two.condition(t, y), two.y_embedder(y) + two.t_embedder(1000 * t))
    one = model.load(tmp_path / "tiny_1nfe_FID2.pth", heads=2)
    assert (losses.jump(one, x, torch.ones(2), torch.zeros(2), y) - one.raw(x, t, y)).abs().max() < 1e-5
    raises(lambda: sample.sample(one, x, y, 4), "steps 4", "--steps 1")
    assert "AFM" in error_of(model.kind_of, "tiny.pt") and model.kind_of("any.pt", "afm") == "afm"
    D = tiny(cls=model.Discriminator, times=0, norm="layer", null_class=False)
    torch.save({k: v for k, v in D.state_dict().items() if k != "gradient_square"}, tmp_path / "d.pth")
    again = model.Discriminator(**D.config)
    again.load_state_dict(model.discriminator_weights(tmp_path / "d.pth", turn=False))
    assert torch.equal(again(x, t, y), D(x, t, y))


def test_model_load_round_trips(tmp_path):
    """Official layouts (plain, ema, module prefix, an argparse.Namespace beside, projectors) and our own checkpoints load,
    with every size read from the tensors."""
    net = golden_dit()
    plain = net.state_dict()
    layouts = {"plain": plain, "wrapped": {"model": {k: 0 * v for k, v in plain.items()}, "ema": plain,
                                           "args": argparse.Namespace(lr=1e-4)},
               "prefix": {f"module.{k}": v for k, v in plain.items()},
               "repa": {"ema": plain | {"projectors.0.weight": torch.zeros(3)}}}
    x, t, y = wave((2, 4, 8, 8), .37), torch.tensor([.3, .6]), torch.tensor([1, 10])
    for name, content in layouts.items():
        torch.save(content, tmp_path / f"DiT-{name}.pt")
        loaded = model.load(tmp_path / f"DiT-{name}.pt", heads=4)
        assert loaded.config == net.config | dict(predict="eps") and not loaded.training
        assert same(dict(loaded.state_dict()), dict(plain)), name
        assert torch.isfinite(loaded(x, t, y)).all()
    for name, sign in (("edition-sit-xl", -1), ("sit-repa", 1)):  # REPA's SiT has our time; its projectors tell
        extra = {"projectors.0.weight": torch.zeros(3)} if sign == 1 else {}
        torch.save({"ema": plain | extra}, tmp_path / f"{name}.pt")
        raw = net.raw(x, t if sign == 1 else 1 - t, y)[:, :4]
        assert torch.allclose(model.load(tmp_path / f"{name}.pt", heads=4)(x, t, y), sign * raw, atol=1e-5), name
    ours = tiny(predict="x")
    torch.save({"networks": {"G": {"config": ours.config, "weights": ours.state_dict()}},
                "ema": {k: v + 1 for k, v in ours.state_dict().items()}}, tmp_path / "ours.pt")
    assert same(dict(model.load(tmp_path / "ours.pt", ema=False).state_dict()), dict(ours.state_dict()))
    assert torch.equal(model.load(tmp_path / "ours.pt").x_embedder.proj.bias, ours.x_embedder.proj.bias + 1)


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["TRIFLOW_ATTACK"],)


def test_model_load_explains_and_executes_nothing(tmp_path):
    """Missing, cut, foreign and hostile files: one line each; code inside a pickle does not run."""
    assert "no such checkpoint" in error_of(model.load, tmp_path / "none.pt")
    torch.save(golden_dit().state_dict(), tmp_path / "tiny.pt")
    assert "kind=" in error_of(model.load, tmp_path / "tiny.pt")
    assert "heads=" in error_of(model.load, tmp_path / "tiny.pt", kind="dit")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "tiny.pt").read_bytes()[:5000])
    assert "damaged" in error_of(model.load, tmp_path / "cut.pt")
    for content in (b"", b"hello", bytes(1000), (tmp_path / "tiny.pt").read_bytes()[:-30]):
        (tmp_path / "text.pt").write_bytes(content)
        assert "text.pt" in error_of(model.load, tmp_path / "text.pt")
    torch.save({"networks": {"G": {"config": {"colour": 1}, "weights": {}}}, "ema": {}}, tmp_path / "later.pt")
    assert "another version" in error_of(model.load, tmp_path / "later.pt")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "dit-other.pt")
    assert "pos_embed is missing" in error_of(model.load, tmp_path / "dit-other.pt")
    torch.save({"model": {"net.x_embedder.proj1.weight": torch.zeros(2)}}, tmp_path / "jit.pt")
    assert "JiT" in error_of(model.load, tmp_path / "jit.pt") and "pos_embed is missing" in error_of(model.load, tmp_path / "jit.pt")
    os.environ["TRIFLOW_ATTACK"] = str(tmp_path / "ran")
    torch.save({"weights": Attack()}, tmp_path / "hostile.pt")
    error_of(model.load, tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Exception):  # the same file does run code where pickles are trusted: the test can fail
        torch.load(tmp_path / "hostile.pt", weights_only=False)["weights"].anything
    assert (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------------------
# losses.py
# --------------------------------------------------------------------------------------------------------------------


def test_losses_mixture_is_consistent():
    """The closed forms agree with one another: score = grad log density by autograd, score = -(x + (1 - t) v) / t, the
    flow map follows the velocity, and v of one component is the Gaussian's."""
    mixture = losses.Mixture(torch.tensor([[-1., 0.5], [1., 0.], [0., 2.]]).double(), torch.tensor([.3, .5, .2]).double(),
                             torch.tensor([.2, .5, .3]).double())
    x, t = torch.randn(50, 2, dtype=torch.float64, requires_grad=True), torch.rand(50, dtype=torch.float64) * .9 + .05
    std = (((1 - t)[:, None] * mixture.stds) ** 2 + t[:, None] ** 2).sqrt()
    parts = torch.distributions.Normal((1 - t)[:, None, None] * mixture.means, std[..., None])
    log_p = torch.logsumexp(parts.log_prob(x[:, None]).sum(-1) + mixture.weights.log(), 1)
    score = torch.autograd.grad(log_p.sum(), x)[0]
    assert (mixture.score(x, t) - score).abs().max() < 1e-12
    assert (-(x + (1 - t)[:, None] * mixture.velocity(x, t)) / t[:, None] - score).abs().max() < 1e-11

    x, t = torch.randn(20, 1, dtype=torch.float64), torch.full((20,), .6, dtype=torch.float64)
    h = 1e-4
    slope = (TWO_MODES.flow(x, t, t + h) - TWO_MODES.flow(x, t, t - h)) / (2 * h)
    assert (slope - TWO_MODES.velocity(x, t)).abs().max() < 1e-6
    one = losses.Mixture(TWO_MODES.means[1:], TWO_MODES.stds[1:], torch.ones(1).double())
    assert torch.allclose(TWO_MODES.velocity(x, t, torch.ones(20).long()), one.velocity(x, t))


class Perturbed(nn.Module):
    """Exact velocity + a few weighted features: the loss's gradient in the weights is E[-2 residual feature] at 0."""
    predict, t_min, num_classes, null_class = "v", 0.0, 1, False

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.weight = velocity, nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x_t, t, y, r=None):
        features = torch.stack([torch.ones_like(x_t), x_t, t[:, None], (2 * x_t).sin() * t[:, None], x_t ** 2 / 3])
        return self.velocity(x_t, t) + torch.tensordot(self.weight, features, 1)


def fm_gradient_in_standard_errors(velocity, batches=40, batch=2000) -> float:
    """max over features of |mean gradient| / its standard error, for the fm loss at `velocity`."""
    net, cfg, grads = Perturbed(velocity), losses.Config(), []
    for k in range(batches):
        x, y = TWO_MODES.sample(batch, data.generator("fm gradient", k))
        loss, _ = losses.fm(net, x, y, losses.BatchDraws(0, k, batch), cfg)
        grads.append(torch.autograd.grad(loss, net.weight)[0])
    grads = torch.stack(grads)
    return (grads.mean(0).abs() / (grads.std(0) / batches ** 0.5)).max().item()


def test_losses_fm_gradient_vanishes_at_the_exact_velocity():
    """E grad = 0 at the closed-form velocity (within 4 standard errors), and clearly not for a wrong factor, sign or time
    direction."""
    assert fm_gradient_in_standard_errors(TWO_MODES.velocity) < 4
    for wrong in (lambda x, t: 1.1 * TWO_MODES.velocity(x, t), lambda x, t: -TWO_MODES.velocity(x, t),
                  lambda x, t: TWO_MODES.velocity(x, 1 - t), lambda x, t: -TWO_MODES.velocity(x, 1 - t)):
        assert fm_gradient_in_standard_errors(wrong) > 10


def test_losses_fm_value_at_the_optimum():
    """For N(m, s^2) the least loss is the mean over t of Var(e - x | x_t) = s^2 / ((1-t)^2 s^2 + t^2)."""
    s = 0.5
    gaussian = losses.Mixture(torch.tensor([[.7]]), torch.tensor([s]), torch.ones(1))
    x, y = gaussian.sample(200_000, data.generator("fm value"))
    loss, _ = losses.fm(Perturbed(gaussian.velocity).float(), x, y, losses.BatchDraws(0, 0, len(x)), losses.Config())
    t = (torch.arange(10000) + .5) / 10000
    exact = (s * s / ((1 - t) ** 2 * s * s + t ** 2)).mean()
    assert abs(loss.item() / exact.item() - 1) < 0.02, (loss, exact)


def test_losses_x_prediction_is_weighted_x_regression():
    """A perfect x prediction has no loss at any t, below t_min too; another one costs |x - x_net|^2 / max(t, t_min)^2."""
    net = tiny(predict="x")
    x, y = torch.rand(64, 3, 8, 8) * 2 - 1, torch.arange(64) % 10
    cfg, draws = train.Config(time_mean=-3.0, time_std=2.0), data.Draws(0, range(64))
    t = losses.sample_times(draws, cfg)
    assert (t < 0.05).any() and (t > 0.05).any()
    net.raw = lambda x_t, *_: x
    assert losses.fm(net, x, y, draws, cfg)[0] < 1e-9
    net.raw = lambda x_t, *_: x + 0.1
    weight = (0.1 / t.clamp_min(0.05)).square().mean()
    assert abs(losses.fm(net, x, y, draws, cfg)[0] / weight - 1) < 1e-4


def test_losses_times_and_dropped_labels():
    """Uniform and logit-normal times have their quantiles; the share of null labels is label_drop, others stay."""
    draws = data.Draws(0, range(4000))
    u = losses.sample_times(draws, train.Config(time="uniform"))
    assert abs(u.mean() - .5) < .02 and abs(u.std() - 12 ** -.5) < .01
    t = losses.sample_times(draws, train.Config(time_mean=0.8, time_std=0.5))
    q = t.quantile(torch.tensor([.1587, .5, .8413]))
    assert (torch.logit(q) - torch.tensor([.3, .8, 1.3])).abs().max() < .05
    y = torch.arange(4000) % 10
    dropped = losses.drop_labels(tiny(), y, draws, train.Config(label_drop=.25))
    null = dropped == 10
    assert abs(null.float().mean() - .25) < .03 and torch.equal(dropped[~null], y[~null])
    assert torch.equal(losses.drop_labels(tiny(null_class=False), y, draws, train.Config(label_drop=.25)), y)


def test_losses_curriculum():
    """At stage k no time is below the k-th bound, and what is there keeps its distribution; after the last stage times are
    what they are without it."""
    n = 4000
    for kind in ("uniform", "logit_normal"):
        at = lambda step: losses.sample_times(data.Draws(0, range(step * n, (step + 1) * n)), cfg)  # noqa: E731, B023
        base = losses.sample_times(data.Draws(1, range(n)), train.Config(time=kind))
        cfg = train.Config(time=kind, curriculum=2, batch=n)
        for step, least in ((0, torch.tensor(6 - .6).sigmoid()), (1, torch.tensor(6 - .6).sigmoid()), (19, 0.5)):
            t, allowed = at(step), base[base >= least]
            assert t.min() >= least - 1e-6
            if step == 19:  # Kolmogorov-Smirnov at 1 %
                both = torch.cat([t, allowed]).sort().values
                gap = (torch.searchsorted(t.sort().values, both) / n - torch.searchsorted(allowed.sort().values, both) / len(allowed)).abs().max()
                assert gap < 1.63 * (1 / n + 1 / len(allowed)) ** .5
        for step in (38, 39, 1000):
            draws = data.Draws(0, range(step * n, step * n + 50))
            assert torch.equal(losses.sample_times(draws, cfg), losses.sample_times(draws, train.Config(time=kind, batch=n)))


def bank_of(points):
    """As data.Bank, but all other points in their order: x must be first of them all."""
    return lambda y, draws, n: points[1:1 + n].expand(len(y), -1, -1)


class GivenDraws:
    """The interface of data.Draws that hands out the given time and noise, and drops no label."""

    def __init__(self, t, e):
        self.t, self.e, self.positions = t, e, range(len(t))

    def uniform(self, purpose, shape=()):
        return self.t if purpose == "time" else torch.ones(len(self.t), *shape)

    def normal(self, purpose, shape):
        return self.e.view(-1, *shape)


GOLDEN_ALIGNED = {  # sihyun-yu/REPA and Martinser/REG: loss.py and models/sit.py on formula weights, see golden.md
    "repa": dict(flow=3.990921021, misalignment=1 - .006919500, total=3.987461329 + .5, gradient=47.61169815),
    "reg": dict(flow=5.125148773, misalignment=1 - .002895074, token=2.634660959, total=5.202741146 + .5, gradient=55.59218216)}


@pytest.mark.parametrize("loss", GOLDEN_ALIGNED)
def test_losses_golden_repa_and_reg(tmp_path, loss):
    """The official losses and gradient norms on formula weights; the official file loads: projectors are left behind, REG's
    is known by its token and moves image and token."""
    size = dict(input_size=8, patch=2, channels=4, width=48, depth=2, heads=4, num_classes=10)
    net = (model.TokenDiT if loss == "reg" else model.DiT)(**size, **dict(token=24) if loss == "reg" else {}, features=24, align=1)
    own = net.state_dict()
    weights = own | golden_weights({k: v.shape for k, v in own.items() if k != "pos_embed"})
    net.load_state_dict(weights)
    x, e, t, y = wave((2, 4, 8, 8), .37), wave((2, 4, 8, 8), .53, 1.0), torch.tensor([.2, .7]), torch.tensor([1, 10])
    z = wave((2, 17, 24), .71)
    e = torch.cat([e.flatten(1), wave((2, 24), .29, .5)], 1) if loss == "reg" else e
    cfg = train.Config(loss=loss, time="uniform")
    total, logs = getattr(losses, loss)(net, x, y, GivenDraws(t, e), cfg, lambda x, draws: z)
    total.backward()
    norm = torch.stack([p.grad.square().sum() for p in net.parameters() if p.grad is not None]).sum().sqrt()
    for name, value in ({"total": total, "gradient": norm} | logs).items():
        assert abs(value.item() / GOLDEN_ALIGNED[loss][name] - 1) < 2e-6, (name, value)
    name = tmp_path / ("last.pt" if loss == "reg" else "last-SiT.pt")                                # REG's files are known by it
    torch.save({"ema": weights, "model": weights}, name)
    loaded = model.load(name, heads=4)
    assert not hasattr(loaded, "projectors") and type(loaded) is type(net)
    state = torch.cat([x.flatten(1), z[:, 0]], 1) if loss == "reg" else x
    with torch.no_grad():
        assert (loaded(state, t, y) - net(state, t, y)).abs().max() < 1e-5


def test_losses_alignment_facts():
    """Identical features, or any positive multiple, are not apart; opposite ones are by 2; no gradient for the encoder; with
    align = 0 repa has fm's gradient bit for bit, and the alignment's goes to the first blocks and the projector alone."""
    torch.manual_seed(0)
    z = torch.randn(4, 16, 12)
    assert losses.misalignment(z, z).abs() < 1e-6 and (losses.misalignment(-z, z) - 2).abs() < 1e-6
    h = torch.randn(4, 16, 12)
    scaled = losses.misalignment(h * torch.rand(4, 16, 1), z * 7)
    close(scaled, losses.misalignment(h, z), 1e-6)
    raises(lambda: losses.misalignment(h, z[:, 1:]), "(15, 12)", "(16, 12)")
    net, x, y, draws = tiny(depth=3, features=12, align=2).train(), torch.rand(4, 3, 8, 8), torch.arange(4), data.Draws(0, range(4))
    frozen = torch.randn(4, 17, 12, requires_grad=True)

    def gradients(loss, **settings):
        net.zero_grad()
        extra = [lambda x, draws: frozen.detach()] if loss is losses.repa else []
        loss(net, x, y, draws, train.Config(**settings), *extra)[0].backward()
        return {k: p.grad for k, p in net.named_parameters() if p.grad is not None}

    plain, unaligned = gradients(losses.fm), gradients(losses.repa, align=0.0)
    assert all(torch.equal(v, plain[k]) for k, v in unaligned.items() if not k.startswith("projectors."))
    assert all((unaligned[k] == 0).all() for k in unaligned.keys() - plain.keys()) and len(unaligned.keys() - plain.keys()) == 6
    net.zero_grad()
    net(x, torch.rand(4), y)
    losses.misalignment(net.projected(), frozen[:, 1:].detach()).backward()
    moved = {k for k, p in net.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert {k.split(".")[0] for k in moved} == {"x_embedder", "t_embedder", "y_embedder", "blocks", "projectors"}
    assert {k.split(".")[1] for k in moved if k.startswith("blocks")} == {"0", "1"}
    assert not data.Encoder(SMALL_ENCODER, 32)(torch.rand(2, 3, 32, 32, requires_grad=True)).requires_grad
    assert [model.DiT(depth=d, width=8, heads=1, features=1).align for d in (12, 24, 28)] == [4, 8, 8]   # REPA's B, L, XL
    raises(lambda: model.DiT(depth=2, features=1, align=3), "after 3 blocks", "1 to 2")


@torch.no_grad()
def test_losses_reg_moves_image_and_token():
    """REG's solver state is the image and the token: an exact network brings both home, and only the image is drawn; with
    JiT's context tokens the aligned ones are those of patches."""
    net = tiny(model.TokenDiT, token=5)
    assert net.state == (3 * 64 + 5,) and net.shape == (3, 8, 8) and net.pos_embed[0, 0].eq(0).all() and net.pos_embed.shape[1] == 17
    labels = torch.arange(3)
    (_, made), = sample.generate(net, labels, 0, steps=2)
    e = data.Draws(0, range(3)).normal("sample noise", net.state)
    x = sample.sample(net, e, labels, 2)
    assert made.equal(data.to_uint8(x[:, :192].view(3, 3, 8, 8)))
    changed = torch.cat([e[:, :192], e[:, 192:] + 1], 1)
    assert (sample.sample(net, changed, labels, 2)[:, :192] - x[:, :192]).abs().max() > 1e-3        # the token is seen
    raises(lambda: sample.guided(net, 1.5, channels=3), "channels 3")
    raises(lambda: tiny(model.TokenDiT, token=5, shifts=True), "without context")
    jit = tiny(context=2, context_start=0, features=4, align=2).train()
    jit(torch.rand(2, 3, 8, 8), torch.rand(2), labels[:2])
    assert jit.projected().shape == (2, 16, 4)
    jit.eval().tokens = None
    jit(torch.rand(2, 3, 8, 8), torch.rand(2), labels[:2])
    assert jit.tokens is None                                                                       # nothing kept when sampling


def test_losses_cat_aligns_its_discriminator():
    """D's tokens of real images at the finest scale are aligned with what the encoder says of what D sees of them."""
    G = tiny(model.StagedDiT, stages=2, latent=4)
    D = model.ScaleDiscriminator(**G.config | dict(features=12, stages=2)).train()
    x, y, draws, seen = torch.rand(4, 3, 8, 8), torch.arange(4), data.Draws(0, range(4)), []
    z = torch.randn(4, 17, 12)
    cfg = train.Config(loss="cat", align=2.0, augment=1.0, batch=4)

    def features(images, draws):
        seen.append(images)
        return z

    loss, logs = losses.cat_D(D, x, y, draws, cfg, G, features)
    without, _ = losses.cat_D(D, x, y, draws, cfg, G)
    close(loss - without, 2 * logs["misalignment"], 1e-5)
    real = losses.pyramid(x.expand(2, *x.shape), draws, cfg)
    assert seen[0].equal(real[0]) and not seen[0].equal(x)
    D(real, y)
    tokens = D.tokens
    close(logs["misalignment"], losses.misalignment(D.projectors[0](tokens), z), 1e-6)
    assert tokens.shape == (4, 17, 32)
    D([real[0], real[1] + 1], y)
    close(D.tokens, tokens, 0)                                                                      # the finest scale alone


def test_losses_pafm_target():
    """K = 1 is flow matching bit for bit. With all points as candidates the target is the velocity of the empirical
    distribution; copies of x have no spread; large dimensions and small times lose no digits."""
    points = torch.tensor([[-1.], [-.97], [.9], [1.1]]).double()  # two that t = 0.03 cannot tell apart
    x, draws, cfg = points[:1].expand(50, 1), losses.BatchDraws(0, 0, 50), losses.Config(candidates=4)
    seen = []

    def net(x_t, t, y, r=None):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    net.predict, net.null_class = "v", False
    loss, logs = losses.pafm(net, x, torch.zeros(50).long(), draws, cfg, bank_of(points))
    empirical = losses.Mixture(points, torch.zeros(4).double(), torch.full((4,), .25).double())
    (x_t, t), = seen
    assert t.min() < 0.05 and abs(loss - empirical.velocity(x_t, t.double()).square().mean()) < 1e-6 * loss
    one = losses.pafm(net, x.float(), None, draws, losses.Config(candidates=1), None)
    assert one[0] == losses.fm(net, x.float(), None, draws, cfg)[0] and one[1]["spread"] == 0
    for predict in ("x", "v"):
        network, images, y = tiny(predict=predict), torch.rand(50, 3, 8, 8) * 2 - 1, torch.arange(50) % 10
        draws, cfg = data.Draws(0, range(50)), train.Config(candidates=1)
        assert losses.pafm(network, images, y, draws, cfg, None)[0] == losses.fm(network, images, y, draws, cfg)[0]
        network.raw = lambda x_t, t, y, *_: images if predict == "x" else 0 * images  # noqa: B023
        copies = lambda y, draws, n: images[:, None].expand(-1, n, -1, -1, -1)  # noqa: E731, B023
        loss, logs = losses.pafm(network, images, y, draws, train.Config(candidates=3), copies)
        assert logs["spread"] == 0 and (predict == "v" or loss < 1e-9)
    t = torch.tensor([[.003], [.05], [.3], [.7], [.95]])
    x, e, others = torch.randn(5, 500), torch.randn(5, 500), torch.randn(5, 7, 500)
    others = x[:, None] + t[:, None] * others / 20  # as near as to be told from x by noise of size t with an effort
    single, double = (losses.posterior_mean(*(part.to(dtype) for part in (x, e, t[:, 0], others)))[0]
                      for dtype in (torch.float32, torch.float64))
    assert ((single - double) / t).abs().max() < 1e-4 and ((double - x) / t).abs().amax(1).min() > 1e-2


def test_losses_pafm_is_unbiased_and_varies_less(monkeypatch):
    """At the exact velocity the mean gradient is 0 for every K, clearly not where x is left out of the candidates; the loss
    there, which is the target's variance, falls with K."""
    cfg, values = {K: losses.Config(candidates=K) for K in (1, 2, 4, 16)}, {}

    def errors(K, self_included=True):
        def loss(k, net):
            x, y = TWO_MODES.sample(1000, data.generator("pafm", k))
            more = TWO_MODES.sample(16_000, data.generator("pafm others", k))[0].view(1000, 16, 1)
            with monkeypatch.context() as patch:
                if not self_included:
                    patch.setattr(losses, "posterior_mean", without)
                value = losses.pafm(net, x, y, losses.BatchDraws(5, k, 1000), cfg[K], lambda y, draws, n: more[:, :n])[0]
            values[K] = value.item()
            return value
        return gradient_in_standard_errors(loss, 25, D=lambda: Perturbed(TWO_MODES.velocity))

    exact = losses.posterior_mean

    def without(x, e, t, others):
        """The same with weights for others alone: their mean given x_t."""
        x_t, first = losses.interpolate(x, e, t), others[:, 0]
        away = (x_t - losses.interpolate(first, 0 * e, t)) / t[:, None].clamp_min(1e-3)
        return exact(first, away, t, others[:, 1:])

    assert errors(4) < 4 and errors(2) < 4 and errors(16) < 4 and errors(1) < 4
    assert values[1] > values[2] > values[4] > values[16] > 0 and values[16] < 0.4 * values[1]
    assert errors(4, self_included=False) > 6


def test_losses_carflow_is_the_papers():
    """In moved coordinates z_t: the loss |v_z(z_t) - (z_1 - z_0)|^2, its gradients in both shifts too; shifts of 0 are
    plain flow matching; the sampler starts at e + a, ends at z - b."""
    net = tiny(shifts=True, null_class=False).double()
    plain = model.DiT(**net.config | dict(shifts=False)).double().eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("shifts")})
    x, y, draws = torch.randn(8, 3, 8, 8).double(), torch.arange(8), data.Draws(0, range(8))
    cfg, e, t = train.Config(), draws.normal("noise", (3, 8, 8)).double(), losses.sample_times(draws, train.Config()).double()
    losses.fm(net, x, y, draws, cfg)[0].backward()
    a, b = (p.detach()[y].requires_grad_() for p in (net.shifts.source, net.shifts.target))
    z0, z1 = x + b, e + a
    loss = (plain(losses.interpolate(z0, z1, t), t, y) - (z1 - z0)).square().mean()
    loss.backward()
    assert abs(loss - losses.fm(net, x, y, draws, cfg)[0]) < 1e-6
    for shift, own in ((net.shifts.source, a), (net.shifts.target, b)):
        assert (shift.grad[:8] - own.grad).abs().max() < 1e-6 < own.grad.abs().max() and shift.grad[8:].abs().max() == 0
    with torch.no_grad():
        z = sample.sample(plain, e + a, y, 7)
        assert (sample.sample(net, e, y, 7) - (z - b)).abs().max() < 1e-9
        net.shifts.source.zero_(), net.shifts.target.zero_()
        assert torch.equal(net(x, t, y), plain(x, t, y))
    fresh = model.create("glyph-S", shifts=True)
    assert not fresh.shifts.source.any() and fresh.shifts.target.shape == (11, 3, 32, 32)


class ShiftedOptimum(nn.Module):
    """model.Shifts a + weight, b + extra + weight around the best velocity that there is for shifts a, b of TWO_MODES."""
    predict, t_min, null_class = "v", 0.0, False
    a, b = torch.tensor([[.3], [-1.]]).double(), torch.tensor([[1.], [.2]]).double()

    def __init__(self, extra):
        super().__init__()
        self.extra, self.moved, self.weight = extra, model.Shifts(2, (1,)), nn.Parameter(torch.zeros(4).double())

    def forward(self, x_t, t, y, r=None):
        def best(z, t, y, r):
            s, a, b = t[:, None], self.a[y], self.b[y]
            return TWO_MODES.velocity(z - (1 - s) * b - s * a, t, y) + a - b

        shifts = {"source": self.a + self.weight[:2, None], "target": self.b + self.extra + self.weight[2:, None]}
        return torch.func.functional_call(self.moved, shifts, (best, x_t, t, y, r))


def test_losses_carflow_optimum():
    """At the best velocity the gradient in the shifts is 0, which it is not at a velocity for other shifts. The loss there
    is pi s0 s / 2 for N(m, s^2) and N(0, s0^2): it does not see shifts, and a learned scale s0 would run to 0."""
    def errors(extra):
        def loss(k, net):
            x, y = TWO_MODES.sample(2000, data.generator("shifts", k))
            return losses.fm(net, x, y, losses.BatchDraws(6, k, 2000), losses.Config())[0]
        return gradient_in_standard_errors(loss, 20, D=lambda: ShiftedOptimum(extra))

    assert errors(0.0) < 4 and errors(0.3) > 8
    x, y = TWO_MODES.sample(40_000, data.generator("scale"))
    for s0 in (1.0, 0.5, 0.1):
        draws = losses.BatchDraws(0, 0, 40_000)
        noise = types.SimpleNamespace(normal=lambda *k: s0 * draws.normal(*k), uniform=draws.uniform, positions=draws.positions)  # noqa: B023
        unit = dataclasses.replace(TWO_MODES, means=TWO_MODES.means / s0, stds=TWO_MODES.stds / s0)
        net = lambda x_t, t, y, r=None: s0 * unit.velocity(x_t / s0, t.double(), y)  # noqa: E731, B023
        net.predict, net.null_class = "v", False
        assert abs(losses.fm(net, x, y, noise, losses.Config())[0] / (math.pi / 2 * s0 * 0.5) - 1) < 0.04


def test_losses_carflow_shortens_the_paths():
    """Trained equally long on N(-1.5, .2^2) and N(1.5, .2^2), told which, a network with shifts goes a shorter way from
    z_1 to z_0 (paper: 1.54 and 0.71) to samples no worse."""
    mixture = dataclasses.replace(FLOAT_MODES, stds=torch.tensor([.2, .2]))
    e, y, lengths = torch.special.ndtri((torch.arange(400) + .5) / 400)[:, None], torch.arange(400) % 2, {}
    for shifts in (False, True):
        net = losses.train_points("carflow" if shifts else "fm", mixture, losses.Config(
            steps=1000, lr=1e-2, batch=128, width=12, classes=2, shifts=shifts))
        states = losses.trajectory(lambda x, t, *_: net(x, t, y), e, 50)  # noqa: B023
        assert abs(states[-1][:, 0].abs().mean() - 1.5) < 0.1
        if shifts:
            t = torch.linspace(1, 0, 51)[:, None, None]
            states = states + (1 - t) * net.shifts.target[y] + t * net.shifts.source[y]
        lengths[shifts] = states.diff(dim=0).abs().sum(0).mean().item()
    assert 1.3 < lengths[False] < 1.7 and lengths[True] < 0.75 * lengths[False], lengths


def test_losses_trained_network_reaches_the_exact_sampler():
    """800 steps on the 1-D mixture bring velocity, flow map and sample distribution near the closed form."""
    cfg = losses.Config(steps=800)
    errors = losses.point_errors(losses.train_points("fm", losses.FOUR_MODES, cfg), losses.FOUR_MODES)
    assert errors["velocity"] < 0.16 and errors["map"] < 0.16 and errors["W1"] < 0.08, errors


class GaussianMap(nn.Module):
    """The average velocity of the flow map of N(m, s^2) with parameters m and log s: u = (x_t - x_r) / (t - r), where

    x_r = (1 - r) m + sg(r) / sg(t) (x_t - (1 - t) m),   sg(t) = sqrt((1 - t)^2 s^2 + t^2),

    written so that r = t is no exception. `wrong` is multiplied with it. to_data: r = 0 always, a consistency model.
    """
    predict, t_min, num_classes, null_class, guided, head = "v", 0.0, 1, False, False, 0

    def __init__(self, m=0.7, s=0.4, wrong=1.0, to_data=False):
        super().__init__()
        self.wrong, self.to_data = wrong, to_data
        self.m, self.log_s = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (m, math.log(s)))

    def spread(self, t):
        return ((1 - t) ** 2 * (2 * self.log_s).exp() + t ** 2).sqrt()

    def forward(self, x_t, t, y=None, r=None):
        r = torch.zeros_like(t) if self.to_data else t if r is None else r
        sg_t, sg_r = self.spread(t), self.spread(r)
        slope = ((t + r) - (2 * self.log_s).exp() * (2 - t - r)) / (sg_t + sg_r) / sg_t
        return self.wrong * (slope[:, None] * (x_t - (1 - t)[:, None] * self.m) - self.m)


class Given:
    """Draws whose every number is given: the noise, and uniform numbers by their purpose."""
    positions = range(1)

    def __init__(self, e, **uniforms):
        self.e, self.uniforms = e, {name.replace("_", " "): value for name, value in uniforms.items()}

    def normal(self, purpose, shape):
        return self.e

    def uniform(self, purpose):
        return self.uniforms[purpose.replace("'", "")]


def gaussian_pairs(n=60, jumps=True):
    """x, draws, t, r in float64: pairs of samples of N(0.7, 0.4^2) that meet at the same x_t with velocities on both sides

    of the mean one, v +- s / sg(t): sums over a pair are exact expectations of what is linear in v.
    """
    rng = torch.Generator().manual_seed(0)
    t, r = torch.rand(2, n, generator=rng, dtype=torch.float64).mul(0.96).add(0.02).sort(0, descending=True).values.repeat(1, 2)
    x_t = torch.randn(n, 1, generator=rng, dtype=torch.float64).repeat(2, 1)
    net = GaussianMap()
    with torch.no_grad():
        side = torch.tensor([1.0, -1.0]).double().repeat_interleave(n)[:, None]
        v = net(x_t, t, None, t) + side * (0.4 / net.spread(t))[:, None]
    kind = torch.full_like(t, 0.99) if jumps else torch.arange(2 * n).double() % n / n
    return x_t - t[:, None] * v, Given(x_t + (1 - t)[:, None] * v, time=t, time_of_the_jumps_end=r, jump_or_flow=kind), t, r


def oracle_gradient(objective, oracle, jumps=True, step=0, **settings) -> float:
    """The norm of d loss / d (m, log s) at this step of 10,001, exact in expectation."""
    x, draws, *_ = gaussian_pairs(jumps=jumps)
    draws.positions = range(step, step + 1)
    cfg = losses.Config(steps=10_001, batch=1, **settings)
    loss, _ = objective(oracle, x, torch.zeros(len(x)).long(), draws, cfg)
    return torch.stack(torch.autograd.grad(loss, (oracle.m, oracle.log_s))).norm().item()


def wrong_maps(**options):
    return GaussianMap(m=0.75, **options), GaussianMap(s=0.44, **options), GaussianMap(wrong=1.05, **options)


class ByLabel(nn.Module):
    """One number for each label, at every point and time; notes the times and labels of calls that have a graph."""
    predict, t_min, num_classes, null_class, guided, head = "v", 0.0, 2, True, False, 0

    def __init__(self, *values):
        super().__init__()
        self.values, self.seen = nn.Parameter(torch.tensor(values)), []

    def forward(self, x_t, t, y, r=None):
        if torch.is_grad_enabled():
            self.seen.append((t, t if r is None else r, y))
        return self.values[y].view(-1, *[1] * (x_t.dim() - 1)).expand_as(x_t)


def test_losses_one_step_oracles():
    """At the exact average velocity of a Gaussian the gradient of meanflow and imf is 0 whatever p, on jumps and on a
    mixture of both kinds, and that of scm at the exact way to the data; a shifted or scaled map has a gradient. That of
    soflow falls like its step, which ends at 0.002."""
    cases = [(losses.meanflow, jumps, p, False, 0) for jumps in (True, False) for p in (0.0, 1.0)]
    for objective, jumps, p, to_data, step in (*cases, (losses.imf, True, 0.0, False, 0), (losses.imf, False, 1.0, False, 0),
                                               (losses.scm, True, 0.0, True, 10_000)):
        assert oracle_gradient(objective, GaussianMap(to_data=to_data), jumps, step, p=p) < 1e-12, (objective, jumps, p)
        for wrong in wrong_maps(to_data=to_data):
            assert oracle_gradient(objective, wrong, jumps, step, p=p) > 0.005, (objective, jumps, p)
    assert oracle_gradient(losses.scm, GaussianMap(to_data=True), step=0) > 0.005  # at first without du/dt
    far, near = (oracle_gradient(losses.soflow, GaussianMap(), step=step) for step in (0, 5886))  # steps 0.1 and 0.01
    assert 8 < far / near < 12 and near < 2e-3, (far, near)
    for wrong in wrong_maps():
        assert oracle_gradient(losses.soflow, wrong, True, 10_000) > 0.01 < oracle_gradient(losses.soflow, wrong, False, 10_000)


def one_step_case(head=0, times=2):
    """A small float64 network of points in the plane, x, y, draws, t, r, x_t, v, and the network's parameters."""
    torch.manual_seed(0)
    net, n = losses.PointNet(2, width=16, times=times, head=head).double(), 12
    with torch.no_grad():
        net.frequencies /= 4
    x, e = torch.randn(2, n, 2, dtype=torch.float64)
    t, r = torch.rand(2, n, dtype=torch.float64).mul(0.9).add(0.05).sort(0, descending=True).values
    draws = Given(e, time=t, time_of_the_jumps_end=r, jump_or_flow=torch.full_like(t, 0.99))
    return net, x, torch.zeros(n).long(), draws, t, r, losses.interpolate(x, e, t), e - x


def assert_same_loss(found, want, net) -> None:
    """Two losses agree in value and gradient."""
    parameters = list(net.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (found, want)]
    assert abs(found / want - 1) < 1e-9 and (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[1].norm()


def test_losses_imf_is_its_formula():
    """Value and gradient of both forms of imf, from the paper's formula by torch.func.jvp, with the network's own velocity
    as the tangent."""
    for head in (0, 1):
        net, x, y, draws, t, r, x_t, v = one_step_case(head)
        own = (net(x_t, t, y, t, head=True)[1] if head else net(x_t, t, y, t)).detach()
        _, du = torch.func.jvp(lambda x_t, t: net(x_t, t, y, r), (x_t, t), (own, torch.ones_like(t)))
        errors = [net(x_t, t, y, r) + (t - r)[:, None] * du.detach() - v]
        if head:
            errors.append(net(x_t, t, y, r, head=True)[1] - v)
        want = sum((l / (l.detach() + 0.01 / 2)).mean() for l in (error.square().mean(1) for error in errors))
        assert_same_loss(losses.imf(net, x, y, draws, losses.Config(p=1.0, jumps=0.5))[0], want, net)


def test_losses_soflow_is_its_formula():
    """Value and gradient of a jump's loss are those of half the squared difference of the two solutions, weighted."""
    net, x, y, draws, t, r, x_t, v = one_step_case()
    l = t - 0.1 * (t - r)  # noqa: E741
    f = lambda x, t: x - (t - r)[:, None] * net(x, t, y, r)  # noqa: E731
    q = (f(x_t, t) - f(x_t - (t - l)[:, None] * v, l).detach()) / (t - l)[:, None]
    weight = 1 / (q.detach().square().mean(1) + 0.01)
    want = 0.5 * (weight * q.detach().square().mean(1)).mean()
    loss, logs = losses.soflow(net, x, y, draws, losses.Config(p=1.0))
    assert abs(loss / want - 1) < 1e-9 and abs(logs["jump"] / q.square().mean() - 1) < 1e-9
    parameters = list(net.parameters())
    gap = (f(x_t, t) - f(x_t - (t - l)[:, None] * v, l).detach()).square().mean(1)
    paper = (0.5 * gap * weight / ((t - r) * (t - l))).mean()  # b = r - t
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(paper, parameters)):
        assert (a - b).norm() < 1e-9 * (1 + b.norm())


def test_losses_ect_is_edms():
    """Value and gradient are those of the paper's D(x + s e) at noise levels s = t / (1 - t), whose input our x_t is over
    1 + s; the target is a constant, x itself where r = 0, and steps shrink by stages."""
    for step, k in ((0, 1), (3, 4), (7, 8)):
        net, x, y, draws, t, *_ = one_step_case(times=1)
        draws.positions = range(step, step + 1)
        s = t / (1 - t)
        s_r = s * (1 - (1 + 8 * torch.sigmoid(-s)) / 2 ** k).clamp_min(0)

        def D(s):
            seen = (x + s[:, None] * draws.e) / (1 + s[:, None])
            return seen - (s / (1 + s))[:, None] * net(seen, s / (1 + s))

        gap = (D(s) - D(s_r).detach()).square().mean(1)
        want = (((gap + 0.00054 ** 2).sqrt() - 0.00054) / (s - s_r)).mean()
        loss, logs = losses.ect(net, x, y, draws, losses.Config(steps=8, batch=1, doublings=8))
        assert_same_loss(loss, want, net)
        assert (s_r == 0).any() == (step == 0) and abs(logs["gap"] - (t - s_r / (1 + s_r)).mean()) < 1e-9


def test_losses_scm_is_trigflows():
    """Value and gradient are those of TrigFlow, computed on its circle x_a = cos a x + sin a sd e by torch.func.jvp: F, its
    derivative, g, the normalisation."""
    net, x, y, draws, t, _, x_t, v = one_step_case(times=1)
    draws.positions, sd = range(9, 10), 0.6
    a = torch.atan(t / (1 - t) / sd)

    def F(x_a, a):
        scale = (a.cos() + sd * a.sin())[:, None]
        t = sd * a.sin() / scale[:, 0]
        f = x_a / scale - t[:, None] * net(x_a / scale, t)
        return (a.cos()[:, None] * x_a - f) / (sd * a.sin())[:, None]

    cos, sin = a.cos()[:, None], a.sin()[:, None]
    x_a, dx = cos * x + sin * sd * draws.e, cos * sd * draws.e - sin * x
    _, dF = torch.func.jvp(F, (x_a, a), (dx, torch.ones_like(a)))
    g = (-cos ** 2 * (sd * F(x_a, a) - dx) - cos * sin * (x_a + sd * dF)).detach()
    g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    want = (F(x_a, a) - F(x_a, a).detach() - g).square().mean()
    assert_same_loss(losses.scm(net, x, y, draws, losses.Config(steps=10, batch=1, data_std=sd))[0], want, net)
    draws.positions = range(1, 2)  # half of the warm-up
    _, du = torch.func.jvp(lambda x_t, t: net(x_t, t, y), (x_t, t), (v, torch.ones_like(t)))
    g = ((1 - t) * ((sd * (1 - t)) ** 2 + t ** 2).sqrt())[:, None] * (v - net(x_t, t) - 0.5 * t[:, None] * du)
    size = g.square().mean(1).sqrt()
    loss, logs = losses.scm(net, x, y, draws, losses.Config(steps=11, batch=1, data_std=sd))
    assert abs(loss / (size / (size + 0.1)).square().mean() - 1) < 1e-9 and abs(logs["tangent"] / size.mean() - 1) < 1e-9


def test_losses_shortcut_halves_and_grid():
    """Exact maps have no loss on jumps, others have; jumps have the lengths 1 .. 2 / finest and start on their own grid;
    the other samples are the shortest and learn v; omega guides the two shortest halves alone."""
    n, rng = 400, torch.Generator().manual_seed(0)
    u = {name: torch.rand(n, generator=rng, dtype=torch.float64) for name in ("time", "length_of_the_jump")}
    x, e = torch.randn(2, n, 1, generator=rng, dtype=torch.float64)
    y, draws = torch.zeros(n).long(), Given(e, jump_or_flow=torch.full((n,), 0.99), **u)
    flow = Given(e, jump_or_flow=torch.zeros(n), **u)
    cfg = losses.Config(finest=16, label_drop=0.0)
    exact, other = (losses.shortcut(GaussianMap(wrong=wrong), x, y, draws, cfg)[0] for wrong in (1.0, 1.05))
    assert exact < 1e-24 and other > 1e-6
    net = ByLabel(3., 3., 1.)
    loss, logs = losses.shortcut(net, x, y, draws, dataclasses.replace(cfg, omega=2.0))
    shortest = (u["length_of_the_jump"] >= 0.75).double().mean()  # 1 + 2 (3 - 1) = 5 there, 3 in longer ones
    assert abs(loss - shortest * 4) < 1e-6 and abs(logs["jump"] - loss) < 1e-6 and logs["flow"] == 0
    t, r, _ = net.seen[0]
    assert (1 / (t - r)).round().unique().tolist() == [1, 2, 4, 8] and t.max() == 1 and r.min() == 0
    assert ((t / (t - r)) % 1 == 0).all()
    loss, logs = losses.shortcut(net, x, y, flow, cfg)
    t, r, _ = net.seen[1]
    assert abs(loss - (3 - (e - x)).square().mean()) < 1e-6 and logs["jump"] == 0 and abs(logs["flow"] - loss) < 1e-6
    assert (t - r == 1 / 16).all() and len(t.unique()) == 16


@pytest.mark.parametrize("name", ["meanflow", "imf", "soflow"])
def test_losses_one_step_composition(name):
    """A share `jumps` of the samples has r < t, the others r = t; labels are dropped among these alone, label_drop of all;
    t and r are the larger and smaller of two logit-normal draws."""
    n, net = 4000, ByLabel(0., 0., 0.)
    cfg = train.Config(loss=name, jumps=0.3, label_drop=0.2, time_mean=-0.4, time_std=1.0)
    getattr(losses, name)(net, torch.randn(n, 1, 1, 1), torch.arange(n) % 2, data.Draws(0, range(n)), cfg)
    (t, r, y), = net.seen
    jumps, null = r < t, y == 2
    assert (r <= t).all() and abs(jumps.float().mean() - 0.3) < 0.02 and abs(null.float().mean() - 0.2) < 0.02
    assert not (null & jumps).any() and torch.equal(y[~null], (torch.arange(n) % 2)[~null])
    both = torch.logit(torch.cat([t[jumps], r[jumps]]))
    assert abs(both.mean() + 0.4) < 0.07 and abs(both.std() - 1) < 0.05
    assert abs(torch.logit(t[~jumps]).mean() - (0.564 - 0.4)) < 0.06  # the mean of the larger of two


def test_losses_guided_velocity_has_its_fixed_point():
    """Where E v - u_null = d, a network at u_null + w d has no loss and no gradient, w = omega / (1 - kappa); without
    guidance, above guide_until and under the null label it is E v itself."""
    x, e, y = torch.zeros(8, 1), torch.full((8, 1), 1.5), torch.arange(8) % 2
    null, t = 0.5, torch.full((8,), 0.6)
    draws = Given(e, time=t, time_of_the_jumps_end=t / 2, jump_or_flow=torch.full((8,), 0.99))
    for objective in (losses.meanflow, losses.soflow):
        for settings, w in (({}, 1.0), (dict(omega=1.0, kappa=0.5), 2.0), (dict(omega=0.2, kappa=0.92), 2.5),
                            (dict(omega=2.0), 2.0), (dict(omega=2.0, guide_until=0.59), 1.0),
                            (dict(omega=2.0, guide_until=0.61), 2.0)):
            for value, zero in ((null + w * (1.5 - null), True), (null + 1.2 * w * (1.5 - null), False)):
                net = ByLabel(value, value, null)
                loss, _ = objective(net, x, y, draws, losses.Config(jumps=0.2, **settings))
                assert (loss < 1e-10) == zero, (objective, settings, value, loss)
                assert torch.autograd.grad(loss, net.values)[0][2] == 0, "no gradient through the guidance"
    loss, _ = losses.meanflow(ByLabel(9.0, 9.0, 1.0), x, torch.full((8,), 2), draws, losses.Config(omega=2.0, jumps=0.2))
    assert abs(loss - 0.25) < 1e-6


class Scaled(ByLabel):
    """A network that is told the scale w and is, at every point, null + w d under a label; notes w."""
    guided = True

    def forward(self, x_t, t, y, r=None, w=None):
        self.w, guided = w, super().forward(x_t, t, y, r)
        return torch.where((y == 2)[:, None], guided, self.values[2] + w[:, None] * (guided - self.values[2]))


def test_losses_imf_guidance_is_an_input():
    """The network v_null + w (E v - v_null) has no loss, for scales with a density like 1 / w up to omega_max; another one
    has, and under the null label the target is the sample's velocity."""
    n, cfg = 4000, losses.Config(jumps=0.5, omega_max=4.0)
    x, e, y = torch.zeros(n, 1), torch.full((n, 1), 1.5), torch.arange(n) % 2
    draws = data.Draws(0, range(n))
    draws.normal = lambda *_: e
    for value, zero in ((1.5, True), (1.6, False)):
        net = Scaled(value, value, 0.5)
        loss, _ = losses.imf(net, x, y, draws, cfg)
        assert (loss < 1e-10) == zero, loss
        assert torch.autograd.grad(loss, net.values, retain_graph=True)[0].abs().max() < 1e-5 or not zero
    assert (net.w.log() / math.log(4) - draws.uniform("guidance scale")).abs().max() < 1e-6
    assert abs(losses.imf(Scaled(9., 9., 1.), x, torch.full((n,), 2), draws, cfg)[0] - 0.25) < 1e-6


def test_losses_adaptive_weight():
    """l / (l + c)^p by value; its gradient is that of l times a constant, 1 / (l + c)^p; the logs tell flow from jumps."""
    error = torch.tensor([[[1., 2.]], [[0., .1]]], requires_grad=True)
    square, c = torch.tensor([2.5, .005]), 0.01
    for p in (0.0, 0.5, 1.0):
        value = losses.adaptive(error, p, c)
        assert torch.allclose(value, square / (square + c) ** p)
        gradient, = torch.autograd.grad(value.sum(), error)
        assert torch.allclose(gradient, error.detach() / ((square + c) ** p)[:, None, None])
    logs = losses.two_errors(error, torch.tensor([.5, .5]), torch.tensor([.5, .2]))
    assert abs(logs["flow"] - 2.5) < 1e-6 and abs(logs["jump"] - .005) < 1e-6
    x, y, draws = torch.zeros(8, 2, 1, 1), torch.zeros(8).long(), data.Draws(0, range(8))
    net, cfg = ByLabel(3., 0., 0.), train.Config(jumps=0.0, label_drop=0.0, p=0.5)
    square = (3 - draws.normal("noise", (2, 1, 1))).square().flatten(1).mean(1)
    assert abs(losses.meanflow(net, x, y, draws, cfg)[0] - (square / (square + 0.005).sqrt()).mean()) < 1e-5


class LinearD(nn.Module):
    """D(x, t) = g x + b t + c for points (B, D): everything about CAFM's game is known for it."""

    def __init__(self, dimension=2):
        super().__init__()
        self.g, self.b, self.c = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((dimension,), (), ()))
        self.register_buffer("gradient_square", torch.zeros(()))

    def forward(self, x, t, y=None):
        return x.double() @ self.g + self.b * t + self.c


class ConstantG(nn.Module):
    """The velocity u, the same everywhere."""
    predict, t_min, num_classes, null_class = "v", 0.0, 1, False

    def __init__(self, u):
        super().__init__()
        self.u = nn.Parameter(u)

    def forward(self, x_t, t, y, r=None):
        return self.u.expand(len(x_t), -1)


def test_losses_cafm_value_and_optimum_of_D():
    """A constant D has the loss 2 + cp c^2. Among linear D the best has, with d = E v - u and s = d' Cov(v)^-1 d, the slopes
    s / (2 + s) and -s / (2 + s) and the loss 4 / (2 + s), exactly for the mean and covariance of the batch."""
    cfg, draws = losses.Config(cp=0.1), losses.BatchDraws(0, 0, 500)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1., 0.], [.5, .3]]) + 0.7
    D, G = LinearD(), ConstantG(torch.tensor([.4, -.2]))
    nn.init.constant_(D.c, 3.0)
    assert abs(losses.cafm_D(D, x, None, draws, cfg, G)[0] - (2 + 0.1 * 9)) < 1e-12
    cfg = losses.Config(cp=0.0)
    parameters = [D.g, D.b]

    def gradient():
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses.cafm_D(D, x, None, draws, cfg, G)[0], parameters)])

    at_zero, columns = gradient(), []
    for k in range(3):  # the loss is quadratic in (g, b)
        with torch.no_grad():
            D.g.copy_(torch.eye(3)[k, :2])
            D.b.copy_(torch.eye(3)[k, 2])
        columns.append(gradient() - at_zero)
    best = torch.linalg.solve(torch.stack(columns, 1), -at_zero)
    with torch.no_grad():
        D.g.copy_(best[:2])
        D.b.copy_(best[2])
    loss, logs = losses.cafm_D(D, x, None, draws, cfg, G)
    v = (draws.normal("noise", (2,)) - x).double()
    d = v.mean(0) - G.u.detach().double()
    s = d @ torch.linalg.solve(torch.cov(v.T, correction=0), d)
    assert abs(loss - 4 / (2 + s)) < 1e-6 and s > 0.5
    assert abs(logs["slope_real"] - s / (2 + s)) < 1e-6 and abs(logs["slope_fake"] + s / (2 + s)) < 1e-6


def test_losses_cafm_gradient_of_G():
    """dL_G / du = 2 (J(u) - 1) grad_x D, plus the transport cost's 2 ot u; no gradient reaches D."""
    D, u = LinearD(), torch.tensor([.4, -.2])
    with torch.no_grad():
        D.g.copy_(torch.tensor([.3, .8]))
        D.b.copy_(torch.tensor(.1))
    x, draws = torch.randn(64, 2), losses.BatchDraws(0, 0, 64)
    J = D.g.detach() @ u.double() + 0.1
    for route in ("reverse", "finite"):
        for ot in (0.0, 0.5):
            G = ConstantG(u.clone())
            loss, logs = losses.cafm_G(G, x, None, draws, losses.Config(ot=ot, ot_end=ot, steps=1, route=route), D)
            gradient, = torch.autograd.grad(loss, G.u, retain_graph=True)
            assert abs(loss - ((J - 1) ** 2 + ot * u.square().mean())) < 1e-5 and abs(logs["slope_fake"] - J) < 1e-5
            assert (gradient - (2 * (J - 1) * D.g.detach() + ot * u)).abs().max() < 1e-5  # mean over 2 pixels: 2 ot u / 2
    assert all(p.grad is None for p in D.parameters())


def test_losses_cafm_routes_agree():
    """Reverse and forward route give the same loss; finite differences come to it as their interval shrinks."""
    torch.manual_seed(0)
    D, G = losses.PointDiscriminator(2).double(), losses.PointNet(2)
    x, draws = torch.randn(64, 2), losses.BatchDraws(0, 0, 64)
    D.frequencies /= 4
    double = types.SimpleNamespace(normal=lambda *a: draws.normal(*a).double(), uniform=lambda *a: draws.uniform(*a).double())
    G.double()
    value = {route: losses.cafm_D(D, x.double(), None, double, losses.Config(route=route), G)[0] for route in ("reverse", "forward")}
    near, far = (losses.cafm_D(D, x.double(), None, double, losses.Config(route="finite", interval=h), G)[0] for h in (1e-4, 1e-3))
    assert abs(value["forward"] / value["reverse"] - 1) < 1e-9
    ratio = (far - value["reverse"]) / (near - value["reverse"])
    assert abs(near - value["reverse"]) < 1e-3 and 8 < ratio < 12, ratio


class FeatureD(nn.Module):
    """A weighted sum of features of (x, t), at weight 0: the gradient in the weights tells whether D can leave 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x, t, y=None):
        x = x[:, 0]
        return torch.stack([x, x ** 2, (2 * x).sin(), (3 * x).cos() * (t + 1), x * (t + 1)]).mul(self.weight[:, None]).sum(0)


def gradient_in_standard_errors(loss, batches=40, D=FeatureD) -> float:
    """max over the weights of |mean gradient| / its standard error; loss(k, D) is that of batch k."""
    D, gradients = D(), []
    for k in range(batches):
        gradients.append(torch.autograd.grad(loss(k, D), D.weight)[0])
    gradients = torch.stack(gradients)
    return (gradients.mean(0).abs() / (gradients.std(0) / batches ** 0.5)).max().item()


def test_losses_cafm_D_cannot_tell_the_exact_velocity():
    """At D = 0 the mean gradient of D's loss is 0 for the exact velocity, and is not for a wrong one."""
    def errors(velocity):
        def loss(k, D):
            x, y = TWO_MODES.sample(2000, data.generator("cafm oracle", k))
            return losses.cafm_D(D, x, y, losses.BatchDraws(1, k, 2000), losses.Config(), Perturbed(velocity))[0]
        return gradient_in_standard_errors(loss)

    assert errors(TWO_MODES.velocity) < 4
    for wrong in (lambda x, t: 1.1 * TWO_MODES.velocity(x, t), lambda x, t: -TWO_MODES.velocity(x, t),
                  lambda x, t: TWO_MODES.velocity(x, 1 - t)):
        assert errors(wrong) > 8


class PlaneD(nn.Module):
    """As FeatureD, for points of the plane."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x, t, y=None):
        a, b = x.double().T
        return torch.stack([a, a * b, a ** 2, (a + 2 * b).sin() * (t + 1), a ** 2 - b ** 2]).mul(self.weight[:, None]).sum(0)


def test_losses_cafm_D_sees_marginals_only():
    """Noise and data N(0, s^2 I): a rotation added to the exact velocity moves no density, and D cannot leave 0 for it.
    Where the density is not round, the same rotation is seen; so is a stretch."""
    turn = torch.tensor([[0., 1.], [-1., 0.]]).double()

    def errors(stds, extra):
        def velocity(x_t, t, y, r=None):  # of each coordinate alone: the slope of `Mixture.velocity` at mean 0
            t = t[:, None].double()
            variance = ((1 - t) * stds) ** 2 + t ** 2
            return (t - (1 - t) * stds ** 2) / variance * x_t + x_t @ extra

        velocity.predict, velocity.null_class = "v", False

        def loss(k, D):
            x = stds * torch.randn(2000, 2, generator=data.generator("plane", k)).double()
            return losses.cafm_D(D, x, None, losses.BatchDraws(2, k, 2000), losses.Config(), velocity)[0]
        return gradient_in_standard_errors(loss, D=PlaneD)

    round_, long = torch.tensor([.5, .5]).double(), torch.tensor([2., .5]).double()
    assert errors(round_, 0 * turn) < 4 and errors(long, 0 * turn) < 4 and errors(round_, turn) < 4
    assert errors(long, turn) > 8 and errors(round_, 0.3 * torch.eye(2).double()) > 8


class ExactJump(nn.Module):
    """The exact flow map of TWO_MODES as an average velocity: jumps of 1 / nfe, times `factor`; of any length for 0."""
    predict, t_min, num_classes, null_class = "v", 0.0, 1, False

    def __init__(self, nfe, factor=1.0):
        super().__init__()
        self.nfe, self.factor = nfe, factor

    def forward(self, x_s, s, y, r=None):
        s = s.double()
        r = (s - 1 / self.nfe).clamp_min(0) if self.nfe else r.double()
        return self.factor * (x_s - TWO_MODES.flow(x_s, s, r)) / (s - r)[:, None]


def test_losses_afm_D_cannot_tell_the_exact_map():
    """At D = 0 the mean gradient of D's loss is 0 where jumps are exact, in 1 or 3 steps or between any two times, and is
    not for other jumps."""
    def errors(nfe, factor):
        def loss(k, D):
            x, y = TWO_MODES.sample(400, data.generator("afm oracle", k))
            return losses.afm_D(D, x, y, losses.BatchDraws(1, k, 400), losses.Config(nfe=nfe), ExactJump(nfe, factor))[0]
        return gradient_in_standard_errors(loss, 25)

    for nfe in (1, 3, 0):
        assert errors(nfe, 1.0) < 4
        assert errors(nfe, 0.8) > 8


def test_losses_afm_jumps_compose_to_the_map():
    """K exact jumps by the Euler sampler are the map F^-1(Phi(z)); the times of training are the sampler's."""
    e = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, zero = torch.ones(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for nfe in (1, 2, 49):
        made = sample.sample(ExactJump(nfe), e, torch.zeros(200, dtype=torch.int64), nfe)
        assert (made - TWO_MODES.flow(e, one, zero)).abs().max() < 1e-9
        s, r = losses.jump_times(losses.BatchDraws(0, 0, 5000), losses.Config(nfe=nfe))
        assert len(s.unique()) == nfe and s.max() == 1 and r.min() == 0 and (s - r - 1 / nfe).abs().max() < 1e-6
        grid = torch.tensor(sample.time_grid(nfe))
        assert (s.unique().flip(0) - grid[:-1]).abs().max() < 1e-6
    for steps in (1, 5):  # one network for any grid: the sampler tells it both ends
        made = sample.sample(ExactJump(0), e, torch.zeros(200, dtype=torch.int64), steps, shift=2.0)
        assert (made - TWO_MODES.flow(e, one, zero)).abs().max() < 1e-9
    s, r = losses.jump_times(losses.BatchDraws(0, 0, 20_000), losses.Config(nfe=0))
    assert ((0 <= r) & (r < s) & (s <= 1)).all()
    for u in (s, r / s):  # uniform both, and one tells nothing of the other
        assert abs(u.mean() - .5) < .01 and abs(u.std() - 12 ** -.5) < .01
    assert abs(torch.corrcoef(torch.stack([s, r / s]))[0, 1]) < .02


def test_losses_afm_values():
    """A D that sees nothing: ln 2 for both players. A constant added to D changes nothing but the centring penalty,
    cp (2 c)^2. The transport cost is ot w mean(u^2) for a jump of length w, and 1e-3 is the least w in the divisor."""
    x, y, draws = torch.randn(64, 2), torch.zeros(64).long(), losses.BatchDraws(0, 0, 64)
    u = torch.tensor([.4, -.2])
    D = LinearD()
    for c in (0.0, 1.5):
        nn.init.constant_(D.c, c)
        cfg = losses.Config(cp=0.01, ot=0.0, ot_end=0.0)
        loss, logs = losses.afm_D(D, x, y, draws, cfg, ConstantG(u))
        assert abs(loss - math.log(2) - 0.01 * (2 * c) ** 2) < 1e-6 and logs["r1"] == logs["r2"] == 0
        assert abs(losses.afm_G(ConstantG(u), x, y, draws, cfg, D)[0] - math.log(2)) < 1e-6
    with torch.no_grad():
        D.g.copy_(torch.tensor([.3, .8]))
    for nfe, divisor in ((1, 1), (4, 1 / 4), (5000, 1e-3)):
        cfg = losses.Config(nfe=nfe, ot=0.5, ot_end=0.5)
        loss, logs = losses.afm_G(ConstantG(u), x, y, draws, cfg, D)
        cost = u.square().mean() / nfe ** 2 / divisor
        assert abs(loss - logs["adversarial"] - 0.5 * cost) < 1e-5 * (1 + cost)
        assert abs(logs["distance"] - u.square().mean() / nfe ** 2) < 1e-6
    real, fake = (losses.afm_D(D, x, y, draws, losses.Config(), ConstantG(u))[1][k] for k in ("real", "fake"))
    e = draws.normal("noise", (2,))
    assert abs(real - D(x, 0).mean()) < 1e-6 and abs(fake - D(e - u, 0).mean()) < 1e-6
    loss, _ = losses.afm_D(D, x, y, draws, losses.Config(gp=0.0, cp=0.0), ConstantG(u))
    assert abs(loss - nn.functional.softplus(D(e - u, 0) - D(x, 0)).mean()) < 1e-6
    _, logs = losses.afm_G(ConstantG(u), x, y, draws, losses.Config(), D)
    assert abs(logs["adversarial"] - nn.functional.softplus(D(x, 0) - D(e - u, 0)).mean()) < 1e-6
    cfg = losses.Config(nfe=2)
    logs, (s, r) = losses.afm_D(D, x, y, draws, cfg, ConstantG(u))[1], losses.jump_times(draws, cfg)
    other = draws.normal("noise of the real side", (2,))
    assert not torch.equal(other, e) and abs(logs["real"] - D(losses.interpolate(x, other, r), r).mean()) < 1e-6
    assert abs(logs["fake"] - D(losses.interpolate(x, e, s) - u / 2, r).mean()) < 1e-6
    torch.manual_seed(0)
    D, one, zero = losses.PointDiscriminator(2), torch.ones(64), torch.zeros(64)
    without, logs = (losses.afm_D(D, x, y, draws, losses.Config(gp=0.0), ConstantG(u)))
    assert abs(losses.afm_D(D, x, y, draws, losses.Config(gp=2.0), ConstantG(u))[0] - without - 2 * (logs["r1"] + logs["r2"])) < 1e-5
    for name, at in (("R1", x), ("R2", e - u)):
        assert abs(logs[name.lower()] - losses.flatness(D, at, D(at, zero), one, zero, y, draws, name)) < 1e-6


def test_losses_afm_augments_pairs_alike():
    """Where jumps end at the data themselves D cannot tell, also through augmentation: ln 2 for both; D does see it, and
    the transport cost does not."""
    x, y, draws = torch.randn(8, 3, 16, 16).double(), torch.arange(8), data.Draws(0, range(8))
    D, cfg = tiny(cls=model.Discriminator, input_size=16).double(), train.Config(loss="afm", augment=0.8, gp=0.0, cp=0.0, ot=0.7, ot_end=0.7)
    e = draws.normal("noise", x.shape[1:])
    G = lambda x_s, s, y, r: x_s - x  # noqa: E731
    loss, logs = losses.afm_D(D, x, y, draws, cfg, G)
    assert abs(loss - math.log(2)) < 1e-6 and abs(logs["real"] - D(losses.augment(x[None], draws, 0.8)[0], torch.zeros(8), y).mean()) < 1e-9
    assert abs(logs["real"] - D(x, torch.zeros(8), y).mean()) > 1e-3
    loss, logs = losses.afm_G(G, x, y, draws, cfg, D)
    assert abs(logs["adversarial"] - math.log(2)) < 1e-6 and abs(loss - math.log(2) - 0.7 * (x - e).square().mean()) < 1e-6
    loss, logs = losses.afm_G(lambda x_s, s, y, r: x_s, x, y, draws, cfg, D)
    seen = [D(losses.augment(image[None], draws, 0.8)[0], torch.zeros(8), y) for image in (x, 0 * x)]
    assert abs(logs["adversarial"] - nn.functional.softplus(seen[0] - seen[1]).mean()) < 1e-6


def test_losses_afm_guide():
    """One-step jumps are noised to a time below cg_time and judged there; others are judged where they end, if r < 0.5."""
    n, W = 64, torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    made, y, draws, seen = torch.randn(n, 2), torch.arange(n) % 10, losses.BatchDraws(0, 0, n), []

    def C(x_t, t):
        seen.append((x_t, t))
        return x_t @ W + t[:, None] * torch.arange(10)

    surprise = lambda logits: logits.logsumexp(1) - logits[torch.arange(n), y]  # noqa: E731
    r = torch.arange(n) % 4 / 4
    value = losses.guide(C, made, r, y, draws, train.Config(nfe=4))
    assert torch.equal(seen[0][0], made) and torch.equal(seen[0][1], r)
    assert abs(value - (surprise(C(made, r)) * torch.tensor([1., 1, 0, 0]).repeat(16)).mean()) < 1e-5
    seen.clear()
    value = losses.guide(C, made, 0 * r, y, draws, train.Config(nfe=1, cg_time=0.3))
    (x_t, t), = seen
    assert 0 <= t.min() < 0.05 and 0.25 < t.max() <= 0.3 and abs(value - surprise(C(x_t, t)).mean()) < 1e-5
    noise = (x_t - (1 - t[:, None]) * made) / t[:, None]
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2 and not torch.equal(noise[:, 0], noise[:, 1])
    G, D, x = ConstantG(torch.tensor([.4, -.2])), LinearD(), torch.randn(n, 2)
    cfg = train.Config(cg=0.5, cg_time=0.3, batch=n)
    without, logs = losses.afm_G(G, x, y, draws, cfg, D)
    loss, more = losses.afm_G(G, x, y, draws, cfg, D, C)
    assert "surprise" not in logs and abs(loss - without - 0.5 * more["surprise"]) < 1e-6 and more["surprise"] > 0.1


class PosteriorC(nn.Module):
    """The exact log p(y | x_t) of a mixture, and a few weighted features of one class more, at weight 0."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.weight = mixture, nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x_t, t):
        features = torch.stack([torch.ones_like(t), x_t[:, 0], x_t[:, 0] * t, (2 * x_t[:, 0]).sin()]).double()
        logits = self.mixture.posterior(x_t.double(), t.double())[0].log()
        return logits + torch.stack([self.weight @ features, 0 * t], 1)


def test_losses_classifier_reaches_the_posterior():
    """The mean gradient is 0 at the exact posterior of x_t, and is not at that of another mixture."""
    def errors(mixture):
        def loss(k, C):
            x, y = TWO_MODES.sample(2000, data.generator("classifier oracle", k))
            return losses.classifier(C, x, y, losses.BatchDraws(3, k, 2000), losses.Config())[0]
        return gradient_in_standard_errors(loss, D=lambda: PosteriorC(mixture))

    assert errors(TWO_MODES) < 4 and errors(dataclasses.replace(TWO_MODES, means=0.7 * TWO_MODES.means)) > 8
    x, y = TWO_MODES.sample(500, data.generator("classifier accuracy"))
    cfg = losses.Config(time_mean=-3, time="logit_normal")
    loss, logs = losses.classifier(PosteriorC(TWO_MODES), x, y, losses.BatchDraws(0, 0, 500), cfg)
    assert loss < 0.05 and logs["accuracy"] > 0.98
    assert losses.classifier(PosteriorC(TWO_MODES), x, 1 - y, losses.BatchDraws(0, 0, 500), cfg)[1]["accuracy"] < 0.02


def test_losses_afm_penalty():
    """R1's mean over its noise is w (|grad D|^2 + step^2 / 4 (2 tr H^2 + (tr H)^2)) for a quadratic D of Hessian H, from
    every fourth sample; splitting a batch changes nothing."""
    H, g, n = torch.tensor([[2., .5], [.5, -1.]]), torch.tensor([1., 2.]), 160_000
    D = lambda x, r, y: x @ g + ((x @ H) * x).sum(1) / 2  # noqa: E731
    x = torch.zeros(n, 2)  # the gradient here is g
    s, r = torch.full((n,), .75), torch.full((n,), .25)
    for step in (0.01, 1.0):
        value = losses.flatness(D, x, D(x, r, None), s, r, r, losses.BatchDraws(0, 0, n), "R1", step)
        exact = 0.5 * (g @ g + step ** 2 / 4 * (2 * (H @ H).trace() + H.trace() ** 2))
        assert abs(value / exact - 1) < 0.04, (step, value, exact)
    x = torch.randn(32, 2)
    parts = [losses.flatness(D, x[k], D(x[k], r, None), s[k], r[k], r[k], data.Draws(0, range(32)[k]), "R1")
             for k in (slice(0, 32), slice(0, 6), slice(6, 32))]
    assert abs(parts[0] - (parts[1] * 6 + parts[2] * 26) / 32) < 1e-4 * parts[0]
    assert parts[0] > 1 and losses.flatness(D, x[1:3], D(x[1:3], r, None), s, r, r, data.Draws(0, [1, 2]), "R1") == 0


def test_losses_gradient_normaliser():
    """Identity forward; |g| sqrt(numel) is 3.162, 2.294, .., 1.001 at the calls 1, 2, 59 for constant g, whatever D's scale."""
    for scale in (1e-4, 1.0, 1e4):
        square, sizes = torch.zeros(()), []
        g = scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        for _ in range(59):
            x = torch.randn(6, 5, requires_grad=True)
            out = losses.NormaliseGradient.apply(x, square)
            assert torch.equal(out, x)
            out.backward(g)
            sizes.append((x.grad.norm() * 30 ** 0.5).item())
        close(torch.tensor([sizes[0], sizes[1], sizes[58]]), [1 / math.sqrt(1 - .9 ** k) for k in (1, 2, 59)], 1e-3)
        assert (x.grad / g).std() < 1e-4 * (x.grad / g).mean()


def test_losses_schedules():
    """Whose turn it is: 16 steps of D for one of G after 10,000 of D alone give G 2,353 of 50,000 steps, the first at
    10,012. The transport weight falls by half a cosine from start to end."""
    cfg = losses.Config(d_warmup=10_000, d_steps=16)
    turns = [losses.cafm_turn(step, cfg) for step in range(50_000)]
    assert turns.count("G") == 2353 and turns.index("G") == 10_012
    short = losses.Config(d_warmup=5, d_steps=1)
    assert [losses.cafm_turn(step, short) for step in range(9)] == list("DDDDDDDGD")
    assert [losses.alternate(step, cfg) for step in range(4)] == ["D", "G", "D", "G"]
    cfg = losses.Config(ot=0.2, ot_end=0.02, steps=101, batch=8)
    weights = [losses.ot_weight(types.SimpleNamespace(positions=range(8 * step + 3, 8 * step + 8)), cfg) for step in (0, 50, 100)]
    assert np.allclose(weights, [0.2, 0.11, 0.02])


class Stages:
    """In place of CAT's generator: these stages, whatever the noise."""

    def __init__(self, h):
        self.h = h

    def stages(self, e, y):
        return self.h


def cat_case(stages=3, n=8, **options) -> tuple:
    """cfg, D, x, y and stages h, in float64."""
    cfg = train.Config(loss="cat", batch=n, stages=stages, **options)
    D = tiny(cls=model.ScaleDiscriminator, input_size=16, stages=stages).double()
    x, *h = torch.randn(1 + stages, n, 3, 16, 16).double()
    return cfg, D, x, torch.arange(n) % 10, torch.stack(h)


def test_losses_cat_values():
    """Stages that equal the data: ln 2 for both players, also augmented, so real and fake are augmented alike. Else the
    mean over scales of softplus, with r from the data and f from the stages, last one first, at halved resolutions."""
    cfg, D, x, y, h = cat_case(gp=0.0, augment=0.7)
    draws = data.Draws(0, range(8))
    assert abs(losses.cat_D(D, x, y, draws, cfg, Stages(x.expand_as(h)))[0] - math.log(2)) < 1e-12
    assert abs(losses.cat_G(Stages(x.expand_as(h)), x, y, draws, cfg, D)[0] - math.log(2)) < 1e-12
    cfg = dataclasses.replace(cfg, augment=0.0, cons=0.3)
    half = lambda x: x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))  # noqa: E731
    r, f = D([x, half(x), half(half(x))], y), D([h[2], half(h[1]), half(half(h[0]))], y)
    loss, logs = losses.cat_D(D, x, y, draws, cfg, Stages(h))
    assert abs(loss - (1 + (f - r).exp()).log().mean()) < 1e-12 and abs(logs["real"] - r.mean()) < 1e-12
    loss, logs = losses.cat_G(Stages(h), x, y, draws, cfg, D)
    assert abs(loss - (1 + (r - f).exp()).log().mean() - 0.3 * losses.consistency(h, cfg)) < 1e-12
    assert logs.items() >= losses.stage_logs(h).items()


def test_losses_cat_consistency():
    """(1/3 |h1 - h4|^2 + 1/2 |h2 - h4|^2 + |h3 - h4|^2) / 3, zero for equal stages, unmoved by what all share. Its
    gradients sum to 0 over the stages, so the first head has none; where h4 is a constant the last head has none. "own"
    looks at stage k through squares of 2^(K-k) pixels only."""
    h = torch.randn(4, 2, 3, 16, 16).double()
    cfg, own = train.Config(), train.Config(cons_space="own")
    gap = (h[:3] - h[3]).square().mean((1, 2, 3, 4))
    value = losses.consistency(h, cfg)
    assert abs(value - (gap[0] / 3 + gap[1] / 2 + gap[2]) / 3) < 1e-12
    assert losses.consistency(h[:1].expand_as(h), cfg) == 0 and abs(losses.consistency(h + h[1], cfg) - value) < 1e-12
    for detach in (False, True):
        heads = h.clone().requires_grad_()
        losses.consistency(heads.cumsum(0), train.Config(cons_detach=detach)).backward()
        sizes = heads.grad.flatten(1).abs().amax(1)
        assert (sizes[0] < 1e-17) == (not detach) and (sizes[3] == 0) == detach and sizes[1:3].min() > 1e-4
    for k in range(3):
        size, moved = 2 ** (3 - k), h[:1].repeat(4, 1, 1, 1, 1)
        checks = torch.ones(16, 16).double()
        checks[:, ::2] = -1  # hidden by squares of 2 and more pixels
        moved[k] += checks
        assert losses.consistency(moved, own) < 1e-25 and losses.consistency(moved, cfg) > 0.1
        moved[k] += (torch.arange(16) // size % 2) - checks  # squares of this very size: all of it is seen
        assert abs(losses.consistency(moved, own) - losses.consistency(moved, cfg)) < 1e-12


def test_losses_cat_pyramid_and_agreement():
    """The finest scale is the last stage itself, a constant stays one at all scales, and the last update agrees fully
    with what was still to come."""
    cfg, draws, h = train.Config(), data.Draws(0, range(2)), torch.randn(3, 2, 3, 16, 16)
    scales = losses.pyramid(h, draws, cfg)
    assert torch.equal(scales[0], h[2]) and [x.shape[-1] for x in scales] == [16, 8, 4]
    assert all((x - 0.3).abs().max() < 1e-6 for x in losses.pyramid(torch.full_like(h, 0.3), draws, cfg))
    found = losses.agreement(h)
    update, rest = (h[1] - h[0]).flatten(1), (h[2] - h[0]).flatten(1)
    assert found.shape == (2,) and abs(found[1] - 1) < 1e-6
    assert abs(found[0] - ((update * rest).sum(1) / update.norm(dim=1) / rest.norm(dim=1)).mean()) < 1e-6


def test_losses_cat_logs_every_stage():
    """Of stages that are 1, 3 and 0 times one pattern of mean square 1 every logged number is known: the second goes away
    from the last. With two stages there is no cosine."""
    pattern = torch.randn(2, 3, 4, 4).double()
    pattern /= pattern.square().mean().sqrt()
    h = torch.tensor([1., 3., 0.]).view(3, 1, 1, 1, 1) * pattern
    found = {name: round(value.item(), 9) for name, value in losses.stage_logs(h).items()}
    assert found == {"discrepancy_1": 1, "discrepancy_2": 9, "rewriting_1": 4, "rewriting_2": 9, "cosine_1": -1}
    assert list(losses.stage_logs(h[:2])) == ["discrepancy_1", "rewriting_1"]


def test_losses_cat_augment():
    """Nothing at p = 0; all stages of a sample are changed alike and samples differently; with probability p; brightness
    within 0.5, shifts within an eighth, holes of half the side; the same for a sample in any batch."""
    n = 400
    x = torch.arange(1, 257.).view(1, 1, 1, 16, 16).repeat(2, n, 3, 1, 1) * 1000
    x[1] += 1e7
    draws = data.Draws(0, range(n))
    assert losses.augment(x, draws, 0.0) is x
    made = losses.augment(x, draws, 0.5)
    there = made.abs() > 600
    assert torch.equal(there[0], there[1]) and torch.allclose((made[1] - made[0])[there[0]], torch.tensor(1e7), atol=2)
    assert torch.equal(made[:, 3:7], losses.augment(x[:, 3:7], data.Draws(0, range(3, 7)), 0.5))
    whole = losses.augment(torch.zeros(1, n, 3, 16, 16), draws, 0.5)[0]
    light = whole.flatten(1)[torch.arange(n), whole.flatten(1).abs().argmax(1)]
    assert 0.4 < light.ne(0).float().mean() < 0.6 and 0.45 < light.abs().max() <= 0.5
    always = losses.augment(x, draws, 1.0)[0, :, 0]
    seen = (always > 600).float()
    assert seen.mean() < 0.85 and len({tuple(row.tolist()) for row in seen.flatten(1)}) > 300
    source = always.div(1000).round().long() - 1                       # where a pixel came from
    here = torch.arange(256).view(16, 16)
    down, right = ((source // 16 - here // 16)[seen > 0], (source % 16 - here % 16)[seen > 0])
    assert set(zip(down.tolist(), right.tolist())) == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    holes = losses.augment(torch.full((1, n, 1, 16, 16), 9.), draws, 1.0)[0, :, 0, 2:14, 2:14].abs() < 1
    assert holes.any(2).sum(1).max() <= 9 and holes.any(1).sum(1).max() <= 9 and holes.sum((1, 2)).max() >= 64


def test_losses_cat_penalty():
    """R1's mean over its noise is sum over scales of |grad D_k|^2 for a linear D, from every fourth sample."""
    n, g = 40_000, [torch.tensor([[[[1.]], [[2.]], [[0.]]]]), torch.tensor([[[[.5]], [[0.]], [[-1.]]]])]
    D = lambda images, y: torch.stack([(x * w).sum((1, 2, 3)) for x, w in zip(images, g)], 1)  # noqa: E731
    images, y = [torch.zeros(n, 3, side, side).double() for side in (2, 1)], torch.zeros(n).long()
    value = losses.scale_flatness(D, images, D(images, y), y, losses.BatchDraws(0, 0, n), "R1")
    assert abs(value / (4 * 5 + 1.25) - 1) < 0.04
    assert losses.scale_flatness(D, [x[:2] for x in images], D(images, y)[:2], y[:2], data.Draws(0, [1, 2]), "R1") == 0


def test_losses_cat_splits():
    """The loss of a batch is the mean of the losses of its parts: every draw belongs to a sample."""
    cfg, D, x, y, h = cat_case(augment=0.5, gp=0.5)
    G = tiny(cls=model.StagedDiT, input_size=16, depth=3, stages=3).double()
    for loss, nets in ((losses.cat_D, (D, G)), (losses.cat_G, (G, D))):
        part = lambda a, b: loss(nets[0], x[a:b], y[a:b], data.Draws(0, range(a, b)), cfg, nets[1])[0]  # noqa: E731
        assert abs(part(0, 8) - (part(0, 2) * 2 + part(2, 8) * 6) / 8) < 1e-9 * part(0, 8)


@pytest.mark.parametrize("name, steps, bounds", [
    ("cafm", 1000, dict(velocity=0.4, W1=0.13, weight=0.08)), ("afm", 1000, dict(W1=0.15, weight=0.06))])
def test_losses_adversarial_networks_learn_the_mixture(name, steps, bounds):
    """A fraction of the full run brings CAFM's velocity and AFM's one-step samples near the closed form."""
    cfg = dataclasses.replace(losses.SETTINGS[name], steps=steps)
    errors = losses.point_errors(losses.train_points(name, losses.FOUR_MODES, cfg), losses.FOUR_MODES, 1 if name == "afm" else 50)
    assert all(errors[key] < bound for key, bound in bounds.items()) and errors["in mode"] > 0.93, errors


@pytest.mark.parametrize("name, bound", [("meanflow", 0.6), ("imf", 0.6), ("soflow", 0.6), ("shortcut", 0.3), ("ect", 0.3), ("scm", 0.3)])
def test_losses_one_step_networks_learn_the_mixture(name, bound):
    """A tenth of the full run brings one-step samples near the closed form, where fm's have W1 = 1 (three seeds gave
    0.41 to 0.48, and 0.13 to 0.16)."""
    cfg = dataclasses.replace(losses.SETTINGS[name], steps=250, batch=256)
    errors = losses.point_errors(losses.train_points(name, losses.FOUR_MODES, cfg), losses.FOUR_MODES, 1)
    assert errors["W1"] < bound, errors


def test_losses_run_alone_writes_the_picture(tmp_path, capsys):
    losses.main(["--steps", "3", "--controls", "--out", str(tmp_path / "l.png")])
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in losses.SETTINGS | losses.CONTROLS)
    assert Image.open(tmp_path / "l.png").size[0] > 800
    raises(lambda: losses.main(["--losses", "cat"]), "--losses cat", "fm, meanflow", "needs images")


# --------------------------------------------------------------------------------------------------------------------
# sample.py
# --------------------------------------------------------------------------------------------------------------------


def quantile_noise(n: int) -> torch.Tensor:
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def solve(solver: str, steps: int, n: int = 200, **options) -> torch.Tensor:
    net, e = ExactNet(TWO_MODES), quantile_noise(n)
    return sample.sample(net, e, torch.full((n,), 2), steps, solver, **options)


def test_sample_solvers_reach_the_exact_flow_map_with_their_order():
    """On the mixture's exact velocity, Euler converges with order 1, Heun and AB2 with order 2, on uniform and on bent
    time grids; none with the wrong sign or time direction."""
    e = quantile_noise(200)
    exact = TWO_MODES.flow(e, torch.ones(200).double(), torch.zeros(200).double())
    for solver, order, options in (("euler", 1, {}), ("heun", 2, {}), ("ab2", 2, {}), ("ab2", 2, dict(rho=2.0)),
                                   ("heun", 2, dict(shift=2.0)), ("euler", 1, dict(shift=2.0))):
        errors = [(solve(solver, steps, **options) - exact).square().mean().sqrt().item() for steps in (80, 320)]
        found = math.log(errors[0] / errors[1]) / math.log(4)
        assert abs(found - order) < 0.15 and errors[1] < (0.02 if order == 1 else 2e-4), (solver, options, found, errors)


def test_sample_solver_steps_are_the_textbook_ones():
    """For dx/dt = t the steps can be summed by hand, on a grid of unequal steps: Euler takes the left end, Heun the mean
    of both ends but in its last step, Adams-Bashforth is exact but in its first."""
    times, x = [1.0, .9, .5, .2, .0], torch.zeros(1, 1).double()
    pairs = list(zip(times, times[1:]))
    field = lambda x, t, y, r=None: torch.full_like(x, t)
    exact = [(r * r - t * t) / 2 for t, r in pairs]
    left = [(r - t) * t for t, r in pairs]
    for solver, total in (("euler", sum(left)), ("heun", sum(exact[:-1]) + left[-1]), ("ab2", left[0] + sum(exact[1:]))):
        assert abs(sample.SOLVERS[solver](field, x, None, times).item() - total) < 1e-12, solver


def test_sample_time_grids():
    """steps + 1 times fall from 1 to 0; rho bends towards data, shift towards noise; bad values are refused."""
    assert np.allclose(sample.time_grid(4), [1, .75, .5, .25, 0])
    assert np.allclose(sample.time_grid(2, shift=3), [1, .75, 0]) and np.allclose(sample.time_grid(2, rho=2), [1, .25, 0])
    assert "positive" in error_of(sample.time_grid, 0)


def test_sample_sde_keeps_the_marginals():
    """For N(0, s^2) data the Euler-Maruyama variance obeys its recursion, and so the samples end with std near s; the
    one with w for 2 w (a mix of the paper's and the code's symbols) would not."""
    s, steps, n = 0.5, 100, 40_000
    gaussian = losses.Mixture(torch.zeros(1, 1).double(), torch.tensor([s]).double(), torch.ones(1).double())
    e = quantile_noise(n)[torch.randperm(n, generator=data.generator("sde"))]
    x = sample.sample(ExactNet(gaussian), e, torch.zeros(n).long(), steps, "sde", draws=losses.BatchDraws(0, 0, n))
    variance, times = 1.0, [*np.linspace(1, .04, steps), 0]
    for t, r in zip(times, times[1:]):
        h, total = t - r, (1 - t) ** 2 * s * s + t * t
        slope = (t - (1 - t) * s * s) / total + t / total                    # v - w s = slope x with w = t
        variance = (1 - h * slope) ** 2 * variance + (2 * t * h if r > 0 else 0)
    assert abs(x.var().item() / variance - 1) < 0.03, (x.var(), variance)
    assert abs(variance ** .5 - s) < 0.02
    asked = []
    sample.sde(lambda x, t, y: asked.append(t) or x, e[:2], None, sample.time_grid(10), losses.BatchDraws(0, 0, 2))
    assert np.allclose(asked, np.linspace(1, .04, 10))
    sample.sde(lambda x, t, y: asked.append(t) or x, e[:2], None, sample.time_grid(1), losses.BatchDraws(0, 0, 2))


def test_sample_guidance():
    """s = 1 and times outside the interval change nothing, bit for bit; s = 3 is v_0 + 3 (v - v_0); autoguidance by the
    network itself is the identity; the number of network rows is as printed."""
    net = ExactNet(TWO_MODES)
    x, y = quantile_noise(50), torch.ones(50).long()
    plain = net(x, torch.full((50,), .5).double(), y)
    null = net(x, torch.full((50,), .5).double(), torch.full((50,), 2))
    assert torch.equal(sample.guided(net)(x, .5, y), plain)
    assert torch.equal(sample.guided(net, 3, (.6, 1))(x, .5, y), plain)
    assert torch.allclose(sample.guided(net, 3)(x, .5, y), null + 3 * (plain - null), atol=1e-12)
    assert torch.allclose(sample.guided(net, 3, reference=net)(x, .5, y), plain, atol=1e-12)
    for rows, options in ((15, dict(steps=8, solver="heun")), (8, dict(steps=8, solver="ab2")), (8, dict(steps=8)),
                          (80, dict(steps=40, solver="ab2", guidance=2.)),
                          (60, dict(steps=40, solver="ab2", guidance=2., interval=(.21, .71)))):
        net.rows = 0
        sample.sample(net, x, y, **options)
        assert net.rows == rows * 50, (options, net.rows / 50)
    net.null_class = False
    assert "null label" in error_of(sample.guided, net, 2.0)
    assert "interval" in error_of(sample.guided, net, 2.0, (.7, .2))


def test_sample_guides_the_first_channels_only():
    """channels = 3: the fourth keeps the velocity under the label, the others are guided."""
    net, x, y = tiny(channels=4), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        plain, all_, three = (sample.guided(net, g, channels=c)(x, 0.5, y) for g, c in ((1.0, 0), (2.0, 0), (2.0, 3)))
    assert torch.equal(three[:, :3], all_[:, :3]) and (three[:, 3:] - plain[:, 3:]).abs().max() < 1e-5
    assert (all_[:, 3:] - plain[:, 3:]).abs().max() > 1e-2


def test_sample_guidance_sharpens_as_theory_says():
    """On two modes: s = 1 gives the class N(1.5, 0.5^2), classifier-free guidance overshoots its mean, an interval less
    so, and autoguidance by a 1.6 times wider mixture narrows without moving the mean."""
    n, net = 4000, ExactNet(TWO_MODES)
    wide = ExactNet(losses.Mixture(TWO_MODES.means, 1.6 * TWO_MODES.stds, TWO_MODES.weights))
    moments = []
    for options in ({}, dict(guidance=3.), dict(guidance=3., interval=(.2, .7)), dict(guidance=2., reference=wide)):
        x = sample.sample(net, quantile_noise(n), torch.ones(n).long(), 80, "ab2", **options)
        moments.append((x.mean().item(), x.std().item()))
    plain, guided, in_interval, auto = moments
    assert abs(plain[0] - 1.5) < .01 and abs(plain[1] - .5) < .01
    assert guided[0] > 1.9 and guided[1] < .35
    assert 1.6 < in_interval[0] < 1.8 and in_interval[1] < .35
    assert abs(auto[0] - 1.5) < .01 and auto[1] < .35


class Width(nn.Module):
    """The exact velocity of TWO_MODES with deviations `factor` times as large, as a network of points."""
    shape, state, num_classes, null_class = (1,), (1,), 2, False

    def __init__(self, factor):
        super().__init__()
        self.mixture, self.calls = dataclasses.replace(TWO_MODES, stds=factor * TWO_MODES.stds), 0

    def forward(self, x_t, t, y, r=None):
        self.calls += 1
        return self.mixture.velocity(x_t, t.double(), y)


def test_sample_stitching():
    """Shares 0 and 1 are one network alone; between, each is called for its part of the way. A small network that has the
    modes 1.6 times too wide does no harm up to 0.4, and more and more beyond."""
    e, y, stds = quantile_noise(400), torch.zeros(400, dtype=torch.int64), {}
    for share in (0, .2, .4, .6, .8, 1):
        large, small = Width(1.0), Width(1.6)
        x = sample.sample(sample.Stitched(large, small, share), e, y, 50)
        assert (large.calls, small.calls) == (50 - round(50 * share), round(50 * share))
        stds[share] = x.std().item()
    alone = sample.sample(Width(1.0), e, y, 50)
    assert torch.equal(sample.sample(sample.Stitched(Width(1.0), Width(1.6), 0), e, y, 50), alone)
    assert abs(stds[0.4] / stds[0] - 1) < 0.1 and stds[0] < stds[.4] < stds[.6] < stds[.8] < stds[1] and stds[1] > 1.5 * stds[0], stds
    raises(lambda: sample.Stitched(Width(1), Width(1), 1.5), "share 1.5")
    raises(lambda: sample.Stitched(Width(1), tiny(), 0.5), "same data")


def test_sample_search():
    """More noises, better scores, from the sample's own noise on; a step nearby never makes it worse and keeps the noise
    normal; samples do not look at each other."""
    y, draws = torch.zeros(2000, dtype=torch.int64), data.Draws(0, range(2000))
    make, verifier = lambda e, y: 2 * e + 1, lambda x, y: -(x[:, 0] - 1.5).square()  # noqa: E731
    found = {n: sample.best_of(n, make, verifier, y, draws, (1,)) for n in (1, 2, 4, 16)}
    scores = [verifier(make(e, y), y).mean().item() for e in found.values()]
    assert torch.equal(found[1], draws.normal("sample noise", (1,))) and scores == sorted(scores) and scores[-1] > scores[0] / 50
    assert torch.equal(found[4][7:9], sample.best_of(4, make, verifier, y[7:9], data.Draws(0, [7, 8]), (1,)))
    e = found[1]
    before = verifier(make(e, y), y)
    for rounds in (1, 10):
        moved = sample.search_nearby(rounds, 0.5, e, make, verifier, y, draws)
        after = verifier(make(moved, y), y)
        assert (after >= before).all() and after.mean() > before.mean()
        before = after
    free = sample.search_nearby(1, 0.5, e, make, lambda x, y: torch.zeros(len(x)).add_(1 if (x != make(e, y)).any() else 0), y, draws)
    assert abs(free.std() - 1) < 0.05 and abs((free * e).mean() - math.sqrt(0.75)) < 0.05


def test_sample_classify():
    """The diffusion classifier with exact velocities of two overlapping Gaussians: mostly the exact answer, more so with
    more pairs, which are the same for every class."""
    mixture = losses.Mixture(torch.tensor([[-.5], [.5]]).double(), torch.tensor([.5, .5]).double(), torch.tensor([.5, .5]).double())
    net = lambda x_t, t, y, r=None: mixture.velocity(x_t, t, y)  # noqa: E731
    x, _ = mixture.sample(1500, data.generator("classify"))
    draws, right = data.Draws(0, range(1500)), (x[:, 0] > 0).long()
    agree = {k: (sample.classify(net, x, draws, 2, k).argmax(1) == right).float().mean().item() for k in (2, 4, 16)}
    assert 0.8 < agree[2] < agree[4] < agree[16] and agree[16] > 0.94, agree
    swapped = sample.classify(lambda x_t, t, y: net(x_t, t, 1 - y), x, draws, 2, 4)
    assert torch.equal(swapped.flip(1), sample.classify(net, x, draws, 2, 4))


def test_sample_search_times():
    """Four steps found by search come nearer to the exact end than four even ones; the ends stay, times fall, a seed
    gives one answer."""
    e, y = quantile_noise(100), torch.zeros(100, dtype=torch.int64)
    velocity = sample.guided(ExactNet(TWO_MODES))
    make = lambda times: sample.euler(velocity, e, y + 2, times)  # noqa: E731
    exact = TWO_MODES.flow(e, torch.ones(100).double(), torch.zeros(100).double())
    even = sample.time_grid(4)
    found = sample.search_times(make, exact, even, rounds=12)
    assert found[0] == 1 and found[-1] == 0 and found == sorted(found, reverse=True) and len(found) == 5
    assert (make(found) - exact).square().mean() < 0.9 * (make(even) - exact).square().mean()
    assert found == sample.search_times(make, exact, even, rounds=12)


def test_sample_renoise_jumps_and_goes_back():
    """One step is the jump to the data; then x_0 is noised to the step's end. With the exact way to the data, samples of a
    Gaussian keep its mean and deviation in 1 and in 4 steps; a wrong end or noise does not."""
    n, net = 40_000, GaussianMap(to_data=True)
    e, y = quantile_noise(n), torch.zeros(n).long()
    for steps in (1, 4):
        draws = types.SimpleNamespace(normal=lambda purpose, shape: torch.randn(n, *shape, generator=data.generator(purpose)))
        made = sample.sample(net, e, y, steps, "renoise", draws=draws)
        assert abs(made.mean() - 0.7) < 0.01 and abs(made.std() - 0.4) < 0.01
    noise = torch.full((1, 1), 2.0).double()
    draws = types.SimpleNamespace(normal=lambda purpose, shape: noise)
    made = sample.renoise(lambda x, t, y, r: x + t + 10 * r, torch.ones(1, 1).double(), None, [1.0, 0.25, 0.0], draws)
    x = 0.75 * (1 - 2) + 0.25 * 2
    assert abs(made - (x - 0.25 * (x + 0.25))) < 1e-12


def test_sample_tells_the_network_its_guidance():
    """A network that is told the scale gets it inside the interval, in one call for a step; less than 1 is refused."""
    net = tiny(times=2, guided=True)
    x, y, t = torch.randn(4, 3, 8, 8), torch.arange(4), torch.full((4,), .5)
    with torch.no_grad():
        for guidance, interval, w in ((3.0, (0, 1), 3.0), (3.0, (.6, 1), 1.0), (1.0, (0, 1), 1.0)):
            found = sample.guided(net, guidance, interval)(x, .5, y, .25)
            assert torch.allclose(found, net(x, t, y, t / 2, torch.full((4,), w)), atol=1e-6)
    assert "at least 1" in error_of(sample.guided, net, 0.5) and "no reference" in error_of(sample.guided, net, 2.0, (0, 1), net)
    assert "told to the network: guidance 3" in sample.describe(1, "euler", 3.0, told=True)


def test_sample_i_depends_on_seed_and_i_only():
    """Batches may be split in any way: the same images; another seed gives others; the SDE's noise too."""
    net = tiny(predict="x")
    labels = sample.labels_for(12, 10)
    for solver in ("ab2", "sde", "renoise"):
        one = torch.cat([x for _, x in sample.generate(net, labels, 0, 12, steps=4, solver=solver)]).int()
        split = torch.cat([x for _, x in sample.generate(net, labels, 0, 5, steps=4, solver=solver)]).int()
        other = torch.cat([x for _, x in sample.generate(net, labels, 1, 12, steps=4, solver=solver)]).int()
        assert (one - split).abs().max() <= 1 and (one - other).abs().max() > 20
    rank, world, shares = data.rank, data.world, []
    try:
        for r in range(2):
            data.rank, data.world = (lambda r=r: r), (lambda: 2)
            shares += [i for indices, _ in sample.generate(net, labels, 0, 5, steps=1) for i in indices]
    finally:
        data.rank, data.world = rank, world
    assert sorted(shares) == list(range(12)) and shares != sorted(shares)  # each sample is made by one process
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert sample.labels_for(4, 10, [7, 3]).tolist() == [7, 3, 7, 3]
    assert "0 .. 9" in error_of(sample.labels_for, 4, 10, [10])
    assert "latents" in error_of(next, sample.generate(tiny(channels=4), labels, 0, steps=1))


def save_tiny(path) -> Path:
    net = tiny(predict="x")
    torch.save({"networks": {"G": {"config": net.config, "weights": net.state_dict()}}, "ema": net.state_dict()}, path)
    return path


def test_sample_command_writes_grid_npz_and_folder(tmp_path):
    """The three outputs hold the same samples; the npz has ADM's layout, shuffled, with the right labels; two processes
    write the same as one."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    save_tiny(run_folder / "last.pt")
    flags = ["sample.py", run_folder, "--n", "21", "--steps", "3", "--batch", "5", "--device", "cpu"]
    sample.main([str(f) for f in flags[1:]] + ["--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size[0] > 300
    sample.main([str(f) for f in flags[1:]] + ["--out", str(tmp_path / "one.npz")])
    sample.main([str(f) for f in flags[1:]] + ["--out", str(tmp_path / "folder")])
    torchrun(2, *flags[:1], *flags[1:], "--out", tmp_path / "two.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["arr_0"].shape == (21, 8, 8, 3) and one["arr_0"].dtype == np.uint8
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
    assert one["arr_1"].tolist() != sorted(one["arr_1"].tolist()) and np.bincount(one["arr_1"]).tolist() == [3] + [2] * 9
    files = sorted((tmp_path / "folder").iterdir())
    assert len(files) == 21 and files[13].name == "13_class3.png"
    by_label = {k: sorted(x.tobytes() for x, y in zip(one["arr_0"], one["arr_1"]) if y == k) for k in range(10)}
    for k in range(10):
        mine = sorted(np.asarray(Image.open(f)).tobytes() for f in files if f.stem.endswith(f"class{k}"))
        assert mine == by_label[k]
    assert "pictures already" in error_of(sample.main, [str(f) for f in flags[1:]] + ["--out", str(tmp_path / "folder")])
    assert not list(tmp_path.glob("*.tmp.npy"))


def test_sample_diverged_images_leave_no_file(tmp_path):
    """Non-finite samples stop with the count, and no scratch file or half-written output stays behind."""
    net, labels = tiny(predict="x"), sample.labels_for(4, 10)
    net.final_layer.linear.bias.data.fill_(float("nan"))
    for name in ("x.png", "x.npz"):
        made = sample.generate(net, labels, 0, steps=1)
        assert "4 of 4" in error_of(sample.write_samples, made, labels, net.shape, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_sample_command_errors(tmp_path):
    path = str(save_tiny(tmp_path / "net.pt"))
    assert "at least 1" in error_of(sample.main, [path, "--n", "0", "--device", "cpu"])
    assert ".npz" in error_of(sample.main, [path, "--n", "10001", "--device", "cpu"])
    assert "which checkpoint" in error_of(sample.main, ["--n", "3"])
    assert "python sample.py runs/glyphs" in run("sample.py", cwd=HERE).stdout
    assert "no such checkpoint" in error_of(sample.main, [str(tmp_path)])
    assert "knows the classes 0 .. 9" in error_of(sample.main, [path, "--classes", "12", "--device", "cpu"])
    assert "whole numbers" in error_of(sample.main, [path, "--classes", "cat", "--device", "cpu"])


# --------------------------------------------------------------------------------------------------------------------
# fid.py
# --------------------------------------------------------------------------------------------------------------------


AUX = {f"AuxLogits.{unit}.{name}": shape for unit, o, conv in (("conv0", 128, (128, 768, 1, 1)),
                                                              ("conv1", 768, (768, 128, 5, 5)))
       for name, shape in {"conv.weight": conv, **{f"bn.{k}": (o,) for k in
                           ("weight", "bias", "running_mean", "running_var")}}.items()}
AUX |= {"AuxLogits.fc.weight": (1000, 768), "AuxLogits.fc.bias": (1000,)}


def inception_shapes(flavour):
    """Names and shapes of the official file, without batch counters."""
    own = fid.InceptionV3(flavour=flavour).state_dict()
    own = {name: tuple(value.shape) for name, value in own.items() if not name.endswith("num_batches_tracked")}
    return own | AUX if flavour == "torchvision" else own


@functools.lru_cache(maxsize=None)
def golden_file(flavour):
    """A weights file with the golden weights, the auxiliary head and batch counters in it as in torchvision's."""
    path = Path(tempfile.mkdtemp()) / f"{flavour}.pth"
    state = golden_weights(inception_shapes(flavour))
    state["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, path)
    return path


def close(value, want, tolerance=1e-4):
    """Largest error relative to the rms of the wanted values."""
    value, want = torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    error = (value - want).abs().max() / want.square().mean().sqrt()
    assert error <= tolerance, f"relative error {error:.1e}: {value.tolist()} against {want.tolist()}"


def summary(x, at):
    """Mean, rms and the values at flat indices, as in golden.md."""
    x = x.double().flatten()
    return [x.mean().item(), x.square().mean().sqrt().item(), *x[at].tolist()]


def spd(d, seed, lowest=0.1):
    """A random symmetric positive definite matrix (d, d), float64."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64)).Q
    return q * (lowest + torch.rand(d, generator=rng, dtype=torch.float64)) @ q.T


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fid_frechet_golden():
    """The distance equals the number of pytorch-fid's function, from numpy and from torch."""
    rng = np.random.RandomState(0)
    a = rng.randn(500, 64) @ np.diag(np.arange(1, 65) ** -.7)
    b = rng.randn(700, 64) @ np.diag(np.arange(1, 65) ** -.5) + .05
    parts = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    assert abs(fid.frechet_distance(*parts) - 0.7857165208993) < 1e-10
    assert fid.frechet_distance(*map(torch.from_numpy, parts)) == fid.frechet_distance(*parts)


def test_fid_frechet_closed_forms():
    """1-D, shift, scaling, commuting, point mass, rotation, symmetry and self, at d = 64, to 1e-9."""
    d, c1, c2, m1, m2 = 64, spd(64, 1), spd(64, 2), rand(64, seed=3), rand(64, seed=4)
    fd, zero = fid.frechet_distance, torch.zeros(64, 64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert abs(fd(one[0] * 2, one * 9, one[0] * 5, one * 25) - ((2 - 5) ** 2 + (3 - 5) ** 2)) < 1e-12
    assert abs(fd(m1, c1, m2, c1) - (m1 - m2).square().sum()) < 1e-9
    assert abs(fd(m1, c1, m1, c1)) < 1e-9
    assert abs(fd(m1, c1, m1, 4 * c1) - c1.trace()) < 1e-9
    q, a, b = torch.linalg.qr(c1).Q, torch.rand(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64)
    assert abs(fd(m1, q * a @ q.T, m1, q * b @ q.T) - (a.sqrt() - b.sqrt()).square().sum()) < 1e-9
    assert abs(fd(m1, c1, m2, zero) - (m1 - m2).square().sum() - c1.trace()) < 1e-9
    assert abs(fd(m1, c1, m2, c2) - fd(m2, c2, m1, c1)) < 1e-9
    assert abs(fd(m1, c1, m2, c2) - fd(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)) < 1e-9


def test_fid_frechet_of_covariances_that_do_not_commute():
    """With T = 1 + E symmetric positive, N(m, S) and N(m', T S T) are |m - m'|^2 + tr(E S E) apart: d = 64 and 2048."""
    for d in (64, 2048):
        mu1, cov1, mu2, cov2, exact = fid.known_distance(d)
        assert (cov1 @ cov2 - cov2 @ cov1).abs().max() > 1e-4 and exact > 0.1
        assert abs(fid.frechet_distance(mu1, cov1, mu2, cov2) - exact) < 1e-9, d


def test_fid_frechet_rank_deficient():
    """Singular covariances: rank one is |u|^2 + |w|^2 - 2 |u.w|; without a common direction the traces add up; N < D
    samples match the singular values of X1 X2^T."""
    u, w, zero = rand(64, 1, seed=1), rand(64, 1, seed=2), torch.zeros(64)
    want = u.square().sum() + w.square().sum() - 2 * (u * w).sum().abs()
    assert abs(fid.frechet_distance(zero, u @ u.T, zero, w @ w.T) - want) < 1e-6
    few, rest = torch.linalg.qr(spd(64, 6)).Q.split((9, 55), 1)
    assert abs(fid.frechet_distance(zero, few @ few.T, zero, rest @ rest.T) - 64) < 1e-5
    for d, n, m in ((64, 30, 40), (512, 100, 200)):
        scale = torch.arange(1, d + 1) ** -0.5
        x, y = rand(n, d, seed=3) * scale, rand(m, d, seed=4) * scale
        x, y = x - x.mean(0), y - y.mean(0)
        trace = 2 * torch.linalg.svdvals(x @ y.T).sum() / ((n - 1) * (m - 1)) ** .5
        want = x.square().sum() / (n - 1) + y.square().sum() / (m - 1) - trace
        nil = torch.zeros(d)
        assert abs(fid.frechet_distance(nil, x.T @ x / (n - 1), nil, y.T @ y / (m - 1)) - want) < 1e-6
    x = x[:30, :64] - x[:30, :64].mean(0)
    one_sided = fid.frechet_distance(zero, x.T @ x / 29, zero, spd(64, 5))
    assert abs(one_sided - fid.frechet_distance(zero, spd(64, 5), zero, x.T @ x / 29)) < 1e-9


def test_fid_frechet_refuses_what_does_not_belong_together():
    """Other shapes and non-finite values are ValueErrors that say which."""
    one, two, eye = torch.zeros(3), torch.zeros(4), torch.eye(3)
    raises(lambda: fid.frechet_distance(one, eye, two, torch.eye(4)), "(3,)", "(4,)", "(3, 3)")
    raises(lambda: fid.frechet_distance(one, eye, one, torch.eye(4)), "(4, 4)")
    raises(lambda: fid.frechet_distance(one, eye, torch.zeros(1), eye), "(1,)")  # would broadcast
    raises(lambda: fid.frechet_distance(one, eye, one, eye * float("nan")), "cov2", "non-finite")


def test_fid_bias_is_what_few_images_add():
    """20 draws of 64 D images: the mean distance less B(N) is the true one within 3 standard errors, and the floor is
    the distance of a perfect generator. A reference of few images adds its share."""
    d, n = 32, 2048
    scale, shift = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5, 0.05
    zero, cov, wide = torch.zeros(d, dtype=torch.float64), torch.diag(scale ** 2), torch.diag((1.3 * scale) ** 2)

    def moments(seed, std, mean):
        stats = fid.Statistics(d)
        stats.update(rand(n, d, seed=seed) * std + mean)
        return stats.mean_cov()

    def excess(key, runs, truth):
        gaps = np.array([run["value"] - run[key] - truth for run in runs])
        assert abs(gaps.mean()) < 3 * gaps.std(ddof=1) / 20 ** 0.5, (key, gaps.mean())
        assert np.mean([run["value"] for run in runs]) - truth > 0.9 * runs[0][key] > 0

    truth = d * shift ** 2 + (0.3 * scale).square().sum()
    other = [fid.frechet_with_bias(*moments(k, 1.3 * scale, shift), n, zero, cov, None) for k in range(20)]
    both = [fid.frechet_with_bias(*moments(k, 1.3 * scale, shift), n, *moments(99 - k, scale, 0), n) for k in range(20)]
    perfect = [fid.frechet_with_bias(*moments(k, scale, 0), n, *moments(99 - k, scale, 0), n) for k in range(20)]
    excess("bias", other, truth)
    excess("bias", both, truth)
    excess("floor", perfect, 0)
    assert fid.frechet_with_bias(zero, cov, None, zero, wide, None)["bias"] is None
    eye, pairs = torch.eye(d, dtype=torch.float64), d * (d + 1) / 2  # round Gaussians: all s are alike, 2 and 1
    one, two = (fid.frechet_with_bias(zero, 4 * eye, 10, zero, eye, n_ref) for n_ref in (None, 20))
    assert abs(one["bias"] - (4 * d + pairs) / 10) < 1e-9 and abs(one["floor"] - (d + pairs / 2) / 10) < 1e-9
    assert abs(two["bias"] - one["bias"] - (d + pairs) / 20) < 1e-9
    assert abs(two["floor"] - one["floor"] - (d + pairs / 2) / 20) < 1e-9
    few = rand(9, d, seed=5)  # a singular reference, whose eigenvalues of 0 come out negative
    own = torch.linalg.svdvals(few) ** 2
    got = fid.frechet_with_bias(zero, eye, 10, zero, few.T @ few, None)["floor"]
    assert abs(got / fid.small_sample_bias(own, own.sum(), 10) - 1) < 1e-9


def test_fid_inception_score_closed_forms():
    """K equally frequent one-hot predictions score K, also when sorted by class; constant ones score 1."""
    labels = torch.arange(1000) % 10
    for order in (labels, labels.sort().values):
        score = fid.inception_score(1e4 * torch.eye(12)[order])
        assert 9.3 < score["value"] <= 10 and 0 < score["std"] < 0.3
        assert abs(fid.inception_score(1e4 * torch.eye(12)[order], splits=1)["value"] - 10) < 1e-9
    assert abs(fid.inception_score(torch.ones(100, 5))["value"] - 1) < 1e-9
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    kl = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert abs(fid.inception_score(p.log(), splits=1)["value"] - kl) < 1e-6


def test_fid_neighbour_scores():
    """Against their definition point by point; identical sets get 1, far ones 0, a collapsed one precision alone;
    precision and recall change places with the sets; more rows than a chunk, rotation and scaling change nothing."""
    real, fake = rand(60, 5, seed=1), 0.7 * rand(80, 5, seed=2) + 0.3
    got = fid.neighbour_scores(real, fake)
    across, own, other = torch.cdist(real, fake), torch.cdist(real, real), torch.cdist(fake, fake)
    r3, r5 = (own.sort(1).values[:, k] for k in (3, 5))
    f3 = other.sort(1).values[:, 3]
    assert got["precision"] == (across <= r3[:, None]).any(0).double().mean()
    assert got["recall"] == (across <= f3).any(1).double().mean()
    assert abs(got["density"] - (across < r5[:, None]).sum() / (5 * 80)) < 1e-12
    assert got["coverage"] == (across < r5[:, None]).any(1).double().mean() and 0 < got["recall"] < 1
    back = fid.neighbour_scores(fake, real)
    assert (back["precision"], back["recall"]) == (got["recall"], got["precision"])
    turn = 3 * torch.linalg.qr(rand(5, 5, seed=3)).Q
    assert fid.neighbour_scores(real @ turn + 1, fake @ turn + 1) == got
    many = torch.cat([real + k * 1e3 for k in range(20)]), torch.cat([fake + k * 1e3 for k in range(20)])
    assert all(abs(value - got[name]) < 1e-9 for name, value in fid.neighbour_scores(*many).items())
    assert set(fid.neighbour_scores(real, real).values()) == {1.0}
    assert set(fid.neighbour_scores(real, real + 1e3).values()) == {0.0}
    collapsed = fid.neighbour_scores(real, real[:1] + 1e-4 * rand(80, 5))
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.05
    line, apart = torch.arange(8.)[:, None], -10 * torch.arange(6.)[:, None] - 3  # -3 is as far from 0 as 3, its neighbour
    assert fid.neighbour_scores(line, apart)["precision"] == fid.neighbour_scores(apart, line)["recall"] == 1 / 6
    raises(lambda: fid.neighbour_scores(real[:5], fake), "more than 5 images", "5")


def test_fid_kernel_distance():
    """The unbiased MMD by its definition; equal laws average 0, a shift is positive, a rotation changes nothing."""
    x, y = rand(40, 6, seed=1), rand(40, 6, seed=2) + 0.5

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    within = sum(k(z[i], z[j]) for z in (x, y) for i, j in pairs) / len(pairs)
    want = within - 2 * sum(k(a, b) for a in x for b in y) / 1600
    got = fid.kernel_distance(x, y)
    assert abs(got["value"] - want) < 1e-9 and got["std"] == 0 and got["value"] > 0.05
    turn = torch.linalg.qr(rand(6, 6, seed=3)).Q
    assert abs(fid.kernel_distance(x @ turn, y @ turn)["value"] - want) < 1e-9
    null = fid.kernel_distance(rand(2000, 6, seed=4), rand(2000, 6, seed=5), size=500)
    assert abs(null["value"]) < 0.01 and null["std"] > 0
    raises(lambda: fid.kernel_distance(x[:1], y), "at least 2 images", "1 and 40")


def test_fid_mmhm(tmp_path, capsys):
    """The best of all in everything has 1 + 1e-3 = K / (K / (1 + 1e-3)), the worst 1e-3; lower distances are better;
    saved bounds keep a model's number when others come."""
    columns = ("fid5k", "precision")
    models = {name: dict(zip(columns, row)) for name, row in dict(a=(2.0, 0.8), b=(4.0, 0.6), c=(3.0, 0.8)).items()}
    means, bounds = fid.mmhm(models)
    assert abs(means["a"] - 1.001) < 1e-9 and abs(means["b"] - 1e-3) < 1e-9
    assert abs(means["c"] - 2 / (1 / 0.501 + 1 / 1.001)) < 1e-9 and bounds == dict(fid5k=[2, 4], precision=[0.6, 0.8])
    better = models | {"d": dict(fid5k=1.0, precision=0.9)}
    kept = fid.mmhm(better, bounds)[0]
    assert fid.mmhm(better)[0]["a"] < 1 and kept["a"] == means["a"] == kept["d"]
    worse = fid.mmhm({"e": dict(fid5k=9.0, precision=0.8), "f": dict(fid5k=2.0, precision=0.1)}, bounds)[0]
    assert abs(worse["e"] - 2 / (1 / 0.001 + 1 / 1.001)) < 1e-9 and worse["e"] == worse["f"]  # beyond the bounds is 0
    for name in ("sfid5k", "kid", "fd_glyphs", "fid_torchvision", "is", "recall"):
        low, high, equal = (fid.mmhm({"a": {name: x}, "b": {name: y}})[0]["a"] for x, y in ((1, 2), (2, 1), (1, 1)))
        assert (low > high) == (name not in ("is", "recall")) and equal == max(low, high), name
    raises(lambda: fid.mmhm({"a": dict(fid5k=1.0)}, bounds), "a has the metrics fid5k", "precision")
    files = [str(tmp_path / f"{name}.json") for name in models]
    for file, scores in zip(files, models.values()):
        kid = {"kid": dict(value=0.1), "labels": dict(value=1)}
        Path(file).write_text(json.dumps(dict(scores={name: dict(value=x) for name, x in scores.items()} | kid)))
    for written in (None, json.dumps(bounds)):  # writes the bounds, then reads them and lets them be
        if written:
            (tmp_path / "bounds.json").write_text(written)
        fid.main(["--mmhm", ",".join(files), "--bounds", str(tmp_path / "bounds.json")])
        lines = capsys.readouterr().out.splitlines()
        assert json.loads((tmp_path / "bounds.json").read_text()) == bounds
        assert "FID5k, precision" in lines[0] and lines[1].split() == ["1.0010", files[0]] and len(lines) == 4
        assert [line.split()[1] for line in lines[2:]] == [files[2], files[1]]  # the best first
    assert lines[0].endswith(f"bounds {tmp_path / 'bounds.json'}")
    Path(files[1]).write_text(json.dumps(dict(scores={name: dict(value=x) for name, x in (("fid5k", 1.0), ("recall", 0.5))})))
    fid.main(["--mmhm", ",".join(files)])  # what all of them have
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MMHM of FID5k, bounds of these results" and lines[1].split() == ["1.0010", files[1]]
    raises(lambda: fid.main(["--mmhm", ",".join(files), "--bounds", str(tmp_path / "bounds.json")]), "precision", "expected")
    assert (tmp_path / "bounds.json").read_text() == written
    raises(lambda: fid.main(["--bounds", "b.json"]), "--mmhm")


def test_fid_statistics_equal_numpy_for_any_batches():
    """Streaming mean and covariance equal np.mean and np.cov to 1e-12, however it is cut; float32 is widened. Rows that
    are kept stay as they are while their tensor grows."""
    x = rand(1000, 20).float() * 0.35 + 0.45
    for size in (1000, 64, 7, 1):
        stats = fid.Statistics(20)
        for batch in x.split(size):
            stats.update(batch)
        mean, cov = stats.mean_cov()
        assert stats.n == 1000
        assert np.abs(mean.numpy() - x.double().numpy().mean(0)).max() < 1e-12
        assert np.abs(cov.numpy() - np.cov(x.double().numpy(), rowvar=False)).max() < 1e-12
    raises(fid.Statistics(3).mean_cov, "at least 2")
    rows = fid.Rows(3, 1)
    for part in rand(50, 3).split(7):
        rows.add(part)
    assert rows.n == 50 and torch.equal(rows.stored[:50], rand(50, 3).float())


def test_fid_inception_has_the_names_and_sizes_of_the_files():
    """484 tensors and 27,161,264 parameters with torchvision's auxiliary head; 472 and 23,850,960 for the FID."""
    for flavour, tensors, parameters in (("torchvision", 484, 27_161_264), ("fid", 472, 23_850_960)):
        shapes = inception_shapes(flavour)
        trained = [s for n, s in shapes.items() if not n.endswith(("running_mean", "running_var"))]
        assert len(shapes) == tensors and sum(int(np.prod(s)) for s in trained) == parameters
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_6b.branch7x7dbl_4.conv.weight"] == (128, 128, 7, 1)
    assert shapes["fc.weight"] == (1008, 2048)


def test_fid_inception_golden():
    """Both flavours, recognised from their files, give the numbers of torchvision and of pytorch-fid on a wave, and so
    they do with folded normalisation in channels-last memory; an image does not depend on its batch."""
    x, seen = wave((2, 3, 299, 299), .0137), []
    net = fid.InceptionV3(golden_file("torchvision"))
    net.train()
    out = net.outputs(x)
    assert net.flavour == "torchvision" and not net.training
    close(summary(out["features"], [0, 1, 1365, 2048, 4095]),
          [0.1132500644, 0.2243506167, 0.9033113718, 0.8530551791, 0.1643990576, 0.9033060074, 0.3203912675])
    close(summary(out["logits"] + net.fc.bias, [0, 1, 666, 1000, 1999]),
          [0.0038307788, 0.6621285819, -0.8854402900, -0.9017716050, -0.8211702108, -0.8854588866, 0.8038506508])
    net = fid.InceptionV3(golden_file("fid"))
    out = net.outputs(x)
    assert net.flavour == "fid"
    close(summary(out["features"], [0, 1, 1365, 2048, 4095]),
          [0.1181154694, 0.2483061382, 0.9254347086, 1.0329910517, 0.0, 0.9254313111, 0.1479515433])
    close(summary(out["logits"], [0, 1, 672, 1008, 2015]),
          [0.0118307078, 0.7277952804, -0.9783409834, -0.9400481582, -0.5902845860, -0.9783401489, 0.3934402466])
    close(summary(out["spatial"], [])[:2], [0.2028957800, 0.2759872773])
    net.fast()
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, result: seen.append(result))
    again = net.outputs(x[1:])
    assert torch.equal(again["spatial"].view(1, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    hook.remove()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for name in out:
        close(again[name].flatten(), out[name][1:].flatten(), 1e-5)
    calls, images = [], data.glyphs(3)[0]
    net.outputs = lambda x: calls.append(len(x)) or {name: x.flatten(1)[:, :width] for name, width in net.widths.items()}
    assert net.at_once == 8
    net.at_once, whole = 2, net.extract(images)
    parts = net.extract(images)
    assert calls == [3, 2, 1] and all(torch.equal(parts[name], whole[name]) for name in out)     # in their order


def test_fid_inception_pooling():
    """Averages of ones stay 1 at the border for the FID, whose graph leaves the padding out, and lose it with torchvision;
    the last block of the FID pools by maximum; blocks that halve the size have no convolution after their maximum."""
    for flavour in ("fid", "torchvision"):
        blocks, seen = fid.inception_blocks(flavour), {}
        for name, (branches, pool) in blocks.items():
            block = fid.Mixed(4, branches, pool)
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(lambda module, args: seen.update({name: args[0][0, 0]}))
            out = block(-torch.ones(1, 4, 5, 5) if name == "Mixed_7c" else torch.ones(1, 4, 5, 5))
            assert out.shape[2] == (2 if name in ("Mixed_6a", "Mixed_7a") else 5) and (name in seen or out[0, -1, 0, 0] == 1)
        rim = torch.tensor([2 / 3, 1, 1, 1, 2 / 3])
        want = {name: torch.outer(rim, rim) if flavour == "torchvision" else torch.ones(5, 5) for name in seen}
        want["Mixed_7c"] = -want["Mixed_7c"]  # an average of -1, or their maximum, which no zero of the padding may reach
        assert len(seen) == 9 and all(torch.allclose(seen[name], want[name]) for name in seen)
    average, maximum = (fid.inception_blocks("fid")[name][1] for name in ("Mixed_7b", "Mixed_7c"))
    point = torch.zeros(1, 1, 5, 5).index_fill(3, torch.tensor(2), 9)
    assert maximum(point).max() == 9 and average(point).max() == 3


def test_fid_inception_precision():
    """Features of float32 are those of float64 to 1e-5 of the rms, in a small image; no gradient is kept."""
    net, x = fid.InceptionV3(golden_file("fid")), wave((1, 3, 107, 107), .0137)
    out = net.outputs(x)
    for name, wide in net.double().outputs(x.double()).items():
        assert wide.dtype == torch.float64 and not out[name].requires_grad
        close(out[name].flatten(), wide.flatten(), 1e-5)
    assert (out["spatial"] >= 0).all() and out["spatial"].max() > 0


def test_fid_inception_preprocessing():
    """uint8 images are resized and mapped as documented; autocast changes nothing, TF32 is off."""
    image = data.glyphs(1)[0]
    torch.manual_seed(0)
    net = fid.InceptionV3(flavour="fid")
    for resize, function in (("clean", fid.resize_clean), ("pytorch", fid.resize_pytorch), ("tf1", fid.resize_tf1)):
        net = fid.InceptionV3(flavour="fid", resize=resize)
        x, seen = function(image), []
        hook = net.Conv2d_1a_3x3.register_forward_hook(lambda module, args, result: seen.append(args[0]))
        got = net(image)
        hook.remove()
        assert torch.equal(seen[0], x / 127.5 - 1 if resize == "pytorch" else (x - 128) / 128)
        assert got.dtype == torch.float32 and got.shape == (1, 2048) and net.resize.startswith(resize)
    assert net.resize == "tf1 to 299, (x-128)/128"
    assert fid.InceptionV3(flavour="torchvision").resize == "tf1 to 299, x/127.5-1"
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = True
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(image), got)
    with fid.full_float32(torch.device("cpu")):
        assert not (convolution.allow_tf32 or matmul.allow_tf32 or convolution.benchmark) and convolution.deterministic
    assert matmul.allow_tf32 and convolution.allow_tf32 == before[1]
    matmul.allow_tf32 = before[0]
    raises(lambda: net(image.float()), "data.to_uint8", "float32")
    for wrong in (image[:, :1], image[0].permute(1, 0, 2)):
        raises(lambda: net(wrong), "(N, 3, h, w)")


def test_fid_resize_rules():
    """tf1 reads input i n / 299: a ramp of n becomes i n / 299 up to the clamped edge, and any image what StyleGAN's
    shifted grid gives; pytorch is half a pixel further; clean is Pillow's bicubic of float images. 299 pixels stay."""
    rng = torch.Generator().manual_seed(0)
    same = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=rng)
    assert torch.equal(fid.resize_tf1(same), same.float())
    for resize in fid.RESIZES.values():
        assert (resize(torch.full((1, 3, 40, 50), 77, dtype=torch.uint8)) - 77).abs().max() < 1e-4
    for n in (32, 256, 512):
        ramp = torch.arange(n, dtype=torch.float32).expand(1, 1, n, n)
        want = (torch.arange(299) * n / 299).clamp_max(n - 1).expand(1, 1, 299, 299)
        assert (fid.resize_tf1(ramp) - want).abs().max() < 1e-4
        assert (fid.resize_tf1(ramp.mT) - want.mT).abs().max() < 1e-4
        phase = (fid.resize_pytorch(ramp) - fid.resize_tf1(ramp))[..., 20:-20] - 0.5 * (n / 299 - 1)
        assert phase.abs().max() < 1e-3
        image = torch.randint(0, 256, (1, 3, n, n), dtype=torch.uint8, generator=rng)
        theta = torch.eye(2, 3)[None]
        theta[0, :, 2] += 1 / n - 1 / 299
        grid = nn.functional.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
        shifted = nn.functional.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
        assert (fid.resize_tf1(image) - shifted).abs().max() < 0.05  # float32 grid positions; a wrong rule is off by 50
        pillow = [np.array(Image.fromarray(channel.float().numpy(), "F").resize((299, 299), Image.Resampling.BICUBIC))
                  for channel in image[0]]
        assert (fid.resize_clean(image)[0] - torch.from_numpy(np.stack(pillow)).clamp(0, 255)).abs().max() < 0.01


def test_fid_weights_files_that_cannot_be_used(tmp_path):
    """Missing, cut, foreign, incomplete and wrongly named weights are one-line errors that say what to do."""
    raises(lambda: fid.load_inception("torchvision"), CACHE, "0cc3c7bd", "108,949,747",
           "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth")
    raises(lambda: fid.load_inception("fid"), "95,628,359", "6726825d0af5f729", "mseitzer")
    half = Path(CACHE) / "pt_inception-2015-12-05-6726825d.pth"
    half.write_bytes(b"half")
    raises(lambda: fid.load_inception("fid"), "4 bytes", "incomplete")
    half.unlink()
    raises(lambda: fid.load_inception("no.pth"), "no.pth", "torchvision")
    whole = golden_file("fid")
    raises(lambda: fid.InceptionV3(whole, "torchvision"), "fid weights, not torchvision", "1008")
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:1_000_000])
    raises(lambda: fid.InceptionV3(tmp_path / "cut.pth"), "cut.pth", "incomplete")
    state = torch.load(whole, weights_only=True)
    torch.save({"fc.weight": torch.zeros(10, 2048)}, tmp_path / "ten.pth")
    raises(lambda: fid.InceptionV3(tmp_path / "ten.pth"), "1000 or 1008")
    state.pop("Mixed_6a.branch3x3.bn.running_var")
    torch.save(state, tmp_path / "less.pth")
    raises(lambda: fid.InceptionV3(tmp_path / "less.pth"), "Mixed_6a.branch3x3.bn.running_var")


def test_fid_glyph_net_is_trained_once_and_mends_a_damaged_file():
    """A damaged file is trained anew, even under inference_mode, without a trace in the global random state; a good one
    is only read. GlyphNet then reads held-out digits of 32, 64 and 16 pixels."""
    fid.glyph_net_file().write_bytes(b"PK nonsense")
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():
        trained = fid.glyph_net(quiet=True)
    written = fid.glyph_net_file().stat().st_mtime_ns
    net = fid.glyph_net()
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
    assert net.label == trained.label and fid.glyph_net_file().stat().st_mtime_ns == written
    assert os.listdir(CACHE) == [fid.glyph_net_file().name]  # no temporary file is left
    for size, least in ((32, 0.99), (64, 0.99), (16, 0.98)):
        images, labels = data.glyphs(1000, size, seed=5)
        features, logits = net(images)
        assert features.shape == (1000, 64) and not features.requires_grad and not net.training
        assert (logits.argmax(1) == labels).float().mean() >= least, size


def test_fid_score_of_real_wrong_and_noisy_glyphs(capsys):
    """Real glyphs score about the floor; wrong labels cost accuracy; noise, and missing digits, cost distance."""
    images, labels = data.glyphs(500, seed=5)
    real = fid.score_glyphs(images, labels)
    assert real["n"] == 500 and real["accuracy"] >= 0.99
    assert 0 < real["floor"] and 0.5 * real["floor"] < real["fd_glyphs"] < 2 * real["floor"]
    wrong = fid.score_glyphs(images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.02 and wrong["fd_glyphs"] == real["fd_glyphs"]
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise = fid.score_glyphs(noise)
    assert noise["fd_glyphs"] > 100 * real["floor"] and noise["accuracy"] is None and noise["floor"] == real["floor"]
    assert fid.score_glyphs(images[labels < 5])["fd_glyphs"] > 20 * real["floor"]
    assert "warning" not in capsys.readouterr().err
    fid.score_glyphs(images[:100])
    notes = capsys.readouterr().err
    assert "warning: only N=100 < 2*64 samples" in notes and "prefer KID" in notes and notes.count("warning") == 1
    raises(lambda: fid.score_glyphs(data.to_float(images)), "data.to_uint8")


def write_folder(folder, images, labels):
    for i, (image, label) in enumerate(zip(images, labels)):
        (folder / str(int(label))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / str(int(label)) / f"{i:05d}.png")
    return str(folder)


def write_npz(path, images, labels):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    return str(path)


class Toy(nn.Module):
    """Features of every kind from 48 cells of an image, in float64: cheap, and the same in any batch."""
    label, resize, suffix, metrics = "toy", "none", "_toy", fid.METRICS
    widths = dict(features=12, spatial=6, logits=10)

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(rand(48, 28, seed=7) / 7)

    def extract(self, images):
        cells = nn.functional.adaptive_avg_pool2d(fid.check_images(images).double() / 255, 4).flatten(1)
        return dict(zip(self.widths, ((cells[:, :, None] * self.mix).sum(1)).split((12, 6, 10), 1)))


def values(result):
    return {name: score["value"] for name, score in result["scores"].items()}


def assert_same_scores(got, want, tolerance=1e-9):
    assert values(got).keys() == values(want).keys()
    for name, value in values(want).items():
        assert abs(values(got)[name] - value) <= tolerance, name


TOY = Toy()
REAL = data.glyphs(120, seed=6)


def toy(generated, reference, **options):
    return fid.evaluate(generated, reference, net=TOY, device="cpu", **options)


def test_fid_every_kind_of_images_scores_alike(tmp_path, capsys):
    """A folder (nested, .PNG), a zip, an npz, a compressed and a channels-first one, and batches have the same scores,
    for any batch size, order of images and number of workers; statistics files have those that need no images."""
    images, labels = data.glyphs(80, seed=5)
    real, npz = write_npz(tmp_path / "real.npz", *REAL), write_npz(tmp_path / "a.npz", images, labels)
    want = toy(npz, real, num=80)
    names = ("fd", "sfid80", "is", *fid.NEIGHBOURS, "kid")
    assert list(values(want)) == [f"{name}_toy" for name in names] and want["labels"] == "balanced, 8 a class"
    assert want["n"] == 80 and want["n_ref"] == 120 and want["size"] == [32, 32]
    assert want["scores"]["precision_toy"]["n_ref"] == 120 and 0 < want["scores"]["precision_toy"]["value"] <= 1
    folder = write_folder(tmp_path / "png" / "deep", images, labels)
    os.rename(Path(folder) / "3" / "00003.png", Path(folder) / "3" / "00003.PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(Path(folder).rglob("*.*")):
            archive.write(path, f"inside/{path.name}")
    np.savez_compressed(tmp_path / "small.npz", images=images.numpy())
    for source in (str(tmp_path / "png"), str(tmp_path / "a.zip"), tmp_path / "small.npz", list(images.split(33))):
        got = toy(source, real, batch=30)
        assert got["n"] == 80 and got["scores"].keys() == want["scores"].keys()
        if source in (str(tmp_path / "png"), str(tmp_path / "a.zip")):  # in another order, of which IS takes its parts
            got["scores"]["is_toy"] = want["scores"]["is_toy"]
        assert_same_scores(got, want)
    assert_same_scores(toy(folder, real, batch=7, workers=2), toy(folder, real))
    write_npz(tmp_path / "back.npz", images.flip(0), labels.flip(0))
    assert_same_scores(toy(str(tmp_path / "back.npz"), real, metrics="fid,sfid,precision,coverage"),
                       toy(npz, real, metrics="fid,sfid,precision,coverage"))
    stats, alone = str(tmp_path / "stats.npz"), toy(npz, "", save_stats=str(tmp_path / "stats.npz"))
    assert alone["scores"] == {} and alone["reference"] is None
    capsys.readouterr()
    assert_same_scores(toy(stats, real), toy(npz, real, metrics="fid,sfid"))
    notes = capsys.readouterr().err
    assert "stats.npz has no images: Inception Score skipped" in notes
    assert "stats.npz has no images (arr_0): precision, recall, density, coverage, kid skipped" in notes
    small, large = toy(npz, real, subset=50), toy(npz, real, subset=50, seed=1)
    assert small["n"] == small["n_ref"] == 50 and values(small) == values(toy(npz, real, subset=50))
    assert values(small)["fd_toy"] != values(large)["fd_toy"]
    read = [i for indices, *_ in fid.from_dataset(npz, fid.Config(subset=50), "generated").batches for i in indices]
    assert read == sorted(set(read)) and len(read) == 50  # never back to the start of a compressed file


def test_fid_npz_is_streamed(tmp_path):
    """Rows come one at a time, forwards and backwards, of 3 or 1 channels, with memory for a few of them only."""
    pixels = np.random.RandomState(0).randint(0, 256, (300, 64, 64, 3)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "grey.npz", images=pixels[:9, :, :, :1])
    rows = fid.NpzRows(str(tmp_path / "a.npz"), "arr_0")
    assert rows.shape == (300, 3, 64, 64) and len(rows) == 300
    tracemalloc.start()
    same = all(np.array_equal(rows[i].permute(1, 2, 0), pixels[i]) for i in [*range(300), 5, 4])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same and peak < pixels.nbytes / 3, f"{peak:,} bytes at once"
    elsewhere, rows.owner = rows.file, -1  # as after a fork: two processes must not move one file's position
    assert np.array_equal(rows[7].permute(1, 2, 0), pixels[7]) and rows.file is not elsewhere
    grey = fid.NpzRows(str(tmp_path / "grey.npz"), "images")
    assert grey[8].shape == (3, 64, 64) and np.array_equal(grey[8][2], pixels[8, :, :, 0])
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    raises(lambda: toy(str(tmp_path / "cut.npz"), ""), "cut.npz", "not a readable npz")
    for wrong in (pixels[0], pixels.astype(np.float32) / 255, pixels[:, :, :, :2], pixels[:, None], np.asfortranarray(pixels)):
        np.savez(tmp_path / "wrong.npz", arr_0=wrong)
        raises(lambda: toy(str(tmp_path / "wrong.npz"), ""), str(wrong.dtype), "expected uint8 NHWC", "C order", "data.to_uint8")
    member = io.BytesIO()
    np.lib.format.write_array(member, pixels[:9], version=(2, 0))
    for text, name, error in ((member.getvalue(), "second.npz", ""), (member.getvalue()[:-9], "short.npz", "cut short")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("arr_0.npy", text)
        if error:
            raises(lambda: toy(str(tmp_path / name), ""), name, error)
        else:
            assert np.array_equal(fid.NpzRows(str(tmp_path / name), "arr_0")[8].permute(1, 2, 0), pixels[8])
    for at in (60, 5000):  # at the start of the compressed array, which zlib minds, and inside it, which the sum minds
        text = bytearray((tmp_path / "grey.npz").read_bytes())
        text[at:at + 100] = bytes(100)
        (tmp_path / "spoilt.npz").write_bytes(text)
        raises(lambda: toy(str(tmp_path / "spoilt.npz"), ""), "spoilt.npz", "not a readable npz")
    np.savez(tmp_path / "labels.npz", arr_0=pixels[:9], arr_1=np.zeros(5, np.int64))
    raises(lambda: toy(str(tmp_path / "labels.npz"), ""), "labels.npz", "5", "9")
    for name, good in (("arr_1", "arr_0"), ("mu", "sigma")):
        with zipfile.ZipFile(tmp_path / "junk.npz", "w") as archive:
            archive.writestr(f"{good}.npy", member.getvalue())
            archive.writestr(f"{name}.npy", b"\x93NUMPY junk")
        raises(lambda: toy(str(tmp_path / "junk.npz"), ""), "junk.npz", "not a readable npz")
    np.savez(tmp_path / "empty.npz", arr_0=pixels[:0])
    raises(lambda: toy(str(tmp_path / "empty.npz"), ""), "arr_0 holds no images")
    np.savez(tmp_path / "none.npz", x=pixels[0])
    raises(lambda: toy(str(tmp_path / "none.npz"), ""), "holds x", "arr_0", "mu and sigma")


def test_fid_adm_reference_and_other_statistics(tmp_path, capsys):
    """ADM's file: Frechet distances from mu, sigma, mu_s, sigma_s, precision and recall from arr_0. Other names, .pt
    files, and files without spatial statistics do as far as they go; pickles are refused; nothing unrecorded compares
    with any but the 2015-12-05 weights."""
    images, labels = data.glyphs(80, seed=5)
    npz, adm = write_npz(tmp_path / "a.npz", images, labels), str(tmp_path / "adm.npz")
    net = Toy()
    net.suffix = ""  # stands for the 2015-12-05 weights
    whole, part = REAL[0], REAL[0][:50]
    toy(write_npz(tmp_path / "whole.npz", *REAL), "", save_stats=str(tmp_path / "own.npz"))
    with np.load(tmp_path / "own.npz") as file:
        known = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
        features = TOY.extract(whole)["features"].detach().numpy()
        assert np.abs(known["sigma"] - np.cov(features, rowvar=False)).max() < 1e-12
    np.savez(adm, arr_0=part.permute(0, 2, 3, 1).numpy(), **known)
    some = write_npz(tmp_path / "part.npz", part, REAL[1][:50])
    capsys.readouterr()
    got = fid.evaluate(npz, adm, net=net, device="cpu")
    notes = capsys.readouterr().err
    assert "mu and sigma, the rest from its images (arr_0)" in notes and "does not say how it was made" in notes
    assert got["n_ref"] is None and got["scores"]["recall"]["n_ref"] == 50
    frechet, rows = (fid.evaluate(npz, other, net=net, device="cpu") for other in (str(tmp_path / "own.npz"), some))
    for name in ("fd", "sfid80"):
        assert abs(got["scores"][name]["value"] - frechet["scores"][name]["value"]) < 1e-9
        assert got["scores"][name]["bias"] < frechet["scores"][name]["bias"]  # of unknown size, so it counts as exact
    for name in (*fid.NEIGHBOURS, "kid", "is"):
        assert got["scores"][name]["value"] == rows["scores"][name]["value"], name
    np.savez(tmp_path / "alias.npz", ref_mu=known["mu"], ref_sigma=known["sigma"])
    torch.save({name: torch.from_numpy(known[name]) for name in ("mu", "sigma")}, tmp_path / "stats.pt")
    for name in ("alias.npz", "stats.pt"):
        other = fid.evaluate(npz, str(tmp_path / name), net=net, device="cpu")
        assert list(other["scores"]) == ["fd", "is"] and abs(values(other)["fd"] - values(got)["fd"]) < 1e-9
        assert f"{name} has no mu_s/sigma_s: sFID skipped" in capsys.readouterr().err
    raises(lambda: toy(npz, adm), "does not say how it was made", "--weights fid", "--save_stats")
    raises(lambda: fid.evaluate(str(tmp_path / "alias.npz"), npz, net=net, device="cpu", num=50), "an unknown number", "50")
    for name in ("edm.pkl", "edm.pickle"):
        (tmp_path / name).write_bytes(b"pickle")
        raises(lambda: toy(npz, str(tmp_path / name)), name, "numpy.savez")
    (tmp_path / "half.pt").write_bytes((tmp_path / "stats.pt").read_bytes()[:500])
    raises(lambda: toy(str(tmp_path / "half.pt"), npz, num=5), "half.pt", "damaged")
    lazy = Toy()
    lazy.suffix, lazy.extract = "", None  # images that no metric needs are not even opened
    assert list(fid.evaluate(str(tmp_path / "stats.pt"), adm, lazy, device="cpu", metrics="fid")["scores"]) == ["fd"]
    small = write_npz(tmp_path / "small.npz", *data.glyphs(20, size=16))
    raises(lambda: fid.evaluate(small, adm, net=net, device="cpu"), "size=[32, 32]", "size=[16, 16]", "--size")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    raises(lambda: toy(str(tmp_path / "broken.npz"), npz), "broken.npz", "not a readable")


def test_fid_refuses_to_mix_protocols(tmp_path):
    """Statistics of other weights, resize rules or sizes do not compare, nor do counts that are not --num, nor images
    of several sizes; wrong options are named."""
    npz, stats = write_npz(tmp_path / "a.npz", *REAL), str(tmp_path / "stats.npz")
    toy(npz, "", save_stats=stats)
    with np.load(stats) as file:
        parts = dict(file)
    assert json.loads(str(parts["meta"])) == dict(features="toy", resize="none", size=[32, 32]) and parts["n"] == 120
    for key, other in (("features", "inception fid 6726825d"), ("resize", "clean"), ("size", [64, 64])):
        meta = json.loads(str(parts["meta"])) | {key: other}
        np.savez(tmp_path / "other.npz", **parts | {"meta": json.dumps(meta)})
        for pair in ((npz, str(tmp_path / "other.npz")), (str(tmp_path / "other.npz"), npz)):
            raises(lambda: toy(*pair), f"{key}={other}", f"{key}=", "--save_stats")
        wrong = error_of(toy, npz, str(tmp_path / "other.npz"))
        assert key == "size" or wrong.startswith(f"{tmp_path / 'other.npz'}: statistics were made with ")
    for source in (npz, stats):
        raises(lambda: toy(source, npz, num=100), f"found 120 images in {source}", "--num asks for 100")
        raises(lambda: toy(source, npz, num=50_000), "found 120 images", "--num asks for 50,000")
        toy(source, npz, num=120, metrics="fid")
    raises(lambda: toy([REAL[0]], npz, num=100), "found 120 images in an iterable", "--num asks for 100")
    mixed = tmp_path / "mixed"
    write_folder(mixed, *REAL)
    Image.new("RGB", (48, 40)).save(mixed / "0" / "odd.png")
    raises(lambda: toy(str(mixed), npz), "2 sizes: 32x32 (120), 48x40 (1: 0/odd.png)", "--size")
    assert toy(str(mixed), npz, size=32)["n"] == 121
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.new("RGB", (48, 40)).save(mixed / "0" / "odd.png", exif=turned)
    raises(lambda: toy(str(mixed), npz), "2 sizes: 32x32 (120), 40x48 (1: 0/odd.png)")
    (mixed / "0" / "odd.png").write_bytes(b"no image")
    raises(lambda: toy(str(mixed), npz), "odd.png", "not a readable image", "remove it")
    small, never = write_npz(tmp_path / "small.npz", *data.glyphs(20, size=16)), Toy()
    never.extract = None  # what can be known before is found before any image is measured
    raises(lambda: fid.evaluate(small, npz, never, device="cpu"), "small.npz", "size=[16, 16]", "size=[32, 32]")
    raises(lambda: toy([REAL[0], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], npz), "2 sizes", "after 120 images")
    raises(lambda: toy([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], npz), "size=[8, 8]", "size=[32, 32]")
    raises(lambda: toy([data.to_float(REAL[0])], npz), "uint8", "data.to_uint8")
    raises(lambda: fid.evaluate([data.to_float(REAL[0])], "", never, device="cpu"), "uint8", "data.to_uint8")
    raises(lambda: toy([REAL[0]], npz, size=16), "--size 16", "iterable")
    raises(lambda: toy(npz, npz, metrics="fid,fit"), "--metrics fit", "coverage")
    raises(lambda: fid.evaluate(npz, "glyphs", features="glyphs", metrics="kid"), "--metrics kid", "glyphnet", "recall")
    assert list(values(toy(npz, npz, metrics="kid,recall"))) == ["recall_toy", "kid_toy"]
    raises(lambda: toy(npz, npz, resize="bilinear"), "--resize bilinear", "tf1, pytorch, clean")
    raises(lambda: toy(npz, npz, batch=0), "--batch 0")
    raises(lambda: toy(npz, npz, save_stats="a.txt"), "a.txt", ".npz")
    raises(lambda: toy(str(tmp_path / "no"), npz), "no such file or folder")


def test_fid_warnings(tmp_path, capsys):
    """JPEG files among the generated, too few samples with their floor, and what differences mean, are told once."""
    real = write_npz(tmp_path / "real.npz", *REAL)
    (tmp_path / "jpg").mkdir()
    for i, image in enumerate(REAL[0][:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "jpg" / f"{i}.JPG")
    got = toy(str(tmp_path / "jpg"), real)
    notes = capsys.readouterr().err
    assert notes.count("JPEG") == 1 and notes.count("only N=20 < 2*12 samples") == 1
    assert f"floor ~{got['scores']['fd_toy']['floor']:.3g}); prefer KID" in notes
    toy(real, str(tmp_path / "jpg"))
    fid.warn_of_few(24, 12, 1.0)
    assert capsys.readouterr().err == ""
    for path in (tmp_path / "jpg").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    toy(str(tmp_path / "jpg"), real, metrics="fid")
    assert "JPEG" in capsys.readouterr().err


def test_fid_several_sets_have_a_spread(tmp_path, capsys):
    """A list of sets, or --repeat, gives mean, deviation and each one; sets of other sizes have no common name."""
    real = write_npz(tmp_path / "real.npz", *REAL)
    sets = [write_npz(tmp_path / f"{seed}.npz", *data.glyphs(60, seed=seed)) for seed in (11, 12, 13)]
    got, single = toy(sets, real), [toy(one, real) for one in sets]
    for name, score in got["scores"].items():
        found = [one["scores"][name]["value"] for one in single]
        assert abs(score["value"] - np.mean(found)) < 1e-9 and abs(score["std"] - np.std(found, ddof=1)) < 1e-9
    assert [values(one) for one in got["sets"]] == [values(one) for one in single] and score["sets"] == 3
    assert "retraining" in capsys.readouterr().err and all(one in got["generated"] for one in sets)
    twice = toy(sets[0], real, subset=40, repeat=2, seed=5)
    assert values(twice["sets"][0])["is_toy"] == values(toy(sets[0], real, subset=40, seed=5))["is_toy"]
    assert values(twice["sets"][0]) != values(twice["sets"][1]) and twice["generated"] == sets[0]
    capsys.readouterr()
    toy(sets[0], real, metrics="recall", subset=40, repeat=2)
    assert "retraining" not in capsys.readouterr().err  # a note on FIDs only
    raises(lambda: toy([sets[0], real], real), "one size", "sfid60_toy", "sfid120_toy")


def test_fid_a_run_generates_what_is_measured(tmp_path):
    """A run folder is sampled from (seed, index) in the way asked for, and its protocol is told."""
    run_folder, real = tmp_path / "run", write_npz(tmp_path / "real.npz", *REAL)
    train.train(tiny_run(run_folder, steps=1))
    got = toy(str(run_folder), real, num=30, steps=2, batch=30, solver="euler", seed=3)
    net = model.load(run_folder / "last.pt").eval()
    made = [images for _, images in sample.generate(net, sample.labels_for(30, 10), 3, 30, steps=2, solver="euler")]
    assert_same_scores(got, toy(made, real))
    assert got["made"] == "euler, 2 steps, 2 network evaluations, no guidance, EMA weights, balanced labels, seed 3"
    assert got["labels"] == "balanced, 3 a class" and got["n"] == 30
    random = toy(str(run_folder / "last.pt"), real, num=30, steps=1, labels="random", repeat=2, metrics="fid")
    assert "random labels" in random["made"] and "balanced" not in random["sets"][0]["labels"]
    assert len({one["scores"]["fd_toy"]["value"] for one in random["sets"]}) == 2
    train.train(tiny_run(tmp_path / "jump", steps=1, loss="afm"))
    raises(lambda: toy(str(tmp_path / "jump"), real, num=8, steps=7, metrics="fid"), "--steps 7", "own way")
    jumped = toy(str(tmp_path / "jump"), real, num=8, metrics="fid")["made"]
    assert jumped.startswith("euler, 1 steps, 1 network evaluations, no guidance")  # its own way, whatever is asked for
    raises(lambda: toy(str(run_folder), real), "--num")
    train.train(tiny_run(tmp_path / "imf", steps=1, loss="imf", omega_max=3.0))
    torch.save(dict(config="words of another program"), tmp_path / "foreign.pt")
    assert sample.own_settings(tmp_path / "foreign.pt") == ({}, {})
    made = toy(str(tmp_path / "imf"), real, num=8, guidance=2.0, metrics="fid")["made"]
    assert made.startswith("euler, 2 steps, 2 network evaluations, told to the network: guidance 2")


def test_fid_glyphs_score_as_score_glyphs_does(tmp_path):
    """evaluate on GlyphNet's features: as many held-out real glyphs, the measured floor, and the accuracy."""
    images, labels = data.glyphs(300, seed=5)
    want = fid.score_glyphs(images, labels)
    npz, stats = write_npz(tmp_path / "a.npz", images, labels), str(tmp_path / "stats.npz")
    got = fid.evaluate(npz, "glyphs", features="glyphs", save_stats=stats, device="cpu")
    assert list(values(got)) == ["fd_glyphs", *(f"{name}_glyphs" for name in fid.NEIGHBOURS), "accuracy"]
    assert got["features"].startswith("glyphnet ") and got["reference"] == "glyphs:1"
    assert got["n"] == got["n_ref"] == 300
    assert abs(values(got)["fd_glyphs"] - want["fd_glyphs"]) < 1e-6 and values(got)["accuracy"] == want["accuracy"]
    again = fid.evaluate(stats, "glyphs", features="glyphs", device="cpu")
    assert values(again) == {"fd_glyphs": values(got)["fd_glyphs"]}
    for one in (got, again):
        assert abs(one["scores"]["fd_glyphs"]["floor"] - want["floor"]) < 1e-6
    assert abs(values(fid.evaluate(npz, stats, features="glyphs", device="cpu"))["fd_glyphs"]) < 1e-8


def test_fid_names_of_scores(tmp_path):
    """fid only for the 2015-12-05 weights and 50,000 images, and other weights say so; as text each score has its
    reference beside it, and rounding does not make a distance negative."""
    net = fid.InceptionV3(flavour="fid")
    names = [fid.score_name("fid", net, n) for n in (50_000, 49_999, 10_000, None)]
    assert names == ["fid", "fid49999", "fid10k", "fid_of_unknown_n"] and fid.score_name("is", net, 10) == "is"
    other = fid.InceptionV3(flavour="torchvision")
    assert fid.score_name("fid", other, 50_000) == "fid_torchvision"
    assert fid.title(fid.score_name("sfid", other, 5000)) == "sFID5k (torchvision weights)"
    shown = [fid.title(name) for name in ("is", "kid_glyphs", "fd_glyphs", "precision_torchvision")]
    assert shown == ["IS", "KID (GlyphNet)", "FD-glyphs", "precision (torchvision weights)"]
    npz = write_npz(tmp_path / "real.npz", *REAL)
    lines = fid.as_text(toy(npz, npz)).splitlines()
    wanted = ("fd_toy", "0.0000", "bias", "floor", "n 120, n_ref 120"), ("sFID120",), ("IS", "std")
    for line, words in zip(lines, wanted):
        assert all(word in line for word in words) and ("real.npz" in line) == (words[0] != "IS")
    assert "-0.0000" not in lines[0] and f"reference  {npz}" in lines and "resize     none" in lines
    scores = dict(fid5k=dict(value=-5e-4, bias=0.25, floor=None, n=5000), sfid5k=dict(value=-0.5, bias=0.125),
                  kid=dict(value=-5e-4, std=0.25), accuracy=dict(value=0.5))
    text = fid.as_text(dict(scores=scores, reference="real", sets=["each"], made="", n=5))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "FID5k 0.0000 bias 0.25, n 5,000, against real", "sFID5k -0.5000 bias 0.125, against real",
        "KID -0.000500 std 0.25, against real", "accuracy 0.5000", "reference real", "n 5"]


def test_fid_inception_end_to_end(tmp_path, capsys):
    """From a weights file: statistics of the folded network, whose means are the plain one's; the protocol is told."""
    weights, npz = golden_file("torchvision"), write_npz(tmp_path / "a.npz", *data.glyphs(6))
    stats = tmp_path / "stats.npz"
    state = torch.random.get_rng_state()
    fid.main([npz, "--weights", str(weights), "--save_stats", str(stats), "--json", "--device", "cpu", "--batch", "4"])
    assert torch.equal(torch.random.get_rng_state(), state)
    printed = capsys.readouterr()
    got, net = json.loads(printed.out), fid.InceptionV3(weights)
    assert "not comparable with published FIDs" in printed.err
    assert got["features"] == f"inception torchvision {fid.digest(weights.read_bytes())}" and got["size"] == [32, 32]
    assert got["resize"] == net.resize and got["n"] == 6
    images = data.glyphs(6)[0]
    plain, fast = net.extract(images), net.fast()
    out = [fast.extract(part) for part in images.split(4)]  # the spread of these is near float32's resolution
    with np.load(stats) as file:
        for mean, cov, kind in (("mu", "sigma", "features"), ("mu_s", "sigma_s", "spatial")):
            assert np.abs(file[mean] - plain[kind].double().mean(0).numpy()).max() < 1e-5
            want = np.cov(torch.cat([part[kind] for part in out]).double().numpy(), rowvar=False)
            assert 0 < np.abs(file[cov] - want).max() < 1e-4 * np.abs(want).max()


def test_fid_command_line(tmp_path, capsys):
    """Usage without arguments; errors are one line with the nearest flag, exit status 2."""
    fid.main([])
    assert "GENERATED REFERENCE" in capsys.readouterr().out
    npz = write_npz(tmp_path / "a.npz", *data.glyphs(150, seed=5))
    fid.main([f"{npz},{npz}", "glyphs", "--features", "glyphs", "--device", "cpu", "--batch", "50"])
    out = capsys.readouterr().out
    assert "FD-glyphs" in out and "sets 2" in out and "glyphs:1" in out
    raises(lambda: fid.main([npz, npz]), "inception_v3_google-0cc3c7bd.pth")
    raises(lambda: fid.main([npz]), "REFERENCE", "--save_stats")
    raises(lambda: fid.main([f"{npz},{npz}", "--save_stats", "a.npz"]), "one set", "got 2")
    done = run("fid.py", npz, "glyphs", "--featurs", "glyphs", cwd=HERE)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--features" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_fid_benchmark_prints_its_tables(capsys):
    """The comparisons run, at a small size: both Frechet distances are right, and four ways through the network are timed."""
    fid.benchmark_distance(48)
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.split()[2]) for line in lines if " error " in line]
    assert len(errors) == 2 and max(map(abs, errors)) < 1e-9 and "times as long" in lines[-1]
    assert fid.benchmark_extraction(torch.device("cpu"), 1, 1) > 0
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "as built", "as built, 8 at once", "folded, channels-last", "the same, 8 at once"]


RANKS = """
import json, os, sys, torch, torch.distributed as dist
import data, fid
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rank, net = dist.get_rank(), fid.glyph_net()
net.metrics = fid.METRICS  # IS also depends on the order of the images
images, labels = data.glyphs(301, seed=5)
mine = slice(0, 101) if rank == 0 else slice(101, None)
scores = [fid.score_glyphs(images[mine], labels[mine]),
          fid.score_glyphs(images[:301 * (1 - rank)]),
          fid.evaluate(sys.argv[3], "glyphs", net, subset=131, batch=50, device="cpu"),
          [indices for indices, *_ in fid.from_dataset(sys.argv[3], fid.Config(batch=50), "generated").batches]]
print(json.dumps(scores))
dist.destroy_process_group()
"""


def test_fid_two_processes_equal_one(tmp_path):
    """Two gloo processes get the scores of one: to 1e-10 where they cut the batches themselves, to float32 where each
    brings a share of its own, one of them empty. Only one trains."""
    images, labels = data.glyphs(301, seed=5)
    npz = write_npz(tmp_path / "a.npz", images, labels)
    command = [sys.executable, "-c", RANKS, str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, rank, npz], cwd=HERE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)}) for rank in "01"]
    got = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in ranks]
    lists = [list(range(start, min(start + 50, 301))) for start in range(0, 301, 50)]
    assert got[0][:3] == got[1][:3] and sorted(got[0][3] + got[1][3]) == lists  # whole batches, as one process has them
    for two, one in zip(got[0], [fid.score_glyphs(images, labels), fid.score_glyphs(images)]):
        assert two.keys() == one.keys() and two["n"] == one["n"] and two["accuracy"] == one["accuracy"]
        for key in ("fd_glyphs", "floor"):
            assert abs(two[key] / one[key] - 1) < 1e-6, key  # batches differ, so float32 features do
    net = fid.glyph_net()
    net.metrics = fid.METRICS
    one, two = fid.evaluate(npz, "glyphs", net, subset=131, batch=50, device="cpu"), got[0][2]
    assert two["n"] == 131 and len(values(two)) == 8
    for name, value in values(one).items():
        assert abs(values(two)[name] - value) <= 1e-10 * abs(value), name


# --------------------------------------------------------------------------------------------------------------------
# train.py
# --------------------------------------------------------------------------------------------------------------------


def checkpoint(out) -> dict:
    return torch.load(Path(out) / "last.pt", weights_only=True)


def assert_same_state(a, b) -> None:
    a, b = checkpoint(a), checkpoint(b)
    assert a["step"] == b["step"]
    for part in ("networks", "ema"):
        assert same(a[part], b[part]), part


ROLE_SETTINGS = {"fm": {}, "meanflow": dict(jumps=0.5, omega=0.8, kappa=0.4, time_mean=-0.4, time_std=1.0),
                 "imf": dict(jumps=0.5, head=1, omega_max=4.0, time_mean=-0.4), "soflow": dict(jumps=0.5, kappa=0.5),
                 "shortcut": dict(jumps=0.5, time="uniform", omega=2.0), "ect": {}, "scm": {},
                 "cafm": dict(d_steps=2, d_warmup=1), "afm": dict(ot=0.1, ot_end=0.1, beta1=0.0),
                 "cat": dict(augment=0.5, beta1=0.0, lr=1e-3), "classifier": dict(augment=0.4),
                 "pafm": dict(candidates=3, bank=8), "carflow": {}, "repa": dict(encoder=SMALL_ENCODER),
                 "reg": dict(encoder=SMALL_ENCODER)}  # all roles soon


@pytest.mark.parametrize("loss, accumulation", [("fm", 1), ("fm", 2), ("meanflow", 2), ("cafm", 1), ("cafm", 2), ("afm", 1), ("cat", 2)])
def test_train_resume_is_bitwise(tmp_path, loss, accumulation):
    """10 steps, and 5 + resume + 5, give the same weights, EMA and optimizer state of every network, bit for bit, and
    one log."""
    a, b = tmp_path / "a", tmp_path / "b"
    options = dict(loss=loss, accumulation=accumulation, **ROLE_SETTINGS[loss])
    train.train(tiny_run(a, **options))
    train.train(tiny_run(b, steps=5, **options))
    assert checkpoint(b)["step"] == 5
    train.train(tiny_run(b, resume=True, **options))
    assert_same_state(a, b)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"]
    if loss == "fm":
        assert [r["step"] for r in logs[1]] == [2, 4, 5, 6, 8, 10]
    if loss == "afm":
        assert checkpoint(a)["networks"]["D"]["weights"]["gradient_square"] > 0


def test_train_sigterm_saves_and_resumes_bitwise(tmp_path):
    """SIGTERM finishes the step, saves and exits 0; the resumed run equals the one that was never stopped; with two
    processes as well, where it is enough that one of them is told."""
    processes = (1, 2) if sys.platform == "linux" else (1,)  # /proc names torchrun's workers
    started = {n: start_endless_run(tmp_path / f"stopped{n}", n) for n in processes}
    for n, process in started.items():
        out, deadline = tmp_path / f"stopped{n}", time.time() + 120
        while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text()) < 300:
            assert process.poll() is None and time.time() < deadline, process.stderr.read()
            time.sleep(0.05)
        told = process.pid
        if n == 2:  # tell one worker, not torchrun
            lists = Path(f"/proc/{process.pid}/task").glob("*/children")
            told = max(int(pid) for children in lists for pid in children.read_text().split())
        os.kill(told, signal.SIGTERM)
        text, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "stopped by a signal" in text, (text, errors)
    for n in processes:
        out = tmp_path / f"stopped{n}"
        step = checkpoint(out)["step"]
        assert step < 100000
        settings = dict(model="glyph-S", batch=8, warmup=100, sample_every=0, score=0, steps=step + 3, decay="constant")
        train.train(tiny_run(out, resume=True, **settings))
        train.train(tiny_run(tmp_path / f"whole{n}", **settings))
        if n == 1:
            assert_same_state(out, tmp_path / "whole1")
        for a, b in zip(checkpoint(out)["ema"].values(), checkpoint(tmp_path / f"whole{n}")["ema"].values()):
            assert (a - b).abs().max() < 1e-3  # float32: two processes add in another order


def start_endless_run(out: Path, processes: int) -> subprocess.Popen:
    flags = ["--steps", "100000", "--batch", "8", "--log_every", "1", "--sample_every", "0", "--score", "0",
             "--device", "cpu", "--decay", "constant", "--out", str(out), "--data", str(SMALL_SET)]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    return subprocess.Popen([sys.executable, *start, str(HERE / "train.py"), *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SPLITS = {"fm": ((1, 4), (2, 1), (2, 2)), "afm": ((2, 1),)}  # (processes, accumulation); afm refuses accumulation
SPLITS |= dict.fromkeys(("imf", "soflow", "shortcut", "ect", "scm", "repa", "reg"), ((2, 1),))  # quicker, and meanflow does both
SEVERAL = """
import os, sys, torch
sys.path.insert(0, {here!r})
import test_all
torch.set_num_threads(1)
if "RANK" in os.environ:
    test_all.two_process_runs({folder!r})
else:
    test_all.one_process_runs({folder!r})
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__])
"""


def splits_of(loss) -> list:
    """(processes, accumulation, sharded) of runs that are alike; sharded ones accumulate where others do, but cat (slow).

    Four call networks as others do, and are sharded in no test.
    """
    splits = SPLITS.get(loss, ((2, 2),))
    sharded = [] if loss in ("pafm", "shortcut", "ect", "classifier") else [(2, 1 if loss == "cat" else splits[-1][1], True)]
    return [(1, 1, False), *((*split, False) for split in splits), *sharded]


@contextlib.contextmanager
def in_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def float64_run(folder, loss, processes, accumulation, shard) -> None:
    """A run in the folder LOSS/(PROCESSES, ACCUMULATION, SHARD): AdamW, EMA and clipping, 12 steps of cafm, 7 of others with a D, 5.

    soflow's steps are of two images, so that a process may have no jump in its share; carflow's sharded blocks recompute.
    """
    steps, batch = 12 if loss == "cafm" else 7 if losses.LOSSES[loss].D else 5, 2 if loss == "soflow" else 8
    with in_float64():
        train.train(tiny_run(Path(folder) / loss / str((processes, accumulation, shard)), data=str(Path(folder) / "glyphs.npz"),
                             steps=steps, batch=batch, loss=loss, accumulation=accumulation, shard=shard,
                             recompute=shard and loss == "carflow", **ROLE_SETTINGS[loss]))


def reload_run(folder, name, **options) -> None:
    """Six steps of cafm, D going back to its third at the last, and G to its average twice."""
    with in_float64():
        train.train(tiny_run(Path(folder) / name, data=str(Path(folder) / "glyphs.npz"), loss="cafm", steps=6, log_every=1,
                             keep_every=3, schedule="5: d_reload=3", ema_reload=3, **ROLE_SETTINGS["cafm"] | options))


def one_process_runs(folder) -> None:
    for loss in losses.LOSSES:
        for split in splits_of(loss):
            if split[0] == 1:
                float64_run(folder, loss, *split)
    reload_run(folder, "one")
    (Path(folder) / "one, then sharded").mkdir()
    for name in ("last.pt", "step_0000003.pt"):
        shutil.copyfile(Path(folder) / "one/step_0000003.pt", Path(folder) / "one, then sharded" / name)


def two_process_runs(folder) -> None:
    for loss in losses.LOSSES:
        for split in splits_of(loss):
            if split[0] == 2:
                float64_run(folder, loss, *split)
    reload_run(folder, "sharded", shard=True)
    reload_run(folder, "one, then sharded", shard=True, resume=True)


@pytest.fixture(scope="session", autouse=True)
def runs_behind(request, tmp_path_factory):
    """(folder, process) of the runs of `split_runs`, which are made beside the first tests: they take most of a minute."""
    if not any("split_runs" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("split")
    shutil.copyfile(SMALL_SET, folder / "glyphs.npz")
    (folder / "run.py").write_text(SEVERAL.format(here=str(HERE), folder=str(folder)))
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, str(folder / "run.py")], stdout=output, stderr=output,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    yield folder, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def split_runs(runs_behind):
    """The folder of one run for every objective and split; those of two processes share one start of torchrun."""
    folder, process = runs_behind
    assert process.wait(timeout=400) == 0, (folder / "output.txt").read_text()[-3000:]
    return folder


def assert_close_runs(a: Path, b: Path) -> None:
    """The same checkpoint but for 1e-9, of the same layout; the same losses and gradient norms in the log."""
    trees = [torch.utils._pytree.tree_flatten_with_path({k: checkpoint(run)[k] for k in ("step", "ema", "networks")})[0] for run in (a, b)]
    assert [path for path, _ in trees[0]] == [path for path, _ in trees[1]], b
    for (path, x), (_, y) in zip(*trees):
        assert type(x) is type(y), (b, path)
        assert (x.shape == y.shape and (x - y).abs().max() < 1e-9) if torch.is_tensor(x) else x == y, (b, path)
    logs = [{row["step"]: row for row in train.read_log(run / "log.jsonl")} for run in (a, b)]
    assert max(logs[0]) == max(logs[1])
    for step, row in logs[1].items():
        assert abs(row["loss"] - logs[0][step]["loss"]) < 2e-6, (b, step)
        assert abs(row["grad_norm"] - logs[0][step]["grad_norm"]) < 1e-5, (b, step)


@pytest.mark.parametrize("loss", list(losses.LOSSES))
def test_train_two_processes_equal_one(split_runs, loss):
    """After 5 to 12 steps in float64 with AdamW, EMA and clipping, two gloo processes, sharded or not, have the weights, averages and
    optimizers of one process to 1e-9, with and without accumulation, and log the same losses; accumulation alone changes
    nothing either."""
    whole = split_runs / loss / "(1, 1, False)"
    for split in splits_of(loss)[1:]:
        assert_close_runs(whole, split_runs / loss / str(split))
    start, weights = tiny_run("", loss=loss, **ROLE_SETTINGS[loss]), checkpoint(whole)["networks"]["G"]["weights"]
    source, device = data.dataset(str(SMALL_SET), 32), torch.device("cpu")
    with in_float64():
        fresh = train.build(start, source, device, train.load_features(start, source, False, device)).state_dict()
    assert (weights["blocks.0.attn.qkv.weight"] - fresh["blocks.0.attn.qkv.weight"]).abs().max() > 1e-4  # it learned


def test_train_sharded_goes_on(split_runs, capsys):
    """Six steps of cafm, with D and G taken back, equal three on one process and three sharded on two, and the other way round;
    sharded processes draw the same picture."""
    back = split_runs / "sharded, then one"
    shutil.copytree(split_runs / "sharded", back)
    shutil.copyfile(back / "step_0000003.pt", back / "last.pt")
    reload_run(split_runs, back.name, shard=True, resume=True)
    assert "--shard: one process holds everything; torchrun" in capsys.readouterr().err
    for run in (split_runs / "sharded", split_runs / "one, then sharded", back):
        assert_close_runs(split_runs / "one", run)
    pictures = [np.array(Image.open(split_runs / run / "samples/final.png")).astype(int) for run in ("one", "sharded")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("loss", ["cafm", "afm", "cat"])
def test_train_moves_one_network_at_a_time(tmp_path, loss, monkeypatch):
    """A step of D leaves G and its EMA bit for bit where they were, and the other way round; positions never train."""
    states = []

    def note(path, step, seconds, cfg, nets, opts, ema):
        assert all(p.grad is None for net in nets.values() for p in net.parameters()), "left over for the next turn"
        states.append({role: {k: v.clone() for k, v in net.state_dict().items()}
                       for role, net in (*nets.items(), ("ema", ema))})

    monkeypatch.setattr(train, "save_checkpoint", note)
    cfg = tiny_run(tmp_path / "run", loss=loss, steps=6, save_every=1, log_every=1, ema=0.2, **ROLE_SETTINGS[loss])
    train.train(cfg)
    turns = [losses.LOSSES[loss].turn(step, cfg) for step in range(1, 6)]
    assert set(turns) == {"D", "G"}
    for step, (before, after, role) in enumerate(zip(states, states[1:], turns), 1):
        if role == "G":
            share = 1 - min(cfg.ema, (1 + step) / (10 + step))
            for key, value in after["ema"].items():
                assert torch.allclose(value, before["ema"][key].lerp(after["G"][key], share), atol=1e-7), key
        moved = {name for name in before for k in before[name]
                 if k != "gradient_square" and not torch.equal(before[name][k], after[name][k])}
        assert moved == ({"D"} if role == "D" else {"G", "ema"})
        assert all(torch.equal(before[name]["pos_embed"], after[name]["pos_embed"]) for name in before)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {row["role"] for row in rows} == {"D", "G"} and all("grad_norm" in row for row in rows)


def test_train_discriminator_starts_from_the_generator(tmp_path, capsys):
    """--init: D has the generator's trunk and a fresh token and head; --d_init: the D of a run, or of an official file,
    whose time is turned; without --init cafm says that it will be slow."""
    train.train(tiny_run(tmp_path / "fm", steps=3))
    capsys.readouterr()
    cfg = tiny_run(tmp_path / "cafm", loss="cafm", steps=1, lr=1e-9, init=str(tmp_path / "fm"))
    train.train(cfg)
    assert "scratch" not in capsys.readouterr().err
    D, ema = checkpoint(tmp_path / "cafm")["networks"]["D"]["weights"], checkpoint(tmp_path / "fm")["ema"]
    for key, value in ema.items():
        assert key.startswith("final_layer") or (D[key] - value).abs().max() < 1e-8, key
    assert D["final_layer.1.weight"].abs().max() > 0.01 and D["dis_embed"].std() > 0.01
    train.train(tiny_run(tmp_path / "more", loss="cafm", steps=1, lr=1e-9, d_init=str(tmp_path / "cafm")))
    assert "from scratch" in capsys.readouterr().err
    again = checkpoint(tmp_path / "more")["networks"]["D"]["weights"]
    assert all((again[key] - D[key]).abs().max() < 1e-8 for key in D)
    net = tiny(cls=model.Discriminator)
    torch.save({k: v for k, v in net.state_dict().items() if k != "gradient_square"}, tmp_path / "official.pt")
    turned = tiny(cls=model.Discriminator)
    turned.load_state_dict(model.discriminator_weights(tmp_path / "official.pt"))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([.2, .9]), torch.tensor([1, 2])
    assert (turned(x, t, y) - net(x, 1 - t, y)).abs().max() < 1e-5 and (turned(x, t, y) - net(x, t, y)).abs().max() > 1e-3

    run = lambda **options: train.train(tiny_run(tmp_path / "no", loss="cafm", **options))  # noqa: E731
    raises(lambda: run(d_init=str(tmp_path / "fm")), "without a discriminator", "cafm")
    raises(lambda: run(d_init=str(tmp_path / "official.pt")), "weights of another network", "official.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "nothing.pt")
    raises(lambda: run(d_init=str(tmp_path / "nothing.pt")), "dis_embed is missing")
    raises(lambda: run(d_init=str(tmp_path / "absent.pt")), "absent.pt")
    raises(lambda: run(d_steps=0), "--d_steps 0")
    raises(lambda: run(route="finite", interval=0.0), "--interval 0")
    raises(lambda: run(shard=True, route="forward"), "--shard", "--route reverse")
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="afm", nfe=-1)), "--nfe -1")
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="afm", nfe=2, repeats=2)), "--nfe 2 --repeats 2", "one jump")
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="afm", accumulation=2)), "--accumulation 1")
    raises(lambda: train.train(tiny_run(tmp_path / "cafm", loss="fm", resume=True)), "--loss cafm", "--init")


def test_train_says_when_the_discriminator_wins(tmp_path, capsys):
    """A mean loss of D below the method's alarm is told once."""
    log = train.Log(tmp_path / "log.jsonl", alarm=0.2)
    for step, value in ((0, 1.9), (1, 0.1), (2, 0.05)):
        log.note(step, "D", {"loss": torch.tensor(value)}, 0.1)
        log.note(step, "G", {"loss": torch.tensor(0.01)}, 0.2)
        log.flush(train.Config())
    told = capsys.readouterr().err
    assert told.count("the discriminator wins") == 1 and "step 2" in told and "0.100" in told and "--d_lr" in told
    assert [(row["role"], row["lr"]) for row in train.read_log(tmp_path / "log.jsonl")] == [("D", 0.1), ("G", 0.2)] * 3
    assert losses.LOSSES["cafm"].alarm > 0 and losses.LOSSES["afm"].alarm > 0


def test_train_methods_bring_their_settings(tmp_path, capsys):
    """--loss NAME takes the paper's settings where no flag is given, shown by --help; a resumed run keeps its own."""
    out = tmp_path / "run"
    flags = f"--loss afm --out {out} --data {SMALL_SET} --steps 2 --batch 8 --score 0 --sample_every 0 --device cpu".split()
    train.main([*flags, "--ot", "0.3"])
    config = checkpoint(out)["config"]
    assert config["beta1"] == 0 and config["ot"] == 0.3 and config["cp"] == 0.01 and config["label_drop"] == 0
    train.main(["--resume", "--out", str(out), "--steps", "3"])
    assert checkpoint(out)["step"] == 3 and checkpoint(out)["config"]["loss"] == "afm"
    with pytest.raises(SystemExit):
        train.main(["--loss", "cafm", "--help"])
    assert re.search(r"--beta1 .*\(default:\s+0.0\)", " ".join(capsys.readouterr().out.split()))
    rate = lambda role, **options: train.learning_rate(50, train.Config(lr=1.0, warmup=1, decay="constant", **options), role)  # noqa: E731
    assert rate("D") == rate("G") == 1 and rate("D", d_lr=0.5) == 0.5 and rate("G", d_lr=0.5) == 1


def test_train_presets(tmp_path, capsys):
    """Each preset fits its network and method; it stands behind flags and before the method's defaults, and is printed with
    its source; a small run with one of them trains."""
    for name, (source, settings) in train.PRESETS.items():
        cfg = train.Config(**losses.LOSSES[settings["loss"]].defaults | settings)
        train.check(cfg)
        assert "arXiv:" in source and settings.keys() <= vars(cfg).keys()
        options = losses.LOSSES[cfg.loss].generator(dataclasses.asdict(cfg))
        with torch.device("meta"):
            net = model.create(cfg.model, **options | ({"predict": cfg.predict} if cfg.predict else {}))
        assert net.predict == ("x" if cfg.model.startswith("JiT") or "1nfe" in name or "layer" in name else "v"), name
    cfg = train.Config(**losses.LOSSES["cafm"].defaults | train.PRESETS["cafm-sit-xl2"][1])
    turns = [losses.cafm_turn(step, cfg) for step in range(cfg.steps)]
    assert turns.count("G") == 2353 and train.learning_rate(20, cfg, "D") == 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ZOO, "JiT-B/16", model.ZOO["JiT-B/16"] | dict(patch=8, width=32, depth=3, heads=2, context_start=1))
        train.main(f"--preset jit-b16-imagenet256 --data {SMALL_SET} --size 32 --batch 4 --steps 1 --device cpu --sample_steps 1 "
                   f"--out {tmp_path / 'run'}".split())
    out, config = capsys.readouterr().out, checkpoint(tmp_path / "run")["config"]
    assert "JiT, arXiv:2511.13720" in out and "--lr 0.0002" in out and "--batch 4" in out
    assert config["beta2"] == 0.95 and config["batch"] == 4 and config["ema"] == 0.9999 and config["time_mean"] == 0.8
    raises(lambda: train.main(["--preset", "dit"]), "--preset dit", "cafm-sit-xl2")
    capsys.readouterr()
    raises(lambda: train.main(["--preset", "afm-xl2-1nfe", "--accumulation", "2", "--device", "cpu"]), "--accumulation 2")
    assert "--lr 0.0001" in capsys.readouterr().out  # before the 0.0005 of --loss afm


def test_train_afm_samples_by_its_own_jumps(tmp_path, capsys):
    """A run of jumps is sampled, in the loop and by sample.py, in its own number of steps; other flags are refused."""
    out = tmp_path / "run"
    train.train(tiny_run(out, loss="afm", nfe=2, steps=2))
    sample.main([str(out), "--n", "4", "--out", str(tmp_path / "a.png")])
    assert "euler, 2 steps, 2 network evaluations, no guidance" in capsys.readouterr().out
    raises(lambda: sample.main([str(out), "--steps", "4"]), "--steps 4", "it is 2")
    raises(lambda: sample.main([str(out), "--guidance", "2"]), "--guidance 2", "it is 1")
    net = model.load(out / "last.pt")
    labels = sample.labels_for(4, 10)
    (_, made), = sample.generate(net, labels, 0, steps=2, solver="euler")
    with torch.no_grad():
        x, half = data.Draws(0, range(4)).normal("sample noise", net.shape), torch.full((4,), .5)
        x = losses.jump(net, x, 2 * half, half, labels)
        x = losses.jump(net, x, half, 0 * half, labels)
    assert torch.equal(data.to_uint8(x), made)
    assert train.sampling(train.Config(loss="afm", nfe=2), 1.5)["guidance"] == 1 and train.sampling(train.Config(), 1.5)["guidance"] == 1.5


def test_train_afm_any_steps_deep_and_guided(tmp_path, capsys):
    """--nfe 0: one network for any number of steps. --repeats: a deep generator at a fraction of the learning rate, with
    an ordinary D. --classifier: a frozen guide, from a run that makes no images. From a flow, the network at t = 1."""
    run = lambda name, **options: train.train(tiny_run(tmp_path / name, **dict(loss="afm", steps=2) | options))  # noqa: E731
    networks = lambda name: {k: v["config"] for k, v in checkpoint(tmp_path / name)["networks"].items()}  # noqa: E731
    run("any", nfe=0)
    assert networks("any")["G"]["times"] == 2 and networks("any")["D"]["times"] == 1
    assert networks("any")["D"]["norm"] == "layer"
    for steps in (1, 3):
        sample.main([str(tmp_path / "any"), "--steps", str(steps), "--n", "4", "--out", str(tmp_path / "a.png")])
        assert f"euler, {steps} steps" in capsys.readouterr().out
    raises(lambda: sample.main([str(tmp_path / "any"), "--solver", "heun"]), "--solver heun", "euler")
    run("deep", repeats=3)
    assert networks("deep")["G"]["repeats"] == 3 and networks("deep")["D"]["repeats"] == networks("deep")["D"]["times"] == 0
    cfg = tiny_run("", lr=0.3, repeats=3, warmup=0)
    assert train.learning_rate(5, cfg) == 0.3 / 3 and train.learning_rate(5, cfg, "D") == 0.3
    raises(lambda: run("deep", repeats=2, steps=3, resume=True), "--repeats 3")

    run("judge", loss="classifier", augment=0.4, score=10)
    assert not (tmp_path / "judge/samples/final.png").exists() and "scores" not in json.loads((tmp_path / "judge/final.json").read_text())
    raises(lambda: sample.main([str(tmp_path / "judge")]), "judge", "makes no images")
    judge, out = str(tmp_path / "judge"), tmp_path / "best.npz"
    sample.main([str(tmp_path / "any"), "--steps", "1", "--n", "6", "--best_of", "3", "--verifier", judge, "--out", str(out)])
    assert "best of 3 noises" in capsys.readouterr().out
    sample.main([str(tmp_path / "any"), "--steps", "1", "--n", "6", "--out", str(tmp_path / "first.npz")])
    C, score = model.load(tmp_path / "judge/last.pt"), {}
    for name in ("best", "first"):
        with np.load(tmp_path / f"{name}.npz") as file, torch.no_grad():
            x = data.to_float(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))
            score[name] = -nn.functional.cross_entropy(C(x, torch.zeros(6)), torch.from_numpy(file["arr_1"]), reduction="none")
    assert score["best"].mean() > score["first"].mean()
    raises(lambda: sample.main([str(tmp_path / "any"), "--best_of", "3"]), "--best_of 3", "both")
    raises(lambda: sample.main([str(tmp_path / "any"), "--best_of", "3", "--verifier", str(tmp_path / "any")]), "--verifier")
    run("small", loss="fm", steps=1)
    run("large", loss="fm", steps=1)
    capsys.readouterr()
    sample.main([str(tmp_path / "large"), "--steps", "4", "--n", "2", "--stitch", str(tmp_path / "small"), "--out", str(tmp_path / "a.png")])
    assert "those at t > 0.6 of" in capsys.readouterr().out
    run("guided", classifier=str(tmp_path / "judge"))
    assert {row["role"]: "surprise" in row for row in train.read_log(tmp_path / "guided/log.jsonl")} == {"D": False, "G": True}
    raises(lambda: run("no", classifier=str(tmp_path / "deep")), "--classifier", "--loss classifier")
    raises(lambda: run("no", loss="fm", classifier=str(tmp_path / "judge")), "--loss afm")
    raises(lambda: run("no", classifier=str(tmp_path / "absent")), "absent")

    run("flow", loss="fm", predict="v")
    run("from", init=str(tmp_path / "flow"), predict="v", lr=1e-9, steps=1)
    flow, made = model.load(tmp_path / "flow/last.pt"), model.load(tmp_path / "from/last.pt", ema=False)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    with torch.no_grad():
        assert made.times == 0 and torch.allclose(made(x, torch.ones(2), y), flow(x, torch.ones(2), y), atol=1e-4)


def test_train_schedule(tmp_path, capsys):
    """Entries change settings from their step on; ema_reload puts the averaged weights into G; d_reload brings back D as it
    was kept. A run resumed amid all this equals one that was not stopped. What cannot be read or done is refused."""
    text = "4: lr=0.5 ot=0.3, ot_end=0.3; 2: lr=0.2"
    cfg = tiny_run("", lr=1.0, warmup=0, loss="afm", ot=0.1, ot_end=0.1, schedule=text)
    assert [train.learning_rate(k, train.scheduled(cfg, k)) for k in range(6)] == [1, 1, .2, .2, .5, .5]
    seen = []
    objective = lambda net, x, y, draws, cfg: seen.append((cfg.ot, cfg.lr)) or (x.sum(), {})  # noqa: E731
    for start in (3, 4):
        train.Loss(objective, nn.Module(), cfg)(torch.zeros(2, 1, dtype=torch.uint8), None, [cfg.batch * start, cfg.batch * start + 1])
    assert seen == [(0.1, 0.2), (0.3, 0.5)]

    options = dict(loss="afm", steps=8, keep_every=2, save_every=5, lr=1e-3, log_every=1,
                   schedule="6: d_reload=4 ema_reload=8 d_lr=1e-12")
    a, b = tmp_path / "a", tmp_path / "b"
    train.train(tiny_run(a, **options))
    assert sorted(p.name for p in a.glob("step_*.pt")) == [f"step_000000{k}.pt" for k in (2, 4, 6, 8)]
    kept = [torch.load(a / f"step_000000{k}.pt", weights_only=True) for k in (4, 6, 8)]
    D = [k["networks"]["D"]["weights"]["dis_embed"] for k in kept]
    assert torch.allclose(D[2], D[0], atol=1e-9) and (D[1] - D[0]).abs().max() > 1e-4
    assert same(kept[2]["networks"]["G"]["weights"], kept[2]["ema"]) and not same(kept[1]["networks"]["G"]["weights"], kept[1]["ema"])
    train.train(tiny_run(b, **options | dict(steps=5)))
    train.train(tiny_run(b, resume=True, **options))
    assert_same_state(a, b)
    assert model.load(a / "step_0000004.pt").times == 0

    run = lambda schedule, **more: train.train(tiny_run(tmp_path / "no", **dict(loss="afm", schedule=schedule) | more))  # noqa: E731
    raises(lambda: run("4 lr=1"), "'4 lr=1'", "STEP: NAME=VALUE")
    raises(lambda: run("4: lr=x"), "lr=x")
    raises(lambda: run("4: model=2"), "model", "ot_end")
    raises(lambda: run("4: d_reload=2"), "d_reload=2", "--keep_every (0)")
    raises(lambda: run("4: d_reload=6", keep_every=2), "step 6 is not kept before step 4")
    raises(lambda: run("4: d_reload=2", keep_every=2, loss="fm"), "no discriminator")
    assert not (tmp_path / "no").exists()


def test_train_one_step_runs_know_how_they_are_sampled(tmp_path, capsys):
    """sample.py takes the solver and the number of steps from the run, and another number on request; guidance only where
    the network was told it; a flow's weights start each method as that flow."""
    train.train(tiny_run(tmp_path / "fm", steps=1))
    options = dict(init=str(tmp_path / "fm"), steps=1, lr=0.0)
    for loss, solver in (("meanflow", "euler"), ("imf", "euler"), ("ect", "renoise")):
        out = tmp_path / loss
        train.main(["--loss", loss, *(f"--{k}={v}" for k, v in dataclasses.asdict(tiny_run(out, **options)).items()
                                      if k in ("out", "data", "batch", "init", "steps", "lr", "sample_every", "score", "device", "model"))])
        flow, net = (model.load(folder / "last.pt") for folder in (tmp_path / "fm", out))
        x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([.3, .8]), torch.tensor([1, 10])
        assert torch.equal(net(x, t, y, t / 2), flow(x, t, y)), loss
        flags, told = [str(out), "--n", "2", "--out", str(tmp_path / "a.png")], capsys.readouterr() and []
        for steps in ([], ["--steps", "2"]):
            sample.main(flags + steps)
            told.append(capsys.readouterr().out)
        assert f"{solver}, 1 steps" in told[0] and f"{solver}, 2 steps" in told[1]
        other = "ab2" if solver == "renoise" else "heun"
        raises(lambda: sample.main(flags + ["--solver", other]), f"--solver {other}", f"it is {solver}")
        if loss == "imf":
            sample.main(flags + ["--guidance", "3"])
            assert "guidance 3" in capsys.readouterr().out
        else:
            raises(lambda: sample.main(flags + ["--guidance", "3"]), "--guidance 3", "it is 1")
            raises(lambda: sample.main(flags + ["--reference", str(tmp_path / "fm")]), "--reference", "guidance 1 is none")
    raises(lambda: sample.main([str(tmp_path / "fm"), "--solver", "renoise"]), "renoise")

    run = lambda **options: train.train(tiny_run(tmp_path / "no", **options))  # noqa: E731
    raises(lambda: run(loss="meanflow", jumps=0.95), "--jumps 0.95", "--label_drop 0.1")
    raises(lambda: run(loss="meanflow", kappa=1.0), "--kappa 1.0")
    raises(lambda: run(loss="soflow", omega=2.0, label_drop=0.0), "--omega 2.0", "dropped labels")
    raises(lambda: run(loss="imf", omega_max=0.5), "--omega_max 0.5")
    raises(lambda: run(loss="imf", head=9), "head of 9")
    raises(lambda: run(loss="shortcut", finest=12), "--finest 12")
    raises(lambda: run(loss="scm", data_std=0.0), "--data_std 0.0")
    raises(lambda: train.train(tiny_run(tmp_path / "imf", loss="imf", head=2, omega_max=4.0, resume=True)), "--head 1")


def test_train_cat_is_one_pass_of_stages(tmp_path, capsys):
    """A cat run samples in one call, whose result is the last stage; sample.py --stages draws all of them; --init takes
    the generator of another cat run and leaves D fresh; what cannot be is refused."""
    out, picture = tmp_path / "run", tmp_path / "stages.png"
    train.main(f"--loss cat --out {out} --data {SMALL_SET} --steps 2 --batch 8 --score 0 --sample_every 0 "
               f"--device cpu".split())
    config = checkpoint(out)["config"]
    assert config["beta1"] == 0 and config["beta2"] == 0.99 and config["label_drop"] == 0 and config["gp"] > 0
    net, labels = model.load(out / "last.pt"), sample.labels_for(3, 10)
    (_, made), = sample.generate(net, labels, 5, steps=1, solver="euler")
    with torch.no_grad():
        h = net.stages(data.Draws(5, range(3)).normal("sample noise", net.shape), labels)
    assert (data.to_uint8(h[-1]).int() - made.int()).abs().max() <= 1
    capsys.readouterr()
    sample.main([str(out), "--n", "3", "--seed", "5", "--stages", "--out", str(picture)])
    assert "3 stages" in capsys.readouterr().out
    shown = np.asarray(Image.open(picture)).transpose(2, 0, 1)[:, 2:66:2, 134:198:2]  # first row, last tile
    assert np.array_equal(shown, data.to_uint8(h[-1, :1]).numpy()[0])
    save_tiny(tmp_path / "fm.pt")
    raises(lambda: sample.main([str(tmp_path / "fm.pt"), "--stages", "--out", str(picture)]), "--stages", "DiT")
    raises(lambda: sample.main([str(out), "--stages", "--out", "a.npz"]), "--stages", "a.npz")
    raises(lambda: sample.main([str(out), "--steps", "4"]), "--steps 4", "it is 1")

    run = lambda name="no", **options: train.train(tiny_run(tmp_path / name, **dict(loss="cat", model="glyph-S") | options))  # noqa: E731
    run("more", steps=1, lr=1e-9, init=str(out))
    more, before = checkpoint(tmp_path / "more")["networks"], checkpoint(out)
    assert all((more["G"]["weights"][k] - v).abs().max() < 1e-7 for k, v in before["ema"].items())
    assert not torch.equal(more["D"]["weights"]["dis_embed"], before["networks"]["D"]["weights"]["dis_embed"])
    raises(lambda: run(stages=1), "--stages 1")
    raises(lambda: run(augment=1.5), "--augment 1.5")
    raises(lambda: run(stages=4), "halved 3 times", "fewer stages")
    raises(lambda: run("run", resume=True, stages=2), "--stages 3")
    raises(lambda: run(init=str(tmp_path / "fm.pt")), "weights of another network")


def test_train_compares_objectives(tmp_path, capsys, monkeypatch):
    """--compare trains each objective in a folder of its own, scores it where it can be sampled, draws a row for each and
    prints a table; a second call finds it all done; one that was stopped goes on."""
    monkeypatch.setattr(train, "EVALUATIONS", (1, 3))
    flags = (f"--compare fm,afm,carflow --out {tmp_path} --data {SMALL_SET} --batch 8 --score 20 --sample_every 0 --device cpu "
             f"--log_every 1 --sample_steps 2 --guidance 1 --steps").split()
    train.main([*flags, "2"])
    table = json.loads((tmp_path / "compare.json").read_text())
    assert {name: list(row) for name, row in table.items()} == {"fm": ["1", "3"], "afm": ["1"], "carflow": ["1", "3"]}
    assert all(score["n"] == 20 and score["fd_glyphs"] > score["floor"] for row in table.values() for score in row.values())
    assert table["fm"]["1"] != table["fm"]["3"] and checkpoint(tmp_path / "afm")["config"]["beta1"] == 0
    out = capsys.readouterr().out
    assert re.search(r"fm +[\d.]+ / *[\d.]+ +[\d.]+ / *[\d.]+.*1.00x", out) and re.search(r"afm +[\d.]+ /.* - .*x", out)
    picture = Image.open(tmp_path / "compare.png")
    assert picture.size == (2 * 322 + 2, 3 * 48 + 2)
    assert np.asarray(picture)[50:80, 330:].min() == 255 > np.asarray(picture)[50:80, :320].min()     # afm has one column
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")}
    train.main([*flags, "2"])
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")}
    shutil.rmtree(tmp_path / "carflow")
    train.main([*flags, "2"])
    assert json.loads((tmp_path / "compare.json").read_text()) == table
    raises(lambda: train.main(["--compare", "fm,nothing", "--out", str(tmp_path)]), "nothing", "pafm")
    raises(lambda: train.main(["--compare", "classifier", "--out", str(tmp_path)]), "classifier", "pafm")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with the codec vae.bin and with SMALL_SET's latents and features."""
    folder = tmp_path_factory.mktemp("encoded")
    torch.manual_seed(0)
    torch.save(data.VAE((32, 32, 32, 32)).state_dict(), folder / "vae.bin")
    data.main(["encode", str(SMALL_SET), str(folder / "latents"), "--vae", str(folder / "vae.bin"), "--encoder", SMALL_ENCODER,
               *"--size 32 --batch 50 --workers 0 --device cpu".split()])
    return folder


def test_train_on_latents(tmp_path, encoded, capsys):
    """From latents to a run and its pictures: fm and pafm train on what encode wrote, sample.py and scores decode."""
    vae, latents = str(encoded / "vae.bin"), str(encoded / "latents")
    options = dict(data=latents, size=0, steps=2, predict="v", batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=2))
        train.train(tiny_run(tmp_path / "fm", vae=vae, **options))
        train.train(tiny_run(tmp_path / "pafm", loss="pafm", candidates=3, bank=4, **options))
        assert "no --vae" in capsys.readouterr().err and not (tmp_path / "pafm/samples/final.png").exists()
        for given in ({}, dict(vae=vae), dict(reference=str(SMALL_SET))):
            raises(lambda: train.train(tiny_run(tmp_path / "no", monitor=10, **given, **options)), "--monitor 10", "--reference")
    assert Image.open(tmp_path / "fm/samples/final.png").size[0] == 10 * 66 + 2
    net, labels = model.load(tmp_path / "fm/last.pt"), sample.labels_for(3, 10)
    assert net.shape == (4, 4, 4)
    sample.main([str(tmp_path / "fm"), "--vae", vae, "--n", "3", "--steps", "2", "--out", str(tmp_path / "s.npz"), "--guide_channels", "3"])
    assert "of the first 3 channels" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (3, 32, 32, 3)
    codec = data.load_vae(vae)
    (_, made), = sample.generate(net, labels, 0, codec=codec, steps=2)
    e = data.Draws(0, range(3)).normal("sample noise", net.shape)
    with torch.no_grad():
        want = data.to_uint8(codec.decode(sample.sample(net, e, labels, 2)))
    assert (want.int() - made.int()).abs().max() <= 1
    raises(lambda: sample.main([str(tmp_path / "fm"), "--n", "3"]), "--vae")
    with pytest.MonkeyPatch.context() as patch:  # --monitor scores decoded images
        patch.setattr(fid, "evaluate", lambda made, **how: dict(scores={}, shapes=[list(images.shape) for images in made]))
        train.monitor(net, train.Config(monitor=3, sample_steps=2), {}, 1, tmp_path / "scores.jsonl", codec)
    assert json.loads((tmp_path / "scores.jsonl").read_text())["shapes"] == [[3, 3, 32, 32]]
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    how = dict(features="glyphs", steps=1, num=12, device="cpu")
    found = fid.evaluate(str(tmp_path / "fm"), str(tmp_path / "real.npz"), vae=vae, **how)
    assert found["n"] == 12 and found["scores"]["fd_glyphs"]["value"] > 0
    raises(lambda: fid.evaluate(str(tmp_path / "fm"), str(tmp_path / "real.npz"), **how), "--vae")


@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_train_end_to_end(tmp_path, space, monkeypatch, capsys):
    """From class folders of JPEGs to a measured sample set, in latents and, with JiT's parts, in pixels: 20 steps of fm and, from
    it, of meanflow and cafm. Encoding and every training are stopped halfway and go on; each step is taken once."""
    for k in range(12):
        place = tmp_path / f"images/n{k % 3:08d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.glyphs(12, 48)[0][k].permute(1, 2, 0).numpy()).save(place / f"{k}.JPEG")
    torch.manual_seed(0)
    torch.save(data.VAE((32, 32, 32, 32)).state_dict(), tmp_path / "vae.pt")
    images, vae = str(tmp_path / "images"), ["--vae", str(tmp_path / "vae.pt")] if space == "latents" else []
    source = dict(data=images, size=32, model="JiT-S/16", workers=0)
    if space == "latents":
        flags = ["encode", images, str(tmp_path / "latents"), *vae, *"--size 32 --batch 5 --shard 5 --workers 0 --device cpu".split()]
        with monkeypatch.context() as patch:
            write, calls = data._encode_shard, []
            patch.setattr(data, "_encode_shard", lambda *args: calls.append(0) or write(*args) if not calls else signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                data.main(flags)
        assert "1 of 3" not in error_of(data.dataset, str(tmp_path / "latents")) and "2 of 3" in error_of(data.dataset, str(tmp_path / "latents"))
        data.main(flags)
        source = dict(data=str(tmp_path / "latents"), size=0, vae=vae[1])
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=2, depth=2, width=32, predict="v"))
    monkeypatch.setitem(model.ZOO, "JiT-S/16", model.ZOO["JiT-S/16"] | dict(patch=8, width=32, depth=3, heads=2, bottleneck=8, context=2, context_start=1))
    for loss in ("fm", "meanflow", "cafm"):
        out = tmp_path / loss
        cfg = tiny_run(out, loss=loss, steps=20, batch=4, log_every=1, **source | ({} if loss == "fm" else dict(init=str(tmp_path / "fm"))),
                       **{k: v for k, v in ROLE_SETTINGS[loss].items() if k != "d_warmup"})
        with monkeypatch.context() as patch:
            asked = iter([False] * 9 + [True])
            patch.setattr(train.StopSignal, "on_any_process", lambda stop: next(asked))
            assert train.train(cfg) == {} and checkpoint(out)["step"] == 10
        train.train(dataclasses.replace(cfg, resume=True))
        assert [row["step"] for row in train.read_log(out / "log.jsonl")] == list(range(1, 21))
        sample.main([str(out), *vae, "--n", "12", "--steps", "1" if loss == "meanflow" else "2", "--guidance", "1", "--out", str(out / "s.npz")])
        capsys.readouterr()
        fid.main([str(out / "s.npz"), images, *"--features glyphs --size 32 --device cpu --workers 0 --json".split()])
        found = json.loads(capsys.readouterr().out)
        assert found["n"] == found["n_ref"] == 12 and found["scores"]["fd_glyphs"]["value"] > 0
    D, ema = checkpoint(tmp_path / "cafm")["networks"]["D"]["config"], model.load(tmp_path / "cafm/last.pt")
    assert ema.num_classes == 3 and (D["norm"], ema.rope is None) == (("rms_weight", False) if space == "pixels" else ("rms", True))


def test_train_cafm_on_jit(tmp_path):
    """CAFM post-trains a network with JiT's parts from a run of it: D takes over all that both have, norms' weights too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ZOO, "JiT-S/16", model.ZOO["JiT-S/16"] | dict(patch=8, width=32, depth=3, heads=2, bottleneck=8, context=2, context_start=1))
        train.train(tiny_run(tmp_path / "fm", model="JiT-S/16", steps=2))
        train.train(tiny_run(tmp_path / "cafm", model="JiT-S/16", loss="cafm", init=str(tmp_path / "fm"), steps=1, lr=1e-9))
    D, ema = checkpoint(tmp_path / "cafm")["networks"]["D"], checkpoint(tmp_path / "fm")["ema"]
    assert D["config"]["norm"] == "rms_weight" and "blocks.0.norm1.weight" in ema
    for key, value in ema.items():
        assert key.startswith("final_layer") or (D["weights"][key] - value).abs().max() < 1e-8, key
    assert model.load(tmp_path / "cafm/last.pt").rope is not None


def test_train_aligned(tmp_path, encoded):
    """repa, reg and cat with its D aligned train on latents with stored features and on images with an encoder, stop and go on
    bit for bit, and start from each other; what an encoder is missing for is said."""
    stored = dict(data=str(encoded / "latents"), size=0, predict="v", mirror="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=1, depth=2, width=32))
        train.train(tiny_run(tmp_path / "plain", steps=2, **stored))
        for loss in ("repa", "reg"):
            a, b, options = tmp_path / loss, tmp_path / f"{loss} again", dict(loss=loss, steps=4, log_every=1, **stored)
            options |= dict(init=str(tmp_path / "plain"), align_block=2) if loss == "repa" else {}
            train.train(tiny_run(a, **options))
            train.train(tiny_run(b, **options | dict(steps=2)))
            train.train(tiny_run(b, resume=True, **options))
            assert_same_state(a, b)
            assert all(0 < row["misalignment"] < 2 for row in train.read_log(a / "log.jsonl"))
        train.train(tiny_run(tmp_path / "after", loss="meanflow", init=str(tmp_path / "repa"), steps=1, **stored))
        raises(lambda: train.train(tiny_run(tmp_path / "no", loss="repa", encoder=SMALL_ENCODER, **stored)), "holds features", "neither")
        raises(lambda: train.train(tiny_run(tmp_path / "no", loss="cat", align=1.0, augment=0.5, stages=2, **stored)), "--augment 0.5")
    assert "projectors.0.0.weight" not in checkpoint(tmp_path / "after")["ema"]
    assert [checkpoint(tmp_path / loss)["networks"]["G"]["config"]["align"] for loss in ("repa", "reg")] == [2, 0]
    train.train(tiny_run(tmp_path / "cat", loss="cat", steps=2, log_every=1, align=1.0, encoder=SMALL_ENCODER))
    assert [("misalignment" in row) for row in train.read_log(tmp_path / "cat/log.jsonl")] == [row["role"] == "D" for row in train.read_log(tmp_path / "cat/log.jsonl")]
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="repa")), "--encoder FILE.py:NAME")
    shutil.copytree(encoded / "latents", tmp_path / "bare")
    about = json.loads((tmp_path / "bare/manifest.json").read_text())
    (tmp_path / "bare/manifest.json").write_text(json.dumps({k: v for k, v in about.items() if k not in ("encoder", "features")}))
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="reg", **stored | dict(data=str(tmp_path / "bare")))), "data.py encode --encoder")


def test_train_experts(tmp_path):
    """A network of experts trains on several kinds of losses: the balance is logged and part of the loss, resuming is exact,
    and routing.json tells where tokens went."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(experts=3, depth=2, width=32))
        for loss in ("fm", "afm"):
            a, b, options = tmp_path / loss, tmp_path / f"{loss} again", dict(loss=loss, steps=4, log_every=1)
            train.train(tiny_run(a, **options))
            train.train(tiny_run(b, **options | dict(steps=2)))
            train.train(tiny_run(b, resume=True, **options))
            assert_same_state(a, b)
            assert all(row["balance"] > 0.9 * 2 for row in train.read_log(a / "log.jsonl"))  # two layers
        train.train(tiny_run(tmp_path / "free", steps=1, log_every=1, balance=0.0))
    held, free = (train.read_log(tmp_path / name / "log.jsonl")[0] for name in ("fm", "free"))
    assert held["balance"] == free["balance"] and abs(held["loss"] - free["loss"] - 0.01 * free["balance"]) < 1e-6
    shares = json.loads((tmp_path / "free/routing.json").read_text())["layers, positions, experts"]
    assert len(shares) == 2 and len(shares[0]) == 16 and abs(sum(shares[0][0]) - 1) < 1e-5


def test_train_positions_cover_every_image_once():
    """Over processes and accumulation, the micro-batches of a step are its global batch, in order."""
    cfg = train.Config(steps=3, batch=12, accumulation=2)
    rank, world, shares = data.rank, data.world, []
    try:
        for r in range(3):
            data.rank, data.world = (lambda r=r: r), (lambda: 3)
            shares.append(list(train.positions_from(1, cfg)))
            assert "multiple of 6" in error_of(train.micro_batch, train.Config(batch=8, accumulation=2))
    finally:
        data.rank, data.world = rank, world
    for step in (0, 1):
        seen = [p for k in (0, 1) for r in range(3) for p in shares[r][2 * step + k]]
        assert seen == list(range((step + 1) * 12, (step + 2) * 12))


def test_train_pieces():
    """Learning rate: linear warm-up, linear decay to 0, or constant. EMA: d ema + (1 - d) net with a warm start."""
    cfg = train.Config(lr=1.0, warmup=10, steps=100, decay="linear")
    assert math.isclose(train.learning_rate(0, cfg), .1) and math.isclose(train.learning_rate(50, cfg), .5)
    assert math.isclose(train.learning_rate(99, cfg), .01)
    assert train.learning_rate(60, dataclasses.replace(cfg, decay="constant")) == 1.0
    ema, net = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = {step: d * ema.weight + (1 - d) * net.weight for step, d in ((0, .1), (10 ** 6, .9))}
    for step, value in expected.items():
        averaged = nn.Linear(2, 2)
        averaged.load_state_dict(ema.state_dict())
        train.update_ema(averaged, net, step, .9)
        assert torch.allclose(averaged.weight, value)


def test_train_clips_the_gradient(tmp_path):
    """The gradient that reaches the optimizer has norm --clip where it was larger, and is left alone by --clip 0."""
    norms = {}
    for clip in (1e-3, 0.0):
        train.train(tiny_run(tmp_path / f"{clip}", steps=1, clip=clip))
        state = checkpoint(tmp_path / f"{clip}")["networks"]["G"]["optimizer"]["state"].values()
        norms[clip] = 10 * torch.stack([s["exp_avg"].norm() for s in state]).norm()  # Adam's first mean is 0.1 g
    logged = json.loads((tmp_path / "0.0/log.jsonl").read_text().splitlines()[0])["grad_norm"]
    assert abs(norms[1e-3] - 1e-3) < 1e-5 and abs(norms[0.0] / logged - 1) < 1e-3 and logged > 0.1


def test_train_run_folder_and_scores(tmp_path):
    """A run leaves config, log, loss curve, grids, checkpoint and scores with floor and protocol; sample.py reads it."""
    out = tmp_path / "run"
    result = train.train(tiny_run(out, data="glyphs", score=50, sample_every=5, decay="linear", monitor=20))
    names = ["config.json", "final.json", "last.pt", "log.jsonl", "loss.png", "samples", "scores.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == names
    watched = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["n"], row["reference"]) for row in watched] == [(5, 20, "glyphs:1"), (10, 20, "glyphs:1")]
    assert all(row["fd_glyphs"] > 0 and 0 <= row["recall_glyphs"] <= 1 for row in watched)
    assert watched[0]["fd_glyphs"] != watched[1]["fd_glyphs"]
    assert watched[1]["made"] == result["scores"]["unguided"]["protocol"] and "no guidance" in watched[1]["made"]
    same = fid.evaluate(str(out), "glyphs", features="glyphs", num=20, steps=2, seed=1, device="cpu")
    assert same["scores"]["fd_glyphs"]["value"] == watched[1]["fd_glyphs"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["0000005.png", "0000010.png", "final.png"]
    assert json.loads((out / "config.json").read_text())["batch"] == 8
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [2, 4, 5, 6, 8, 10]
    assert all({"role", "loss", "grad_norm", "lr", "images_per_second"} <= r.keys() for r in lines)
    saved = json.loads((out / "final.json").read_text())
    assert saved == result and saved["images_seen"] == 80
    for name, guidance in (("unguided", "no guidance"), ("guided", "guidance 1.5")):
        s = saved["scores"][name]
        assert s["n"] == 50 and 0 < s["floor"] < s["fd_glyphs"] and 0 <= s["accuracy"] <= 1
        assert guidance in s["protocol"] and "2 steps" in s["protocol"] and "EMA" in s["protocol"]
    sample.main([str(out), "--n", "4", "--steps", "1", "--out", str(tmp_path / "s.png"), "--device", "cpu"])


def test_train_monitors_images_by_inception(tmp_path):
    """On other data than glyphs --monitor measures samples by InceptionV3 against the data, whose statistics are made
    once; names tell number and weights, and the run is the one without monitoring."""
    options = dict(data=write_npz(tmp_path / "a.npz", *data.glyphs(4)), steps=1, batch=4)
    train.train(tiny_run(tmp_path / "run", **options, sample_every=1, monitor=3, fid_weights=str(golden_file("torchvision"))))
    row, = map(json.loads, (tmp_path / "run" / "scores.jsonl").read_text().splitlines())
    assert row["step"] == 1 and row["fid3_torchvision"] > 0 and row["is_torchvision"] >= 1 and row["n"] == 3
    assert row["n_ref"] == 4 and row["reference"].endswith("reference.npz") and "fid" not in row
    train.train(tiny_run(tmp_path / "alone", **options))
    assert_same_state(tmp_path / "run", tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "evaluate", lambda *args, **how: made.append(how) or dict(scores={}))
        made, source = [], data.dataset(options["data"], 32)
        against = [train.monitor_reference(train.Config(**options | given), source, folder, torch.device("cpu"))
                   for given, folder in (({}, tmp_path / "run"), (dict(reference="other.npz"), tmp_path),
                                         (dict(reference="other.npz", data="glyphs"), tmp_path))]
        assert not made and [how["reference"] for how in against] == [row["reference"], "other.npz", "other.npz"]
        assert all(how["metrics"] == "fid,is" and "features" not in how for how in against)
        train.monitor_reference(train.Config(**options), source, tmp_path, torch.device("cpu"))
        patch.setattr(data, "rank", lambda: 1)  # all measure, one writes
        train.monitor(tiny(), train.Config(monitor=3), {}, 1, tmp_path / "scores.jsonl", None)
        assert len(made) == 2 and made[0]["size"] == 32 and not (tmp_path / "scores.jsonl").exists()


def test_train_init_and_other_data(tmp_path):
    """--init starts from another run's weights; own images, predict v, bf16, compile off and flips run; a checkpoint of
    another architecture is refused."""
    train.train(tiny_run(tmp_path / "a", steps=3))
    train.train(tiny_run(tmp_path / "b", steps=1, lr=0.0, init=str(tmp_path / "a")))
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert same(a["ema"], b["networks"]["G"]["weights"])
    for i in range(4):
        (tmp_path / f"set/{i % 2}").mkdir(parents=True, exist_ok=True)
        picture((20, 24), ("red", "blue")[i % 2]).save(tmp_path / f"set/{i % 2}/{i}.png")
    cfg = tiny_run(tmp_path / "c", data=str(tmp_path / "set"), size=16, predict="v", steps=2, amp="bf16",
                   time="uniform", score=100)
    assert "scores" not in train.train(cfg)
    assert checkpoint(tmp_path / "c")["networks"]["G"]["config"]["num_classes"] == 2
    for options, words in ((dict(predict="v"), "another network"), (dict(), "--predict v")):
        message = error_of(train.train, tiny_run(tmp_path / "d", init=str(tmp_path / "c"), **options))
        assert words in message and not (tmp_path / "d" / "last.pt").exists()
    cfg = tiny_run(tmp_path / "e", data=str(tmp_path / "set"), init=str(tmp_path / "a"), steps=1, lr=0.0)
    train.train(cfg)  # two classes instead of ten: the label table starts afresh, the rest is taken over
    sigma = model.create("tiny", learn_sigma=True)  # as in official files: kept through --init and --resume
    torch.save({"networks": {"G": {"config": sigma.config, "weights": sigma.state_dict()}}, "ema": sigma.state_dict()},
               tmp_path / "sigma.pt")
    train.train(tiny_run(tmp_path / "f", init=str(tmp_path / "sigma.pt"), steps=1))
    train.train(tiny_run(tmp_path / "f", init=str(tmp_path / "sigma.pt"), steps=2, resume=True))
    assert checkpoint(tmp_path / "f")["networks"]["G"]["config"]["learn_sigma"]
    e = checkpoint(tmp_path / "e")["networks"]["G"]["weights"]
    assert len(e["y_embedder.embedding_table.weight"]) == 3
    assert torch.equal(e["blocks.0.attn.qkv.weight"], a["ema"]["blocks.0.attn.qkv.weight"])


def test_train_refuses_and_loses_nothing(tmp_path):
    """Batch that does not divide, an existing run, nothing to resume, resuming another model, a damaged checkpoint: one
    line each, and the old checkpoint stays as it is."""
    out = tmp_path / "run"
    assert "multiple of 3" in error_of(train.train, tiny_run(out, accumulation=3))
    assert "at least 1" in error_of(train.train, tiny_run(out, log_every=0))
    assert "held out" in error_of(train.train, tiny_run(out, data="glyphs:1"))
    assert "to go on with" in error_of(train.train, tiny_run(out, resume=True))
    train.train(tiny_run(out, steps=2))
    (out / "scores.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"ste')  # of a process killed after its last checkpoint
    before = (out / "last.pt").read_bytes()
    assert "--resume" in error_of(train.train, tiny_run(out))
    assert "--init" in error_of(train.train, tiny_run(out, resume=True, model="SiT-S/8"))
    assert "--predict" in error_of(train.train, tiny_run(out, resume=True, predict="v"))
    assert "beyond --steps 1" in error_of(train.train, tiny_run(out, resume=True, steps=1))
    assert (out / "last.pt").read_bytes() == before
    (out / "last.pt").write_bytes(before[: len(before) // 2])
    assert "damaged" in error_of(train.train, tiny_run(out, resume=True))
    (out / "last.pt").write_bytes(before)
    (out / "last.pt.tmp").write_bytes(before[:100])  # what a process killed while saving leaves behind
    train.train(tiny_run(out, steps=3, resume=True))
    assert checkpoint(out)["step"] == 3
    train.main(["--resume", "--out", str(out), "--steps", "4", "--beta2", "0.9"])  # the other flags are the run's own
    again = checkpoint(out)
    assert again["step"] == 4 and again["config"]["batch"] == 8 and again["config"]["data"] == str(SMALL_SET)
    assert again["networks"]["G"]["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.9)
    assert (out / "scores.jsonl").read_text() == '{"step": 2}\n'


def test_train_full_disk_keeps_the_old_checkpoint(tmp_path):
    """When the new checkpoint does not fit (here by a limit on file sizes), the run stops with one line that says so, and
    the old one still loads."""
    out = tmp_path / "run"
    train.train(tiny_run(out, steps=2, model="glyph-S"))
    before = (out / "last.pt").read_bytes()
    done = run(script=f"import resource, sys; sys.argv = ['train.py', '--resume', '--steps', '4', '--batch', '8', '--decay', "
                      f"'constant', '--sample_every', '0', '--score', '0', '--device', 'cpu', '--out', {str(out)!r}, '--data', {str(SMALL_SET)!r}];"
                      f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000));"
                      f"import data, train; data.run_cli(train.main)", cwd=HERE)
    assert done.returncode == 2 and "could not be written" in done.stderr.splitlines()[-1], done.stderr
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.tmp").exists()


def test_train_non_finite_loss_stops_with_step_and_name(tmp_path):
    """A diverging run names step, network and term, exits 2, and leaves the last sound checkpoint."""
    out = tmp_path / "run"
    train.train(tiny_run(out, steps=4))
    with pytest.raises(FloatingPointError) as caught:
        train.train(tiny_run(out, steps=12, lr=1e30, resume=True, log_every=10))
    assert re.search(r"step [4-9], network G: (loss|grad_norm) is (nan|inf)", str(caught.value)), caught.value
    assert checkpoint(out)["step"] == 4
    assert all(torch.isfinite(v).all() for v in checkpoint(out)["networks"]["G"]["weights"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: bf16 autocast and torch.compile on GPU")
def test_train_on_a_gpu_with_compile_and_bf16(tmp_path):
    """The compiled bf16 step's loss is that of the eager float32 step to 2 %."""
    final = []
    for name, options in (("eager", dict(amp="off")), ("fast", dict(amp="bf16", compile=True))):
        train.train(tiny_run(tmp_path / name, device="cuda", batch=64, **options))
        final.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["loss"])
    assert abs(final[0] / final[1] - 1) < 0.02


def test_no_undefined_or_unused_names():
    """pyflakes, where it is installed, finds nothing."""
    pyflakes = pytest.importorskip("pyflakes.api", reason="pyflakes is not installed: names are not checked")
    for file in HERE.glob("*.py"):
        assert pyflakes.checkPath(str(file)) == 0, file


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
