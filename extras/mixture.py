"""The 1-D world: objectives trained on a Gaussian mixture whose velocity and flow map are known.

    python losses.py                       the core's objectives: a table of errors, and losses.png
    python losses.py --losses fm,imf       any that points are enough for

extras/gaussians.py is the mixture; extras/mixture_table.py draws the table and the picture.
"""
import copy
import dataclasses
import types
import typing

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import data
import losses
import model
from data import option
from extras.gaussians import FOUR_MODES, Mixture, exact_samples, exact_velocity


class PointNet(nn.Module):
    """A small velocity network for points (B, D), with the attributes that objectives ask of a network.

    Coordinates and times enter as sines and cosines of several frequencies, so that narrow modes can be
    told apart.
    """
    t_min, null_class, num_classes, guidance_conditioned = 0.05, False, 1, False

    def __init__(self, dimension: int = 1, width: int = 128, outputs: int = 0, predict: str = "v",
                 times: int = 1):
        super().__init__()
        self.predict, self.times, widths = predict, times, [(dimension + times) * 32, width, width, width]
        self.register_buffer("frequencies", torch.linspace(0.5, 8, 16))
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, outputs or dimension))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        out = self.layers(self.features(x_t, t, r))
        return model.clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out

    def features(self, x_t: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        times = [t, torch.zeros_like(t) if r is None else t - r][:self.times]
        angle = (torch.cat([x_t, torch.stack(times, 1)], 1)[..., None] * self.frequencies).flatten(1)
        return torch.cat([angle.sin(), angle.cos()], 1)                               # (B, (D + times) 32)


class PointDiscriminator(PointNet):
    """A number for each point: (B, D), (B,) -> (B,)."""

    def __init__(self, dimension: int = 1):
        super().__init__(dimension, outputs=1)
        self.register_buffer("gradient_square", torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t)[:, 0]


POINTS = dict(steps=2000, batch=512, lr=2e-3, d_lr=2e-3, betas=(0.9, 0.999), decay=True, ema=0.0, seed=0,
              time="uniform", time_mean=0.0, time_std=1.0, label_drop=0.0, predict="v", kind=PointNet)


def point_settings(name: str, **changes) -> types.SimpleNamespace:
    """The settings of a run on points: the defaults of its flags, what its `points` say, and the changes."""
    flags = {flag: field.default for flag, field in losses.find(name).flags.items()}
    return types.SimpleNamespace(**flags | POINTS | losses.find(name).points | changes)


def train_points(name: str, mixture: Mixture, cfg=None) -> PointNet:
    """A PointNet trained on draws of the mixture, with averaged weights, against a discriminator if any."""
    objective, cfg, dimension = losses.find(name), cfg or point_settings(name), mixture.means.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        wanted = objective.network(cfg, None)
        times = max(1, wanted.get("times", 1))
        nets = {"G": cfg.kind(dimension, predict=cfg.predict, times=times)}
        nets["G"].t_min = wanted.get("t_min", nets["G"].t_min)
        nets |= {"D": PointDiscriminator(dimension)} if objective.D else {}
    rates = {"G": cfg.lr, "D": cfg.d_lr}
    opts = {role: torch.optim.AdamW(net.parameters(), rates[role], cfg.betas, weight_decay=0)
            for role, net in nets.items()}
    inputs = {role: objective.inputs(role, cfg, mixture, net) for role, net in nets.items()}
    ema = copy.deepcopy(nets["G"]).requires_grad_(False)
    for step in tqdm(range(cfg.steps), desc=name):
        role = objective.turn(step, cfg)
        others = [net for other, net in nets.items() if other != role]
        opts[role].param_groups[0]["lr"] = rates[role] * (1 - step / cfg.steps if cfg.decay else 1)
        x, y = mixture.sample(cfg.batch, data.generator(cfg.seed, "points", step))
        draws = BatchDraws(cfg.seed, step, cfg.batch)
        loss, _ = getattr(objective, role)(nets[role], x, y, draws, cfg, *others, *inputs[role])
        loss.backward()
        opts[role].step()
        for opt in opts.values():
            opt.zero_grad()
        if role == "G":
            torch._foreach_lerp_(list(ema.parameters()), list(nets["G"].parameters()), 1 - cfg.ema)
    return ema.eval()


class BatchDraws:
    """The interface of data.Draws with one generator a batch: fast, where batches are never split."""

    def __init__(self, seed: int, step: int, batch: int):
        self.key, self.batch, self.positions = (seed, step), batch, range(step * batch, (step + 1) * batch)

    def normal(self, purpose: str, shape: tuple) -> Tensor:
        return torch.randn(self.batch, *shape, generator=data.generator(*self.key, purpose))

    def uniform(self, purpose: str, shape: tuple = ()) -> Tensor:
        return torch.rand(self.batch, *shape, generator=data.generator(*self.key, purpose))


@torch.no_grad()
def trajectory(velocity: typing.Callable, e: Tensor, steps: int, solver: str = "euler") -> Tensor:
    """Euler steps, or jumps, from noise e (B, D) at t = 1 to data at t = 0: all states (steps + 1, B, D).

    solver "renoise", for consistency models: each step goes to the data, and back to its end with new noise.
    """
    states = [e]
    for k in range(steps):
        t, r = (torch.full((len(e),), 1 - i / steps, dtype=e.dtype) for i in (k, k + 1))
        end = torch.zeros_like(r) if solver == "renoise" else r
        x = states[-1] - losses.expand_dims(t - end, e) * velocity(states[-1], t, None, end)
        n = torch.randn(e.shape, generator=data.generator("renoise points", k)).to(e)
        states.append(losses.interpolate(x, n, r) if solver == "renoise" else x)
    return torch.stack(states)


@torch.no_grad()
def point_errors(net, mixture: Mixture, steps: int = 50, solver: str = "euler", n: int = 4000) -> dict:
    """Errors against the closed form of 1-D data: n samples by `steps` steps of a solver of `trajectory`.

    velocity: rms over (x_t, t). map: rms to the exact flow map of the same noises. W1: to the exact
    quantiles. weight: largest error of a mode's share, by the nearest mean. in mode: share within 3
    deviations of it.
    """
    x, _ = mixture.sample(n, data.generator("evaluate points"))
    u = (torch.arange(n) + 0.5) / n
    e = torch.special.ndtri(u)[:, None]
    t = u[torch.randperm(n, generator=data.generator("evaluate times"))]
    x_t = losses.interpolate(x, e[torch.randperm(n, generator=data.generator("evaluate noise"))], t)
    fake, exact = trajectory(net, e, steps, solver)[-1], exact_samples(mixture, n)
    velocity = (net(x_t, t, None, t) - mixture.velocity(x_t, t)).square().mean().sqrt().item()
    away = (fake - mixture.means.T).abs()                                                     # (n, K)
    share = away.argmin(1).bincount(minlength=len(mixture.weights)) / n
    return {"velocity": velocity, "map": (fake - exact).square().mean().sqrt().item(),
            "W1": (fake.sort(0).values - exact).abs().mean().item(),
            "weight": (share - mixture.weights).abs().max().item(),
            "in mode": (away / mixture.stds).amin(1).le(3).float().mean().item()}


def show(runs: dict, out: str) -> None:
    """Train runs, "OBJECTIVE" or "OBJECTIVE, words" -> changes of its settings: table and picture."""
    trained = {"exact flow": (exact_velocity, {})}
    for name, changes in runs.items():
        objective = name.split(",")[0]
        cfg = point_settings(objective, **changes)
        trained[name] = train_points(objective, FOUR_MODES, cfg), losses.find(objective).sampling(cfg)
    print("\n1-D mixture of four modes against its closed form")
    table = data.extra("mixture_table", "the table of the 1-D mixture")
    table.print_table(trained)
    table.draw_trajectories(trained, out)
    print(f"wrote {out}")


@dataclasses.dataclass
class Options:
    steps: int = option(0, "steps of each; 0: as many as it needs")
    seed: int = option(0, "seed of weights, data and noise")
    out: str = option("", "the picture to write")


def command(argv: list[str] | None, about: str, out: str, runs: typing.Callable, **flags) -> None:
    """A command that shows runs(settings), see `show`; its settings are `Options` and `flags`."""
    fields = [(name, type(flag.default), flag) for name, flag in flags.items()]
    kind = dataclasses.make_dataclass("Options", fields, bases=(Options,))
    cfg = data.parse(kind, argv, about, out=out)
    shared = dict(seed=cfg.seed) | (dict(steps=cfg.steps) if cfg.steps else {})
    show({name: changes | shared for name, changes in runs(cfg).items()}, cfg.out)


def named(cfg) -> dict:
    """The runs that --losses names; where the prediction matters, with networks of v and of x."""
    names = cfg.losses.split(",") if cfg.losses else ["fm", "meanflow", "ect", "afm", "cafm"]
    if without := [name for name in names if not losses.find(name).points]:
        raise ValueError(f"--losses {without[0]}: needs images, points are not enough")
    of_x = [name for name in names if "t_min" in losses.find(name).network(point_settings(name), None)]
    return dict.fromkeys(names, {}) | {f"{name}, of x": dict(predict="x") for name in of_x}


def main(argv: list[str] | None = None) -> None:
    command(argv, "Train objectives on a 1-D mixture and compare with its closed form.", "losses.png", named,
            losses=option("", "objectives to train, such as fm,afm; empty: those of losses.py"))


if __name__ == "__main__":
    data.run_cli(main)
