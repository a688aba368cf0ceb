"""SiT's stochastic sampler (arXiv:2401.08740): the reverse SDE, with the marginals of the flow.

    python sample.py runs/glyphs --solver sde --steps 250
    python -m extras.sde runs/glyphs --steps 250        the same
"""
import typing

import numpy as np
from torch import Tensor

import data
import sample


def sde_step(x: Tensor, v: Tensor, t: float, r: float, n: Tensor | float) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = t (SiT's default `sigma`): from t to r = t - h,

        x - h (v - w s) + sqrt(2 w h) n,   score s = -(x + (1 - t) v) / t,

    and the last step, to r = 0, without its noise (SiT, arXiv:2401.08740, Sec. 2; in the paper's symbols
    w_t = 2 w).
    """
    h, w_score = t - r, -(x + (1 - t) * v)                                               # w s with w = t
    x = x - h * (v - w_score)
    return x + (2 * t * h) ** 0.5 * n if r > 0 else x


def sde_times(times: list[float]) -> list[float]:
    """As many steps as the grid has, in its form: all but the last over [0.04, 1]."""
    last, n = 0.04, len(times) - 1
    where = np.linspace(0, n, n)  # n - 1 steps where the grid has n
    return [*(last + (1 - last) * np.interp(where, range(n + 1), times)).tolist(), 0.0]


def sde(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws: data.Draws) -> Tensor:
    """The chain of `sde_step`, a solver."""
    times = sde_times(times)
    for k, (t, r) in enumerate(zip(times, times[1:])):
        n = draws.normal(f"sde {k}", x.shape[1:]).to(x) if r > 0 else 0.0
        x = sde_step(x, velocity(x, t, y), t, r, n)
    return x


sample.SOLVERS["sde"] = sde


def main() -> None:
    sample.main([*data.sys.argv[1:], "--solver", "sde"])


if __name__ == "__main__":
    data.run_cli(main)
