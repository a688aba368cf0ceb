"""Parts of `python -m extras.benchmark`: the default run, a training step, the share of it that draws noise.

A training step is that of train.py's loop, on one batch: loss, gradients and their exchange, clipping, AdamW,
the average. Each variant has all of the one before it. "x plain": how many times the speed of plain PyTorch's
step (benchmark_plain.py), on a CPU interleaved with it, on a GPU timed before, where it fits into memory:

    eager    float32, plain attention         bf16      autocast to bfloat16
    fused    float32, fused attention         compile   torch.compile as well, as `train.py --compile`

"of peak" is model FLOPs (`training_flops`) over the device's dense bfloat16 peak, where that is known.
"""
import copy
import dataclasses
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import data
import losses
import model
import train
from extras.benchmark_plain import plain_training
from extras.benchmark_tools import (Item, bfloat16_peak, in_turn, megabytes, peak_megabytes, source_of,
                                    training_flops)

# ---- 1. The default run ----

RUN = {"tiny": dict(steps=2, score=0), "small": dict(steps=100, score=0), "full": {}}


def run_items(size: str, device: torch.device) -> list[Item]:
    cfg = train.configure("fm", device=device.type, **RUN[size])
    return [Item(f"{cfg.steps} steps of python train.py", lambda: default_run(cfg), {"s": (None, 60)})]


def default_run(cfg) -> dict:
    """Seconds of training and, where it is scored, FD-glyphs and accuracy, unguided and guided."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)  # the run has one folder
        found = train.train(dataclasses.replace(cfg, out=str(Path(shared[0], "run"))))
        data.barrier()
    figures = {"s": found["training_seconds"], "images/s": found["images_seen"] / found["training_seconds"]}
    for name, scores in found.get("scores", {}).items():
        figures |= {f"FD-glyphs {name}": scores["fd_glyphs"], f"accuracy {name}": scores["accuracy"],
                    "floor": scores["floor"]}
    return figures


# ---- 2. A training step ----

PLAIN = "plain PyTorch"
VARIANTS = {"eager": dict(backend="plain", amp="off"), "fused": dict(amp="off"), "bf16": dict(amp="bf16"),
            "compile": dict(amp="bf16", compile=True)}
FLOAT32, BF16 = ("eager", "fused"), ("bf16", "compile")
ALL = FLOAT32 + BF16
STEPS = {  # network, images of a process, steps of a round, variants
    "tiny": [("glyph-XS", 4, 1, FLOAT32)],
    "small": [("glyph-S", 64, 5, FLOAT32), ("SiT-S/2", 2, 1, FLOAT32)],
    "full": [("SiT-B/2", 32, 5, ALL), ("SiT-XL/2", 32, 2, ALL), ("SiT-XL/2", 64, 1, BF16),
             ("SiT-B/2", 256, 1, BF16), ("SiT-XL/2", 256, 1, BF16), ("SiT-B/2", 64, 3, BF16),
             ("SiT-B/2", 64, 3, FLOAT32), ("SiT-XL/2", 64, 1, FLOAT32), ("SiT-B/2", 256, 1, FLOAT32)]}


def step_items(size: str, device: torch.device) -> list[Item]:
    items, plain = [], {}  # seconds of plain PyTorch's step, by network and batch
    for name, batch, steps, variants in STEPS[size]:
        for variant in (PLAIN, *variants):
            bars = {}
            if (size, variant) == ("full", "compile"):
                bars = {"x plain": (2, None)} | ({"of peak": (0.5, None)} if "XL" in name else {})
            slow = (90.0 if "XL" in name else 40.0) if variant == "compile" else 0.0
            items.append(Item(f"{name}, batch {batch}: {variant}", bars=bars, seconds=slow,
                              measure=lambda args=(name, batch, steps, variant): speed(*args, device, plain)))
    names = [item.name for item in items]  # plain PyTorch at one size once
    return [item for k, item in enumerate(items) if item.name not in names[:k]]


def speed(name: str, batch: int, steps: int, variant: str, device: torch.device, plain: dict) -> dict:
    """images/s of all processes, GB, share of the peak, and how many times plain PyTorch's speed."""
    def several(step):
        return lambda: [step() for _ in range(steps)] and None

    source = source_of(name)
    before = megabytes(device.type)
    calls = {variant: several(make_step(name, batch, variant, source, device))}
    try:
        calls[variant]()  # allocates the optimizer's state, compiles
        held = megabytes(device.type) - before
        gigabytes = (held + peak_megabytes(calls[variant], device.type)) / 1e3
        if device.type == "cpu":
            calls.setdefault(PLAIN, several(make_step(name, batch, PLAIN, source, device)))
        seconds = in_turn(calls, 3, device.type)
    finally:
        if variant == "compile":
            torch.compiler.reset()  # or it would compile the next batch size for any batch size
    rate = data.world() * batch * steps / seconds[variant]
    figures = {"images/s": rate, "GB": gigabytes}
    if peak := device.type == "cuda" and bfloat16_peak(torch.cuda.get_device_name()):
        figures["of peak"] = rate * training_flops(model.ZOO[name]) / (peak * data.world())
    plain |= {(name, batch): seconds[PLAIN]} if PLAIN in seconds else {}
    if variant != PLAIN and (name, batch) in plain:
        figures["x plain"] = plain[name, batch] / seconds[variant]
    return figures


