"""Frechet distances between image sets, each with its protocol.

    python fid.py GENERATED REFERENCE                   FID on InceptionV3 features (needs a weights file, once)
    python fid.py GENERATED glyphs --features glyphs    FD-glyphs, its floor, and the accuracy: nothing to download
    python fid.py IMAGES --save_stats OUT.npz           statistics, to stand for IMAGES later
    python fid.py --benchmark                           our Frechet distance and scipy's sqrtm where truth is known

GENERATED and REFERENCE are whatever `data.dataset` reads (a folder, a zip, an npz of images, glyphs), or an npz with
`mu` and `sigma`: one of ours, or ADM's reference files. `python fid.py --help` lists the other flags.

Which numbers to believe. "FID" is the distance on the 2015-12-05 weights (--weights fid) for 50,000 images or more;
with fewer it is called FID-N, because the distance of N images exceeds its limit by about C / N. The default weights
are torchvision's: other features, another unit, so that number is called "FID (torchvision weights)" and compares
with its like only. "FD-glyphs" is the distance on our own small classifier, for experiments with `glyphs`.

Letters: N images, D features.
"""
import contextlib
import functools
import hashlib
import inspect
import json
import os
import statistics
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from data import option

HELD_OUT, HELD_OUT_AGAIN = 1, 2  # seeds of real glyphs that only measure; generators train on seed 0, GlyphNet on 3


# --------------------------------------------------------------------------------------------------------------------
# 1. The Frechet distance of two Gaussians
# --------------------------------------------------------------------------------------------------------------------

def trace_sqrt(cov1: Tensor, cov2: Tensor) -> Tensor:
    """tr (cov1 cov2)^(1/2) = sum_i sqrt(eig_i(L^T cov2 L)) for any factor cov1 = L L^T; a scalar.

    A Cholesky factor keeps small eigenvalues to relative accuracy; the square root of the product cov1 cov2 adds
    about sqrt(machine epsilon) for each direction without variance.
    """
    for a, b in ((cov1, cov2), (cov2, cov1)):  # one positive definite matrix is enough
        L, failed = torch.linalg.cholesky_ex(a)
        if not failed:
            break
    else:  # both singular: N <= D, or features that are always zero
        values, vectors = torch.linalg.eigh(cov1)
        L, b = vectors * values.clamp_min(0).sqrt(), cov2
    m = L.T @ b @ L
    return torch.linalg.eigvalsh((m + m.T) / 2).clamp_min(0).sqrt().sum()


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))   (Heusel et al., arXiv:1706.08500, Eq. 6)

    Means (D,) and covariances (D, D), numpy or torch; in float64 on the CPU. The unit is that of the features,
    squared. Equal arguments may give -1e-9 or so by rounding, which is returned as it is.
    ValueError when the shapes do not belong together or a value is not finite.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2))
    d = mu1.numel()
    if mu1.shape != (d,) or mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise ValueError(f"mean {tuple(mu1.shape)} and covariance {tuple(cov1.shape)} do not compare with "
                         f"mean {tuple(mu2.shape)} and covariance {tuple(cov2.shape)}: other features?")
    for name, value in dict(mu1=mu1, cov1=cov1, mu2=mu2, cov2=cov2).items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has non-finite values: the features of that image set overflowed")
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_sqrt(cov1, cov2))


# --------------------------------------------------------------------------------------------------------------------
# 2. Mean and covariance of a stream of features
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
        self.outer += features.T @ features

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


# --------------------------------------------------------------------------------------------------------------------
# 3. InceptionV3, with torchvision's weights or with those of the FID
# --------------------------------------------------------------------------------------------------------------------

