"""Training objectives, side by side.

    name  the network predicts  regression target  extra network calls  JVP  paper                         test
    fm    velocity v(x_t, t)    e - x              none                 no   arXiv:2210.02747, Eq. 23;     test_losses_fm_*
                                                                             SiT arXiv:2401.08740, Sec. 2

Time runs from data (t = 0) to noise (t = 1): x_t = (1 - t) x + t e with e ~ N(0, I), and v = dx_t/dt = e - x.

Every objective has the signature

    objective(net, x, y, draws, cfg) -> (loss, logs)

    net    velocity network (x_t, t, y) -> v, with `predict`, `t_min`, `num_classes` and `null_class` as in model.DiT
    x, y   clean images (B, C, h, w) float in [-1, 1] (or latents), and labels (B,) int64
    draws  data.Draws of this micro-batch: all randomness comes from here
    cfg    train.Config (time, time_mean, time_std, label_drop)
    loss   scalar float32 tensor;  logs: dict of scalar tensors worth a column of log.jsonl

and the same four paragraphs: times, point, target, distance. Reading two neighbours shows what differs between papers.

Run alone, `python losses.py` trains each objective on a 1-D mixture whose velocity and flow map are known in closed
form: it prints the errors and draws the learned trajectories over the density in losses.png.
"""
import dataclasses
import math
import typing

import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import model
from data import option

# --------------------------------------------------------------------------------------------------------------------
# 1. Shared pieces
# --------------------------------------------------------------------------------------------------------------------


def sample_times(draws: data.Draws, cfg) -> Tensor:
    """Training times (B,) float32: uniform on [0, 1), or logit-normal, sigmoid(time_mean + time_std n), n ~ N(0, 1).

    (SD3, arXiv:2403.03206, Eq. 19.) A larger time_mean looks more at noise. JiT's P_mean = -0.8 is +0.8 here, as its
    time runs from noise to data.
    """
    u = draws.uniform("time")
    if cfg.time == "uniform":
        return u
    n = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)
    return torch.sigmoid(cfg.time_mean + cfg.time_std * n)


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e, for t (B,)."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (1 - t) * x + t * e