def make_step(name: str, batch: int, variant: str, source: data.Dataset, device: torch.device):
    """A function without arguments: one training step on the first batch of the data."""
    settings = dict(VARIANTS.get(variant, {}))
    backend = settings.pop("backend", "fused")
    cfg = train.configure("fm", model=name, batch=batch * data.world(), device=device.type, **settings)
    if variant == PLAIN:
        items, labels, positions = next(train.training_stream(0, cfg, source))
        x = source.clean(items.to(device), data.Draws(cfg.seed, positions, device))
        with torch.device("meta"):
            config = train.build_all(cfg, source, torch.device("meta"))["G"].config
        return plain_training(config, x, labels.to(device))
    step = training_step(cfg, source, device)

    def by_backend():
        with model.attention_backend(backend):
            step()

    return by_backend


def training_step(cfg, source: data.Dataset, device: torch.device):
    """The step of train.py's loop on the run's first batch; noise, times and labels dropped change."""
    with device:  # a GPU fills large networks faster than a CPU
        nets = train.build_all(cfg, source, device)
    ema = copy.deepcopy(nets["G"]).requires_grad_(False)
    weights = [p for p in nets["G"].parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, cfg.lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                            fused=True)
    turn = train.Replicated().wrap(train.Loss("G", nets, cfg, source))
    items, labels, _ = next(train.training_stream(0, cfg, source))
    items, labels = items.to(device), labels.to(device)
    numbered = enumerate(train.positions_from(0, cfg))

    def step():
        k, positions = next(numbered)
        opt.param_groups[0]["lr"] = train.learning_rate(k, cfg)
        turn(items, labels, positions)[0].backward()
        nn.utils.clip_grad_norm_(weights, cfg.clip)
        opt.step()
        opt.zero_grad()
        train.update_ema(ema, nets["G"], k, cfg.ema)

    return step


# ---- 3. Drawing noise ----

NOISE = {"tiny": [("glyph-XS", 8)], "small": [("glyph-S", 256), ("glyph-S", 1024)],
         "full": [(name, batch) for name in ("glyph-S", "SiT-B/2") for batch in (256, 1024)]}


def noise_items(size: str, device: torch.device) -> list[Item]:
    return [Item(f"{name}, batch {batch}", lambda args=(name, batch): noise_share(*args, device),
                 {"of a step": (None, 0.02)}) for name, batch in NOISE[size]]


def noise_share(name: str, batch: int, device: torch.device) -> dict:
    """ms of a training step, by default as in train.py, of its noise, and of all that its loss draws."""
    source = source_of(name)
    cfg = train.configure("fm", model=name, batch=batch, device=device.type)
    draws = data.Draws(cfg.seed, range(batch), device)

    def all_draws():
        draws.normal("noise", source.shape)
        losses.sample_times(draws, cfg)
        draws.uniform("label drop")

    step = training_step(dataclasses.replace(cfg, batch=batch * data.world()), source, device)
    calls = dict(step=step, noise=lambda: draws.normal("noise", source.shape), draws=all_draws)
    seconds = in_turn(calls, 5, device.type)
    return {"step ms": 1e3 * seconds["step"], "noise ms": 1e3 * seconds["noise"],
            "of a step": seconds["noise"] / seconds["step"],
            "with times and labels": seconds["draws"] / seconds["step"]}