class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU: the unit of both networks of this file."""

    def __init__(self, i: int, o: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


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
                h = torch.cat([getattr(self, key)(h) for key in keys], 1)
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


@contextlib.contextmanager
def full_float32(device: torch.device):
    """Autocast off, and TF32 off in convolutions: a metric must not depend on such settings (bfloat16: 8e-3)."""
    with torch.autocast(device.type, enabled=False), \
         torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


def digest(*chunks: bytes) -> str:
    """The first 8 hex digits of the sha256 of the chunks."""
    return hashlib.sha256(b"".join(chunks)).hexdigest()[:8]


CLASSES = {"torchvision": 1000, "fid": 1008}


class InceptionV3(nn.Module):
    """The feature network of the FID: uint8 (N, 3, h, w) -> pool3 features float32 (N, 2048).

    `weights` is a state dict file with torchvision's key names; its number of classes tells the flavour, "torchvision"
    or "fid" (the 2015-12-05 graph). None keeps random weights, of flavour "torchvision" unless told otherwise.
    Images are resized by `resize_tf1` and go to (x - 128) / 128 for "fid", to x / 127.5 - 1 for "torchvision".
    Always in eval mode and float32, without gradients. ValueError for a file that is damaged, or not of that flavour.
    """
    dim = 2048

    def __init__(self, weights: str | Path | None = None, flavour: str | None = None):
        super().__init__()
        found, state = read_inception(weights) if weights else (flavour or "torchvision", None)
        if flavour not in (None, found):
            raise ValueError(f"{weights} has fc.weight of {CLASSES[found]} classes: {found} weights, not {flavour}")
        self.flavour = found
        self.label = f"inception {found} {digest(Path(weights).read_bytes()) if weights else 'random'}"
        self.resize = "tf1 bilinear to 299, " + ("(x-128)/128" if found == "fid" else "x/127.5-1")
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3, padding=1), Conv(64, 80, 1)
        self.Conv2d_4a_3x3, channels, self.blocks = Conv(80, 192, 3), 192, inception_blocks(found)
        for name, (branches, pool) in self.blocks.items():
            self.add_module(name, Mixed(channels, branches, pool))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, CLASSES[found])
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

    @torch.no_grad()
    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Float (N, 3, 299, 299), already in range -> pool3 (N, 2048), spatial (N, 2023), logits (N, classes).

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
            pool3 = x.mean((2, 3))
            return dict(pool3=pool3, spatial=spatial, logits=(pool3.double() @ self.fc.weight.double().T).float())

    def forward(self, images: Tensor) -> Tensor:
        x = resize_tf1(check_images(images))
        return self.outputs((x - 128) / 128 if self.flavour == "fid" else x / 127.5 - 1)["pool3"]


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


def load_inception(weights: str = "torchvision") -> InceptionV3:
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
        return InceptionV3(path, flavour)


# --------------------------------------------------------------------------------------------------------------------
# 4. GlyphNet, the features of `glyphs`, trained on the spot
# --------------------------------------------------------------------------------------------------------------------

class GlyphNet(nn.Module):
    """A digit classifier: uint8 (N, 3, h, w) -> (penultimate features float32 (N, 64), logits (N, 10)).

    Images of another size are first averaged down to, or repeated up to, 32 x 32. It sees shape, contrast, blur and
    noise, and hardly any hue: digits are told by their strokes.
    """
    dim, resize = 64, "mean over cells to 32, x/127.5-1"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            Conv(3, 16, 3, padding=1), nn.MaxPool2d(2),   # (N, 16, 16, 16)
            Conv(16, 32, 3, padding=1), nn.MaxPool2d(2),  # (N, 32, 8, 8)
            Conv(32, 64, 3, padding=1), nn.MaxPool2d(2),  # (N, 64, 4, 4)
            nn.Conv2d(64, self.dim, 4), nn.Flatten())     # (N, 64); no ReLU, since features stuck at 0 measure nothing
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.dim, 10))

    @property
    def label(self) -> str:
        """Name and digest of the weights, whose last bits differ from machine to machine."""
        return f"glyphnet {digest(*(value.cpu().numpy().tobytes() for value in self.state_dict().values()))}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with full_float32(images.device):
            features = self.body(F.adaptive_avg_pool2d(data.to_float(check_images(images)), 32))
            return features, self.head(features)


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


def note(text: str) -> None:
    """Tell the user something, on rank 0 and on stderr, where it does not spoil --json."""
    if data.rank() == 0:
        print(text, file=sys.stderr)


def warn_of_few(n: int, dim: int) -> None:
    if n < 2 * dim:
        note(f"warning: {n:,} images for {dim:,} features: below {2 * dim:,} the distance is mostly small-sample bias")


# --------------------------------------------------------------------------------------------------------------------
# 5. Scores
# --------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(net: InceptionV3 | GlyphNet, batches, total: int, task: str) -> tuple[Statistics, float]:
    """Statistics of the features, and the share of images that GlyphNet gives their label, over all processes.

    `batches` yields this process' (uint8 (b, 3, h, w), labels (b,)); `total` is how many images the bar expects.
    """
    device = next(net.parameters()).device
    stats, right = Statistics(net.dim, device), torch.zeros((), dtype=torch.float64, device=device)
    with tqdm(total=total, unit="img", desc=task, delay=2, disable=data.rank() > 0) as bar:
        for images, labels in batches:
            features = net(images.to(device))
            if isinstance(net, GlyphNet):
                features, logits = features
                right += (logits.argmax(1) == labels.to(device)).sum()
            stats.update(features)
            bar.update(len(images))
    stats.all_reduce()
    if data.world() > 1:
        dist.all_reduce(right)
    return stats, float(right) / max(stats.n, 1)


def real_glyphs(net: GlyphNet, n: int, size: int) -> tuple[tuple[Tensor, Tensor], float]:
    """(mean, covariance) of the features of n held-out real glyphs, and the floor of FD-glyphs: their distance to n
    others, which is what a perfect generator gets with as many images of each digit."""
    rank, world = data.rank(), data.world()
    moments = []
    for seed in (HELD_OUT, HELD_OUT_AGAIN):
        images, labels = (part[rank::world] for part in data.glyphs(n, size, seed))
        batches = zip(images.split(500), labels.split(500))
        moments.append(measure(net, batches, len(images), "real glyphs")[0].mean_cov())
    return moments[0], frechet_distance(*moments[0], *moments[1])


def score_glyphs(images: Tensor, labels: Tensor | None = None) -> dict:
    """Score generated glyphs, uint8 (N, 3, s, s), and labels (N,) if known -> dict(fd_glyphs, floor, accuracy, n).

    fd_glyphs: Frechet distance of GlyphNet's features to n real glyphs of seed HELD_OUT; floor: see `real_glyphs`;
    accuracy: share of images that GlyphNet gives the label asked for, None without labels. Under torch.distributed
    each process passes its own share, of any size, and all get the score of the whole, of n images.
    """
    net, shown = glyph_net().to(images.device), torch.zeros(len(images)) if labels is None else labels
    stats, accuracy = measure(net, zip(images.split(500), shown.split(500)), len(images), "generated glyphs")
    warn_of_few(stats.n, net.dim)
    real, floor = real_glyphs(net, stats.n, images.shape[-1])
    return dict(fd_glyphs=frechet_distance(*stats.mean_cov(), *real), floor=floor,
                accuracy=None if labels is None else accuracy, n=stats.n)


@dataclass
class Moments:
    """Mean (D,) and covariance (D, D) of an image set, of how many images, and how they were made."""
    name: str
    mu: np.ndarray | Tensor
    cov: np.ndarray | Tensor
    n: int | None
    meta: dict  # features (network and digest of its weights), resize rule, size [h, w]; {} where nobody recorded it
    accuracy: float | None = None  # GlyphNet's, where the labels may be digits

    def save(self, path: str) -> None:
        """Write what `stored_moments` reads; `mu` and `sigma` are ADM's names."""
        np.savez(path, mu=self.mu, sigma=self.cov, n=self.n or 0, meta=json.dumps(self.meta))


