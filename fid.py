"""Frechet distances between image sets, each printed with its protocol.

    python fid.py RUN glyphs --features glyphs --num 1000  a run against real digits
    python fid.py GENERATED REFERENCE                      FID; --weights fid: comparable with papers
    python fid.py IMAGES --save_stats OUT.npz              statistics, for later use

GENERATED, REFERENCE: what data.py reads, an npz of statistics (mu, sigma), a run or checkpoint (it samples
--num images), or from Python an iterable of uint8 batches.

`fid` is the distance on the 2015-12-05 weights of InceptionV3 for 50,000 images or more, fid5k for 5,000: N
images add about C / N. fid5k_torchvision, the default weights, compares with its like only; fd_glyphs uses
GlyphNet, our own classifier of digits.
"""
import contextlib
import inspect
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable

import data
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import model
import sample
from data import option

# ---- 1. The Frechet distance, and the statistics it compares ----


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))   (arXiv:1706.08500, Eq. 6)

    Means (D,) and covariances (D, D), numpy or torch. Rounding may leave -1e-9 for 0."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2))
    check_moments(mu1=mu1, cov1=cov1, mu2=mu2, cov2=cov2)
    root = sqrt_spectrum(cov1, cov2).sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root)


def sqrt_spectrum(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Square roots (D,) of the eigenvalues of cov1 cov2, those of L^T cov2 L if cov1 = L L^T. sqrtm of the
    product would add sqrt(machine epsilon) per direction without variance."""
    for a, b in ((cov1, cov2), (cov2, cov1)):  # one positive definite matrix is enough
        L, failed = torch.linalg.cholesky_ex(a)
        if not failed:
            break
    else:  # both singular: N <= D, or features that are always zero
        values, vectors = torch.linalg.eigh(cov1)
        L, b = vectors * values.clamp_min(0).sqrt(), cov2
    m = L.T @ b @ L
    return torch.linalg.eigvalsh((m + m.T) / 2).clamp_min(0).sqrt()


class Statistics:
    """Mean and covariance of features that come batch by batch, in float64: 34 MB at D = 2048."""

    def __init__(self, dim: int, device="cpu", expected: int | None = None):
        self.count, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                            for shape in ((), (dim,), (dim, dim)))

    def update(self, features: Tensor, indices=()) -> None:
        """Add features (n, D)."""
        features = features.to(self.sum)  # a product in float32 would lose four digits
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), with 1 / (N - 1), over all processes; to be called once."""
        if data.world() > 1:
            for share in (self.count, self.sum, self.outer):
                dist.all_reduce(share)
        n, mean = int(self.count), (self.sum / self.count).cpu()
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {n}")
        return mean, (self.outer.cpu() - n * torch.outer(mean, mean)) / (n - 1)


FRECHET = ("features", Statistics)  # what it needs of an image set: see Metric

# ---- 2. GlyphNet, the features of `glyphs`, trained on the spot ----


def conv(i: int, o: int) -> nn.Module:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(i, o, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(o, eps=1e-3), nn.ReLU(inplace=True))


class GlyphNet(nn.Module):
    """A digit classifier: it sees shape, contrast, blur and noise, and hardly any hue."""
    suffix, metrics, resize = "_glyphs", "fid", "mean over cells to 32, x/127.5-1"
    source, seen, real = "glyphs", 6_000, staticmethod(data.glyphs)

    def __init__(self, classes: int = 10):
        super().__init__()
        self.widths = dict(features=64, logits=classes)
        self.body = nn.Sequential(
            conv(3, 16), nn.MaxPool2d(2),        # (N, 16, 16, 16)
            conv(16, 32), nn.MaxPool2d(2),       # (N, 32, 8, 8)
            conv(32, 64), nn.MaxPool2d(2),       # (N, 64, 4, 4)
            nn.Conv2d(64, 64, 4), nn.Flatten())  # (N, 64); no ReLU: features stuck at 0 measure nothing
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, classes))

    @property
    def label(self) -> str:  # the last bits of the weights differ from machine to machine
        return f"glyphnet {data.fold(*(v.cpu().numpy().tobytes() for v in self.state_dict().values())):x}"

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, h, w) -> features before the last layer (N, 64) and logits (N, K)."""
        with full_float32(images.device):
            features = self.body(F.adaptive_avg_pool2d(data.to_float(check_images(images)), 32))
            return dict(features=features, logits=self.head(features))


@contextlib.contextmanager
def full_float32(device: torch.device):
    """Without autocast (bfloat16 moves features by 8e-3), TF32 and nondeterminism."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False), \
             torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


