"""MNIST's idx files and CIFAR-10's binary version, in the layouts in which people have them.

    train-images-idx3-ubyte[.gz]    or a folder with it: MNIST, Fashion-MNIST; the labels' file lies beside it
    test_batch.bin[.gz]             or a folder or .tar.gz with data_batch_1.bin ..: CIFAR-10, binary version

In folders they are looked for at any depth, as torchvision's (MNIST/raw) and the archives' (an unpacked
cifar-10-batches-bin) have them. Importing this file adds its two readers to `data.READERS`.

    python -m extras.classics PATH            a labelled picture grid of the set, and its counts
    python train.py --data PATH               train on it
"""
import gzip
import math
import re
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data

LARGEST = 1 << 30  # bytes that are unpacked at once
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ---- 1. MNIST's idx files ----


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
    """What is in a file, or in a .gz of it: up to 1 GB."""
    try:
        with data.open_file(file) as packed:
            return everything(gzip.GzipFile(fileobj=packed) if file.suffix == ".gz" else packed)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file}: not readable ({error}); get it again") from error


def everything(stream) -> bytes:
    raw = stream.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    return raw


def unpack_idx(file: Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0 0 8 dims, `dims` big-endian int32 sizes, values."""
    raw, head = unpack(file), 4 + 4 * dims
    shape = np.frombuffer(raw[4:head].ljust(4 * dims, b"\0"), ">i4").tolist()
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != head + math.prod(shape) or min(shape) < 1:
        raise ValueError(f"{file}: not an idx file of {dims}-dimensional bytes, or cut short; get it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


# ---- 2. CIFAR-10's binary files ----


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
            return {m.name: everything(archive.extractfile(m)) for m in sorted(inside, key=lambda m: m.name)}
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: not a readable archive ({error}); get it again") from error


data.READERS |= {"idx": read_idx, "cifar": read_cifar}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        raise ValueError("usage: python -m extras.classics PATH: MNIST's idx or CIFAR-10's .bin files")
    data.main(argv)


if __name__ == "__main__":
    data.run_cli(main)
