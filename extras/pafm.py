"""Posterior-augmented flow matching: a target of less variance (arXiv:2605.00825).

Beside `fm` in losses.py: x_t might have come of other images of the class by other noise. The target is the
mean of e - x over a few candidates, weighted by how likely each became x_t, instead of the one that did. Its
mean given x_t is the same and its variance smaller, at no further call of the network.

    python train.py --loss pafm --out runs/pafm           16 candidates, from a bank of 256 images of a class
    python -m extras.pafm                                 beside fm on the 1-D mixture

1-D mixture, seeds 0 / 1, rms of the velocity: fm 0.075 / 0.085, 4 candidates 0.063 / 0.071, 16 candidates
0.052 / 0.052; W1 in 50 steps 0.026 / 0.023, 0.030 / 0.016, 0.022 / 0.023.

glyphs, FD-glyphs / accuracy of 1,000 samples in 1, 2, 4 and 50 Euler steps, 1,500 training steps with fm's
rate and times: 909 / 0.991, 246 / 0.995, 92 / 0.990, 12.7 / 0.977 (fm: 917 / 0.986, 246 / 0.996, 94 / 0.993,
13.5 / 0.977); a step takes 1.4 of fm's time (one run each, one thread of a busy machine, 2026-11-21).

What there is to gain, on glyphs with 16 candidates, lies above t = 0.8: there the target moves by 3 % of the
variance within a class (0.003 of 0.114), at 0.9 by 39 %, at 0.99 by 87 %; below, nothing but the image itself
fits, and pafm is fm. With more dimensions that point moves towards noise, unless candidates are near copies.
"""
import functools
import types

import torch
from torch import Tensor

import data
import losses
from data import option
from losses import drop_labels, expand_dims, interpolate, sample_times, velocity_target

# ---- 1. The objective ----


def pafm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, bank) -> tuple[Tensor, dict]:
    """Posterior-augmented flow matching: E |v_net(x_t, t, y) - E[v | x_t, candidates]|^2   (arXiv:2605.00825)

    The candidates are x itself and K - 1 other images of its class, from bank(y, draws, K - 1). With K = 1 it
    is flow matching.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    others = bank(y, draws, cfg.candidates - 1) if cfg.candidates > 1 else x[:, None][:, :0]
    mean, spread = posterior_mean(x, e, t, others)
    least = net.t_min if net.predict == "x" else 1e-3
    v = velocity_target(net, x, e, x_t, t) + (x - mean) / expand_dims(t.clamp_min(least), x)

    loss = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    return loss, {"spread": spread}


def posterior_mean(x: Tensor, e: Tensor, t: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """E[x | x_t] if x and each of `others` (B, K - 1, ...) were equally likely, and its variance (a mean).

        weights ~ N(x_t; (1 - t) x_j, t^2 I), by |x_t - (1 - t) x_j|^2 - |t e|^2 as large numbers would cancel

    The variance, not the effective number of candidates, tells what there is to gain: near copies have much
    of the latter. paper: weighted by text likeness too, or found as neighbours; here: all of the class.
    """
    away = x[:, None] - torch.cat([x[:, None], others], 1)                                   # (B, K, ...)
    a, t = (1 - t)[:, None], t.clamp_min(1e-3)[:, None]
    gap = away.flatten(2).square().sum(2)                                                    # (B, K)
    along = (away.flatten(2) * e.flatten(1)[:, None]).sum(2)
    weights = (-(a / t) * (a / (2 * t) * gap + along)).softmax(1).view(*gap.shape, *[1] * (x.dim() - 1))
    mean = (weights * away).sum(1)                                                           # of x - x_j
    return x - mean, (weights * (away - mean[:, None]).square()).sum(1).mean()


# ---- 2. Where the candidates come from ----


class Bank:
    """Up to `per_class` items of each class, in memory, to draw others of a sample's class from.

    Items (classes, M, ...) are chosen by the seed; a class with fewer fills its places again and again.
    """

    def __init__(self, source: data.Dataset, per_class: int, seed: int, mirror: bool = False, device="cpu"):
        labels, self.source, self.mirror, chosen = torch.as_tensor(source.labels), source, mirror, []
        largest = min(per_class, int(labels.bincount().max()))
        for k in range(source.num_classes):
            own = (labels == k).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=data.generator(seed, "bank", k))]
            own = own if len(own) else torch.zeros(1, dtype=torch.int64)  # no images: nobody will ask
            chosen.append(torch.stack([source.item(int(own[i % len(own)]))[0] for i in range(largest)]))
        self.items = torch.stack(chosen).to(device)

    def __call__(self, y: Tensor, draws: data.Draws, n: int) -> Tensor:
        """n > 0 items of the class of each sample, as clean data (B, n, C, h, w), drawn independently."""
        picks = (draws.uniform("bank", (n,)) * self.items.shape[1]).long()
        flips = (draws.uniform("bank mirror", (n,)) < 0.5) & self.mirror
        items = [self.source.flip(self.items[y, picks[:, k]], flips[:, k]) for k in range(n)]
        return torch.stack([self.source.clean(x, other_draws(draws, k)) for k, x in enumerate(items)], 1)


def other_draws(draws: data.Draws, k: int):
    """Normal numbers for candidate k: latents are draws of a posterior, and these are not those of x."""
    return types.SimpleNamespace(normal=lambda purpose, shape: draws.normal(f"bank {purpose} {k}", shape))


def other_points(mixture, y: Tensor, draws, n: int) -> Tensor:
    """The same for points without classes: n other points (B, n, D) for each of a batch."""
    x, _ = mixture.sample(len(y) * n, data.generator("others", draws.positions[0]))
    return x.view(len(y), n, -1)


def candidates(role: str, cfg, source, net) -> tuple:
    """The further input of `pafm`: a function (y, draws, n) -> n others for each sample."""
    if not isinstance(source, data.Dataset):
        return (functools.partial(other_points, source),)
    mirror = source.mirror if cfg.mirror == "auto" else cfg.mirror == "on"
    return (Bank(source, cfg.bank, cfg.seed, mirror, net.pos_embed.device),)


FLAGS = dict(candidates=option(16, "images that the target is a mean over: the sample, others of its class"),
             bank=option(256, "images of each class that the others are drawn from"))

losses.register("pafm", pafm, flags=FLAGS,
                inputs=candidates, points=dict(steps=2000))


def main(argv: list[str] | None = None) -> None:
    runs = {"fm": {}, "pafm, 4 candidates": dict(candidates=4), "pafm": {}}
    about = "Train fm and pafm on a 1-D mixture and compare with its closed form."
    data.extra("mixture", "python -m extras.pafm").command(argv, about, "pafm.png", lambda cfg: runs)


if __name__ == "__main__":
    data.run_cli(main)
