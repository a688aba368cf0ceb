"""Training objectives, side by side.

    name      the network gives     what the loss asks for         more calls      derivatives     arXiv
    fm        velocity v(x_t, t)    v = e - x on average           none            none            2210.02747
    meanflow  jump u: x_r = x_t -   u = v - (t - r) du/dt          none            u's along v     2505.13447
              (t - r) u(x_t, t, r)
    ect       jump u to data        x_0 is that from just ahead    one             none            2406.14548
    afm       jump u: x_r = x_s -   D's values at x_r and at data  G, 2.5 times D  none            2511.22475
              (s - r) u(x_s, s, r)  look alike, the shortest way
    cafm      velocity v(x_t, t)    D's derivatives along v and    G; D and its    D's: one (G),   2604.11521
                                    e - x look alike               input gradient  two (D)

Time runs from data (t = 0) to noise (t = 1): x_t = (1 - t) x + t e with e ~ N(0, I), and v = dx_t/dt = e - x.

    objective(net, x, y, draws, cfg) -> (loss, logs)

    net    velocity network (x_t, t, y) -> v, or with jumps (x_t, t, y, r) -> u; see model.DiT
    x, y   clean images (B, C, h, w) float in [-1, 1] (or latents), and labels (B,) int64
    draws  data.Draws of this micro-batch: all randomness comes from here
    cfg    train.Config with this objective's own flags
    loss   scalar float32 tensor;  logs: dict of scalar tensors, columns of log.jsonl

Each has the same four paragraphs: times, point, target, distance. An adversarial method is a pair, D's and
G's, with the network that the loss trains first. `register` tells the loop the rest; more are in extras/.

`python losses.py` trains each on a 1-D mixture of known flow: errors and a picture.
"""
import math
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import data
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from data import option

# ---- 1. How an objective is registered ----


@dataclass(frozen=True)
class Objective:
    """What the loop knows of an objective; in cfg there are its own flags, too."""
    name: str
    G: Callable                                   # the loss of the generator, or of the only network
    D: Callable | None = None                     # the loss of the discriminator
    turn: Callable = lambda step, cfg: "G"        # which network a step updates
    flags: dict = field(default_factory=dict)     # its own settings: name -> option(..)
    defaults: dict = field(default_factory=dict)  # shared settings in which it differs from fm
    scratch: dict | None = None                   # where it wants a flow: its settings without --init
    variant: Callable = lambda given: {}          # and those that follow from others
    network: Callable = lambda cfg, source: {}    # what it asks of model.create
    discriminator: Callable = lambda cfg, G: model.discriminator(G.config)
    inputs: Callable = lambda role, cfg, source, net: ()  # further arguments of that role's loss
    sampling: Callable = lambda cfg: {}           # how its samples are made, where that is no choice
    check: Callable = lambda cfg: None            # ValueError for impossible settings
    rate: Callable = lambda role, cfg: role == "D" and getattr(cfg, "d_lr", 0) or cfg.lr
    alarm: Callable = lambda row, first: ""       # what goes wrong, by a line of the log and the first one
    draws_images: bool = True                     # whether a run has pictures to show
    points: dict = field(default_factory=dict)    # its settings on the 1-D mixture, if any


LOSSES: dict[str, Objective] = {}


def register(name: str, G: Callable, D: Callable | None = None, **rest) -> None:
    """Add an objective to `LOSSES`; `rest` are fields of `Objective`."""
    LOSSES[name] = Objective(name, G, D, **rest)


def find(name: str) -> Objective:
    """The objective NAME of this file or of extras/, or "FILE.py:NAME", a function of yours."""
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and name not in LOSSES:
        if not Path(path).is_file():
            raise ValueError(f"--loss {name}: there is no file {path}")
        own = runpy.run_path(path)
        if function not in LOSSES and not callable(own.get(function)):
            raise ValueError(f"--loss {name}: {path} has no function {function}")
        LOSSES[name] = LOSSES.get(function) or Objective(name, own[function])
    return data.lookup(LOSSES, name, "--loss")


# ---- 2. Shared pieces ----


def sample_times(draws, cfg, purpose: str = "time") -> Tensor:
    """Training times (B,) float32 from the distribution cfg.time, one of `TIMES`."""
    return data.lookup(TIMES, cfg.time.partition(":")[0], "--time")(draws.uniform(purpose), draws, cfg)


