"""Latents: image sets encoded by SD-VAE (extras/vae.py), to train on, and the decoding of samples.

Stored are the mean and log-variance of the posterior of every image and of its mirror image, so that training
draws latents anew each epoch: 42 GB for ImageNet's 1,281,167 images at 256 x 256 (computed: 2 sides of
8 x 32 x 32 numbers of 2 bytes). Features of a frozen encoder (extras/encoders.py) may lie beside them: 1.0 TB
for DINOv2-B (computed: 2 sides of 257 x 768 numbers of 2 bytes).

    torchrun --nproc_per_node=8 -m extras.latents IMAGENET/train latents --vae sd-vae-ft-mse.safetensors
    torchrun --nproc_per_node=8 train.py --data latents --size 0 --model SiT-XL/2 --out runs/z
    python sample.py runs/z --codec latents:sd-vae-ft-mse.safetensors       (train.py takes --codec as well)

Importing this file adds the reader of such folders to `data.READERS`. The VAE is checked on formula weights
against numbers of the official class. No official file could be had, and nothing was run at this size: not
checked yet.
"""
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import model
from extras.faults import reserve
from extras.files import digest
from extras.vae import VAE, posterior

# ------------------------------------------------------------------------------------------------------------
# 1. Files of weights
# ------------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped from disk.

    Layout: uint64 length of the header; header {name: {dtype, shape, data_offsets: [begin, end]}} in JSON;
    values. A header that lies is a ValueError before anything else is read.
    """
    size, refusal = os.path.getsize(path), "damaged, or not a .safetensors file; get it again"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise ValueError(f"{path}: a header of {length:,} bytes in a file of {size:,}: {refusal}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(name, *parse_entry(entry)) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            what = f"{type(error).__name__}: {str(error)[:60]}"
            raise ValueError(f"{path}: its header cannot be read ({what}): {refusal}") from error

    room, last = size - 8 - length, 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        fits = last <= begin <= end <= room and end - begin == math.prod(shape) * dtype.itemsize
        if not fits or min(shape, default=0) < 0:
            raise ValueError(f"{path}: {name} of shape {shape} lies at {begin} to {end} of {room:,} bytes, "
                             f"after {last}: {refusal}")
        last = end

    raw = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + length:] if entries else None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        part = raw[begin:end]
        aligned = part.storage_offset() % dtype.itemsize == 0
        tensors[name] = (part if aligned else part.clone()).view(dtype).view(shape)
    return tensors


def parse_entry(entry: dict) -> tuple:
    """dtype, shape, begin and end from an entry of the header."""
    numbers = [*entry["data_offsets"], *entry["shape"]]
    if any(type(n) is not int or abs(n) > 2 ** 62 for n in numbers) or len(entry["data_offsets"]) != 2:
        raise ValueError(f"sizes {str(numbers)[:40]}")
    return DTYPES[entry["dtype"]], numbers[2:], *numbers[:2]


OFFICIAL = "https://huggingface.co/stabilityai/sd-vae-ft-mse"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(key: str, value: Tensor) -> tuple[str, Tensor]:
    """A parameter under its current name; in older files attention's have others and are convolutions."""
    if ".attentions." not in key:
        return key, value
    stem, layer, kind = key.rsplit(".", 2)
    return f"{stem}.{OLD_NAMES.get(layer, layer)}.{kind}", value.squeeze()


def load_vae(path: str | Path) -> VAE:
    """The VAE, frozen, from diffusers' .safetensors or .bin file or a .pt file of the same names."""
    path = Path(path).expanduser()
    if not path.exists():
        url = f"{OFFICIAL}/resolve/main/diffusion_pytorch_model.safetensors"
        raise FileNotFoundError(f"VAE not found: {path}. Download {url} "
                                f"(334,643,276 bytes, sha256 a1d99348...) to {path}")
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        weights = model.read_checkpoint(path)
    if not (isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))):
        raise ValueError(f"{path}: not an SD-VAE file: expected tensors by name, and nothing else")
    weights = dict(current_name(key, value.float()) for key, value in weights.items())
    levels = [f"encoder.down_blocks.{k}.resnets.0.conv1.bias" for k in range(9)]
    widths = [len(weights[key]) for key in levels if key in weights]
    with torch.device("meta"):
        vae = VAE(tuple(widths) or (128, 256, 512, 512))
    own = vae.state_dict()
    wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    wrong += [key for key in weights if key not in own]
    if wrong:
        raise ValueError(f"{path}: not an SD-VAE file: {wrong[0]} is missing, unknown or of another shape "
                         f"({len(wrong)} such)")
    if wrong := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {wrong[0]} is not finite; get it again")
    vae.load_state_dict(weights, assign=True)
    return vae.eval().requires_grad_(False)


codec = load_vae  # of `--codec latents:FILE`: an object with decode, image_shape and to


# ------------------------------------------------------------------------------------------------------------
# 2. The data set
# ------------------------------------------------------------------------------------------------------------


def shard_file(root: Path, k: int, what: str = "moments") -> Path:
    return root / f"{what}_{k:05d}.npy"


