"""Shortcut models: a long jump goes where two of half its length go (arXiv:2410.12557, Sec. 3).

Beside `meanflow` in losses.py: jumps have the lengths 1, 1/2, .. 2 / finest on their own grid of times rather
than any, and their target takes two calls of the network without gradient instead of a derivative. What is
learned is Euler's method in `finest` steps. --omega trains guidance into it, at no cost in sampling.

    python train.py --loss shortcut --out runs/shortcut        from scratch, or --init runs/glyphs from a flow
    python sample.py runs/shortcut --n 100 --steps 4           sampled in 1 step by default
    python -m extras.shortcut                                  beside meanflow on the 1-D mixture

1-D mixture, seed 0, W1 in 1, 2, 4 and 50 steps: 0.074, 0.067, 0.048, 0.023 (meanflow: 0.083, 0.074, 0.047,
0.016); rms to the exact flow map: 0.116, 0.106, 0.090, 0.047 (0.116, 0.120, 0.070, 0.039).

On glyphs: extras/README.md. A step takes 1.3 of fm's time (1.2 with an eighth of jumps).
"""
import math
import sys

import torch
from torch import Tensor

import data
import losses
from data import option
from losses import (JUMP_OR_FLOW, drop_labels, expand_dims, interpolate, is_jump, masked_call, sample_times,
                    two_errors, velocity_target)


def shortcut(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Shortcut models: a jump of 1 / n, n a power of 2, goes where two of half its length go:

        E |u(x_t, t, r) - sg(u(x_t, t, m) + u(x_m, m, r)) / 2|^2   (arXiv:2410.12557, Sec. 3)

    with m = (t + r) / 2 and x_m = x_t - (t - m) u(x_t, t, m). The shortest ones, of 1 / finest, have the
    target v. omega: see `two_jumps`.

    paper: targets by averaged weights, clipped to +-4; here: by the weights themselves, as in the core.
    paper: uniform times, finest 128, an eighth of jumps, all lengths equally often; here: velocities have
    the times of fm, jumps start at uniform ones from `jump_low` on, half the samples are jumps, and a third
    of these the longest. Where jumps start near the data, at times that velocities hardly have, or have
    a weight that evens out their losses (meanflow's p = 1), the targets run away.
    """
    jumps = is_jump(draws, cfg)
    level = (draws.uniform("length of the jump") ** 1.5 * math.log2(cfg.finest)).floor()
    n = torch.where(jumps, 2 ** level, cfg.finest)
    start = cfg.jump_low + (1 - cfg.jump_low) * draws.uniform("time")
    t = ((torch.where(jumps, start, sample_times(draws, cfg)) * n).floor() + 1).clamp_max(n) / n
    r = t - 1 / n

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, JUMP_OR_FLOW)

    with torch.no_grad():
        halves = masked_call(jumps, lambda *at: two_jumps(net, *at, cfg), x_t, t, y, r)
    target = torch.where(expand_dims(jumps, x), halves, velocity_target(net, x, e, x_t, t))

    error = net(x_t, t, y, r) - target
    return error.square().mean(), two_errors(error, n, torch.where(jumps, 0, n))


def two_jumps(net, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor, cfg) -> Tensor:
    """The average velocity of two jumps, from t to the middle and on to r.

    Those of 1 / finest are guided, u_null + omega (u - u_null), and so are the longer ones made of them.
    """
    def u(x, t, r):
        own = net(x, t, y, r)
        if cfg.omega == 1:
            return own
        null = net(x, t, torch.full_like(y, net.num_classes), r)
        return null + expand_dims(torch.where((t - r) * cfg.finest < 1.5, cfg.omega, 1.0), x) * (own - null)

    m = (t + r) / 2
    first = u(x_t, t, m)
    return (first + u(x_t - expand_dims(t - m, x_t) * first, m, r)) / 2


def check_shortcut(cfg) -> None:
    losses.check_jumps(cfg)
    if cfg.finest < 2 or cfg.finest & cfg.finest - 1:
        raise ValueError(f"--finest {cfg.finest}: expected a power of 2")
    if cfg.omega != 1 and not cfg.label_drop:
        raise ValueError(f"--omega {cfg.omega} --label_drop {cfg.label_drop}: guidance needs dropped labels")


FLAGS = dict(jumps=losses.JUMPS["jumps"], jump_low=losses.JUMPS["jump_low"],
             finest=option(32, "the shortest jumps are 1 / finest long, a power of 2"),
             omega=option(1.0, "guidance scale that the network learns; 1 is none"))

losses.register("shortcut", shortcut, flags=FLAGS, defaults=losses.FROM_FLOW | dict(steps=4000),
                scratch=losses.FROM_SCRATCH,
                check=check_shortcut, sampling=losses.flow_map, network=lambda cfg, source: dict(times=2),
                points=dict(steps=2500, ema=0.99, jump_low=0.0))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    run = data.extra("mixture", "python -m extras.shortcut").main
    run(["--losses", "meanflow,shortcut", "--out", "shortcut.png", *argv])


if __name__ == "__main__":
    data.run_cli(main)
