"""REG: an image is denoised together with a frozen encoder's token of it (arXiv:2507.01467).

`repa` (extras/repa.py) shows the encoder's features to the first blocks in training. Here the network also
moves one token, the encoder's of the whole image, from noise to data along with the image. So it is there
when sampling as well, at the price of one token; then it is left out.

    python train.py --loss reg --encoder judge.py:tokens --out runs/reg        as for repa, with its flags
    python sample.py runs/reg                      by any solver: a state is the image and the token
    python -m extras.reg runs/reg                  does the token belong to the image that was sampled?

The part `Token` goes with JiT's, which must stand before it, and not with LiT's. REG's own files load by
extras/official.py. On glyphs it brings no gain, see extras/repa.py. Loss and gradients are the official ones
to 9e-6 (random weights in the classes of Martinser/REG beside ours) and 2e-6 (formula weights, in the tests).
"""
import dataclasses
import math
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
from extras import encoders, repa
from extras.encoders import encoder_features
from losses import drop_labels, interpolate, sample_times, velocity_target

# ---- 1. The part ----


class Token(model.Part):
    """A DiT that denoises an image and a token of `token` numbers, an encoder's, together. Official names.

    A state is the numbers of the image and then those of the token, (B, C h w + token), so that noise,
    solvers and guidance treat both alike. Inside, the token stands in front of the image's without a
    position.
    """
    generator_only = True

    def __init__(self, token: int = 768, **config):
        self.token = token
        super().__init__(**config)
        self.config |= dict(token=token)
        width = self.config["width"]
        self.cls_projectors2, self.wg_norm = nn.Linear(token, width), nn.LayerNorm(width, eps=1e-6)
        model.init_xavier_(self.cls_projectors2)
        self.final_layer.linear_cls = nn.Linear(width, token)
        nn.init.zeros_(self.final_layer.linear_cls.weight)
        nn.init.zeros_(self.final_layer.linear_cls.bias)
        positions = F.pad(self.pos_embed, (0, 0, 1, 0))                                  # (1, 1 + N, W)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)

    state = property(lambda self: (math.prod(self.shape) + self.token,))

    def embed(self, x: Tensor) -> Tensor:
        image, token = x.split([math.prod(self.shape), self.token], 1)
        token = self.wg_norm(self.cls_projectors2(token))[:, None]
        return torch.cat([token, super().embed(image.unflatten(1, self.shape))], 1)      # (B, 1 + N, W)

    def draw(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.final_layer.modulated(x, c)
        image = self.unpatchify(self.final_layer.linear(x[:, 1:]))[:, :self.channels]
        return torch.cat([image.flatten(1), self.final_layer.linear_cls(x[:, 0])], 1)


# ---- 2. The objective ----


def reg(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, encoder) -> tuple[Tensor, dict]:
    """REG: `repa` of images that are denoised together with the encoder's token,

        E |v_net - v|^2 over the image + token E |v_net - v|^2 over the token + align E[1 - cos(h, z)]

    (arXiv:2507.01467 and its loss.py). Both have the same time. The token is aligned with the rest.
    """
    t = sample_times(draws, cfg)

    z = encoder(x, draws)                                                                # (B, 1 + N, F)
    both = torch.cat([x.flatten(1), z[:, 0]], 1)                                         # (B, C h w + F)
    e = draws.normal("noise", both.shape[1:])
    x_t = interpolate(both, e, t)

    v = velocity_target(net, both, e, x_t, t)

    error = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square()
    flow, token = error[:, :-z.shape[2]].mean(), error[:, -z.shape[2]:].mean()
    apart = repa.misalignment(net.projected(), z)
    return (flow + cfg.token * token + cfg.align * apart,
            {"flow": flow, "token": token, "misalignment": apart})


def token_network(cfg, source) -> dict:
    """Options of model.create: repa's, and the encoder's token."""
    options = repa.projected_network(cfg, source)
    return options | dict(parts=[*options["parts"], "reg.Token"], token=options["features"])


TOKEN = option(0.03, "weight of the loss of the encoder's token of the whole image")

losses.register("reg", reg, flags=repa.FLAGS | dict(token=TOKEN), network=token_network,
                inputs=repa.encoder_inputs)

# ---- 3. Run alone: does the token belong to the image? ----


@dataclasses.dataclass
class Config:
    run: str = option("", "a run folder of --loss reg on images, with --encoder")
    encoder: str = option("", "its encoder, named again: FILE.py:NAME")
    n: int = option(20, "samples")
    steps: int = option(25, "solver steps")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    description = "Compare the tokens that a run samples with its encoder's tokens of the sampled images."
    cfg = data.parse(Config, argv, description, ("run",))
    if not cfg.run:
        return print(__doc__.strip())
    path = sample.find_checkpoint(cfg.run)
    saved = vars(encoders.run_settings(path, cfg.encoder))
    if saved["loss"] != "reg" or not cfg.encoder:
        raise ValueError(f"{path}: not a run of --loss reg with an --encoder; give one")
    run, net = types.SimpleNamespace(**saved), model.load(path)
    encoder = encoder_features(run, data.dataset(run.data, run.size or None))
    draws, y = data.Draws(run.seed, range(cfg.n)), sample.labels_for(cfg.n, net.num_classes)
    state = sample.sample(net, draws.normal("sample noise", net.state), y, cfg.steps, "ab2")
    images, tokens = state.split([math.prod(net.shape), net.token], 1)
    seen = encoder(images.unflatten(1, net.shape).clamp(-1, 1))[:, 0]
    alike = F.cosine_similarity(tokens[:, None], seen[None], dim=2)                      # (n, n)
    own, other = alike.diag().mean(), alike[~torch.eye(cfg.n, dtype=torch.bool)].mean()
    print(f"cosine of sampled tokens and the encoder's of their images: {own:.3f}, of others: {other:.3f}")


if __name__ == "__main__":
    data.run_cli(main)