def train_glyph_net(make: Callable, seed: tuple) -> GlyphNet:
    """make() after one pass over its images, on one thread whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(data.fold("GlyphNet weights", *seed))  # of the CPU alone
        net = make()
        images, labels = net.real(net.seen, 32, 3)
        batches = torch.randperm(net.seen, generator=data.generator("GlyphNet order", *seed)).split(50)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=len(batches))
        for batch in tqdm(batches, f"training {type(net).__name__}, once"):
            loss = F.cross_entropy(net.extract(images[batch])["logits"], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return net


def glyph_net(make: Callable = GlyphNet, *seed) -> GlyphNet:
    """make(), frozen: trained once, by rank 0, and kept in a file."""
    with torch.random.fork_rng(devices=[]):
        net = make()
    path = glyph_net_file(net, seed)
    if data.rank() == 0:
        try:
            model.load_weights(net, torch.load(path, weights_only=True), path)
        except Exception as error:  # no file yet, or a damaged one
            if path.exists():
                data.note(f"{path} is damaged ({type(error).__name__}): training again")
            with data.replacing(path, "let TRIFLOW_CACHE name a folder with room") as aside:
                torch.save(train_glyph_net(make, seed).state_dict(), aside)
    data.barrier()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.requires_grad_(False).eval()


def glyph_net_file(net: GlyphNet, seed: tuple = ()) -> Path:
    """Named after its code and the looks of its images."""
    code = *map(inspect.getsource, (conv, GlyphNet, type(net), train_glyph_net)), seed
    return cache_folder() / f"glyphnet-{data.fold(code, net.real(50, 32, 3)[0].numpy().tobytes()):x}.pt"


def cache_folder() -> Path:
    return Path(os.environ.get("TRIFLOW_CACHE") or "~/.cache/triflow").expanduser()


# ---- 3. Image sets: what can be compared ----


@dataclass
class ImageSet:
    """One side of a comparison: images, or what is stored of them."""
    name: str
    n: int | None                  # None: unknown, or only when `batches` has ended
    size: list[int] | None = None  # [h, w], likewise
    batches: Iterable = None       # this process's share of (indices, uint8 (b, 3, h, w), labels or None)
    labels: Tensor | None = None   # (n,) where there are classes
    sampling: str = ""             # how the images were generated
    parts: dict = field(default_factory=dict)  # what a Metric needs: (output, gatherer) -> result
    accuracy: float | None = None  # share of the labels that GlyphNet finds


def open_set(source, net: nn.Module, cfg: "Config", role: str) -> ImageSet:
    """The image set of any source."""
    if isinstance(source, ImageSet):
        return source
    if not isinstance(source, (str, os.PathLike)):  # batches: each process passes its own share
        if cfg.size:
            raise ValueError(f"--size {cfg.size}: crop an iterable's batches beforehand")
        numbers = itertools.count(data.rank(), data.world())
        batches = ((list(itertools.islice(numbers, len(images))), images, None) for images in source)
        return ImageSet("an iterable", None, batches=batches)
    source, stored = str(source), data.optional("stored")
    if stored and (statistics := stored.find(source, net, cfg, role)):
        return statistics
    is_run = source.endswith((".pt", ".pth")) or (Path(source) / "last.pt").exists()
    return from_run(source, cfg) if is_run else from_dataset(source, cfg, role)


def from_dataset(source: str, cfg: "Config", role: str) -> ImageSet:
    """What `data.dataset` reads, or cfg.subset images of it."""
    images = data.dataset(source, cfg.size or None)
    check_count(source, len(images), cfg.num if role == "generated" else 0)
    order = torch.randperm(len(images), generator=data.generator("subset", cfg.seed))
    chosen = order[:cfg.subset or None].sort().values
    lists = [part.tolist() for part in chosen.split(cfg.batch)][data.rank()::data.world()]
    items = data.batches(images, lists, cfg.workers)
    batches = ((indices, *batch) for indices, batch in zip(lists, items))
    labels = torch.as_tensor(images.labels)[chosen] if images.num_classes > 1 else None
    return ImageSet(source, len(chosen), list(images.shape[1:]), batches, labels)


def from_run(source: str, cfg: "Config") -> ImageSet:
    """cfg.num images of a checkpoint."""
    if not cfg.num:
        raise ValueError(f"{source} is a run: --num says how many images to make")
    path = sample.find_checkpoint(source)
    net, (own, usual) = model.load(path).to(cfg.device), sample.own_settings(path)
    asked = dict(steps=cfg.steps, solver=cfg.solver, guidance=cfg.guidance)
    options = dict(steps=50, solver="ab2") | (usual or dict(interval=sample.INTERVAL))
    options |= {key: value for key, value in asked.items() if value}
    if wrong := [f"--{key} {options[key]}" for key in own if options[key] != own[key]]:
        raise ValueError(f"{wrong[0]}: {source} jumps to the data in its own way; leave it out")
    labels = sample.labels_for(cfg.num, net.num_classes)
    if cfg.labels == "random":
        labels = torch.randint(net.num_classes, (cfg.num,), generator=data.generator("labels", cfg.seed))
    codec = data.codec(cfg.codec, cfg.device)
    fake = sample.generate(net, labels, cfg.seed, cfg.batch, codec=codec, **options)
    batches = ((indices, images, labels[indices]) for indices, images in fake)
    how = sample.describe(conditioned=net.guidance_conditioned, **options)
    how += f", EMA weights, {cfg.labels} labels, seed {cfg.seed}"
    size = list(sample.image_shape(net, codec)[1:])
    return ImageSet(source, cfg.num, size, batches, labels if net.num_classes > 1 else None, how)


@torch.no_grad()
def measure(net: nn.Module, images: ImageSet, needs: list[tuple]) -> ImageSet:
    """The set after a pass through the network for what its `parts` lack; processes share it."""
    device = next(net.parameters()).device
    gathered = {(key, gather): gather(net.widths[key], device, images.n)
                for key, gather in needs if (key, gather) not in images.parts}
    if images.batches is None or not gathered:
        return images
    graded = isinstance(net, GlyphNet) and images.labels is not None
    graded = graded and bool((images.labels < net.widths["logits"]).all())
    seen = torch.zeros(2, dtype=torch.float64)  # images, and those whose label it finds
    with tqdm(total=images.n, unit="img", desc=images.name, delay=2, disable=data.rank() > 0) as bar:
        for indices, pixels, labels in images.batches:
            size = list(check_images(pixels).shape[2:])
            images.size = images.size or size
            if size != images.size:
                raise ValueError(f"images have 2 sizes: {images.size}, {size} after {int(seen[0]):,} images")
            out = net.extract(pixels.to(device))
            for (key, _), gatherer in gathered.items():
                gatherer.update(out[key], indices)
            right = (out["logits"].argmax(1) == labels.to(device)).sum() if graded else 0
            seen += torch.tensor([len(pixels), right])
            bar.update(len(pixels) * data.world())
    if data.world() > 1:
        dist.all_reduce(seen)
    images.n = images.n if images.parts else int(seen[0])
    images.accuracy = float(seen[1] / seen[0]) if graded else None
    images.parts |= {need: gatherer.finish() for need, gatherer in gathered.items()}
    return images


# ---- 4. Scores ----


@dataclass(frozen=True, eq=False)
class Metric:
    """A score, or several computed together, in METRICS under each of their names."""
    compute: Callable          # (generated, reference, names asked for, net) -> {name: dict(value=.., ..)}
    needs: tuple = (FRECHET,)  # pairs (output of the network, class like Statistics); see ImageSet.parts
    reference: bool = True     # False: the generated images are enough
    glyphs: bool = True        # False: says nothing on GlyphNet's features
    numbered: bool = False     # its name tells the number of images: fid5k


def frechet(gen: ImageSet, ref: ImageSet, names, net, name: str = "fid", need: tuple = FRECHET) -> dict:
    value = frechet_distance(*gen.parts[need], *ref.parts[need])
    return {name: dict(value=value, n=gen.n, n_ref=ref.n)}


METRICS = {"fid": Metric(frechet, numbered=True)}  # extras/ adds to both tables
FEATURES = {"glyphs": lambda weights, resize, device: glyph_net().to(device)}


def find_metrics(text: str, net: nn.Module) -> list[str]:
    """The names in "fid,..", or for "all" those that suit the network, as METRICS lists them."""
    asked = text.split(",")
    for name in asked:
        if name not in METRICS:
            data.extra(name if data.extra_file(name).is_file() else "metrics", f"--metrics {name}")
    suited = [name for name, metric in METRICS.items() if {key for key, _ in metric.needs} <= {*net.widths}
              and (metric.glyphs or not isinstance(net, GlyphNet))]
    if wrong := [name for name in asked if name not in (*suited, "all")]:
        raise ValueError(f"--metrics {wrong[0]}: on {net.label} there are all, {', '.join(suited)}")
    return [name for name in suited if name in asked or "all" in asked]


def compare(net: nn.Module, gen: ImageSet, ref: ImageSet, names: list[str]) -> dict:
    """{name: dict(value=.., ..)} where the sides have what the metrics need."""
    scores = {}
    for metric in dict.fromkeys(METRICS[name] for name in names):
        sides = (gen, ref) if metric.reference else (gen,)
        if lacking := [side.name for side in sides if not {*metric.needs} <= {*side.parts}]:
            skipped = ", ".join(name for name in names if METRICS[name] is metric)
            data.note(f"{lacking[0]} has no images, nor statistics for {skipped}: skipped")
            continue
        for name, score in metric.compute(gen, ref, names, net).items():
            scores.setdefault(score_name(name, net, gen.n), {}).update(score)
    return scores


def score_name(name: str, net: nn.Module, n: int | None) -> str:
    """fid for 50,000 images on the 2015-12-05 weights, or fid5k, fid_torchvision, fd_glyphs, .."""
    if name == "fid" and not hasattr(net, "flavour"):  # not InceptionV3
        name = "fd"
    elif METRICS[name].numbered and (n or 0) < 50_000:
        name += "_of_unknown_n" if n is None else str(n) if n % 1000 else f"{n // 1000}k"
    return name + net.suffix


def evaluate(generated, reference="", net: nn.Module | None = None, **options) -> dict:
    """The scores of an image set against a reference, with their protocol, as a dict of plain values.

    options: fields of `Config`. net: other features, with extract, widths, label, resize and suffix as
    GlyphNet has; its own `source` ("glyphs") stands for as many held-out ones."""
    cfg = Config(**options)
    data.checked(cfg, generated, reference)
    write = data.extra("stored", "--save_stats").write if cfg.save_stats else None
    cfg.device = str(data.start_processes(cfg.device))
    net = net or data.lookup(FEATURES, cfg.features, "--features")(cfg.weights, cfg.resize, cfg.device)
    names, on_glyphs = find_metrics(cfg.metrics, net), isinstance(net, GlyphNet)
    needs = [n for name in names for n in METRICS[name].needs if reference or n[1] is Statistics]
    needs = list(dict.fromkeys([FRECHET, *needs]))  # one order in all processes

    sides = [open_set(generated, net, cfg, "generated")]
    if reference and not (on_glyphs and reference == net.source):
        sides.append(open_set(reference, net, cfg, "reference"))
    check_sizes(sides)
    num = cfg.num if sides[0].n is None else 0  # the end of an iterable tells
    gen, *ref = [measure(net, side, needs) for side in sides]
    check_count(gen.name, gen.n, num)
    check_sizes(sides)
    if cfg.save_stats:
        write(cfg.save_stats, gen, net)

    scores, known = {}, {}
    if reference and on_glyphs:
        real, known["floor"] = real_glyphs(net, gen.n, gen.size[0], needs)
        ref = ref or [real]
    if ref:
        scores = compare(net, gen, *ref, names)
        scores.get("fd" + net.suffix, {}).update(known)
        warn_of_few(gen.n, net, [score["floor"] for score in scores.values() if score.get("floor")])
    if gen.accuracy is not None:
        scores["accuracy"] = dict(value=gen.accuracy)
    return dict(scores=scores, generated=gen.name, n=gen.n, labels=describe_labels(gen.labels),
                sampling=gen.sampling, features=net.label, resize=net.resize, size=gen.size,
                reference=ref[0].name if ref else None, n_ref=ref[0].n if ref else None)


def real_glyphs(net: GlyphNet, n: int, size: int, needs: list) -> tuple[ImageSet, float]:
    """n held-out images, and the floor, their distance to n others, as a perfect generator's."""
    sets = []
    for seed in (1, 2):  # seeds that only measure: generators train on 0, GlyphNet on 3
        images, labels = net.real(n, size, seed)
        shares = torch.arange(n).split(500)[data.rank()::data.world()]
        batches = ((share.tolist(), images[share], labels[share]) for share in shares)
        sets.append(measure(net, ImageSet(f"{net.source}:{seed}", n, [size, size], batches, labels), needs))
    return sets[0], frechet_distance(*sets[0].parts[FRECHET], *sets[1].parts[FRECHET])


