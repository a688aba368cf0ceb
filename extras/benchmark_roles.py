"""What a step of each role of each objective costs: `python -m extras.benchmark_roles`.

Loss and gradients on glyph-S at batch 32, in flow-matching steps (2 CPU cores, 2026-11-21):

    meanflow 1.7    imf 3.3    soflow 1.1    shortcut 1.2    ect 1.3    scm 2.5
    (a quarter of jumps, shortcut an eighth; imf with head and guidance; half are the default now)
    cafm  D 3.4, 113 MB   G 1.9, 53 MB         (D by forward mode 7.2, 164 MB; by differences 3.6, 84 MB)
    afm   D 3.0,  69 MB   G 2.1, 48 MB
    cat   D 5.2,  92 MB   G 3.1, 63 MB         a flow-matching step has 31 MB
"""
import contextlib
import dataclasses
import io
import re
from pathlib import Path

import torch
from torch import Tensor

import data
import losses
import train
from data import option
from extras.benchmark import in_turn, peak_megabytes

FREE = dict(encoder=f"{__file__}:free_encoder")
VARIANTS = {"cafm_routes": {"forward": dict(route="forward"), "finite": dict(route="finite")},
            "repa": {"": FREE}, "reg": {"": FREE},  # where one row, with the default settings, is not enough
            "distill": {}, "sim": {}, "dmd": {}}    # none without a flow to start from


def all_objectives() -> list[str]:
    """The names of the objectives of the core and of each file of extras/ that registers some."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        registers = re.search(r"^(losses\.)?register\(", path.read_text(), re.MULTILINE)
        if registers and not path.name.startswith("test"):
            data.extra(path.stem, "objectives")
    return list(losses.LOSSES)


def free_encoder(images: Tensor) -> Tensor:
    """Features of an image and of glyph-S's 16 patches, as an encoder's (B, 17, 768) but at no cost."""
    return images.new_ones(len(images), 17, 768)


def role_steps(names, source, device: torch.device, batch: int, **settings) -> dict:
    """{"cafm D": a function that computes this role's loss and gradients, ...}."""
    steps = {}
    for name in names:
        for variant, own in VARIANTS.get(name, {"": {}}).items():
            cfg = train.configure(name, batch=batch, **settings | own)
            with contextlib.redirect_stderr(io.StringIO()):  # no advice here
                nets = train.build_all(cfg, source, device)
            weights = {role: [p for p in net.parameters() if p.requires_grad] for role, net in nets.items()}
            for role in nets:
                label = f"{name} {role} {variant}".strip()
                steps[label] = role_step(role, nets, weights, cfg, source, device)
    return steps


def role_step(role: str, nets: dict, weights: dict, cfg, source, device: torch.device):
    """A function without arguments: the loss and gradients of this role on one batch."""
    turn = train.Loss(role, nets, cfg, source)
    items, labels = zip(*(source.item(i) for i in range(cfg.batch)))
    items, labels = torch.stack(items).to(device), torch.tensor(labels, device=device)

    def step():
        for name, params in weights.items():
            for p in params:
                p.requires_grad_(name == role).grad = None
        turn(items, labels, range(cfg.batch))[0].backward()

    return step


def print_roles(cfg, device: torch.device) -> None:
    """Time and peak memory of each role of each objective, up to its gradients, in flow-matching steps."""
    names = cfg.losses.split(",") if cfg.losses else all_objectives()
    source = data.dataset(cfg.data, 32)
    steps = role_steps(["fm", *(name for name in names if name != "fm")], source, device, cfg.batch,
                       model=cfg.model, amp="off")
    print(f"\nloss and gradients of each role on {cfg.model}, batch {cfg.batch}, float32, on {device.type}: "
          f"time in flow-matching\nsteps, median of {cfg.rounds} interleaved rounds, and peak memory")
    times = in_turn(steps, cfg.rounds, device.type)
    for name, step in steps.items():
        memory = peak_megabytes(step, device.type)
        print(f"{name:>22} {times[name] / times['fm G']:>7.2f} x {memory:>8.0f} MB")


@dataclasses.dataclass
class Config:
    losses: str = option("", "objectives such as fm,cafm (fm is the unit); empty: all there are")
    model: str = option("glyph-S", "a network of the zoo")
    data: str = option("glyphs", "the images, as for train.py")
    batch: int = option(32, "images of a step")
    rounds: int = option(3, "rounds that a median is taken of")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Time and memory of each role of each objective.")
    print_roles(cfg, data.start_processes(cfg.device))


if __name__ == "__main__":
    data.run_cli(main)
