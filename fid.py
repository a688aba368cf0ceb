"""Frechet distances and their companions between image sets, each with its protocol.

    python fid.py GENERATED REFERENCE                   FID, sFID, IS, precision, recall, density, coverage, KID
    python fid.py RUN glyphs --features glyphs --num N  N samples of a run against held-out glyphs: nothing to download
    python fid.py A.npz,B.npz,C.npz REFERENCE           mean and spread over several sample sets
    python fid.py IMAGES --save_stats OUT.npz           statistics, to stand for IMAGES later
    python fid.py --mmhm A.json,B.json                  one number for each of several results of --json
    python fid.py --benchmark                           Frechet distance and feature extraction, timed against others
    torchrun --nproc_per_node=2 fid.py ...              the same numbers from two processes

GENERATED and REFERENCE are each: a folder or zip of images (subfolders too), an npz of images (ADM's `arr_0`, read
image by image), statistics (an npz or .pt with `mu` and `sigma`: ours, ADM's reference files, or others), glyphs, a run
folder or checkpoint (generates --num images), or from Python an iterable of uint8 batches (N, 3, h, w).
`python fid.py --help` lists the flags.

Which numbers to believe. "FID" is the distance on the 2015-12-05 weights (--weights fid) for 50,000 images or more;
with fewer it is called by their number (FID5k), because the distance of N images exceeds its limit by about C / N. That
`bias`, and the `floor` which a perfect generator would get, are printed beside it. The default weights are
torchvision's: other features, another unit, so those numbers say "(torchvision weights)" and compare with their like
only. Names with "glyphs" are measured on our own small classifier, for experiments with `glyphs`.

Letters: N images, D features.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import statistics
import sys
import time
import typing
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import model
import sample
from data import option

NEIGHBOURS = ("precision", "recall", "density", "coverage")
METRICS = ("fid", "sfid", "is", *NEIGHBOURS, "kid")
HELD_OUT, HELD_OUT_AGAIN = 1, 2  # seeds of real glyphs that only measure; generators train on seed 0, GlyphNet on 3


# --------------------------------------------------------------------------------------------------------------------
# 1. The Frechet distance of two Gaussians, and how much of it is too few images
# --------------------------------------------------------------------------------------------------------------------

def sqrt_spectrum(cov1: Tensor, cov2: Tensor) -> Tensor:
    """The square roots s (D,) of the eigenvalues of cov1 cov2: those of L^T cov2 L for any factor cov1 = L L^T.

    Their sum is tr (cov1 cov2)^(1/2). A Cholesky factor keeps small ones to relative accuracy; the square root of the
    product cov1 cov2 adds about sqrt(machine epsilon) for each direction without variance.
    """
    for a, b in ((cov1, cov2), (cov2, cov1)):  # one positive definite matrix is enough
        L, failed = torch.linalg.cholesky_ex(a)
        if not failed:
            break
    else:  # both singular: N <= D, or features that are always zero
        values, vectors = torch.linalg.eigh(cov1)
        L, b = vectors * values.clamp_min(0).sqrt(), cov2
    m = L.T @ b @ L
    return torch.linalg.eigvalsh((m + m.T) / 2).clamp_min(0).sqrt()


def frechet(mu1, cov1, mu2, cov2) -> tuple[float, Tensor]:
    """(`frechet_distance`, `sqrt_spectrum`) of two Gaussians: the bias of the distance needs the spectrum as well."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2))
    d = mu1.numel()
    if mu1.shape != (d,) or mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise ValueError(f"mean {tuple(mu1.shape)} and covariance {tuple(cov1.shape)} do not compare with "
                         f"mean {tuple(mu2.shape)} and covariance {tuple(cov2.shape)}: other features?")
    for name, value in dict(mu1=mu1, cov1=cov1, mu2=mu2, cov2=cov2).items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has non-finite values: the features of that image set overflowed")
    s = sqrt_spectrum(cov1, cov2)
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * s.sum()), s


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))   (Heusel et al., arXiv:1706.08500, Eq. 6)

    Means (D,) and covariances (D, D), numpy or torch; in float64 on the CPU. The unit is that of the features,
    squared. Equal arguments may give -1e-9 or so by rounding, which is returned as it is.
    ValueError when the shapes do not belong together or a value is not finite.
    """
    return frechet(mu1, cov1, mu2, cov2)[0]


def small_sample_bias(s: Tensor, trace: float | Tensor, n: int) -> float:
    """What N images from a Gaussian of that trace add, on average, to their distance from another Gaussian:

        B(N) = (1/N) [tr cov + 1/2 sum_ij (1 + delta_ij) s_i s_j / (s_i + s_j)],   s: `sqrt_spectrum` (D,)

    The first order in 1/N (the law of Chong & Forsyth, arXiv:1911.07023; this form: second-order perturbation with
    Gaussian features). At N = 4 D it is some 8 % too low, below 2 D it is no more than a size.
    """
    pairs = torch.outer(s, s) / (s[:, None] + s).clamp_min(torch.finfo(s.dtype).tiny)
    return float(trace + (pairs.sum() + pairs.diagonal().sum()) / 2) / n


def frechet_with_bias(mu: Tensor, cov: Tensor, n: int | None, mu_ref: Tensor, cov_ref: Tensor,
                      n_ref: int | None) -> dict[str, float | None]:
    """dict(value, bias, floor): the distance, its expected excess over that of infinitely many images, and what a
    perfect generator gets from as many images, B(n) at generated = reference.

    Means (D,) and covariances (D, D) in float64 on the CPU. A reference of unknown size n_ref counts as exact. Bias and
    floor are None where n is unknown; both presume independent images, and as many of each class have less.
    """
    value, s = frechet(mu, cov, mu_ref, cov_ref)
    if n is None:
        return dict(value=value, bias=None, floor=None)
    own = torch.linalg.eigvalsh(cov_ref).clamp_min(0)  # sqrt_spectrum(cov_ref, cov_ref)
    bias, floor = small_sample_bias(s, cov.trace(), n), small_sample_bias(own, own.sum(), n)
    if n_ref:
        bias += small_sample_bias(s, cov_ref.trace(), n_ref)
        floor += small_sample_bias(own, own.sum(), n_ref)
    return dict(value=value, bias=bias, floor=floor)


# --------------------------------------------------------------------------------------------------------------------
# 2. Scores of single images and of neighbourhoods
# --------------------------------------------------------------------------------------------------------------------

def inception_score(logits: Tensor, splits: int = 10) -> dict:
    """dict(value, std) over splits of exp(mean KL(p(y|x) | p(y)))   (Salimans et al., arXiv:1606.03498, Sec. 4)

    logits (N, classes), without their bias as in ADM and torch-fidelity. Images go to the splits in a fixed random
    order: in a file sorted by class each split would lack most classes, and score far too low.
    """
    order = torch.randperm(len(logits), generator=data.generator("inception score"))
    scores = []
    for part in order.split(-(-len(order) // splits)):
        log_p = logits[part].double().log_softmax(1)                                             # (n, classes)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return dict(value=statistics.mean(scores), std=statistics.pstdev(scores))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m), |a|^2 + |b|^2 - 2 a . b by one matrix product."""
    a2, b2 = (torch.linalg.vector_norm(x, dim=1).square() for x in (a, b))
    return (a2[:, None] + b2).addmm_(a, b.T, alpha=-2).clamp_min_(0)


def squared_radii(x: Tensor, *ks: int) -> list[Tensor]:
    """For each k the squared distance (n,) of every row of x (n, D) to its k-th nearest other row."""
    if len(x) <= max(ks):
        raise ValueError(f"the neighbour number {max(ks)} needs more than {max(ks)} images, got {len(x)}")
    nearest = torch.cat([squared_distances(part, x).topk(max(ks) + 1, largest=False).values for part in x.split(500)])
    return [nearest[:, k] for k in ks]  # number 0 is the row itself


