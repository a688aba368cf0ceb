"""REPA: flow matching whose first blocks are aligned with a frozen image encoder (arXiv:2410.06940).

The loss is `fm`'s with one more term: the tokens inside the network, after one of its first blocks, should
point where the encoder's features of the same patches of the clean image do. So these blocks need not find
out by themselves what is in an image. extras/encoders.py says what an encoder is; extras/reg.py goes further.

    python train.py --loss repa --encoder dino.py:dinov2 --model JiT-B/16 --data IMAGENET/train --size 256
    python train.py --loss repa --data latents --size 0 --model SiT-XL/2 --predict v     with features
    python -m extras.repa runs/repa                         how far tokens and features are apart, by time

The projector is for training only: other runs that start from such a one leave it behind.

A laptop's encoder is a classifier of one's own on glyphs, in a file judge.py:

    import model
    net = model.load("runs/judge/last.pt").requires_grad_(False)
    def tokens(images):
        net.to(images.device)
        c = net.t_embedder(images.new_zeros(len(images)))
        return net.read(net.cls_embed, net.embed(images) + net.pos_embed, c)

    python train.py --loss classifier --steps 1000 --out runs/judge
    python train.py --loss repa --encoder judge.py:tokens --steps 1500 --out runs/repa

There it brings no gain: FD-glyphs 18.1 and 12.2 (seeds 0 and 1) with `repa`, 15.3 (seed 0) with `reg`, 14.5
and 11.7 with `fm`, after the same 1,500 steps (unguided, 25 steps, accuracy 0.974 to 0.985; one run each, 2
CPU cores, 2026-11-21). There is little to know about digits, and this encoder knew classes only; the papers'
gain is with DINOv2 on photographs: not checked yet. Loss and gradients are the official ones to 1.5e-7
(random weights in the classes of sihyun-yu/REPA beside ours) and 2e-6 (formula weights, in the tests).
"""
import dataclasses
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import model
import sample
from data import option
from extras import encoders
from extras.encoders import encoder_features
from losses import drop_labels, interpolate, sample_times, velocity_target

# ---- 1. The part ----


def projectors(width: int, features: int) -> nn.ModuleList:
    """An MLP from tokens to an encoder's features; alone in a list, for the official `projectors.0.0.weight`.

    paper: 2048 wide inside; here: 4 times the width where that is less, for small networks.
    """
    inside = min(2048, 4 * width)
    mlp = nn.Sequential(nn.Linear(width, inside), nn.SiLU(), nn.Linear(inside, inside), nn.SiLU(),
                        nn.Linear(inside, features))
    for layer in mlp[::2]:
        model.init_xavier_(layer)
    return nn.ModuleList([mlp])


