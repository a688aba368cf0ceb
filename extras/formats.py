"""Image sets in formats of other projects: EDM's zip, MNIST's idx files, CIFAR-10's binary files.

    edm.zip                         images, and labels in dataset.json, as EDM's dataset_tool.py writes it
    train-images-idx3-ubyte[.gz]    or a folder with it: MNIST, Fashion-MNIST; the labels' file lies beside it
    test_batch.bin                  or a folder with data_batch_1.bin ..: the binary version of CIFAR-10

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
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data

LARGEST = 1 << 30  # bytes that are unpacked at once
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ------------------------------------------------------------------------------------------------------------
# 1. EDM's zip
# ------------------------------------------------------------------------------------------------------------


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
        return io.BytesIO(read_member(self.archive, name))


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of up to 1 GB; ValueError, not RuntimeError and others, for one that cannot be read."""
    try:
        if (size := archive.getinfo(name).file_size) > LARGEST:
            raise ValueError(f"{size:,} bytes")
        return archive.read(name)
    except Exception as error:  # encrypted, packed in unknown ways, damaged, not there
        raise ValueError(f"{archive.filename}/{name}: cannot be read ({error}); write it again") from error


def read_zip(path: Path, size: int | None) -> Zip | None:
    """A zip of images; dataset.json holds {"labels": [[name, label], ...]}. Without it all are one class."""
    if path.suffix != ".zip" or path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
            meta = json.loads(read_member(archive, "dataset.json")) if "dataset.json" in inside else {}
        table = dict(meta.get("labels") or [])
    except Exception as error:  # of zipfile, json (RecursionError) and dict
        raise ValueError(f"{path}: not a zip of images and dataset.json as EDM writes it ({error})") from None

    names = sorted(n for n in inside if Path(n).suffix.lower() in data.IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{path}: no images in this zip; expected images and, for labels, dataset.json")
    missing = [n for n in names if table and n not in table]
    if missing:
        raise ValueError(f"{path}: dataset.json has no label for {missing[0]} ({len(missing)} such images)")
    labels = [table[n] for n in names] if table else np.zeros(len(names), int)
    whole = int, np.integer
    if wrong := [n for n, k in zip(names, labels) if not isinstance(k, whole) or abs(k) > 10 ** 6]:
        raise ValueError(f"{path}: dataset.json: label {table[wrong[0]]!r} of {wrong[0]}; expected 0, 1, ..")
    labels = data.check_labels(labels, len(names), str(path))
    return Zip(path, names, labels.tolist(), size, [str(k) for k in range(int(labels.max()) + 1)])


# ------------------------------------------------------------------------------------------------------------
# 2. MNIST's idx files
# ------------------------------------------------------------------------------------------------------------


def read_idx(path: Path, size: int | None) -> data.Arrays | None:
    """MNIST and its likes: ..images-idx3-ubyte[.gz] with ..labels-idx1-ubyte[.gz]; of a folder, train's."""
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if "images" in p.name and "idx3" in p.name]
        if not found:
            return None
        path = next((p for p in found if p.name.startswith("train")), found[0])
    if "images" not in path.name or "idx3" not in path.name:
        return None

    name = path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    if not path.with_name(name).exists():
        raise ValueError(f"{path}: its labels {name} are missing beside it")
    images, labels = unpack_idx(path, 3), unpack_idx(path.with_name(name), 1)
    labels = data.check_labels(labels, len(images), str(path.with_name(name)))
    return data.Arrays(images[:, None], labels, size)


def unpack_idx(file: Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0 0 8 dims, `dims` big-endian int32 sizes, values."""
    head = 4 + 4 * dims
    try:
        with gzip.open(file) if file.suffix == ".gz" else data.open_file(file) as stream:
            raw = stream.read(head)
            shape = np.frombuffer(raw[4:].ljust(4 * dims, b"\0"), ">i4").tolist()
            raw += stream.read(min(LARGEST, abs(math.prod(shape))) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file}: not readable ({error}); get it again") from error

    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != head + math.prod(shape) or min(shape) < 1:
        raise ValueError(f"{file}: not an idx file of {dims}-dimensional bytes, or cut short; get it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


# ------------------------------------------------------------------------------------------------------------
# 3. CIFAR-10's binary files
# ------------------------------------------------------------------------------------------------------------


def read_cifar(path: Path, size: int | None) -> data.Arrays | None:
    """CIFAR-10, binary version: records of a label byte and 3 x 32 x 32 image bytes; of a folder, train's."""
    if path.is_dir() and (path / "data_batch_1").exists() and not (path / "data_batch_1.bin").exists():
        raise ValueError(f"{path}: CIFAR-10's python version is pickled; get the binary version (.bin files)")
    files = sorted(path.glob("data_batch_*.bin")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".bin":
        return None

    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected CIFAR-10's binary version")
        length = file.stat().st_size
        if not length or length % 3073:
            raise ValueError(f"{file}: {length} bytes is not a whole number of 3073-byte CIFAR-10 records")
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    if labels.max() > 9:
        raise ValueError(f"{path}: label {labels.max()} in a CIFAR-10 file; expected 0 .. 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return data.Arrays(images, labels, size, CIFAR_CLASSES, mirror=True)


data.READERS |= {"zip": read_zip, "idx": read_idx, "cifar": read_cifar}


# ------------------------------------------------------------------------------------------------------------
# 4. Arrays of an npz, and what this file shows alone
# ------------------------------------------------------------------------------------------------------------


def map_member(path: Path, key: str) -> np.ndarray:
    """An array of an npz: mapped from disk, or read into memory where it is compressed."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            if member.file_size > LARGEST:
                raise ValueError(f"{key} unpacks to {member.file_size:,} bytes; write it by numpy.savez")
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