def neighbour_scores(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> dict[str, float]:
    """precision and recall (Kynkaanniemi et al., arXiv:1904.06991, Eqs. 1-2), density and coverage (Naeem et al.,
    arXiv:2002.09797, Eqs. 3-4) of features (n, D) and (m, D), float32 or float64.

    With r_k(x) the distance of x to its k-th nearest neighbour in its own set: precision is the share of fake points
    with |fake - real| <= r_k(real) for some real one, recall the reverse. density is how many balls of radius
    r(real) < hold a fake point, divided by k_density; coverage the share of such balls that hold any. All depend on
    both numbers of images. ValueError for no more images than neighbours.
    """
    real, fake = real - real.mean(0), fake - real.mean(0)  # nearer to 0, where products of float32 keep more digits
    radius, wide = squared_radii(real, k, k_density)
    fake_radius, = squared_radii(fake, k)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = inside = covered = 0
    for part, r, w in zip(real.split(500), radius.split(500), wide.split(500)):
        d = squared_distances(part, fake)
        precise |= (d <= r[:, None]).any(0)
        recalled += int((d <= fake_radius).any(1).sum())
        inside += int((d < w[:, None]).sum())
        covered += int((d < w[:, None]).any(1).sum())
    return dict(precision=float(precise.double().mean()), recall=recalled / len(real),
                density=inside / (k_density * len(fake)), coverage=covered / len(real))


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> dict:
    """KID: dict(value, std) of the unbiased squared MMD under the kernel (x . y / D + 1)^3 over random subsets
    (Binkowski et al., arXiv:1801.01401, Sec. 4). Features (n, D) and (m, D); not multiplied by 1000; may be negative.

    Sets of no more than `size` images are taken whole, once, and std is then 0.
    """
    size, rng, found = min(size, len(real), len(fake)), data.generator("kernel distance"), []
    if size < 2:
        raise ValueError(f"KID needs at least 2 images in each set, got {len(real)} and {len(fake)}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(1 if size == len(real) == len(fake) else subsets):
        x, y = (part[torch.randperm(len(part), generator=rng)[:size].to(part.device)].double() for part in (real, fake))
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(float(within - 2 * kernel(x, y).mean()))
    return dict(value=statistics.mean(found), std=statistics.pstdev(found))


def mmhm(models: dict[str, dict[str, float]], bounds: dict[str, list[float]] | None = None) -> tuple[dict, dict]:
    """Min-max harmonic mean of K metrics, {model: K / sum_k 1 / (1e-3 + u_k)}, and the bounds   (arXiv:2603.14186)

    models: {model: {metric: value}}. u_k is 1 at the best and 0 at the worst of [lowest, highest] in `bounds`, by
    default those of these models: then adding one changes all. Give the same bounds to compare over time; beyond them
    u_k stays 0 or 1. ValueError where models have other metrics than each other or than the bounds.
    """
    names = set(bounds or next(iter(models.values())))
    for label, scores in models.items():
        if scores.keys() != names:
            raise ValueError(f"{label} has the metrics {', '.join(scores)}; expected {', '.join(sorted(names))}")
    columns = {name: [scores[name] for scores in models.values()] for name in sorted(names)}
    bounds = bounds or {name: [min(column), max(column)] for name, column in columns.items()}

    def share(name: str, x: float) -> float:
        low, high = bounds[name]
        if high == low:
            return 1.0
        u = min(1.0, max(0.0, (x - low) / (high - low)))
        return 1 - u if name.startswith(("fid", "sfid", "fd_", "kid")) else u  # of those less is better

    return {label: len(scores) / sum(1 / (1e-3 + share(name, x)) for name, x in scores.items())
            for label, scores in models.items()}, bounds


# --------------------------------------------------------------------------------------------------------------------
# 3. Mean and covariance of a stream of features, on any number of processes
# --------------------------------------------------------------------------------------------------------------------

class Statistics:
    """Count, sum and sum of outer products of features, in float64: 34 MB at D = 2048 for any number of images."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                            for shape in ((), (dim,), (dim, dim)))

    n = property(lambda self: int(self.count))

    def update(self, features: Tensor) -> None:
        """Add features (N, D). How they are cut into batches makes no difference."""
        features = features.to(self.sum)  # to float64 before the product, which in float32 would lose four digits
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def all_reduce(self) -> None:
        """Add up the shares of all processes: once, after the last update."""
        if data.world() > 1:
            for share in (self.count, self.sum, self.outer):
                dist.all_reduce(share)

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance with 1 / (N - 1) (D, D), float64, on the CPU. ValueError for fewer than 2 images."""
        n, mean = self.n, (self.sum / self.n).cpu()
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {n}")
        return mean, (self.outer.cpu() - n * torch.outer(mean, mean)) / (n - 1)


class Rows:
    """Features (n, width) as they come, in one float32 tensor: kept batch by batch they leave memory in pieces."""

    def __init__(self, width: int, expected: int):
        self.n, self.stored = 0, torch.empty(expected, width)

    def add(self, rows: Tensor) -> None:
        while self.n + len(rows) > len(self.stored):
            self.stored = torch.cat([self.stored, torch.empty_like(self.stored)])
        self.stored[self.n:self.n + len(rows)] = rows
        self.n += len(rows)

    def in_order(self, place: Tensor) -> Tensor:
        """Those of all processes (N, width) in the order `place` of their gathered rows."""
        found = gather(self.stored[:self.n])
        return found if torch.equal(place, torch.arange(len(place))) else found[place]  # a copy: 410 MB for 50,000


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, on the CPU, rank after rank; shares may differ in length."""
    if data.world() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(data.world())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[:len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[:int(n)] for share, n in zip(shares, counts)])


# --------------------------------------------------------------------------------------------------------------------
# 4. InceptionV3, with torchvision's weights or with those of the FID
# --------------------------------------------------------------------------------------------------------------------

class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU: the unit of both networks of this file."""

    def __init__(self, i: int, o: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the normalisation of eval mode into the convolution: the same function with less work."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        shift = self.bn.bias - self.bn.running_mean * scale
        self.conv.weight.copy_(self.conv.weight * scale.view(-1, 1, 1, 1))
        self.conv.bias, self.bn = nn.Parameter(shift.float(), requires_grad=False), nn.Identity()


class Mixed(nn.Module):
    """An Inception block: parallel branches on one input, concatenated in the order of the table.

    `branches` is {name: units}. A unit is (channels, kernel), padded to keep its size, or (channels, kernel, stride),
    not padded; two units in a list fork. Units are called name_1, name_2, ... (forked: name_2a, name_2b), or just
    name when they are alone. The input of `branch_pool` goes through `pool` first.
    """

    def __init__(self, channels: int, branches: dict, pool):
        super().__init__()
        self.pool, self.chains, self.channels = pool, {}, 0
        for branch, units in branches.items():
            width, self.chains[branch] = channels, []
            for number, unit in enumerate(units, 1):
                name = f"{branch}_{number}" if len(units) > 1 else branch
                fork = {name + "a": unit[0], name + "b": unit[1]} if isinstance(unit, list) else {name: unit}
                for key, (o, kernel, *stride) in fork.items():
                    self.add_module(key, Conv(width, o, kernel, *stride, padding=0 if stride else "same"))
                self.chains[branch].append(list(fork))
                width = sum(o for o, *_ in fork.values())
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for branch, chain in self.chains.items():
            h = self.pool(x) if branch == "branch_pool" else x
            for keys in chain:
                forks = [getattr(self, key)(h) for key in keys]
                h = torch.cat(forks, 1) if len(forks) > 1 else forks[0]
            out.append(h)
        return torch.cat(out, 1)


def inception_blocks(flavour: str) -> dict[str, tuple]:
    """{name: (branches, pool)} in the order of the network   (Szegedy et al., arXiv:1512.00567, Table 1, Figs. 5-7).

    The 2015-12-05 graph of the FID leaves the zero border out of its averages, and its last block pools by maximum.
    """
    ours = flavour == "torchvision"
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=ours)
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)
    row, column, cross = (1, 7), (7, 1), [(384, (1, 3)), (384, (3, 1))]

    def a(w):
        return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(w, 1)]}, average

    def c(w):
        return {"branch1x1": [(192, 1)], "branch7x7": [(w, 1), (w, row), (192, column)],
                "branch7x7dbl": [(w, 1), (w, column), (w, row), (w, column), (192, row)],
                "branch_pool": [(192, 1)]}, average

    b = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []}
    d = {"branch3x3": [(192, 1), (320, 3, 2)],
         "branch7x7x3": [(192, 1), (192, row), (192, column), (192, 3, 2)], "branch_pool": []}
    e = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), cross],
         "branch3x3dbl": [(448, 1), (384, 3), cross], "branch_pool": [(192, 1)]}
    return dict(Mixed_5b=a(32), Mixed_5c=a(64), Mixed_5d=a(64), Mixed_6a=(b, halve),
                Mixed_6b=c(128), Mixed_6c=c(160), Mixed_6d=c(160), Mixed_6e=c(192), Mixed_7a=(d, halve),
                Mixed_7b=(e, average), Mixed_7c=(e, average if ours else maximum))


