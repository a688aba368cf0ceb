"""Predictor-corrector sampling (Score-SDE, arXiv:2011.13456): Langevin steps between the steps of any solver.

    python -m extras.corrector runs/glyphs --steps 25 --corrector 1 --snr 0.16 --out samples.npz
    python fid.py samples.npz glyphs --features glyphs
    python sample.py runs/glyphs --solver corrector            one step after each of ab2, snr 0.16

A solver's error moves the marginal away from p_t; Langevin steps, which keep p_t, pull it back. They cost an
evaluation each. All flags of sample.py are taken, `--solver` is the predictor. Neighbour: extras/sde.py,
where noise and drift are in one step. On glyphs it does not pay: FD-glyphs 5.3 in 25 evaluations, 13 of
ab2's, against ab2's own 4.3 (extras/README.md).
"""
import dataclasses
import itertools
import types
import typing

import torch
from torch import Tensor

import data
import sample
from data import option
from losses import expand_dims


def langevin(velocity: typing.Callable, x: Tensor, t: float, y: Tensor, n: Tensor, snr: float) -> Tensor:
    """A step towards p_t, from x (B, ...) with noise n ~ N(0, I) (arXiv:2011.13456, Algorithm 5):

        x + h s + sqrt(2 h) n,   h = 2 (snr |n| / |s|)^2,   score s = -(x + (1 - t) v) / t.

    Of N(0, S I) in many dimensions h is 2 snr^2 S^2 / V where x has variance V, which goes to (1 + snr^2) S.
    paper: in its code |n| and |s| are means over the batch; here: a sample's own, so that it depends on no
    other.
    """
    s = -(x + (1 - t) * velocity(x, t, y)) / t
    n_norm, s_norm = n.flatten(1).norm(dim=1), s.flatten(1).norm(dim=1)
    h = expand_dims(2 * (snr * n_norm / s_norm) ** 2, x)
    return x + h * s + (2 * h).sqrt() * n


def step_starts(solve: typing.Callable, times: list[float]) -> tuple[list[int], int]:
    """At which of its calls of the velocity a solver begins a step, but the first, and its number of calls.

    Found by a run on a zero: the last call at a time is where a step starts (Heun's ends one there, too).
    """
    asked, zero = [], torch.zeros(1, 1)
    draws = types.SimpleNamespace(normal=lambda purpose, shape: zero)
    solve(lambda x, t, *_: asked.append(t) or zero, zero, None, times, draws)
    return [k for k, t in enumerate(asked) if t < asked[0] and t not in asked[k + 1:]], len(asked)


def corrected(solve: typing.Callable, steps: int, snr: float) -> typing.Callable:
    """The solver with so many Langevin steps after each of its own but the last.

    They move its x in place, where it asks for the velocity there: so any solver will do, also one that
    remembers.
    """
    def solver(velocity, x: Tensor, y: Tensor, times: list[float], draws: data.Draws) -> Tensor:
        starts, calls = step_starts(solve, times)[0], itertools.count()

        def after_correction(x: Tensor, t: float, y: Tensor, r: float | None = None) -> Tensor:
            k = next(calls)
            for j in range(steps if k in starts else 0):
                n = draws.normal(f"corrector {k} {j}", x.shape[1:]).to(x)
                x.copy_(langevin(velocity, x, t, y, n, snr))
            return velocity(x, t, y, r)

        return solve(after_correction, x, y, times, draws)

    return solver


sample.SOLVERS["corrector"] = corrected(sample.ab2, 1, 0.16)


@dataclasses.dataclass
class Config(sample.Config):
    corrector: int = option(1, "Langevin steps after each step of --solver")
    snr: float = option(0.16, "size of a Langevin step: of its gradient to its noise (paper: 0.16)")


def main(argv: list[str] | None = None) -> None:
    cfg = sample.settings(Config, argv, __doc__)
    if cfg.corrector < 1 or cfg.snr <= 0:
        raise ValueError(f"--corrector {cfg.corrector} --snr {cfg.snr}: expected at least 1, and above 0")
    if sample.own_settings(sample.find_checkpoint(cfg.checkpoint))[0]:
        raise ValueError(f"{cfg.checkpoint}: a network of jumps has no score; give a flow")
    device, solve = data.start_processes(cfg.device), data.lookup(sample.SOLVERS, cfg.solver, "solver")
    net = sample.load(cfg.checkpoint, cfg, device)
    starts, calls = step_starts(solve, sample.time_grid(cfg.steps))
    more = f" ({calls + cfg.corrector * len(starts)} with the corrector's, snr {cfg.snr:g})"
    name = f"{cfg.solver} + {cfg.corrector} Langevin"
    sample.SOLVERS[name] = corrected(solve, cfg.corrector, cfg.snr)
    sample.write(dataclasses.replace(cfg, solver=name), net, device, more)
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
