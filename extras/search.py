"""More from trained networks: two of them in turn, a search for noise or for times, classification by a flow.

    python -m extras.search runs/large --stitch runs/small --stitch_share 0.4    T-Stitch: the small one first
    python -m extras.search runs/afm --best_of 8 --verifier runs/judge           the noise a classifier likes

The command takes all flags of sample.py and extras/guidance.py. `search_nearby`, `search_times` and
`classify` are functions to call. Neighbour in the core: sample.py, which takes one network, one noise and
even times.
"""
import dataclasses
import functools
import math
import typing

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import sample
from data import option
from extras import guidance
from extras.classifier import load_classifier

# ----------------------------------------------------------------------------------------------------------
# 1. Two networks in turn
# ----------------------------------------------------------------------------------------------------------


class Stitched(nn.Module):
    """T-Stitch (arXiv:2402.14167): the small network for the first `share` of the way, then the large one.

    Networks trained on the same data agree at much noise, so a share of up to 0.4 or so harms no sample.
    """
    guidance_conditioned = False

    def __init__(self, large: nn.Module, small: nn.Module, share: float):
        super().__init__()
        if small.state != large.state or small.num_classes != large.num_classes or not 0 <= share <= 1:
            raise ValueError(f"--stitch: networks of {small.state} with {small.num_classes} classes and of "
                             f"{large.state} with {large.num_classes}, share {share}: expected the same "
                             f"data, and a share in [0, 1]")
        self.large, self.small, self.share = large, small, share
        self.shape, self.state, self.num_classes = large.shape, large.state, large.num_classes
        self.null_class = large.null_class and small.null_class

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        net = self.small if t[0] > 1 - self.share else self.large  # in a solver all samples have one time
        return net(x_t, t, y, r)


# ----------------------------------------------------------------------------------------------------------
# 2. Search for noise: make (e, y) -> x; verifier (x, y) -> scores (B,)
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def best_of(n: int, make: typing.Callable, verifier: typing.Callable, y: Tensor, draws: data.Draws,
            shape: tuple) -> Tensor:
    """Of n noises for each sample the one (B, ...) whose result the verifier likes best   (arXiv:2501.09732).

    It costs n times the network evaluations, and a verifier searched hard enough gets what it likes rather
    than good samples: look at diversity too.
    """
    found = draws.normal("sample noise", shape)
    best = verifier(make(found, y), y)
    for k in range(1, n):
        e = draws.normal(f"search {k}", shape)
        score = verifier(make(e, y), y)
        found = torch.where(losses.expand_dims(score > best, e).to(e.device), e, found)
        best = torch.maximum(score, best)
    return found


@torch.no_grad()
def search_nearby(rounds: int, reach: float, e: Tensor, make: typing.Callable, verifier: typing.Callable,
                  y: Tensor, draws: data.Draws) -> Tensor:
    """Zero-order search (arXiv:2501.09732): from e to sqrt(1 - reach^2) e + reach n, where that is better.

    With n ~ N(0, I) this is noise as well.
    """
    best = verifier(make(e, y), y)
    for k in range(rounds):
        moved = math.sqrt(1 - reach ** 2) * e + reach * draws.normal(f"nearby {k}", e.shape[1:]).to(e)
        score = verifier(make(moved, y), y)
        e = torch.where(losses.expand_dims(score > best, e).to(e.device), moved, e)
        best = torch.maximum(score, best)
    return e


# ----------------------------------------------------------------------------------------------------------
# 3. Search for times, and classification
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def search_times(make: typing.Callable, exact: Tensor, start: list[float], rounds: int = 30,
                 children: int = 8, seed: int = 0) -> list[float]:
    """Times for few steps (after AutoDiffusion, arXiv:2309.10438): the grid `start`, evolved towards `exact`.

    make (times) -> x from fixed noise. Each round moves the inner times of the best grid at random, sorts
    them and keeps the best. paper: FID is what counts, also layers are dropped; here: the distance to what
    many steps give.
    """
    def error(times):
        return (make(times) - exact).square().mean().item()

    best, least, rng = start, error(start), data.generator(seed, "search times")
    for k in range(rounds):
        size = 0.3 * 0.9 ** k / (len(start) - 1) ** 0.5
        for _ in range(children):
            inner = torch.tensor(best[1:-1]) + size * torch.randn(len(start) - 2, generator=rng)
            times = [best[0], *inner.clamp(1e-3, 0.999).sort(descending=True).values.tolist(), best[-1]]
            if (found := error(times)) < least:
                best, least = times, found
    return best


@torch.no_grad()
def classify(net, x: Tensor, draws: data.Draws, classes: int, pairs: int = 64) -> Tensor:
    """Diffusion classifier (arXiv:2303.16203): minus the mean error of flow matching of x under each class,

    (B, classes). All classes see the same `pairs` of times (evenly spread) and noises, so that their
    differences are those of classes.
    """
    score = x.new_zeros(len(x), classes)
    for k in range(pairs):
        t, e = x.new_full((len(x),), (k + 0.5) / pairs), draws.normal(f"classify {k}", x.shape[1:]).to(x)
        x_t = losses.interpolate(x, e, t)
        for c in range(classes):
            error = net(x_t, t, torch.full((len(x),), c, device=x.device)) - (e - x)
            score[:, c] -= error.square().flatten(1).mean(1) / pairs
    return score


# ----------------------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(guidance.Config):
    stitch: str = option("", "a smaller network that takes the first part of the way, from the noise")
    stitch_share: float = option(0.4, "how much of the way it takes")
    best_of: int = option(1, "noises tried for each sample; the result that --verifier likes best stays")
    verifier: str = option("", "a run of --loss classifier")


def load_verifier(cfg: Config, net) -> typing.Callable | None:
    """log p(y | x) of a classifier, at t = 0; None where nothing is searched."""
    if cfg.best_of == 1 and not cfg.verifier:
        return None
    if cfg.best_of < 2 or not cfg.verifier:
        raise ValueError(f"--best_of {cfg.best_of} --verifier {cfg.verifier or '(none)'}: a search needs "
                         f"both, at least two noises and a run of --loss classifier")
    C = load_classifier(cfg.verifier, net, "--verifier")
    return lambda x, y: -F.cross_entropy(C(x, x.new_zeros(len(x))), y, reduction="none")


def best_noise(cfg: Config, net, verifier, draws: data.Draws, y: Tensor, options: dict) -> Tensor:
    """`best_of` for `sample.generate`, which gives the last three arguments."""
    def make(e, y):
        x = sample.sample(net, e.to(y.device), y, draws=draws, **options)
        return x.flatten(1)[:, :math.prod(net.shape)].unflatten(1, net.shape)

    return best_of(cfg.best_of, make, verifier, y, draws, net.state)


def main(argv: list[str] | None = None) -> None:
    cfg = sample.settings(Config, argv, __doc__)
    device = data.start_processes(cfg.device)
    net, more, noise = sample.load(cfg.checkpoint, cfg, device), "", None
    verifier = load_verifier(cfg, net)
    if cfg.stitch:
        net = Stitched(net, sample.load(cfg.stitch, cfg, device), cfg.stitch_share)
        more = f", those at t > {1 - cfg.stitch_share:g} of {cfg.stitch}"
    net, words = guidance.guide(net, cfg, device)
    if verifier:
        noise = functools.partial(best_noise, cfg, net, verifier)
        more += f", best of {cfg.best_of} noises by {cfg.verifier}"
    sample.write(cfg, net, device, words + more, noise)
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
