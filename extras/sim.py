"""SIM: a flow becomes a generator of one step, without data (score implicit matching, arXiv:2410.16794).

Beside `afm` in losses.py: here, too, a second network judges samples, but it is no discriminator. It is the
flow of the samples themselves, trained on them beside the generator; where it and the frozen flow of --init
disagree, samples move towards the latter. `dmd` (dmd.py) is its neighbour. The data are never looked at.

    python train.py --loss sim --init runs/glyphs --out runs/sim
    python sample.py runs/sim --n 100

On glyphs: FD-glyphs 14.6, accuracy 0.998, recall 0.83 in one step (extras/README.md).
"""
import torch
from torch import Tensor

import data
import losses
import model
import sample
from data import option
from extras.distill import check, frozen
from losses import expand_dims, interpolate, sample_times, velocity_target


def sim_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G) -> tuple[Tensor, dict]:
    """The flow of the samples: flow matching on them, E |v_D(x_t, t, y) - (n - g)|^2, noise n, sample g."""
    with torch.no_grad():
        g, y = generated(G, x, draws)
    x_t, n, t = noised(g, D, draws, cfg)

    loss = (D(x_t, t, y) - velocity_target(D, g, n, x_t, t)).square().mean()
    return loss, {}


def sim_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D, T) -> tuple[Tensor, dict]:
    """The generator, score implicit matching:  -E w(t) <d / (|d|^2 + c^2)^(1/2), s_D - grad log q(x_t | g)>

    with d = s_D - s_T, the scores s = -(x_t + (1 - t) v) / t of the samples' flow D and of the frozen flow T
    at x_t = (1 - t) g + t n, q(x_t | g) = N((1 - t) g, t^2)   (arXiv:2410.16794, Sec. 3.3, pseudo-Huber). The
    weights of D and T are frozen, but gradients go through x_t: the gradient is that of E w
    (|d|^2 + c^2)^(1/2), the distance of the scores. The other sign runs away from T. |.|: means over pixels.
    w: see `weight`.

    paper: the generator starts as the flow's answer to noise of EDM's scale 2.5; here: to noise alone, t = 1.
    """
    g, y = generated(G, x, draws)
    x_t, n, t = noised(g, D, draws, cfg)

    v_D, v_T = D(x_t, t, y), T(x_t, t, y)

    k = expand_dims((1 - t) / t, x)
    d, error = k * (v_T - v_D), k * (n - g - v_D)
    size = (d.square().flatten(1).mean(1) + cfg.c ** 2).sqrt()
    loss = -(weight(t) * (d * error).flatten(1).mean(1) / size).mean()
    return loss, {"difference": (v_T - v_D).square().mean()}


def weight(t: Tensor) -> Tensor:
    """w(t) = t^2 / (1 - t), by which an error of scores is that of the clean images E[x | x_t]."""
    return t ** 2 / (1 - t)


def generated(G, x: Tensor, draws) -> tuple[Tensor, Tensor]:
    """Samples of the shape of x, by the jump from noise to data, and labels for them, drawn as well."""
    y = (draws.uniform("label of the sample") * G.num_classes).long().to(x.device)
    e, one = draws.normal("noise", x.shape[1:]), x.new_ones(len(x))
    return losses.jump(G, e, one, 0 * one, y), y


def noised(g: Tensor, D, draws, cfg) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, its noise and t, not so near 0 or 1 that scores are no numbers, nor a network's v no velocity."""
    t = sample_times(draws, cfg).clamp(max(0.02, D.t_min), 0.98)
    n = draws.normal("noise of the samples", g.shape[1:])
    return interpolate(g, n, t), n, t


# ---- What the loop knows of it ----


def inputs(role: str, cfg, source, net) -> tuple:
    return (frozen(cfg, net),) if role == "G" else ()


FLAGS = dict(d_lr=option(1e-3, "learning rate of the samples' flow; 0: the same"),
             d_warmup=option(100, "steps of the samples' flow alone before the generator's first"),
             d_steps=option(1, "steps of the samples' flow for one of the generator"))
SHARED = dict(turn=losses.cafm_turn, inputs=inputs, check=check,
              sampling=lambda cfg: losses.flow_map(cfg) | dict(steps=1),
              discriminator=lambda cfg, G: model.load(sample.find_checkpoint(cfg.init)),
              network=lambda cfg, source: dict(times=0),
              defaults=dict(steps=3000, lr=2e-4, beta1=0.0, ema=0.99, decay="constant", time_mean=0.0,
                            time_std=1.0, label_drop=0.0))

losses.register("sim", sim_G, sim_D, flags=FLAGS | dict(
    c=option(0.01, "scores that differ by less count by their square")), **SHARED)
