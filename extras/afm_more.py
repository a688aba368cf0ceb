"""AFM beyond the core's `afm` (arXiv:2511.22475): a deep generator, guidance by a classifier, augmentation.

    python train.py --loss afm_more --repeats 2 --out runs/deep          twice as deep, with no more weights
    python train.py --loss classifier --steps 1000 --out runs/judge      then a generator guided by it:
    python train.py --loss afm_more --init runs/afm --d_init runs/afm --classifier runs/judge --augment 0.4

With none of the three it is `afm`, whose flags it has (`--nfe 0`, any number of jumps, too). Its stages in
the paper, which change settings on the way, are in schedule.py.

`python -m extras.afm_more` prints what repeats cost: parameters and GFLOPs of deep generators.
"""
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import model
from data import option
from extras.augment import augment, check_augment, flag
from extras.classifier import load_classifier
from losses import NormaliseGradient, flatness, interpolate, jump, jump_times, ot_weight

# ----------------------------------------------------------------------------------------------------------
# 1. A deep generator
# ----------------------------------------------------------------------------------------------------------


class Deep(model.Part):
    """The stack of blocks runs `repeats` (R) times   (AFM, arXiv:2511.22475, Sec. 3.7).

    The passes are told apart by the embedding of the time 1 - k / R, k = 0 .. R - 1, as a generator of one
    jump needs the time of a flow for nothing else. The last layer sees the class alone. R adds no weights.
    """
    generator_only = True

    def __init__(self, repeats: int = 2, **config):
        super().__init__(**config)
        if repeats < 1 or self.times:
            raise ValueError(f"repeats {repeats}, times {self.times}: expected at least 1, and times 0, as a "
                             f"repeated stack tells its passes apart by the time embedding")
        if self.extra_tokens:
            raise ValueError(f"repeats {repeats}: tokens of the class join the others at a block of this "
                             f"model, so its blocks run once: use another --model")
        self.config |= dict(repeats=repeats)
        self.repeats = repeats
        self.t_embedder = model.TimestepEmbedder(self.config["width"])
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def trunk(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        for k in range(self.repeats):
            time = c.new_full((len(c),), 1 - k / self.repeats)
            x = super().trunk(x, c + self.t_embedder(time), y)
        return x

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """Of a flow all weights, those of its time for the passes."""
        kept = {k: v for k, v in given.state_dict().items() if k.startswith(("t_embedder.", "y_embedder."))}
        return super().inherit(given, at) | kept


# ----------------------------------------------------------------------------------------------------------
# 2. The two players
# ----------------------------------------------------------------------------------------------------------


def afm_more_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G) -> tuple[Tensor, dict]:
    """`losses.afm_D`, where D sees data and samples through the same `augment`   (arXiv:2511.22475, Eq. 4-7).

    paper: shifts by up to 30 % and three holes; here: those of `augment`, as for cat.
    """
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    with torch.no_grad():
        sample = jump(G, x_s, s, r, y)
    x_r, sample = augment(torch.stack([x_r, sample]), draws, cfg.augment)

    real, fake = D(x_r, r, y), D(sample, r, y)
    r1 = flatness(D, x_r, real, s, r, y, draws, "R1")
    r2 = flatness(D, sample, fake, s, r, y, draws, "R2")
    loss = F.softplus(fake - real).mean() + cfg.gp * (r1 + r2) + cfg.cp * (real + fake).square().mean()
    return loss, {"real": real.mean(), "fake": fake.mean(), "r1": r1, "r2": r2}


