"""The network: a DiT/SiT transformer, the discriminator, and derivatives of networks by their inputs.

A network maps (x_t, t, y) to the flow's velocity at x_t; t = 0 is data, t = 1 noise. It predicts

    "v"   that velocity v                                         SiT (arXiv:2401.08740)
    "x"   the clean image x, and v = (x_t - x) / max(t, t_min)    arXiv:2511.13720

Parameters have the names and shapes of the official DiT and SiT files, which load key by key.
Shapes in comments: B batch, C channels, N tokens, W width, H heads, d = W / H, P patch.

`python model.py` prints the zoo with parameters and GFLOPs.
"""
import argparse
import contextlib
import inspect
import math
import pickle
import zipfile
from pathlib import Path

import data  # first: what it does about Ctrl-C
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- 1. The transformer, from the outside in ----


class DiT(nn.Module):
    """The diffusion transformer of DiT (arXiv:2212.09748) and SiT (arXiv:2401.08740).

    times: 0 (a jump from noise to data), 1 (t), or 2 (t and the length t - r of a jump to r). null_class: one
    more label, for guidance. learn_sigma: 2 C output channels, as official files have; the second half is
    dropped. A fresh last layer gives 0, blocks the identity (adaLN-zero). Other networks: see `Part`."""
    inherited = ("learn_sigma", "null_class")  # settings taken over from a network to start from
    extra_tokens = 0              # tokens that a part puts in front of the image's
    guidance_conditioned = False  # whether forward takes a guidance scale after r
    training_only = ()            # weights, by the beginnings of names, that no run takes over

    def __init__(self, input_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, mlp_ratio=4.0,
                 num_classes=1000, null_class=True, learn_sigma=False, predict="v", t_min=0.05,
                 norm="layer", times=1):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        check_sizes(self.config)
        self.channels, self.patch, self.shape = channels, patch, (channels, input_size, input_size)
        self.num_classes, self.null_class, self.times = num_classes, null_class, times
        self.predict, self.t_min = predict, t_min
        self.amp = None             # or torch.bfloat16: autocast, in the network only
        self.checkpointing = False  # keep only blocks' inputs for backward
        self.x_embedder = PatchEmbed(channels, patch, width)
        if times:
            self.t_embedder = TimestepEmbedder(width)
        if times == 2:
            self.jump_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes + null_class, width)
        self.pos_embed = nn.Parameter(position_table(width, input_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, channels * (1 + learn_sigma), norm)
        self.init_weights()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, *more: Tensor) -> Tensor:
        """Velocity, float32 or wider, at x_t (B, C, h, w), t (B,) in [0, 1], y (B,) int64; with times = 2 the
        average velocity of a jump from t to r (B,)."""
        with self.autocast():
            c = self.condition(t, y, r, *more)    # (B, W)
            x = self.embed(x_t) + self.pos_embed  # (B, N, W)
            x = self.trunk(x, c, y)               # (B, N, W)
            out = self.draw(x, c)                 # (B, C, h, w)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out

    def condition(self, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """(B, W): class and times, embedded. Without r, r = t."""
        c = self.y_embedder(y)
        if self.times:
            c = c + self.t_embedder(t)
        if self.times == 2:
            c = c + self.jump_embedder(torch.zeros_like(t) if r is None else t - r)
        return c

    def embed(self, x: Tensor) -> Tensor:
        """The tokens (B, N, W) of x, without their positions."""
        return self.x_embedder(x)

    def trunk(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        for k in range(len(self.blocks)):
            x = self.run_block(k, x, c, y)
        return x

    def run_block(self, k: int, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(_with_backend, _backend, self.blocks[k], x, c, use_reentrant=False)
        return self.blocks[k](x, c)

    def draw(self, x: Tensor, c: Tensor) -> Tensor:
        """The image (B, C, h, w) of the tokens."""
        return self.unpatchify(self.final_layer(x, c))[:, :self.channels]

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, P P C) -> (B, C, h, w); a token holds rows, columns, channels."""
        P, side = self.patch, math.isqrt(tokens.shape[1])
        image = tokens.unflatten(2, (P, P, -1)).unflatten(1, (side, side))
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def make_block(self) -> nn.Module:
        c = self.config
        return Block(c["width"], c["heads"], c["mlp_ratio"], c["norm"])

    def init_weights(self) -> None:
        """DiT's: Xavier, N(0, 0.02) for the embeddings of t and y, and the zeros of adaLN-zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init_xavier_(layer)
        init_xavier_(self.x_embedder.proj)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.modules():
            if isinstance(layer, TimestepEmbedder):
                nn.init.normal_(layer.mlp[0].weight, std=0.02)
                nn.init.normal_(layer.mlp[2].weight, std=0.02)
            if isinstance(layer, (Block, FinalLayer)):
                nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.times == 2:  # beside a flow's weights it is that flow
            nn.init.zeros_(self.jump_embedder.mlp[2].weight)

    @torch.no_grad()
    def inherit(self, given: "DiT", at: float = 1.0) -> dict:
        """The weights that this network takes from `given` (--init), one that is conditioned on t.

        With two times it is then that function for all r, as jump_embedder's own weights give 0. With fewer
        than `given`, that function at fixed times, whose embeddings join the label table: with none the jump
        from t = `at` to 0 (1: a generator; 0: a discriminator of images), with one the velocity."""
        left = given.training_only + ("t_embedder.", "jump_embedder.")[self.times:]
        weights = {k: v for k, v in given.state_dict().items() if not k.startswith(left)}
        table, at = "y_embedder.embedding_table.weight", torch.full((1,), 0.0 if self.times else at)
        if given.times and not self.times:
            weights[table] = weights[table] + given.t_embedder(at)
        if given.times == 2 and self.times < 2:
            weights[table] = weights[table] + given.jump_embedder(at)
        return {k: v for k, v in self.state_dict().items() if k.startswith("jump_embedder.")} | weights

    def read(self, token: Tensor, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, 1 + N, W): a token (W,), then x (B, N, W), through all blocks."""
        return self.trunk(torch.cat([token.expand(len(x), 1, -1).to(x.dtype), x], 1), c, y)

    def autocast(self):
        return torch.autocast(self.pos_embed.device.type, self.amp) if self.amp else contextlib.nullcontext()

    state = property(lambda self: self.shape, doc="Shape of what the flow moves: that of the image.")


class Block(nn.Module):
    """Two steps x + gate f(norm(x) (1 + scale) + shift), f = attention and MLP (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, norm: str = "layer"):
        super().__init__()
        self.norm1 = NORMS[norm](width)
        self.attn = Attention(width, heads)
        self.norm2 = NORMS[norm](width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, for tokens x (B, N, W), a shift and a scale (B, W)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Attention(nn.Module):
    """Self-attention with timm's parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, W = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, N, W))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by the selected backend: q (B, H, N, d), k and v (B, H, M, d)."""
    return ATTENTION[_backend](q, k, v)


def attention_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused kernels: one derivative, in reverse mode."""
    try:
        return F.scaled_dot_product_attention(q, k, v)
    except NotImplementedError as error:
        raise NotImplementedError("fused attention has no forward-mode derivative: use "
                                  "`with model.attention_backend('plain')`") from error


def attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Step by step, with all derivatives; autograd saves the weights (B, H, N, M)."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


ATTENTION = {"fused": attention_fused, "plain": attention_plain}
_backend = "fused"


@contextlib.contextmanager
def attention_backend(name: str):
    """Use a backend of `ATTENTION` in the with block; outside it is "fused"."""
    global _backend
    if name not in ATTENTION:
        data.optional("attention")
    data.lookup(ATTENTION, name, "attention backend")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def _with_backend(backend: str, block: nn.Module, *inputs: Tensor) -> Tensor:
    """A block under its forward pass's backend, also when computed again for backward."""
    with attention_backend(backend):
        return block(*inputs)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens (B, N, W) -> patches (B, N, P P C), modulated by c (B, W)."""

    def __init__(self, width: int, patch: int, out_channels: int, norm: str = "layer"):
        super().__init__()
        self.norm_final = NORMS[norm](width)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.modulated(x, c))

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return modulate(self.norm_final(x), shift, scale)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in primitive operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMS = {"layer": lambda width: nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
         "rms": lambda width: RMSNorm()}


class PatchEmbed(nn.Module):
    """Tokens (B, N, W): the P x P patches of (B, C, h, w), embedded linearly."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times (B,) in [0, 1], unscaled as in SiT, for smooth derivatives -> (B, W)."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, W). The last row is the null class, "no label", of guidance."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def sinusoid(t: Tensor, features: int) -> Tensor:
    """[cos(f_i t), sin(f_i t)], f_i = 10^(-8i/features): times (B,) -> (B, features), as DiT."""
    half = features // 2
    f = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].to(torch.promote_types(t.dtype, torch.float32)) * f
    return torch.cat([angle.cos(), angle.sin()], -1)


def position_table(width: int, side: int) -> Tensor:
    """Fixed sine-cosine embedding (1, side^2, width): column, then row (DiT's code; its comments err)."""
    f = 1e4 ** (-np.arange(width // 4) / (width / 4))
    angle = np.arange(side)[:, None] * f
    axis = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (side, W / 2)
    table = np.concatenate([np.tile(axis, (side, 1)), axis.repeat(side, 0)], 1)
    return torch.from_numpy(table).float()[None]


def init_xavier_(layer: nn.Module) -> None:
    """Xavier-uniform weights (a convolution's as those of a linear layer) and zero bias."""
    nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def clean_velocity(x: Tensor, x_t: Tensor, t: Tensor, t_min: float) -> Tensor:
    """v = (x_t - x) / max(t, t_min) of the clean image x (arXiv:2511.13720, Algorithm 1, in our time). From
    below t_min a step would leave noise, so sampling's last step begins there (`sample.time_grid`)."""
    return (x_t - x) / t.clamp_min(t_min).view(-1, *[1] * (x.dim() - 1))


# ---- 2. The discriminator ----


class Discriminator(nn.Module):
    """A number D(x_t, t, y) for each sample: a transformer with one more token, which is read out.

    As in CAFM (arXiv:2604.11521, official code): no position for the token, and no adaLN-zero behind it,
    whose zeros would give D no gradient. A trunk with extra tokens is read out of the first."""

    def __init__(self, trunk: DiT):
        super().__init__()
        self.trunk, self.config, width = trunk, trunk.config, trunk.config["width"]
        trunk.final_layer = None  # it draws; here one token is read
        if not trunk.extra_tokens:
            self.dis_embed = nn.Parameter(0.02 * torch.randn(width))
        norm = NORMS[self.config["norm"].replace("rms_weight", "rms")](width)
        self.final_layer = nn.Sequential(norm, nn.Linear(width, 1, bias=trunk.extra_tokens > 0))
        self.register_buffer("gradient_square", torch.zeros(()))  # of losses.NormaliseGradient

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (B, C, h, w), t (B,) in [0, 1], y (B,) int64 -> (B,), float32 or wider."""
        trunk = self.trunk
        with trunk.autocast():
            c = trunk.condition(t, y)
            x = trunk.embed(x_t) + trunk.pos_embed
            x = trunk.trunk(x, c, y) if trunk.extra_tokens else trunk.read(self.dis_embed, x, c, y)
            out = self.final_layer(x[:, 0])[:, 0]
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def penalties(self) -> dict:
        return self.trunk.penalties() if hasattr(self.trunk, "penalties") else {}


def discriminator(config: dict, **changes) -> Discriminator:
    """A fresh discriminator like a generator of this config, without generator_only parts."""
    parts = [name for name in config.get("parts", []) if not part(name).generator_only]
    return Discriminator(build({**config, "parts": parts, **changes}, ignore_unknown=True))


# ---- 3. Derivatives by the input: of a number in all directions (reverse mode), of an image in one ----


def input_gradient(D, x_t: Tensor, t: Tensor, y: Tensor, create_graph: bool = True,
                   backend: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    """D (B,), its gradient by x_t (B, C, h, w), its derivative by t (B,), if no sample in D sees another.
    create_graph: for a loss that trains D on these, by this attention backend; else detached, fused."""
    D = bare(D)
    x_t, t = x_t.detach().requires_grad_(), t.detach().requires_grad_()
    with torch.enable_grad(), attention_backend(backend if create_graph else "fused"):
        out = D(x_t, t, y)
        gradient, slope = torch.autograd.grad(
            out.sum(), (x_t, t), create_graph=create_graph, materialize_grads=True)
    return (out if create_graph else out.detach()), gradient, slope


def along(gradient: Tensor, slope: Tensor, w: Tensor) -> Tensor:
    """J(w) = <grad_x D, w> + dD/dt (B,), the derivative of D along (w, 1) (CAFM, arXiv:2604.11521)."""
    return (gradient * w).flatten(1).sum(1) + slope


@torch.no_grad()
def time_derivative(net, x_t: Tensor, t: Tensor, y: Tensor, v: Tensor, *fixed: Tensor,
                    backend: str = "plain") -> tuple[Tensor, Tensor]:
    """u = net(x_t, t, y, *fixed), and du/dt = (v . grad_x) u + partial u / partial t along dx_t/dt = v.

    `fixed`: further inputs, as a jump's end r. Both are detached, for targets (arXiv:2505.13447, Eq. 8)."""
    net = bare(net)
    if operators := data.optional("operators"):
        operators.operators(net, x_t, t, y, *fixed)  # refuses what torch gets wrong
    with attention_backend(backend):
        return torch.func.jvp(lambda x_t, t: net(x_t, t, y, *fixed), (x_t, t), (v, torch.ones_like(t)))


# ---- 4. The zoo ----

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
GLYPH = dict(input_size=32, patch=8, channels=3, heads=4, num_classes=10, predict="x")
ZOO = {"glyph-S": GLYPH | dict(width=128, depth=4), "glyph-XS": GLYPH | dict(width=64, depth=2)}
ZOO |= {f"SiT-{size}/{patch}": dict(patch=patch, width=width, depth=depth, heads=heads)
        for size, (width, depth, heads) in SIZES.items() for patch in (2, 4, 8)}


class Part:
    """Base of the mixins of extras/ that override methods of DiT, calling super().

    In a config parts=["a.B"] puts class B of extras/a.py in front of DiT. Training adds a part's penalties(),
    a dict of scalars, to the loss."""
    generator_only = False  # whether a discriminator like this generator goes without
    inherited = ()          # settings taken over, with the part, from a network to start from


def part(name: str) -> type:
    """The class "FILE.CLASS" of extras/, and nothing else: such names come from checkpoints."""
    file, _, kind = str(name).partition(".")
    found = getattr(data.extra(file, f"network part {name!r}"), kind, None)
    if not (isinstance(found, type) and issubclass(found, Part) and found.__module__ == f"extras.{file}"):
        raise ValueError(f"network part {name!r}: extras/{file}.py has no such part")
    return found


def build(config: dict, ignore_unknown: bool = False) -> DiT:
    """The network of a config: arguments of DiT and of the parts that config["parts"] names."""
    kinds = [part(name) for name in config.get("parts", [])]
    if len({*kinds}) < len(kinds):
        raise ValueError(f"network parts {', '.join(config['parts'])}: expected each once")
    kind = type("".join(kind.__name__ for kind in kinds) + "DiT", (*kinds, DiT), {})
    known = {name for base in kind.__mro__ if base not in nn.Module.__mro__
             for name in inspect.signature(base).parameters} - {"config"}
    unknown = [name for name in config if name not in {*known, "parts"}]
    if unknown and not ignore_unknown:
        raise ValueError(f"network setting {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    net = kind(**{k: v for k, v in config.items() if k in known})
    net.config["parts"] = list(config.get("parts", []))
    return net


def create(name: str, parts: list = (), **options) -> DiT:
    """A fresh network of the zoo; `options` override its entry's, `parts` are added to its parts."""
    entry = data.lookup(ZOO, name, "model")
    return build(entry | options | dict(parts=[*entry.get("parts", []), *parts]))


def multiply_adds(net: DiT) -> int:
    """Multiply-adds of a forward pass of one image (DiT's and SiT's "flops")."""
    from torch.utils.flop_counter import FlopCounterMode
    x, t = torch.empty(1, *net.state, device="meta"), torch.empty(1, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta")(x, t, y)
    return counter.get_total_flops() // 2


# ---- 5. Checkpoints ----


def load(path, weights: str = "ema") -> nn.Module:
    """A network in eval mode: ours with weights "ema" or "last"; others by extras/official.py."""
    content = read_checkpoint(path)
    if "networks" not in content:
        return data.extra("official", f"{path}: not a checkpoint of train.py").load(path, content, weights)
    if weights not in ("ema", "last"):
        raise ValueError(f"{path}: holds weights ema and last, not {weights}")
    G = content["networks"]["G"]
    net = build(G["config"])
    load_weights(net, content["ema"] if weights == "ema" else G["weights"], path)
    return net.eval()


def discriminator_weights(path, loss: str = "") -> dict:
    """Weights of a checkpoint's discriminator; others than ours, for this --loss, by extras/official.py."""
    content = read_checkpoint(path)
    if "networks" not in content:
        official = data.extra("official", f"{path}: not a checkpoint of train.py")
        return official.discriminator_weights(path, content, loss)
    if "D" not in content["networks"]:
        raise ValueError(f"{path}: a run without a discriminator; give one of an adversarial --loss")
    return content["networks"]["D"]["weights"]


def main(argv: list[str] | None = None) -> None:
    data.parse(data.dataclasses.make_dataclass("Config", []), argv, "Print the zoo.")
    print(f"{'model':>10} {'parameters':>12} {'GFLOPs':>8}   (multiply-adds of one image)")
    for name in ZOO:
        with torch.device("meta"):
            net = create(name)
        print(f"{name:>10} {sum(p.numel() for p in net.parameters()) / 1e6:>11.2f}M "
              f"{multiply_adds(net) / 1e9:>8.2f}")


# ---- 6. Guards: sizes, files and networks that are refused ----


def check_sizes(c: dict) -> None:
    """ValueError for impossible arguments of DiT."""
    for name in ("input_size", "patch", "channels", "width", "depth", "heads", "num_classes"):
        if type(c[name]) is not int or not 1 <= c[name] <= 2 ** 16:
            raise ValueError(f"{name} {c[name]!r}: expected a whole number, 1 to {2 ** 16}")
    for name, limit in dict(t_min=1, mlp_ratio=1000).items():
        if type(c[name]) not in (int, float) or not 0 < c[name] < limit:
            raise ValueError(f"{name} {c[name]!r}: expected a number between 0 and {limit}")
    if c["input_size"] % c["patch"]:
        raise ValueError(f"{c['input_size']} pixels: expected a multiple of {c['patch']}, the patch")
    if c["width"] % c["heads"] or c["width"] % 4:
        raise ValueError(f"width {c['width']} must be a multiple of 4 and of the {c['heads']} heads")
    for name, known in dict(predict=("v", "x"), norm=[*NORMS], times=(0, 1, 2), null_class=(0, 1)).items():
        if c[name] not in known:
            raise ValueError(f"{name} {c[name]!r}: expected one of {', '.join(map(str, known))}")


def read_checkpoint(path) -> dict:
    """The dict in a .pt file, on the CPU: tensors, mapped from disk, and plain values, as nothing in it is
    executed. One of ours is checked before anything is built of it."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\3\4"
        if zipped:  # torch looks at no check sums
            with zipfile.ZipFile(path) as archive:
                if any(m.compress_type for m in archive.infolist()) or archive.testzip():
                    raise ValueError("a member's sum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's own trainer saves one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # UnpicklingError, whose words advise to execute the file; others for damage
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {error}".partition("\n")[0][:200]
        raise ValueError(f"{path}: damaged, or not a checkpoint of tensors and plain values "
                         f"({type(error).__name__}{reason}); get or make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    if checks := data.optional("checks"):
        checks.check_checkpoint(content, path)
    return content


def write_checkpoint(content: dict, path: Path) -> None:
    """Write a .pt file as a temporary one that then takes its name."""
    with data.replacing(path, "free disk space, then --resume") as aside:
        torch.save(content, aside)


def load_weights(net: nn.Module, weights: dict, path, place=lambda value, own: value) -> None:
    """Strict load of finite weights; a ValueError names keys or shapes that differ. place(value, own tensor):
    this process's share."""
    own = net.state_dict()
    problems = [f"{k} is missing" for k in own if k not in weights]
    problems += [f"{k} is unknown" for k in weights if k not in own]
    problems += [f"{k} is {tuple(weights[k].shape)}, the network has {tuple(own[k].shape)}"
                 for k in own if k in weights and weights[k].shape != own[k].shape]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: weights of another network: {'; '.join(problems[:3])}{more}; "
                         "give its --model, --size and data")
    if wrong := [k for k, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {wrong[0]} is not finite, the run diverged: take an earlier checkpoint")
    placed = {name: place(value, own[name]) for name, value in weights.items()}
    net.load_state_dict(placed, assign=any(value.is_meta for value in own.values()))


def bare(net):
    """The network without torch.compile's wrapper, which has no second derivative."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        raise ValueError("a derivative through DistributedDataParallel misses its gradient exchange: wrap "
                         "the module that takes it (as train.Loss), not the network inside")
    return getattr(net, "_orig_mod", net)


if __name__ == "__main__":
    data.run_cli(main)
