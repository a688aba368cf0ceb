"""Image sets in formats of other projects: EDM's zip, MNIST's idx files, CIFAR-10's binary files.

    edm.zip                         images, and labels in dataset.json, as EDM's dataset_tool.py writes it
    train-images-idx3-ubyte[.gz]    or a folder with it: MNIST, Fashion-MNIST; the labels' file lies beside it
    test_batch.bin[.gz]             or a folder or .tar.gz with data_batch_1.bin ..: CIFAR-10, binary version

In folders they are looked for at any depth, as torchvision's (MNIST/raw) and the archives' (an unpacked
cifar-10-batches-bin) have them.

`data.dataset` looks here when it does not know a path itself: importing this file adds the three readers to
`data.READERS`. Each is a function (path, size) -> data set, or None for a path that is not its own. For
`data.read_npz` it maps arrays from disk.

    python -m extras.formats PATH             a labelled picture grid of the set, and its counts
    python train.py --data PATH               train on it
"""
import gzip
import io
import json
import math
import os
import re
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data

CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ---- 1. EDM's zip ----


class Zip(data.Files):
    """Image files inside a zip archive, decoded when asked for."""

    def __init__(self, root: Path, *args):
        self.archive, self.owner = None, None
        super().__init__(root, *args)

    def __getstate__(self):  # an open archive does not travel to worker processes
        return self.__dict__ | {"archive": None, "owner": None}

    def open(self, name: str):
        if self.owner != os.getpid():  # forked workers must not share one file position
            self.archive, self.owner = zipfile.ZipFile(self.root), os.getpid()
        return io.BytesIO(self.archive.read(name))


