"""Networks of other codes as velocities in our time, where t = 0 is data and t = 1 is noise.

    reverse_time   -net(x, 1 - t)                    SiT              changes of the weights, exact
    turn_time      net(x, 1 - t)                     JiT, CAFM's D
    TimeScale      net(x, 1000 t)                    AFM              parts of a network
    VPNoise        from the noise on a schedule      DiT

extras/official.py reads the files. `python -m extras.official_times` prints DiT's step at each of our times.
"""
import numpy as np
import torch
from torch import Tensor

import data
import model
from losses import expand_dims

# ---- 1. Changes of weights ----


def reverse_time(weights: dict) -> dict:
    """The weights of -net(x, 1 - t), given those of net: SiT's data end, t = 1, becomes ours, t = 0."""
    weights = turn_time(weights)
    return weights | {k: -v for k, v in weights.items() if k.startswith("final_layer.linear.")}


def turn_time(weights: dict) -> dict:
    """The weights of net(x, 1 - t), given those of net. Only the time embedding's first layer changes:

    cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t), and sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t).
    """
    first = weights["t_embedder.mlp.0.weight"]
    W_cos, W_sin = first.double().chunk(2, 1)
    cos_f, sin_f = model.sinusoid(torch.ones(1, dtype=torch.float64), first.shape[1]).chunk(2, 1)
    turned = torch.cat([W_cos * cos_f + W_sin * sin_f, W_cos * sin_f - W_sin * cos_f], 1)
    return weights | {"t_embedder.mlp.0.weight": turned.to(first.dtype)}


# ---- 2. Parts ----


class VPNoise(model.Part):
    """A network that predicts the noise e on DiT's schedule, as a velocity.

    It sees x_t / |(1 - t, t)| at the step of equal noise-to-signal ratio; then x = (x_t - t e) / (1 - t) and
    v = e - x. The schedule ends at a ratio of 157, t = 0.9937: later times are evaluated there.
    """

    def __init__(self, **config):
        super().__init__(**config)
        self.predict = "eps"  # no objective trains such a network

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        t = t.clamp(0.0099, 0.9936)
        signal, noise = expand_dims(1 - t, x_t), expand_dims(t, x_t)
        e = super().forward(x_t / torch.hypot(signal, noise), vp_step(t), y).to(x_t.dtype)
        return e - (x_t - noise * e) / signal


def vp_step(t: Tensor) -> Tensor:
    """DiT's (fractional) step 0 .. 999 of noise-to-signal ratio t / (1 - t); betas: linspace(1e-4, .02)."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    log_ratio = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    own = torch.log(t / (1 - t)).cpu().double().numpy()
    return torch.from_numpy(np.interp(own, log_ratio, np.arange(1000.0))).to(t)


class TimeScale(model.Part):
    """A network whose times are multiplied by time_scale, as are those of a run that starts from it."""
    inherited = ("time_scale",)

    def __init__(self, time_scale: float = 1000.0, **config):
        super().__init__(**config)
        self.config |= dict(time_scale=time_scale)
        for name in ("t_embedder", "jump_embedder"):
            if hasattr(self, name):
                setattr(self, name, ScaledTimes(getattr(self, name), time_scale))


class ScaledTimes(model.TimestepEmbedder):
    """The embedding of scale t."""

    def __init__(self, embedder: model.TimestepEmbedder, scale: float):
        super().__init__(len(embedder.mlp[2].weight), embedder.frequencies)
        self.mlp, self.scale = embedder.mlp, scale

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(self.scale * t)


def main(argv: list[str] | None = None) -> None:
    data.parse(data.dataclasses.make_dataclass("Config", []), argv, "DiT's step at each of our times.")
    times = torch.arange(1, 10) / 10
    for t, step in zip(times.tolist(), vp_step(times).tolist()):
        print(f"t = {t:.1f}   step {step:6.1f} of 1,000")


if __name__ == "__main__":
    data.run_cli(main)
