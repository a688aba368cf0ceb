"""How well networks predict x from x_t, time by time, on images that they were not trained on.

    python -m extras.denoising runs/glyphs runs/meanflow
    python -m extras.denoising runs/mine --data FOLDER_OF_OTHER_IMAGES

A velocity v predicts the clean image, x_net = x_t - t v. The best prediction is the mean of all images that
may have become x_t. Two numbers at each time t:

    error      rms of x_net - x. It grows with t for the best network, too, as noise hides the image.
    contrast   <x_net, x> / <x, x>, both less their mean over pixels: below 1, predictions are duller than
               the data. The best network has 1 near the data, and less where noise hides the image.

A loss is a mean over times and shows neither: times that are rare in training decide how samples end, and
FD-glyphs follows them (README.md, "glyphs"). Weights are the averaged ones. meanflow and its neighbours are
asked for their velocity, r = t; ect and scm give the end of their jump to the data instead of a mean.
Networks that only jump from noise to data are refused.
"""
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import data
import losses
import model
import sample
from data import option
from extras.gallery import runs_and_settings

TIMES = 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97


@dataclasses.dataclass
class Config:
    data: str = option("glyphs:1", "images, as in train.py; glyphs:SEED are others than those of training")
    n: int = option(1000, "images")
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


def error_and_contrast(x_net: Tensor, x: Tensor) -> tuple[float, float]:
    """rms of x_net - x, and the share of x's contrast that x_net has; (N, C, h, w) both."""
    a, b = (images - images.mean((2, 3), keepdim=True) for images in (x_net, x))
    return (x_net - x).square().mean().sqrt().item(), ((a * b).sum() / b.square().sum()).item()


def main(argv: list[str] | None = None) -> None:
    paths, cfg = runs_and_settings(Config, argv, __doc__)
    if not paths:
        return
    device = data.start_processes(cfg.device)
    print(f"| t | | {' | '.join(map(str, TIMES))} |\n|---|---|{'---|' * len(TIMES)}")
    for path in paths:
        net = model.load(sample.find_checkpoint(path)).to(device)
        if not net.times:
            raise ValueError(f"{path}: only jumps from noise to data; expected a network with a time")
        source = data.dataset(cfg.data, net.shape[1])
        if net.state != source.shape or torch.as_tensor(source.labels).max() >= net.num_classes:
            raise ValueError(f"{path}: a network of {net.state} and {net.num_classes} classes; {cfg.data} "
                             f"holds {source.shape} and {source.num_classes}")
        rows = list(range(min(cfg.n, len(source))))
        items, y = next(data.batches(source, [rows]))
        x, y = source.clean(items.to(device), data.Draws(cfg.seed, rows, device)), y.to(device)
        found = [error_and_contrast(denoise(net, x, y, t, cfg.seed), x) for t in TIMES]
        for name, values in zip(("error", "contrast"), zip(*found)):
            print(f"| {Path(path).name} | {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print(f"\n{len(rows)} images of {cfg.data}")
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