def stored_moments(path: str) -> Moments | None:
    """The `mu` and `sigma` of an npz, or None where it has none."""
    try:
        with np.load(path) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            if "arr_0" in file.files:
                note(f"{path}: using its mu and sigma, not its images (arr_0)")
            meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
            n = int(file["n"]) if "n" in file.files else 0
            return Moments(path, file["mu"], file["sigma"], n or None, meta)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz ({error})") from error


def image_moments(source: str, net: InceptionV3 | GlyphNet, num: int | None, batch: int, like: dict,
                  size: int | None = None) -> Moments:
    """Moments of an npz of statistics, or of `num` images (None: all) of what `data.dataset` reads.

    Those `num` are drawn once for all, since folders are sorted by class and glyphs repeat every ten. ValueError when
    there are fewer, or when the statistics or images are not `like` those to compare with: features, resize, size as in
    `Moments.meta`.
    """
    stored = stored_moments(source) if source.endswith(".npz") and Path(source).is_file() else None
    images = None if stored else data.dataset(source, size)
    meta = stored.meta if stored else dict(features=net.label, resize=net.resize, size=list(images.shape[1:]))
    for key in meta.keys() & like.keys():
        if meta[key] != like[key]:
            raise ValueError(f"{source} has {key} {meta[key]}, and is to be compared with {key} {like[key]}: "
                             "crop all images alike with --size, and make statistics again with --save_stats")
    found = stored.n if stored else len(images)
    if num is not None and (found is None or num > found or stored and num != found):
        raise ValueError(f"found {'an unknown number of' if found is None else f'{found:,}'} images in {source}, "
                         f"--num asks for {num:,}")
    if stored:
        if not meta and isinstance(net, GlyphNet):
            raise ValueError(f"{source} does not say how it was made; make statistics of glyphs with --save_stats")
        if not meta:
            note(f"warning: {source} does not say how it was made; published statistics go with --weights fid")
        return stored
    n = found if num is None else num
    warn_of_few(n, net.dim)
    mine = torch.randperm(found, generator=data.generator("--num"))[:n].sort().values
    mine = mine[data.rank()::data.world()].tolist()
    lists = [mine[k:k + batch] for k in range(0, len(mine), batch)]
    stats, accuracy = measure(net, data.batches(images, lists), len(mine), source)
    labelled = isinstance(net, GlyphNet) and 1 < images.num_classes <= 10
    return Moments(source, *stats.mean_cov(), n, meta, accuracy if labelled else None)