def score(net: GlyphNet, gen: ImageSet, metrics="") -> dict:
    """dict(fd_glyphs, floor, accuracy, n, ..) against as many held-out images."""
    scores = evaluate(gen, net.source, net, device="cpu", metrics=metrics or net.metrics)["scores"]
    values = {name: score.pop("value") for name, score in scores.items()}
    return values | scores["fd" + net.suffix] | dict(accuracy=gen.accuracy)


# ---- 5. Command line ----


@dataclass
class Config:
    generated: str = option("", "images, statistics, a run folder or a checkpoint")
    reference: str = option("", "the same; glyphs: held-out ones, with --features glyphs")
    features: str = option("inception", "whose features: inception, glyphs or small")
    weights: str = option("torchvision", "of InceptionV3: torchvision, fid, or a file; of small: the data")
    resize: str = option("tf1", "to InceptionV3's 299 pixels: tf1 (published FIDs), pytorch, or clean")
    metrics: str = option("fid", "fid,NAME,.. or all: scores of this file and extras/")
    num: int = option(0, "images that must be there, or that a run generates; 0: any")
    subset: int = option(0, "images drawn of each side, once for all; 0: use all")
    size: int = option(0, "crop and scale images to this many pixels; 0: as they are")
    batch: int = option(32, "images at a time")
    workers: int = option(-1, "processes that decode images; -1: 4 for files, else none")
    steps: int = option(0, "a run: solver steps; 0: its own number, or 50")
    solver: str = option("", "a run: its solver; empty: its own, or ab2", ("", *sample.SOLVERS))
    guidance: float = option(1.0, "a run: guidance scale; 1 is none")
    codec: str = option("", "a run: what decodes latents, such as latents:FILE")
    labels: str = option("balanced", "a run: of each class as many, or random", ("balanced", "random"))
    seed: int = option(0, "sample i of a run depends on (seed, i) only; also draws --subset")
    device: str = option("auto", "where the network runs", ("auto", "cpu", "cuda"))
    json: bool = option(False, "print the result as one JSON object")
    save_stats: str = option("", "an npz for the statistics of GENERATED; needs no REFERENCE")