ENTRIES = {"source", "count", "classes", "size", "shard", "shape", "scale", "codec", "encoder", "features"}


def read_manifest(root: Path) -> dict:
    """What `encode` noted about a folder of latents."""
    try:
        about = json.loads((root / "manifest.json").read_text())
        if lacking := ENTRIES - about.keys():
            raise ValueError(f"{min(lacking)} is missing")
        check_manifest(about)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{root}/manifest.json: not one of python -m extras.latents ({error})") from error
    return about


def check_manifest(about: dict) -> None:
    """ValueError for entries that `encode` cannot have written."""
    def whole(numbers, lowest=1) -> bool:
        return all(type(n) is int and lowest <= n < 10 ** 9 for n in numbers)

    size, scale, features = about["size"], about["scale"], about["features"]
    fine = dict(count=whole([about["count"]]), shard=whole([about["shard"]]), size=whole([size]),
                classes=type(about["classes"]) is list and all(type(k) is str for k in about["classes"]),
                shape=type(about["shape"]) is list and len(about["shape"]) == 3 and whole(about["shape"]),
                scale=type(scale) is float and 0 < scale < 1000,
                features=features is None or type(features) is list and len(features) == 2
                and whole(features))
    if wrong := [name for name, right in fine.items() if not right]:
        raise ValueError(f"{wrong[0]} is {str(about[wrong[0]])[:40]!r}")


def map_array(path: Path, dtype, shape: tuple) -> np.ndarray:
    """An array of a folder of latents, mapped from disk; ValueError for another type or shape."""
    try:
        found = np.load(path, mmap_mode="r")
    except Exception as error:  # of numpy
        raise ValueError(f"{path}: cannot be read ({error}); remove it and encode again") from error
    if found.dtype != dtype or found.shape != shape:
        raise ValueError(f"{path}: {found.dtype} {found.shape}; expected {np.dtype(dtype)} {shape}: remove "
                         "it and encode again")
    return found


class Latents(data.Dataset):
    """What `encode` wrote: item i is the float16 moments (2, 8, h, w) of image i and of its mirror image.

    features: the shape (1 + N, F) of the features that lie beside the moments, or None where there are none.
    """
    mirror = True

    def __init__(self, root: Path, size: int | None):
        about = read_manifest(root)
        if size and size != about["size"]:
            raise ValueError(f"{root}: encoded at --size {about['size']}, not {size}; give --size 0")
        self.classes, self.shape, self.scale = about["classes"], tuple(about["shape"]), about["scale"]
        self.features = tuple(about["features"]) if about["features"] else None
        self.per_shard, n = about["shard"], about["count"]
        labels = np.array(map_array(root / "labels.npy", np.int64, (n,)))
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(f"{root}/labels.npy: labels from {labels.min()} to {labels.max()} of "
                             f"{len(self.classes)} classes: encode again")
        self.labels = labels

        count = -(-n // self.per_shard)
        files = [shard_file(root, k) for k in range(count)]
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{root}: {missing[0]} is missing ({len(missing)} of {count}): the same command "
                             f"python -m extras.latents .. continues where it stopped")
        shapes = {"moments": (8, *self.shape[1:])} | ({"features": self.features} if self.features else {})
        rows = [min(self.per_shard, n - k * self.per_shard) for k in range(count)]
        self.shards = {what: [map_array(shard_file(root, k, what), np.float16, (rows[k], 2, *shape))
                              for k in range(count)] for what, shape in shapes.items()}

    def row(self, what: str, i: int) -> np.ndarray:
        """The "moments" or "features" of both sides of image i, mapped from disk: float16 (2, ...)."""
        return self.shards[what][i // self.per_shard][i % self.per_shard]

    def item(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.row("moments", i))), int(self.labels[i])

    def flip(self, items: Tensor, where: Tensor) -> Tensor:
        """Moments (B, 8, h, w) of the image, or where `where` (B,) says so of its mirror image."""
        return items[torch.arange(len(items), device=items.device), where.long()]

    def clean(self, items: Tensor, draws: data.Draws) -> Tensor:
        """Latents (B, 4, h, w), drawn from the posterior with these moments (B, 8, h, w)."""
        return posterior(items, draws.normal("posterior", self.shape), self.scale)


def read_latents(path: Path, size: int | None) -> Latents | None:
    return Latents(path, size) if (path / "manifest.json").exists() else None


data.READERS["latents"] = read_latents


