"""The network: one DiT/SiT transformer, its zoo, and the reading of official checkpoints.

A network maps (x_t, t, y) to the velocity of the flow at x_t, with t = 0 data and t = 1 noise, whatever its last layer
predicts inside:

    predict  the last layer gives                    velocity                                     used by
    v        v                                       v                                            SiT (arXiv:2401.08740)
    x        the clean image x                       (x_t - x) / max(t, t_min)                    JiT (arXiv:2511.13720)
    eps      the noise e of a VP diffusion           see `DiT.forward`                            DiT (arXiv:2212.09748)

Parameter names and shapes are those of the official DiT and SiT files, so that these load key by key.
Shapes in comments: B batch, C channels, N tokens, W width, H heads, d = W / H, P patch.

Run alone, `python model.py` prints the zoo with parameters and GFLOPs, and checks and times the attention.
"""
import argparse
import contextlib
import math
import os
import pickle
import re
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------------
# 1. Attention
# --------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, fused: (B, H, N, d) three times -> (B, H, N, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in plain steps; stores the (B, H, N, N) weights."""
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)                     # (B, H, N, N)
    return weights @ v                                                                           # (B, H, N, d)


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names (qkv, proj)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, W = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, W))                    # (B, N, W)


# --------------------------------------------------------------------------------------------------------------------
# 2. The transformer
# --------------------------------------------------------------------------------------------------------------------


def sinusoid(t: Tensor, features: int, max_period: float = 1e4) -> Tensor:
    """[cos(f_i t), sin(f_i t)], f_i = max_period^(-2i/features): times (B,) -> (B, features). Cosines first, as DiT."""
    half = features // 2
    f = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].to(torch.promote_types(t.dtype, torch.float32)) * f
    return torch.cat([angle.cos(), angle.sin()], -1)


def position_table(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (1, side^2, width): the first half tells the column, the second the row.

    (DiT's comments say otherwise; its `np.meshgrid(w, h)` puts the column first, and the weights rely on it.)
    """
    f = 1e4 ** (-np.arange(width // 4) / (width / 4))
    angle = np.arange(side)[:, None] * f                                                          # (side, W/4)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], 1)                                      # (side, W/2)
    row, column = np.divmod(np.arange(side * side), side)
    return torch.from_numpy(np.concatenate([axis[column], axis[row]], 1)).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale (B, W) for all tokens of x (B, N, W)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class PatchEmbed(nn.Module):
    """Cut (B, C, h, w) into P x P patches and embed each linearly: (B, N, W)."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times (B,) -> (B, W). SiT feeds t in [0, 1] unscaled: smooth in t, which derivatives in time need."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, W). Row `num_classes` is the null class, "no label", of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, null_class: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-zero: x + gate f(LN(x) (1 + scale) + shift), for attention and then the MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)   # (B, W) each
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                            # (B, N, P P C)