def check_images(images: Tensor) -> Tensor:
    """The images, if they are uint8 (N, 3, h, w); ValueError if not."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images uint8 (N, 3, h, w), got {images.dtype} {tuple(images.shape)}: "
                         "convert floats in [-1, 1] with data.to_uint8, and decode latents before that")
    return images


def resize_tf1(x: Tensor, size: int = 299) -> Tensor:
    """Bilinear as in TensorFlow 1, the rule behind published FIDs: output i reads the input at i * n / size.

    (N, C, h, w) -> float32 (N, C, size, size). No half-pixel shift, neighbours clamped at the edge, no antialiasing.
    """
    x = x.float()
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long()
        left, right = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
        x = left + (right - left) * (at - low).view(-1, *[1] * (3 - dim))
    return x


def resize_pytorch(x: Tensor, size: int = 299) -> Tensor:
    """Bilinear with half-pixel centres and no antialiasing, as in pytorch-fid; shapes as in `resize_tf1`."""
    return F.interpolate(x.float(), (size, size), mode="bilinear", align_corners=False)


def resize_clean(x: Tensor, size: int = 299) -> Tensor:
    """Antialiased bicubic, clamped to 0..255 and not rounded, as in clean-fid (arXiv:2104.11222): Pillow's rule."""
    return F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)


RESIZES = {"tf1": resize_tf1, "pytorch": resize_pytorch, "clean": resize_clean}


@contextlib.contextmanager
def full_float32(device: torch.device):
    """Autocast, TF32 and chance off: a metric must not depend on such settings (bfloat16 moves features by 8e-3)."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False), \
             torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


def digest(*chunks: bytes) -> str:
    """The first 8 hex digits of the sha256 of the chunks."""
    return hashlib.sha256(b"".join(chunks)).hexdigest()[:8]


CLASSES = {"torchvision": 1000, "fid": 1008}


class InceptionV3(nn.Module):
    """The feature network of the FID: uint8 (N, 3, h, w) -> features float32 (N, 2048).

    `weights` is a state dict file with torchvision's key names; its number of classes tells the flavour, "torchvision"
    or "fid" (the 2015-12-05 graph). None keeps random weights, of flavour "torchvision" unless told otherwise.
    Images are resized by RESIZES[resize] and go to (x - 128) / 128, but to x / 127.5 - 1 for "torchvision" and as in
    pytorch-fid.
    Always in eval mode and float32, without gradients. ValueError for a file that is damaged, or not of that flavour.
    """
    metrics = METRICS

    def __init__(self, weights: str | Path | None = None, flavour: str | None = None, resize: str = "tf1"):
        super().__init__()
        found, state = read_inception(weights) if weights else (flavour or "torchvision", None)
        if flavour not in (None, found):
            raise ValueError(f"{weights} has fc.weight of {CLASSES[found]} classes: {found} weights, not {flavour}")
        self.flavour = found
        self.label = f"inception {found} {digest(Path(weights).read_bytes()) if weights else 'random'}"
        self.suffix = "" if found == "fid" else f"_{found}"  # of the names of scores
        self.resizer, self.symmetric = RESIZES[resize], found == "torchvision" or resize == "pytorch"
        self.resize = f"{resize} to 299, {'x/127.5-1' if self.symmetric else '(x-128)/128'}"
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3, padding=1), Conv(64, 80, 1)
        self.Conv2d_4a_3x3, channels, self.blocks = Conv(80, 192, 3), 192, inception_blocks(found)
        for name, (branches, pool) in self.blocks.items():
            self.add_module(name, Mixed(channels, branches, pool))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, CLASSES[found])
        self.widths = dict(features=2048, spatial=17 * 17 * 7, logits=CLASSES[found])
        self.at_once = sys.maxsize  # images that `extract` takes through the network together
        if state:
            try:
                self.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{weights}: not a whole InceptionV3 state dict: {reason}") from error
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stays in eval mode: with batch statistics an image's features would depend on its neighbours."""
        return super().train(False)

    def fast(self) -> "InceptionV3":
        """Fold every batch normalisation, and on a CPU take eight images at once, whose layers' outputs still fit into its
        cache, through channels-last memory: features move by some 1e-6."""
        for unit in self.modules():
            if isinstance(unit, Conv):
                unit.fold()
        if self.fc.weight.device.type == "cpu":
            self.at_once = 8
            self.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Float (N, 3, 299, 299), already in range -> features (N, 2048), spatial (N, 2023), logits (N, classes).

        `features` are the averages before the last layer (pool3).
        `spatial`: the first 7 channels of Mixed_6d.branch1x1, flattened in the order h, w, channel, for sFID (Nash et
        al., arXiv:2103.03841). `logits` lack the bias, as in the 2015-12-05 graph and in every Inception Score.
        """
        with full_float32(x.device):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2))                      # (N, 80, 73, 73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, 2)                      # (N, 192, 35, 35)
            for name in self.blocks:
                x = getattr(self, name)(x)                                     # at last (N, 2048, 8, 8)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)          # branch1x1 comes first in x
            features = x.mean((2, 3))
            return dict(features=features, spatial=spatial, logits=features @ self.fc.weight.T)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, h, w) -> what `outputs` gives."""
        outs = []
        for part in check_images(images).split(min(self.at_once, max(1, len(images)))):
            x = self.resizer(part)
            outs.append(self.outputs(x / 127.5 - 1 if self.symmetric else (x - 128) / 128))
        return {name: torch.cat([out[name] for out in outs]) for name in self.widths}

    def forward(self, images: Tensor) -> Tensor:
        return self.extract(images)["features"]


