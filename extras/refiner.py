"""FlowTurbo's refiner (arXiv:2409.18128): one block corrects the flow's last velocity, in place of a new one.

Velocities change little from step to step. A small network that is given the last one is trained on a frozen
flow, and takes over the last steps of a schedule such as H1P5R3: one of Heun's method, five of the pseudo
corrector, three of the refiner.

    python train.py --loss refiner --flow runs/glyphs --out runs/refiner      --net depth=2: two blocks
    python -m extras.refiner runs/refiner --schedules P8,P5R3,H1P4R3          scores, times, a picture

The pseudo corrector is Adams-Bashforth (`sample.ab2`; on a uniform grid the same numbers), so P8 is ab2 in
eight steps. The flow is not guided. On glyphs it does not pay: P6R2 has FD-glyphs 20.5, P6 19.8, P8 12.8.
"""
import dataclasses
import re
import time
import typing

import torch
from torch import Tensor

import data
import losses
import model
import sample
from data import option
from extras import small
from losses import expand_dims, interpolate


class Refiner(model.Part):
    """A small DiT that sees x_t and the last velocity v (B, C, h, w), and gives the velocity at x_t."""

    def __init__(self, **config):
        super().__init__(**config)
        self.x_embedder = model.PatchEmbed(2 * self.channels, self.patch, self.config["width"])
        model.init_xavier_(self.x_embedder.proj)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v + super().forward(torch.cat([x_t, v], 1), t, y)

    @property
    def state(self):
        raise AttributeError("a refiner moves no image by itself")  # by which sample.py knows


def refiner(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, flow) -> tuple[Tensor, dict]:
    """E |v_net(x_r, r, v) - v_flow(x_r, r)|^2, x_r = x_t - (t - r) v, v = v_flow(x_t, t)   (arXiv:2409.18128)

    for steps t - r ~ U(0, reach) of the frozen flow. Logged: `kept`, the same of v itself, the error of a
    refiner that does nothing. paper: labels dropped, for guidance; here: none.
    """
    end = flow.t_min if flow.predict == "x" else 0.0  # samplers ask for no time below
    t = end + (1 - end) * losses.sample_times(draws, cfg)
    r = (t - cfg.reach * draws.uniform("length of the step")).clamp_min(end)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    with torch.no_grad():
        v = flow(x_t, t, y)
        x_r = x_t - expand_dims(t - r, x) * v
        target = flow(x_r, r, y)

    error = net(x_r, r, y, v) - target
    return error.square().mean(), {"kept": (target - v).square().mean()}


def load_flow(path: str, like: model.DiT) -> model.DiT:
    """The frozen flow, with averaged weights, for the images and classes of `like`."""
    flow = model.load(sample.find_checkpoint(path)).requires_grad_(False).to(like.pos_embed.device)
    if (flow.times, flow.shape, flow.num_classes) != (1, like.shape, like.num_classes):
        raise ValueError(f"--flow {path}: {flow.times} times, {flow.num_classes} classes, images "
                         f"{flow.shape}; expected a flow of {like.num_classes} and {like.shape}")
    flow.amp = like.amp
    return flow


def check(cfg) -> None:
    if not cfg.flow or not 0 < cfg.reach <= 1:
        raise ValueError(f"--flow {cfg.flow or '(none)'} --reach {cfg.reach}: expected a run of a flow, and "
                         "a length in (0, 1]")


FLAGS = dict(flow=option("", "the run of the flow to refine"),
             reach=option(0.12, "longest step from the last velocity to the refined one"))

losses.register("refiner", refiner, flags=FLAGS, check=check, draws_images=False,
                network=lambda cfg, source: dict(parts=["refiner.Refiner"], predict="v", depth=1),
                inputs=lambda role, cfg, source, net: (load_flow(cfg.flow, net),),
                defaults=dict(steps=2000, time="uniform", lr=2e-3, label_drop=0.0))


def scheduled(schedule: str, net) -> typing.Callable:
    """A solver of these steps, for a grid of as many: H Heun's, P Adams-Bashforth's, R as P by the refiner.

    paper: R are Euler steps; here: as P, which is a little better on glyphs.
    """
    if not re.fullmatch(r"(?!R)([HPR][1-9]\d*)+", schedule):
        raise ValueError(f"schedule {schedule}: expected something like H1P5R3, which does not begin with R")
    kinds = "".join(kind * int(n) for kind, n in re.findall(r"(.)(\d+)", schedule))

    def solve(velocity, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
        last_v = last_h = None
        for kind, t, r in zip(kinds, times, times[1:]):
            h = r - t
            v = net(x, x.new_full((len(x),), t), y, last_v) if kind == "R" else velocity(x, t, y)
            slope = v
            if kind == "H" and r > 0:
                slope = (v + velocity(x + h * v, r, y)) / 2
            elif kind != "H" and last_v is not None:
                slope = v + h / (2 * last_h) * (v - last_v)
            x, last_v, last_h = x + h * slope, v, h
        return x

    solve.kinds = kinds
    return solve


@dataclasses.dataclass
class Config:
    run: str = option("", "a run of --loss refiner")
    schedules: str = option("P4,P3R1,P6,P4R2,P8,P6R2,P5R3,H1P4R3,P12,P9R3", "what to compare, see above")
    n: int = option(1000, "samples of each")
    out: str = option("refiner.png", "the picture to write, a row for each")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("run",))
    path = sample.find_checkpoint(cfg.run)
    run, net = model.read_checkpoint(path).get("config", {}), model.load(path)
    if run.get("loss") != "refiner":
        raise ValueError(f"{path}: not a run of --loss refiner")
    flow, shown = load_flow(run["flow"], net), []
    labels = sample.labels_for(cfg.n, flow.num_classes)
    print(f"{'schedule':>10} {'flow':>5} {'refiner':>8} {'CPU s':>8} {'FD-glyphs':>10} {'accuracy':>9}")
    for name in cfg.schedules.split(","):
        sample.SOLVERS[name] = solve = scheduled(name, net)
        began, steps = time.process_time(), len(solve.kinds)
        images = torch.cat([x for _, x in sample.generate(flow, labels, 1, steps=steps, solver=name)])
        seconds, H, R = time.process_time() - began, solve.kinds.count("H"), solve.kinds.count("R")
        s = small.score_glyphs(images, labels)
        print(f"{name:>10} {steps + H - R:>5} {R:>8} {seconds:>8.1f} {s['fd_glyphs']:>10.2f} "
              f"{s['accuracy']:>9.3f}", flush=True)
        shown.append(images[:20])
    data.grid(torch.cat(shown), 20).save(cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    data.run_cli(main)