def as_text(found: dict) -> str:
    """The result of `evaluate` in lines."""
    lines = []
    for name, score in found["scores"].items():
        more = [f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
                for key, value in score.items() if key != "value" and value is not None]
        more += [f"against {found['reference']}"] * ("n_ref" in score)
        lines.append(f"{name:24} {round(score['value'], 6) + 0.0:12.6f}   {', '.join(more)}")
    protocol = [f"{key:10} {value}" for key, value in found.items() if key != "scores" and value]
    return "\n".join(lines + protocol)


def main(argv: list[str] | None = None, **defaults) -> None:
    cfg = data.parse(Config, argv, __doc__, ("generated", "reference"), **defaults)
    if not cfg.generated:
        return print(__doc__.strip())
    if not (cfg.reference or cfg.save_stats):
        raise ValueError("give GENERATED and REFERENCE, or one set of images and --save_stats OUT.npz")
    found = evaluate(**vars(cfg))
    if data.rank() == 0:
        print(json.dumps(found) if cfg.json else as_text(found))
    data.stop_processes()


# ---- 6. Guards, and words of the protocol ----


def check_images(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of {images.dtype} {tuple(images.shape)}: expected uint8 (N, 3, h, w); "
                         "convert floats in [-1, 1] by data.to_uint8, decode latents")
    return images