def read_inception(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """(flavour, state dict without the auxiliary head) of a file; ValueError if it is no InceptionV3."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file not found: {path}; give {', '.join(CLASSES)}, or the path of a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        flavour = {rows: name for name, rows in CLASSES.items()}[len(state["fc.weight"])]
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, ... for damage, KeyError for others
        raise ValueError(f"{path}: not an InceptionV3 state dict with 1000 or 1008 classes, or an incomplete download "
                         f"({type(error).__name__})") from error
    return flavour, {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}


def cache_folder() -> Path:
    """Where weights are kept: $TRIFLOW_CACHE, or ~/.cache/triflow."""
    return Path(os.environ.get("TRIFLOW_CACHE") or "~/.cache/triflow").expanduser()


def load_inception(weights: str = "torchvision", resize: str = "tf1") -> InceptionV3:
    """InceptionV3 with the weights "torchvision" or "fid" from `cache_folder()`, hash-checked, or from a file.

    Nothing is ever downloaded: FileNotFoundError says what to put where.
    """
    path, flavour = weights, None
    if weights in CLASSES:
        folder, file, size, sha256 = {
            "torchvision": ("https://download.pytorch.org/models/", "inception_v3_google-0cc3c7bd.pth", 108_949_747,
                            "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef"),
            "fid": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
                    "pt_inception-2015-12-05-6726825d.pth", 95_628_359,
                    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")}[weights]
        what, flavour = f"InceptionV3 weights ({weights})", weights
        path = data.require_file(cache_folder() / file, what, folder + file, size, sha256)
    with torch.random.fork_rng(devices=[]):  # a network is drawn at random before its weights are read
        return InceptionV3(path, flavour, resize)


# --------------------------------------------------------------------------------------------------------------------
# 5. GlyphNet, the features of `glyphs`, trained on the spot
# --------------------------------------------------------------------------------------------------------------------

class GlyphNet(nn.Module):
    """A digit classifier: uint8 (N, 3, h, w) -> (penultimate features float32 (N, 64), logits (N, 10)).

    Images of another size are first averaged down to, or repeated up to, 32 x 32. It sees shape, contrast, blur and
    noise, and hardly any hue: digits are told by their strokes.
    """
    suffix, resize, widths = "_glyphs", "mean over cells to 32, x/127.5-1", dict(features=64, logits=10)
    metrics = ("fid", *NEIGHBOURS)  # ten classes have no use for IS, and KID's kernel is made for features below 1

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            Conv(3, 16, 3, padding=1), nn.MaxPool2d(2),   # (N, 16, 16, 16)
            Conv(16, 32, 3, padding=1), nn.MaxPool2d(2),  # (N, 32, 8, 8)
            Conv(32, 64, 3, padding=1), nn.MaxPool2d(2),  # (N, 64, 4, 4)
            nn.Conv2d(64, 64, 4), nn.Flatten())           # (N, 64); no ReLU, since features stuck at 0 measure nothing
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 10))

    @property
    def label(self) -> str:
        """Name and digest of the weights, whose last bits differ from machine to machine."""
        return f"glyphnet {digest(*(value.cpu().numpy().tobytes() for value in self.state_dict().values()))}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with full_float32(images.device):
            features = self.body(F.adaptive_avg_pool2d(data.to_float(check_images(images)), 32))
            return features, self.head(features)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, h, w) -> dict(features, logits)."""
        return dict(zip(self.widths, self(images)))


def train_glyph_net(quiet: bool) -> GlyphNet:
    """One pass over 6,000 real glyphs of a seed that serves nothing else; leaves the global random state alone.

    On one thread: the same weights for any number of cores, and as fast where other jobs keep the cores busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels = data.glyphs(6_000, seed=3)
    batches = torch.randperm(len(images), generator=data.generator("GlyphNet order")).split(50)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(data.fold("GlyphNet weights"))  # torch.manual_seed would reach GPUs as well
        net = GlyphNet()
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=len(batches))
        with tqdm(total=len(images), unit="img", desc="training GlyphNet, once", disable=quiet) as bar:
            for batch in batches:
                loss = F.cross_entropy(net(images[batch])[1], labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update(len(batch))
    torch.set_num_threads(threads)
    return net


def glyph_net_file() -> Path:
    """Where GlyphNet is kept; the name changes with the code that trains it, and with what glyphs look like."""
    code = "".join(inspect.getsource(part) for part in (Conv, GlyphNet, train_glyph_net)).encode()
    return cache_folder() / f"glyphnet-{digest(code, data.glyphs(10)[0].numpy().tobytes())}.pt"


def glyph_net(quiet: bool = False) -> GlyphNet:
    """GlyphNet, frozen, on the CPU: trained the first time (some 6 s) and kept in `glyph_net_file()`.

    Under torch.distributed rank 0 trains and the others wait.
    """
    path = glyph_net_file()
    with torch.random.fork_rng(devices=[]):
        net = GlyphNet()
    if data.rank() == 0:
        try:
            net.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # no file yet, or a damaged one: EOFError, UnpicklingError, RuntimeError, ...
            if path.exists():
                note(f"{path} is damaged ({type(error).__name__}): training GlyphNet again")
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.{os.getpid()}")
            torch.save(train_glyph_net(quiet).state_dict(), unfinished)
            os.replace(unfinished, path)
    data.barrier()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------------
# 6. Image sets: whatever can be measured, as batches
# --------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def readable(path: str):
    """Errors of zip and npy files as a ValueError that names the file."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable npz ({error}); get or write it again") from error


