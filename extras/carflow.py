"""CAR-Flow: classes move noise and images towards each other (arXiv:2509.19300).

Beside `fm` in losses.py: the same loss, of a network that moves what it sees. A class y learns two images a_y
and b_y, and the flow goes from e + a_y to x + b_y, a shorter way for the network. Samplers, guidance and
scores know nothing of it.

    python train.py --loss carflow --out runs/carflow
    python -m extras.carflow                   fm and carflow on two modes: how long the ways are, a picture

Noise N(0, 1), data N(-1.5, 0.2^2) and N(1.5, 0.2^2), a network of width 12, 1,000 steps: ways of 0.93 and
0.98 instead of 1.53 and 1.54 (seeds 0 and 1; paper: 0.71 to 0.74 instead of 1.54). At the optimum shifts have
no gradient, so they help a network that is small or short of training; one of width 128 hardly moves them.

glyphs, FD-glyphs / accuracy of 1,000 samples in 2, 4, 25 and 50 steps of ab2, 1,500 training steps with fm's
rate and times: 75.6 / 0.988, 54.2 / 0.976, 17.8 / 0.967, 16.5 / 0.965. fm in 25: 14.5 and 11.7 (seeds 0 and
1). So it brings no gain there, but with shifts that learn as fast as weights it was worse: 42.8 in 50.
A step takes 1.1 of fm's time (one run each, one thread of a busy machine, 2026-11-21).
"""
import dataclasses
import typing

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import data
import losses
import model
from data import option
from extras import mixture
from extras.gaussians import Mixture

# ---- 1. The network ----

SLOWER = 0.05  # the learning rate of shifts beside that of weights


def shifted(velocity: typing.Callable, a: Tensor, b: Tensor, x_t: Tensor, t: Tensor, *more) -> Tensor:
    """dx_t/dt at x_t (B, ...) of a flow z_t from e + a to x + b with dz_t/dt = velocity(z_t, t, ..):

        z_t = x_t + (1 - t) b + t a,   dx_t/dt = dz_t/dt - (a - b)   (CAR-Flow, arXiv:2509.19300)

    It takes and gives what belongs to x_t, so that flow matching's |v - (e - x)|^2 is the paper's
    |dz_t/dt - (z_1 - z_0)|^2, and its start e + a, its end z - b and its score with the mean a follow without
    further code. Gradients reach both shifts.
    """
    s = losses.expand_dims(t, x_t)
    return velocity(x_t + (1 - s) * b + s * a, t, *more) - (a - b)


class Shifts(model.Part):
    """A DiT with learned shifts of the noise and the images of each class, 0 at first: plain flow matching.

    paper: shifts come out of two networks of 2 M parameters; here: of tables. Scales, which the paper shows
    to collapse, are not offered. AdamW moves every parameter alike, by the learning rate a step, and near the
    optimum the gradients of shifts are noise: so they move by a twentieth of it.
    """
    generator_only = True

    def __init__(self, **config):
        super().__init__(**config)
        rows = self.num_classes + self.null_class
        self.source_shift = nn.Parameter(torch.zeros(rows, *self.shape))
        self.target_shift = nn.Parameter(torch.zeros(rows, *self.shape))

    def shifts(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) of the noise and of the images of classes y (B,)."""
        return SLOWER * self.source_shift[y], SLOWER * self.target_shift[y]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, *more: Tensor) -> Tensor:
        return shifted(super().forward, *self.shifts(y), x_t, t, y, r, *more)

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """As a DiT does; shifts stay 0 where `given` has none, so that it starts as that flow."""
        own = {k: v for k, v in self.state_dict().items() if k.endswith("_shift")}
        return own | super().inherit(given, at)


# Its objective is flow matching: equation and code are `losses.fm`.
losses.register("carflow", losses.fm, network=lambda cfg, source: dict(parts=["carflow.Shifts"]))

# ---- 2. Run alone: how long the ways are ----


class LabelledPoints(mixture.PointNet):
    """A network of points of width 12 that is conditioned on one of two labels."""
    num_classes = 2

    def __init__(self, dimension: int = 1, predict: str = "v", times: int = 1):
        super().__init__(dimension, 12, predict=predict, times=times)
        self.layers[0] = nn.Linear(self.layers[0].in_features + 2, 12)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat([self.features(x_t, t, r), F.one_hot(y, 2).to(x_t)], 1))


class ShiftedPoints(LabelledPoints):
    """The same with shifts of each class."""

    def __init__(self, dimension: int = 1, predict: str = "v", times: int = 1):
        super().__init__(dimension, predict, times)
        self.source_shift, self.target_shift = (nn.Parameter(torch.zeros(2, dimension)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        return shifted(super().forward, self.source_shift[y], self.target_shift[y], x_t, t, y, r)


TWO_MODES = Mixture(torch.tensor([[-1.5], [1.5]]), torch.tensor([0.2, 0.2]), torch.tensor([0.5, 0.5]))


def ways(kind: type, steps: int = 1000, seed: int = 0, n: int = 400) -> tuple[Tensor, Tensor]:
    """Ways (51, n, 1) of n points in 50 steps, where the network moves them, and where they end (n, 1)."""
    cfg = mixture.point_settings("carflow", steps=steps, seed=seed, lr=1e-2, batch=128, kind=kind)
    net, y = mixture.train_points("carflow", TWO_MODES, cfg), torch.arange(n) % 2
    e = torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None]
    states = mixture.trajectory(lambda x, t, *_: net(x, t, y), e, 50)
    ends = states[-1]
    if kind is ShiftedPoints:
        t = torch.linspace(1, 0, 51)[:, None, None]
        states = states + (1 - t) * net.target_shift[y] + t * net.source_shift[y]
    return states, ends


@dataclasses.dataclass
class Config:
    steps: int = option(1000, "training steps of each")
    seed: int = option(0, "seed of weights, data and noise")
    out: str = option("carflow.png", "the picture to write")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Train fm and carflow on two modes; compare how far their points move.")
    w, h, reach = 420, 300, 3.0
    sheet = Image.new("RGB", (2 * w + 24, h + 24), "white")
    pen = ImageDraw.Draw(sheet)
    print(f"{'':>10}{'mean way':>10}{'mean |x|':>10}   (1.5)")
    for k, (name, kind) in enumerate((("fm", LabelledPoints), ("carflow", ShiftedPoints))):
        states, ends = ways(kind, cfg.steps, cfg.seed)
        length = states.diff(dim=0).abs().sum(0).mean().item()
        print(f"{name:>10}{length:>10.3f}{ends.abs().mean().item():>10.3f}")
        left = 8 + k * (w + 8)
        pen.text((left, 4), f"{name}: noise at the left, data at the right", fill="black")
        for i, line in enumerate(states[:, ::9, 0].T.tolist()):
            points = [(left + s * w / 50, 20 + (reach - v) / (2 * reach) * h) for s, v in enumerate(line)]
            pen.line(points, fill=("#c2410c", "#1f5fbf")[i % 2])
    sheet.save(cfg.out)
    print(f"wrote {cfg.out}: colours are classes")


if __name__ == "__main__":
    data.run_cli(main)
