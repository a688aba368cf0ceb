"""Times of fid.py: the Frechet distance against scipy's sqrtm, four ways through InceptionV3, all scores.

    python -m extras.benchmark_fid

Medians of interleaved rounds in one process; scipy is used for this comparison only. Measured (2 CPU cores,
2026-11-21): the distance at D = 2048 has an error of 3e-13 in 1.15 s, by sqrtm 5e-13 in 12.6 s, 10.9 times
as long. Features as used on a CPU (folded normalisation, channels-last memory, eight images at once) come
1.86 times as fast as from the network as built at batch 32 (10.0 images/s against 5.4) and 2.33 times at 64
(11.8 against 5.1); without the eights 1.80 and 1.83; the network as built gains 1.23 to 1.32 by them too.
All scores of 5,000 images against 5,000 take 26 s.
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
from extras.benchmark import in_turn
from extras.inception import InceptionV3
from extras.metrics import METRICS


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


def benchmark_distance(d: int) -> None:
    """Errors and times of our Frechet distance and of scipy's sqrtm, where the truth is known."""
    from scipy.linalg import sqrtm  # here, as nothing else needs scipy
    mu1, cov1, mu2, cov2, exact = known_distance(d)

    def by_sqrtm() -> float:  # no disp=: SciPy 1.18 dropped that argument
        root = sqrtm((cov1 @ cov2).numpy())
        return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real)

    calls = dict(ours=lambda: fid.frechet_distance(mu1, cov1, mu2, cov2), sqrtm=by_sqrtm)
    seconds = in_turn(calls, 3, "cpu")
    print(f"Frechet distance at D = {d}, exact value {exact:.9f}, {torch.get_num_threads()} threads")
    for name, call in calls.items():
        print(f"  {name:6} error {call() - exact:+.1e}   {seconds[name]:7.2f} s")
    print(f"  sqrtm takes {seconds['sqrtm'] / seconds['ours']:.1f} times as long")


def benchmark_extraction(device: torch.device, batch: int, rounds: int) -> float:
    """Seconds an image of InceptionV3 as it is built and as it is used; the last one is returned."""
    with torch.random.fork_rng(devices=[]):
        plain = InceptionV3()
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # torch's own would let the features fade to 0
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device)
    plain = plain.to(device)
    built_8, folded, fast = copy.deepcopy(plain), copy.deepcopy(plain).fast(), copy.deepcopy(plain).fast()
    built_8.at_once, folded.at_once = 8, sys.maxsize
    nets = {"as built": plain, "as built, 8 at once": built_8, "folded, channels-last": folded,
            "the same, 8 at once": fast}
    calls = {name: lambda net=net: net.extract(images)["features"].sum().item() for name, net in nets.items()}
    seconds = in_turn(calls, rounds, device.type)
    print(f"Feature extraction on {device}, batch {batch}, 256 x 256 pixels")
    for name, taken in seconds.items():
        ratio = seconds["as built"] / taken
        print(f"  {name:22} {batch / taken:7.2f} images/s   {ratio:.2f} times as built")
    return seconds["the same, 8 at once"] / batch


def benchmark_rest(device: torch.device, n: int, per_image: float) -> None:
    """Seconds that all scores of n images against n take once the features are there, beside those of the
    features."""
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
    seconds = time.perf_counter() - start
    print(f"All scores of {n:,} images against {n:,}: {seconds:.1f} s; features {2 * n * per_image:.0f} s")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark_distance(2048)
    benchmark_rest(device, 5000, benchmark_extraction(device, 32, 5))


if __name__ == "__main__":
    data.run_cli(main)
