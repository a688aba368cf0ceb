"""Data: the download-free `glyphs`, readers for image sets, and what every script shares.

`dataset(source, size)` looks at the path and returns an object with

    len(ds)      number of images
    ds.shape     (C, h, w) of an item
    ds.classes   names of the classes;  ds.num_classes = len(ds.classes)
    ds.mirror    whether a left-right flipped item is as good as the item (photographs: yes, digits: no)
    ds.item(i)   (uint8 tensor (C, h, w), label int)

`stream` turns it into training batches: which image stands at which position of the training run is a function of
(seed, position) only, so any step can be sought at no cost and no number of GPUs or workers changes the order.

Run alone, `python data.py [SOURCE]` draws a labelled grid of the data set and prints its counts; `python data.py encode
IMAGES OUT --vae FILE` writes latents to train on, on as many processes as torchrun starts.

The file also holds, because every other file may import it: the random numbers (section 1), the one conversion
between float and uint8 images (section 2), processes and command lines (section 6).
"""
import argparse
import dataclasses
import difflib
import functools
import gc
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


# --------------------------------------------------------------------------------------------------------------------
# 1. Random numbers: a function of (seed, purpose, index), never of the order in which they are drawn
# --------------------------------------------------------------------------------------------------------------------

def fold(*parts) -> int:
    """Hash any numbers and strings to a 63-bit seed; neighbouring parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts) -> torch.Generator:
    """A CPU generator seeded with `fold(*parts)`."""
    return torch.Generator().manual_seed(fold(*parts))


class Draws:
    """Random numbers for samples at given positions: number k depends on (seed, purpose, positions[k]) only.

    Batches may therefore be split over GPUs, accumulation steps or evaluation runs in any way without changing a
    single draw. (Normal numbers drawn on a GPU are others than those drawn on a CPU.) `positions` are global: training
    uses step * batch + i, evaluation the index of the sample.
    """

    def __init__(self, seed: int, positions: typing.Sequence[int], device="cpu"):
        self.seed, self.positions, self.device = seed, positions, torch.device(device)

    def normal(self, purpose: str, shape: tuple) -> Tensor:
        """Standard normal (len(positions), *shape), float32, drawn on the device."""
        rng = torch.Generator(self.device)
        out = torch.empty(len(self.positions), *shape, device=self.device)
        for row, p in zip(out, self.positions):
            row.normal_(generator=rng.manual_seed(fold(self.seed, purpose, p)))
        return out

    def uniform(self, purpose: str, shape: tuple = ()) -> Tensor:
        """Uniform [0, 1) numbers (len(positions), *shape), float32."""
        rows = [torch.rand(shape, generator=generator(self.seed, purpose, p)) for p in self.positions]
        return torch.stack(rows).to(self.device)


# --------------------------------------------------------------------------------------------------------------------
# 2. Images as numbers, and pictures of many of them
# --------------------------------------------------------------------------------------------------------------------

def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] -> uint8 by (127.5 x + 128).clamp(0, 255): to the nearest grey level, halves up.

    ValueError for a non-finite pixel, which a plain cast would turn into a silent 0.
    """
    bad = (~torch.isfinite(images)).flatten(1).any(1).sum().item()
    if bad:
        raise ValueError(f"{bad} of {len(images)} images have non-finite pixels: the network or the sampler diverged")
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, captions: list[str] | None = None, tile: int = 64) -> Image.Image:
    """One picture of many: uint8 (N, 3, h, w), tiles enlarged by whole factors to at least `tile` pixels.

    `captions` (N strings) stand below the tiles. Rows are filled first; `columns` defaults to a square.
    """
    n, _, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    zoom, gap, text = max(1, round(tile / w)), 2, 14 if captions else 0
    cell_w, cell_h = w * zoom + gap, h * zoom + gap + text
    sheet = Image.new("RGB", (columns * cell_w + gap, -(-n // columns) * cell_h + gap), "white")
    font = ImageFont.load_default(size=11)
    for i, image in enumerate(images):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        sheet.paste(picture.resize((w * zoom, h * zoom), Image.Resampling.NEAREST), (x, y))
        if captions:
            text_of = captions[i] if len(captions[i]) <= w * zoom // 6 else captions[i][: w * zoom // 6 - 1] + "."
            ImageDraw.Draw(sheet).text((x, y + h * zoom), text_of, fill="black", font=font)
    return sheet


def decode(file, name: str, size: int | None) -> Tensor:
    """An image file -> uint8 (3, size, size); `size` None keeps the native size.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey keeps its upper 8 bits, and the rest
    becomes RGB; then ADM's centre crop. ValueError naming the file when it cannot be read.
    """
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                grey = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
                image = Image.fromarray(grey.astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise ValueError(f"{name}: not a readable image ({error}); repair or remove it") from error
    return torch.from_numpy(np.array(image if size is None else centre_crop(image, size))).permute(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (guided-diffusion, image_datasets.py): halve by box filter while twice too large, bicubic, centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# --------------------------------------------------------------------------------------------------------------------
# 3. glyphs: ten digits in random poses and colours, from Pillow's built-in font
# --------------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _digit_masks(side: int = 64) -> Tensor:
    """The ten digits, centred, white on black: float (10, 1, side, side) in [0, 1]."""
    font = ImageFont.load_default(size=round(0.95 * side))
    masks = []
    for digit in "0123456789":
        sheet = Image.new("L", (side, side))
        ImageDraw.Draw(sheet).text((side / 2, side / 2), digit, fill=255, font=font, anchor="mm")
        masks.append(torch.from_numpy(np.array(sheet)) / 255)
    return torch.stack(masks)[:, None]


def _pose(n: int, rng: torch.Generator) -> Tensor:
    """Random affine maps (n, 2, 3) from output to mask coordinates: rotation, shear, scale and shift."""
    angle, shear, sx, sy, dx, dy = (2 * torch.rand(n, 6, generator=rng) - 1).unbind(1)
    angle, shear = 0.2 * angle, 0.15 * shear
    scale = 0.975 + 0.125 * sx
    rows = [torch.stack([angle.cos(), angle.sin() + shear, 0.08 * dx], 1),
            torch.stack([-angle.sin(), angle.cos(), 0.08 * dy], 1)]
    return torch.stack(rows, 1) / (scale * (1 + 0.08 * sy))[:, None, None]


def glyphs(n: int, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` images of the digits 0-9: uint8 (n, 3, size, size), and labels int64 (n,), label i = i % 10.

    Deterministic in `seed`, and a prefix of every longer draw of the same seed. Bright strokes (channels in
    [0.65, 1]) on a dark ground ([0, 0.35]), so every channel differs by at least 0.3 between the two. The font comes
    with Pillow; versions of Pillow and torch may change low bits. A toy: no distance on it compares with any FID.
    """
    if ImageFont.load_default(size=10).__class__ is ImageFont.ImageFont:
        raise ValueError("this Pillow was built without FreeType, which glyphs needs: pip install --upgrade pillow")
    chunk, out = 1000, torch.empty(n, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(n) % 10
    for start in range(0, n, chunk):
        m = min(chunk, n - start)
        rng = generator("glyphs", seed, start)
        pose, ground, ink = _pose(chunk, rng), torch.rand(chunk, 3, generator=rng), torch.rand(chunk, 3, generator=rng)
        ground, ink = 0.35 * ground[:m, :, None, None], 0.65 + 0.35 * ink[:m, :, None, None]
        # Drawn at twice the size and averaged: smooth edges at any pose.
        where = F.affine_grid(pose[:m], [m, 1, 2 * size, 2 * size], align_corners=False)
        mask = F.grid_sample(_digit_masks()[labels[start:start + m]], where, align_corners=False)
        mask = F.avg_pool2d(mask, 2)
        out[start:start + m] = to_uint8(2 * (ground + mask * (ink - ground)) - 1)
    return out, labels


# --------------------------------------------------------------------------------------------------------------------
# 4. Readers, one class or function for each layout
# --------------------------------------------------------------------------------------------------------------------

class Arrays:
    """Images held in memory: uint8 (N, C, h, w) with labels int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, size: int | None, classes: list[str] | None = None,
                 mirror: bool = False):
        self.images, self.labels, self.size, self.mirror = images, labels, size, mirror
        self.classes = classes or [str(k) for k in range(int(labels.max()) + 1)]
        side = images.shape[2:] if size is None else (size, size)
        self.shape = (images.shape[1], *side)

    num_classes = property(lambda self: len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def item(self, i: int) -> tuple[Tensor, int]:
        image = self.images[i]
        if image.shape != self.shape:
            picture = centre_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), self.size)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return image, int(self.labels[i])


class Files:
    """Image files, decoded when asked for: in a folder, or in a zip archive."""

    def __init__(self, root: Path, names: list[str], labels: list[int], size: int | None, classes: list[str]):
        self.root, self.names, self.labels, self.size = root, names, labels, size
        self.classes, self.mirror = classes, True
        self.zip, self.zip_owner = None, None
        self.shape = tuple(self.item(0)[0].shape)

    num_classes = property(lambda self: len(self.classes))

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self):  # an open archive does not travel to worker processes
        return self.__dict__ | {"zip": None, "zip_owner": None}

    def open(self, name: str):
        if self.root.suffix != ".zip":
            return open(self.root / name, "rb")
        if self.zip_owner != os.getpid():  # forked workers must not share one file position
            self.zip, self.zip_owner = zipfile.ZipFile(self.root), os.getpid()
        return io.BytesIO(self.zip.read(name))

    def item(self, i: int) -> tuple[Tensor, int]:
        name = f"{self.root}/{self.names[i]}"
        try:
            with self.open(self.names[i]) as file:
                image = decode(file, name, self.size)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{name}: cannot be read ({error}); repair or remove it") from error
        if i and tuple(image.shape) != self.shape:
            raise ValueError(f"images have mixed sizes: {self.names[0]} is {self.shape[2]}x{self.shape[1]}, "
                             f"{self.names[i]} is {image.shape[2]}x{image.shape[1]}; give --size to crop all alike")
        return image, self.labels[i]


def check_labels(labels, n: int, where: str) -> Tensor:
    """Labels as int64 (n,), or a ValueError that says what is wrong with them."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"{where}: {n} images but labels of shape {labels.shape}; expected one integer an image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: labels are {labels.dtype}; expected integers 0 .. classes - 1")
    if n and (labels.min() < 0 or labels.max() >= 10 ** 6):
        raise ValueError(f"{where}: labels run from {labels.min()} to {labels.max()}; expected 0 .. classes - 1")
    return torch.from_numpy(labels.astype(np.int64))


def read_folder(root: Path, size: int | None) -> Files:
    """A folder of images: one class for each subfolder (ImageNet's layout, sorted names), or flat: one class."""
    files = [Path(folder, f) for folder, _, inside in os.walk(root, followlinks=True) for f in inside]
    names = sorted(p.relative_to(root).as_posix() for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{root}: no images found; expected class subfolders of images, images "
                         f"({' '.join(sorted(IMAGE_SUFFIXES))}), MNIST idx files or CIFAR-10 .bin files")
    classes = sorted({name.split("/")[0] if "/" in name else "." for name in names})
    number = {name: k for k, name in enumerate(classes)}
    labels = [number[name.split("/")[0] if "/" in name else "."] for name in names]
    if "." in classes and len(classes) > 1:
        raise ValueError(f"{root}: images stand both in the folder itself ({names[labels.index(number['.'])]}) and "
                         f"in subfolders ({', '.join(c for c in classes if c != '.')}); move them into class subfolders")
    return Files(root, names, labels, size, classes if classes != ["."] else [root.name])


def read_zip(path: Path, size: int | None) -> Files:
    """A zip of images, labels in dataset.json as EDM writes it: {"labels": [[name, label], ...]}, or without labels."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in IMAGE_SUFFIXES)
            meta = json.loads(archive.read("dataset.json")) if "dataset.json" in archive.namelist() else {}
        table = dict(meta.get("labels") or [])
    except (zipfile.BadZipFile, zlib.error, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a zip of images with dataset.json as EDM writes it ({error})") from error
    if not names:
        raise ValueError(f"{path}: no images in this zip; expected images and, for labels, dataset.json")
    missing = [n for n in names if table and n not in table]
    if missing:
        raise ValueError(f"{path}: dataset.json has no label for {missing[0]} ({len(missing)} such images)")
    labels = check_labels([table[n] for n in names] if table else np.zeros(len(names), int), len(names), str(path))
    return Files(path, names, labels.tolist(), size, [str(k) for k in range(int(labels.max()) + 1)])


def read_npz(path: Path, size: int | None) -> Arrays:
    """`arr_0` (ADM) or `images`, uint8 NHWC or NCHW with 3 channels (or 1); `labels` or `arr_1` where present."""
    try:
        with open(path, "rb") as raw, zipfile.ZipFile(raw) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
        key = next((k for k in ("images", "arr_0") if k in names), None)
        if key is None:
            raise KeyError
        with np.load(path, allow_pickle=False) as file:
            images = file[key]
            labels = next((file[k] for k in ("labels", "arr_1") if k in file), np.zeros(len(images), np.int64))
    except KeyError:
        raise ValueError(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}; expected `images` or `arr_0`") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, TypeError, ValueError):
        raise ValueError(f"{path}: not a readable .npz of numbers; write it with numpy.savez(path, images=..., "
                         f"labels=...)") from None
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or not {images.shape[1], images.shape[3]} & {1, 3}:
        raise ValueError(f"{path}: {key} is {images.dtype} {images.shape}; expected uint8 (N, h, w, 3) or (N, 3, h, w)")
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return Arrays(rgb(images), check_labels(labels, len(images), str(path)), size)


def rgb(images: np.ndarray) -> Tensor:
    """uint8 (N, 1 or 3, h, w) -> (N, 3, h, w): every data set has three channels, so every network and metric fits."""
    images = torch.from_numpy(images)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def read_idx(path: Path, size: int | None) -> Arrays:
    """MNIST and its likes: ...images-idx3-ubyte[.gz] and, beside it, ...labels-idx1-ubyte[.gz]."""
    labels_path = Path(str(path).replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1"))
    if not labels_path.exists():
        raise ValueError(f"{path}: its labels {labels_path.name} are missing beside it")

    def unpack(file: Path, dims: int) -> np.ndarray:
        try:
            raw = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: not readable ({error}); get it again") from error
        head = 4 + 4 * dims
        shape = np.frombuffer(raw[4:head].ljust(4 * dims, b"\0"), ">i4").astype(np.int64)
        if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != head + shape.prod() or not shape.prod():
            raise ValueError(f"{file}: not an idx file of {dims}-dimensional bytes, or cut short; get it again")
        return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()

    images, labels = unpack(path, 3), unpack(labels_path, 1)
    return Arrays(rgb(images[:, None]), check_labels(labels, len(images), str(labels_path)), size)


def read_cifar(files: list[Path], size: int | None) -> Arrays:
    """CIFAR-10 binary version: records of 1 label byte and 3 x 32 x 32 image bytes."""
    for file in files:
        if not file.stat().st_size or file.stat().st_size % 3073:
            raise ValueError(f"{file}: {file.stat().st_size} bytes is not a whole number of 3073-byte CIFAR-10 records")
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    if records[:, 0].max() > 9:
        raise ValueError(f"{files[0].parent}: label {records[:, 0].max()} in a CIFAR-10 file; expected 0 .. 9")
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Arrays(images, torch.from_numpy(records[:, 0].astype(np.int64)), size, names, mirror=True)


@functools.lru_cache(maxsize=2)
def _glyph_set(size: int, seed: int) -> tuple[Tensor, Tensor]:
    return glyphs(20_000, size, seed)


def dataset(source: str, size: int | None = None) -> Arrays | Files:
    """The data set at `source`, its items uint8 (3, size, size), or of their own size where `size` is None.

    source: `glyphs` (20,000 training images), `glyphs:SEED` (another draw), a folder of images with or without class
    subfolders, a zip (EDM), an .npz (ADM, or `images` and `labels`), MNIST idx files, CIFAR-10's binary files, or a
    folder of latents that `encode` wrote.
    """
    if source.split(":")[0] == "glyphs" and not os.path.exists(source):
        seed = source.partition(":")[2] or "0"
        if not seed.isdigit():
            raise ValueError(f"{source}: expected glyphs or glyphs:SEED with a whole number")
        return Arrays(*_glyph_set(size or 32, int(seed)), size)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; expected glyphs, an image folder, .zip, .npz, MNIST "
                                f"or CIFAR-10 files")
    if (path / "manifest.json").exists():
        return Latents(path, size)
    if path.is_dir():
        idx = [p for p in sorted(path.iterdir()) if "images" in p.name and "idx3" in p.name]
        if idx:
            return read_idx(next((p for p in idx if p.name.startswith("train")), idx[0]), size)
        if (path / "data_batch_1.bin").exists():
            return read_cifar(sorted(path.glob("data_batch_*.bin")), size)
        if (path / "data_batch_1").exists():
            raise ValueError(f"{source}: CIFAR-10's python version is pickled; get the binary version (.bin files)")
        return read_folder(path, size)
    if path.suffix == ".zip":
        return read_zip(path, size)
    if path.suffix == ".npz":
        return read_npz(path, size)
    if path.suffix == ".bin":
        return read_cifar([path], size)
    if "idx3" in path.name:
        return read_idx(path, size)
    raise ValueError(f"{source}: unknown kind of file; expected .zip, .npz, ...idx3-ubyte[.gz] or .bin, or a folder")


# --------------------------------------------------------------------------------------------------------------------
# 5. Batches
# --------------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def index_at(n: int, position: int, seed: int) -> int:
    """The index in a data set of n items that stands at a position of the training run: a new order each epoch."""
    epoch, offset = divmod(position, n)
    return int(permutation(n, seed, epoch)[offset])


def flipped(items: Tensor, flip: Tensor) -> Tensor:
    """Items mirrored where flip (B,) says so: images (B, C, h, w), or moments (B, 2, 8, h, w), which have both sides."""
    if items.dtype == torch.uint8:
        return torch.where(flip[:, None, None, None], items.flip(3), items)
    return items[torch.arange(len(items), device=items.device), flip.long()]


def clean(items: Tensor, draws: Draws, purpose: str = "posterior") -> Tensor:
    """What a network is trained on: uint8 images as float in [-1, 1], or a draw of the latent of moments (B, 8, h, w)."""
    if items.dtype == torch.uint8:
        return to_float(items)
    return latent(items, draws.normal(purpose, (items.shape[1] // 2, *items.shape[2:])))


class Bank:
    """Up to `per_class` images (or moments) of each class, in memory, to draw others of a sample's class from.

    Items (classes, M, ...) are chosen by the seed; a class with fewer fills its places again and again.
    """

    def __init__(self, source: Arrays | Files, per_class: int, seed: int, mirror: bool = False, device="cpu"):
        labels, self.mirror, chosen = torch.as_tensor(source.labels), mirror, []
        largest = min(per_class, int(labels.bincount().max()))
        for k in range(source.num_classes):
            own = (labels == k).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=generator(seed, "bank", k))]
            own = own if len(own) else torch.zeros(1, dtype=torch.int64)  # a class without images: nobody will ask
            chosen.append(torch.stack([source.item(int(own[i % len(own)]))[0] for i in range(largest)]))
        self.items = torch.stack(chosen).to(device)

    def __call__(self, y: Tensor, draws: Draws, n: int) -> Tensor:
        """n > 0 images of the class of each sample, independent draws: float (B, n, C, h, w) in [-1, 1], or latents."""
        picks = (draws.uniform("bank", (n,)) * self.items.shape[1]).long()
        flips = (draws.uniform("bank mirror", (n,)) < 0.5) & self.mirror
        return torch.stack([clean(flipped(self.items[y, picks[:, k]], flips[:, k]), draws, f"bank posterior {k}")
                            for k in range(n)], 1)


class Latents:
    """What `encode` wrote: an item is the float16 moments (2, 8, h, w) of an image and of its mirror image."""
    mirror = True

    def __init__(self, root: Path, size: int | None):
        about = read_manifest(root)
        self.size, self.classes, self.shape = about["size"], about["classes"], tuple(about["shape"])
        if size and size != self.size:
            raise ValueError(f"{root}: encoded at --size {self.size}, not {size}")
        shards = [_shard(root, k) for k in range(-(-about["count"] // about["shard"]))]
        if missing := [p for p in shards if not p.exists()]:
            raise ValueError(f"{root}: {missing[0].name} is missing ({len(missing)} of {len(shards)}): the same data.py encode "
                             f"command goes on where it was stopped")
        self.shards, self.per_shard = [np.load(p, mmap_mode="r") for p in shards], about["shard"]
        self.labels, self.features = np.load(root / "labels.npy"), None
        if about["features"]:
            self.features = [np.load(_shard(root, k, "features"), mmap_mode="r") for k in range(len(shards))]

    num_classes = property(lambda self: len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, i: int) -> tuple[Tensor, int]:
        moments = self.shards[i // self.per_shard][i % self.per_shard]
        return torch.from_numpy(np.array(moments)), int(self.labels[i])


class StoredFeatures:
    """What a frozen encoder said of the training images, as `encode` stored it beside their latents; called like one.

    shape: (1 + N, F), a token of the whole image and one for each patch.
    """

    def __init__(self, source: Latents, mirror: bool):
        self.source, self.mirror, self.shape = source, mirror, source.features[0].shape[2:]

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        """Those of the images that `stream` puts at the positions of this micro-batch: (B, 1 + N, F) as x is."""
        flips = ((draws.uniform("flip") < 0.5) & self.mirror).long().tolist()
        indices = [index_at(len(self.source), position, draws.seed) for position in draws.positions]
        rows = [self.source.features[i // self.source.per_shard][i % self.source.per_shard, side]
                for i, side in zip(indices, flips)]
        return torch.from_numpy(np.stack(rows)).to(x)


class Encoder:
    """A frozen encoder: the function NAME of the Python file in "FILE.py:NAME", images (B, 3, h, w) in [-1, 1] to features.

    Features (B, 1 + N, F): a token of the whole image, then one for each of N patches, row by row. README has DINOv2's.
    """

    def __init__(self, name: str, size: int, device="cpu"):
        path, _, function = name.rpartition(":")
        if not Path(path).is_file() or not function:
            raise ValueError(f"--encoder {name}: expected FILE.py:NAME, a function in a Python file that is there")
        spec = importlib.util.spec_from_file_location("encoder", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"--encoder {name}: {path} has no function {function}")
        self.name, self.function = name, getattr(module, function)
        self.shape = self(torch.zeros(1, 3, size, size, device=device)).shape[1:]

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Features (B, 1 + N, F) of the type of x, without gradient."""
        found = self.function(x)
        if found.dim() != 3 or len(found) != len(x):
            raise ValueError(f"--encoder {self.name}: gave features {tuple(found.shape)} for {len(x)} images; expected (images, "
                             f"1 + patches, width)")
        return found.to(x)


class _Fetcher(torch.utils.data.Dataset):
    """What a worker process runs. An error travels back as a value, so that its one-line message stays one line."""

    def __init__(self, source: Arrays | Files):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        try:
            images, labels = zip(*(self.source.item(i) for i in indices))
        except ValueError as error:
            return error
        return torch.stack(images), torch.tensor(labels)


def _as_it_is(batch):
    return batch


def _ignore_signals(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the main process's: it finishes its step and saves
        signal.signal(number, signal.SIG_IGN)


def batches(source: Arrays | Files, index_lists: typing.Iterable[list[int]], workers: int = 0):
    """Yield (uint8 (b, C, h, w), int64 (b,)) for each list of indices, in order, decoded by worker processes."""
    loader = torch.utils.data.DataLoader(
        _Fetcher(source), batch_sampler=index_lists, collate_fn=_as_it_is, num_workers=workers,
        worker_init_fn=_ignore_signals, generator=torch.Generator(), pin_memory=False)
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def stream(source: Arrays | Files, position_lists: typing.Iterable[list[int]], seed: int, mirror: bool = False,
           workers: int = 0):
    """Training batches (uint8 images or float16 moments, labels, positions) at these positions of the run.

    mirror: half of them are flipped.
    """
    for_indices, for_positions = itertools.tee(position_lists)
    indices = ([index_at(len(source), p, seed) for p in positions] for positions in for_indices)
    for (images, labels), positions in zip(batches(source, indices, workers), for_positions):
        yield flipped(images, (Draws(seed, positions).uniform("flip") < 0.5) & mirror), labels, positions


# --------------------------------------------------------------------------------------------------------------------
# 6. The latent codec: SD-VAE
# --------------------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where the width changes."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.conv_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class _PixelAttention(nn.Module):
    """x + attention of its pixels, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                                    # (B, h w, W)
        made = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](made).transpose(1, 2).view_as(x)


class _Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_PixelAttention(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Scaler(nn.Module):
    """Half or twice the size: a strided convolution padded below and on the right, or repeated pixels, convolved."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, 1 if up else 2, padding=int(up))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    def __init__(self, width: int, out: int, depth: int, up: bool, scaled: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width if k == 0 else out, out) for k in range(depth))
        self.name = "upsamplers" if up else "downsamplers"
        setattr(self, self.name, nn.ModuleList([_Scaler(out, up)] if scaled else []))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *getattr(self, self.name)):
            x = layer(x)
        return x


class _Half(nn.Module):
    """The encoder, or with up=True the decoder: a convolution, levels and the middle (or the other way round), a last one."""

    def __init__(self, inputs: int, widths: list[int], outputs: int, depth: int, up: bool):
        super().__init__()
        self.up, last = up, len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        levels = nn.ModuleList(_Level(widths[max(0, k - 1)], w, depth, up, k < last) for k, w in enumerate(widths))
        setattr(self, "up_blocks" if up else "down_blocks", levels)
        self.mid_block = _Middle(widths[0 if up else -1])
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (self.mid_block, *self.up_blocks) if self.up else (*self.down_blocks, self.mid_block):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder of latent diffusion (arXiv:2112.10752) as sd-vae-ft-ema and -mse: 8 x 8 pixels to 4 numbers.

    Names are those of the official files. Latents are in units of `scale`: about one standard deviation.
    """
    scale = 0.18215

    def __init__(self, widths: tuple[int, ...] = (128, 256, 512, 512)):
        super().__init__()
        self.encoder = _Half(3, list(widths), 8, 2, up=False)
        self.decoder = _Half(4, list(widths[::-1]), 3, 3, up=True)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [-1, 1] -> mean and log-variance of their latents, before `scale` (B, 8, h/8, w/8)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) in units of `scale` -> images (B, 3, 8 h, 8 w), in [-1, 1] or a little beyond."""
        return self.decoder(self.post_quant_conv(latents / self.scale))


def latent(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw of the latent posterior, (mean + std noise) scale: moments (B, 8, h, w), noise (B, 4, h, w)."""
    mean, log_variance = moments.float().chunk(2, 1)
    return (mean + (log_variance.clamp(-30, 20) / 2).exp() * noise) * VAE.scale


def load_vae(path: str | Path) -> VAE:
    """The codec from diffusers' .safetensors or .bin, or a .pt of the same names; attention under its old names as well."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"VAE not found: {path}. Download https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/"
                                f"diffusion_pytorch_model.safetensors (334,643,276 bytes, sha256 a1d99348...) to {path}")
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: damaged, or not a file of tensors ({type(error).__name__}); get it again") from error
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, value in weights.items():
        stem, _, name = key.rpartition(".")
        if ".attentions." in key:  # as a 1 x 1 convolution in some files
            head, _, last = stem.rpartition(".")
            key, value = f"{head}.{old.get(last, last)}.{name}" if last in old else key, value.squeeze()
        renamed[key] = value.float()
    widths = [len(renamed[k]) for k in (f"encoder.down_blocks.{i}.resnets.0.conv1.bias" for i in range(9)) if k in renamed]
    with torch.device("meta"):
        vae = VAE(tuple(widths) or (128, 256, 512, 512))
    own = vae.state_dict()
    wrong = [k for k in own if k not in renamed or renamed[k].shape != own[k].shape] + [k for k in renamed if k not in own]
    if wrong:
        raise ValueError(f"{path}: not an SD-VAE file: {wrong[0]} is missing, unknown or of another shape ({len(wrong)} such)")
    vae.load_state_dict(renamed, assign=True)
    return vae.eval().requires_grad_(False)


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                     "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped from disk. ValueError, before anything is read, for a header that lies.

    Layout: uint64 length of the header, header {name: {dtype, shape, data_offsets [begin, end]}} in JSON, bytes.
    """
    size = os.path.getsize(path)

    def refuse(what: str):
        raise ValueError(f"{path}: {what}: damaged, or not a .safetensors file; get it again")

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            refuse(f"a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            entries = []
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = map(int, entry["data_offsets"])
                    entries.append((name, SAFETENSORS_TYPES[entry["dtype"]], [int(n) for n in entry["shape"]], begin, end))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            refuse(f"its header cannot be read ({type(error).__name__}: {str(error)[:60]})")
    last = 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        fits = last <= begin and end <= size - 8 - length and end - begin == math.prod(shape) * dtype.itemsize
        if not fits or min(shape, default=0) < 0:
            refuse(f"{name} of shape {shape} lies at {begin} to {end} of {size - 8 - length:,} bytes, after {last}")
        last = end
    raw = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + length:] if entries else torch.empty(0)
    parts = {name: (raw[begin:end], dtype, shape) for name, dtype, shape, begin, end in entries}
    return {name: (part.clone() if part.storage_offset() % dtype.itemsize else part).view(dtype).view(shape)
            for name, (part, dtype, shape) in parts.items()}


# --------------------------------------------------------------------------------------------------------------------
# 7. Processes, command lines, files
# --------------------------------------------------------------------------------------------------------------------

def start_processes(device: str = "auto") -> torch.device:
    """Join the other processes when torchrun started this one, and return the device to run on.

    NCCL carries CUDA tensors and gloo CPU tensors; without torchrun nothing is started.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if device == "cuda":
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"process {local} has no GPU: this machine has {found}; use --nproc_per_node={found}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def stop_processes() -> None:
    """Leave together: a process that goes while others still talk to it, or that still holds a group, may abort."""
    if dist.is_initialized():
        barrier()
        gc.collect()  # DistributedDataParallel sits in reference cycles and keeps its process group alive
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes (on a CPU tensor: no device needed)."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def option(default, help: str, choices: tuple = ()):
    """A field of a config dataclass that is also a command-line flag."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see python {os.path.basename(sys.argv[0])} --help)")


def parse(config: type, argv: list[str] | None, description: str, positional: tuple[str, ...] = (), **defaults):
    """Fill the dataclass `config` from the command line: a flag for each field, with its type, default and help.

    `defaults` stand in for those of the dataclass, for flags that are not given.
    Fields named in `positional` stand without a flag. An unknown flag is a ValueError that names the nearest one.
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config):
        help = field.metadata["help"] + ("" if field.default in ("", None) else f" (default: {field.default})")
        choices = dict(choices=field.metadata["choices"]) if field.metadata["choices"] else {}
        if field.name in positional:
            parser.add_argument(field.name, nargs="?", default=field.default, help=help.replace("%", "%%"), **choices)
        elif isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=field.default,
                                help=field.metadata["help"].replace("%", "%%"))
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default,
                                metavar=None if choices else field.name.upper(), help=help.replace("%", "%%"), **choices)
    parser.set_defaults(**defaults)
    argv = [_underscores(token) for token in (sys.argv[1:] if argv is None else argv)]
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [s for action in parser._actions for s in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
        raise ValueError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return config(**vars(values))


def _underscores(token: str) -> str:
    """--save-every is --save_every (the value behind an = stays)."""
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    prefix = "no-" if name.startswith("no-") else ""
    return "--" + prefix + name[len(prefix):].replace("-", "_") + equals + value


def run_cli(main) -> None:
    """Run a script's main; errors a user can mend are printed as one line, exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        where = f"rank {os.environ.get('RANK')}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def digest(path: str | Path) -> str:
    """sha256 of a file."""
    found = hashlib.sha256()
    with open(Path(path).expanduser(), "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def require_file(path: str | Path, what: str, url: str, size: int, sha256: str) -> Path:
    """The path of a downloaded file, checked. Nothing is ever downloaded: a missing file is explained instead.

    size in bytes; sha256: the full digest, or its first digits. FileNotFoundError, or ValueError for a wrong file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{what} not found: {path}. Download {url} ({size:,} bytes, sha256 {sha256}) to {path}")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path}: {found:,} bytes, expected {size:,}: an incomplete download? Get it again from {url}")
    if not (own := digest(path)).startswith(sha256):
        raise ValueError(f"{path}: sha256 {own[:16]}, expected {sha256}: not {what}. Get it again from {url}")
    return path


# --------------------------------------------------------------------------------------------------------------------
# 8. Run alone: look at a data set, or encode it
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Encode:
    source: str = option("", "images: a folder such as ImageNet's train, a .zip, an .npz, ...")
    out: str = option("", "the folder of latents to write")
    vae: str = option("sd-vae-ft-mse.safetensors", "the codec's file")
    encoder: str = option("", "FILE.py:NAME, a frozen encoder whose features are written as well, for repa and reg")
    size: int = option(256, "crop and scale images to this many pixels")
    batch: int = option(16, "images at a time on each process")
    shard: int = option(4096, "images in one file")
    workers: int = option(4, "processes that decode images")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))


@torch.no_grad()
def encode(cfg: Encode) -> None:
    """Write the moments of every image and of its mirror image, shard by shard; files that are there are left alone.

    Moments rather than latents, so that training draws from the posterior anew each epoch. Processes share the shards.
    With an encoder, its features of both sides too.
    """
    device, out = start_processes(cfg.device), Path(cfg.out)
    vae, ds = load_vae(cfg.vae).to(device), dataset(cfg.source, cfg.size)
    encoder = Encoder(cfg.encoder, cfg.size, device) if cfg.encoder else None
    if cfg.size % 8 or cfg.batch < 1 or cfg.shard < 1:
        raise ValueError(f"--size {cfg.size} --batch {cfg.batch} --shard {cfg.shard}: expected a multiple of 8, and at least 1")
    about = dict(source=cfg.source, count=len(ds), classes=list(ds.classes), size=cfg.size, shard=cfg.shard,
                 shape=[4, cfg.size // 8, cfg.size // 8], scale=VAE.scale, codec=digest(cfg.vae), encoder=cfg.encoder,
                 features=list(encoder.shape) if encoder else None)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "manifest.json").exists() and (was := read_manifest(out)) != about:
        name = next(k for k in about if was.get(k) != about[k])
        raise ValueError(f"{out}: was begun with {name} {str(was.get(name))[:80]}, not {str(about[name])[:80]}: name a new folder")
    barrier()
    if rank() == 0:
        np.save(out / "labels.npy", np.asarray(ds.labels, np.int64))
        (out / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")
    own = range(rank() * cfg.shard, len(ds), world() * cfg.shard)  # by number: what others have written meanwhile moves nothing
    starts = [s for s in own if not _shard(out, s // cfg.shard).exists()]
    with tqdm(total=sum(min(cfg.shard, len(ds) - s) for s in starts), desc="encoding", unit="img", disable=rank() > 0) as bar:
        for start in starts:
            indices = range(start, min(start + cfg.shard, len(ds)))
            _encode_shard(vae, encoder, ds, indices, out, cfg, device, bar)
    barrier()
    if rank() == 0:
        print(f"wrote {out}: {len(ds):,} images as latents {tuple(about['shape'])} of {ds.num_classes} classes; train with "
              f"train.py --data {out} --vae {cfg.vae}")


def _shard(out: Path, k: int, what: str = "moments") -> Path:
    return out / f"{what}_{k:05d}.npy"


def _encode_shard(vae: VAE, encoder: Encoder | None, ds, indices: range, out: Path, cfg: Encode, device, bar) -> None:
    """Moments, and features where there is an encoder, to temporary files that then take their names: moments last."""
    def moments(x):
        found = vae.moments(x)
        found[:, 4:].clamp_(-30, 20)  # of the log-variance only these values count
        return found

    makers = ({"features": (encoder, encoder.shape)} if encoder else {}) | {
        "moments": (moments, (8, cfg.size // 8, cfg.size // 8))}
    paths = {what: _shard(out, indices[0] // cfg.shard, what) for what in makers}
    rows = {what: np.lib.format.open_memmap(paths[what].with_suffix(".tmp.npy"), "w+", np.float16, (len(indices), 2, *shape))
            for what, (_, shape) in makers.items()}
    chunks = [list(indices[k:k + cfg.batch]) for k in range(0, len(indices), cfg.batch)]
    for chunk, (images, _) in zip(chunks, batches(ds, chunks, cfg.workers)):
        x, here = to_float(images.to(device)), slice(chunk[0] - indices[0], chunk[-1] - indices[0] + 1)
        for what, (make, _) in makers.items():
            both = torch.stack([make(x), make(x.flip(3))], 1).half()
            if not torch.isfinite(both).all():
                raise ValueError(f"{cfg.vae if what == 'moments' else cfg.encoder}: gives {what} that are not finite as float16 "
                                 f"for the images {chunk[0]} to {chunk[-1]}")
            rows[what][here] = both.cpu().numpy()
        bar.update(len(chunk))
    for what, written in rows.items():
        written.flush()
        os.replace(paths[what].with_suffix(".tmp.npy"), paths[what])


def read_manifest(root: Path) -> dict:
    """What `encode` says of a folder of latents."""
    try:
        about = json.loads((root / "manifest.json").read_text())
        if not {"count", "classes", "size", "shard", "shape", "scale", "codec"} <= about.keys():
            raise ValueError("an entry is missing")
        about = dict(encoder="", features=None) | about  # later than the others
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{root}/manifest.json: not one of data.py encode ({error})") from error
    return about


@dataclasses.dataclass
class Config:
    source: str = option("glyphs", "glyphs, glyphs:SEED, an image folder, .zip, .npz, MNIST or CIFAR-10 files")
    size: int = option(0, "crop and scale to this many pixels; 0 keeps the images as they are")
    n: int = option(100, "images on the grid")
    out: str = option("data.png", "the picture to write")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        cfg = parse(Encode, argv[1:], "Encode images as latents for training.", ("source", "out"))
        if not cfg.source or not cfg.out:
            raise ValueError("usage: python data.py encode IMAGES OUT --vae FILE")
        encode(cfg)
        return stop_processes()
    cfg = parse(Config, argv, "Look at a data set: a labelled grid of its images, and its counts.", ("source",))
    ds = dataset(cfg.source, cfg.size or None)
    shown = torch.linspace(0, len(ds) - 1, min(cfg.n, len(ds))).long().tolist()
    if cfg.source.startswith("glyphs"):
        shown = list(range(min(cfg.n, len(ds))))  # their labels cycle: one digit a column
    images, labels = next(batches(ds, [shown]))
    grid(images, 10, [ds.classes[k] for k in labels]).save(cfg.out)
    every = np.asarray(ds.labels)
    counts = np.bincount(every, minlength=ds.num_classes)
    print(f"{cfg.source}: {len(ds):,} images of shape {ds.shape}, {ds.num_classes} classes, "
          f"{counts.min():,} to {counts.max():,} images a class")
    for name, count in list(zip(ds.classes, counts))[:20]:
        print(f"  {name:>12} {count:>8,}")
    if ds.num_classes > 20:
        print(f"  ... and {ds.num_classes - 20} more classes")
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run_cli(main)