def logit_normal(u: Tensor, draws, cfg) -> Tensor:
    """sigmoid(time_mean + time_std n), n ~ N(0, 1), from uniform u (SD3, arXiv:2403.03206, Eq. 19).
    paper: P_mean = -0.8 of arXiv:2511.13720, whose time runs from noise to data; here: +0.8."""
    n = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)
    return torch.sigmoid(cfg.time_mean + cfg.time_std * n)


TIMES = {"logit_normal": logit_normal, "uniform": lambda u, draws, cfg: u}


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e, for t (B,)."""
    return (1 - expand_dims(t, x)) * x + expand_dims(t, x) * e


def expand_dims(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, .., 1), of as many axes as x."""
    return t.view(-1, *[1] * (x.dim() - 1))


def velocity_target(net, x: Tensor, e: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = e - x; where the network predicts x with its clamp, v = (x_t - x) / max(t, t_min): a loss of
    |x - x_net|^2 / max(t, t_min)^2 (arXiv:2511.13720), 0 for a perfect x at any t."""
    return model.clean_velocity(x, x_t, t, net.t_min) if net.predict == "x" else e - x


def drop_labels(net, y: Tensor, draws, cfg, purpose: str = "label drop") -> Tensor:
    """Labels, the null class with probability label_drop, for guidance (arXiv:2207.12598)."""
    if not net.null_class:
        return y
    return torch.where(draws.uniform(purpose) < cfg.label_drop, net.num_classes, y)


def progress(draws, cfg) -> float:
    """Of the run: 0 at the first step, 1 at the last."""
    return draws.positions[0] // cfg.batch / max(1, cfg.steps - 1)


def jump(net, x_s: Tensor, s: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """Where a jump from s to r ends: x_s - (s - r) u(x_s, s, y, r)."""
    return x_s - expand_dims(s - r, x_s) * net(x_s, s, y, r)


def masked_call(rows: Tensor, call: Callable, *inputs: Tensor) -> Tensor:
    """call(*inputs) for the samples where rows (B,), and 0 for the others, which cost nothing."""
    where = rows.nonzero()[:, 0]
    if not len(where):
        if dist.is_initialized():  # for the collectives of a sharded network
            call(*(x[:1] for x in inputs))
        return torch.zeros_like(inputs[0])
    out = call(*(x[where] for x in inputs))
    return out.new_zeros(inputs[0].shape).index_put((where,), out)


# ---- 3. Regressions: flow matching, one-step flow, consistency ----


def fm(net, x, y, draws, cfg):
    """Flow matching: E |v_net(x_t, t, y) - (e - x)|^2 (arXiv:2210.02747, Eq. 23; SiT, arXiv:2401.08740).

    paper: time runs from noise to data, with least noise sigma_min; here: from data to noise, with none."""
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    v = velocity_target(net, x, e, x_t, t)

    loss = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    return loss, {}


register("fm", fm, points=dict(steps=2000))


def meanflow(net, x, y, draws, cfg, guide=None):
    """MeanFlow: E w |u(x_t, t, r) - sg(v - (t - r) du/dt)|^2 (arXiv:2505.13447, Eq. 6-11), w: see `adaptive`.

    The average velocity u = 1 / (t - r) int_r^t v has this target, as d/dt of (t - r) u = int_r^t v shows;
    du/dt = (v . grad_x) u + partial u / partial t at fixed r. The loss tells little: look at the logged
    `flow`, |u(x_t, t, t) - v|^2. guide: a function that changes v, for guidance in training. paper: sums over
    pixels, c = 0.01; here: means, c to match."""
    t, r = two_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, JUMP_OR_FLOW)

    v = velocity_target(net, x, e, x_t, t)
    v = guide(net, v, x_t, t, y, cfg) if guide else v
    dudt = masked_call(r < t, lambda *at: model.time_derivative(net, *at)[1], x_t, t, y, v.to(x_t.dtype), r)
    target = v - expand_dims(t - r, x) * dudt

    error = net(x_t, t, y, r) - target
    return adaptive(error, cfg.p, 0.01 / x[0].numel()).mean(), two_errors(error, t, r)


def is_jump(draws, cfg) -> Tensor:
    """Whether a sample learns a jump (B,), as a share `jumps` does; the others, r = t, learn the velocity.

    paper: in its code the first rows of a batch have r = t, and the very first the null label, so that no
    jump is learned without a label; here: a draw replaces the row, for `drop_labels` as well."""
    return draws.uniform(JUMP_OR_FLOW) >= 1 - cfg.jumps


def two_times(draws, cfg) -> tuple[Tensor, Tensor]:
    """The times (t, r) of a jump, the larger and the smaller of two draws of `jump_time`; or r = t of `time`.

    paper: its code gives velocities the larger of two draws, too, and jumps any start; here: velocities have
    one draw, and jumps start at `jump_low` or above, as the few below dull images near the data."""
    draw = data.lookup(TIMES, (cfg.jump_time or cfg.time).partition(":")[0], "--jump_time")
    both = [draw(draws.uniform(purpose), draws, cfg) for purpose in ("jump's start", "jump's end")]
    jump = torch.stack(both).sort(0, descending=True).values  # (2, B)
    jump *= cfg.jump_low / jump[0] + 1 - cfg.jump_low  # a start s: low + (1 - low) s
    return torch.where(is_jump(draws, cfg), jump, sample_times(draws, cfg)).unbind()


def adaptive(error: Tensor, p: float, c: float) -> Tensor:
    """l / sg(l + c)^p of each sample (B,), l its mean square error (arXiv:2505.13447, Sec. 4.3). With p > 0
    the minimiser is a mean only where noise averages out over many pixels: p = 0 for points."""
    square = error.square().flatten(1).mean(1)
    return square / (square.detach() + c) ** p


def two_errors(error: Tensor, t: Tensor, r: Tensor) -> dict:
    """Logs: the mean square error where r = t and of jumps; 0 where there are none."""
    square = error.detach().square().flatten(1).mean(1)
    return {name: (square * rows).sum() / rows.sum().clamp_min(1)
            for name, rows in (("flow", r == t), ("jump", r < t))}


def flow_map(cfg) -> dict:
    """Sampling by a network that jumps from any t to any r: Euler's steps are jumps."""
    return dict(solver="euler", guidance=1.0)


JUMP_OR_FLOW = "jump or flow"  # the draw that decides it
JUMPS = dict(jumps=option(0.5, "share of samples that learn a jump; others learn the velocity"),
             jump_time=option("uniform", "times that jumps join, one of --time's; empty: the same"),
             jump_low=option(0.2, "jumps start here or nearer to the noise; 0: anywhere"),
             p=option(1.0, "a sample's loss l is divided by (l + c)^p, detached; 0: least squares"))
FROM_FLOW = dict(steps=3000, lr=1e-3, sample_steps=1)
FROM_SCRATCH = dict(steps=4000, lr=4e-3)
JUMP_POINTS = dict(steps=2500, ema=0.99, p=0.0, jump_low=0.0)

register("meanflow", meanflow, flags=JUMPS, defaults=FROM_FLOW, scratch=FROM_SCRATCH, sampling=flow_map,
         check=lambda cfg: check_jumps(cfg), network=lambda cfg, source: dict(times=2), points=JUMP_POINTS)


def ect(net, x, y, draws, cfg):
    """Consistency training in shrinking steps: E (|f(x_t, t) - sg f(x_r, r)|^2 + c^2)^(1/2) / (s_t - s_r)

    for f(x_t, t) = x_t - t u(x_t, t), x_t and x_r of one x and e (ECT, arXiv:2406.14548; iCT,
    arXiv:2310.14189), s_r = s_t (1 - (1 + 8 sigmoid(-s_t)) / 2^k)_+, k = 1 .. doublings over the run; at
    first r = 0, f = x, at small s.

    paper: EDM's noise levels s and inputs x + s e, sums over pixels; here: s = t / (1 - t), x_t is that
    input over 1 + s, so its log-normal s are our logit-normal t, and means over pixels, c = 0.00054.
    f(x, 0) = x, without which nothing ties f to the data: see `boundary`."""
    t = sample_times(draws, cfg)
    s = t / (1 - t)
    k = 1 + min(cfg.doublings - 1, math.floor(cfg.doublings * progress(draws, cfg)))
    s_r = s * (1 - (1 + 8 * torch.sigmoid(-s)) / 2 ** k).clamp_min(0)
    r = s_r / (1 + s_r)

    e = draws.normal("noise", x.shape[1:])
    x_t, x_r, y = interpolate(x, e, t), interpolate(x, e, r), drop_labels(net, y, draws, cfg)

    with torch.no_grad():
        target = jump(net, x_r, r, torch.zeros_like(r), y)

    error = jump(net, x_t, t, torch.zeros_like(t), y) - target
    square, c = error.square().flatten(1).mean(1), 0.00054
    return (((square + c * c).sqrt() - c) / (s - s_r)).mean(), {"gap": (t - r).mean(), "jump": square.mean()}


def boundary(cfg, source) -> dict:
    """A network that predicts x is to give the jump f(x_t, t) = x_t where t -> 0, as one of v does anyway.

    f is x_net for t > t_min and (1 - t / t_min) x_t + (t / t_min) x_net below; at t_min noise is as large as
    data of deviation sd: t / (1 - t) = sd. paper: the same by c_skip(s), c_out(s) of EDM."""
    return dict(t_min=cfg.data_std / (1 + cfg.data_std))


def consistency_model(cfg) -> dict:
    """Sampling by a network that jumps to the data only, and part of the way back by new noise."""
    return dict(solver="renoise", guidance=1.0)


DATA_STD = dict(data_std=option(0.42, "standard deviation of the data's pixels (glyphs: 0.42)"))

register("ect", ect, sampling=consistency_model, network=boundary,
         alarm=lambda row, first: growth_alarm(row, first, "loss"),
         flags=DATA_STD | dict(doublings=option(8, "stages, each with steps half as long as before")),
         defaults=dict(steps=3000, lr=1e-3, label_drop=0.0, time_mean=-1.1, time_std=2.0, sample_steps=1,
                       amp="off"),
         scratch=dict(steps=4000, lr=4e-3, time_mean=0.8, time_std=1.6),
         points=dict(steps=2500, ema=0.99, time="logit_normal", time_std=1.5, data_std=1.1))


# ---- 4. Adversarial flow, discrete and continuous ----


def afm_D(D, x, y, draws, cfg, G):
    """AFM's discriminator, relativistic, with its penalties (arXiv:2511.22475, Eq. 4-7, Algorithm 2):

        E softplus(f - d) + gp (R1 + R2) + cp E (d + f)^2,   d = D(x_r, r), f = D(jump to r, r).

    R1, R2: see `flatness`. D never sees where a jump came from, or no generator could satisfy it."""
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    with torch.no_grad():
        sample = jump(G, x_s, s, r, y)

    real, fake = D(x_r, r, y), D(sample, r, y)
    r1 = flatness(D, x_r, real, s, r, y, draws, "R1")
    r2 = flatness(D, sample, fake, s, r, y, draws, "R2")
    loss = F.softplus(fake - real).mean() + cfg.gp * (r1 + r2) + cfg.cp * (real + fake).square().mean()
    return loss, {"real": real.mean(), "fake": fake.mean(), "r1": r1, "r2": r2}


def afm_G(G, x, y, draws, cfg, D):
    """AFM's generator: E softplus(d - f) + ot E |jump - x_s|^2 / (s - r)   (arXiv:2511.22475, Eq. 16-19)

    with |.|^2 a mean over pixels: of all maps to the data, the shortest. `NormaliseGradient` makes `ot` mean
    the same for every network and size."""
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    sample = jump(G, x_s, s, r, y)

    with torch.no_grad():
        real = D(x_r, r, y)
    fake = D(NormaliseGradient.apply(sample, D.gradient_square), r, y)
    adversarial = F.softplus(real - fake).mean()
    distance = (sample - x_s).square().flatten(1).mean(1)
    loss = adversarial + ot_weight(draws, cfg) * (distance / (s - r).clamp_min(1e-3)).mean()
    return loss, {"adversarial": adversarial, "distance": distance.mean()}


def jump_times(draws, cfg) -> tuple[Tensor, Tensor]:
    """Times (s, r) of one of nfe equal jumps from 1 to 0; s ~ U(0, 1), r ~ U(0, s) if nfe = 0."""
    u = draws.uniform("time")
    if not cfg.nfe:
        return 1 - u, (1 - u) * draws.uniform("time of the jump's end")
    k = (u * cfg.nfe).floor()
    return 1 - k / cfg.nfe, 1 - (k + 1) / cfg.nfe


def flatness(D, x: Tensor, out: Tensor, s: Tensor, r: Tensor, y: Tensor, draws, purpose: str,
             step: float = 0.01) -> Tensor:
    """R1 (at data) or R2 (at samples): E (s - r) ((D(x + step n) - D(x)) / step)^2, n ~ N(0, I), of every
    fourth sample. Its mean is |grad_x D|^2, more where D is curved (arXiv:2511.22475, Sec. 3.5, Eq. 20)."""
    rows = every_fourth(draws, x.device)
    n = draws.normal(purpose, x.shape[1:])[rows]
    change = (D(x[rows] + step * n, r[rows], y[rows]) - out[rows]) / step
    return ((s - r)[rows].clamp_min(1e-3) * change.square()).sum() * 4 / len(x)


def every_fourth(draws, device) -> Tensor:
    """Indices in this micro-batch of samples whose position in the run is a multiple of 4."""
    rows = [i for i, position in enumerate(draws.positions) if position % 4 == 0]
    return torch.tensor(rows, device=device, dtype=torch.int64)


class NormaliseGradient(torch.autograd.Function):
    """Identity; its gradient g is divided by the root of `square` <- 0.9 square + 0.1 |g|^2 numel, in place.

    Then the rms of g is 1 / numel, whatever D's scale (arXiv:2511.22475, Eq. 23, with the root of the
    official code). `square`: a scalar, 0 at first; |g|^2 is averaged over processes."""

    @staticmethod
    def forward(ctx, x, square):
        ctx.square = square
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        now = g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() * g.numel()
        if dist.is_initialized():
            dist.all_reduce(now)
            now /= dist.get_world_size()
        ctx.square.mul_(0.9).add_(now, alpha=0.1)
        return g / (ctx.square.sqrt() + 1e-8), None


def ot_weight(draws, cfg) -> float:
    """Weight of the transport cost, from `ot` to `ot_end` by half a cosine over the run."""
    return cfg.ot_end + (cfg.ot - cfg.ot_end) * 0.5 * (1 + math.cos(math.pi * progress(draws, cfg)))


def times_of(nfe: int) -> int:
    """Time inputs of a generator of jumps: none for one, the start for equal ones, or both."""
    return {0: 2, 1: 0}.get(nfe, 1)


def slow_rates(given: dict) -> dict:
    """Learning rates for several jumps, found on glyphs (extras/README.md)."""
    nfe = str(given.get("nfe", 1))
    return dict(lr=6e-5 / (int(nfe) or 10), d_lr=1e-3) if nfe.isdigit() and nfe != "1" else {}


def afm_discriminator(cfg, G) -> nn.Module:
    norm = "layer" if G.config["norm"] == "rms" else G.config["norm"]
    return model.discriminator(G.config, times=min(1, times_of(cfg.nfe)), norm=norm)


ADVERSARIAL = dict(d_lr=option(2e-3, "learning rate of the discriminator; 0: the same"),
                   d_init=option("", "start the discriminator from that of this run or official file"),
                   cp=option(0.01, "weight of the penalty that centres D's values"),
                   ot=option(0.05, "weight of the transport cost at the first step"),
                   ot_end=option(0.002, "the same at the last step, half a cosine later"))
AFM = dict(nfe=option(1, "jumps from noise to data; 0: any number"),
           gp=option(0.02, "weight of the gradient penalties R1 and R2")) | ADVERSARIAL
GAME_ON_POINTS = dict(batch=256, lr=1e-3, d_lr=1e-3, betas=(0.0, 0.9), decay=False)

register("afm", afm_G, afm_D, turn=lambda step, cfg: "DG"[step % 2], flags=AFM,
         alarm=lambda row, first: game_alarm(row, first, indifferent=math.log(2), won=0.05),
         defaults=dict(steps=2400, lr=6e-5, decay="constant", beta1=0.0, beta2=0.9, weight_decay=0.01,
                       clip=0.0, ema=0.99, label_drop=0.0),
         scratch={}, variant=slow_rates, check=lambda cfg: check_afm(cfg), discriminator=afm_discriminator,
         network=lambda cfg, source: dict(times=times_of(cfg.nfe)),
         sampling=lambda cfg: flow_map(cfg) | (dict(steps=cfg.nfe) if cfg.nfe else {}),
         points=GAME_ON_POINTS | dict(steps=1500, ema=0.99, gp=0.05, ot=0.2, ot_end=0.05))


def cafm_D(D, x, y, draws, cfg, G):
    """CAFM's discriminator: E (J(v) - 1)^2 + E (J(u) + 1)^2 + cp E D^2   (arXiv:2604.11521, official code)

    with J(w) = <grad_x D, w> + dD/dt, for the velocities v of the data and u of the generator. J is linear
    in w, so it learns E[v | x_t] from the random v. cp fixes D's constant."""
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    v = velocity_target(G, x, e, x_t, t)
    with torch.no_grad():
        u = G(x_t, t, y)

    value, gradient, slope = model.input_gradient(D, x_t, t, y)
    real, fake = model.along(gradient, slope, v), model.along(gradient, slope, u)
    loss = (real - 1).square().mean() + (fake + 1).square().mean() + cfg.cp * value.square().mean()
    return loss, {"slope_real": real.mean(), "slope_fake": fake.mean(), "value": value.mean()}


def cafm_G(G, x, y, draws, cfg, D):
    """CAFM's generator: E (J(u) - 1)^2 + ot E |u|^2   (arXiv:2604.11521, official code)

    with |.|^2 a mean over pixels and D's derivatives detached: the gradient by u is 2 (J(u) - 1) grad_x D."""
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    u = G(x_t, t, y)

    _, gradient, slope = model.input_gradient(D, x_t, t, y, create_graph=False)
    fake, energy = model.along(gradient, slope, u), u.square().mean()
    loss = (fake - 1).square().mean() + ot_weight(draws, cfg) * energy
    return loss, {"slope_fake": fake.mean(), "energy": energy}


def cafm_turn(step: int, cfg) -> str:
    """D alone for d_warmup steps, then d_steps of D for one of G."""
    return "D" if step <= cfg.d_warmup or step % (cfg.d_steps + 1) < cfg.d_steps else "G"


def cafm_discriminator(cfg, G) -> nn.Module:
    return model.discriminator(G.config, norm=G.config["norm"].replace("layer", "rms"))


CAFM = dict(d_warmup=option(600, "steps of the discriminator alone before the generator's first"),
            d_steps=option(8, "steps of the discriminator for one of the generator")) | ADVERSARIAL
CAFM |= {name: option(value, ADVERSARIAL[name].metadata["help"])
         for name, value in (("d_lr", 5e-4), ("cp", 0.001), ("ot", 0.0), ("ot_end", 0.0))}

register("cafm", cafm_G, cafm_D, turn=cafm_turn, flags=CAFM,
         alarm=lambda row, first: game_alarm(row, first, indifferent=2.0, won=0.2),
         defaults=dict(steps=6000, lr=3e-5, beta1=0.0, beta2=0.95, ema=0.99, time_mean=-0.2, time_std=1.0),
         scratch=dict(lr=5e-4), discriminator=cafm_discriminator,
         points=GAME_ON_POINTS | dict(steps=2400, ema=0.95, d_warmup=0, d_steps=4))


# ---- 5. Guards: alarms, and settings that are refused ----


def game_alarm(row: dict, first: dict, indifferent: float, won: float) -> str:
    """What goes wrong in a game: D has the loss of one that tells nothing apart, or less than `won`."""
    if row["role"] != "D" or row["step"] == first["step"]:
        return ""
    if row["loss"] < won:
        return ("the discriminator wins: look at the samples, start from a flow (--init), or try a lower "
                "--d_lr or fewer of its steps")
    if abs(row["loss"] - indifferent) < 0.01 and row.get("r1", 0.0) < 1e-3:
        return ("the discriminator is dead, it tells nothing apart: try a higher --d_lr, a lower --lr or "
                "times at which there is more to see")
    return ""


def growth_alarm(row: dict, first: dict, column: str) -> str:
    """What goes wrong where targets are the network's own: a column grows."""
    if row[column] < 2 * first[column]:
        return ""
    return (f"{column} has doubled, the targets run away: try a lower --lr, a start from a flow (--init), "
            "and the --data_std of your data")


def check_jumps(cfg) -> None:
    if not 0 <= cfg.label_drop <= 1 - cfg.jumps <= 1:
        raise ValueError(f"--jumps {cfg.jumps} --label_drop {cfg.label_drop}: jumps keep their labels: "
                         "expected 0 <= label_drop <= 1 - jumps <= 1")


def check_afm(cfg) -> None:
    if cfg.accumulation > 1:
        raise ValueError(f"--accumulation {cfg.accumulation}: {cfg.loss} normalises the gradient of a batch: "
                         "use --accumulation 1, a smaller --batch or more processes")


def main(argv: list[str] | None = None) -> None:
    data.extra("mixture", "python losses.py").main(argv)


if __name__ == "__main__":
    data.run_cli(main)