def evaluate(generated: str, reference: str, features: str = "inception", weights: str = "torchvision",
             num: int | None = None, batch: int = 64, device: str = "cpu", save_stats: str = "",
             size: int | None = None) -> dict:
    """The distance of two image sets and its protocol, as a dict of plain values that starts with metric and value.

    generated, reference: what `data.dataset` reads, or an npz with mu and sigma. features: "inception", with `weights`
    as for `load_inception`, or "glyphs", which adds the `floor` of `real_glyphs` and the accuracy for 2 to 10 classes;
    then the reference "glyphs" means as many held-out real ones as are generated. num: exactly so many generated
    images. size: crop and scale all images to it. save_stats: an npz for the statistics of `generated`; then reference
    may be "".
    """
    if features not in ("inception", "glyphs"):
        raise ValueError(f"features {features!r}: expected inception or glyphs")
    net = (glyph_net() if features == "glyphs" else load_inception(weights)).to(device)
    ours, held_out, ref = dict(features=net.label, resize=net.resize), features == reference == "glyphs", None
    if reference and not held_out:
        ref = image_moments(reference, net, None, batch, ours, size)  # first: a stored one that does not fit fails now
    gen = image_moments(generated, net, num, batch, ours | (ref.meta if ref else {}), size)
    if save_stats and data.rank() == 0:
        gen.save(save_stats)
    glyphs = {}
    if features == "glyphs" and reference:
        real, floor = real_glyphs(net, gen.n, gen.meta["size"][0])
        ref = Moments(f"glyphs:{HELD_OUT}", *real, gen.n, gen.meta) if held_out else ref
        glyphs = dict(floor=floor, accuracy=gen.accuracy)
    value = frechet_distance(gen.mu, gen.cov, ref.mu, ref.cov) if ref else None
    return dict(metric=metric_name(net, gen.n), value=value, **glyphs, generated=generated, n=gen.n,
                reference=ref and ref.name, n_ref=ref and ref.n, **ours, size=gen.meta.get("size"))


