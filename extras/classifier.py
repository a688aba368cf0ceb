"""AFM's guide: a classifier of noisy images, log p(y | x_t) at every t (arXiv:2511.22475, official code).

    python train.py --loss classifier --steps 1000 --out runs/judge
    python -m extras.classifier runs/judge            accuracy by time on held-out images

It makes no images. `--loss afm_more --classifier runs/judge` guides a generator by it, and
`python -m extras.search RUN --best_of 8 --verifier runs/judge` chooses noises by it.

Neighbour in the core: fm sees the same x_t and t, and regresses a velocity.
paper: images are also rotated, scaled and sheared; here: shifts, holes and brightness, see augment.py.
"""
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import model
import sample
from data import option
from extras.augment import augment, check_augment, flag

# ----------------------------------------------------------------------------------------------------------
# 1. The network
# ----------------------------------------------------------------------------------------------------------


class Classifier(model.Part):
    """The transformer without the class, read out of one more token. Official names.

    `predict`, `t_min` and `learn_sigma` mean nothing here.
    """

    def __init__(self, **config):
        super().__init__(**config)
        width, norm = self.config["width"], self.config["norm"]
        del self.y_embedder
        self.cls_embed = nn.Parameter(0.02 * torch.randn(width))
        self.final_layer = nn.Sequential(model.NORMS[norm](width), nn.Linear(width, self.num_classes))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w), t (B,) in [0, 1] -> logits (B, num_classes), float32 or wider."""
        with self.autocast():
            x = self.embed(x_t) + self.pos_embed                                             # (B, N, W)
            x = self.read(self.cls_embed, x, self.t_embedder(t))                             # (B, 1 + N, W)
            out = self.final_layer(x[:, 0])
        return out.to(torch.promote_types(out.dtype, torch.float32))

    @property
    def state(self):
        raise AttributeError("a classifier moves no image")  # by which sample.py knows


# ----------------------------------------------------------------------------------------------------------
# 2. The objective
# ----------------------------------------------------------------------------------------------------------


def classifier(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """The cross-entropy of the label given x_t, for every t: -E log p(y | x_t)   (arXiv:2511.22475)."""
    t = losses.sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = losses.interpolate(augment(x[None], draws, cfg.augment)[0], e, t)

    logits = net(x_t, t)

    return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


def network(cfg, source) -> dict:
    """Of a model with tokens of the class it goes without these, which would give the answer away."""
    hidden = dict(context=0) if "context" in data.lookup(model.ZOO, cfg.model, "model") else {}
    return dict(parts=["classifier.Classifier"], predict="v") | hidden


def check(cfg) -> None:
    check_augment(cfg)
    entry = data.lookup(model.ZOO, cfg.model, "model")
    if [name for name in entry.get("parts", []) if model.part(name).generator_only]:
        raise ValueError(f"--model {cfg.model}: its blocks take no further token: use a SiT of that size")


losses.register("classifier", classifier, flags=flag(0.4), check=check, network=network, draws_images=False,
                defaults=dict(beta2=0.95, weight_decay=0.01, decay="constant", lr=1e-3, time="uniform"))


# ----------------------------------------------------------------------------------------------------------
# 3. A trained one
# ----------------------------------------------------------------------------------------------------------


def load_classifier(path: str, like: model.DiT, flag: str) -> nn.Module:
    """The classifier of a run, frozen, with its averaged weights, for the images and classes of `like`."""
    C = read_classifier(path, flag).to(like.pos_embed.device)
    if (C.shape, C.num_classes) != (like.shape, like.num_classes):
        raise ValueError(f"{flag} {path}: a classifier of {C.num_classes} classes and images {C.shape}; "
                         f"expected one of {like.num_classes} and {like.shape}, trained on the same data")
    C.amp = like.amp
    return C.requires_grad_(False)


def read_classifier(path: str, flag: str) -> nn.Module:
    C = model.load(sample.find_checkpoint(path))
    if "classifier.Classifier" not in C.config["parts"]:
        raise ValueError(f"{flag} {path}: a {type(C).__name__}; expected a run of --loss classifier")
    return C


@torch.no_grad()
def accuracies(C: nn.Module, x: Tensor, y: Tensor, times: Tensor) -> Tensor:
    """The share of images x (B, C, h, w) with noise of each of these times whose label y (B,) it finds."""
    e = data.Draws(0, range(len(x))).normal("noise", x.shape[1:]).to(x)
    found = [C(losses.interpolate(x, e, t.expand(len(x))), t.expand(len(x))).argmax(1) for t in times]
    return torch.stack([(k == y).float().mean() for k in found])


@dataclasses.dataclass
class Config:
    checkpoint: str = option("runs/judge", "a run of --loss classifier")
    data: str = option("glyphs:1", "held-out images")
    n: int = option(500, "how many of them")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Accuracy of a classifier by time.", ("checkpoint",))
    C = read_classifier(cfg.checkpoint, "python -m extras.classifier")
    source, times = data.dataset(cfg.data, C.shape[1]), torch.linspace(0, 1, 11)
    indices = list(range(min(cfg.n, len(source))))
    items, y = next(data.batches(source, [indices]))
    found = accuracies(C, source.clean(items, data.Draws(0, indices)), y, times)
    print(f"{cfg.checkpoint}: accuracy on {len(y)} images of {cfg.data}, t = 1 is noise")
    for t, value in zip(times.tolist(), found.tolist()):
        print(f"  t = {t:.1f}   {value:.3f}")


if __name__ == "__main__":
    data.run_cli(main)
