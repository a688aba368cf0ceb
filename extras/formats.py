"""Image sets in files of other projects: EDM's zip; arrays of an npz, mapped from disk.

    edm.zip                         images, and labels in dataset.json, as EDM's dataset_tool.py writes it

`data.dataset` looks here, and in classics.py, when it does not know a path itself: importing these files adds
their readers to `data.READERS`. Each is a function (path, size) -> data set, or None for a path that is not
its own.

    python -m extras.formats PATH             a labelled picture grid of the set, and its counts
    python train.py --data PATH               train on it
"""
import io
import json
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

import data

LARGEST = 1 << 30  # bytes that are unpacked at once


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


data.READERS["zip"] = read_zip


# ---- 2. Arrays of an npz, and what this file shows alone ----


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
        raise ValueError("usage: python -m extras.formats PATH: an EDM zip")
    data.main(argv)


if __name__ == "__main__":
    data.run_cli(main)
