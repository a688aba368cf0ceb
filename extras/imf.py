"""iMF, improved MeanFlow: a regression on the velocity, and guidance as an input (arXiv:2512.02012).

Beside `meanflow` in losses.py, which takes du/dt along the sample's velocity e - x: here it is taken along
the network's own velocity, so that the noise of e - x is in the target alone. With --head that velocity has
last blocks of its own (`VelocityHead`), with --omega_max the network takes a guidance scale w (`Guidance`),
which sampling chooses. Both are the paper's; without them, its boundary form, short runs are better.

    python train.py --loss imf --init runs/glyphs --out runs/imf
    python train.py --loss imf --head 1 --omega_max 4 --init runs/glyphs --out runs/guided
    python sample.py runs/guided --n 100 --steps 2 --guidance 3
    python -m extras.imf                                   beside meanflow on the 1-D mixture

1-D mixture, seed 0, W1 in 1, 2, 4 and 50 steps: 0.075, 0.077, 0.052, 0.013 (meanflow: 0.083, 0.074, 0.047,
0.016); rms to the exact flow map: 0.106, 0.114, 0.079, 0.031 (0.116, 0.120, 0.070, 0.039).

On glyphs: extras/README.md. A step takes 2.9 of fm's time, with head and guidance 3.3.
"""
import copy
import functools
import re
import sys

import torch
import torch.nn as nn
from torch import Tensor

import data
import losses
import model
from data import option
from extras import mixture
from losses import (JUMP_OR_FLOW, adaptive, drop_labels, expand_dims, interpolate, masked_call, two_errors,
                    two_times, velocity_target)

# ---- 1. The objective ----


def imf(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Improved MeanFlow: E w |u + (t - r) sg(du/dt) - v_g|^2 + E w |v_net - v_g|^2   (arXiv:2512.02012)

    with du/dt along the network's own velocity v_net, that of its head. Without one (--head 0, the paper's
    boundary form) v_net = u(x_t, t, t), and there is no second term. v_g: see `velocity_for_scale`.

    paper: a network conditioned on t - r and not on t, and on the interval of t in which guidance acts; here:
    on t too, which flows of low dimension need, and guidance at all t. w, c: as for meanflow.
    """
    t, r = two_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, JUMP_OR_FLOW)

    scale = (cfg.omega_max ** draws.uniform("guidance scale"),) if cfg.omega_max > 1 else ()
    own = own_velocity(net, x_t, t, y, cfg, *scale)
    v = velocity_for_scale(net, velocity_target(net, x, e, x_t, t), own, x_t, t, y, cfg, *scale)
    u_dudt = functools.partial(model.time_derivative, net)
    dudt = masked_call(r < t, lambda *at: u_dudt(*at)[1], x_t, t, y, own.to(x_t.dtype), r, *scale)

    u, *v_net = net(x_t, t, y, r, *scale, head=True) if cfg.head else [net(x_t, t, y, r, *scale)]
    errors = [u + expand_dims(t - r, x) * dudt - v, *(head - v for head in v_net)]
    loss = sum(adaptive(error, cfg.p, 0.01 / x[0].numel()).mean() for error in errors)
    return loss, two_errors(errors[0], t, r)


@torch.no_grad()
def own_velocity(net, x_t: Tensor, t: Tensor, y: Tensor, cfg, *scale: Tensor) -> Tensor:
    """The network's own velocity, detached: by its head, or as the jump of no length."""
    return net(x_t, t, y, t, *scale, head=True)[1] if cfg.head else net(x_t, t, y, t, *scale)


def velocity_for_scale(net, v: Tensor, own: Tensor, x_t: Tensor, t: Tensor, y: Tensor, cfg, w=None) -> Tensor:
    """v_g = v + (1 - 1 / w) (v_net(y) - v_net(null)) for a network conditioned on w; v under the null label.

    (arXiv:2512.02012.) Its fixed point is v_net = v_null + w (E v - v_null). The scales w of training have a
    density like 1 / w up to omega_max. Unlike in meanflow_guided.py the noise of v is not multiplied by w.
    """
    if w is None:
        return v
    null = own_velocity(net, x_t, t, torch.full_like(y, net.num_classes), cfg, w)
    return v + expand_dims(1 - 1 / w, v) * (own - null)


# ---- 2. The network: two parts, and a small one for points ----


