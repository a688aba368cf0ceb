"""Data: the toy set `glyphs`, folders and npz files of images, and what every script shares.

`dataset(source, size)` is a `Dataset`, whose items are an image uint8 (C, h, w) and its label; `stream` makes
training batches of it. The image at a position of a run is a function of (seed, position): any step can be
sought, whatever the number of GPUs and workers.

`python data.py [SOURCE]` draws a grid of a data set and prints its counts.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import typing
from pathlib import Path

ENDS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
sys.excepthook = lambda kind, *e: (  # for Ctrl-C while torch is imported
    print("error: stopped", file=sys.stderr) if kind == KeyboardInterrupt else sys.__excepthook__(kind, *e))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

# ---- 1. Random numbers: functions of (seed, purpose, index), in any order ----


def fold(*parts) -> int:
    """A 63-bit hash of numbers and strings."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts) -> torch.Generator:
    """A CPU generator, seeded with `fold(*parts)`."""
    return torch.Generator().manual_seed(fold(*parts))


class Draws:
    """Random numbers for a batch; those of sample k depend on (seed, purpose, positions[k]) only, where
    positions are step * batch + i in training, the sample's index in evaluation."""

    def __init__(self, seed: int, positions: typing.Sequence[int], device="cpu"):
        self.seed, self.positions, self.device = seed, positions, torch.device(device)

    def normal(self, purpose: str, shape: tuple) -> Tensor:
        """Standard normal (B, *shape), float32, for B positions; a GPU's numbers differ from a CPU's."""
        rng = torch.Generator(self.device)
        out = torch.empty(len(self.positions), *shape, device=self.device)
        for row, p in zip(out, self.positions):
            row.normal_(generator=rng.manual_seed(fold(self.seed, purpose, p)))
        return out

    def uniform(self, purpose: str, shape: tuple = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape), float32."""
        rows = [torch.rand(shape, generator=generator(self.seed, purpose, p)) for p in self.positions]
        return torch.stack(rows).to(self.device)


# ---- 2. Images as numbers, and pictures of many of them ----


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] -> uint8, to the nearest level; no NaN, which a cast would turn into 0."""
    if bad := (~torch.isfinite(images)).flatten(1).any(1).sum().item():
        raise ValueError(f"{bad} of {len(images)} images are not finite: network or sampler diverged")
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int = 0, captions: list[str] | None = None) -> Image.Image:
    """One picture of images uint8 (N, 3, h, w), each enlarged to about 64 pixels; columns 0: a square."""
    zoom = max(1, round(64 / images.shape[3]))
    tiles = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3).permute(0, 2, 3, 1).cpu().numpy()
    n, h, w, _ = tiles.shape
    columns, gap, text = columns or math.ceil(math.sqrt(n)), 2, 14 if captions else 0
    cell_w, cell_h = w + gap, h + gap + text
    sheet = Image.new("RGB", (columns * cell_w + gap, math.ceil(n / columns) * cell_h + gap), "white")
    pen, font, fits = ImageDraw.Draw(sheet), ImageFont.load_default(size=11), w // 6
    for i, image in enumerate(tiles):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        sheet.paste(Image.fromarray(image), (x, y))
        if captions:
            caption = captions[i] if len(captions[i]) <= fits else captions[i][:fits - 1] + "."
            pen.text((x, y + h), caption, fill="black", font=font)
    return sheet


