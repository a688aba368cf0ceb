"""Sampling: guidance, time grids, solvers, and the command that turns a checkpoint into pictures.

The flow is integrated from noise at t = 1 to data at t = 0. Sample number i depends on (seed, i) only: its noise, its
label and, for the SDE, the noise of every step, so batches and GPUs can be split in any way.

    python sample.py runs/glyphs                               a grid of 64 samples and their labels, samples.png
    python sample.py runs/glyphs --n 50000 --out samples.npz   ADM's layout: arr_0 uint8 NHWC shuffled, arr_1 labels
    python sample.py runs/glyphs --n 1000 --out folder         PNG files
    python sample.py runs/cat --n 20 --stages                  the stages of each sample of a cat run, side by side
    torchrun --nproc_per_node=2 sample.py ...                  the same images from two processes
"""
import dataclasses
import functools
import math
import os
import typing
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import losses
import model
from data import option

# --------------------------------------------------------------------------------------------------------------------
# 1. Guidance and time grids
# --------------------------------------------------------------------------------------------------------------------


def guided(net, guidance: float = 1.0, interval: tuple[float, float] = (0.0, 1.0), reference=None,
           channels: int = 0) -> typing.Callable:
    """The velocity field (x (B, ...), t float, y (B,), r float) -> v with guidance s inside the interval, plain outside:

        v = v_ref + s (v_net - v_ref)   for low <= t <= high

    With r, a network that knows about jumps gives the average velocity of the one from t to r.

    Without `reference`, v_ref is the same network under the null label: classifier-free guidance (arXiv:2207.12598, in
    the form where s = 1 is no guidance) in an interval (arXiv:2404.07724). With `reference`, a smaller or less trained
    network, v_ref is its velocity under the same label: autoguidance (arXiv:2406.02507). A network that is told the
    scale (iMF) gives the guided velocity in one call. channels: how many are guided, the first ones; 0 is all. (DiT's and
    SiT's own code guides 3 of their 4, and so do their published figures.)
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval {interval}: expected 0 <= low <= high <= 1, where 1 is noise")
    if channels and len(getattr(net, "state", "CHW")) == 1:
        raise ValueError(f"channels {channels}: this network moves a token with the image, and both are guided: leave it at 0")
    told = getattr(net, "guided", False)
    if told and (guidance < 1 or reference is not None):
        raise ValueError(f"guidance {guidance:g}: this network is told a guidance scale of at least 1, and takes no reference")
    if guidance != 1 and reference is None and not net.null_class:
        raise ValueError(f"guidance {guidance} needs the null label, and this network was made without one: "
                         f"use guidance 1, or a reference network")

    def velocity(x: Tensor, t: float, y: Tensor, r: float | None = None) -> Tensor:
        start, end = (x.new_full((len(x),), time) for time in (t, t if r is None else r))
        if guidance == 1 or not low <= t <= high:
            return net(x, start, y, end)
        if told:
            return net(x, start, y, end, torch.full_like(start, guidance))
        if reference is not None:
            v, v_ref = net(x, start, y, end), reference(x, start, y, end)
        else:  # both in one call: faster than two
            null = torch.full_like(y, net.num_classes)
            v, v_ref = net(*(torch.cat(pair) for pair in ((x, x), (start, start), (y, null), (end, end)))).chunk(2)
        v_guided = v_ref + guidance * (v - v_ref)
        return torch.cat([v_guided[:, :channels], v[:, channels:]], 1) if channels else v_guided

    return velocity


def time_grid(steps: int, shift: float = 1.0, rho: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0: u = (1 - k/steps)^rho, then t = shift u / (1 + (shift - 1) u).

    rho > 1 takes small steps near the data, shift > 1 near the noise (SD3, arXiv:2403.03206, Eq. 23).
    """
    if steps < 1 or shift <= 0 or rho <= 0:
        raise ValueError(f"time grid of {steps} steps, shift {shift}, rho {rho}: all must be positive")
    u = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** rho
    return (shift * u / (1 + (shift - 1) * u)).tolist()


# --------------------------------------------------------------------------------------------------------------------
# 2. Solvers: (velocity, x at times[0], y, times, draws) -> x at times[-1]
# --------------------------------------------------------------------------------------------------------------------