class Guidance(model.Part):
    """A DiT conditioned on a guidance scale w as well, by an embedding of 1 - 1 / w; without w, w = 1."""
    generator_only = True
    guidance_conditioned = True

    def __init__(self, **config):
        super().__init__(**config)
        self.guide_embedder = model.TimestepEmbedder(self.config["width"])
        first, _, last = self.guide_embedder.mlp
        nn.init.normal_(first.weight, std=0.02)
        for zero in (first.bias, last.weight, last.bias):  # so that a flow's weights beside it are that flow
            nn.init.zeros_(zero)

    def condition(self, t: Tensor, y: Tensor, r: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        w = torch.ones_like(t) if w is None else w
        return super().condition(t, y, r) + self.guide_embedder(1 - 1 / w)

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        own = {k: v for k, v in self.state_dict().items() if k.startswith("guide_embedder.")}
        return own | super().inherit(given, at)


class VelocityHead(model.Part):
    """A DiT whose last `velocity_head` blocks and last layer are there twice, once for the velocity at t.

    Training alone uses them. The second blocks stand at the end of `blocks`, after the first `depth`.
    """
    generator_only = True

    def __init__(self, velocity_head: int, depth: int, **config):
        if not 0 < velocity_head <= depth:
            raise ValueError(f"a velocity head of {velocity_head} blocks: expected 1 to {depth} (the blocks)")
        super().__init__(depth=depth + velocity_head, **config)
        self.config |= dict(velocity_head=velocity_head, depth=depth)
        if getattr(self, "context_start", -1) >= depth - velocity_head:
            raise ValueError(f"a velocity head of {velocity_head} blocks: tokens of the class join at block "
                             f"{self.context_start}, not before the last {velocity_head} of {depth}")
        self.head_layer = copy.deepcopy(self.final_layer)  # both are zero

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, *more: Tensor, head=False):
        """The jump's velocity, or with `head` the pair of it and the velocity at t."""
        if not head:
            return super().forward(x_t, t, y, r, *more)
        depth, n = self.config["depth"], self.config["velocity_head"]
        with self.autocast():
            c = self.condition(t, y, r, *more)                                               # (B, W)
            x = self.trunk(self.embed(x_t) + self.pos_embed, c, y, range(depth - n))         # (B, N, W)
            u = self.draw(self.trunk(x, c, y, range(depth - n, depth)), c)                   # (B, C, h, w)
            x = self.trunk(x, c, y, range(depth, depth + n))[:, self.extra_tokens:]
            v = self.unpatchify(self.head_layer(x, c))[:, :self.channels]
        outs = [out.to(torch.promote_types(out.dtype, torch.float32)) for out in (u, v)]
        return [model.clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out for out in outs]

    def trunk(self, x: Tensor, c: Tensor, y: Tensor | None = None, blocks: range | None = None) -> Tensor:
        for k in range(self.config["depth"]) if blocks is None else blocks:
            x = self.run_block(k, x, c, y)
        return x

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """As a DiT does, and the head starts as a copy of the last blocks and the last layer."""
        weights, own, n = super().inherit(given, at), self.state_dict(), self.config["velocity_head"]
        if given.config["depth"] != self.config["depth"]:
            raise ValueError(f"--init: a network of {given.config['depth']} blocks, this one has "
                             f"{self.config['depth']}: give the --model and --net of that one")

        def twin(key: str) -> str:
            key = key.replace("final_layer.", "head_layer.")
            return re.sub(r"^blocks\.(\d+)", lambda k: f"blocks.{int(k[1]) + n}", key)

        return {twin(key): value for key, value in weights.items() if twin(key) in own} | weights


def network(cfg, source) -> dict:
    """The network's options: two times, and the parts that the settings ask for."""
    parts = [name for name, wanted in (("Guidance", cfg.omega_max > 1), ("VelocityHead", cfg.head)) if wanted]
    head = dict(velocity_head=cfg.head) if cfg.head else {}
    return dict(times=2, parts=[f"imf.{name}" for name in parts]) | head


class TwoVelocities(mixture.PointNet):
    """A network of points, predicting v, with a velocity head: its last layer alone is there twice."""

    def __init__(self, dimension: int = 1, **options):
        super().__init__(dimension, outputs=2 * dimension, **options)

    def forward(self, x_t: Tensor, t: Tensor, y=None, r: Tensor | None = None, head: bool = False):
        u, v = self.layers(self.features(x_t, t, r)).chunk(2, 1)
        return (u, v) if head else u


def check_imf(cfg) -> None:
    losses.check_jumps(cfg)
    if cfg.omega_max > 1 and not cfg.label_drop:
        raise ValueError(f"--omega_max {cfg.omega_max} --label_drop 0: guidance needs dropped labels")


FLAGS = losses.JUMPS | dict(
    head=option(0, "blocks that the velocity head has for itself; 0: no head, the boundary form"),
    omega_max=option(1.0, "the network is conditioned on a guidance scale from 1 to this; 1: it is not"))

losses.register("imf", imf, flags=FLAGS, defaults=losses.FROM_FLOW | dict(jumps=0.35),
                scratch=losses.FROM_SCRATCH, check=check_imf, network=network,
                sampling=lambda cfg: dict(solver="euler") if cfg.omega_max > 1 else losses.flow_map(cfg),
                points=losses.JUMP_POINTS | dict(head=1, kind=TwoVelocities))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    mixture.main(["--losses", "meanflow,imf", "--out", "imf.png", *argv])


if __name__ == "__main__":
    data.run_cli(main)
