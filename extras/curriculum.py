"""A curriculum of training times: the noisiest first (arXiv:2403.10348).

`--time curriculum:N` lets in times in 20 stages of N steps, from t near 1 on, for any objective that draws
its times by losses.sample_times. Beside `logit_normal` in losses.py: the same distribution, given that t is
not below the stage's least time; after 19 stages it is that distribution. `--time curriculum:N:uniform`: the
same of uniform times.

    python train.py --time curriculum:50 --out runs/curriculum
    python -m extras.curriculum                                fm with and without it on the 1-D mixture

1-D mixture, seed 0, stages of 50 of 2,000 steps: rms of the velocity 0.094 (0.075 without), W1 in 50 steps
0.025 (0.026). The gain that the paper reports, on images, was not measured here: not checked yet.
"""
import math

import torch
from torch import Tensor

import data
from data import option
from losses import TIMES


def curriculum(u: Tensor, draws, cfg) -> Tensor:
    """Times (B,) from uniform u: of the distribution after the second colon, given t >= `least_time`."""
    steps, base = stages_of(cfg.time)
    least = least_time(draws.positions[0] // cfg.batch, steps)
    if not least:
        return TIMES[base](u, draws, cfg)
    if base == "uniform":
        return least + (1 - least) * u
    # By the upper tail, which may be tiny.
    above = 0.5 * math.erfc((math.log(least / (1 - least)) - cfg.time_mean) / (cfg.time_std * math.sqrt(2)))
    return torch.sigmoid(cfg.time_mean - cfg.time_std * torch.special.ndtri(above * (1 - u.double()))).to(u)


def least_time(step: int, steps: int, stages: int = 20, reach: float = 6.0) -> float:
    """The least time of this step's stage, 0 when all stages have passed (arXiv:2403.10348).

    The stages divide logit(t) in [-6, 6], half the log-SNR with its sign turned, evenly. paper: a stage ends
    when the loss has not fallen for some steps; here: after `steps`, so that a step depends on its number.
    """
    stage = step // steps + 1
    return 0.0 if stage >= stages else 1 / (1 + math.exp(2 * reach * stage / stages - reach))


def stages_of(time: str) -> tuple[int, str]:
    """(steps of a stage, the name of its distribution) from "curriculum:STEPS" or "curriculum:STEPS:NAME"."""
    _, steps, base, *rest = f"{time}::".split(":")
    base = base or "logit_normal"
    if not steps.isdigit() or int(steps) < 1 or base not in ("logit_normal", "uniform") or any(rest):
        raise ValueError(f"--time {time}: expected curriculum:STEPS or curriculum:STEPS:uniform, the "
                         f"steps of each of 20 stages")
    return int(steps), base


TIMES["curriculum"] = curriculum


def runs(cfg) -> dict:
    return {"fm": {}, "fm, curriculum": dict(time=f"curriculum:{cfg.stage}:uniform")}


def main(argv: list[str] | None = None) -> None:
    command = data.extra("mixture", "python -m extras.curriculum").command
    command(argv, "Train fm on a 1-D mixture with and without a curriculum of times.", "curriculum.png", runs,
            stage=option(50, "steps of a stage of the curriculum"))


if __name__ == "__main__":
    data.run_cli(main)