def check_moments(**moments: Tensor) -> None:
    shapes, d = {name: tuple(value.shape) for name, value in moments.items()}, moments["mu1"].numel()
    if [*shapes.values()] != [(d,), (d, d)] * 2:
        raise ValueError(f"means and covariances {shapes} do not compare: other features?")
    if wrong := [name for name, value in moments.items() if not value.isfinite().all()]:
        raise ValueError(f"{wrong[0]} has non-finite values: the features of that image set overflowed")


def check_count(name: str, found: int | None, num: int) -> None:
    if num and found != num:  # generating broke off, or an older set lies there too
        count = "an unknown number of" if found is None else f"{found:,}"
        raise ValueError(f"found {count} images in {name}, --num asks for {num:,} (--subset draws some)")


def check_sizes(sides: list[ImageSet]) -> None:
    sizes = {side.name: side.size for side in sides if side.size}
    if len({*map(tuple, sizes.values())}) > 1:
        raise ValueError(f"images of other sizes do not compare: {sizes}; crop all alike with --size")


def warn_of_few(n: int | None, net: nn.Module, floors: list[float]) -> None:
    enough = 2 * net.widths["features"]
    if n and n < enough:
        floor = f" (floor ~{floors[0]:.3g})" if floors else ""
        data.note(f"warning: only N={n:,} < {enough:,} samples: mostly bias{floor}; see --metrics all")


def describe_labels(labels: Tensor | None) -> str:  # random ones make a higher FID
    if labels is None or not len(labels):
        return "unknown"
    low, high = labels.bincount().aminmax()
    return f"balanced, {low} a class" if low == high else f"{low} to {high} a class"


if __name__ == "__main__":
    data.run_cli(main)
