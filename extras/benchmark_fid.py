"""Part of `python -m extras.benchmark`: the Frechet distance, InceptionV3's features, and all scores.

The distance is compared with scipy's sqrtm where the exact value is known; scipy is used for nothing else.
The network (random weights) takes images as it is built, or with folded normalisation and, on a CPU, in
channels-last memory ("fast"), all at once or by eights, which fit into a CPU's cache.
"""
import copy
import sys
import time

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import data
import fid
from extras.benchmark_tools import Item, in_turn
from extras.inception import InceptionV3
from extras.metrics import METRICS

SIZES = {  # features, images at a time, images of all scores
    "tiny": (48, 1, 0), "small": (1024, 16, 2000), "full": (2048, 64, 5000)}


def items(size: str, device: torch.device) -> list[Item]:
    d, batch, n = SIZES[size]
    found = [Item(f"InceptionV3, batch {batch}", lambda: extraction(device, batch)),
             Item(f"Frechet distance of {d} features", lambda: distance(d, device), {"error": (None, 1e-9)})]
    scores = Item(f"all scores of {n:,} images against {n:,}", lambda: all_scores(device, n), seconds=n / 200)
    return [*found, scores] if n else found


def known_distance(d: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Two Gaussians whose covariances do not commute, and their exact distance: mu1, cov1, mu2, cov2,
    distance.

    A symmetric positive T = 1 + E is the optimal transport map of N(mu1, cov1) to N(mu2, T cov1 T), so the
    distance is |mu1 - mu2|^2 + tr(E cov1 E). The spectrum of cov1 falls like that of Inception features.
    """
    rng = data.generator("known distance", d)
    shapes = ((d,), (d,), (d,), (d, d))
    mu1, mu2, v, e = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    mu1, mu2, e = 0.01 * mu1, 0.01 * mu2, 0.05 * (e + e.T) / (2 * d) ** 0.5  # eigenvalues of e within +-0.1
    mirror = torch.eye(d, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)  # the eigenvectors of cov1
    cov1 = mirror * (15 * torch.arange(1, d + 1, dtype=torch.float64) ** -1.1) @ mirror
    ec = e @ cov1
    ece = ec @ e
    return mu1, cov1, mu2, cov1 + ec + ec.T + ece, float((mu1 - mu2).square().sum() + ece.trace())


def distance(d: int, device: torch.device) -> dict:
    """Errors and seconds of our Frechet distance and of scipy's sqrtm, and the seconds of its eigenvalues on
    a GPU."""
    from scipy.linalg import sqrtm  # here, as nothing else needs scipy
    mu1, cov1, mu2, cov2, exact = known_distance(d)

    def by_sqrtm() -> float:  # no disp=: SciPy 1.18 dropped that argument
        root = sqrtm((cov1 @ cov2).numpy())
        return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real)

    start = time.perf_counter()
    sqrtm_error, taken = abs(by_sqrtm() - exact), time.perf_counter() - start
    calls = {"s": lambda: fid.frechet_distance(mu1, cov1, mu2, cov2)}
    if device.type == "cuda":
        on_device = cov1.to(device), cov2.to(device)
        calls["s, eigenvalues on the GPU"] = lambda: fid.sqrt_spectrum(*on_device).sum().item()
    return {"error": abs(calls["s"]() - exact), "sqrtm error": sqrtm_error, "sqrtm s": taken,
            **in_turn(calls, 3, device.type)}


def extraction(device: torch.device, batch: int) -> dict:
    """Images/s of 256 x 256 pixels through InceptionV3, as it is built and as it is used."""
    with torch.random.fork_rng(devices=[]):
        plain = InceptionV3()
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # torch's own would let the features fade to 0
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device)
    plain = plain.to(device)
    built_8, folded, fast = copy.deepcopy(plain), copy.deepcopy(plain).fast(), copy.deepcopy(plain).fast()
    built_8.at_once, folded.at_once, fast.at_once = 8, sys.maxsize, 8
    nets = {"as built": plain, "as built by 8": built_8, "fast": folded, "fast by 8": fast}
    calls = {name: lambda net=net: net.extract(images)["features"].sum().item() for name, net in nets.items()}
    seconds = in_turn(calls, 3, device.type)
    return {f"images/s {name}": batch / taken for name, taken in seconds.items()}


def all_scores(device: torch.device, n: int) -> dict:
    """Seconds that all scores of n images against n take once the features are there."""
    net = InceptionV3().to(device)
    rows = [{key: torch.randn(n, width, generator=data.generator("rows", side)).relu()
             for key, width in net.widths.items()} for side in range(2)]
    sides, start = [fid.ImageSet("generated", n), fid.ImageSet("reference", n)], time.perf_counter()
    for images, outputs in zip(sides, rows):
        for key, gather in dict.fromkeys(need for metric in METRICS.values() for need in metric.needs):
            gatherer = gather(net.widths[key], "cpu", n)
            gatherer.update(outputs[key], list(range(n)))
            images.parts[key, gather] = gatherer.finish()
    fid.compare(net, *sides, list(METRICS))
    return {"s": time.perf_counter() - start}
