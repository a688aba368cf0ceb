"""Sampling: guidance, time grids, solvers, and the command that turns a checkpoint into pictures.

Noise at t = 1 flows to data at t = 0. Sample i, its label and all of its noise depend on (seed, i) only, so
batches and GPUs can be split in any way.

    python sample.py runs/glyphs                              64 samples and their labels, samples.png
    python sample.py runs/glyphs --n 50000 --out samples.npz  ADM's layout: arr_0 NHWC shuffled, arr_1 labels
    python sample.py runs/glyphs --n 1000 --out folder        PNG files
    torchrun --nproc_per_node=2 -- sample.py ...              the same images from two processes
"""
import dataclasses
import math
from pathlib import Path

import data
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import model
from data import option

# ---- 1. Solvers: (velocity, x at times[0], y, times, draws) -> x at times[-1] ----


def euler(velocity, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """First order, one evaluation a step; a chain of jumps where the network gives these."""
    for t, r in zip(times, times[1:]):
        x = x + (r - t) * velocity(x, t, y, r)
    return x


def heun(velocity, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """Second order, two evaluations a step, one in the last (EDM, arXiv:2206.00364, Algorithm 1)."""
    for t, r in zip(times, times[1:]):
        v = velocity(x, t, y)
        ahead = x + (r - t) * v
        x = ahead if r == times[-1] else x + (r - t) * (v + velocity(ahead, r, y)) / 2
    return x


def ab2(velocity, x: Tensor, y: Tensor, times: list[float], draws=None) -> Tensor:
    """Adams-Bashforth: second order, one evaluation a step, two velocities extrapolated."""
    last_v = last_h = None
    for t, r in zip(times, times[1:]):
        v, h = velocity(x, t, y), r - t
        slope = v if last_v is None else v + h / (2 * last_h) * (v - last_v)
        x, last_v, last_h = x + h * slope, v, h
    return x


def renoise(velocity, x: Tensor, y: Tensor, times: list[float], draws: data.Draws) -> Tensor:
    """Jumps to x_0 = x - t u(x, t, 0), then to (1 - r) x_0 + r noise (arXiv:2303.01469, Alg. 1)."""
    for k, (t, r) in enumerate(zip(times, times[1:])):
        x = x - t * velocity(x, t, y, 0.0)
        if r > 0:
            x = (1 - r) * x + r * draws.normal(f"renoise {k}", x.shape[1:]).to(x)
    return x


SOLVERS = {"euler": euler, "heun": heun, "ab2": ab2, "renoise": renoise}


@torch.no_grad()
def sample(net, e: Tensor, y: Tensor, steps: int, solver: str = "euler", guidance=1.0, interval=(0.0, 1.0),
           shift=1.0, rho=1.0, draws: data.Draws | None = None) -> Tensor:
    """Samples (B, C, h, w), float32 or wider, of a network, from noise e and labels y (B,)."""
    solve = data.lookup(SOLVERS, solver, "solver")
    if getattr(net, "times", 1) == 0 and (steps > 1 or guidance != 1):
        raise ValueError(f"steps {steps}, guidance {guidance:g}: this network needs --steps 1 --guidance 1")
    e = e.to(torch.promote_types(e.dtype, torch.float32))
    end = net.t_min if getattr(net, "predict", "v") == "x" else 0.0
    return solve(guided(net, guidance, interval), e, y, time_grid(steps, shift, rho, end), draws)


def time_grid(steps: int, shift: float = 1.0, rho: float = 1.0, end: float = 0.0) -> list[float]:
    """Times from 1 to 0: shift u / (1 + (shift - 1) u), u = (1 - k/steps)^rho (arXiv:2403.03206, Eq. 23),
    the last step from `end` or above."""
    if not 1 <= steps <= 10 ** 5 or shift <= 0 or rho <= 0:
        raise ValueError(f"time grid of {steps:.0e} steps, shift {shift}, rho {rho}: all must be positive")
    u = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** rho
    times = (shift * u / (1 + (shift - 1) * u)).tolist()
    if steps > 1 and times[-2] < end:
        return [end + (1 - end) * t for t in time_grid(steps - 1, shift, rho)] + [0.0]
    return times


INTERVAL = 0.2, 0.8  # where commands guide: above costs variety, below there is little to decide


def guided(net, guidance=1.0, interval=(0.0, 1.0)):
    """The velocity (x (B, ...), t float, y (B,), r float) -> v, guided with scale s for low <= t <= high:

        v = v_ref + s (v_net - v_ref)

    v_ref: the same network under the null label (classifier-free guidance, arXiv:2207.12598; s = 1: none;
    interval: arXiv:2404.07724). A network conditioned on s gives v in one call. r: the end of a jump."""
    check_guidance(net, guidance, interval)

    def velocity(x: Tensor, t: float, y: Tensor, r: float | None = None) -> Tensor:
        start, end = (x.new_full((len(x),), time) for time in (t, t if r is None else r))
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            return net(x, start, y, end)
        if getattr(net, "guidance_conditioned", False):
            return net(x, start, y, end, torch.full_like(start, guidance))
        pairs = (x, x), (start, start), (y, torch.full_like(y, net.num_classes)), (end, end)
        v, v_ref = net(*map(torch.cat, pairs)).chunk(2)  # one call is faster than two
        return v_ref + guidance * (v - v_ref)

    return velocity


# ---- 2. Many samples ----


def labels_for(n: int, num_classes: int, classes: list[int] | None = None) -> Tensor:
    """Labels (n,) of n samples: the classes in turn."""
    classes = classes or list(range(num_classes))
    if wrong := [k for k in classes if not 0 <= k < num_classes]:
        raise ValueError(f"class {wrong[0]}: this network knows the classes 0 .. {num_classes - 1}")
    return torch.tensor(classes)[torch.arange(n) % len(classes)]


@torch.no_grad()
def generate(net, labels: Tensor, seed: int, batch=250, progress="", codec=None, noise=None, **options):
    """Yield (indices, uint8 images (b, 3, h, w)) of this process's share of the samples."""
    device = next(net.parameters()).device
    image_shape(net, codec)  # or an error
    with tqdm(total=len(labels), desc=progress, unit="img", disable=not progress or data.rank() > 0) as bar:
        for start in range(data.rank() * batch, len(labels), data.world() * batch):
            indices = list(range(start, min(start + batch, len(labels))))
            draws, y = data.Draws(seed, indices), labels[indices].to(device)  # on the CPU
            e = noise(draws, y, options) if noise else draws.normal("sample noise", net.state)
            x = sample(net, e.to(device), y, draws=draws, **options)
            x = x.flatten(1)[:, :math.prod(net.shape)].unflatten(1, net.shape)  # the image, first in a state
            yield indices, data.to_uint8(codec.decode(x) if codec else x).cpu()
            bar.update(min(len(indices) * data.world(), bar.total - bar.n))


def image_shape(net, codec=None) -> tuple[int, int, int]:
    """(3, h, w) of the images."""
    if net.shape[0] != 3 and codec is None:
        raise ValueError(f"latents of {net.shape[0]} channels: decode them by --codec latents:FILE")
    return codec.image_shape(net.shape) if codec else tuple(net.shape)


def describe(steps: int, solver: str, guidance: float, interval=(0.0, 1.0), shift=1.0, rho=1.0,
             conditioned: bool = False) -> str:
    """How samples were made; conditioned: the network takes the guidance scale."""
    text = f"{solver}, {steps} steps, {2 * steps - 1 if solver == 'heun' else steps} network evaluations"
    if shift != 1 or rho != 1:
        text += f", grid shift {shift:g} rho {rho:g}"
    if guidance == 1:
        return text + ", no guidance"
    text += f"{', conditioned on' if conditioned else ' (doubled where guided),'} guidance {guidance:g}"
    return text if interval == (0.0, 1.0) else f"{text} on t in [{interval[0]:g}, {interval[1]:g}]"


def write_samples(generated, labels: Tensor, shape: tuple, out: Path, columns: int = 0) -> None:
    """Write (indices, uint8 images) of all processes to a .png grid, a shuffled .npz or a folder."""
    kind = check_suffix(out)
    if not kind:
        return write_folder(generated, labels, out)
    n, place = len(labels), torch.arange(len(labels))
    if kind == ".npz":  # ADM's evaluator scores chunks of a file, which must not be sorted by class
        place = torch.randperm(n, generator=data.generator("npz order"))
    scratch = out.with_name(out.name + ".tmp.npy")  # on disk, where processes meet
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if data.rank() == 0:
            make = getattr(data.optional("faults"), "reserve", np.lib.format.open_memmap)
            make(scratch, mode="w+", dtype=np.uint8, shape=(n, *shape[1:], shape[0])).flush()
        data.barrier()
        rows = np.load(scratch, mmap_mode="r+")
        for indices, images in generated:
            rows[place[indices].numpy()] = images.permute(0, 2, 3, 1).numpy()
        rows.flush()
        data.barrier()
        if data.rank() == 0:
            with data.replacing(out) as aside, open(aside, "wb") as file:
                if kind == ".npz":
                    np.savez(file, arr_0=rows, arr_1=labels[torch.argsort(place)].numpy())
                else:
                    images = torch.from_numpy(np.array(rows)).permute(0, 3, 1, 2)
                    data.grid(images, columns, list(map(str, labels.tolist()))).save(file, "png")
    finally:
        if data.rank() == 0:
            scratch.unlink(missing_ok=True)


def write_folder(generated, labels: Tensor, out: Path) -> None:
    """Write (indices, uint8 images) as PNG files, named by index and class, to a new folder."""
    if any(out.glob("*.png")):
        raise ValueError(f"--out {out}: holds pictures already; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    data.barrier()
    digits = len(str(len(labels) - 1))
    for indices, images in generated:
        for i, image in zip(indices, images.permute(0, 2, 3, 1).numpy()):
            with data.replacing(out / f"{i:0{digits}d}_class{int(labels[i])}.png") as aside:
                Image.fromarray(image).save(aside)
    data.barrier()


# ---- 3. The command ----


def find_checkpoint(path: str) -> Path:
    """The checkpoint file of a path, a file or a run folder."""
    found = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no such checkpoint; expected a .pt file, or a folder with last.pt")
    return found


def own_settings(path: Path) -> tuple[dict, dict]:
    """Settings that samples of a run of jumps must have, and have by default; of others, none."""
    content = model.read_checkpoint(path)
    own = content.get("sampling", {})
    if checks := data.optional("checks"):
        checks.check_sampling(path, own, content)
    return own, dict(steps=content["config"]["sample_steps"]) | own if own else {}


@dataclasses.dataclass
class Config:
    checkpoint: str = option("", "a run folder or a checkpoint")
    n: int = option(64, "number of samples")
    steps: int = option(50, "solver steps; a run of jumps has its own default")
    solver: str = option("ab2", "how the flow is integrated")
    guidance: float = option(1.5, "guidance scale; 1 is none")
    guidance_low: float = option(INTERVAL[0], "guide only where t is at least this (0 is data)")
    guidance_high: float = option(INTERVAL[1], "guide only where t is at most this (1 is noise)")
    shift: float = option(1.0, "time grid: larger takes smaller steps near the noise")
    rho: float = option(1.0, "time grid: larger takes smaller steps near the data")
    classes: str = option("", "labels to sample, such as 3 or 1,5,7; all in turn when empty")
    seed: int = option(0, "sample i depends on (seed, i) only")
    batch: int = option(250, "samples at a time on each process")
    codec: str = option("", "what decodes latents, such as latents:FILE")
    weights: str = option("ema", "which weights: ema, last, or another average that an official file has")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    out: str = option("samples.png", "a .png grid, an ADM-layout .npz, or a folder for PNG files")


def settings(config: type, argv: list[str] | None, description: str) -> Config:
    """The command line as a `config`, by the run's own way of sampling, if any."""
    cfg = data.parse(config, argv, description, ("checkpoint",))
    check_numbers(cfg)
    own, usual = own_settings(find_checkpoint(cfg.checkpoint))
    if own:  # jumps, of any length
        usual |= dict(guidance_low=0.0, guidance_high=1.0)
    cfg = data.parse(config, argv, description, ("checkpoint",), **usual)
    check_own(cfg, own)
    return cfg


def load(path: str, cfg, device) -> torch.nn.Module:
    """The network of a run folder or checkpoint, with the weights that cfg names."""
    net = model.load(find_checkpoint(path), cfg.weights).to(device)
    if not hasattr(net, "state"):
        raise ValueError(f"{path}: a {type(net).__name__}, which makes no images")
    return net


def write(cfg: Config, net, device, more: str = "", noise=None) -> None:
    """Write cfg.n samples, and print how; `more` is added to that."""
    labels = labels_for(cfg.n, net.num_classes, whole_numbers(cfg.classes))
    options = dict(steps=cfg.steps, solver=cfg.solver, guidance=cfg.guidance, shift=cfg.shift, rho=cfg.rho,
                   interval=(cfg.guidance_low, cfg.guidance_high))
    codec = data.codec(cfg.codec, device)
    fake = generate(net, labels, cfg.seed, cfg.batch, "sampling", codec, noise, **options)
    write_samples(fake, labels, image_shape(net, codec), Path(cfg.out))
    if data.rank() == 0:
        how = describe(conditioned=net.guidance_conditioned, **options) + more
        print(f"wrote {cfg.out}: {cfg.n:,} samples, {how}, {cfg.weights} weights, seed {cfg.seed}")


def main(argv: list[str] | None = None) -> None:
    if not (data.sys.argv[1:] if argv is None else argv):
        return print(__doc__.strip())
    cfg = settings(Config, argv, __doc__)
    device = data.start_processes(cfg.device)
    write(cfg, load(cfg.checkpoint, cfg, device), device)
    data.stop_processes()


# ---- 4. Guards: settings and guidance that are refused ----


def check_numbers(cfg: Config) -> None:
    if not cfg.checkpoint:
        raise ValueError("which checkpoint? python sample.py runs/glyphs (see --help)")
    if check_suffix(Path(cfg.out)) == ".png" and cfg.n > 10_000:
        raise ValueError(f"--out {cfg.out}: a grid of {cfg.n:,} is too large; use .npz or a folder")


def check_suffix(out: Path) -> str:
    """.png, .npz, or "" for a folder; ValueError for the name of another kind of file."""
    kind = out.suffix.lower()
    if kind[1:].isalpha() and kind not in (".png", ".npz"):
        raise ValueError(f"--out {out}: written are a .png grid, an .npz, or a folder of PNG files")
    return kind if kind in (".png", ".npz") else ""


def check_own(cfg: Config, own: dict) -> None:
    for name, value in own.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"--{name} {getattr(cfg, name)}: fixed by the run; leave it out (it is {value})")


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(k) for k in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--classes {text}: expected whole numbers such as 1,5,7") from None


def check_guidance(net, guidance: float, interval: tuple) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval {interval}: expected 0 <= low <= high <= 1 (noise)")
    if getattr(net, "guidance_conditioned", False) and guidance < 1:
        raise ValueError(f"guidance {guidance:g}: this network takes at least 1")
    if guidance != 1 and not net.null_class:
        raise ValueError(f"guidance {guidance:g}: without a null label, use guidance 1")


if __name__ == "__main__":
    data.run_cli(main)
