"""Part of `python -m extras.benchmark`: what a step of each role of each objective costs.

Loss and gradients of a whole turn in those of flow matching, with which they are interleaved, by the same
network on the same batch, and the MB that a step needs. The derivatives alone, by every route to them, are in
benchmark_routes.py, the figures in extras/README.md.
"""
import contextlib
import io
import re
from pathlib import Path

import torch
from torch import Tensor

import data
import losses
import train
from extras.benchmark_tools import Item, in_turn, peak_megabytes, source_of

FREE = dict(encoder=f"{__file__}:free_encoder")
VARIANTS = {"cafm_routes": {"forward": dict(route="forward"), "finite": dict(route="finite")},
            "repa": {"": FREE}, "reg": {"": FREE},  # where one row, with the default settings, is not enough
            "distill": {}, "sim": {}, "dmd": {}, "refiner": {}}    # none without a flow to start from
CORE, MORE = ("cafm", "afm", "meanflow", "ect"), ("cafm_routes", "imf", "soflow", "shortcut", "scm")
SIZES = {  # network, batch, precision, objectives; none: all there are
    "tiny": [("glyph-XS", 4, "off", ("afm",))],
    "small": [("glyph-S", 32, "off", ())],
    "full": [("SiT-B/2", 32, "bf16", CORE), ("SiT-XL/2", 32, "bf16", CORE), ("SiT-B/2", 32, "bf16", MORE)]}


def items(size: str, device: torch.device) -> list[Item]:
    return [Item(f"{name}, batch {batch}, {amp.replace('off', 'float32')}: {loss}",
                 lambda args=(loss, name, batch, amp): role_costs(*args, device))
            for name, batch, amp, names in SIZES[size]
            for loss in names or [k for k in all_objectives() if k != "fm" and VARIANTS.get(k) != {}]]


def role_costs(loss: str, name: str, batch: int, amp: str, device: torch.device) -> dict:
    """Time in flow-matching steps, and the MB that loss and gradients need, of each role of an objective."""
    steps = role_steps(["fm", loss], source_of(name), device, batch, model=name, amp=amp)
    times, figures = in_turn(steps, 3, device.type), {}
    for label, step in list(steps.items())[1:]:
        role = label.removeprefix(loss).strip()
        figures |= {role: times[label] / times["fm G"], f"{role} MB": peak_megabytes(step, device.type)}
    return figures | {"fm ms": 1e3 * times["fm G"], "fm MB": peak_megabytes(steps["fm G"], device.type)}


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
            with contextlib.redirect_stderr(io.StringIO()), device:  # no advice; weights drawn on the device
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
                p.requires_grad_(name == role)
        turn(items, labels, range(cfg.batch))[0].backward()
        for p in weights[role]:
            p.grad = None  # so that the memory before a step has none of the last one's

    return step
