"""CAT's networks (arXiv:2605.26449; GAT, arXiv:2509.24935): generator in stages, discriminator of scales.

The objective and how to run it: cat.py. Neighbours in the core: `DiT`, whose noise image and time become a
latent here, and `Discriminator`, which gives one number where this one gives one for each scale.

`python -m extras.cat_networks` prints how far fresh weights let the latent and the class move the images.
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import model

# ----------------------------------------------------------------------------------------------------------
# 1. The generator
# ----------------------------------------------------------------------------------------------------------


class Staged(model.Part):
    """One pass from a latent to an image in `stages` (K) coarse-to-fine stages   (CAT, arXiv:2605.26449).

    A mapping network turns z and the class, `latent` normalised numbers each, into w, which modulates every
    block; the tokens start as their positions. After floor(k depth / K) blocks, k = 1 .. K, a layer adds to
    the image: h_k = sum_{j <= k} image_j (GAT, arXiv:2509.24935). z is the first `latent` numbers of the
    noise image x_t at t = 1, and the last stage is the clean image: a jump from 1 to 0 gives h_K.
    encoder_features: the width of the features that the discriminator of such a generator is aligned with
    (0: none).

    GAT: 2-D RoPE, query-key norm, SwiGLU, scale and gate only, modulations a tenth as large at the start, a
    mapping of unit variance; here: DiT's blocks, `init_adaln_xavier_`, a mapping that is normalised, and
    last layers a tenth as large. What fresh ones make of z is grain, and a generator that starts with more
    grain than image gets rid of it by forgetting z.
    """
    generator_only = True
    entrances = ("stages",)  # methods beside forward that use weights: extras/shard.py asks

    def __init__(self, stages: int = 3, latent: int = 64, encoder_features: int = 0, **config):
        super().__init__(**config | dict(predict="x", learn_sigma=False, times=0))
        self.config |= dict(stages=stages, latent=latent, encoder_features=encoder_features)
        width, depth, numbers = self.config["width"], self.config["depth"], math.prod(self.shape)
        if not 2 <= stages <= depth or not 1 <= latent <= numbers:
            raise ValueError(f"{stages} stages and a latent of {latent}: expected 2 to {depth} stages (the "
                             f"blocks) and 1 to {numbers} numbers (an image)")
        del self.x_embedder
        self.y_embedder = model.LabelEmbedder(self.num_classes + self.null_class, latent)
        self.latent, self.ends = latent, [depth * k // stages for k in range(1, stages + 1)]
        self.norm = model.RMSNorm()
        self.mapping = nn.Sequential(SlowLinear(2 * latent, width), nn.SiLU(), SlowLinear(width, width))
        layer = (width, self.patch, self.channels, self.config["norm"])
        self.final_layer = nn.ModuleList(model.FinalLayer(*layer) for _ in self.ends)
        init_adaln_xavier_(*self.blocks, *self.final_layer)
        scale_init_(*(layer.linear for layer in self.final_layer))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, *_) -> Tensor:
        """The velocity to the last stage, at any time."""
        return model.clean_velocity(self.stages(x_t, y)[-1], x_t, t, self.t_min)

    def stages(self, e: Tensor, y: Tensor) -> Tensor:
        """The stages h_1 .. h_K (K, B, C, h, w), float32 or wider, of noise e (B, C, h, w), labels y (B,)."""
        with self.autocast():
            z = e.flatten(1)[:, :self.latent]
            given = torch.cat([self.norm(z), self.norm(self.y_embedder(y))], 1)              # (B, 2 latent)
            w = self.norm(self.mapping(given))                                               # (B, W)
            x, images = self.pos_embed.expand(len(e), -1, -1), []
            for k in range(len(self.blocks)):
                x = self.run_block(k, x, w, y)
                if k + 1 in self.ends:
                    images.append(self.unpatchify(self.final_layer[len(images)](x, w)))
        images = torch.stack(images)
        return images.to(torch.promote_types(images.dtype, torch.float32)).cumsum(0)


class SlowLinear(nn.Linear):
    """A linear layer that learns at 1 / 100 of the rate: its weights are kept 100 times as large (GAT).

    Adam's steps do not depend on the size of a gradient, so they move the product by a hundredth. At full
    rate the mapping soon shrinks what comes from z, and all samples of a class are one image.
    """

    def __init__(self, inputs: int, outputs: int, rate: float = 0.01):
        super().__init__(inputs, outputs)
        self.rate = rate
        nn.init.xavier_uniform_(self.weight, gain=1 / rate)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rate * self.weight, self.rate * self.bias)


def init_adaln_xavier_(*layers: nn.Module) -> None:
    """Modulations of Xavier's size instead of zeros, which would hide z from images, and images from D."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.adaLN_modulation[1].weight)