def afm_more_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D, C=None) -> tuple[Tensor, dict]:
    """`losses.afm_G`, with `augment` before D, and + cg L_cg where there is a classifier C   (Eq. 16-21).

    L_cg: see `guide`.
    """
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    sample = jump(G, x_s, s, r, y)

    real_seen, fake_seen = augment(torch.stack([x_r, sample]), draws, cfg.augment)
    with torch.no_grad():
        real = D(real_seen, r, y)
    fake = D(NormaliseGradient.apply(fake_seen, D.gradient_square), r, y)
    adversarial = F.softplus(real - fake).mean()
    distance = (sample - x_s).square().flatten(1).mean(1)
    loss = adversarial + ot_weight(draws, cfg) * (distance / (s - r).clamp_min(1e-3)).mean()
    logs = {"adversarial": adversarial, "distance": distance.mean()}
    if C is None:
        return loss, logs
    surprise = guide(C, sample, r, y, draws, cfg)
    return loss + cfg.cg * surprise, logs | {"surprise": surprise}


def guide(C, sample: Tensor, r: Tensor, y: Tensor, draws, cfg) -> Tensor:
    """L_cg: how surprising the labels are at the jumps' ends, E -log p(y | x_t')   (arXiv:2511.22475).

    One-step jumps end at data, where classes lie apart and a classifier has no slope: they are noised to a
    random time t' in [0, cg_time) first. Others end at t' = r, and those with r < 0.5 count.
    """
    if cfg.nfe != 1:
        return (F.cross_entropy(C(sample, r), y, reduction="none") * (r < 0.5)).mean()
    t = cfg.cg_time * draws.uniform("guide's time")
    n = draws.normal("guide's noise", sample.shape[1:])
    return F.cross_entropy(C(interpolate(sample, n, t), t), y)


# ----------------------------------------------------------------------------------------------------------
# 3. What the loop knows of it
# ----------------------------------------------------------------------------------------------------------

AFM = losses.LOSSES["afm"]


def network(cfg, source) -> dict:
    deep = dict(parts=["afm_more.Deep"], repeats=cfg.repeats) if cfg.repeats else {}
    return AFM.network(cfg, source) | deep


def rate(role: str, cfg) -> float:
    """A deep generator's learning rate is divided by its repeats."""
    return AFM.rate(role, cfg) / (max(1, cfg.repeats) if role == "G" else 1)


def inputs(role: str, cfg, source, net) -> tuple:
    return (load_classifier(cfg.classifier, net, "--classifier"),) if role == "G" and cfg.classifier else ()


def check(cfg) -> None:
    AFM.check(cfg)
    check_augment(cfg)
    if cfg.repeats < 0 or cfg.repeats and cfg.nfe != 1:
        raise ValueError(f"--nfe {cfg.nfe} --repeats {cfg.repeats}: a deep generator makes a single jump: "
                         f"use --nfe 1, or --repeats 0")


FLAGS = dict(repeats=option(0, "a deep generator, its blocks run this often; 0: an ordinary one"),
             classifier=option("", "a run of --loss classifier that guides the generator"),
             cg=option(0.003, "weight of that guidance"),
             cg_time=option(0.1, "--nfe 1: samples are noised up to this time for the classifier"))

losses.register("afm_more", afm_more_G, afm_more_D, turn=AFM.turn, alarm=AFM.alarm, defaults=AFM.defaults,
                variant=AFM.variant, flags=FLAGS | flag(0.0) | AFM.flags, network=network, rate=rate,
                discriminator=AFM.discriminator, inputs=inputs, check=check, sampling=AFM.sampling)


@dataclasses.dataclass
class Config:
    model: str = option("SiT-XL/2", "a network of the zoo")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "What a deep generator costs.", ("model",))
    print(f"{cfg.model:>10} {'blocks':>7} {'parameters':>12} {'GFLOPs':>8}   (multiply-adds of one image)")
    for repeats in (1, 2, 4):
        with torch.device("meta"):
            net = model.create(cfg.model, parts=["afm_more.Deep"], repeats=repeats, times=0)
        parameters, blocks = sum(p.numel() for p in net.parameters()) / 1e6, repeats * len(net.blocks)
        print(f"repeats {repeats:>2} {blocks:>7} {parameters:>11.2f}M {model.multiply_adds(net) / 1e9:>8.2f}")


if __name__ == "__main__":
    data.run_cli(main)
