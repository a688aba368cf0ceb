"""DMD: a flow becomes a generator of one step by matching distributions (arXiv:2311.18828), without data.

Beside `sim`, whose second network, generator and flags it has: the gradient of the Kullback-Leibler
divergence instead of that of the distance of scores. It asks for no derivative of the two flows.

    python train.py --loss dmd --init runs/glyphs --out runs/dmd

On glyphs: FD-glyphs 12.2, accuracy 0.999, recall 0.82 in one step (extras/README.md).
"""
import torch
from torch import Tensor

import data
import losses
from extras import sim
from losses import expand_dims


def dmd_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D, T) -> tuple[Tensor, dict]:
    """The generator, distribution matching: a loss with the gradient E (x_D - x_T) / mean |g - x_T| by g

    (arXiv:2311.18828) for x_D, x_T = x_t - t v, the clean images that the samples' flow D and the
    frozen flow T see in x_t = (1 - t) g + t n; s_D - s_T is (1 - t) / t^2 times their difference.

    paper: and a regression on pairs of noise and the flow's sample; here: without, as in its successor.
    """
    g, y = sim.generated(G, x, draws)
    x_t, n, t = sim.noised(g.detach(), D, draws, cfg)

    with torch.no_grad():
        v_D, v_T = D(x_t, t, y), T(x_t, t, y)

    time = expand_dims(t, x)
    size = (g.detach() - x_t + time * v_T).abs().flatten(1).mean(1)
    direction = time * (v_T - v_D) / expand_dims(size, x)
    return (direction * g).mean(), {"difference": (v_T - v_D).square().mean()}


losses.register("dmd", dmd_G, sim.sim_D, flags=sim.FLAGS, **sim.SHARED)
