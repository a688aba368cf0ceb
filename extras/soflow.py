"""SoFlow: MeanFlow without a derivative of the network (arXiv:2512.15657).

Beside `meanflow` in losses.py: the same jumps u, times and adaptive weight, but the derivative of
f(x_t, t, r) = x_t - (t - r) u(x_t, t, r) along the flow is a difference, one more call of the network without
gradient. Guidance can be trained into it, by the flags of meanflow_guided.py. bfloat16 has too few digits for
such quotients, so `--amp off` is the default.

    python train.py --loss soflow --out runs/soflow            from scratch, or --init runs/glyphs from a flow
    python sample.py runs/soflow --n 100 --steps 4             sampled in 1 step by default
    python -m extras.soflow                                    beside meanflow on the 1-D mixture

1-D mixture, seed 0, W1 in 1, 2, 4 and 50 steps: 0.084, 0.085, 0.047, 0.012 (meanflow: 0.083, 0.074, 0.047,
0.016); rms to the exact flow map: 0.117, 0.132, 0.076, 0.033 (0.116, 0.120, 0.070, 0.039).

On glyphs: extras/README.md. A step takes 1.1 of fm's time, meanflow's 1.7.
"""
import sys

import torch
from torch import Tensor

import data
import losses
from extras.meanflow_guided import GUIDED, check_guided, guided_velocity
from losses import (JUMP_OR_FLOW, adaptive, drop_labels, expand_dims, interpolate, masked_call, progress,
                    two_errors, two_times, velocity_target)


def soflow(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """SoFlow: E w |u(x_t, t, r) - sg(u + q)|^2, q = (f(x_t, t, r) - f(x_l, l, r)) / (t - l)

    (arXiv:2512.15657) for the solution f(x, t, r) = x - (t - r) u(x, t, r), which must not depend on where
    on the way from x_t to x_l = x_t - (t - l) v it starts. q is v - d/dt ((t - r) u) by a difference, with
    l = t - step (t - r) and a step that falls from 0.1 to 0.002 over the run. Where r = t the target is v.

    paper: the value of a jump's loss means nothing; here: |q|^2 with the same gradient. paper: own times for
    jumps and for velocities, and guidance that fades out above t = 0.8; here: those of MeanFlow.
    """
    t, r = two_times(draws, cfg)
    ahead = ((t - r) * 0.1 * 0.02 ** progress(draws, cfg)).clamp_min(1e-4)
    l = t - ahead  # noqa: E741

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, JUMP_OR_FLOW)

    v = guided_velocity(net, velocity_target(net, x, e, x_t, t), x_t, t, y, cfg)
    u = net(x_t, t, y, r)
    with torch.no_grad():
        u_l = masked_call(r < t, net, x_t - expand_dims(ahead, x) * v, l, y, r)
        q = v - (expand_dims(t - r, x) * u - expand_dims(l - r, x) * u_l) / expand_dims(ahead, x)
    target = torch.where(expand_dims(r < t, x), u.detach() + q, v)

    error = u - target
    half = torch.where(r < t, 0.5, 1.0)  # the paper's jumps have |f - f_l|^2 / 2
    return (half * adaptive(error, cfg.p, 0.01)).mean(), two_errors(error, t, r)


losses.register("soflow", soflow, flags=losses.JUMPS | GUIDED, defaults=losses.FROM_FLOW | dict(amp="off"),
                scratch=losses.FROM_SCRATCH,
                check=check_guided, sampling=losses.flow_map, network=lambda cfg, source: dict(times=2),
                points=losses.JUMP_POINTS)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    run = data.extra("mixture", "python -m extras.soflow").main
    run(["--losses", "meanflow,soflow", "--out", "soflow.png", *argv])


if __name__ == "__main__":
    data.run_cli(main)
