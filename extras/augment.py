"""DiffAugment (arXiv:2006.10738): what a discriminator or a classifier sees an image through.

With few images a discriminator learns them by heart. Here every image, real or generated, is changed at
random before it is looked at, and the gradient goes back through the change. `cat`, `afm_more` and
`classifier` have a flag `--augment`, the probability of each of three changes. paper: also saturation and
contrast.

`python -m extras.augment` draws images of a data set, and below each of them what is seen of it.
"""
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import option


def augment(x: Tensor, draws: data.Draws, p: float) -> Tensor:
    """Images x (K, B, C, h, w), the K of a sample changed alike, by each of three changes with probability p.

    A sample gets brighter or darker by up to 0.5, is shifted by up to an eighth of the image, and has a
    square of half its side cut out, with 0 where there is nothing. All draws depend on the sample alone.
    """
    if not p:
        return x
    B, _, h, w = x.shape[1:]

    x = x + (0.5 * amount(draws, "brightness") * happens(draws, "brightness", p)).view(B, 1, 1, 1)
    x = shift(x, draws, happens(draws, "shift", p))

    row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    far_y = (row - (amount(draws, "hole's row")[:, None] + 1) * h / 2).abs() > h / 4            # (B, h)
    far_x = (column - (amount(draws, "hole's column")[:, None] + 1) * w / 2).abs() > w / 4      # (B, w)
    whole = ~happens(draws, "hole", p)[:, None, None]
    return x * (far_y[:, :, None] | far_x[:, None] | whole)[:, None]


def shift(x: Tensor, draws: data.Draws, where: Tensor) -> Tensor:
    """x (K, B, C, h, w) moved by up to an eighth of the image down and right, in the samples `where` (B,)."""
    B, _, h, w = x.shape[1:]
    edge, device = h // 8, x.device
    down = (edge * (1 + amount(draws, "down") * where)).round().long()[:, None]                 # (B, 1)
    right = (edge * (1 + amount(draws, "right") * where)).round().long()[:, None]
    rows = (torch.arange(h, device=device) + down)[:, :, None]                                  # (B, h, 1)
    columns = (torch.arange(w, device=device) + right)[:, None]                                 # (B, 1, w)
    sample = torch.arange(B, device=device)[:, None, None]
    padded = F.pad(x, (edge,) * 4)
    return padded[:, sample, :, rows, columns].permute(3, 0, 4, 1, 2)


def amount(draws: data.Draws, name: str) -> Tensor:
    """Uniform numbers in [-1, 1): (B,)."""
    return 2 * draws.uniform(f"augment {name}") - 1


def happens(draws: data.Draws, name: str, p: float) -> Tensor:
    """Whether a sample is changed so: (B,) bool."""
    return draws.uniform(f"augment whether {name}") < p


def check_augment(cfg) -> None:
    if not 0 <= cfg.augment <= 1:
        raise ValueError(f"--augment {cfg.augment}: expected a probability")


def flag(default: float) -> dict:
    """The flag --augment of an objective."""
    return dict(augment=option(default, "probability of each change that images are seen through"))


@dataclasses.dataclass
class Config:
    source: str = option("glyphs", "the images, as for train.py --data")
    size: int = option(32, "crop and scale them to this many pixels")
    augment: float = option(0.5, "probability of each change")
    out: str = option("augment.png", "the picture to write")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Draw images and what is seen of them.", ("source",))
    check_augment(cfg)
    source = data.dataset(cfg.source, cfg.size or None)
    indices = list(range(min(40, len(source))))
    items, _ = next(data.batches(source, [indices]))
    draws = data.Draws(0, indices)
    seen = data.to_uint8(augment(source.clean(items, draws)[None], draws, cfg.augment)[0])
    rows = [part for pair in zip(items.split(10), seen.split(10)) for part in pair]
    data.grid(torch.cat(rows), min(10, len(items))).save(cfg.out)
    print(f"wrote {cfg.out}: {len(items)} images, each above what is seen of it with --augment {cfg.augment}")


if __name__ == "__main__":
    data.run_cli(main)
