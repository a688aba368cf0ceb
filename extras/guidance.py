"""Guidance by a weaker network (autoguidance), or of the first channels only.

    python -m extras.guidance runs/mine --reference runs/weaker --guidance 2
    python -m extras.guidance DiT-XL-2-256x256.pt --guide_channels 3 --codec latents:sd-vae-ft-mse.safetensors

The other settings are those of sample.py. `Guided` wraps a network into one that takes the guidance scale as
an input, so that samplers need to know nothing of it. The figures of DiT and SiT guide 3 of 4 channels.
"""
import dataclasses

import torch
import torch.nn as nn
from torch import Tensor

import data
import sample
from data import option


class Guided(nn.Module):
    """A network (x_t, t, y, r, s) -> v_ref + s (v - v_ref) of the network `net` of velocities v.

    v_ref: of `reference`, a weaker network (autoguidance, arXiv:2406.02507), or of `net` under the null label
    (arXiv:2207.12598). channels: how many are guided, 0: all. Without s it is v.
    """
    guidance_conditioned = null_class = True

    def __init__(self, net: nn.Module, reference: nn.Module | None = None, channels: int = 0):
        super().__init__()
        if getattr(net, "guidance_conditioned", False):
            raise ValueError("this network takes the guidance scale itself, and no reference or channels")
        if channels and len(getattr(net, "state", "CHW")) == 1:
            raise ValueError(f"channels {channels}: a token is guided with this network's image; leave it "
                             "at 0")
        if not 0 <= channels <= net.shape[0]:
            raise ValueError(f"--guide_channels {channels}: expected 0 (all) to {net.shape[0]}")
        if reference is None and not net.null_class:
            raise ValueError("guidance without a null label: use guidance 1 or a reference")
        self.net, self.reference, self.channels = net, reference, channels
        for name in ("shape", "state", "times", "num_classes", "predict", "t_min"):
            setattr(self, name, getattr(net, name, None))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor, s: Tensor | None = None) -> Tensor:
        if s is None:
            return self.net(x_t, t, y, r)
        if self.reference is not None:
            v, v_ref = self.net(x_t, t, y, r), self.reference(x_t, t, y, r)
        else:
            pairs = (x_t, x_t), (t, t), (y, torch.full_like(y, self.net.num_classes)), (r, r)
            v, v_ref = self.net(*map(torch.cat, pairs)).chunk(2)
        v_guided = v_ref + s.view(-1, *[1] * (x_t.dim() - 1)) * (v - v_ref)
        n = self.channels or v.shape[1]
        return torch.cat([v_guided[:, :n], v[:, n:]], 1)


@dataclasses.dataclass
class Config(sample.Config):
    guide_channels: int = option(0, "guide the first so many channels; 0: all (figures of DiT, SiT: 3)")
    reference: str = option("", "autoguidance: the checkpoint of a weaker network, instead of the null label")


def guide(net: nn.Module, cfg: Config, device) -> tuple[nn.Module, str]:
    """The network as cfg wants it guided, and words for that."""
    if cfg.reference and cfg.guidance == 1:
        raise ValueError(f"--reference {cfg.reference}: guidance 1 is none; give more, or leave it out")
    if cfg.guidance == 1 or not (cfg.reference or cfg.guide_channels):
        return net, ""
    reference = sample.load(cfg.reference, cfg, device) if cfg.reference else None
    words = [f"autoguidance by {cfg.reference}"] * bool(cfg.reference)
    words += [f"of the first {cfg.guide_channels} channels"] * bool(cfg.guide_channels)
    return Guided(net, reference, cfg.guide_channels), f" ({', '.join(words)}; evaluations doubled)"


def main(argv: list[str] | None = None) -> None:
    cfg = sample.settings(Config, argv, __doc__)
    device = data.start_processes(cfg.device)
    net, words = guide(sample.load(cfg.checkpoint, cfg, device), cfg, device)
    sample.write(cfg, net, device, words)
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