def metric_name(net: InceptionV3 | GlyphNet, n: int | None) -> str:
    """What the distance may be called: only the 2015-12-05 weights and 50,000 images or more make an FID."""
    if isinstance(net, GlyphNet):
        return "FD-glyphs"
    if net.flavour == "torchvision":
        return "FID (torchvision weights)"
    return "FID" if n and n >= 50_000 else f"FID-{n or '?'}"


# --------------------------------------------------------------------------------------------------------------------
# 6. Command line
# --------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    generated: str = option("", "image folder, zip, npz of images or statistics, glyphs, glyphs:SEED")
    reference: str = option("", "the same; with --features glyphs, glyphs means held-out real ones")
    features: str = option("inception", "whose features to compare", choices=("inception", "glyphs"))
    weights: str = option("torchvision", "of InceptionV3: torchvision, fid, or a file")
    num: int = option(0, "use exactly so many generated images, drawn once for all; 0: use all")
    size: int = option(0, "crop and scale all images to this many pixels; 0 keeps them as they are")
    batch: int = option(64, "images at a time")
    device: str = option("auto", "where the network runs", choices=("auto", "cpu", "cuda"))
    json: bool = option(False, "print the result as one JSON object")
    save_stats: str = option("", "an npz for the statistics of GENERATED; REFERENCE may then be left out")
    benchmark: bool = option(False, "compare our Frechet distance with scipy's sqrtm at D = 2048, and stop")


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


def benchmark(d: int = 2048) -> None:
    """Print errors and times, measured in turn: ours (median of three) and scipy's sqrtm (once: it takes long)."""
    from scipy.linalg import sqrtm  # this comparison is all we use scipy for
    mu1, cov1, mu2, cov2, exact = known_distance(d)

    def by_sqrtm() -> float:  # no disp=: SciPy 1.18 dropped that argument
        root = sqrtm((cov1 @ cov2).numpy())
        return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real)

    errors, seconds = {}, {"ours": [], "sqrtm": []}
    for name in ("ours", "sqrtm", "ours", "ours"):
        start = time.perf_counter()
        errors[name] = (frechet_distance(mu1, cov1, mu2, cov2) if name == "ours" else by_sqrtm()) - exact
        seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(f"Frechet distance at D = {d}, exact value {exact:.9f}, {torch.get_num_threads()} threads")
    for name in medians:
        print(f"  {name:6} error {errors[name]:+.1e}   {medians[name]:7.2f} s")
    print(f"  sqrtm takes {medians['sqrtm'] / medians['ours']:.1f} times as long")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, positional=("generated", "reference"))
    if cfg == Config():
        print(__doc__.strip())
    elif cfg.benchmark:
        benchmark()
    elif not cfg.generated or not (cfg.reference or cfg.save_stats):
        raise ValueError("give GENERATED and REFERENCE, or one set of images and --save_stats OUT.npz")
    elif cfg.save_stats and not cfg.save_stats.endswith(".npz"):
        raise ValueError(f"--save_stats {cfg.save_stats}: the name must end in .npz")
    else:
        device = data.start_processes(cfg.device)
        result = evaluate(cfg.generated, cfg.reference, cfg.features, cfg.weights, cfg.num or None, cfg.batch, device,
                          cfg.save_stats, cfg.size or None)
        text = "\n".join(f"{key:10} {value}" for key, value in result.items() if value is not None)
        if data.rank() == 0:
            print(json.dumps(result) if cfg.json else text)
        data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
