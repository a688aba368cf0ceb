"""JiT, a plain transformer of pixels (arXiv:2511.13720).

The core's DiT predicts the clean image with `--predict x` as well. What JiT has besides:

    patches         of 16 or 32 pixels, embedded through a narrow layer (`BottleneckEmbed`)
    attention       rotary positions beside the added ones, queries and keys normalised (`JiTAttention`)
    MLP             SwiGLU; all norms are RMSNorm with weights
    class           besides adaLN, a number of tokens of the class join the image's from one block on

Parameter names and shapes are the official ones, so extras/official.py loads JiT's files. A discriminator
like this is read out of the first token of the class, as CAFM's official one for JiT (arXiv:2604.11521).

    python train.py --model JiT-B/16 --data IMAGENET/train --size 256 --out runs/jit
    python train.py --model JiT-B/16 .. --loss cafm --init runs/jit        or --loss repa, meanflow, ..
    python -m extras.jit                                                   the zoo with these sizes

The forward pass is JiT's to 1.4e-6 of the rms, on formula weights against numbers of a published fork of the
official class; no official file could be had, and nothing was trained at this size: not checked yet.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import model
from model import RMSNorm

# ---- 1. Layers ----


class BottleneckEmbed(nn.Module):
    """Patches -> tokens (B, N, W) through a narrow linear layer: a large patch has few degrees of freedom."""

    def __init__(self, channels: int, patch: int, width: int, bottleneck: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)
        for layer in (self.proj1, self.proj2):
            model.init_xavier_(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class SwiGLU(nn.Module):
    """w3 (silu(a) b) with (a, b) = w12 x, the size of an Mlp of this hidden width (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * int(hidden * 2 / 3))
        self.w3 = nn.Linear(int(hidden * 2 / 3), width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


def rope_table(features: int, side: int) -> Tensor:
    """Rotary positions (2, side^2, d): cosines and sines of the angles of a head's d features.

    Half of the features turn with the row, half with the column. Pair k of n = d / 4 in a half turns by
    10^4^(-k / n) a position (arXiv:2104.09864, in JiT's layout).
    """
    turns = 1e4 ** (-torch.arange(0, features // 2, 2) / (features // 2))
    angle = (torch.arange(side)[:, None] * turns).repeat_interleave(2, 1)                 # (side, d / 2)
    row, column = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    both = torch.cat([row, column], 2).flatten(0, 1)                                      # (side^2, d)
    return torch.stack([both.cos(), both.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """The pairs of features of x (B, H, N, d) turned by the angles of `rope` (2, M, d).

    The first N - M tokens, which have no place in the image, stay as they are.
    """
    cos, sin = rope.to(x.dtype)
    extra = x.shape[2] - len(cos)
    image = x[:, :, extra:]
    turned = torch.stack([-image[..., 1::2], image[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :extra], image * cos + turned * sin], 2)


class WeightedNorm(RMSNorm):
    """RMSNorm, and a weight for each feature."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


model.NORMS["rms_weight"] = WeightedNorm


class JiTAttention(model.Attention):
    """Attention with normalised queries and keys and rotary positions."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__(width, heads)
        if width // heads % 4:
            raise ValueError(f"width {width} with {heads} heads: JiT turns pairs of features for rows and "
                             f"columns, so the {width // heads} features of a head must be a multiple of 4")
        self.q_norm, self.k_norm = WeightedNorm(width // heads), WeightedNorm(width // heads)
        self.register_buffer("rope", rope_table(width // heads, side), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return super().attend(rotate(q, self.rope), rotate(k, self.rope), v)


# ---- 2. The part ----


class JiT(model.Part):
    """A DiT of JiT's layers. bottleneck: width of the patch embedding's narrow layer.

    context: how many tokens of the class join in front of the image's at block context_start, counted from 0;
    they do not take part in the last layer. Parts that stand behind this one keep their own attention or MLP.
    """

    def __init__(self, bottleneck: int = 128, context: int = 32, context_start: int = 4, **config):
        self.extra_tokens, self.context_start = context, context_start
        super().__init__(**config)
        self.config |= dict(bottleneck=bottleneck, context=context, context_start=context_start)
        width, depth = self.config["width"], self.config["depth"]
        if context < 0 or not 0 <= context_start < depth:
            raise ValueError(f"{context} tokens of the class at block {context_start}: expected 0 or more, "
                             f"at one of the blocks 0 .. {depth - 1}")
        self.x_embedder = BottleneckEmbed(self.channels, self.patch, width, bottleneck)
        if context:
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, context, width))

    def make_block(self) -> nn.Module:
        c, block = self.config, super().make_block()
        if type(block.attn) is model.Attention:
            block.attn = JiTAttention(c["width"], c["heads"], c["input_size"] // c["patch"])
        if type(block.mlp) is model.Mlp:
            block.mlp = SwiGLU(c["width"], int(c["width"] * c["mlp_ratio"]))
        return block

    def run_block(self, k: int, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        if k == self.context_start and self.extra_tokens:
            tokens = self.y_embedder(y)[:, None] + self.in_context_posemb                 # (B, context, W)
            x = torch.cat([tokens, x], 1)
        return super().run_block(k, x, c, y)

    def draw(self, x: Tensor, c: Tensor) -> Tensor:
        return super().draw(x[:, self.extra_tokens:], c)


# ---- 3. The zoo ----

JIT = dict(parts=["jit.JiT"], channels=3, predict="x", norm="rms_weight", context=32)
SIZES = {"S": (384, 12, 6, 128), "B": (768, 12, 12, 128), "L": (1024, 24, 16, 128), "H": (1280, 32, 16, 256)}

for size, (width, depth, heads, bottleneck) in SIZES.items():
    for patch in (16, 32):
        model.ZOO[f"JiT-{size}/{patch}"] = JIT | dict(
            input_size=16 * patch, patch=patch, width=width, depth=depth, heads=heads, bottleneck=bottleneck,
            context_start=depth // 3)
model.ZOO["JiT-glyph"] = model.ZOO["glyph-S"] | JIT | dict(bottleneck=128, context=4, context_start=1)

if __name__ == "__main__":
    data.run_cli(model.main)