def velocity_target(net, x: Tensor, e: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = e - x; for a network that predicts x the same v written with its clamp, v = (x_t - x) / max(t, t_min).

    So a perfect prediction of x has no loss at any t, and the loss is |x - x_net|^2 / max(t, t_min)^2 (JiT).
    """
    return model.clean_velocity(x, x_t, t, net.t_min) if net.predict == "x" else e - x


def drop_labels(net, y: Tensor, draws: data.Draws, cfg) -> Tensor:
    """Each label becomes the null class with probability label_drop: what classifier-free guidance needs (2207.12598)."""
    if not net.null_class:
        return y
    return torch.where(draws.uniform("label drop") < cfg.label_drop, net.num_classes, y)


# --------------------------------------------------------------------------------------------------------------------
# 2. The objectives
# --------------------------------------------------------------------------------------------------------------------


def fm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Flow matching: E |v_net(x_t, t, y) - (e - x)|^2   (arXiv:2210.02747, Eq. 23; SiT arXiv:2401.08740, Sec. 2).

    paper: time runs from noise to data, with least noise sigma_min; here: from data to noise, with sigma_min = 0.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    v = velocity_target(net, x, e, x_t, t)

    loss = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    return loss, {}


class Objective(typing.NamedTuple):
    """Who takes a step when, and on what loss: role turns[step % len(turns)] takes step number `step`."""
    turns: str
    G: typing.Callable


LOSSES = {
    "fm": Objective(turns="G", G=fm),
}


# --------------------------------------------------------------------------------------------------------------------
# 3. A world where everything is known: the Gaussian mixture
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Mixture:
    """Data sum_k w_k N(m_k, s_k^2 I): its noised marginals, velocity, score and (in 1-D) flow map in closed form.

    means (K, D), stds (K,), weights (K,). Points x_t are (B, D), times t (B,). Work in float64 for tests.
    """
    means: Tensor
    stds: Tensor
    weights: Tensor

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, D) and the component (n,) each came from."""
        k = torch.multinomial(self.weights, n, True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise, k

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component given x_t: its probability (B, K), the offset x_t - (1-t) m_k (B, K, D), the variance (B, K)."""
        t = t[:, None]
        variance = ((1 - t) * self.stds) ** 2 + t ** 2                                              # (B, K)
        offset = x_t[:, None] - (1 - t)[..., None] * self.means                                     # (B, K, D)
        log_p = self.weights.log() - offset.square().sum(-1) / (2 * variance) - 0.5 * x_t.shape[1] * variance.log()
        return log_p.softmax(-1), offset, variance

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """E[e - x | x_t], the minimiser of flow matching; of component y alone where labels y (B,) are given.

        Within component k: E[e - x | x_t, k] = (t - (1-t) s_k^2) / ((1-t)^2 s_k^2 + t^2) (x_t - (1-t) m_k) - m_k.
        """
        p, offset, variance = self.posterior(x_t, t)
        if y is not None:
            p = nn.functional.one_hot(y, len(self.weights)).to(p)
        slope = (t[:, None] - (1 - t)[:, None] * self.stds ** 2) / variance
        return (p[..., None] * (slope[..., None] * offset - self.means)).sum(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = -E[e | x_t] / t."""
        p, offset, variance = self.posterior(x_t, t)
        return -((p / variance)[..., None] * offset).sum(1)

    def cdf(self, x_t: Tensor, t: Tensor) -> Tensor:
        """F_t(x_t) of 1-D data: (B, 1) -> (B, 1)."""
        _, offset, variance = self.posterior(x_t, t)
        return (self.weights * torch.special.ndtr(offset[..., 0] / variance.sqrt())).sum(1, keepdim=True)

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The exact flow map of 1-D data from time t to r: the monotone map, F_r(x_r) = F_t(x_t), by bisection."""
        target = self.cdf(x_t, t)
        reach = self.means.abs().max() + 10 * (1 + self.stds.max())
        low, high = torch.full_like(x_t, -reach), torch.full_like(x_t, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, r) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


FOUR_MODES = Mixture(torch.tensor([[-1.5], [-0.5], [0.4], [1.6]]), torch.tensor([0.12, 0.2, 0.1, 0.25]),
                     torch.tensor([0.2, 0.3, 0.15, 0.35]))


class PointNet(nn.Module):
    """A small velocity network for points (B, D), with the attributes that objectives ask of a network.

    Coordinates and time enter as sines and cosines of several frequencies, so that narrow modes can be told apart.
    """
    predict, t_min, num_classes, null_class = "v", 0.0, 1, False

    def __init__(self, dimension: int = 1, width: int = 128):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.5, 8, 16))
        self.layers = nn.Sequential(nn.Linear((dimension + 1) * 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dimension))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        angle = (torch.cat([x_t, t[:, None]], 1)[..., None] * self.frequencies).flatten(1)       # (B, (D + 1) 16)
        return self.layers(torch.cat([angle.sin(), angle.cos()], 1))


# --------------------------------------------------------------------------------------------------------------------
# 4. Run alone: every objective against the closed form
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    steps: int = option(2000, "training steps of each objective")
    batch: int = option(512, "batch size")
    lr: float = option(2e-3, "AdamW learning rate, decayed linearly to 0")
    time: str = option("uniform", "distribution of the training time", ("uniform", "logit_normal"))
    time_mean: float = option(0.0, "logit-normal: mean of logit(t)")
    time_std: float = option(1.0, "logit-normal: standard deviation of logit(t)")
    seed: int = option(0, "seed of weights, data and noise")
    out: str = option("losses.png", "the picture to write")
    label_drop: typing.ClassVar[float] = 0.0


def train_points(name: str, mixture: Mixture, cfg: Config) -> PointNet:
    """Train a PointNet with one objective on draws of the mixture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        net = PointNet(mixture.means.shape[1])
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=0)
    bar = tqdm(range(cfg.steps), desc=name)
    for step in bar:
        opt.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        x, y = mixture.sample(cfg.batch, data.generator(cfg.seed, "points", step))
        loss, _ = LOSSES[name].G(net, x, y, BatchDraws(cfg.seed, step, cfg.batch), cfg)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval()


class BatchDraws:
    """The interface of data.Draws with one generator a batch: fast, where batches are never split."""

    def __init__(self, seed: int, step: int, batch: int):
        self.key, self.batch = (seed, step), batch

    def normal(self, purpose: str, shape: tuple) -> Tensor:
        return torch.randn(self.batch, *shape, generator=data.generator(*self.key, purpose))

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(self.batch, generator=data.generator(*self.key, purpose))


@torch.no_grad()
def trajectory(velocity: typing.Callable, e: Tensor, steps: int) -> Tensor:
    """Euler steps from noise e (B, D) at t = 1 to data at t = 0: all states (steps + 1, B, D)."""
    states = [e]
    for k in range(steps):
        t = torch.full((len(e),), 1 - k / steps, dtype=e.dtype)
        states.append(states[-1] - velocity(states[-1], t) / steps)
    return torch.stack(states)


@torch.no_grad()
def point_errors(net: PointNet, mixture: Mixture, n: int = 4000, steps: int = 50) -> dict:
    """Errors against the closed form: rms of the velocity over (x_t, t), rms of the map from noise, and W1.

    W1 of the n samples to the exact quantiles; map error against the exact flow map of the same noises.
    """
    x, _ = mixture.sample(n, data.generator("evaluate points"))
    u = (torch.arange(n) + 0.5) / n
    e = torch.special.ndtri(u)[:, None]
    t = u[torch.randperm(n, generator=data.generator("evaluate times"))]
    x_t = interpolate(x, e[torch.randperm(n, generator=data.generator("evaluate noise"))], t)
    made = trajectory(net, e, steps)[-1]
    exact = mixture.flow(e.double(), torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))
    return {"velocity rms": (net(x_t, t) - mixture.velocity(x_t, t)).square().mean().sqrt().item(),
            "map rms": (made - exact).square().mean().sqrt().item(),
            "W1": (made.sort(0).values - exact).abs().mean().item()}


