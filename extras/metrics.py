"""Seven further scores of an image set: sFID, Inception Score, precision, recall, density, coverage, KID.

    python -m extras.metrics GENERATED REFERENCE       these, FID, bias and floor, in one pass
    python fid.py GENERATED REFERENCE --metrics fid,kid

Importing this file adds them to `fid.METRICS`, with `bias` of extras/bias.py. Most need the features of
single images, which stored statistics lack; what cannot be computed is skipped with a note. Of an ADM
reference file, sFID takes mu_s and sigma_s, precision and recall its 10,000 images; ADM's evaluator has
distances in float16, which puts those two a little higher. On GlyphNet there are neither Inception Score
(ten classes have no use for it) nor KID (its kernel is made for features below 1).

Measured (2 CPU cores, 2026-11-21): all scores of 5,000 images against 5,000 take 26 s beside 878 s for their
features; of 50,000 images of 256 x 256 in an npz of 9.8 GB, against 10,000, 1.87 GiB of memory.
"""
import statistics
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
import fid
from fid import METRICS, ImageSet, Metric, Statistics

NEIGHBOURS = ("precision", "recall", "density", "coverage")

# ---- 1. What they need: the rows of single images, in order of index ----


class Rows:
    """Features (n, width) as they come, in one float32 tensor: kept batch by batch they leave memory in
    pieces."""

    def __init__(self, width: int, device="cpu", expected: int | None = None):
        self.n, self.order, self.stored = 0, [], torch.empty(expected or 1000, width)

    def update(self, rows: Tensor, indices: list[int]) -> None:
        while self.n + len(rows) > len(self.stored):
            self.stored = torch.cat([self.stored, torch.empty_like(self.stored)])
        self.stored[self.n:self.n + len(rows)] = rows.cpu()
        self.n += len(rows)
        self.order += indices

    def finish(self) -> Tensor:
        """Those of all processes (N, width), on the CPU, in order of index."""
        place = gather(torch.tensor(self.order, dtype=torch.int64)).argsort()
        found = gather(self.stored[:self.n])
        in_order = torch.equal(place, torch.arange(len(place)))
        return found if in_order else found[place]  # which is a copy, of 410 MB for 50,000


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


# ---- 2. The scores ----


def inception_score(logits: Tensor, splits: int = 10) -> dict:
    """dict(value, std) over splits of exp(mean KL(p(y|x) | p(y)))   (Salimans et al., arXiv:1606.03498,
    Sec. 4)

    logits (N, classes), without their bias as in ADM and torch-fidelity. Images go to the splits in a fixed
    random order: in a file sorted by class each split would lack most classes, and score far too low.
    """
    order = torch.randperm(len(logits), generator=data.generator("inception score"))
    scores = []
    for part in order.split(-(-len(order) // splits)):
        log_p = logits[part].double().log_softmax(1)                                        # (n, classes)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return dict(value=statistics.mean(scores), std=statistics.pstdev(scores))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m), |a|^2 + |b|^2 - 2 a . b by one matrix product."""
    a2, b2 = (torch.linalg.vector_norm(x, dim=1).square() for x in (a, b))
    return (a2[:, None] + b2).addmm_(a, b.T, alpha=-2).clamp_min_(0)


def squared_radii(x: Tensor, *ks: int) -> list[Tensor]:
    """For each k the squared distance (n,) of every row of x (n, D) to its k-th nearest other row."""
    most = max(ks)
    if len(x) <= most:
        raise ValueError(f"the neighbour number {most} needs more than {most} images, got {len(x)}")
    parts = (squared_distances(part, x) for part in x.split(500))
    nearest = torch.cat([part.topk(most + 1, largest=False).values for part in parts])
    return [nearest[:, k] for k in ks]  # number 0 is the row itself


def neighbour_scores(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> dict[str, float]:
    """precision and recall (Kynkaanniemi et al., arXiv:1904.06991, Eqs. 1-2), density and coverage (Naeem
    et al., arXiv:2002.09797, Eqs. 3-4) of features (n, D) and (m, D), float32 or float64.

    With r_k(x) the distance of x to its k-th nearest neighbour in its own set: precision is the share of
    fake points with |fake - real| <= r_k(real) for some real one, recall the reverse. density is how many
    balls of radius r(real) < hold a fake point, divided by k_density; coverage the share of such balls that
    hold any.
    """
    real, fake = real - real.mean(0), fake - real.mean(0)  # near 0 products of float32 keep more digits
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
    """KID: dict(value, std) of the unbiased squared MMD under the kernel (x . y / D + 1)^3 over random
    subsets (Binkowski et al., arXiv:1801.01401, Sec. 4). Features (n, D) and (m, D); not multiplied by
    1000; may be negative.

    Sets of no more than `size` images are taken whole, once, and std is then 0.
    """
    size, rng, found = min(size, len(real), len(fake)), data.generator("kernel distance"), []
    if size < 2:
        raise ValueError(f"KID needs at least 2 images in each set, got {len(real)} and {len(fake)}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(1 if size == len(real) == len(fake) else subsets):
        picks = [torch.randperm(len(part), generator=rng)[:size].to(part.device) for part in (real, fake)]
        x, y = real[picks[0]].double(), fake[picks[1]].double()
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(float(within - 2 * kernel(x, y).mean()))
    return dict(value=statistics.mean(found), std=statistics.pstdev(found))


# ---- 3. Their entries in fid.METRICS ----

SPATIAL, FEATURES, LOGITS = ("spatial", Statistics), ("features", Rows), ("logits", Rows)


def spatial(gen: ImageSet, ref: ImageSet, names: list[str], net) -> dict:
    """sFID (Nash et al., arXiv:2103.03841): the Frechet distance of 7 channels of an inner layer, place by
    place."""
    return fid.frechet(gen, ref, names, net, "sfid", SPATIAL)


def from_logits(gen: ImageSet, ref: ImageSet, names: list[str], net) -> dict:
    return {"is": inception_score(gen.parts.pop(LOGITS))}  # 200 MB for 50,000 images; nothing else needs them


def neighbours(gen: ImageSet, ref: ImageSet, names: list[str], net) -> dict:
    real, fake, counts = rows_of(gen, ref, net)
    with fid.full_float32(real.device):
        found = neighbour_scores(real, fake)
    return {name: dict(value=found[name]) | counts for name in NEIGHBOURS if name in names}


def kernel(gen: ImageSet, ref: ImageSet, names: list[str], net) -> dict:
    real, fake, counts = rows_of(gen, ref, net)
    with fid.full_float32(real.device):
        return {"kid": kernel_distance(real, fake) | counts}


def rows_of(gen: ImageSet, ref: ImageSet, net) -> tuple[Tensor, Tensor, dict]:
    """Real and fake rows on the network's device, and their numbers: those of statistics may be others."""
    fake, real = (side.parts[FEATURES].to(next(net.parameters()).device) for side in (gen, ref))
    return real, fake, dict(n=len(fake), n_ref=len(real))


METRICS["sfid"] = Metric(spatial, (SPATIAL,), numbered=True)
METRICS["is"] = Metric(from_logits, (LOGITS,), reference=False, glyphs=False)
METRICS |= dict.fromkeys(NEIGHBOURS, Metric(neighbours, (FEATURES,)))
METRICS["kid"] = Metric(kernel, (FEATURES,), glyphs=False)
data.optional("bias")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    fid.main(argv, metrics="all") if argv else print(__doc__.strip())


if __name__ == "__main__":
    data.run_cli(main)
