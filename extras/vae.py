"""SD-VAE, the autoencoder of latent diffusion: 8 x 8 pixels become 4 numbers.

Rombach et al., arXiv:2112.10752, in the size of sd-vae-ft-ema and sd-vae-ft-mse, which DiT, SiT and their
successors use. Its parameters have the names of the official files, which `extras.latents.load_vae` reads.
Its posterior q(z|x) is a normal distribution of independent numbers: the network gives mean and log-variance.

    python -m extras.vae            its layers: sizes and parameters
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data

# ------------------------------------------------------------------------------------------------------------
# 1. Blocks
# ------------------------------------------------------------------------------------------------------------


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where the width changes."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.conv_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class PixelAttention(nn.Module):
    """x + attention between its pixels, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)                                 # (B, h w, W)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))      # (B, h w, W)
        return x + self.to_out[0](h).transpose(1, 2).view_as(x)


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resize(nn.Module):
    """Half the size: a convolution of stride 2, padded below and on the right. Or twice: repeated pixels."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, 1 if up else 2, padding=int(up))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one resolution, then, except at the last one, a change of size."""

    def __init__(self, width: int, out: int, depth: int, up: bool, resized: bool):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width if k == 0 else out, out) for k in range(depth))
        self.name = "upsamplers" if up else "downsamplers"
        setattr(self, self.name, nn.ModuleList([Resize(out, up)] if resized else []))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *getattr(self, self.name)):
            x = layer(x)
        return x


class Half(nn.Module):
    """The encoder (up=False: levels, then the middle) or the decoder (up=True: the middle, then levels)."""

    def __init__(self, inputs: int, widths: list[int], outputs: int, depth: int, up: bool):
        super().__init__()
        self.up, last = up, len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        levels = [Level(widths[max(0, k - 1)], width, depth, up, k < last) for k, width in enumerate(widths)]
        setattr(self, "up_blocks" if up else "down_blocks", nn.ModuleList(levels))
        self.mid_block = Middle(widths[0 if up else -1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def layers(self) -> tuple:
        return (self.mid_block, *self.up_blocks) if self.up else (*self.down_blocks, self.mid_block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ------------------------------------------------------------------------------------------------------------
# 2. The autoencoder
# ------------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """The autoencoder. Latents are in units of `scale`, which makes their standard deviation about one."""
    scale = 0.18215

    def __init__(self, widths: tuple[int, ...] = (128, 256, 512, 512)):
        super().__init__()
        self.encoder = Half(3, list(widths), 8, 2, up=False)
        self.decoder = Half(4, list(widths[::-1]), 3, 3, up=True)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of z before `scale` (B, 8, h/8, w/8), of images (B, 3, h, w) in [-1, 1]."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w), in [-1, 1] or a little beyond, of latents (B, 4, h, w)."""
        parts = latents.float().split(8)  # a few at a time: activations of 256 x 256 pixels are large
        return torch.cat([self.decoder(self.post_quant_conv(part / self.scale)) for part in parts])

    def image_shape(self, shape: tuple) -> tuple[int, int, int]:
        """(3, 8 h, 8 w), the shape of what a latent of this shape (C, h, w) is decoded to."""
        if shape[0] != 4:
            raise ValueError(f"--codec latents: decodes 4 channels, and this network makes {shape[0]}")
        return 3, 8 * shape[1], 8 * shape[2]


def posterior(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """A draw of the latent, z = (mean + std noise) scale: moments (B, 8, h, w), noise (B, 4, h, w)."""
    mean, log_variance = moments.float().chunk(2, 1)
    return (mean + (log_variance.clamp(-30, 20) / 2).exp() * noise) * scale


def main() -> None:
    with torch.device("meta"):
        vae, image, latent = VAE(), torch.empty(1, 3, 256, 256), torch.empty(1, 4, 32, 32)
    for half, x in ((vae.encoder, image), (vae.decoder, latent)):
        print("decoder" if half.up else "encoder", tuple(x.shape[1:]))
        for layer in (half.conv_in, *half.layers(), half.conv_out):
            x = layer(x)
            count = sum(p.numel() for p in layer.parameters())
            print(f"    {type(layer).__name__:<8} -> {str(tuple(x.shape[1:])):<16} {count:>12,} parameters")
    print(f"in all {sum(p.numel() for p in vae.parameters()):,}")


if __name__ == "__main__":
    data.run_cli(main)
