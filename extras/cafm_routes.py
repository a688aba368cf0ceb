"""CAFM with the derivatives of D by forward mode, as in the official code, or by differences.

CAFM (arXiv:2604.11521) trains a discriminator D on its derivatives J(w) = <grad_x D, w> + dD/dt along the
velocities w of data and of the generator. The core's `cafm` takes one input gradient, which serves every
direction, and differentiates it again. With `--loss cafm_routes`

    --route forward   torch.func.jvp, mapped over the directions: the same numbers
    --route finite    (D(x_t, t) - D(x_t - h w, t - h)) / h, h = min(t, interval), which tends to J as h -> 0:
                      no derivative of the network, so nothing limits it (CAMF, the finite-interval form)

`forward` confirms `cafm` and shows what it saves: on glyph-S, batch 32, a step of D costs 3.4 flow-matching
steps by `cafm`, 7.2 by forward, 3.6 by finite, with 113, 164 and 84 MB (2 CPU cores, 2026-11-21).

`python -m extras.cafm_routes` trains all three on a 1-D mixture and compares them with its closed form.
"""
import torch
from torch import Tensor

import data
import losses
import model
from data import option
from extras.operators import operators
from losses import drop_labels, interpolate, sample_times, velocity_target

# ---- 1. Slopes of D along velocities ----


def forward_slopes(D, x_t: Tensor, t: Tensor, y: Tensor, directions: Tensor,
                   backend: str = "plain") -> tuple[Tensor, Tensor]:
    """D (B,) and its derivatives J (K, B) along (w, 1) for each w of `directions` (K, B, C, h, w).

    All with a graph, at the price of two networks' pass a direction. What torch gets wrong is refused.
    """
    if torch.compiler.is_compiling():  # pytorch issue 192985
        raise RuntimeError("a loss on forward-mode derivatives is what torch.compile can get wrong without "
                           "an error: compile nothing around it, or use --loss cafm")
    D = model.bare(D)
    if "aten::native_layer_norm" in operators(D, x_t, t, y):  # pytorch issue 196700
        raise ValueError("torch gets the gradient of a loss on a forward-mode derivative of nn.LayerNorm "
                         "wrong, without an error: create the network with norm='rms', or use --loss cafm")

    def slope(w):
        return torch.func.jvp(lambda x_t, t: D(x_t, t, y), (x_t, t), (w, torch.ones_like(t)))

    with model.attention_backend(backend):
        return torch.func.vmap(slope, out_dims=(None, 0))(directions)


def finite_slopes(D, x_t: Tensor, t: Tensor, y: Tensor, directions: Tensor,
                  interval: float) -> tuple[Tensor, Tensor]:
    """D (B,) and its mean slopes (K, B) from t - h to t along (w, 1) for each w of `directions`."""
    h = t.clamp(1e-4, interval)
    out = D(x_t, t, y)
    before = [D(x_t - losses.expand_dims(h, x_t) * w, t - h, y) for w in directions]
    return out, torch.stack([(out - value) / h for value in before])


# ---- 2. The objective ----


def cafm_routes_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G) -> tuple[Tensor, dict]:
    """CAFM's discriminator: E (J(v) - 1)^2 + E (J(u) + 1)^2 + cp E D^2, see `losses.cafm_D`."""
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    v = velocity_target(G, x, e, x_t, t)
    with torch.no_grad():
        u = G(x_t, t, y)

    if cfg.route == "finite":
        value, (real, fake) = finite_slopes(D, x_t, t, y, torch.stack([v, u]), cfg.interval)
    else:
        value, (real, fake) = forward_slopes(D, x_t, t, y, torch.stack([v, u]))
    loss = (real - 1).square().mean() + (fake + 1).square().mean() + cfg.cp * value.square().mean()
    return loss, {"slope_real": real.mean(), "slope_fake": fake.mean(), "value": value.mean()}


def cafm_routes_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D) -> tuple[Tensor, dict]:
    """CAFM's generator: E (J(u) - 1)^2 + ot E |u|^2. With --route forward this is `losses.cafm_G`.

    There J's derivatives of D are detached, for which one reverse pass is all that is needed.
    """
    if cfg.route == "forward":
        return losses.cafm_G(G, x, y, draws, cfg, D)
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    u = G(x_t, t, y)

    _, (fake,) = finite_slopes(D, x_t, t, y, u[None], cfg.interval)
    energy = u.square().mean()
    loss = (fake - 1).square().mean() + losses.ot_weight(draws, cfg) * energy
    return loss, {"slope_fake": fake.mean(), "energy": energy}


def check(cfg) -> None:
    """ValueError for settings that cannot be."""
    CAFM.check(cfg)
    if not 0 < cfg.interval <= 1:
        raise ValueError(f"--interval {cfg.interval}: expected a length of time in (0, 1]")
    if cfg.route == "forward" and cfg.checkpointing:
        raise ValueError("--checkpointing: forward mode saves nothing to compute again; use --loss cafm")
    if cfg.route == "forward" and cfg.processes == "shard":
        raise ValueError("--processes shard: FSDP cannot bring weights together inside torch.func; drop it, "
                         "or use --loss cafm, which gives the same numbers")


CAFM = losses.LOSSES["cafm"]
FLAGS = dict(route=option("forward", "slopes of D by forward mode, or by differences over --interval",
                          ("forward", "finite")),
             interval=option(0.05, "--route finite: length in time"))

losses.register("cafm_routes", cafm_routes_G, cafm_routes_D, turn=CAFM.turn, alarm=CAFM.alarm, check=check,
                flags=FLAGS | CAFM.flags, defaults=CAFM.defaults, discriminator=CAFM.discriminator,
                points=CAFM.points)


def main(argv: list[str] | None = None) -> None:
    runs = {"cafm": {}, "cafm_routes": {}, "cafm_routes, finite": dict(route="finite")}
    command = data.extra("mixture", "the 1-D mixture").command
    command(argv, "Train CAFM on a 1-D mixture by every route.", "cafm_routes.png", lambda cfg: runs)


if __name__ == "__main__":
    data.run_cli(main)
