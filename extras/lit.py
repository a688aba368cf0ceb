"""LiT: attention that is linear in the number of tokens (arXiv:2501.12976).

Softmax attention costs N^2 for N tokens. Without the softmax, (f(q) f(k)^T) v can be computed as
f(q) (f(k)^T v), which costs N; a convolution of v makes up for the neighbourhood that is lost.

    python train.py --model LiT-S/2 --data latents --size 0 --predict v --init SiT-S-2.pt --out runs/lit
    python -m extras.lit                                                 the zoo with these networks

`--init` of a SiT file or run gives the network all weights but those of attention, as in the paper. paper:
few heads, and distillation of a teacher; here: SiT's heads (two in LiT-glyph), the loss of the run. At the
256 tokens of LiT-XL/2 it saves 2 % of the multiply-adds; it is for larger images. Nothing was trained at this
size: not checked yet.
"""
import math

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import model


class LinearAttention(model.Attention):
    """LiT's attention (arXiv:2501.12976): f(q) (f(k)^T v) / (f(q) sum f(k)) + conv(v), with f = ReLU.

    conv: a 5 x 5 convolution of each feature of v by itself. Tokens must be those of a square image.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.dwc = nn.Conv2d(width // heads, width // heads, 5, padding=2, groups=width // heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, side = F.relu(q), F.relu(k), math.isqrt(v.shape[2])
        image = v.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))              # (B H, d, side, side)
        near = self.dwc(image).flatten(2).transpose(1, 2).view_as(v)                     # (B, H, N, d)
        size = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)                        # (B, H, N, 1)
        return q @ (k.transpose(-2, -1) @ v) / (size + 1e-6) + near


class LiT(model.Part):
    """A DiT with linear attention. A discriminator, which reads one more token, is without this part."""
    generator_only = True

    def __init__(self, **config):
        super().__init__(**config)
        if self.extra_tokens or self.state != self.shape:
            raise ValueError("linear attention (LiT) is for the tokens of an image alone, not with those of "
                             "a class (JiT) or an encoder (--loss reg) beside them: choose another --model")

    def make_block(self) -> nn.Module:
        block = super().make_block()
        block.attn = LinearAttention(self.config["width"], self.config["heads"])
        return block

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """From a network with softmax attention: all but attention, which stays as it is."""
        weights = super().inherit(given, at)
        if isinstance(given, LiT):
            return weights
        own = {k: v for k, v in self.state_dict().items() if ".attn." in k}
        return {k: v for k, v in weights.items() if ".attn." not in k} | own


for size in model.SIZES:
    model.ZOO[f"LiT-{size}/2"] = model.ZOO[f"SiT-{size}/2"] | dict(parts=["lit.LiT"])
model.ZOO["LiT-glyph"] = model.ZOO["glyph-S"] | dict(parts=["lit.LiT"], heads=2)

if __name__ == "__main__":
    data.run_cli(model.main)
