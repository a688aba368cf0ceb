"""Features of a frozen image encoder, which representation alignment compares a network's tokens with.

REPA (arXiv:2410.06940), REG (arXiv:2507.01467) and CAT's discriminator (arXiv:2605.26449) use them; their
files call `encoder_features`. On images the encoder runs beside the training, `--encoder FILE.py:NAME`; for
latents, `python -m extras.latents .. --encoder FILE.py:NAME` stores its features beside them.

NAME is a Python function, images (B, 3, h, w) in [-1, 1] -> features (B, 1 + N, F): a token of the whole
image, then one for each of N patches, row by row, as many as the network has tokens. DINOv2-B, which REPA and
REG use, in a file dino.py (not run here: not checked yet):

    import torch
    from torch.nn.functional import interpolate
    net = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14").eval().requires_grad_(False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)

    def dinov2(images):
        x = ((images + 1) / 2 - mean.to(images)) / std.to(images)
        x = interpolate(x, 224 * images.shape[-1] // 256, mode="bicubic")
        out = net.to(images.device).forward_features(x)
        return torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_patchtokens"]], 1)

    python -m extras.encoders dino.py:dinov2 --size 256        its shape, and whether it tells classes apart
"""
import dataclasses
import importlib.util
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import model
from extras import checks


class Encoder:
    """The function NAME of the Python file in "FILE.py:NAME", called without gradient. shape: (1 + N, F)."""

    def __init__(self, name: str, size: int, device="cpu"):
        path, _, function = name.rpartition(":")
        if not path.endswith(".py") or not Path(path).is_file() or not function:
            raise ValueError(f"--encoder {name}: expected FILE.py:NAME, a function in a file that is there")
        spec = importlib.util.spec_from_file_location("encoder", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"--encoder {name}: {path} has no function {function}")
        self.name, self.function = name, getattr(module, function)
        self.shape = self(torch.zeros(1, 3, size, size, device=device)).shape[1:]

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: data.Draws | None = None) -> Tensor:
        """Features (B, 1 + N, F) of images (B, 3, h, w), in the type of x."""
        found = self.function(x)
        if found.dim() != 3 or len(found) != len(x):
            raise ValueError(f"--encoder {self.name}: gave features {tuple(found.shape)} for {len(x)} images"
                             f"; expected (images, 1 + patches, width)")
        return found.to(x)


class StoredFeatures:
    """Features that are stored beside latents, called like an Encoder. shape: (1 + N, F)."""

    def __init__(self, source: data.Dataset, mirror: bool):
        self.source, self.mirror, self.shape = source, mirror, source.features

    def __call__(self, x: Tensor, draws: data.Draws) -> Tensor:
        """Features (B, 1 + N, F) of the images, or mirror images, that `data.stream` puts there."""
        sides = ((draws.uniform("flip") < 0.5) & self.mirror).long().tolist()
        indices = [data.index_at(len(self.source), position, draws.seed) for position in draws.positions]
        rows = [self.source.row("features", i)[side] for i, side in zip(indices, sides)]
        return torch.from_numpy(np.stack(rows)).to(x)


_loaded = {}  # (name, size) -> the last Encoder: asked for twice, it is loaded once


def encoder_features(cfg, source: data.Dataset, device="cpu") -> Encoder | StoredFeatures:
    """What gives the features of a training batch: (x, draws) -> (B, 1 + N, F), with their `shape`.

    cfg: a training configuration with --encoder; device: where a new encoder is tried out on one image.
    """
    stored = getattr(source, "features", None)
    if stored and cfg.encoder:
        raise ValueError(f"--encoder {cfg.encoder}: {cfg.data} holds features already; leave --encoder out")
    if stored:
        return StoredFeatures(source, source.mirror if cfg.mirror == "auto" else cfg.mirror == "on")
    if not cfg.encoder or source.shape[0] != 3:
        raise ValueError(f"--loss {cfg.loss} needs a frozen encoder: for images give --encoder FILE.py:NAME; "
                         f"for latents store its features: python -m extras.latents .. --encoder FILE:NAME")
    name = cfg.encoder, source.shape[1]
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = Encoder(*name, device)
    return _loaded[name]


def run_settings(path, encoder: str) -> types.SimpleNamespace:
    """The settings of a run, whose encoder the user must name: no checkpoint makes us run a file."""
    kinds = dict(loss=str, data=str, size=int, seed=int, mirror=str)
    run = checks.run_settings(path, model.read_checkpoint(path), **kinds)
    if (was := getattr(run, "encoder", "")) != encoder:
        raise ValueError(f"{path}: give its encoder again, --encoder {was}, if you trust that file")
    return run


@dataclasses.dataclass
class Config:
    encoder: str = data.option("", "FILE.py:NAME")
    source: str = data.option("glyphs", "images to look at")
    size: int = data.option(32, "crop and scale them to this many pixels")


def main(argv: list[str] | None = None) -> None:
    description = "The shape of an encoder's features, and how alike they are within a class."
    cfg = data.parse(Config, argv, description, ("encoder", "source"))
    encoder, ds = Encoder(cfg.encoder, cfg.size), data.dataset(cfg.source, cfg.size)
    shown = torch.linspace(0, len(ds) - 1, min(200, len(ds))).long().tolist()
    images, labels = next(data.batches(ds, [shown]))
    z = F.normalize(encoder(data.to_float(images))[:, 0].double(), dim=-1)
    alike, same = z @ z.T, labels[:, None] == labels
    own = alike[same & ~torch.eye(len(z), dtype=torch.bool)].mean().item()
    other = alike[~same].mean().item()
    print(f"{cfg.encoder}: features {tuple(encoder.shape)} of an image of {cfg.size} x {cfg.size} pixels")
    print(f"mean cosine of the tokens of two images: {own:.3f} within a class, {other:.3f} across")


if __name__ == "__main__":
    data.run_cli(main)
