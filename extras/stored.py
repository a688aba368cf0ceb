"""Stored statistics, which stand for an image set, and what must agree before sets are compared.

    python fid.py IMAGES --save_stats OUT.npz        write mu, sigma, n, features, resize rule and image size
    python fid.py GENERATED OUT.npz                  compare with them
    python -m extras.stored FILE                     what a file holds

`fid.open_set` asks `find` for every path. Read are an npz or .pt with mu and sigma (also called ref_mu,
ref_sigma), and mu_s, sigma_s of sFID: ours, ADM's reference files and others. Of ADM's, which hold images
(`arr_0`) as well, the statistics are used where they are enough and the images for other scores, as ADM's
evaluator does.

Refused, in words that name the fix: statistics made with other features, another resize rule or image size;
files that do not say how they were made, unless the features are those of published FIDs; pickles; image
files of several sizes (before hours of work, not after). A warning tells of generated JPEG files:
compression alone moves an FID.
"""
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import data
import fid

NAMES = {("features", fid.Statistics): [("mu", "sigma"), ("ref_mu", "ref_sigma")],  # the first are written
         ("spatial", fid.Statistics): [("mu_s", "sigma_s")]}

# ---- 1. Reading and writing ----


def find(source: str, net: nn.Module, cfg: fid.Config, role: str) -> fid.ImageSet | None:
    """The statistics in a file, with its images where it has them; None for a path without statistics."""
    if cfg.save_stats and not cfg.save_stats.endswith(".npz"):
        raise ValueError(f"--save_stats {cfg.save_stats}: the name must end in .npz")
    arrays, has_images = read_arrays(source)
    check_arrays(source, arrays)
    parts = {need: tuple(torch.as_tensor(arrays[name]).double() for name in pair)
             for need, pairs in NAMES.items() for pair in pairs if {*pair} <= {*arrays}}
    if not parts:
        check_files(source, cfg, role)
        return None

    meta, n = json.loads(str(arrays.get("meta", "{}"))), int(arrays.get("n", 0))
    found = fid.ImageSet(source, n or None, meta.get("size"), parts=parts)
    check_made(source, meta, net)
    fid.check_count(source, found.n, cfg.num if role == "generated" else 0)
    if not has_images:
        return found
    data.note(f"{source}: Frechet distances from its mu and sigma, other scores from its images (arr_0)")
    images = fid.from_dataset(source, cfg, "reference")
    return dataclasses.replace(found, size=images.size, batches=images.batches, labels=images.labels)


def read_arrays(path: str) -> tuple[dict, bool]:
    """The arrays of a file that are about statistics, {} for other files; and whether it has images."""
    wanted = {"n", "meta", *(name for pairs in NAMES.values() for pair in pairs for name in pair)}
    if path.endswith((".pkl", ".pickle")):
        raise ValueError(f"{path}: reading a pickle runs the code in it; convert it once to npz: "
                         "numpy.savez('reference.npz', mu=..., sigma=...)")
    if path.endswith(".npz") and Path(path).is_file():
        try:
            with np.load(path) as file:
                return {name: file[name] for name in wanted & {*file}}, "arr_0" in file
        except Exception as error:  # BadZipFile, zlib.error, EOFError, ValueError, ...
            raise ValueError(f"{path}: not a readable npz ({error}); get or write it again") from error
    if path.endswith(".pt") and Path(path).is_file():
        with contextlib.suppress(Exception):  # damaged, or another kind of checkpoint: model.load says so
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {name: found[name] for name in wanted & {*found}}, False
    return {}, False


def write(path: str, images: fid.ImageSet, net: nn.Module) -> None:
    """Write what `find` reads, on rank 0."""
    arrays = {name: value for need, pairs in NAMES.items() if need in images.parts
              for name, value in zip(pairs[0], images.parts[need])}
    meta = dict(features=net.label, resize=net.resize, size=images.size)
    if data.rank() == 0:
        np.savez(path, **arrays, n=images.n or 0, meta=json.dumps(meta))


# ---- 2. What is refused ----


def check_arrays(name: str, arrays: dict) -> None:
    """ValueError unless means, covariances, the count and the words about them can be what `write` wrote."""
    try:
        for key, value in arrays.items():
            if key not in ("n", "meta"):
                torch.as_tensor(value).double()
        meta, n = json.loads(str(arrays.get("meta", "{}"))), arrays.get("n", 0)
        size = meta.get("size")
        fine = all(type(meta.get(key, "")) is str for key in ("features", "resize")) and n == int(n) >= 0
        fine = fine and (size is None or [type(side) for side in size] == [int, int])
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: damaged statistics ({error}); write them again by --save_stats") from None
    if not fine:
        raise ValueError(f"{name}: damaged statistics (n {n}, {meta}); write them again by --save_stats")


def check_made(name: str, meta: dict, net: nn.Module) -> None:
    """ValueError where features or resize rule are not those of this run, or, unless it is the FID, not
    recorded."""
    ours = dict(features=net.label, resize=net.resize)
    if any(meta[key] != ours[key] for key in meta.keys() & ours.keys()):
        theirs, ours = (", ".join(f"{key}={value}" for key, value in known.items()) for known in (meta, ours))
        raise ValueError(f"{name}: statistics were made with {theirs}; this run uses {ours}: recompute with "
                         "--save_stats")
    if not meta and net.suffix:
        raise ValueError(f"{name} does not say how it was made. Published statistics are of the 2015-12-05 "
                         "weights: use --weights fid; those of other features can only be compared when made "
                         "with --save_stats")
    if not meta:
        data.note(f"warning: {name} does not say how it was made: taken for the 2015-12-05 weights, "
                  f"{net.resize}")


def check_files(source: str, cfg: fid.Config, role: str) -> None:
    """A warning of generated JPEG files; ValueError when image files have several sizes, found from their
    headers."""
    path = Path(source)
    if not path.exists() or (path / "last.pt").exists() or path.suffix in (".npz", ".pt", ".pth"):
        return
    files = data.dataset(source, cfg.size or None)
    names = files.names if isinstance(files, data.Files) else []
    if role == "generated" and any(name.lower().endswith((".jpg", ".jpeg")) for name in names):
        data.note(f"warning: {source} holds JPEG files: compression alone moves an FID; save samples as PNG "
                  "or npz")
    sizes: dict[tuple, list[str]] = {}
    unchecked = [] if cfg.size else names
    for name in tqdm(unchecked, "reading sizes", unit="img", delay=2, disable=data.rank() > 0):
        try:
            with files.open(name) as file, Image.open(file) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                sizes.setdefault(image.size[::-1] if turned else image.size, []).append(name)
        except Exception as error:  # OSError, BadZipFile, zlib.error, ...
            text = f"{source}/{name}: not a readable image ({error}); repair or remove it"
            raise ValueError(text) from error
    if len(sizes) > 1:
        text = ", ".join(f"{w}x{h} ({len(names):,}{': ' + names[0] if len(names) < 4 else ''})"
                         for (w, h), names in sorted(sizes.items(), key=lambda item: -len(item[1]))[:5])
        raise ValueError(f"{source}: images have {len(sizes)} sizes: {text}; give --size to crop all alike")


def main(argv: list[str] | None = None) -> None:
    for path in sys.argv[1:] if argv is None else argv:
        arrays, has_images = read_arrays(path)
        words = [f"{key} {getattr(value, 'shape', '') or value}" for key, value in sorted(arrays.items())]
        print(f"{path}: {', '.join(words) or 'no statistics'}{', and images' * has_images}")


if __name__ == "__main__":
    data.run_cli(main)