class NpzRows:
    """The images of an npz as an array uint8 (N, 3, h, w) that is read row by row and never whole in memory.

    path: an npz with `key` uint8 (N, h, w, 3), or 1 channel, or channels first. ValueError for anything else. Quickest
    in ascending order; each process that touches it opens the file for itself.
    """

    def __init__(self, path: str, key: str):
        self.path, self.member, self.file, self.owner = path, f"{key}.npy", None, None
        with readable(path), zipfile.ZipFile(path) as archive, archive.open(self.member) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.stored, fortran, dtype = header(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(self.stored) != 4 or not {*self.stored[1::2]} & {1, 3} or fortran:
            raise ValueError(f"{path}: array {key} is {dtype} {self.stored}; expected uint8 NHWC, (N, h, w, 3), in C "
                             "order. Convert floats in [-1, 1] with data.to_uint8")
        self.channels_last = self.stored[3] in (1, 3)
        h, w = self.stored[1:3] if self.channels_last else self.stored[2:]
        self.shape = (self.stored[0], 3, h, w)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> Tensor:
        size = int(np.prod(self.stored[1:]))
        with readable(self.path):
            if self.owner != os.getpid():  # forked workers must not share one file position
                self.file, self.owner = zipfile.ZipFile(self.path).open(self.member), os.getpid()
            self.file.seek(self.start + i * size)
            pixels = self.file.read(size)
            if len(pixels) < size:
                raise ValueError("cut short")
        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(self.stored[1:])
        return (image.permute(2, 0, 1) if self.channels_last else image).expand(3, -1, -1)


def npz_members(path: str) -> set[str]:
    """Names of the arrays in an npz; ValueError where it is none."""
    with readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npz_images(path: str, size: int | None) -> data.Arrays:
    """The images of an npz (`arr_0` or `images`), streamed, and labels (`arr_1` or `labels`) where it has them."""
    members = npz_members(path)
    key = next((key for key in ("arr_0", "images") if key in members), None)
    if key is None:
        raise ValueError(f"{path}: holds {', '.join(sorted(members)) or 'nothing'}; expected images (arr_0 or images), "
                         "or statistics (mu and sigma)")
    rows = NpzRows(path, key)
    if not len(rows):
        raise ValueError(f"{path}: {key} holds no images")
    with readable(path), np.load(path) as file:
        labels = next((file[name] for name in ("arr_1", "labels") if name in members), np.zeros(len(rows), np.int64))
    return data.Arrays(rows, data.check_labels(labels, len(rows), path), size)


def check_sizes(files: data.Files) -> None:
    """ValueError when image files have several sizes, found from their headers before hours of work, not after."""
    sizes: dict[tuple, list[str]] = {}
    for name in tqdm(files.names, "reading sizes", unit="img", delay=2, disable=data.rank() > 0):
        try:
            with files.open(name) as file, Image.open(file) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                sizes.setdefault(image.size[::-1] if turned else image.size, []).append(name)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{files.root}/{name}: not a readable image ({error}); repair or remove it") from error
    if len(sizes) > 1:
        found = sorted(sizes.items(), key=lambda item: -len(item[1]))
        text = ", ".join(f"{w}x{h} ({len(names):,}{': ' + names[0] if len(names) < 4 else ''})"
                         for (w, h), names in found[:5])
        raise ValueError(f"{files.root}: images have {len(sizes)} sizes: {text}; give --size to crop all alike")


@dataclass
class ImageSet:
    """Images to measure. `batches` yields this process' share of (indices, uint8 (b, 3, h, w), labels (b,) or None);
    a batch holds the same images whatever the number of processes, so features do not depend on it."""
    name: str
    batches: typing.Iterable
    n: int | None                 # None: known when `batches` has ended
    size: list[int] | None        # [h, w]; None likewise
    labels: Tensor | None = None  # (n,) where there are classes
    made: str = ""                # how they were generated, where we know


def from_dataset(source: str, cfg: "Config", role: str) -> ImageSet:
    """All images of an npz, or of what `data.dataset` reads; or cfg.subset of them, drawn once for all."""
    size = cfg.size or None
    images = npz_images(source, size) if source.endswith(".npz") else data.dataset(source, size)
    if isinstance(images, data.Files):
        if role == "generated" and any(name.lower().endswith((".jpg", ".jpeg")) for name in images.names):
            note(f"warning: {source} holds JPEG files: compression alone moves an FID; save samples as PNG or npz")
        if not size:
            check_sizes(images)
    found = len(images)
    if role == "generated":
        check_count(source, found, cfg.num)
    chosen = torch.arange(found)
    if cfg.subset and cfg.subset < found:
        chosen = torch.randperm(found, generator=data.generator("subset", cfg.seed))[:cfg.subset].sort().values
    lists = [part.tolist() for part in chosen.split(cfg.batch)][data.rank()::data.world()]
    workers = cfg.workers if cfg.workers >= 0 else min(4, os.cpu_count()) if isinstance(images, data.Files) else 0
    labels = torch.as_tensor(images.labels)[chosen] if images.num_classes > 1 else None
    batches = ((indices, *batch) for indices, batch in zip(lists, data.batches(images, lists, workers)))
    return ImageSet(source, batches, len(chosen), list(images.shape[1:]), labels)


def check_count(name: str, found: int | None, num: int) -> None:
    """--num is exact: fewer images mean that generating broke off, more that an older set lies in the same folder."""
    if num and found != num:
        count = "an unknown number of" if found is None else f"{found:,}"
        raise ValueError(f"found {count} images in {name}, --num asks for {num:,} (--subset draws some of them)")


def from_run(source: str, cfg: "Config") -> ImageSet:
    """cfg.num images that the checkpoint of a run generates from seed cfg.seed; generators of jumps do it their way."""
    if not cfg.num:
        raise ValueError(f"{source} is a run: --num says how many images to generate")
    path = sample.find_checkpoint(source)
    device = torch.device(cfg.device)
    net = model.load(path).to(device).eval()
    labels = sample.labels_for(cfg.num, net.num_classes)
    if cfg.labels == "random":
        labels = torch.randint(net.num_classes, (cfg.num,), generator=data.generator("labels", cfg.seed))
    own, usual = sample.own_settings(path)
    given = {k: v for k, v in dict(steps=cfg.steps, solver=cfg.solver, guidance=cfg.guidance).items() if v}
    if wrong := [name for name, value in given.items() if own.get(name, value) != value]:
        raise ValueError(f"--{wrong[0]} {given[wrong[0]]}: {source} jumps to the data in its own way; leave it out")
    options = dict(steps=50, solver="ab2", guidance=1.0) | usual | given
    made = f"{sample.describe(told=net.guided, **options)}, EMA weights, {cfg.labels} labels, seed {cfg.seed}"
    codec = data.load_vae(cfg.vae).to(device) if cfg.vae else None
    batches = ((indices, images, labels[indices])
               for indices, images in sample.generate(net, labels, cfg.seed, cfg.batch, codec=codec, **options))
    size = list(sample.image_shape(net, codec)[1:])
    return ImageSet(source, batches, cfg.num, size, labels if net.num_classes > 1 else None, made)


def from_batches(source: typing.Iterable[Tensor], crop: int) -> ImageSet:
    """Any iterable of uint8 (N, 3, h, w); under torch.distributed each process passes its own share."""
    found = ImageSet("an iterable", (), None, None)

    def numbered():
        count = 0
        for images in source:
            size = list(check_images(images).shape[2:])
            found.size = found.size or size
            if size != found.size:
                raise ValueError(f"images have 2 sizes: {found.size}, and {size} after {count:,} images")
            yield [(count + k) * data.world() + data.rank() for k in range(len(images))], images, None
            count += len(images)

    if crop:
        raise ValueError(f"--size {crop} crops files; crop the batches of an iterable before they come here")
    found.batches = numbered()
    return found


def is_run(source: str) -> bool:
    """A folder with last.pt, or a file of weights."""
    path = Path(source)
    return (path / "last.pt").exists() or path.is_file() and path.suffix in (".pt", ".pth")


def open_images(source, cfg: "Config", role: str) -> ImageSet:
    """The images of any source; role: generated or reference."""
    if not isinstance(source, str):
        return from_batches(source, cfg.size)
    return from_run(source, cfg) if is_run(source) else from_dataset(source, cfg, role)


# --------------------------------------------------------------------------------------------------------------------
# 7. From images, or a statistics file, to what the scores need
# --------------------------------------------------------------------------------------------------------------------

@dataclass
class Measured:
    """What is known of an image set once its images have been through the network."""
    name: str
    n: int | None                                # images behind the moments; None where a file does not say
    meta: dict                                   # features, resize and size: must agree; {} where nobody recorded it
    moments: dict[str, tuple[Tensor, Tensor]]    # of "features" and "spatial": mean (D,) and covariance (D, D)
    rows: dict[str, Tensor] = field(default_factory=dict)  # "features" (N, D), "logits" (N, classes), if kept
    accuracy: float | None = None                # share of labels that the network finds, where there are labels
    labels: str = "unknown"
    made: str = ""

    def save(self, path: str) -> None:
        """Write what `read_statistics` reads, under ADM's names."""
        arrays = {name: value for kind, pair in self.moments.items() for name, value in zip(STORED[kind][0], pair)}
        np.savez(path, **arrays, n=self.n or 0, meta=json.dumps(self.meta))


def with_progress(images: ImageSet) -> typing.Iterator[tuple]:
    """The batches of this process, with the progress of all on rank 0."""
    with tqdm(total=images.n, unit="img", desc=images.name, delay=2, disable=data.rank() > 0) as bar:
        for batch in images.batches:
            yield batch
            bar.update(min(len(batch[0]) * data.world(), (images.n or sys.maxsize) - bar.n))


@torch.no_grad()
def measure(net: InceptionV3 | GlyphNet, images: ImageSet, keep: typing.Collection[str] = ()) -> Measured:
    """One pass of an image set through the network: moments of all its features, and the rows of those in `keep`.

    Under torch.distributed each process measures its share, and all of them get the whole, rows in order of index.
    """
    device = next(net.parameters()).device
    graded = isinstance(net, GlyphNet) and images.labels is not None and bool((images.labels < 10).all())
    sums = {kind: Statistics(net.widths[kind], device) for kind in STORED if kind in net.widths}
    rows = {name: Rows(net.widths[name], images.n or 1000) for name in keep}
    order, right = [], torch.zeros((), dtype=torch.float64, device=device)
    for indices, pixels, labels in with_progress(images):
        out = net.extract(pixels.to(device))
        for kind, total in sums.items():
            total.update(out[kind])
        for name, kept in rows.items():
            kept.add(out[name].cpu())
        if graded:
            right += (out["logits"].argmax(1) == labels.to(device)).sum()
        order += indices
    for total in sums.values():
        total.all_reduce()
    if data.world() > 1:
        dist.all_reduce(right)
    place = gather(torch.tensor(order, dtype=torch.int64)).argsort()
    for name in rows:
        rows[name] = rows[name].in_order(place)
    n = sums["features"].n
    return Measured(images.name, n, dict(features=net.label, resize=net.resize, size=images.size),
                    {kind: total.mean_cov() for kind, total in sums.items()}, rows,
                    float(right) / n if graded else None, describe_labels(images.labels), images.made)


def describe_labels(labels: Tensor | None) -> str:
    """As many of each class make a lower FID than labels drawn at random, so it belongs to the protocol."""
    if labels is None or not len(labels):
        return "unknown"
    low, high = labels.bincount().aminmax()
    return f"balanced, {low} a class" if low == high else f"{low} to {high} a class"


STORED = {"features": (("mu", "sigma"), ("ref_mu", "ref_sigma")), "spatial": (("mu_s", "sigma_s"),)}  # names in files


def stored_arrays(path: str) -> dict:
    """The arrays of a statistics file, .npz or .pt, that are about statistics; {} for other files."""
    wanted = {"n", "meta", *(name for pairs in STORED.values() for pair in pairs for name in pair)}
    if path.endswith((".pkl", ".pickle")):
        raise ValueError(f"{path}: reading a pickle runs the code in it; convert it once to npz: "
                         "numpy.savez('reference.npz', mu=..., sigma=...)")
    if path.endswith(".npz"):
        names = npz_members(path) & wanted
        with readable(path), np.load(path) as file:
            return {name: file[name] for name in names}
    if path.endswith(".pt"):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # a checkpoint of some older kind, which model.load knows to read or to explain
            return {}
        return {name: found[name] for name in wanted & found.keys()} if isinstance(found, dict) else {}
    return {}


def read_statistics(path: str) -> Measured | None:
    """The moments of a statistics file, or None for files without any."""
    arrays, moments = stored_arrays(path), {}
    for kind, pairs in STORED.items():
        for mean, cov in pairs:
            if mean in arrays and cov in arrays:
                moments[kind] = tuple(torch.as_tensor(arrays[name]).double() for name in (mean, cov))
    if "features" not in moments:
        return None
    meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    return Measured(path, int(arrays.get("n", 0)) or None, meta, moments)


def check_protocol(name: str, meta: dict, ours: dict) -> None:
    """ValueError when features, resize rule or image size of a set (None: not known yet) are not those of this run."""
    def words(known):
        return ", ".join(f"{key}={value}" for key, value in known.items())

    if any(meta[key] != ours[key] for key in meta.keys() & ours.keys() if meta[key] and ours[key]):
        raise ValueError(f"{name}: statistics were made with {words(meta)}; this run uses {words(ours)}: recompute "
                         "with --save_stats, or crop all images alike with --size")


def check_unrecorded(name: str, net: InceptionV3 | GlyphNet) -> None:
    """A statistics file without our record is taken for one of the 2015-12-05 weights, as published ones are."""
    if net.suffix:
        raise ValueError(f"{name} does not say how it was made. Published statistics are of the 2015-12-05 weights: "
                         "use --weights fid; those of other features can only be compared when made with --save_stats")
    note(f"warning: {name} does not say how it was made: taken for the 2015-12-05 weights, {net.resize}")


class Source:
    """One side of a comparison, opened: whatever can be wrong with it shows before any image is measured."""

    def __init__(self, source, net: InceptionV3 | GlyphNet, cfg: "Config", role: str, keep: list[str]):
        source = str(source) if isinstance(source, os.PathLike) else source
        self.net, self.keep, self.num = net, keep, cfg.num if role == "generated" else 0
        path = isinstance(source, str) and Path(source).is_file()
        self.stored = read_statistics(source) if path else None
        self.has_images = not self.stored or source.endswith(".npz") and "arr_0" in npz_members(source)
        if self.stored:
            check_protocol(source, self.stored.meta, dict(features=net.label, resize=net.resize))
            check_count(source, self.stored.n, self.num)
        if self.stored and not self.stored.meta:
            check_unrecorded(source, net)
        if self.stored and self.has_images:
            note(f"{source}: Frechet distances from its mu and sigma, " +
                 ("the rest from its images (arr_0)" if keep else "not from its images (arr_0)"))
        self.images = open_images(source, cfg, role) if self.has_images and (keep or not self.stored) else None
        self.name, size = (self.images.name, self.images.size) if self.images else (source, None)
        self.meta = dict(features=net.label, resize=net.resize, size=size) | (self.stored.meta if self.stored else {})

    def measure(self) -> Measured:
        if not self.images:
            return self.stored
        found = measure(self.net, self.images, self.keep)
        if self.stored:
            found.moments, found.n = self.stored.moments, self.stored.n
        elif self.images.n is None:  # an iterable, whose end tells how many they are
            check_count(self.name, found.n, self.num)
        return found


# --------------------------------------------------------------------------------------------------------------------
# 8. Scores
# --------------------------------------------------------------------------------------------------------------------

def note(text: str) -> None:
    """Tell the user something, on rank 0 and on stderr, where it does not spoil --json."""
    if data.rank() == 0:
        print(text, file=sys.stderr)


def warn_of_few(n: int, dim: int, floor: float) -> None:
    if n < 2 * dim:
        note(f"warning: only N={n:,} < 2*{dim:,} samples: the Frechet distance is dominated by bias "
             f"(floor ~{floor:.3g}); prefer KID")


def score_name(base: str, net: InceptionV3 | GlyphNet, n: int | None) -> str:
    """The key of a score: fid only for the 2015-12-05 weights and 50,000 images or more, else fid5k, fid_torchvision,
    fd_glyphs and the like."""
    if base == "fid" and not isinstance(net, InceptionV3):
        base = "fd"
    elif base in ("fid", "sfid") and (n is None or n < 50_000):
        base += "_of_unknown_n" if n is None else str(n) if n % 1000 else f"{n // 1000}k"
    return base + net.suffix


def title(name: str) -> str:
    """fid5k_torchvision -> FID5k (torchvision weights)."""
    for key, shown in (("_torchvision", " (torchvision weights)"), ("fd_glyphs", "FD-glyphs"),
                       ("_glyphs", " (GlyphNet)"), ("sfid", "sFID"), ("fid", "FID"), ("kid", "KID")):
        name = name.replace(key, shown)
    return "IS" + name[2:] if name.startswith("is") else name


def compare(net: InceptionV3 | GlyphNet, gen: Measured, ref: Measured, metrics: typing.Collection[str]) -> dict:
    """{name: dict(value, ...)} for the metrics that both sides have the material for; a note tells of the others."""
    scores = {}
    for metric, kind in (("fid", "features"), ("sfid", "spatial")):
        if metric not in metrics or kind not in net.widths:
            continue
        lacking = next((side for side in (gen, ref) if kind not in side.moments), None)
        if lacking:
            note(f"{lacking.name} has no mu_s/sigma_s: sFID skipped")
        else:
            found = frechet_with_bias(*gen.moments[kind], gen.n, *ref.moments[kind], ref.n)
            scores[score_name(metric, net, gen.n)] = found | dict(n=gen.n, n_ref=ref.n)
    if "is" in metrics and "logits" in gen.rows:
        scores["is" + net.suffix] = inception_score(gen.rows.pop("logits"))
    elif "is" in metrics:
        note(f"{gen.name} has no images: Inception Score skipped")
    wanted = [name for name in (*NEIGHBOURS, "kid") if name in metrics]
    lacking = next((side for side in (ref, gen) if "features" not in side.rows), None)  # ref: without it, none are kept
    if wanted and lacking:
        note(f"{lacking.name} has no images (arr_0): {', '.join(wanted)} skipped")
    elif wanted:
        scores |= compare_rows(net, gen.rows["features"], ref.rows["features"], wanted)
    return scores


def compare_rows(net: InceptionV3 | GlyphNet, fake: Tensor, real: Tensor, wanted: list[str]) -> dict:
    """The scores among `wanted` that need the features of single images: NEIGHBOURS and kid."""
    device, counts, found = next(net.parameters()).device, dict(n=len(fake), n_ref=len(real)), {}
    with full_float32(device):
        fake, real = fake.to(device), real.to(device)
        if set(NEIGHBOURS) & set(wanted):
            found = {name: dict(value=value) for name, value in neighbour_scores(real, fake).items()}
        if "kid" in wanted:
            found["kid"] = kernel_distance(real, fake)
    return {name + net.suffix: found[name] | counts for name in wanted}


def real_glyphs(net: GlyphNet, n: int, size: int, keep: typing.Collection[str] = ()) -> tuple[Measured, float]:
    """n held-out real glyphs, measured, and the floor of FD-glyphs: their distance to n others, which is what a perfect
    generator gets with as many images of each digit."""
    measured = []
    for seed in (HELD_OUT, HELD_OUT_AGAIN):
        images, labels = data.glyphs(n, size, seed)
        shares = torch.arange(n).split(500)[data.rank()::data.world()]
        batches = ((share.tolist(), images[share], labels[share]) for share in shares)
        measured.append(measure(net, ImageSet(f"glyphs:{seed}", batches, n, [size, size], labels), keep))
    return measured[0], frechet_distance(*(part for side in measured for part in side.moments["features"]))


def score_glyphs(images: Tensor, labels: Tensor | None = None) -> dict:
    """Score generated glyphs, uint8 (N, 3, s, s), and labels (N,) if known -> dict(fd_glyphs, floor, accuracy, n).

    fd_glyphs: Frechet distance of GlyphNet's features to n real glyphs of seed HELD_OUT; floor: see `real_glyphs`;
    accuracy: share of images that GlyphNet gives the label asked for, None without labels. Under torch.distributed
    each process passes its own share, of any size, and all get the score of the whole, of n images.
    """
    net = glyph_net().to(images.device)
    batches = ((part.tolist(), images[part], None if labels is None else labels[part])
               for part in torch.arange(len(images)).split(500))
    found = measure(net, ImageSet("generated glyphs", batches, None, list(images.shape[2:]), labels))
    real, floor = real_glyphs(net, found.n, images.shape[-1])
    warn_of_few(found.n, net.widths["features"], floor)
    return dict(fd_glyphs=frechet_distance(*found.moments["features"], *real.moments["features"]), floor=floor,
                accuracy=found.accuracy, n=found.n)


def evaluate(generated, reference="", net: nn.Module | None = None, **options) -> dict:
    """The scores of an image set against a reference, with their protocol, as a dict of plain values.

    generated, reference: see the head of this file; a list of generated sets gives their mean and spread. Without
    reference only statistics are made (save_stats). options: the fields of `Config`, such as num=50_000,
    weights="fid". With features="glyphs" the reference "glyphs" means as many held-out real ones as are generated.
    net: other features; a module with what GlyphNet has: extract, widths, metrics, label, resize and suffix.
    Returns dict(scores={name: dict(value, bias, floor, ...)}, generated, n, reference, n_ref, features, resize, size,
    ...); names of scores: `score_name`. Under torch.distributed all processes call it, and all get the whole.
    """
    cfg = Config(**options)
    wanted = check_config(cfg)
    cfg.device = str(data.start_processes(cfg.device))
    net = feature_net(cfg) if net is None else net
    metrics = [name for name in wanted if name in net.metrics]
    if not metrics:
        raise ValueError(f"--metrics {cfg.metrics}: on {net.label} there are {','.join(net.metrics)}")
    held_out = reference == "glyphs" and isinstance(net, GlyphNet)
    sources, ref = open_sides(generated, reference, held_out, net, cfg, metrics)
    measured, results = ref.measure() if ref else None, []
    for source in sources:
        gen = source.measure()
        if cfg.save_stats and data.rank() == 0:
            gen.save(cfg.save_stats)
        results.append(describe(net, gen, *scores_of(net, gen, measured, held_out, metrics)))
    return results[0] if len(results) == 1 else spread(results)


def feature_net(cfg: "Config") -> InceptionV3 | GlyphNet:
    if cfg.features == "glyphs":
        return glyph_net().to(cfg.device)
    return load_inception(cfg.weights, cfg.resize).to(cfg.device).fast()


def open_sides(generated, reference, held_out: bool, net: InceptionV3 | GlyphNet, cfg: "Config",
               metrics: list[str]) -> tuple[list[Source], Source | None]:
    """The generated sets and the reference, checked against each other before any of them is measured. There is no
    reference yet where it is `held_out` glyphs. The features of single images are kept where a metric needs them."""
    by_rows = bool(reference) and any(name in metrics for name in (*NEIGHBOURS, "kid"))
    ref = Source(reference, net, cfg, "reference", ["features"] * by_rows) if reference and not held_out else None
    by_rows = by_rows and (held_out or ref.has_images)
    keep = ["features"] * by_rows + ["logits"] * ("is" in metrics)
    several = isinstance(generated, list) and all(isinstance(source, str) for source in generated)
    sources = [Source(source, net, dataclasses.replace(cfg, seed=cfg.seed + k), "generated", keep)
               for source in (generated if several else [generated]) for k in range(cfg.repeat)]
    for source in sources:
        check_protocol(source.name, source.meta, ref.meta if ref else {})
    return sources, ref


def scores_of(net: InceptionV3 | GlyphNet, gen: Measured, ref: Measured | None, held_out: bool,
              metrics: list[str]) -> tuple[dict, Measured | None]:
    """The scores of a measured set, and the reference: of `held_out` glyphs there are as many as are generated."""
    floor, scores = None, {}
    if isinstance(net, GlyphNet) and (ref or held_out):
        real, floor = real_glyphs(net, gen.n, gen.meta["size"][0], ("features",))
        ref = real if held_out else ref
    if ref:
        check_protocol(gen.name, gen.meta, ref.meta)  # again: the size of an iterable's images shows in the end
        scores = compare(net, gen, ref, metrics)
        if "fd_glyphs" in scores and floor is not None:
            scores["fd_glyphs"]["floor"] = floor  # of real images rather than expected
        floors = [score["floor"] for score in scores.values() if score.get("floor") is not None]
        if floors:
            warn_of_few(gen.n, net.widths["features"], floors[0])
    if gen.accuracy is not None:
        scores["accuracy"] = dict(value=gen.accuracy)
    return scores, ref


def describe(net: InceptionV3 | GlyphNet, gen: Measured, scores: dict, ref: Measured | None) -> dict:
    """The scores of one generated set and how they came about: what `evaluate` returns."""
    return dict(scores=scores, generated=gen.name, n=gen.n, labels=gen.labels, made=gen.made,
                reference=ref.name if ref else None, n_ref=ref.n if ref else None,
                features=net.label, resize=net.resize, size=gen.meta.get("size"))


def spread(results: list[dict]) -> dict:
    """Mean and standard deviation of each score over several results of the same protocol; `sets` has them singly."""
    names = results[0]["scores"].keys()
    for one in results:
        if one["scores"].keys() != names:
            raise ValueError(f"only sample sets of one size and kind have a spread: {results[0]['generated']} has "
                             f"{', '.join(names)}; {one['generated']} has {', '.join(one['scores'])}")
    values = {name: [one["scores"][name]["value"] for one in results] for name in names}
    scores = {name: dict(value=statistics.mean(found), std=statistics.stdev(found), sets=len(found))
              for name, found in values.items()}
    if any("fid" in name for name in names):
        note("note: retraining moves an FID by 1 to 2 %, three times what new samples do: differences below that say "
             "nothing about a method (arXiv:2606.20536)")
    generated = ", ".join(dict.fromkeys(one["generated"] for one in results))
    return results[0] | dict(scores=scores, generated=generated, sets=results)


# --------------------------------------------------------------------------------------------------------------------
# 9. Command line
# --------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    generated: str = option("", "images, statistics, a run folder, glyphs or glyphs:SEED; A,B,C: several sets")
    reference: str = option("", "the same; with --features glyphs, glyphs means held-out real ones")
    features: str = option("inception", "whose features to compare", choices=("inception", "glyphs"))
    weights: str = option("torchvision", "of InceptionV3: torchvision, fid (published FIDs), or a file")
    resize: str = option("tf1", "how images become 299 pixels wide: tf1 (published FIDs), pytorch (half-pixel bilinear "
                         "of pytorch-fid), clean (antialiased bicubic of clean-fid)", choices=tuple(RESIZES))
    metrics: str = option(",".join(METRICS), "which to compute")
    num: int = option(0, "how many generated images there must be, or how many a run generates; 0: any")
    subset: int = option(0, "draw so many images of each side, once for all; 0: use all")
    size: int = option(0, "crop and scale all images to this many pixels; 0 keeps them as they are")
    batch: int = option(32, "images at a time; more take more memory")
    workers: int = option(-1, "processes that decode image files; -1: up to 4 for files, none for arrays")
    steps: int = option(0, "a run as GENERATED: solver steps; 0: as many as the run has for its samples, or 50")
    solver: str = option("", "the same: how its flow is integrated; empty: its own way, or ab2", ("", *sample.SOLVERS))
    guidance: float = option(1.0, "the same: guidance scale; 1 is none")
    vae: str = option("", "the same: the codec's file, for networks of latents")
    labels: str = option("balanced", "the same: each class equally often, or at random as in ADM, DiT and SiT",
                         choices=("balanced", "random"))
    seed: int = option(0, "the same: sample i depends on (seed, i) only; also draws --subset")
    repeat: int = option(1, "measure so often, with seeds one apart, and give mean and spread")
    device: str = option("auto", "where the network runs", choices=("auto", "cpu", "cuda"))
    json: bool = option(False, "print the result as one JSON object")
    save_stats: str = option("", "an npz for the statistics of GENERATED; REFERENCE may then be left out")
    mmhm: str = option("", "A.json,B.json,...: rank results of --json by the harmonic mean of their scaled scores")
    bounds: str = option("", "with --mmhm: a JSON file of lowest and highest scores, written if it is not there")
    benchmark: bool = option(False, "time the Frechet distance and the feature extraction, and stop")


def check_config(cfg: Config) -> tuple[str, ...]:
    """The metrics asked for; ValueError for options that cannot be."""
    metrics = tuple(cfg.metrics.split(","))
    wrong = [name for name in metrics if name not in METRICS]
    if wrong:
        raise ValueError(f"--metrics {wrong[0]}: choose from {','.join(METRICS)}")
    for name in ("features", "resize", "labels", "solver"):
        choices = Config.__dataclass_fields__[name].metadata["choices"]
        if getattr(cfg, name) not in choices:
            raise ValueError(f"--{name} {getattr(cfg, name)}: choose from {', '.join(choices)}")
    if cfg.batch < 1 or cfg.repeat < 1 or min(cfg.num, cfg.subset, cfg.size) < 0:
        raise ValueError(f"--batch {cfg.batch} --repeat {cfg.repeat} --num {cfg.num} --subset {cfg.subset} --size "
                         f"{cfg.size}: expected batch and repeat of at least 1 and the rest of at least 0")
    if cfg.save_stats and not cfg.save_stats.endswith(".npz"):
        raise ValueError(f"--save_stats {cfg.save_stats}: the name must end in .npz")
    return metrics


def as_text(found: dict) -> str:
    """The result of `evaluate` for people: a line for each score, with the reference it stands against."""
    lines = []
    for name, score in found["scores"].items():
        extras = [f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
                  for key, value in score.items() if key != "value" and value is not None]
        extras += [] if name.startswith(("is", "accuracy")) else [f"against {found['reference']}"]
        value = 0.0 if -1e-3 < score["value"] < 0 and "bias" in score else score["value"]  # rounding of a distance 0
        digits = 6 if name.startswith("kid") else 4  # a KID is some thousandths
        lines.append(f"{title(name):34} {value:10.{digits}f}   {', '.join(extras)}")
    protocol = {key: value for key, value in found.items() if key not in ("scores", "sets") and value}
    return "\n".join(lines + [f"{key:10} {value}" for key, value in protocol.items()])


def rank_models(files: list[str], bounds_file: str) -> str:
    """MMHM of several results of --json, over FID, IS, precision and recall as far as all of them have these."""
    known = json.loads(Path(bounds_file).read_text()) if bounds_file and Path(bounds_file).exists() else None
    models = {file: {name: score["value"] for name, score in json.loads(Path(file).read_text())["scores"].items()}
              for file in files}
    common = [name for name in known or models[files[0]] if name.startswith(("fid", "fd_", "is", "precision", "recall"))
              and all(name in scores for scores in models.values())]
    means, bounds = mmhm({file: {name: scores[name] for name in common} for file, scores in models.items()}, known)
    if bounds_file and not known:
        Path(bounds_file).write_text(json.dumps(bounds, indent=2) + "\n")
    names = ", ".join(title(name) for name in bounds)
    lines = [f"{mean:.4f}   {file}" for file, mean in sorted(means.items(), key=lambda item: -item[1])]
    return "\n".join([f"MMHM of {names}, bounds {bounds_file if known else 'of these results'}", *lines])


def known_distance(d: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Two Gaussians whose covariances do not commute, and their exact distance: mu1, cov1, mu2, cov2, distance.

    A symmetric positive T = 1 + E is the optimal transport map of N(mu1, cov1) to N(mu2, T cov1 T), so the distance is
    |mu1 - mu2|^2 + tr(E cov1 E). The spectrum of cov1 falls like that of Inception features.
    """
    rng = data.generator("known distance", d)
    mu1, mu2, v, e = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((d,), (d,), (d,), (d, d)))
    mu1, mu2, e = 0.01 * mu1, 0.01 * mu2, 0.05 * (e + e.T) / (2 * d) ** 0.5  # eigenvalues of e within +-0.1
    mirror = torch.eye(d, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)  # the eigenvectors of cov1
    cov1 = mirror * (15 * torch.arange(1, d + 1, dtype=torch.float64) ** -1.1) @ mirror
    ec = e @ cov1
    ece = ec @ e
    return mu1, cov1, mu2, cov1 + ec + ec.T + ece, float((mu1 - mu2).square().sum() + ece.trace())


def benchmark_distance(d: int) -> None:
    """Errors and times of our Frechet distance and of scipy's sqrtm, where the truth is known."""
    from scipy.linalg import sqrtm  # this comparison is all we use scipy for
    mu1, cov1, mu2, cov2, exact = known_distance(d)

    def by_sqrtm() -> float:  # no disp=: SciPy 1.18 dropped that argument
        root = sqrtm((cov1 @ cov2).numpy())
        return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real)

    calls = dict(ours=lambda: frechet_distance(mu1, cov1, mu2, cov2), sqrtm=by_sqrtm)
    seconds = model.in_turn(calls, 3, "cpu")
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
                nn.init.kaiming_normal_(module.weight)  # torch's own starting weights would let the features fade to 0
    images, plain = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device), plain.to(device)
    built_8, folded, fast = copy.deepcopy(plain), copy.deepcopy(plain).fast(), copy.deepcopy(plain).fast()
    built_8.at_once, folded.at_once = 8, sys.maxsize
    nets = {"as built": plain, "as built, 8 at once": built_8, "folded, channels-last": folded, "the same, 8 at once": fast}
    calls = {name: lambda net=net: net.extract(images)["features"].sum().item() for name, net in nets.items()}
    seconds = model.in_turn(calls, rounds, device.type)
    print(f"Feature extraction on {device}, batch {batch}, 256 x 256 pixels")
    for name, time_taken in seconds.items():
        print(f"  {name:22} {batch / time_taken:7.2f} images/s   {seconds['as built'] / time_taken:.2f} times as built")
    return seconds["the same, 8 at once"] / batch


