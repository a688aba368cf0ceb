"""The plainest PyTorch version of a flow-matching step: the DiT of model.py as one would first write it.

float32, attention as two matrix products and a softmax, every modulation written out, optimizer, clipping and
average as loops over tensors; no fused kernel, no autocast, no compile. The parameters have model.py's names,
so its weights load here, and a test compares the two. `python -m extras.benchmark` calls this plain PyTorch.
"""
import copy
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import model


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, W = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(W // self.heads), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, W))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class Table(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


class Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class PlainDiT(nn.Module):
    """What the last layer gives, (B, C, s, s), at x_t (B, C, s, s), t (B,), y (B,)."""

    def __init__(self, input_size, patch, channels, width, depth, heads, num_classes):
        super().__init__()
        self.patch, self.channels, self.num_classes = patch, channels, num_classes
        self.x_embedder, self.t_embedder = Patches(channels, width, patch), Times(width)
        self.y_embedder = Table(num_classes + 1, width)
        self.pos_embed = nn.Parameter(model.position_table(width, input_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)

    def forward(self, x_t, t, y):
        B, C, s, P = *x_t.shape[:3], self.patch
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], -1))
        c = c + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x_t).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(B, s // P, s // P, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, s, s)


def plain_step(net, ema, opt, x, y, t_min=None):
    """A step of flow matching on images x, labels y. t_min: the network gives x, and not the velocity."""
    e, t = torch.randn_like(x), torch.sigmoid(torch.randn(len(x), device=x.device))
    y = torch.where(torch.rand(len(y), device=y.device) < 0.1, ema.num_classes, y)
    time = t[:, None, None, None]
    x_t = (1 - time) * x + time * e
    out = net(x_t, t, y)
    error = (out - x) / time.clamp(min=t_min) if t_min else out - (e - x)
    loss = (error ** 2).mean()
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=False)
    opt.step()
    with torch.no_grad():
        for average, p in zip(ema.parameters(), net.parameters()):
            average.mul_(0.999).add_(p, alpha=0.001)
    return loss.detach()


def plain_training(config: dict, x, y):
    """A function without arguments: `plain_step` of a fresh network of model.py's config on one batch."""
    names = "input_size", "patch", "channels", "width", "depth", "heads", "num_classes"
    with x.device:
        net = PlainDiT(*(config[name] for name in names)).to(x.device)
    ema = copy.deepcopy(net)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], foreach=False)
    net = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    return lambda: plain_step(net, ema, opt, x, y, config["t_min"] if config["predict"] == "x" else None)