class Projected(model.Part):
    """A DiT that, in training, keeps the image's tokens after `align` blocks and projects them: `projected`.

    features: width of the encoder's features. align: 0 is a third of the blocks, 8 at most, which is REPA's
    choice for all its sizes.
    """
    generator_only = True
    training_only = ("projectors.",)  # weights that other runs do not take over
    entrances = ("projected",)        # methods beside forward that use weights

    def __init__(self, features: int = 768, align: int = 0, **config):
        super().__init__(**config)
        self.config |= dict(features=features, align=align)
        depth = len(self.blocks)
        if not 0 <= align <= depth:
            raise ValueError(f"tokens after {align} blocks to align: expected 1 to {depth}, or 0 for a third")
        self.align, self.tokens = align or min(8, max(1, depth // 3)), None
        self.projectors = projectors(self.config["width"], features)

    def run_block(self, k: int, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        x = super().run_block(k, x, c, y)
        if self.training and k == self.align - 1:
            self.tokens = x[:, -self.pos_embed.shape[1]:]  # without those of the class
        return x

    def projected(self) -> Tensor:
        """The tokens of the last call in training, as the encoder's features (B, N, F), float32 or wider."""
        with self.autocast():
            out = self.projectors[0](self.tokens)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """The projector as well, from a network that has one to as many features; a fresh one otherwise."""
        theirs = given.state_dict() if given.config.get("features") == self.config["features"] else {}
        own = {k: theirs.get(k, v) for k, v in self.state_dict().items() if k.startswith("projectors.")}
        return super().inherit(given, at) | own

    def __getstate__(self) -> dict:
        """What a copy of the network is made of: not the tokens of its last call, which have a graph."""
        return self.__dict__ | dict(tokens=None)


# ---- 2. The objective ----


def repa(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, encoder) -> tuple[Tensor, dict]:
    """REPA: E |v_net(x_t, t, y) - (e - x)|^2 + align E[1 - cos(h, z)]   (arXiv:2410.06940 and its loss.py)

    h (B, N, F): the network's projected tokens; z: the encoder's features of the same patches of the clean x.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    v = velocity_target(net, x, e, x_t, t)

    flow = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    apart = misalignment(net.projected(), encoder(x, draws)[:, 1:])
    return flow + cfg.align * apart, {"flow": flow, "misalignment": apart}


def misalignment(h: Tensor, z: Tensor) -> Tensor:
    """Mean of 1 - cos(h, z) over projected tokens h and features z, both (B, N, F): 0 where they point alike.

    paper: -cos, which is less by 1; here: a loss stays above 0, where loss.png can draw it.
    """
    if h.shape != z.shape:
        raise ValueError(f"the encoder gives features {tuple(z.shape[1:])} of an image, the network's tokens "
                         f"are projected to {tuple(h.shape[1:])}: it must see images of as many patches")
    return (1 - F.cosine_similarity(h, z, dim=2)).mean()


def projected_network(cfg, source) -> dict:
    """Options of model.create for a network whose tokens are aligned."""
    width = encoder_features(cfg, source).shape[1]
    return dict(parts=["repa.Projected"], features=width, align=cfg.align_block)


def encoder_inputs(role: str, cfg, source, net) -> tuple:
    """The encoder, as the further argument of the loss."""
    return (encoder_features(cfg, source, net.pos_embed.device),)


FLAGS = dict(encoder=option("", "FILE.py:NAME, a frozen image encoder; latents bring its features along"),
             align=option(0.5, "weight of the alignment with its features"),
             align_block=option(0, "tokens are aligned after so many blocks; 0: a third of them, at most 8"))

losses.register("repa", repa, flags=FLAGS, network=projected_network, inputs=encoder_inputs)

# ---- 3. Run alone: how far apart ----


@dataclasses.dataclass
class Config:
    run: str = option("", "a run folder of --loss repa or reg")
    encoder: str = option("", "its encoder, named again: FILE.py:NAME")
    n: int = option(64, "training images to look at")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "How far tokens are from the encoder's features, by time.", ("run",))
    if not cfg.run:
        return print(__doc__.strip())
    path = sample.find_checkpoint(cfg.run)
    saved = vars(encoders.run_settings(path, cfg.encoder))
    if saved["loss"] not in ("repa", "reg"):
        raise ValueError(f"{path}: a run without alignment; give one of --loss repa or reg")
    run, net = types.SimpleNamespace(**saved), model.load(path, "last").train()  # so that it keeps its tokens
    source, draws = data.dataset(run.data, run.size or None), data.Draws(run.seed, range(cfg.n))
    items, labels, _ = next(data.stream(source, [list(range(cfg.n))], run.seed))
    x, z = source.clean(items, draws), encoder_features(run, source)(source.clean(items, draws), draws)
    state = torch.cat([x.flatten(1), z[:, 0]], 1) if net.state != net.shape else x
    e = draws.normal("noise", state.shape[1:])
    print(f"1 - cos of features and projected tokens after {net.align} blocks, {cfg.n} training images")
    for t in torch.linspace(0, 1, 11):
        net(interpolate(state, e, t.expand(cfg.n)), t.expand(cfg.n), labels)
        h = net.projected()
        print(f"t = {t:.1f}   {misalignment(h, z[:, -h.shape[1]:]):.3f}")


if __name__ == "__main__":
    data.run_cli(main)