def scale_init_(*layers: nn.Module) -> None:
    """Weights a tenth as large: where pixels come and go, what is learned soon outweighs the random part."""
    for layer in layers:
        for p in layer.parameters():
            p.data.mul_(0.1)


# ----------------------------------------------------------------------------------------------------------
# 2. The discriminator
# ----------------------------------------------------------------------------------------------------------


class ScaleDiscriminator(nn.Module):
    """A number for each of K scales, finest first, each judged alone   (CAT, arXiv:2605.26449).

    Scales share the patch embedding, the blocks and the last layer; each has its positions, a scale
    embedding and a token that is read out. No token sees another scale, as that hurts: the same network
    once a scale is exactly the block-diagonal attention mask over all of them.

    GAT: the class enters by a projection in the last layer; here: by adaLN, as in `model.Discriminator`,
    because the blocks have it, and a patch embedding a tenth as large, as its random part is what gives the
    generator's images grain. With encoder_features the tokens of the finest scale, as they leave the last
    block, are projected to those of a frozen encoder, its token of the whole image first.
    """

    def __init__(self, trunk: model.DiT, stages: int, encoder_features: int = 0):
        super().__init__()
        width, size, patch = trunk.config["width"], trunk.shape[1], trunk.patch
        if size % (patch << stages - 1):
            raise ValueError(f"an image of {size} pixels, halved {stages - 1} times, does not divide into "
                             f"patches of {patch}: choose fewer stages, a smaller patch or another size")
        if trunk.extra_tokens or not isinstance(trunk.x_embedder, model.PatchEmbed):
            raise ValueError("--loss cat: its discriminator embeds patches of any scale alike, and takes no "
                             "tokens of the class: use another --model, such as a SiT")
        self.trunk, self.config = trunk, trunk.config
        trunk.final_layer = None  # it draws; here one token is read
        self.sides = [size // patch >> k for k in range(stages)]
        tables = [model.position_table(width, side) for side in self.sides]
        trunk.pos_embed = nn.Parameter(torch.cat(tables, 1), requires_grad=False)
        self.scale_embed = nn.Parameter(0.02 * torch.randn(stages, width))
        self.dis_embed = nn.Parameter(0.02 * torch.randn(stages, width))
        self.norm, last = model.RMSNorm(), model.NORMS[trunk.config["norm"]]
        self.final_layer = nn.Sequential(last(width), nn.Linear(width, 1, bias=False))
        if encoder_features:
            self.projectors = data.extra("repa", "--align").projectors(width, encoder_features)
        init_adaln_xavier_(*trunk.blocks)
        scale_init_(trunk.x_embedder.proj)

    def forward(self, images: list[Tensor], y: Tensor, project: bool = False):
        """K images (B, C, h / 2^k, w / 2^k), k = 0 .. K - 1, and y (B,) -> (B, K), float32 or wider.

        project: a pair, the second the tokens of the finest scale (B, 1 + N, F) as the encoder's features.
        """
        trunk, outs = self.trunk, []
        positions = trunk.pos_embed.split([side * side for side in self.sides], 1)
        with trunk.autocast():
            c = self.norm(trunk.y_embedder(y))                                               # (B, W)
            for k, (x, position) in enumerate(zip(images, positions, strict=True)):
                x = trunk.embed(x) + position + self.scale_embed[k]                          # (B, N/4^k, W)
                x = trunk.read(self.dis_embed[k], x, c, y)                                # (B, 1 + N/4^k, W)
                outs.append(self.final_layer(x[:, 0]))
                if k == 0 and project:
                    projected = self.projectors[0](x)                                        # (B, 1 + N, F)
            out = torch.cat(outs, 1)                                                         # (B, K)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return (out, projected.to(out.dtype)) if project else out

    def penalties(self) -> dict:
        return self.trunk.penalties() if hasattr(self.trunk, "penalties") else {}


def scale_discriminator(config: dict) -> ScaleDiscriminator:
    """A fresh discriminator of the size of a `Staged` generator with this config."""
    trunk = model.discriminator(config, times=0).trunk
    return ScaleDiscriminator(trunk, config["stages"], config["encoder_features"])


# ----------------------------------------------------------------------------------------------------------
# 3. Run alone: what fresh weights do
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    model: str = data.option("glyph-S", "a network of the zoo")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "What fresh weights of CAT's generator do with the latent and the class.")
    G = model.create(cfg.model, parts=["cat_networks.Staged"])
    e, y = torch.randn(16, *G.shape), torch.arange(16) % 2
    h, one = G.stages(e, y)[-1], G.stages(e[:1].expand_as(e), y)[-1]
    by_z, by_class = (h[0] - h[2]).std(), (one[0] - one[1]).std()
    print(f"{sum(p.numel() for p in G.parameters()) / 1e6:.2f}M parameters; images of deviation {h.std():.3f}"
          f", moved by {by_z:.3f} by z and by {by_class:.3f} by the class")


if __name__ == "__main__":
    data.run_cli(main)
