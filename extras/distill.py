"""Guided distillation (arXiv:2210.03142): a flow learns its own guided version, then to take fewer steps.

The network is conditioned on the guidance scale w (`imf.Guidance`) and gives for any w of a range in one
evaluation what guidance takes two for. Or, progressively, N of its jumps learn what twice as many of the
network before do, the first 8 what 32 guided steps of the flow do. Neighbour in the core: fm, whose targets
are noisy; these are another network's.

    python train.py --loss distill --init runs/glyphs --out runs/guided
    python sample.py runs/guided --n 100 --steps 20 --guidance 3
    python -m extras.distill runs/glyphs --out runs/halved      8, 4, 2, then 1 jump, each from the one before
    python sample.py runs/halved/2 --n 100 --guidance 3

On glyphs, guidance 1.5 and 3: FD-glyphs 4.4 and 11.7 in the flow's 40 evaluations, 7.1 and 10.2 in 20, 6.5
and 11.4 in 8 jumps, 19.3 and 8.1 in one (extras/README.md).
"""
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

import data
import losses
import model
import sample
import train
from data import option
from losses import expand_dims, interpolate, sample_times

# ---- 1. The objective ----


def distill(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, T, grid=None) -> tuple[Tensor, dict]:
    """Guided distillation: E |u(x_t, t, w) - target|^2, w ~ U(1, omega_max), for a frozen network T

    (arXiv:2210.03142). --nfe 0, its first stage: u is T's guided velocity. --nfe N, its second: jumps of
    1 / N, and the target is the average velocity of T's steps over the jump; `grid` (N, steps + 1): times.

    paper: w = 0 is no guidance, here 1; an error of the image times max(SNR, 1), here of the velocity, which
    for a network that predicts x is that error over max(t, t_min)^2.
    """
    w = 1 + (cfg.omega_max - 1) * draws.uniform("guidance scale")
    if cfg.nfe:
        times = grid.to(x.device)[(cfg.nfe * draws.uniform("time")).long()].T               # (steps + 1, B)
    else:
        times = sample_times(draws, cfg)[None]
    t = times[0]

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    with torch.no_grad():
        target = average_velocity(T, x_t, times, y, w) if cfg.nfe else guided_velocity(T, x_t, t, y, w)

    return (net(x_t, t, y, t, w) - target).square().mean(), {}


def guided_velocity(T, x_t: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """v_null + w (v - v_null) of a flow T where the commands guide it, `sample.INTERVAL`, and v elsewhere; a
    network conditioned on w has learned that."""
    if T.guidance_conditioned:
        return T(x_t, t, y, t, w)
    pairs = (x_t, x_t), (t, t), (y, torch.full_like(y, T.num_classes))
    v, v_null = T(*map(torch.cat, pairs)).chunk(2)
    low, high = sample.INTERVAL
    w = torch.where((t >= low) & (t <= high), w, 1.0)
    return v_null + expand_dims(w, v) * (v - v_null)


def average_velocity(T, x_t: Tensor, times: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """(x_t - x_r) / (t - r) of Euler steps of T over times (steps + 1, B), from t to r."""
    x = x_t
    for t, r in zip(times, times[1:]):
        x = x - expand_dims(t - r, x) * guided_velocity(T, x, t, y, w)
    return (x_t - x) / expand_dims(times[0] - times[-1], x)


# ---- 2. What the loop knows of it ----


def frozen(cfg, net=None) -> model.DiT:
    """The network of --init, with averaged weights that nothing changes; `jumps`: how many it makes, or 0."""
    path = sample.find_checkpoint(cfg.init)
    T = model.load(path).requires_grad_(False)
    T.jumps = sample.own_settings(path)[0].get("steps", 0)
    if T.times != 1:
        raise ValueError(f"--init {cfg.init}: a network of {T.times} times; --loss {cfg.loss} needs a flow")
    if net is not None:
        T.to(net.pos_embed.device).amp = net.amp
    return T


def inputs(role: str, cfg, source, net) -> tuple:
    T = frozen(cfg, net)
    if not (T.null_class or T.guidance_conditioned):
        raise ValueError(f"--init {cfg.init}: a flow without a null label has no guidance to learn")
    steps, what = (T.jumps, "jumps") if T.jumps else (cfg.flow_steps, "steps (--flow_steps)")
    if (T.jumps and not cfg.nfe) or steps % max(1, cfg.nfe):
        raise ValueError(f"--nfe {cfg.nfe}: --init {cfg.init} takes {steps} {what}: give a divisor of that")
    if not cfg.nfe:
        return T,
    times = 1 - torch.arange(steps + 1) / steps
    times[times < T.t_min] = 0.0  # as in sampling: from below t_min a step would leave noise
    return T, torch.stack([times[k:k + steps // cfg.nfe + 1] for k in range(0, steps, steps // cfg.nfe)])


def check(cfg) -> None:
    if not cfg.init:
        raise ValueError(f"--loss {cfg.loss}: which flow is it to learn from? give --init RUN")


FLAGS = dict(omega_max=option(4.0, "largest guidance scale; the smallest is 1, none"),
             nfe=option(0, "jumps from noise to data, that many in all; 0: a velocity"),
             flow_steps=option(32, "--nfe: Euler steps that a flow takes, a multiple of it"))

losses.register("distill", distill, flags=FLAGS, inputs=inputs, check=check,
                network=lambda cfg, source: dict(parts=["imf.Guidance"]),
                sampling=lambda cfg: dict(steps=cfg.nfe, solver="euler") if cfg.nfe else {},
                defaults=dict(steps=3000, lr=3e-3, label_drop=0.0))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return print(__doc__.strip())
    own = dict(out="runs/halved", nfe=8, steps=800, lr=1e-3)
    cfg = train.read_settings(["--loss", "distill", "--init", *argv], **own)
    teacher, jumps = cfg.init, cfg.nfe
    while jumps:
        out = Path(cfg.out, str(jumps))
        stage = dict(init=teacher, nfe=jumps, out=str(out), resume=(out / "last.pt").exists())
        if train.train(dataclasses.replace(cfg, **stage)) is None:
            break  # a signal
        teacher, jumps = str(out), jumps // 2
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