def decode(file, name: str, size: int | None) -> Tensor:
    """An image file -> RGB uint8 (3, size, size): EXIF's turn, laid over white, cropped."""
    try:
        with Image.open(file) as image:
            if image.mode == "F":
                raise ValueError("fractions in place of pixels, write it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
            image = image if size is None else centre_crop(image, size)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{name}: not a readable image ({error}); repair or remove it") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (guided-diffusion): box filter to half while twice too large, bicubic, centre."""
    check_length(*image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    w, h = round(image.width * scale), round(image.height * scale)
    left, top = (w - size) // 2, (h - size) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


# ---- 3. Data sets ----


def _digit_masks(side: int = 64) -> Tensor:
    """The ten digits, white on black: float (10, 1, side, side) in [0, 1]."""
    font, masks = ImageFont.load_default(size=round(0.95 * side)), []
    for digit in "0123456789":
        sheet = Image.new("L", (side, side))
        ImageDraw.Draw(sheet).text((side / 2, side / 2), digit, fill=255, font=font, anchor="mm")
        masks.append(torch.from_numpy(np.array(sheet)) / 255)
    return torch.stack(masks)[:, None]


def _pose(n: int, rng: torch.Generator) -> Tensor:
    """Random affine maps (n, 2, 3) from output to mask coordinates."""
    angle, shear, sx, sy, dx, dy = (2 * torch.rand(n, 6, generator=rng) - 1).unbind(1)
    angle, shear, scale = 0.2 * angle, 0.15 * shear, 0.975 + 0.125 * sx
    rows = angle.cos(), angle.sin() + shear, 0.08 * dx, -angle.sin(), angle.cos(), 0.08 * dy
    return torch.stack(rows, 1).view(n, 2, 3) / (scale * (1 + 0.08 * sy))[:, None, None]


def glyphs(n: int, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n images of the digits 0-9: uint8 (n, 3, size, size), and labels int64 (n,), label i = i % 10.

    A prefix of any longer draw; Pillow (its font) and torch may change low bits. Its scores are no FIDs."""
    if not features.check("freetype2"):
        raise ValueError("glyphs needs FreeType in Pillow: pip install --upgrade pillow")
    out, labels = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.arange(n) % 10
    digits, chunk = _digit_masks(), 1000
    for start in range(0, n, chunk):
        m, rng = min(chunk, n - start), generator("glyphs", seed, start)
        where = F.affine_grid(_pose(chunk, rng)[:m], [m, 1, 2 * size, 2 * size], align_corners=False)
        ground, ink = torch.rand(2, chunk, 3, 1, 1, generator=rng)[:, :m]
        ground, ink = 0.35 * ground, 0.65 + 0.35 * ink
        mask = F.grid_sample(digits[labels[start:start + m]], where, align_corners=False)
        mask = F.avg_pool2d(mask, 2)  # of twice the size: smooth edges
        out[start:start + m] = to_uint8(2 * (ground + mask * (ink - ground)) - 1)
    return out, labels


class Dataset:
    """classes (names), labels (n,), shape (C, h, w) of an item; item(i) -> (tensor, label)."""
    mirror = False  # whether a left-right flipped item is as good: photographs yes, digits no
    num_classes = property(lambda self: len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        """A batch, for DataLoader; an error is a value, so that it stays one line."""
        try:
            items, labels = zip(*map(self.item, indices))
        except ValueError as error:
            return error
        return torch.stack(items), torch.tensor(labels)

    def flip(self, items: Tensor, where: Tensor) -> Tensor:
        """Items, mirrored where `where` (B,)."""
        return torch.where(where[:, None, None, None], items.flip(3), items)

    def clean(self, items: Tensor, draws: Draws) -> Tensor:
        """Items as the network's clean data x: float (B, C, h, w), of images in [-1, 1]."""
        return to_float(items)


class Arrays(Dataset):
    """Images in one array, a tensor or mapped from a file: uint8 (N, C, h, w), labels (N,)."""

    def __init__(self, images, labels: Tensor, size: int | None, classes=None, mirror: bool = False):
        self.images, self.labels, self.size, self.mirror = images, labels, size, mirror
        self.classes = classes or [str(k) for k in range(int(labels.max()) + 1)]
        self.shape = (3, size, size) if size else (3, *images.shape[2:])

    def item(self, i: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.asarray(self.images[i]).copy()).expand(3, -1, -1)  # grey has 1 channel
        if image.shape != self.shape:
            picture = centre_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), self.size)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return image, int(self.labels[i])


class Files(Dataset):
    """Image files of a folder."""
    mirror = True

    def __init__(self, root: Path, names: list[str], labels: list[int], size: int | None, classes: list[str]):
        self.root, self.names, self.labels, self.size, self.classes = root, names, labels, size, classes
        self.shape = tuple(self.item(0)[0].shape)

    def open(self, name: str):
        return open_file(self.root / name)

    def item(self, i: int) -> tuple[Tensor, int]:
        name = f"{self.root}/{self.names[i]}"
        try:
            with self.open(self.names[i]) as file:
                image = decode(file, name, self.size)
        except ValueError:
            raise
        except Exception as error:  # OSError, and what archives raise
            raise ValueError(f"{name}: cannot be read ({error}); repair or remove it") from error
        if i and image.shape != self.shape:
            (_, h, w), (_, first_h, first_w) = image.shape, self.shape
            raise ValueError(f"{name} is {w}x{h}, {self.names[0]} {first_w}x{first_h}; crop all by --size")
        return image, self.labels[i]


_glyph_set = functools.lru_cache(maxsize=2)(glyphs)


def read_glyphs(path: Path, size: int | None) -> Arrays | None:
    """`glyphs` (20,000 training images) or `glyphs:SEED` (another draw)."""
    name, _, seed = str(path).partition(":")
    if name != "glyphs" or path.exists():
        return None
    if not (seed or "0").isdigit():
        raise ValueError(f"{path}: expected glyphs or glyphs:SEED, a whole number")
    return Arrays(*_glyph_set(20_000, size or 32, int(seed or 0)), size)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def read_folder(root: Path, size: int | None) -> Files | None:
    """A folder of images, a subfolder for each class (ImageNet's layout), or flat: one class."""
    walk = getattr(optional("checks"), "walk", os.walk)
    files = [Path(folder, f) for folder, _, inside in walk(root, followlinks=True) for f in inside]
    names = sorted(f.relative_to(root).as_posix() for f in files if f.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        return None
    folders = [name.split("/")[0] if "/" in name else "." for name in names]
    classes, labels = (found.tolist() for found in np.unique(folders, return_inverse=True))
    if "." in classes and len(classes) > 1:
        raise ValueError(f"{root}: images in it ({names[folders.index('.')]}) and in subfolders "
                         f"({', '.join(classes[1:])}); move all into subfolders")
    return Files(root, names, labels, size, classes if classes != ["."] else [root.name])


def read_npz(path: Path, size: int | None) -> Arrays | None:
    """An npz of `images` or `arr_0` (ADM), NHWC or NCHW, colour or grey, and `labels` or `arr_1` if there."""
    if path.suffix != ".npz" or not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            held = sorted(file)
            key = "images" if "images" in held else "arr_0"
            formats = optional("formats")  # maps from disk
            images = (formats.map_member(path, key) if formats else file[key]) if key in held else None
            labels = next((file[k] for k in ("labels", "arr_1") if k in held), None)
    except Exception as error:  # of numpy, zipfile and zlib
        why = " ".join(str(error).split())[:80]
        raise ValueError(f"{path}: not a readable .npz ({why}); write it by numpy.savez") from None
    check_array(path, held, key, images, size)
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    return Arrays(images, check_labels(labels, len(images), str(path)), size)


READERS = {"glyphs": read_glyphs, "npz": read_npz, "folder": read_folder}  # (path, size) -> Dataset, or None


def dataset(source: str, size: int | None = None) -> Dataset:
    """The data set at a path, glyphs or glyphs:SEED; images cropped to `size`, or as they are."""
    path, absent = Path(source), ""
    check_source(path)
    for module in ("", "formats", "classics", "latents"):  # of extras/, where the core cannot read it
        if module and not optional(module):
            absent += f"; extras/{module}.py is not there"
        for read in list(READERS.values()):
            if (found := read(path, size)) is not None:
                return found
        if not path.exists():
            raise FileNotFoundError(f"{source}: no such file or folder; expected one, or glyphs")
    raise ValueError(f"{source}: no images found; expected {' '.join(sorted(IMAGE_SUFFIXES))} in a "
                     f"folder or class subfolders, or a file of {', '.join(READERS)}{absent}")


# ---- 4. Batches ----


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def index_at(n: int, position: int, seed: int) -> int:
    """The index, of n items, at a position of the run: a new order each epoch."""
    epoch, offset = divmod(position, n)
    return int(permutation(n, seed, epoch)[offset])


def _ignore_signals(_worker: int) -> None:
    for number in ENDS:  # the main process finishes its step and saves
        signal.signal(number, signal.SIG_IGN)


def batches(source: Dataset, index_lists: typing.Iterable[list[int]], workers: int = 0):
    """Yield (items (b, C, h, w), labels int64 (b,)) for lists of indices; workers -1: 4 for files."""
    if workers < 0:
        workers = min(4, os.cpu_count()) if isinstance(source, Files) else 0
    loader = torch.utils.data.DataLoader(  # by a generator of its own: torch's stays as it is
        source, batch_size=None, sampler=index_lists, num_workers=workers, worker_init_fn=_ignore_signals,
        generator=torch.Generator())
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def stream(source: Dataset, position_lists, seed: int, mirror: bool = False, workers: int = 0):
    """Yield (items, labels, positions) for each list of positions; mirror: flip half of the items."""
    for_indices, for_positions = itertools.tee(position_lists)
    indices = ([index_at(len(source), p, seed) for p in positions] for positions in for_indices)
    for (items, labels), positions in zip(batches(source, indices, workers), for_positions):
        yield source.flip(items, (Draws(seed, positions).uniform("flip") < 0.5) & mirror), labels, positions


# ---- 5. What is not the core: extras/, found by name ----


def extra_file(name: str) -> Path:
    return Path(__file__).with_name("extras") / f"{name}.py"


def extra(name: str, why: str):
    """Import extras/NAME.py; `why` begins the error."""
    if not re.fullmatch("(?!test_)[a-z]\\w*", name) or not extra_file(name).is_file():
        raise ValueError(f"{why}: not in the core, and there is no extras/{name}.py")
    try:
        return importlib.import_module(f"extras.{name}")
    except ImportError as error:
        raise ValueError(f"{why}: extras/{name}.py needs what is not there: {error}") from error


def optional(name: str):
    """The module extras/NAME.py; None where there is none."""
    return extra(name, name) if extra_file(name).is_file() else None


def lookup(table: dict, name: str, what: str):
    """table[name], which may come with the extra it names: extras/a.py for "a-B/16"."""
    file = re.split(r"\W", name.lower())[0]
    if name not in table and extra_file(file).is_file():
        extra(file, name)
    if name not in table:
        raise ValueError(f"{what} {name!r}: choose one of {', '.join(table)}; no extras/{file}.py adds it")
    return table[name]


def codec(name: str, device="cpu"):
    """What decodes latents: codec(REST) of extras/FILE.py for "FILE:REST"; None for ""."""
    file, _, rest = name.partition(":")
    return extra(file, f"--codec {name}").codec(rest).to(device) if name else None


# ---- 6. Command lines, processes, files ----


def option(default, help: str, choices: tuple = ()):
    """A field of a config dataclass, and its command-line flag."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see python {os.path.basename(sys.argv[0])} --help)")


def parse(config, argv, description, positional=(), own=(), elsewhere=lambda name: "", **defaults):
    """The dataclass `config` from the command line: a flag for each field, of its type and default.

    positional: fields without a flag; own: those first in --help; elsewhere(name): where an unknown flag is
    known, or ""; defaults: in place of the dataclass's."""
    parser = _Parser(usage="python %(prog)s [settings]", description=description, allow_abbrev=False,
                     add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = [parser.add_argument_group(title) for title in ("settings of this objective", "settings")]
    groups[1].add_argument("-h", "--help", action="help", help="show this text")
    for field in dataclasses.fields(config):
        choices, default = field.metadata["choices"] or None, defaults.get(field.name, field.default)
        help = field.metadata["help"] + ("" if default in ("", None) else f" (default: {default})")
        shared, group = dict(default=default, help=help.replace("%", "%%")), groups[field.name not in own]
        if field.name in positional:
            parser.add_argument(field.name, nargs="?", choices=choices, **shared)
        elif isinstance(field.default, bool):
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **shared)
        else:
            group.add_argument(f"--{field.name}", type=type(field.default), choices=choices, **shared)
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--(no-)?([^=]*)", lambda m: f"--{m[1] or ''}{m[2].replace('-', '_')}", a) for a in argv]
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, 1, 0.5)
        hint = elsewhere(flag.removeprefix("--")) or (f"did you mean {near[0]}?" if near else "see --help")
        raise ValueError(f"unknown argument {unknown[0]}; {hint}")
    return checked(config(**vars(values)))


def start_processes(device: str = "auto") -> torch.device:
    """The device to run on; under torchrun, joins the other processes."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            fix = f"--nproc_per_node={found}" if found else "--device cpu"
            raise ValueError(f"--device cuda: process {local} has no GPU, torch sees {found}: use {fix}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        getattr(optional("faults"), "listen", bool)()
    return torch.device(device)


def stop_processes() -> None:
    """Leave together: a process that others wait for may abort."""
    if dist.is_initialized():
        barrier()
        gc.collect()  # DDP sits in reference cycles and keeps its process group alive
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def note(text: str) -> None:
    """Tell the user on stderr, once."""
    if rank() == 0:
        print(text, file=sys.stderr)


@dataclasses.dataclass
class Config:
    source: str = option("glyphs", "glyphs, glyphs:SEED, a folder of images, an npz, or of extras/")
    size: int = option(0, "crop and scale to this many pixels; 0: as they are")
    n: int = option(100, "images on the grid")
    out: str = option("data.png", "the picture to write")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, argv, "A labelled grid of a data set's images, and its counts.", ("source",))
    ds = dataset(cfg.source, cfg.size or None)
    n = min(cfg.n, len(ds))
    last = n - 1 if cfg.source.startswith("glyphs") else len(ds) - 1  # of glyphs, each column is one digit
    images, labels = next(batches(ds, [torch.linspace(0, last, n).long().tolist()]))
    grid(images, 10, [ds.classes[k] for k in labels]).save(cfg.out)
    counts = np.bincount(np.asarray(ds.labels), minlength=ds.num_classes)
    print(f"{cfg.source}: {len(ds):,} images of shape {ds.shape}, {ds.num_classes} classes, "
          f"{counts.min():,} to {counts.max():,} images a class; of the first 20:")
    for name, count in zip(ds.classes[:20], counts):
        print(f"  {name:>12} {count:>8,}")
    print(f"wrote {cfg.out}")


# ---- 7. Guards: the way out of a script, and values, labels and files that are refused ----


def run_cli(main: typing.Callable) -> None:
    """Run a script's main; an error that a user can mend is one line, exit status 2. No process is left."""
    if main.__module__ == "__main__":  # main of the imported module, to whose tables extras/ adds
        spec = sys.modules["__main__"].__spec__
        main = importlib.import_module(spec.name if spec else Path(sys.argv[0]).stem).main
    faults = optional("faults")
    try:
        getattr(faults, "listen", bool)()
        main()
    except (Exception, KeyboardInterrupt) as error:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # for the rest of the way
        known = faults.told(error) if faults else isinstance(error, (ValueError, OSError)) and str(error)
        if not known:
            raise
        where = f"rank {os.environ.get('RANK')}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error: {where}{' '.join(known.split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        for child in multiprocessing.active_children():  # one may wait for a file for ever
            child.kill()


def checked(cfg, *sides):
    """The settings, if extras/checks.py finds them possible; sides: what fid.py compares."""
    return getattr(optional("checks"), "check_settings", lambda cfg, *_: cfg)(cfg, *sides)


def alone(run: typing.Callable):
    """Decorator of run(cfg, ..): the folder cfg.out is locked meanwhile, by extras/faults.py."""
    @functools.wraps(run)
    def locked(cfg, *more, **options):
        with getattr(optional("faults"), "lock", contextlib.nullcontext)(Path(cfg.out)):
            return run(cfg, *more, **options)
    return locked


@contextlib.contextmanager
def replacing(path: Path, fix: str = "free disk space"):
    """A name to write to, which takes the place of `path` in the end; nothing is left of an error."""
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # of torch.save
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}), any before is untouched: {fix}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def read_rows(path: Path) -> list[dict]:
    """The objects with a step in the lines of a .jsonl file; what is damaged or unfinished is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def check_length(w: int, h: int, size: int, where: str = "") -> None:
    """ValueError for a strip that would take all memory once its short side has `size` pixels."""
    if max(w, h) * size ** 2 > 2 ** 27 * min(w, h):
        raise ValueError(f"{where}{w} x {h} pixels are too long to crop to {size}; cut it")


def check_source(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: a pipe or device; name a file or folder")


def open_file(path: Path):
    """A file, open for reading; not a pipe, which might never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: no file but a pipe or device; remove it")
    return file


def check_array(path: Path, held: list[str], key: str, images, size: int | None) -> None:
    if images is None:
        raise ValueError(f"{path}: holds {', '.join(held) or 'nothing'}; expected `images` or `arr_0`")
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in shape or not {*shape[1::2]} & {1, 3}:
        raise ValueError(f"{path}: {key} is {images.dtype} {images.shape}; expected uint8 (N, h, w, 3)")
    if size:
        check_length(*shape[1:3] if shape[3] in (1, 3) else shape[2:], size, f"{path}: {key}: ")


def check_labels(labels, n: int, where: str) -> Tensor:
    """Labels as int64 (n,)."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"{where}: labels of shape {labels.shape} for {n} images; expected ({n},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: labels are {labels.dtype}; expected integers 0 .. classes - 1")
    if n and (labels.min() < 0 or labels.max() >= 10 ** 6):
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}; expected 0 .. classes - 1")
    return torch.from_numpy(labels.astype(np.int64))


if __name__ == "__main__":
    run_cli(main)