def benchmark_rest(device: torch.device, n: int, per_image: float) -> None:
    """Seconds that all scores of n images against n take once the features are there, beside those of the features."""
    net, sides = InceptionV3().to(device), []
    for seed in (0, 1):
        rng, sums = torch.Generator().manual_seed(seed), {}
        rows = {name: torch.randn(n, width, generator=rng).relu() for name, width in net.widths.items()}
        start = time.perf_counter()
        for kind in STORED:
            sums[kind] = Statistics(net.widths[kind])
            sums[kind].update(rows[kind])
        moments = {kind: total.mean_cov() for kind, total in sums.items()}
        sides.append((time.perf_counter() - start, Measured(str(seed), n, {}, moments, rows)))
    start = time.perf_counter()
    compare(net, sides[0][1], sides[1][1], METRICS)
    seconds = time.perf_counter() - start + sum(taken for taken, _ in sides)
    print(f"All scores of {n:,} images against {n:,}: {seconds:.1f} s; their features {2 * n * per_image:.0f} s")


def benchmark(d: int = 2048, batch: int = 32, rounds: int = 5, n: int = 5000) -> None:
    """Print what the Frechet distance, the features and the rest cost, alternatives in turn in one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark_distance(d)
    benchmark_rest(device, n, benchmark_extraction(device, batch, rounds))


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, positional=("generated", "reference"))
    if cfg == Config():
        return print(__doc__.strip())
    if cfg.benchmark:
        return benchmark()
    if cfg.mmhm:
        return print(rank_models(cfg.mmhm.split(","), cfg.bounds))
    if cfg.bounds:
        raise ValueError(f"--bounds {cfg.bounds}: goes with --mmhm A.json,B.json")
    if not cfg.generated or not (cfg.reference or cfg.save_stats):
        raise ValueError("give GENERATED and REFERENCE, or one set of images and --save_stats OUT.npz")
    sources = cfg.generated.split(",")
    if cfg.save_stats and len(sources) * cfg.repeat > 1:
        raise ValueError(f"--save_stats {cfg.save_stats}: of one set of images, got {len(sources) * cfg.repeat}")
    options = dataclasses.asdict(cfg)
    found = evaluate(sources if len(sources) > 1 else sources[0], cfg.reference,
                     **{name: options[name] for name in options if name not in ("generated", "reference")})
    if found["features"].startswith("inception torchvision"):
        note("warning: torchvision's weights are not comparable with published FIDs, which go with --weights fid")
    if data.rank() == 0:
        print(json.dumps(found) if cfg.json else as_text(found))
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