class DiT(nn.Module):
    """The diffusion transformer of DiT (arXiv:2212.09748) and SiT (arXiv:2401.08740).

    learn_sigma: the last layer has 2 C channels as in the official files; the second half (DiT's variance, untrained
    in SiT) is dropped. null_class: whether the label table has the extra row of guidance. t_min: see `clean_velocity`.
    A fresh network returns exactly 0 from its last layer, and each of its blocks is the identity (adaLN-zero).
    """

    def __init__(self, input_size: int = 32, patch: int = 2, channels: int = 4, width: int = 1152, depth: int = 28,
                 heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000, null_class: bool = True,
                 learn_sigma: bool = False, predict: str = "v", t_min: float = 0.05):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if input_size % patch:
            raise ValueError(f"images of {input_size} pixels do not divide into patches of {patch}: choose a size that "
                             f"is a multiple of {patch}, or a model with another patch")
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        if predict not in ("v", "x", "eps"):
            raise ValueError(f"predict {predict!r}: expected v, x or eps")
        self.patch, self.channels, self.out_channels = patch, channels, channels * (1 + learn_sigma)
        self.num_classes, self.null_class, self.predict, self.t_min = num_classes, null_class, predict, t_min
        self.shape = (channels, input_size, input_size)
        self.amp = None  # torch.bfloat16: run the network, and nothing else, under autocast
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class)
        self.pos_embed = nn.Parameter(position_table(width, input_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """DiT's initial weights: Xavier, N(0, 0.02) for the embeddings of t and y, zeros where adaLN-zero wants them."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for layer in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1],
                      self.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, P P C), a token being rows, columns, channels -> (B, C, h, w)."""
        B, N, _ = tokens.shape
        P, side = self.patch, math.isqrt(N)
        image = tokens.view(B, side, side, P, P, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(B, self.out_channels, side * P, side * P)

    def raw(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The official forward pass: (B, C, h, w), t (B,) in the network's own time, y (B,) -> (B, C or 2C, h, w)."""
        with torch.autocast(x.device.type, self.amp) if self.amp else contextlib.nullcontext():
            c = self.t_embedder(t) + self.y_embedder(y)                                           # (B, W)
            x = self.x_embedder(x) + self.pos_embed                                               # (B, N, W)
            for block in self.blocks:
                x = block(x, c)
            return self.unpatchify(self.final_layer(x, c))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """Velocity at x_t (B, C, h, w), times t (B,) in [0, 1], labels y (B,) int64: the shape of x_t, float32 or wider.

        `r`, the time a flow map jumps to, is taken for the signature's sake: this network does not look at it.
        """
        if self.predict == "eps":
            return self._velocity_from_vp_noise(x_t, t, y)
        out = self.raw(x_t, t, y)[:, :self.channels]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out

    def _velocity_from_vp_noise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """DiT's noise prediction as a velocity: VP sees x_t / |(1-t, t)| at the step n of equal noise-to-signal ratio.

        With e the predicted noise, x = (x_t - t e) / (1 - t) and v = e - x. DiT's schedule ends at a ratio of 157,
        t = 0.9937: later times are evaluated there.
        """
        t = t.clamp(0.0099, 0.9936)
        a, s = (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        e = self.raw(x_t / torch.hypot(a, s), vp_step(t), y)[:, :self.channels].to(x_t.dtype)
        return e - (x_t - s * e) / a


def clean_velocity(x: Tensor, x_t: Tensor, t: Tensor, t_min: float) -> Tensor:
    """v = (x_t - x) / max(t, t_min) of the clean image x (JiT, arXiv:2511.13720, Algorithm 1, in our time).

    paper: t_min = 0.05; here the same by default, and 0.01 for glyph-S, because a sampler that steps through
    t < t_min leaves a part of the noise in, which shows on even grounds.
    """
    return (x_t - x) / t.clamp_min(t_min).view(-1, *[1] * (x.dim() - 1))


def vp_step(t: Tensor) -> Tensor:
    """DiT's (fractional) diffusion step n in 0..999 with noise-to-signal ratio t / (1 - t); betas linspace(1e-4, .02)."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    log_ratio = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    own = torch.log(t / (1 - t)).cpu().double().numpy()
    return torch.from_numpy(np.interp(own, log_ratio, np.arange(1000.0))).to(t)


# --------------------------------------------------------------------------------------------------------------------
# 3. The zoo
# --------------------------------------------------------------------------------------------------------------------

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}        # width, depth, heads

ZOO = {"glyph-S": dict(input_size=32, patch=8, channels=3, width=128, depth=4, heads=4, num_classes=10, predict="x",
                       t_min=0.01)}
ZOO |= {f"SiT-{size}/{patch}": dict(patch=patch, width=width, depth=depth, heads=heads)
        for size, (width, depth, heads) in SIZES.items() for patch in (2, 4, 8)}


def create(name: str, **options) -> DiT:
    """A fresh network of the zoo; `options` override its entries (input_size, channels, num_classes, predict, ...)."""
    if name not in ZOO:
        raise ValueError(f"no model {name!r}: choose one of {', '.join(ZOO)}")
    return DiT(**(ZOO[name] | options))


def multiply_adds(net: DiT) -> int:
    """Multiply-adds of one forward pass of one image: what the DiT and SiT papers call flops. Runs on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode
    x, t = torch.empty(1, *net.shape, device="meta"), torch.empty(1, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta").raw(x, t, y)
    return counter.get_total_flops() // 2


# --------------------------------------------------------------------------------------------------------------------
# 4. Reading checkpoints: ours, and the official DiT and SiT files
# --------------------------------------------------------------------------------------------------------------------

HEADS = {width: heads for width, _, heads in SIZES.values()}


def read_checkpoint(path) -> dict:
    """The dict in a .pt file, on the CPU. Nothing in the file is executed: it may hold tensors and plain values only.

    (And an argparse.Namespace, which DiT's own trainer saves: a bag of plain values.)
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: not a checkpoint of tensors and plain values, so it is not loaded "
                         f"({(str(error).splitlines() or ['unpickling failed'])[0]})") from error
    except Exception as error:  # damage surfaces as RuntimeError, EOFError, KeyError, IndexError, struct.error, ...
        raise ValueError(f"{path}: damaged or not a checkpoint ({type(error).__name__}); get or make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    return content


def load(path, ema: bool = True, kind: str = "", heads: int = 0) -> DiT:
    """A network in eval mode from our checkpoint or from an official DiT or SiT file, in our time and as a velocity.

    ema: the averaged weights where the file has both. Official files do not tell two things: `kind`, "dit" (noise
    prediction) or "sit" (velocity), else guessed from the file's name; and `heads`, else known from the width.
    All sizes are read from the tensors. FileNotFoundError or ValueError say what is wrong with a file.
    """
    content = read_checkpoint(path)
    if "networks" in content:
        config = content["networks"]["G"]["config"]
        weights = content["ema"] if ema else content["networks"]["G"]["weights"]
    else:
        weights = official_weights(content, path, ema)
        config = official_config(weights, path, kind, heads)
        own_time = any("projectors." in k for part in (content, content.get("ema", {})) for k in part)
        if config["predict"] == "v" and not own_time:  # REPA's files, known by their projectors, have our time already
            weights = reverse_time(weights)
    try:
        net = DiT(**config)
    except TypeError as error:
        raise ValueError(f"{path}: made by another version of triflow ({error})") from error
    load_weights(net, weights, path)
    return net.eval()


def load_weights(net: nn.Module, weights: dict, path) -> None:
    """Strict load; a ValueError names the first keys or shapes that differ."""
    own = net.state_dict()
    problems = [f"{k} is missing" for k in own if k not in weights]
    problems += [f"{k} is unknown" for k in weights if k not in own]
    problems += [f"{k} is {tuple(weights[k].shape)}, the network has {tuple(own[k].shape)}"
                 for k in own if k in weights and weights[k].shape != own[k].shape]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: weights of another network: {'; '.join(problems[:3])}{more}. Give the --model, --size "
                         f"and data that it was trained with")
    net.load_state_dict(weights)


def official_weights(content: dict, path, ema: bool = True) -> dict:
    """The flat dict of tensors inside an official file: unwrapped, prefixes of wrappers and REPA's projectors removed."""
    for key in ("ema", "model") if ema else ("model", "ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    if any("x_embedder.proj1" in k for k in weights):
        raise ValueError(f"{path}: a JiT file; triflow reads DiT and SiT files so far")
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    missing = [k for k in needed if k not in weights]
    if missing:
        raise ValueError(f"{path}: not a DiT or SiT file: {missing[0]} is missing (its first entries: "
                         f"{', '.join(map(str, list(content)[:4]))})")
    return weights


def official_config(weights: dict, path, kind: str = "", heads: int = 0) -> dict:
    """The arguments of DiT that fit these tensors."""
    name = os.path.basename(path).lower()
    told = {kind} if kind else set(re.findall(r"(?<![a-z])(dit|sit)(?![a-z])", name))
    if told not in ({"dit"}, {"sit"}):
        raise ValueError(f"{path}: DiT and SiT files look alike; rename it so that its name has DiT or SiT in it, such as "
                         f"SiT-{name}, or give model.load kind='dit' or 'sit'")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    if not heads and width not in HEADS:
        raise ValueError(f"{path}: a file does not tell its number of heads, and width {width} is not one of DiT's "
                         f"({', '.join(map(str, HEADS))}); give model.load heads=")
    out_channels = len(weights["final_layer.linear.weight"]) // patch ** 2
    return dict(input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch, patch=patch, channels=channels,
                width=width, depth=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
                heads=heads or HEADS[width], mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) / width,
                num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, null_class=True,
                learn_sigma=out_channels == 2 * channels, predict="eps" if told == {"dit"} else "v")


def reverse_time(weights: dict) -> dict:
    """The weights of v(x, t) = -net(x, 1 - t), given those of net: SiT's data end (t = 1) becomes ours (t = 0), exactly.

    The sign goes into the last layer. Time goes into the first layer of the embedding, because
    cos(f (1-t)) = cos f cos(f t) + sin f sin(f t), and sin(f (1-t)) = sin f cos(f t) - cos f sin(f t).
    """
    weights = dict(weights)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[key] = -weights[key]
    first = weights["t_embedder.mlp.0.weight"]
    W_cos, W_sin = first.double().chunk(2, 1)
    cos_f, sin_f = sinusoid(torch.ones(1, dtype=torch.float64), first.shape[1]).chunk(2, 1)
    rotated = torch.cat([W_cos * cos_f + W_sin * sin_f, W_cos * sin_f - W_sin * cos_f], 1)
    weights["t_embedder.mlp.0.weight"] = rotated.to(first.dtype)
    return weights


# --------------------------------------------------------------------------------------------------------------------
# 5. Run alone: the zoo, and the attention checked and timed
# --------------------------------------------------------------------------------------------------------------------


def print_zoo() -> None:
    print(f"{'model':>10} {'parameters':>12} {'GFLOPs':>8}   (multiply-adds of one forward pass of one image)")
    for name in ZOO:
        with torch.device("meta"):
            net = create(name)
        print(f"{name:>10} {sum(p.numel() for p in net.parameters()) / 1e6:>11.2f}M {multiply_adds(net) / 1e9:>8.2f}")


def compare_attention(rounds: int = 5) -> None:
    """Fused attention against the reference: error to float64, and times in turn in this process (forward + backward)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nfused attention on {device}, (B, H, N, d) float32: error relative to float64, and time of forward and "
          f"backward\nas a ratio to the reference (median of {rounds} rounds, both in turn)")
    print(f"{'shape':>18} {'fused error':>12} {'reference error':>16} {'time ratio':>11}")
    for shape in ((64, 4, 16, 32), (8, 6, 256, 64), (2, 6, 1024, 64)):
        q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
        exact = attention_reference(q.double(), k.double(), v.double())
        errors = [((f(q, k, v) - exact).norm() / exact.norm()).item() for f in (attention, attention_reference)]
        times = {attention: [], attention_reference: []}
        for _ in range(rounds + 1):  # the first is a warm-up
            for f in times:
                start = time.perf_counter()
                for _ in range(3):
                    f(q, k, v).sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[f].append(time.perf_counter() - start)
        ratio = np.median(np.divide(times[attention], times[attention_reference])[1:])
        print(f"{str(shape):>18} {errors[0]:>12.1e} {errors[1]:>16.1e} {ratio:>11.2f}")


if __name__ == "__main__":
    print_zoo()
    compare_attention()
