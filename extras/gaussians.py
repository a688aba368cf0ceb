"""Gaussian mixtures: data whose velocity, score and 1-D flow map are known in closed form.

The objectives of losses.py and extras/ are measured on `FOUR_MODES` (extras/mixture.py), and tests compare
networks, solvers and losses with it.

    python -m extras.gaussians            where the exact flow carries a few noises
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import data


@dataclass(eq=False)
class Mixture:
    """Data sum_k w_k N(m_k, s_k^2 I), with velocity, score and 1-D flow map in closed form.

    means (K, D), stds (K,), weights (K,). Points x_t are (B, D), times t (B,). Tests use float64.
    """
    means: Tensor
    stds: Tensor
    weights: Tensor

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, D) and the component (n,) each came from."""
        k = torch.multinomial(self.weights, n, True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise, k

    def components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each: log(w_k p_t,k(x_t)) + const (B, K), x_t - (1-t) m_k (B, K, D), variance (B, K)."""
        t = t[:, None]
        variance = ((1 - t) * self.stds) ** 2 + t ** 2
        offset = x_t[:, None] - (1 - t)[..., None] * self.means
        log_p = -offset.square().sum(-1) / (2 * variance) - 0.5 * x_t.shape[1] * variance.log()
        return self.weights.log() + log_p, offset, variance

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """E[e - x | x_t], the minimiser of flow matching; with labels y (B,), of these components alone.

        E[e - x | x_t, k] = (t - (1-t) s_k^2) / ((1-t)^2 s_k^2 + t^2) (x_t - (1-t) m_k) - m_k.
        """
        log_p, offset, variance = self.components(x_t, t)
        p = log_p.softmax(-1) if y is None else F.one_hot(y, len(self.weights)).to(log_p)
        slope = (t[:, None] - (1 - t)[:, None] * self.stds ** 2) / variance
        return (p[..., None] * (slope[..., None] * offset - self.means)).sum(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = -E[e | x_t] / t."""
        log_p, offset, variance = self.components(x_t, t)
        return -((log_p.softmax(-1) / variance)[..., None] * offset).sum(1)

    def cdf(self, x_t: Tensor, t: Tensor) -> Tensor:
        """F_t(x_t) of 1-D data: (B, 1) -> (B, 1)."""
        _, offset, variance = self.components(x_t, t)
        return (self.weights * torch.special.ndtr(offset[..., 0] / variance.sqrt())).sum(1, keepdim=True)

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The 1-D flow map from time t to r: the monotone one, F_r(x_r) = F_t(x_t), by bisection."""
        target = self.cdf(x_t, t)
        reach = self.means.abs().max() + 10 * (1 + self.stds.max())
        low, high = torch.full_like(x_t, -reach), torch.full_like(x_t, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, r) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


FOUR_MODES = Mixture(torch.tensor([[-1.5], [-0.5], [0.4], [1.6]]), torch.tensor([0.12, 0.2, 0.1, 0.25]),
                     torch.tensor([0.2, 0.3, 0.15, 0.35]))


@functools.lru_cache(maxsize=1)
def exact_samples(mixture: Mixture, n: int) -> Tensor:
    """Where the exact flow map brings the n quantiles of the noise."""
    e = torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None].double()
    return mixture.flow(e, torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))


def exact_velocity(x_t: Tensor, t: Tensor, y=None, r=None) -> Tensor:
    """That of `FOUR_MODES`, called as a network is."""
    return FOUR_MODES.velocity(x_t, t)


def main() -> None:
    e, one = torch.linspace(-2, 2, 9).double()[:, None], torch.ones(9).double()
    print("x_t on the ways of nine noises to four modes\n     t" + "".join(f"{v:8.2f}" for v in e[:, 0]))
    for t in (1.0, 0.75, 0.5, 0.25, 0.0):
        print(f"{t:6.2f}" + "".join(f"{v:8.2f}" for v in FOUR_MODES.flow(e, one, t * one)[:, 0]))


if __name__ == "__main__":
    data.run_cli(main)
