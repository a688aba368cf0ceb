"""How well networks draw x from x_t, time by time, on images that they were not trained on.

    python -m extras.denoising runs/glyphs runs/meanflow
    python -m extras.denoising runs/mine --data FOLDER_OF_OTHER_IMAGES

A velocity v says what the network takes for the clean image, x_net = x_t - t v, the mean of the images that
may have become x_t. Two numbers at each time t:

    error      rms of x_net - x. It grows with t for the best network, too: noise hides the image.
    contrast   <x_net, x> / <x, x>, both less their mean over pixels: 1 as the data, below 1 duller. A little
               below is right where noise hides something; near the data the best network has 1.

A loss is a mean over times and shows neither: times that training hardly draws decide how samples end, and
FD-glyphs follows them (README.md, "glyphs"). Weights are the averaged ones. Networks of jumps give their
velocity, r = t; those that jump from noise to data have none, and are refused.
"""
import dataclasses
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

import data
import losses
import model
import sample
from data import option

TIMES = 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97


@dataclasses.dataclass
class Config:
    data: str = option("glyphs:1", "images, as in train.py; glyphs:SEED are others than those of training")
    num: int = option(1000, "images")
    seed: int = option(0, "of the noise")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))


@torch.no_grad()
def denoise(net, x: Tensor, y: Tensor, t: float, seed: int = 0) -> Tensor:
    """x_net (N, C, h, w) from x_t of clean images x (N, C, h, w), labels y (N,), one noise for all t."""
    out = []
    for rows in torch.arange(len(x)).split(250):
        e = data.Draws(seed, rows.tolist(), x.device).normal("noise", x.shape[1:])
        time = torch.full((len(rows),), t, device=x.device)
        x_t = losses.interpolate(x[rows], e, time)
        out.append(x_t - max(t, net.t_min) * net(x_t, time, y[rows]))
    return torch.cat(out)


def error_and_contrast(drawn: Tensor, x: Tensor) -> tuple[float, float]:
    """rms of drawn - x, and the share of the contrast of x that drawn has; (N, C, h, w) both."""
    a, b = (images - images.mean((2, 3), keepdim=True) for images in (drawn, x))
    return (drawn - x).square().mean().sqrt().item(), ((a * b).sum() / b.square().sum()).item()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg = data.parse(Config, argv[len(paths):], __doc__)
    if not paths:
        return print(__doc__.strip())
    device = data.start_processes(cfg.device)
    print(f"| t | | {' | '.join(map(str, TIMES))} |\n|---|---|{'---|' * len(TIMES)}")
    for path in paths:
        net = model.load(sample.find_checkpoint(path)).to(device)
        if not net.times:
            raise ValueError(f"{path}: has no time, as it jumps from noise to data; expected a flow")
        source = data.dataset(cfg.data, net.shape[1])
        if net.state != source.shape or max(source.labels) >= net.num_classes:
            raise ValueError(f"{path}: a network of {net.state} and {net.num_classes} classes; {cfg.data} "
                             f"holds {source.shape} and {source.num_classes}")
        rows = list(range(min(cfg.num, len(source))))
        items, y = next(data.batches(source, [rows]))
        x, y = source.clean(items.to(device), data.Draws(cfg.seed, rows, device)), y.to(device)
        found = [error_and_contrast(denoise(net, x, y, t, cfg.seed), x) for t in TIMES]
        for name, values in zip(("error", "contrast"), zip(*found)):
            print(f"| {Path(path).name} | {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print(f"\n{len(rows)} images of {cfg.data}")
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
