"""Tables of times: a training step against plain PyTorch, each objective's roles, attention, derivatives.

    python -m extras.benchmark                     all of them
    python -m extras.benchmark --only step         this file's; the others have files of their own

    step        here                       a training step against the plainest PyTorch
    roles       benchmark_roles.py         each role of each objective in flow-matching steps
    attention   attention_table.py         the attention backends
    routes      benchmark_routes.py        the routes to a derivative

`python -m extras.benchmark_fid` times the evaluation. Every number is a median over interleaved rounds: each
candidate is called in each round, so that a busy machine slows all of them alike.

A step is 1.06 to 1.11 times as fast as plain PyTorch's for glyph-S (836 images/s at batch 64), 1.13 to 1.18
times for SiT-S/2 (3.0 images/s at batch 2), without compile (2 CPU cores, 2026-11-21).
On a GPU: not checked yet.
"""
import contextlib
import copy
import ctypes
import dataclasses
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import losses
import model
import train
from data import option

# ---- 1. How things are measured ----


def interleaved_times(calls: dict, rounds: int, device: str) -> dict:
    """The seconds of each call (name -> function), a list of one number a round, after a round to warm up."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def in_turn(calls: dict, rounds: int, device: str) -> dict:
    """The median seconds of each call (name -> function); all are called once in each round."""
    times = interleaved_times(calls, rounds, device)
    return {name: float(np.median(values)) for name, values in times.items()}


def peak_megabytes(call, device: str) -> float:
    """MB that `call` needs on top of what there is: CUDA's count, or Linux's peak resident size, or nan."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or the pages that glibc keeps would hide what a call needs
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # set the peak back to the present size

    def kilobytes(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


def saved_bytes(call) -> int:
    """Bytes of the tensors that autograd saves for the backward pass of what `call` returns."""
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    del result
    return sum(saved.values())


# ---- 2. A training step against plain PyTorch ----


def plain_step(net: nn.Module, ema: nn.Module, opt, x: Tensor, y: Tensor, cfg, step: int) -> None:
    """A flow-matching step as first written: math attention, optimizer, clipping and EMA by Python loops."""
    with sdpa_kernel(SDPBackend.MATH):
        losses.fm(net, x, y, data.Draws(cfg.seed, range(len(x)), x.device), cfg)[0].backward()
    nn.utils.clip_grad_norm_(net.parameters(), cfg.clip, foreach=False)
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        for averaged, p in zip(ema.parameters(), net.parameters()):
            averaged.mul_(cfg.ema).add_(p, alpha=1 - cfg.ema)


def our_step(net: nn.Module, ema: nn.Module, opt, x: Tensor, y: Tensor, cfg, step: int) -> None:
    """The step of the training loop."""
    losses.fm(net, x, y, data.Draws(cfg.seed, range(len(x)), x.device), cfg)[0].backward()
    nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
    opt.step()
    opt.zero_grad()
    train.update_ema(ema, net, step, cfg.ema)


def step_speeds(name: str, batch: int, steps: int, rounds: int, device: str) -> dict:
    """{"ours": images/s, "plain": images/s}, arrays of one number a round of so many steps."""
    torch.manual_seed(0)
    net, cfg = model.create(name).to(device), train.configure("fm")
    ema = copy.deepcopy(net).requires_grad_(False)
    x, y = torch.rand(batch, *net.shape, device=device) * 2 - 1, torch.arange(batch, device=device) % 10
    params = [p for p in net.parameters() if p.requires_grad]
    opts = {"ours": torch.optim.AdamW(params, fused=True), "plain": torch.optim.AdamW(params, foreach=False)}

    def several(step, opt):
        def run():
            for k in range(steps):
                step(net, ema, opt, x, y, cfg, k)
        return run

    calls = {kind: several(step, opts[kind]) for kind, step in (("ours", our_step), ("plain", plain_step))}
    times = interleaved_times(calls, rounds, device)
    return {kind: steps * batch / np.array(seconds) for kind, seconds in times.items()}


NETWORKS = {"cpu": [("glyph-S", 64, 10), ("SiT-S/2", 2, 2)],  # name, batch, steps of a round
            "cuda": [("glyph-S", 64, 10), ("SiT-S/2", 64, 10)]}


def print_steps(device: str, rounds: int) -> None:
    """Images/s of a training step of two networks, and its ratio to the plain step interleaved with it."""
    print(f"\ntraining step, float32, on {device} with {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; median of {rounds} interleaved rounds")
    print(f"{'model':>8} {'batch':>6} {'images/s':>9} {'plain':>9} {'ratio':>6}  ratios of the rounds")
    for name, batch, steps in NETWORKS[device]:
        speed = step_speeds(name, batch, steps, rounds, device)
        ratios = speed["ours"] / speed["plain"]
        print(f"{name:>8} {batch:>6} {np.median(speed['ours']):>9.1f} {np.median(speed['plain']):>9.1f} "
              f"{np.median(ratios):>6.2f}  {' '.join(f'{r:.2f}' for r in ratios)}")


# ---- 3. Run alone ----


TABLES = {"roles": "benchmark_roles", "attention": "attention_table", "routes": "benchmark_routes"}


@dataclasses.dataclass
class Config:
    only: str = option("", "one table; empty: all of them", ("", "step", *TABLES))
    rounds: int = option(3, "rounds that a median is taken of")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Print every table of times.")
    device = data.start_processes(cfg.device).type
    if cfg.only in ("", "step"):
        print_steps(device, cfg.rounds)
    for name, file in TABLES.items():
        if cfg.only in ("", name):
            data.extra(file, f"--only {name}").main(["--rounds", str(cfg.rounds), "--device", device])


if __name__ == "__main__":
    data.run_cli(main)