def draw_trajectories(nets: dict, mixture: Mixture, path: str, lines: int = 60) -> None:
    """One panel for the exact flow and one for each network: trajectories (white) over the density of x_t (blue)."""
    w, h, reach, top = 420, 300, 3.0, 22
    t = torch.linspace(1, 0, w)
    x = torch.linspace(reach, -reach, h)
    density = torch.stack([_density(mixture, x, s) for s in t], 1)
    shade = (density / density.amax(0)).sqrt()[..., None]
    panel = ((1 - shade) * torch.tensor([14, 17, 40]) + shade * torch.tensor([64, 132, 214])).to(torch.uint8).numpy()
    sheet = Image.new("RGB", ((w + 8) * (1 + len(nets)) + 8, h + top + 26), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    e = torch.special.ndtri((torch.arange(lines) + 0.5) / lines)[:, None]
    for k, (name, velocity) in enumerate({"exact flow": mixture.velocity, **nets}.items()):
        left = 8 + k * (w + 8)
        sheet.paste(Image.fromarray(panel), (left, top))
        pen.text((left, 4), name, fill="black", font=font)
        pen.text((left, top + h + 4), "t = 1 noise", fill="black", font=font)
        pen.text((left + w - 62, top + h + 4), "t = 0 data", fill="black", font=font)
        states = trajectory(velocity, e, 100)[..., 0]
        for line in states.T:
            points = [(left + s * w / 100, top + (reach - float(v)) / (2 * reach) * h) for s, v in enumerate(line)]
            pen.line(points, fill="white", width=1)
    sheet.save(path)


def _density(mixture: Mixture, x: Tensor, t: Tensor) -> Tensor:
    std = (((1 - t) * mixture.stds) ** 2 + t ** 2).sqrt()
    z = (x[:, None] - (1 - t) * mixture.means[:, 0]) / std
    return (mixture.weights * torch.exp(-z ** 2 / 2) / std).sum(1)


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Train every objective on a 1-D mixture and compare with the closed form.")
    nets = {name: train_points(name, FOUR_MODES, cfg) for name in LOSSES}
    print(f"\n1-D mixture of four modes, {cfg.steps} steps of batch {cfg.batch}, samples by 50 Euler steps")
    print(f"{'objective':>12} {'velocity rms':>14} {'map rms':>10} {'W1':>10}")
    floor = point_errors(type("Exact", (), {"__call__": lambda self, x, t: FOUR_MODES.velocity(x, t)})(), FOUR_MODES)
    for name, errors in {"exact v": floor, **{name: point_errors(net, FOUR_MODES) for name, net in nets.items()}}.items():
        print(f"{name:>12} {errors['velocity rms']:>14.4f} {errors['map rms']:>10.4f} {errors['W1']:>10.4f}")
    draw_trajectories(nets, FOUR_MODES, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    data.run_cli(main)