def euler(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """First order, one evaluation a step; with a network that knows about jumps, a chain of them (AFM, flow maps)."""
    for t, r in zip(times, times[1:]):
        x = x + (r - t) * velocity(x, t, y, r)
    return x


def heun(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """Second order, two evaluations a step; the last step is Euler's (EDM, arXiv:2206.00364, Algorithm 1)."""
    for t, r in zip(times, times[1:]):
        v = velocity(x, t, y)
        ahead = x + (r - t) * v
        x = ahead if r == times[-1] else x + (r - t) * (v + velocity(ahead, r, y)) / 2
    return x


def ab2(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """Adams-Bashforth: second order with one evaluation a step, by extrapolating the last two velocities."""
    last_v = last_h = None
    for t, r in zip(times, times[1:]):
        v, h = velocity(x, t, y), r - t
        slope = v if last_v is None else v + h / (2 * last_h) * (v - last_v)
        x, last_v, last_h = x + h * slope, v, h
    return x


def sde(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws: data.Draws) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = t (SiT's default `sigma`): from t to t - h,

        x <- x - h (v - w s) + sqrt(2 w h) n,   score s = -(x + (1 - t) v) / t,

    and the last step, from t = 0.04, without its noise (SiT, arXiv:2401.08740, Sec. 2; in the paper's symbols
    w_t = 2 w). All steps but the last are laid over [0.04, 1], in the form of the grid `times`.
    """
    last, n = 0.04, len(times) - 1
    where = np.linspace(0, n, n)  # n - 1 steps where the grid has n
    times = [*(last + (1 - last) * np.interp(where, range(n + 1), times)).tolist(), 0.0]
    for k, (t, r) in enumerate(zip(times, times[1:])):
        h = t - r
        v = velocity(x, t, y)
        w_score = -(x + (1 - t) * v)                                                             # w s with w = t
        x = x - h * (v - w_score)
        if r > 0:
            x = x + (2 * t * h) ** 0.5 * draws.normal(f"sde {k}", x.shape[1:]).to(x)
    return x


def renoise(velocity: typing.Callable, x: Tensor, y: Tensor, times: list[float], draws: data.Draws) -> Tensor:
    """Each step jumps to the data, and back to its end with new noise n: x <- (1 - r) x_0 + r n, x_0 = x - t u(x, t, 0).

    (Consistency models, arXiv:2303.01469, Algorithm 1.) For networks that know the way to the data from every t.
    """
    for k, (t, r) in enumerate(zip(times, times[1:])):
        x = x - t * velocity(x, t, y, 0.0)
        if r > 0:
            x = (1 - r) * x + r * draws.normal(f"renoise {k}", x.shape[1:]).to(x)
    return x


FLOW_SOLVERS = {"euler": euler, "heun": heun, "ab2": ab2, "sde": sde}
SOLVERS = FLOW_SOLVERS | {"renoise": renoise}


@torch.no_grad()
def sample(net, e: Tensor, y: Tensor, steps: int, solver: str = "euler", guidance: float = 1.0,
           interval: tuple[float, float] = (0.0, 1.0), reference=None, shift: float = 1.0, rho: float = 1.0,
           channels: int = 0, draws: data.Draws | None = None) -> Tensor:
    """Samples (B, C, h, w) from noise e of that shape, float32 or wider, and labels y (B,).

    net: velocity network. See `guided`, `time_grid` and SOLVERS for the options; `draws` is needed by `sde` and `renoise`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    if getattr(net, "times", 1) == 0 and (steps > 1 or guidance != 1):
        raise ValueError(f"steps {steps}, guidance {guidance:g}: this network knows no time, it jumps from noise to data: use "
                         f"--steps 1 --solver euler --guidance 1")
    state = e.to(torch.promote_types(e.dtype, torch.float32))
    return SOLVERS[solver](guided(net, guidance, interval, reference, channels), state, y, time_grid(steps, shift, rho), draws)


# --------------------------------------------------------------------------------------------------------------------
# 3. More from a trained network: two of them in turn, search for noise and for times, classification
# --------------------------------------------------------------------------------------------------------------------


class Stitched(nn.Module):
    """T-Stitch (arXiv:2402.14167): the small network for the first `share` of the way from noise, then the large one.

    Networks trained on the same data agree at much noise, so up to a share of 0.4 or so costs nothing but is cheaper.
    """

    def __init__(self, large: nn.Module, small: nn.Module, share: float):
        super().__init__()
        if small.state != large.state or small.num_classes != large.num_classes or not 0 <= share <= 1:
            raise ValueError(f"--stitch: networks of {small.state} with {small.num_classes} classes and of {large.state} with "
                             f"{large.num_classes}, share {share}: expected the same data, and a share in [0, 1]")
        self.large, self.small, self.share = large, small, share
        self.shape, self.state, self.num_classes = large.shape, large.state, large.num_classes
        self.null_class, self.guided = large.null_class and small.null_class, False

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        net = self.small if t[0] > 1 - self.share else self.large  # a solver's times are the same for all samples
        return net(x_t, t, y, r)


@torch.no_grad()
def best_of(n: int, make: typing.Callable, verifier: typing.Callable, y: Tensor, draws: data.Draws, shape: tuple) -> Tensor:
    """Random search (arXiv:2501.09732): of n noises for each sample, that (B, ...) whose result the verifier likes best.

    make (e, y) -> x; verifier (x, y) -> scores (B,). It costs n times the network evaluations, and a verifier searched
    hard enough gets what it likes rather than good samples: look at diversity too.
    """
    best, found = None, None
    for k in range(n):
        e = draws.normal("sample noise" if k == 0 else f"search {k}", shape)
        score = verifier(make(e, y), y)
        better = score > best if k else torch.ones_like(score, dtype=torch.bool)
        found = torch.where(better.view(-1, *[1] * len(shape)), e, found) if k else e
        best = torch.where(better, score, best) if k else score
    return found


@torch.no_grad()
def search_nearby(rounds: int, reach: float, e: Tensor, make: typing.Callable, verifier: typing.Callable, y: Tensor,
                  draws: data.Draws) -> Tensor:
    """Zero-order search (arXiv:2501.09732): from e to sqrt(1 - reach^2) e + reach n, a noise as well, where that is better."""
    best = verifier(make(e, y), y)
    for k in range(rounds):
        moved = math.sqrt(1 - reach ** 2) * e + reach * draws.normal(f"nearby {k}", e.shape[1:]).to(e)
        score = verifier(make(moved, y), y)
        e = torch.where((score > best).view(-1, *[1] * (e.dim() - 1)), moved, e)
        best = torch.maximum(score, best)
    return e


@torch.no_grad()
def classify(net, x: Tensor, draws: data.Draws, classes: int, pairs: int = 64) -> Tensor:
    """Diffusion classifier (arXiv:2303.16203): minus the mean flow-matching error of x under each class, (B, classes).

    All classes see the same `pairs` of times (evenly spread) and noises, so that their differences are those of classes.
    """
    score = x.new_zeros(len(x), classes)
    for k in range(pairs):
        t, e = x.new_full((len(x),), (k + 0.5) / pairs), draws.normal(f"classify {k}", x.shape[1:]).to(x)
        x_t = losses.interpolate(x, e, t)
        for c in range(classes):
            error = net(x_t, t, torch.full((len(x),), c, device=x.device)) - (e - x)
            score[:, c] -= error.square().flatten(1).mean(1) / pairs
    return score


@torch.no_grad()
def search_times(make: typing.Callable, exact: Tensor, start: list[float], rounds: int = 30, children: int = 8,
                 seed: int = 0) -> list[float]:
    """Times for few steps (after AutoDiffusion, arXiv:2309.10438): evolution of the grid `start` towards the result `exact`.

    make (times) -> x from fixed noise. Each round moves the inner times of the best grid at random, sorts them and keeps the
    best. paper: FID is what counts, also layers are dropped; here: the distance to what many steps give.
    """
    def error(times):
        return (make(times) - exact).square().mean().item()

    best, least, rng = start, error(start), data.generator(seed, "search times")
    for k in range(rounds):
        size = 0.3 * 0.9 ** k / (len(start) - 1) ** 0.5
        for _ in range(children):
            inner = torch.tensor(best[1:-1]) + size * torch.randn(len(start) - 2, generator=rng)
            times = [best[0], *inner.clamp(1e-3, 0.999).sort(descending=True).values.tolist(), best[-1]]
            if (found := error(times)) < least:
                best, least = times, found
    return best


# --------------------------------------------------------------------------------------------------------------------
# 4. Many samples
# --------------------------------------------------------------------------------------------------------------------


def labels_for(n: int, num_classes: int, classes: list[int] | None = None) -> Tensor:
    """Label of each of n samples (n,): the classes in turn, so that every class is equally frequent."""
    classes = classes or list(range(num_classes))
    wrong = [k for k in classes if not 0 <= k < num_classes]
    if wrong:
        raise ValueError(f"class {wrong[0]}: this network knows the classes 0 .. {num_classes - 1}")
    return torch.tensor(classes)[torch.arange(n) % len(classes)]


def generate(net, labels: Tensor, seed: int, batch: int = 250, progress: str = "", codec: data.VAE | None = None,
             best: int = 1, verifier: typing.Callable | None = None, **options):
    """Yield (indices, uint8 images (b, 3, h, w)) of this process's share of the samples 0 .. len(labels) - 1.

    net: a model.DiT on its device; codec: what makes images of its latents; best, verifier: see `best_of`; `options` go to
    `sample`. Batches keep their
    composition whatever the number of processes, and noise is drawn on the CPU: the images do not depend on the machine
    beyond its arithmetic.
    """
    shape, device = net.state, next(net.parameters()).device
    image_shape(net, codec)  # or an error
    starts = range(data.rank() * batch, len(labels), data.world() * batch)
    with tqdm(total=len(labels), desc=progress, unit="img", disable=not progress or data.rank() > 0) as bar:
        for start in starts:
            indices = list(range(start, min(start + batch, len(labels))))
            draws = data.Draws(seed, indices)
            y, make = labels[indices].to(device), functools.partial(_make, net, draws, device, options)
            e = best_of(best, make, verifier, y, draws, shape) if best > 1 else draws.normal("sample noise", shape)
            x = make(e, y)
            if codec:
                with torch.no_grad():
                    x = torch.cat([codec.decode(part) for part in x.float().split(8)])  # few at a time: memory
            yield indices, data.to_uint8(x).cpu()
            bar.update(min(len(indices) * data.world(), bar.total - bar.n))


def _make(net, draws: data.Draws, device, options: dict, e: Tensor, y: Tensor) -> Tensor:
    """Images or latents from noise; a token that was denoised with them (see `model.TokenDiT`) is left out."""
    x = sample(net, e.to(device), y, draws=draws, **options)
    return x.flatten(1)[:, :math.prod(net.shape)].unflatten(1, net.shape)


def image_shape(net, codec: data.VAE | None = None) -> tuple[int, int, int]:
    """(3, h, w) of the images that come of a network's output."""
    if net.shape[0] != 3 and codec is None:
        raise ValueError(f"this network makes latents of {net.shape[0]} channels: give the codec that decodes them, "
                         f"--vae sd-vae-ft-mse.safetensors")
    return (3, 8 * net.shape[1], 8 * net.shape[2]) if codec else net.shape


def describe(steps: int, solver: str, guidance: float, interval: tuple[float, float] = (0.0, 1.0),
             reference: str = "", shift: float = 1.0, rho: float = 1.0, channels: int = 0, told: bool = False,
             more: str = "") -> str:
    """How samples were made, in words, to stand beside every number computed from them. told: by a guided network."""
    calls = 2 * steps - 1 if solver == "heun" else steps
    text = f"{solver}, {steps} steps, {calls} network evaluations{more}"
    if shift != 1 or rho != 1:
        text += f", grid shift {shift:g} rho {rho:g}"
    if guidance == 1:
        return text + ", no guidance"
    kind = f"autoguidance by {reference}" if reference else "guidance"
    where = "" if interval == (0.0, 1.0) else f" on t in [{interval[0]:g}, {interval[1]:g}]"
    of = f" of the first {channels} channels" if channels else ""
    doubled = ", told to the network:" if told else " (doubled where guided),"
    return f"{text}{doubled} {kind} {guidance:g}{of}{where}"


def own_settings(path: Path) -> tuple[dict, dict]:
    """How samples of this checkpoint must be made, and how they usually are; both are {} where that is free.

    A method of jumps has its own solver, and its run's number of steps.
    """
    settings = model.read_checkpoint(path).get("config", {})
    method = losses.LOSSES.get(settings.get("loss")) if isinstance(settings, dict) else None
    own = method.sampling(settings) if method else {}
    return own, dict(steps=settings["sample_steps"]) | own if own else {}


def find_checkpoint(path: str) -> Path:
    """A checkpoint file from its own path or from a run folder; FileNotFoundError when neither is there."""
    found = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not found.exists():
        raise FileNotFoundError(f"{found}: no such checkpoint; expected a run folder with last.pt, or a .pt file")
    return found


@dataclasses.dataclass
class Config:
    checkpoint: str = option("", "a run folder, or a checkpoint: ours, or an official DiT or SiT file")
    n: int = option(64, "number of samples")
    steps: int = option(50, "solver steps; a run of jumps has its own default")
    solver: str = option("ab2", "how the flow is integrated", tuple(FLOW_SOLVERS))
    guidance: float = option(1.5, "guidance scale; 1 is none")
    guidance_low: float = option(0.0, "guide only where t is at least this (0 is data)")
    guidance_high: float = option(1.0, "guide only where t is at most this (1 is noise)")
    reference: str = option("", "autoguidance: the checkpoint of a weaker network, instead of the null label")
    shift: float = option(1.0, "time grid: larger takes smaller steps near the noise")
    rho: float = option(1.0, "time grid: larger takes smaller steps near the data")
    classes: str = option("", "labels to sample, such as 3 or 1,5,7; all in turn when empty")
    seed: int = option(0, "sample i depends on (seed, i) only")
    batch: int = option(250, "samples at a time on each process")
    stages: bool = option(False, "cat: show all stages of each sample, in a row from first to last")
    vae: str = option("", "the codec's file, for networks of latents: sd-vae-ft-mse.safetensors")
    guide_channels: int = option(0, "guide only the first so many channels; 0: all (official DiT and SiT figures: 3)")
    stitch: str = option("", "a smaller network that takes the first part of the way, where there is much noise")
    stitch_share: float = option(0.4, "how much of the way it takes")
    best_of: int = option(1, "noises tried for each sample; the result that --verifier likes best stays")
    verifier: str = option("", "a run of train.py --loss classifier")
    ema: int = option(1, "1: averaged weights; 2: the second average of JiT's files (decay 0.9996); 0: the last weights", (0, 1, 2))
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    out: str = option("samples.png", "a .png grid, an ADM-layout .npz, or a folder for PNG files")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("checkpoint",))
    if cfg == Config():
        return print(__doc__.strip())
    if not cfg.checkpoint:
        raise ValueError("which checkpoint? python sample.py runs/glyphs (python sample.py --help lists the options)")
    if cfg.n < 1 or cfg.batch < 1:
        raise ValueError(f"--n {cfg.n} --batch {cfg.batch}: expected at least 1")
    if cfg.out.endswith(".png") and cfg.n > 10_000:
        raise ValueError(f"--out {cfg.out}: a grid of {cfg.n:,} samples is too large to look at; use .npz or a folder")
    own, usual = own_settings(find_checkpoint(cfg.checkpoint))
    cfg = data.parse(Config, argv, __doc__, ("checkpoint",), **usual)
    for name, value in own.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"--{name} {getattr(cfg, name)}: {cfg.checkpoint} was trained to jump to the data in its own way; "
                             f"leave --{name} out (it is {value})")
    if cfg.reference and cfg.guidance == 1:
        raise ValueError(f"--reference {cfg.reference}: guidance 1 is none; give --guidance above 1, where this run has a choice")
    device = data.start_processes(cfg.device)
    net = model.load(find_checkpoint(cfg.checkpoint), ema=cfg.ema).to(device).eval()
    if isinstance(net, model.Classifier):
        raise ValueError(f"{cfg.checkpoint}: a classifier, which makes no images; give it to train.py --loss afm --classifier")
    reference = model.load(find_checkpoint(cfg.reference), ema=min(1, cfg.ema)).to(device).eval() if cfg.reference else None
    try:
        classes = [int(k) for k in cfg.classes.split(",")] if cfg.classes else None
    except ValueError:
        raise ValueError(f"--classes {cfg.classes}: expected whole numbers such as 1,5,7") from None
    labels = labels_for(cfg.n, net.num_classes, classes)
    if cfg.stages:
        return write_stages(net, labels, cfg)
    options = dict(steps=cfg.steps, solver=cfg.solver, guidance=cfg.guidance, shift=cfg.shift, rho=cfg.rho,
                   interval=(cfg.guidance_low, cfg.guidance_high), channels=cfg.guide_channels)
    codec = data.load_vae(cfg.vae).to(device) if cfg.vae else None
    more = ""
    if cfg.stitch:
        small = model.load(find_checkpoint(cfg.stitch), ema=min(1, cfg.ema)).to(device).eval()
        net, more = Stitched(net, small, cfg.stitch_share), f", those at t > {1 - cfg.stitch_share:g} of {cfg.stitch}"
    verifier = load_verifier(cfg, net, device)
    more += f", best of {cfg.best_of} noises by {cfg.verifier}" if verifier else ""
    made = generate(net, labels, cfg.seed, cfg.batch, "sampling", codec, cfg.best_of, verifier, reference=reference, **options)
    write_samples(made, labels, image_shape(net, codec), Path(cfg.out))
    if data.rank() == 0:
        how = describe(reference=cfg.reference, told=net.guided, more=more, **options)
        print(f"wrote {cfg.out}: {cfg.n:,} samples, {how}, "
              f"{('last', 'EMA', 'second EMA')[cfg.ema]} weights, seed {cfg.seed}")
    data.stop_processes()


def load_verifier(cfg: Config, net, device: torch.device) -> typing.Callable | None:
    """log p(y | x) of a classifier, at t = 0; None where nothing is searched."""
    if cfg.best_of == 1 and not cfg.verifier:
        return None
    if cfg.best_of < 2 or not cfg.verifier:
        raise ValueError(f"--best_of {cfg.best_of} --verifier {cfg.verifier or '(none)'}: a search needs both, at least two "
                         f"noises and a run of train.py --loss classifier")
    C = model.load(find_checkpoint(cfg.verifier), ema=min(1, cfg.ema)).to(device).eval()
    if not isinstance(C, model.Classifier) or (C.shape, C.num_classes) != (net.shape, net.num_classes):
        raise ValueError(f"--verifier {cfg.verifier}: expected a run of train.py --loss classifier on the same data")
    return lambda x, y: -F.cross_entropy(C(x, x.new_zeros(len(x))), y, reduction="none")


@torch.no_grad()
def write_stages(net, labels: Tensor, cfg: Config) -> None:
    """A picture of all stages h_1 .. h_K of a StagedDiT: a row for each of the samples that `generate` makes."""
    if not isinstance(net, model.StagedDiT) or not cfg.out.endswith(".png"):
        raise ValueError(f"--stages: makes a .png of a run of --loss cat; {cfg.checkpoint} is a {type(net).__name__}, "
                         f"and --out is {cfg.out}")
    e = data.Draws(cfg.seed, range(len(labels))).normal("sample noise", net.shape).to(net.pos_embed.device)
    h = net.stages(e, labels.to(e.device)).transpose(0, 1)                                       # (n, K, C, h, w)
    captions = [f"{label}: {k}" for label in labels.tolist() for k in range(1, h.shape[1] + 1)]
    data.grid(data.to_uint8(h.flatten(0, 1)).cpu(), h.shape[1], captions).save(cfg.out)
    print(f"wrote {cfg.out}: {len(h)} samples, their {h.shape[1]} stages from left to right, seed {cfg.seed}")


def write_samples(generated, labels: Tensor, shape: tuple, out: Path, columns: int | None = None) -> None:
    """Write (indices, uint8 images) batches of all processes to a .png grid, a shuffled .npz or a folder of PNGs.

    Processes of one machine meet in a memory-mapped file, so 50,000 images need no 50,000 images of memory.
    """
    if out.suffix not in (".png", ".npz"):
        return write_folder(generated, labels, out)
    n = len(labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    # ADM's evaluator takes the Inception Score over chunks of a file: sorted by class they would score far too low.
    place = torch.randperm(n, generator=data.generator("npz order")) if out.suffix == ".npz" else torch.arange(n)
    scratch = out.with_name(out.name + ".tmp.npy")
    if data.rank() == 0:
        np.lib.format.open_memmap(scratch, "w+", np.uint8, (n, *shape[1:], shape[0])).flush()
    data.barrier()
    try:
        rows = np.load(scratch, mmap_mode="r+")
        for indices, images in generated:
            rows[place[indices].numpy()] = images.permute(0, 2, 3, 1).numpy()
        rows.flush()
        data.barrier()
        if data.rank() == 0 and out.suffix == ".npz":
            np.savez(out, arr_0=rows, arr_1=labels[torch.argsort(place)].numpy())
        elif data.rank() == 0:
            captions = [str(label) for label in labels.tolist()]
            data.grid(torch.from_numpy(np.array(rows)).permute(0, 3, 1, 2), columns, captions).save(out)
    finally:
        if data.rank() == 0:
            os.remove(scratch)


def write_folder(generated, labels: Tensor, out: Path) -> None:
    """Write (indices, uint8 images) batches as PNG files named by index and class; refuses a folder with other PNGs."""
    if any(out.glob("*.png")):
        raise ValueError(f"--out {out}: this folder holds pictures already; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    data.barrier()
    digits = len(str(len(labels) - 1))
    for indices, images in generated:
        for i, image in zip(indices, images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(out / f"{i:0{digits}d}_class{int(labels[i])}.png")
    data.barrier()


if __name__ == "__main__":
    data.run_cli(main)
