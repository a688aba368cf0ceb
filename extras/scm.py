"""sCM: consistency training in continuous time (arXiv:2410.11081).

Beside `ect` in losses.py: the same jumps to the data, but their change along the flow is a derivative of the
network (one forward-mode pass, as in meanflow) instead of a step to a nearby time, so there is no schedule of
steps; the size of that change is normalised instead. As the target moves with the network, it needs a low
learning rate.

    python train.py --loss scm --init runs/glyphs --out runs/scm     --data_std: of your data's pixels
    python sample.py runs/scm --n 100 --steps 2                      1 by default, re-noised between steps
    python -m extras.scm                                             beside ect on the 1-D mixture

1-D mixture, seed 0, W1 in 1, 2, 4 and 50 steps: 0.098, 0.078, 0.069, 0.035 (ect: 0.099, 0.080, 0.081, 0.072);
rms to the exact flow map in one step: 0.161 (0.171). By networks of x: 0.082, 0.078, 0.058, 0.048 (0.085,
0.082, 0.076, 0.060), 0.166 (0.178).

On glyphs: extras/README.md. A step takes 2.2 to 2.5 of fm's time. It needs a flow to start from: from scratch
it made no digits, and why is not known.
"""
import sys

from torch import Tensor

import data
import losses
import model
from losses import drop_labels, expand_dims, interpolate, progress, sample_times


def scm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Consistency training in continuous time: E |F - sg(F + g / (|g| + 0.1))|^2

    (sCM, arXiv:2410.11081, Eq. 8) for the change of f(x_t, t) = x_t - t u(x_t, t) along the way, df/dt =
    v - u - t du/dt: MeanFlow's jumps to r = 0. The paper's circle, tan a = t / ((1 - t) sd) for data of
    deviation sd, is our line by another scale: with S^2 = sd^2 (1 - t)^2 + t^2 its g = cos a df/da is
    (1 - t) S df/dt, and its network F is u S / sd plus what has no weights.

    paper: a learned weight of each t; here: none, as g, once normalised (|.|: root of the mean over pixels),
    is alike at all t. paper: a factor that grows from 0 to 1 before all that moves with a; here: before
    du/dt, over a fifth of the run. f(x, 0) = x: see `losses.boundary`.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg)

    v, u = e - x, net(x_t, t, y)
    _, dudt = model.time_derivative(net, x_t, t, y, v.to(x_t.dtype))
    dfdt = v - u.detach() - min(1, 5 * progress(draws, cfg)) * expand_dims(t, x) * dudt
    S = ((cfg.data_std * (1 - t)) ** 2 + t ** 2).sqrt()
    g = expand_dims((1 - t) * S, x) * dfdt
    size = g.square().flatten(1).mean(1).sqrt()
    target = u.detach() + g / expand_dims((size + 0.1) * S / cfg.data_std, x)

    error = (u - target) * expand_dims(S / cfg.data_std, x)
    return error.square().mean(), {"tangent": size.mean()}


losses.register("scm", scm, flags=losses.DATA_STD, network=losses.boundary,
                alarm=lambda row, first: losses.growth_alarm(row, first, "tangent"),
                sampling=losses.consistency_model,
                scratch={}, defaults=dict(steps=2000, lr=1e-3, label_drop=0.0, time_mean=-1.0, time_std=1.4,
                              sample_steps=1),
                points=dict(steps=2500, ema=0.99, data_std=1.1))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    run = data.extra("mixture", "python -m extras.scm").main
    run(["--losses", "ect,scm", "--out", "scm.png", *argv])


if __name__ == "__main__":
    data.run_cli(main)