def read_zip(path: Path, size: int | None) -> Zip | None:
    """A zip of images; dataset.json holds {"labels": [[name, label], ...]}. Without it all are one class."""
    if path.suffix != ".zip" or path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
            meta = json.loads(archive.read("dataset.json")) if "dataset.json" in inside else {}
        table = dict(meta.get("labels") or [])
    except (zipfile.BadZipFile, zlib.error, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a zip of images and dataset.json as EDM writes it ({error})") from None

    names = sorted(n for n in inside if Path(n).suffix.lower() in data.IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{path}: no images in this zip; expected images and, for labels, dataset.json")
    missing = [n for n in names if table and n not in table]
    if missing:
        raise ValueError(f"{path}: dataset.json has no label for {missing[0]} ({len(missing)} such images)")
    labels = [table[n] for n in names] if table else np.zeros(len(names), int)
    labels = data.check_labels(labels, len(names), str(path))
    return Zip(path, names, labels.tolist(), size, [str(k) for k in range(int(labels.max()) + 1)])


# ---- 2. MNIST's idx files ----


def read_idx(path: Path, size: int | None) -> data.Arrays | None:
    """MNIST and its likes: ..images-idx3-ubyte[.gz] with ..labels-idx1-ubyte[.gz]; of a folder, train's."""
    pattern = r".*images[-.]idx3-ubyte(\.gz)?"
    found = uppermost(path, pattern) if path.is_dir() else [path] * bool(re.fullmatch(pattern, path.name))
    if not found:
        return None
    sets = sorted({f.name.removesuffix(".gz") for f in found if "train" in f.name})
    if len(sets) > 1:
        raise ValueError(f"{path}: holds several data sets, {', '.join(sets)}: name one of these files")
    file = next((f for f in found if "train" in f.name), found[0])
    name = file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labelled = [f for f in (file.with_name(name), file.with_name(name + ".gz")) if f.is_file()]
    labelled = labelled or (uppermost(path, re.escape(name) + r"(\.gz)?") if path.is_dir() else [])
    if not labelled:
        raise ValueError(f"{file}: its labels {name} are missing beside it")
    images, labels = unpack_idx(file, 3), unpack_idx(labelled[0], 1)
    return data.Arrays(images[:, None], data.check_labels(labels, len(images), str(labelled[0])), size)


def uppermost(root: Path, pattern: str) -> list[Path]:
    """The files below a folder with such names, those of the upper level where it is on several, unpacked
    ones first. A ValueError where there are two folders of them."""
    found = [f for f in sorted(root.rglob("*")) if f.is_file() and re.fullmatch(pattern, f.name)]
    depth = min((len(f.parts) for f in found), default=0)
    found = sorted((f for f in found if len(f.parts) == depth), key=lambda f: (f.suffix == ".gz", f.name))
    folders = sorted({str(f.parent) for f in found if not f.parent.name == f.name})
    if len(folders) > 1:
        raise ValueError(f"{root}: holds several data sets, in {' and in '.join(folders)}: name one of these")
    return found


def unpack(file: Path) -> bytes:
    """What is in a file, or in a .gz of it."""
    try:
        return gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not readable ({error}); get it again") from error


def unpack_idx(file: Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0 0 8 dims, `dims` big-endian int32 sizes, values."""
    raw, head = unpack(file), 4 + 4 * dims
    shape = np.frombuffer(raw[4:head].ljust(4 * dims, b"\0"), ">i4").astype(np.int64)
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != head + shape.prod() or not shape.prod():
        raise ValueError(f"{file}: not an idx file of {dims}-dimensional bytes, or cut short; get it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


# ---- 3. CIFAR-10's binary files ----


def read_cifar(path: Path, size: int | None) -> data.Arrays | None:
    """CIFAR-10, binary version: records of a label byte and 3 x 32 x 32 image bytes; of several, train's."""
    parts = unpack_all(path, r".*\.bin(\.gz)?" if ".bin" in path.name else r"data_batch_\d\.bin(\.gz)?")
    if not parts:
        if unpack_all(path, r"data_batch_\d"):
            raise ValueError(f"{path}: CIFAR-10's python version is pickled; get the binary version (.bin)")
        return None

    for name, raw in parts.items():
        if not raw or len(raw) % 3073:
            raise ValueError(f"{name}: {len(raw)} bytes is not a whole number of 3073-byte CIFAR-10 records")
    records = np.concatenate([np.frombuffer(raw, np.uint8).reshape(-1, 3073) for raw in parts.values()])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    if labels.max() > 9:
        raise ValueError(f"{path}: label {labels.max()} in a CIFAR-10 file; expected 0 .. 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return data.Arrays(images, labels, size, CIFAR_CLASSES, mirror=True)


def unpack_all(path: Path, pattern: str) -> dict[str, bytes]:
    """{file with such a name, in a folder, in a tar archive or the path itself: what is in it}, by name."""
    if path.is_dir():
        return {str(file): unpack(file) for file in uppermost(path, pattern)}
    if not path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return {str(path): unpack(path)} if re.fullmatch(pattern, path.name) else {}
    try:
        with tarfile.open(path) as archive:
            inside = [m for m in archive if m.isfile() and re.fullmatch(pattern, Path(m.name).name)]
            return {m.name: archive.extractfile(m).read() for m in sorted(inside, key=lambda m: m.name)}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable archive ({error}); get it again") from error


data.READERS |= {"zip": read_zip, "idx": read_idx, "cifar": read_cifar}


# ---- 4. Arrays of an npz, and what this file shows alone ----


def map_member(path: Path, key: str) -> np.ndarray:
    """An array of an npz: mapped from disk, or read into memory where it is compressed."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(archive.open(member))
        file.seek(member.header_offset + 26)  # the lengths of what ends the local header
        file.seek(member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist()))
        version, read = np.lib.format.read_magic(file), np.lib.format.read_array_header_2_0
        shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else read)(file)
        if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize > os.path.getsize(path):
            raise ValueError("cut short, or not numbers")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        raise ValueError("usage: python -m extras.formats PATH: an EDM zip, MNIST idx or CIFAR-10 .bin files")
    data.main(argv)


if __name__ == "__main__":
    data.run_cli(main)
