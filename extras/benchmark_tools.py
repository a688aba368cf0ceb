"""What the parts of `python -m extras.benchmark` measure with: times, memory, floating-point operations."""
import contextlib
import ctypes
import math
import os
import time
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import model


class Item(NamedTuple):
    """A measurement: `measure()` gives {figure: number}. Names are "group: variant"; a group is one claim."""
    name: str
    measure: Callable[[], dict]
    bars: dict = {}       # figure -> (least, most) that it should be, None: no limit
    seconds: float = 0.0  # about what it takes, where that is much: it is skipped if less is left


def interleaved_times(calls: dict, rounds: int, device: str) -> dict:
    """The seconds of each call (name -> function), a list of one number a round, after a round to warm up.

    Wall clock from an idle device to an idle device, so launches from Python count, as in training.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def in_turn(calls: dict, rounds: int, device: str) -> dict:
    """The median seconds of each call (name -> function). All are called once in each round, so that a busy
    machine slows all of them alike."""
    times = interleaved_times(calls, rounds, device)
    return {name: float(np.median(values)) for name, values in times.items()}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()  # all streams of the current device


def megabytes(device: str) -> float:
    """MB in use: by tensors on CUDA (not what its allocator keeps), or by this process; nan if not known."""
    return torch.cuda.memory_allocated() / 1e6 if device == "cuda" else resident("VmRSS")


def resident(field: str) -> float:
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e6


def peak_megabytes(call: Callable, device: str) -> float:
    """MB that `call` needs at most on top of what is in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = megabytes(device)
        call()
        return torch.cuda.max_memory_allocated() / 1e6 - before
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # or the pages that glibc keeps would hide what a call needs
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # set the peak back to the present size
    before = megabytes(device)
    call()
    return resident("VmHWM") - before


def saved_bytes(call: Callable) -> int:
    """Bytes of the tensors that autograd saves for the backward pass of what `call` returns."""
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    del result
    return sum(saved.values())


# Dense bfloat16 operations a second, NVIDIA's data sheets. "H100 80GB HBM3" is the SXM5 board.
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


def bfloat16_peak(name: str) -> float | None:
    """Operations a second of a device by its name; None where not known, as of the slower NVL boards."""
    return next((peak for part, peak in PEAKS.items() if part in name and "NVL" not in name), None)


def training_flops(config: dict) -> int:
    """Model FLOPs of one image: the matrix products of a forward and backward pass, a multiply-add as two.

    Counted with plain attention: what fused attention computes again in backward is no work of the model.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        net = model.build(config).to("meta")
        inputs = torch.empty(1, *net.state), torch.empty(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, model.attention_backend("plain"):
        net(*inputs).sum().backward()
    return counter.get_total_flops()


class RandomLatents(data.Dataset):
    """Noise in place of ImageNet's latents: (4, 32, 32), 1,000 classes."""
    shape, classes, labels = (4, 32, 32), [str(k) for k in range(1000)], range(1000)

    def item(self, i: int) -> tuple[torch.Tensor, int]:
        return data.Draws(0, [i]).normal("latent", self.shape)[0], i

    def clean(self, items, draws):
        return items


def source_of(name: str, images: str = "glyphs") -> data.Dataset:
    """What a network of the zoo trains on: latents, or for glyph-S and those like it images."""
    return RandomLatents() if model.ZOO[name].get("channels", 4) == 4 else data.dataset(images, 32)