# ------------------------------------------------------------------------------------------------------------
# 3. Encoding
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    source: str = data.option("", "images: a folder such as ImageNet's train, a .zip, an .npz, ...")
    out: str = data.option("", "the folder of latents to write")
    vae: str = data.option("sd-vae-ft-mse.safetensors", "the file of the VAE")
    encoder: str = data.option("", "FILE.py:NAME, a frozen encoder whose features are stored as well")
    size: int = data.option(256, "crop and scale images to this many pixels")
    batch: int = data.option(16, "images at a time on each process")
    shard: int = data.option(4096, "images in one file")
    workers: int = data.option(4, "processes that decode images")
    device: str = data.option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))

    shape = property(lambda self: (4, self.size // 8, self.size // 8))  # of a latent


@data.alone
@torch.no_grad()
def encode(cfg: Config) -> None:
    """Write the moments of every image and of its mirror image, and an encoder's features, shard by shard.

    Shards that are there are left alone, so the same command continues where it stopped. Each process writes
    every world()-th shard.
    """
    if cfg.size % 8 or cfg.batch < 1 or cfg.shard < 1:
        given = f"--size {cfg.size} --batch {cfg.batch} --shard {cfg.shard}"
        raise ValueError(f"{given}: expected a multiple of 8, at least 1, and at least 1")
    device, out = data.start_processes(cfg.device), Path(cfg.out)
    vae, ds = load_vae(cfg.vae).to(device), data.dataset(cfg.source, cfg.size)
    if ds.shape[0] != 3:
        raise ValueError(f"{cfg.source}: holds latents; expected images")

    def moments(x: Tensor) -> Tensor:
        mean, log_variance = vae.moments(x).chunk(2, 1)
        return torch.cat([mean, log_variance.clamp(-30, 20)], 1)  # as `posterior` does: finite in float16

    makers = {"moments": (moments, (8, *cfg.shape[1:]))}
    if cfg.encoder:
        encoder = data.extra("encoders", f"--encoder {cfg.encoder}").Encoder(cfg.encoder, cfg.size, device)
        makers = {"features": (encoder, tuple(encoder.shape))} | makers  # moments last: they complete a shard
    write_manifest(out, ds, cfg, makers)
    for left in out.glob("*.tmp.npy") if data.rank() == 0 else ():
        left.unlink()  # by a process that was killed
    data.barrier()

    # A shard belongs to a process by its number, whatever the others have written meanwhile.
    own = range(data.rank(), -(-len(ds) // cfg.shard), data.world())
    parts = {k: range(k * cfg.shard, min((k + 1) * cfg.shard, len(ds))) for k in own}
    parts = {k: indices for k, indices in parts.items() if not shard_file(out, k).exists()}
    total = sum(map(len, parts.values()))
    with tqdm(total=total, desc="encoding", unit="img", disable=data.rank() > 0) as bar:
        for k, indices in parts.items():
            write_shard(k, indices, makers, ds, cfg, device, bar)
    data.barrier()
    if data.rank() == 0:
        print(f"wrote {out}: {len(ds):,} images as latents {cfg.shape} of {ds.num_classes} classes; "
              f"train with train.py --data {out} --size 0 --codec latents:{cfg.vae}")


def write_manifest(out: Path, ds: data.Dataset, cfg: Config, makers: dict) -> None:
    """manifest.json and labels.npy; ValueError where the folder was begun otherwise."""
    about = dict(source=cfg.source, count=len(ds), classes=list(ds.classes), size=cfg.size, shard=cfg.shard,
                 shape=list(cfg.shape), scale=VAE.scale, codec=digest(cfg.vae),
                 encoder=cfg.encoder, features=list(makers["features"][1]) if cfg.encoder else None)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "manifest.json").exists() and (was := read_manifest(out)) != about:
        name = next(k for k in about if was[k] != about[k])
        raise ValueError(f"{out}: was begun with {name} {str(was[name])[:80]}, not {str(about[name])[:80]}: "
                         f"name a new folder")
    data.barrier()
    if data.rank() == 0:
        np.save(out / "labels.npy", np.asarray(ds.labels, np.int64))
        (out / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")


def write_shard(k: int, indices: range, makers: dict, ds: data.Dataset, cfg: Config, device, bar) -> None:
    """Shard k: what each of `makers` gives for both sides of its images, written aside and then renamed."""
    paths = {what: shard_file(Path(cfg.out), k, what) for what in makers}
    asides = {what: path.with_suffix(".tmp.npy") for what, path in paths.items()}
    chunks = [list(indices[at:at + cfg.batch]) for at in range(0, len(indices), cfg.batch)]
    try:
        rows = {what: reserve(asides[what], "w+", np.float16, (len(indices), 2, *shape))
                for what, (_, shape) in makers.items()}
        for chunk, (images, _) in zip(chunks, data.batches(ds, chunks, cfg.workers)):
            x = data.to_float(images.to(device))
            here = slice(chunk[0] - indices[0], chunk[-1] - indices[0] + 1)
            for what, (make, _) in makers.items():
                both = torch.stack([make(x), make(x.flip(3))], 1).half()
                if not torch.isfinite(both).all():
                    source = cfg.vae if what == "moments" else cfg.encoder
                    raise ValueError(f"{source}: gives {what} that are not finite as float16, for the images "
                                     f"{chunk[0]} to {chunk[-1]}")
                rows[what][here] = both.cpu().numpy()
            bar.update(len(chunk))
        for what, written in rows.items():
            written.flush()
            os.replace(asides[what], paths[what])
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Encode images as latents for training.", ("source", "out"))
    if not cfg.source or not cfg.out:
        raise ValueError("usage: python -m extras.latents IMAGES OUT --vae FILE [--encoder FILE.py:NAME]")
    encode(cfg)
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
