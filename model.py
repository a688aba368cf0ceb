"""The network: attention with its derivatives, one DiT/SiT transformer, the discriminator and classifier of adversarial
flows, CAT's two networks, derivatives of a network with respect to its input, the zoo, reading official checkpoints.

A network maps (x_t, t, y) to the velocity of the flow at x_t, with t = 0 data and t = 1 noise, whatever its last layer
predicts inside:

    predict  the last layer gives                    velocity                                     used by
    v        v                                       v                                            SiT (arXiv:2401.08740)
    x        the clean image x                       (x_t - x) / max(t, t_min)                    JiT (arXiv:2511.13720)
    eps      the noise e of a VP diffusion           see `DiT.forward`                            DiT (arXiv:2212.09748)

Parameter names and shapes are those of the official DiT and SiT files, so that these load key by key.
Shapes in comments: B batch, C channels, N tokens, W width, H heads, d = W / H, P patch.

Run alone, `python model.py` prints the zoo with parameters and GFLOPs, checks and times the attention bodies, and shows
what each way to a derivative costs.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import pickle
import re
import time
import types
import weakref

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import data

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with CUDA builds of torch, and nothing needs it
    triton = None

# --------------------------------------------------------------------------------------------------------------------
# 1. Attention, with derivatives
# --------------------------------------------------------------------------------------------------------------------
#
# Four bodies compute the same function. What autograd can do with each, and what it keeps for the backward pass:
#
#     body       backward  forward-mode  backward through tangents  double backward  kept                 for
#     fused      yes       error         error                      error            q, k, v, O           training, sampling
#     plain      yes       yes           yes                        yes              (N, N) arrays        derivatives, few tokens
#     recompute  yes       yes           yes                        yes              q, k, v, O, tangents derivatives, many tokens
#     triton     yes       yes           yes                        yes              the same             the same, on CUDA
#
# `fused` is the default. A loss on derivatives asks for another one:    with attention_body("recompute"): ...


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by the body in force: q (B, H, N, d), k and v (B, H, M, d) -> (B, H, N, d)."""
    return BODIES[_body](q, k, v)


@contextlib.contextmanager
def attention_body(name: str):
    """Use one of `BODIES` for every `attention` inside the with block."""
    global _body
    if name not in BODIES:
        raise ValueError(f"no attention body {name!r}: choose one of {', '.join(BODIES)}")
    before, _body = _body, name
    try:
        yield
    finally:
        _body = before


def attention_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused kernels: one derivative, in reverse mode."""
    try:
        return F.scaled_dot_product_attention(q, k, v)
    except NotImplementedError as error:
        raise NotImplementedError("fused attention has no forward-mode derivative: put the call inside `with model."
                                  "attention_body('plain')` (or 'recompute', for many tokens)") from error


def attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three plain steps, as often differentiable as wanted; autograd keeps the (B, H, N, M) weights."""
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)                                    # (B, H, N, M)
    return weights @ v                                                                           # (B, H, N, d)


def attention_recompute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The closed forms below, a block of queries at a time: no (N, M) array is kept, at most (QUERIES, M) exist at once."""
    return closed_form(TORCH, q, k, v)


def attention_triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The closed forms below as Triton kernels: bfloat16, float16 and float32; a GPU, or Triton's interpreter."""
    check_triton(q)
    return closed_form(TRITON, q, k, v)


def closed_form(kernels, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attend` without tangents; those come by its own forward-mode rule."""
    refuse_compile("attention bodies 'recompute' and 'triton' have", "compile with body 'fused' or 'plain'")
    return Attend.apply(kernels, q, k, v, *(x.new_empty(0, *x.shape) for x in (q, k, v)))[0]


def refuse_compile(what: str, instead: str) -> None:
    """torch.compile may leave out a derivative that is written by hand, without an error (pytorch issue 192985)."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{what} derivatives that torch.compile can get wrong without an error: {instead}")


BODIES = {"fused": attention_fused, "plain": attention_plain, "recompute": attention_recompute,
          "triton": attention_triton}
_body = "fused"
QUERIES = 256  # rows of the (N, M) arrays that exist at once


def pair_forward(q, k, v, dq, dk, dv):
    """O = attention(q, k, v), and its tangent dO along each of T tangents dq, dk, dv (T, B, H, ., d).

    With s = 1 / sqrt(d):

        S  = s q k'               P  = softmax(S)                O  = P v
        dS = s (dq k' + q dk')    dP = P * (dS - rowsum(P*dS))   dO = dP v + P dv

    Matrix products in the dtype of q, everything between them in float32 or wider.
    """
    s, wide, blocks = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32), []
    for q, dq in zip(q.split(QUERIES, -2), dq.split(QUERIES, -2)):
        P = (s * (q @ k.mT).to(wide)).softmax(-1)                                                # (B, H, QUERIES, M)
        dS = s * (dq @ k.mT + q @ dk.mT).to(wide)                                                # (T, B, H, QUERIES, M)
        dP = P * (dS - (P * dS).sum(-1, keepdim=True))
        P, dP = P.to(v.dtype), dP.to(v.dtype)
        blocks.append((P @ v, dP @ v + P @ dv))
    return tuple(torch.cat(parts, -2) for parts in zip(*blocks))


def pair_backward(q, k, v, dq, dk, dv, O, dO, G, U):
    """Gradients of sum(G*O) + sum(U*dO) with respect to q, k, v, dq, dk, dv; G has the shape of O, U of dO.

    With S, P, dS of `pair_forward`, W = dS - rowsum(P*dS), sums over the T tangents, and two numbers a row:

        xbar = rowsum(U*O)          gdS = P * (U v' - xbar)
        D    = rowsum(G*O + U*dO)   gS  = P * (G v' + U dv' - D) + gdS * W

        gq  = s (gS k + gdS dk)     gk  = s (gS' q + gdS' dq)     gv  = P' G + (P*W)' U
        gdq = s gdS k               gdk = s gdS' q                gdv = P' U

    Derivation: softmax has the symmetric Jacobian J = diag(P) - P P', so gdS = J (U v'), where
    sum_j P_ij (U v')_ij = U_i.O_i. In gS the terms with rowsum(P*dS) of the softmax correction cancel, which leaves D.
    With T = 0 this is FlashAttention-2's backward pass (arXiv:2307.08691, Algorithm 2).
    """
    s, wide = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    xbar, D = row_sums(O, dO, G, U)
    rows, columns = [], (0, 0, 0, 0)
    for q, dq, G, U, xbar, D in zip(*(x.split(QUERIES, -2) for x in (q, dq, G, U, xbar, D))):
        P = (s * (q @ k.mT).to(wide)).softmax(-1)
        dS = s * (dq @ k.mT + q @ dk.mT).to(wide)
        W = dS - (P * dS).sum(-1, keepdim=True)
        gdS = P * ((U @ v.mT).to(wide) - xbar)
        gS = P * ((G @ v.mT + (U @ dv.mT).sum(0)).to(wide) - D) + (gdS * W).sum(0)
        P, PW, gS, gdS = (x.to(v.dtype) for x in (P, P * W, s * gS, s * gdS))
        rows.append((gS @ k + (gdS @ dk).sum(0), gdS @ k))
        part = gS.mT @ q + (gdS.mT @ dq).sum(0), P.mT @ G + (PW.mT @ U).sum(0), gdS.mT @ q, P.mT @ U
        columns = tuple(total + x for total, x in zip(columns, part))
    gq, gdq = (torch.cat(parts, -2) for parts in zip(*rows))
    gk, gv, gdk, gdv = columns
    return gq, gk, gv, gdq, gdk, gdv


def row_sums(O, dO, G, U):
    """xbar = rowsum(U*O) (T, B, H, N, 1) and D = rowsum(G*O) + sum over tangents of rowsum(U*dO) (B, H, N, 1)."""
    wide = torch.promote_types(O.dtype, torch.float32)
    O, dO, G, U = O.to(wide), dO.to(wide), G.to(wide), U.to(wide)
    return (U * O).sum(-1, keepdim=True), (G * O).sum(-1, keepdim=True) + (U * dO).sum((0, -1))[..., None]


class Attend(torch.autograd.Function):
    """(kernels, q, k, v, dq, dk, dv) -> O, dO and whatever row statistics the kernels want to see again in backward.

    `kernels` are `TORCH` or `TRITON`. With T = 0 this is attention, whose forward-mode derivative is Attend itself with
    T = 1: so tangents have a graph, and a loss on them back-propagates.
    """

    @staticmethod
    def forward(kernels, *tensors):
        return kernels.forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kernels, *tensors = inputs
        ctx.save_for_backward(*tensors, *outputs)
        ctx.save_for_forward(*tensors)
        ctx.statistics = len(outputs) - 2
        ctx.mark_non_differentiable(*outputs[2:])

    @staticmethod
    def backward(ctx, G, U, *_):
        return None, *AttendBackward.apply(ctx.kernels, *ctx.saved_tensors, G, U)

    @staticmethod
    def jvp(ctx, _, dq, dk, dv, *__):
        q, k, v, none, *_ = ctx.saved_tensors
        if len(none):
            raise NotImplementedError("attention has one forward-mode derivative; take the second in reverse mode")
        dO = Attend.apply(ctx.kernels, q, k, v, dq[None], dk[None], dv[None])[1]
        return dO[0], none, *ctx.statistics * [None]

    @staticmethod
    def vmap(info, in_dims, kernels, *tensors):
        """A mapped axis V of the tangents alone joins T, so that q, k, v are shared; any other joins the batch B."""
        V, shared = info.batch_size, in_dims[1:4] == (None, None, None)
        q, k, v, *tangents = (x.expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
                              for x, dim in zip(tensors, in_dims[1:]))                   # (V, B, ...), (V, T, B, ...)
        if shared:
            out = Attend.apply(kernels, *tensors[:3], *(x.flatten(0, 1) for x in tangents))
            is_tangent = [x.dim() == out[1].dim() for x in out]
            split = (x.unflatten(0, (V, -1)) if yes else x for x, yes in zip(out, is_tangent))
            return tuple(split), tuple(0 if yes else None for yes in is_tangent)
        primal = (x.flatten(0, 1) for x in (q, k, v))
        out = Attend.apply(kernels, *primal, *(x.transpose(0, 1).flatten(1, 2) for x in tangents))
        axes = tuple(x.dim() - out[0].dim() for x in out)                                # where V was put: 0, or 1 after T
        return tuple(x.unflatten(axis, (V, q.shape[1])) for x, axis in zip(out, axes)), axes


class AttendBackward(torch.autograd.Function):
    """Attend's backward pass as a function of its own, so that it has a backward pass too: double backward.

    Along (a, b, c) at its outputs gq, gk, gv the sum <a, gq> + <b, gk> + <c, gv> is <G, dO>, dO being attention's tangent
    along (a, b, c): so dO is the gradient with respect to G, and those with respect to q, k, v are Attend's own
    backward pass with U = G. No new formula.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(kernels, *tensors):
        return kernels.backward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kernels, q, k, v, dq, *others, G, _ = inputs
        ctx.others = len(others)
        ctx.save_for_backward(q, k, v, dq, G)

    @staticmethod
    def backward(ctx, a, b, c, *_):
        q, k, v, dq, G = ctx.saved_tensors
        if len(dq):
            raise NotImplementedError("attention is differentiable twice; this is a third derivative: use body 'plain'")
        primal, tangents = (q, k, v), (a[None], b[None], c[None])
        O, dO, *statistics = Attend.apply(ctx.kernels, *primal, *tangents)
        gq, gk, gv, *_ = AttendBackward.apply(ctx.kernels, *primal, *tangents, O, dO, *statistics, torch.zeros_like(G),
                                              G[None])
        return None, gq, gk, gv, None, *ctx.others * [None], dO[0], None


# forward(q, k, v, dq, dk, dv) -> (O, dO, *statistics); backward(those six, O, dO, *statistics, G, U) -> six gradients
TORCH = types.SimpleNamespace(forward=pair_forward, backward=pair_backward)


# --------------------------------------------------------------------------------------------------------------------
# 2. The same pair as Triton kernels
# --------------------------------------------------------------------------------------------------------------------
#
# One program computes one tile of rows and walks over the tiles of the other axis, so no (N, M) array exists at all.
# Tensors are (B H, N, d), contiguous; the axis d is padded to WIDTH, a power of two. The row statistics that backward
# needs to rebuild P and W tile by tile are lse = logsumexp(S) and mu = rowsum(P*dS).

if triton:
    @triton.jit
    def read_tile(pointer, start, length, d, TILE: tl.constexpr, WIDTH: tl.constexpr):
        """Rows start .. start + TILE of a (length, d) matrix, with zeros beyond its edges."""
        row, column = start + tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
        return tl.load(pointer + row * d + column, (row < length) & (column < d), 0.0)

    @triton.jit
    def read_rows(pointer, start, length, TILE: tl.constexpr):
        """The numbers start .. start + TILE of a vector, as a column."""
        row = start + tl.arange(0, TILE)
        return tl.load(pointer + row, row < length, 0.0)[:, None]

    @triton.jit
    def write_tile(pointer, value, start, length, d, TILE: tl.constexpr, WIDTH: tl.constexpr):
        row, column = start + tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
        tl.store(pointer + row * d + column, value.to(pointer.dtype.element_ty), (row < length) & (column < d))

    @triton.jit
    def write_rows(pointer, value, start, length, TILE: tl.constexpr):
        row = start + tl.arange(0, TILE)
        tl.store(pointer + row, tl.reshape(value, (TILE,)), row < length)

    @triton.jit
    def mm(a, b, EXACT: tl.constexpr):
        """a b with float32 sums; float32 factors as three TF32 terms, almost exactly, if EXACT, else as one."""
        return tl.dot(a, b, input_precision="tf32x3" if EXACT else "tf32")

    @triton.jit
    def forward_kernel(q, k, v, dq, dk, dv, O, dO, lse, mu, N, M, d, s, TANGENT: tl.constexpr, TILE: tl.constexpr,
                       WIDTH: tl.constexpr, EXACT: tl.constexpr):
        """O, lse, and with a TANGENT dO, mu of one tile of queries: softmax by a running maximum m.

        l, A, R, B are the sums over keys of e, e v, e dS and e dS v + e dv, e = exp(S - m), rescaled when m grows.
        """
        head, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE
        rows, columns = head * N * d, head * M * d
        Q = read_tile(q + rows, start, N, d, TILE, WIDTH)
        m = tl.full((TILE, 1), float("-inf"), tl.float32)
        l, R = tl.zeros((TILE, 1), tl.float32), tl.zeros((TILE, 1), tl.float32)
        A, B = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        if TANGENT:
            dQ = read_tile(dq + rows, start, N, d, TILE, WIDTH)
        for key in range(0, M, TILE):
            K, V = read_tile(k + columns, key, M, d, TILE, WIDTH), read_tile(v + columns, key, M, d, TILE, WIDTH)
            S = tl.where((key + tl.arange(0, TILE) < M)[None, :], s * mm(Q, tl.trans(K), EXACT), float("-inf"))
            higher = tl.maximum(m, tl.max(S, 1, keep_dims=True))
            shrink, e = tl.exp(m - higher), tl.exp(S - higher)
            m = higher
            l = shrink * l + tl.sum(e, 1, keep_dims=True)
            A = shrink * A + mm(e.to(V.dtype), V, EXACT)
            if TANGENT:
                dK, dV = read_tile(dk + columns, key, M, d, TILE, WIDTH), read_tile(dv + columns, key, M, d, TILE, WIDTH)
                E = e * s * (mm(dQ, tl.trans(K), EXACT) + mm(Q, tl.trans(dK), EXACT))
                R = shrink * R + tl.sum(E, 1, keep_dims=True)
                B = shrink * B + mm(E.to(V.dtype), V, EXACT) + mm(e.to(V.dtype), dV, EXACT)
        write_tile(O + rows, A / l, start, N, d, TILE, WIDTH)
        write_rows(lse + head * N, m + tl.log(l), start, N, TILE)
        if TANGENT:
            write_tile(dO + rows, B / l - R / l * (A / l), start, N, d, TILE, WIDTH)
            write_rows(mu + head * N, R / l, start, N, TILE)

    @triton.jit
    def pair_tile(Q, K, V, dQ, dK, dV, G, U, lse, mu, xbar, D, inside, s, TANGENT: tl.constexpr, EXACT: tl.constexpr):
        """P, P*W, s gS, s gdS of `pair_backward` for one tile of queries and one of keys, in the dtype of Q."""
        P = tl.where(inside, tl.exp(s * mm(Q, tl.trans(K), EXACT) - lse), 0.0)
        gS = P * (mm(G, tl.trans(V), EXACT) - D)
        PW, gdS = P, P
        if TANGENT:
            W = s * (mm(dQ, tl.trans(K), EXACT) + mm(Q, tl.trans(dK), EXACT)) - mu
            PW, gdS = P * W, P * (mm(U, tl.trans(V), EXACT) - xbar)
            gS += P * mm(U, tl.trans(dV), EXACT) + gdS * W
        return P.to(Q.dtype), PW.to(Q.dtype), (s * gS).to(Q.dtype), (s * gdS).to(Q.dtype)

    @triton.jit
    def backward_kernel(q, k, v, dq, dk, dv, G, U, lse, mu, xbar, D, gq, gk, gv, gdq, gdk, gdv, N, M, d, s,
                        QUERIES_SIDE: tl.constexpr, TANGENT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
                        EXACT: tl.constexpr):
        """gq, gdq of one tile of queries, walking over the keys; or gk, gv, gdk, gdv of one of keys, over the queries."""
        head, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE
        rows, columns, numbers = head * N * d, head * M * d, head * N
        first, second = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        third, fourth = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        for other in range(0, M if QUERIES_SIDE else N, TILE):
            row, key = other, own
            if QUERIES_SIDE:
                row, key = own, other
            Q, g = read_tile(q + rows, row, N, d, TILE, WIDTH), read_tile(G + rows, row, N, d, TILE, WIDTH)
            K, V = read_tile(k + columns, key, M, d, TILE, WIDTH), read_tile(v + columns, key, M, d, TILE, WIDTH)
            dQ, u, dK, dV = Q, g, K, V
            if TANGENT:
                dQ, u = read_tile(dq + rows, row, N, d, TILE, WIDTH), read_tile(U + rows, row, N, d, TILE, WIDTH)
                dK, dV = read_tile(dk + columns, key, M, d, TILE, WIDTH), read_tile(dv + columns, key, M, d, TILE, WIDTH)
            inside = (row + tl.arange(0, TILE) < N)[:, None] & (key + tl.arange(0, TILE) < M)[None, :]
            P, PW, gS, gdS = pair_tile(Q, K, V, dQ, dK, dV, g, u, read_rows(lse + numbers, row, N, TILE),
                                       read_rows(mu + numbers, row, N, TILE), read_rows(xbar + numbers, row, N, TILE),
                                       read_rows(D + numbers, row, N, TILE), inside, s, TANGENT, EXACT)
            if QUERIES_SIDE:
                first += mm(gS, K, EXACT)
                if TANGENT:
                    first += mm(gdS, dK, EXACT)
                    second += mm(gdS, K, EXACT)
            else:
                first += mm(tl.trans(gS), Q, EXACT)
                second += mm(tl.trans(P), g, EXACT)
                if TANGENT:
                    first += mm(tl.trans(gdS), dQ, EXACT)
                    second += mm(tl.trans(PW), u, EXACT)
                    third += mm(tl.trans(gdS), Q, EXACT)
                    fourth += mm(tl.trans(P), u, EXACT)
        if QUERIES_SIDE:
            write_tile(gq + rows, first, own, N, d, TILE, WIDTH)
            if TANGENT:
                write_tile(gdq + rows, second, own, N, d, TILE, WIDTH)
        else:
            write_tile(gk + columns, first, own, M, d, TILE, WIDTH)
            write_tile(gv + columns, second, own, M, d, TILE, WIDTH)
            if TANGENT:
                write_tile(gdk + columns, third, own, M, d, TILE, WIDTH)
                write_tile(gdv + columns, fourth, own, M, d, TILE, WIDTH)


def check_triton(q: Tensor) -> None:
    """A ValueError that names the way out, where the Triton kernels cannot run."""
    if triton is None:
        raise ValueError("attention body 'triton' needs Triton, which CUDA builds of torch bring along (elsewhere: pip "
                         "install triton); body 'recompute' does the same everywhere")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"attention body 'triton' runs on a GPU, not on {q.device}: use body 'recompute', or start "
                         f"Python with TRITON_INTERPRET=1 to watch the kernels run, slowly")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention body 'triton' computes in float32 sums, not {q.dtype}: use body 'recompute'")


def _launch_options(q: Tensor) -> dict:
    """Tile sizes that keep the tangents' sums in registers, as compiled for an H100 (float32 beyond d = 64 spills)."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    return dict(TILE=16 if q.dtype == torch.float32 else 32, WIDTH=width, EXACT=not torch.backends.cuda.matmul.allow_tf32,
                num_warps=4 if width <= 64 else 8, num_stages=2)


def triton_forward(q, k, v, dq, dk, dv):
    """`pair_forward` by forward_kernel, a launch for each tangent: (O, dO, lse, mu)."""
    (B, H, N, d), M, T, options = q.shape, k.shape[-2], len(dq), _launch_options(q)
    q, k, v, dq, dk, dv = (x.contiguous() for x in (q, k, v, dq, dk, dv))
    O, dO = torch.empty_like(q), torch.empty_like(dq)
    lse, mu = q.new_empty(B, H, N, 1, dtype=torch.float32), q.new_empty(T, B, H, N, 1, dtype=torch.float32)
    grid = (triton.cdiv(N, options["TILE"]), B * H)
    for dq_, dk_, dv_, dO_, mu_ in zip(dq, dk, dv, dO, mu) if T else [(q, k, v, O, lse)]:  # the latter are not looked at
        forward_kernel[grid](q, k, v, dq_, dk_, dv_, O, dO_, lse, mu_, N, M, d, 1 / math.sqrt(d), TANGENT=T > 0, **options)
    return O, dO, lse, mu


def triton_backward(q, k, v, dq, dk, dv, O, dO, lse, mu, G, U):
    """`pair_backward` by backward_kernel: two launches for each tangent, G going with the first of them."""
    (B, H, N, d), M, T, options = q.shape, k.shape[-2], len(dq), _launch_options(q)
    xbar, D = row_sums(O, dO, G, U)
    q, k, v, dq, dk, dv, G, U, xbar, D = (x.contiguous() for x in (q, k, v, dq, dk, dv, G, U, xbar, D))
    gdq, gdk, gdv = torch.empty_like(dq), torch.empty_like(dk), torch.empty_like(dv)
    sums = []
    for i in range(max(T, 1)):
        if T > 1:  # D is linear in (G, U): each launch takes its own part
            D = row_sums(O, dO[i:i + 1], G, U[i:i + 1])[1]
        tangent = [x[i] for x in (dq, dk, dv, U, mu, xbar, gdq, gdk, gdv)] if T else [q, k, v, G, lse, D, q, k, v]
        dq_, dk_, dv_, U_, mu_, xbar_, gdq_, gdk_, gdv_ = tangent
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for length, queries_side in ((N, True), (M, False)):
            backward_kernel[triton.cdiv(length, options["TILE"]), B * H](
                q, k, v, dq_, dk_, dv_, G, U_, lse, mu_, xbar_, D, gq, gk, gv, gdq_, gdk_, gdv_, N, M, d,
                1 / math.sqrt(d), QUERIES_SIDE=queries_side, TANGENT=T > 0, **options)
        sums.append((gq, gk, gv))
        G = torch.zeros_like(G)
    return *(sum(parts) for parts in zip(*sums)), gdq, gdk, gdv


TRITON = types.SimpleNamespace(forward=triton_forward, backward=triton_backward)


# --------------------------------------------------------------------------------------------------------------------
# 3. The transformer
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


class BottleneckEmbed(nn.Module):
    """The same through a narrow layer without bias: pixels of a large patch have few degrees of freedom (JiT's names)."""

    def __init__(self, channels: int, patch: int, width: int, bottleneck: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


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


class Shifts(nn.Module):
    """CAR-Flow (arXiv:2509.19300): a flow from e + a_y to x + b_y, where classes learn their a_y and b_y.

        z_t = x_t + (1 - t) b_y + t a_y,   dx_t/dt = dz_t/dt - (a_y - b_y)

    Asked and answered in x_t, so that flow matching's loss |v - (e - x)|^2 is the paper's |dz_t/dt - (z_1 - z_0)|^2, and
    samplers, guidance and score need to know nothing of it: the paper's start e + a_y, end z - b_y, and score with the
    mean a_y come of themselves. Gradients reach both shifts, which start at 0: plain flow matching. paper: shifts come out
    of two networks of 2 M parameters; here: of tables. Scales, which the paper shows to collapse, are not offered.
    """

    def __init__(self, classes: int, shape: tuple):
        super().__init__()
        self.source, self.target = (nn.Parameter(torch.zeros(classes, *shape)) for _ in range(2))

    def forward(self, velocity, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """dx_t/dt at x_t (B, ...), of the `velocity` (z_t, t, y, r) -> dz_t/dt."""
        a, b, s = self.source[y], self.target[y], t.view(-1, *[1] * (x_t.dim() - 1))
        return velocity(x_t + (1 - s) * b + s * a, t, y, r) - (a - b)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, times weights if there is a width; of primitives, whose derivatives are all right."""

    def __init__(self, width: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if width else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x if self.weight is None else x * self.weight


def normalisation(norm: str, width: int) -> nn.Module:
    """layer and rms: without weights; rms_weight: with. Losses on forward-mode derivatives need RMSNorm: see `refuse`."""
    if norm == "layer":
        return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    return RMSNorm(width if norm == "rms_weight" else 0)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3 (silu(a) b) with (a, b) = w12 x, of about the size of an Mlp with this hidden width (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * int(hidden * 2 / 3))
        self.w3 = nn.Linear(int(hidden * 2 / 3), width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class GatedMlp(nn.Module):
    """down (silu(gate x) up x), without biases: DiT-MoE's expert."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """DiT-MoE's layer (arXiv:2407.11633) in place of an Mlp: of E experts each token is sent to `used`, and one sees all.

        p = softmax(gate x),   out = shared(x) + sum over the `used` largest p_i of p_i expert_i(x)

    After a call `balance` = sum_i f_i P_i, with P_i the mean of p_i over tokens and f_i E times the share of choices that fell
    on i: 1 for even routing, up to E for one expert alone; see `balance_of`. `chosen` (B, N, used) tells who went where.
    """

    def __init__(self, width: int, hidden: int, experts: int, used: int = 2):
        super().__init__()
        if not 1 <= used <= experts:
            raise ValueError(f"{experts} experts of which a token sees {used}: expected 1 to {experts}")
        self.used, self.balance, self.chosen = used, None, None
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(GatedMlp(width, hidden) for _ in range(experts))
        self.shared_experts = GatedMlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, E = x.flatten(0, -2), len(self.experts)                                           # (B N, W)
        p = self.gate(tokens).float().softmax(-1)
        weight, chosen = p.topk(self.used, -1)
        share = E * F.one_hot(chosen, E).float().mean((0, 1))
        self.balance, self.chosen = (share * p.mean(0)).sum(), chosen.view(*x.shape[:-1], self.used)
        out = self.shared_experts(tokens)
        for k, expert in enumerate(self.experts):
            if chosen.is_meta:  # multiply-adds are counted there: an even share
                rows = slot = chosen.new_zeros(chosen.numel() // E)
            else:
                rows, slot = (chosen == k).nonzero(as_tuple=True)
            out = out.index_add(0, rows, (weight[rows, slot, None] * expert(tokens[rows])).to(out.dtype))
        return out.view_as(x)


def balance_of(net: nn.Module) -> Tensor | None:
    """The sum of `balance` over the MoE layers of a network, of their last call; None without such layers."""
    parts = [layer.balance for layer in net.modules() if isinstance(layer, MoE)]
    return sum(parts) if parts else None


@torch.no_grad()
def routing(net: nn.Module, x: Tensor, e: Tensor, y: Tensor, times: int = 10) -> dict:
    """Where a network's MoE layers send tokens: shares of the experts, by time (L, times, E) and by position (L, N, E).

    As DiT-MoE analyses them: routing that follows the position or the class early in the flow, and evens out. x (B, C, h, w)
    clean, e noise, y (B,); times are the middles of equal intervals.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, MoE)]
    shares = []
    for k in range(times):
        t = x.new_full((len(x),), (k + 0.5) / times)
        net((1 - t[0]) * x + t[0] * e, t, y)
        shares.append(torch.stack([F.one_hot(layer.chosen, len(layer.experts)).float().mean((0, 2)) for layer in layers]))
    shares = torch.stack(shares, 1)                                                               # (L, times, N, E)
    return {"time": shares.mean(2), "position": shares.mean(1)}


def rope_table(features: int, side: int) -> Tensor:
    """Rotary positions (2, side^2, d): cosines and sines of a head's d features, half for the row, half for the column.

    Pair k of n = d / 4 in a half turns by 10^4^(-k / n) a position (arXiv:2104.09864, in JiT's layout).
    """
    turns = 1e4 ** (-torch.arange(0, features // 2, 2) / (features // 2))
    angle = (torch.arange(side)[:, None] * turns).repeat_interleave(2, 1)                         # (side, d / 2)
    both = torch.cat([angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)], 2).flatten(0, 1)
    return torch.stack([both.cos(), both.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """The pairs of features of x (B, H, N, d) turned by the angles of `rope` (2, M, d); the first N - M tokens stay."""
    cos, sin = rope.to(x.dtype)
    extra = x.shape[2] - len(cos)
    image = x[:, :, extra:]
    turned = torch.stack([-image[..., 1::2], image[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :extra], image * cos + turned * sin], 2)


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names (qkv, proj), queries and keys normalised where asked for."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        B, N, W = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, N, W))                  # (B, N, W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


class LinearAttention(Attention):
    """LiT's attention (arXiv:2501.12976), linear in the tokens: f(q) (f(k)^T v) / (f(q) sum f(k)) with f = ReLU,

    and a 5 x 5 convolution of each feature of v, which brings back what is near. Tokens must be those of a square image.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__(width, heads, qk_norm)
        self.dwc = nn.Conv2d(width // heads, width // heads, 5, padding=2, groups=width // heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, side = F.relu(q), F.relu(k), math.isqrt(v.shape[2])
        near = self.dwc(v.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        size = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return q @ (k.transpose(-2, -1) @ v) / (size + 1e-6) + near.view_as(v)


class Block(nn.Module):
    """Transformer block with adaLN-zero: x + gate f(norm(x) (1 + scale) + shift), for attention and then the MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm: str, qk_norm: bool = False, swiglu: bool = False,
                 linear: bool = False, experts: int = 0):
        super().__init__()
        self.norm1 = normalisation(norm, width)
        self.attn = (LinearAttention if linear else Attention)(width, heads, qk_norm)
        self.norm2 = normalisation(norm, width)
        hidden = int(width * mlp_ratio)
        self.mlp = MoE(width, hidden, experts) if experts else SwiGLU(width, hidden) if swiglu else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)   # (B, W) each
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(self.norm1(x), shift_a, scale_a), rope))
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


def _with_body(body: str, block: Block, *parts) -> Tensor:
    """A block under the attention body of its forward pass, also when the backward pass comes to compute it again."""
    with attention_body(body):
        return block(*parts)


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, out_channels: int, norm: str):
        super().__init__()
        self.norm_final = normalisation(norm, width)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.modulated(x, c))                                                  # (B, N, P P C)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return modulate(self.norm_final(x), shift, scale)


def projectors(width: int, features: int) -> nn.ModuleList:
    """REPA's MLP from tokens to the features of an encoder, one for each encoder, of which we have one. Official names.

    paper: 2048 wide inside; here: 4 times the width where that is less, for small networks.
    """
    inside = min(2048, 4 * width)
    return nn.ModuleList([nn.Sequential(nn.Linear(width, inside), nn.SiLU(), nn.Linear(inside, inside), nn.SiLU(),
                                        nn.Linear(inside, features))])


class DiT(nn.Module):
    """The diffusion transformer of DiT (arXiv:2212.09748), SiT (arXiv:2401.08740) and JiT (arXiv:2511.13720).

    norm: layer, rms or rms_weight. bottleneck (see `BottleneckEmbed`; 0: none), rope, qk_norm, swiglu: JiT's parts. context:
    so many tokens of the class join the others at block context_start (JiT). linear: see `LinearAttention`. experts: see
    `MoE`; 0: none. learn_sigma: the last layer has 2 C channels as in the official files; the second half (DiT's
    variance, untrained in SiT) is dropped. null_class: whether the label table has the extra row of guidance. t_min:
    see `clean_velocity`. times: how many times the network is told, 0 (a jump from noise to data), 1 (t), or 2 (t and
    the length t - r of a jump to r). time_scale: times are multiplied by it (1000: AFM's official files). repeats: the
    stack of blocks is run that often, see `passes`. shifts: see `Shifts`. guided: whether the network is told a guidance
    scale. head: so many of the last blocks, and the last layer, are there twice; the second way ends in the velocity at t
    and is run in training only (both: iMF, arXiv:2512.02012). features: the width of a frozen encoder's, which a projector makes of
    the tokens after `align` blocks (0: a third of them, 8 at most, which is REPA's choice for all sizes); see `projected`.
    A fresh network returns exactly 0 from its last layer, and each of its blocks is the identity (adaLN-zero).
    """

    def __init__(self, input_size: int = 32, patch: int = 2, channels: int = 4, width: int = 1152, depth: int = 28,
                 heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000, null_class: bool = True,
                 learn_sigma: bool = False, predict: str = "v", t_min: float = 0.05, norm: str = "layer",
                 times: int = 1, time_scale: float = 1.0, repeats: int = 0, shifts: bool = False, guided: bool = False,
                 head: int = 0, bottleneck: int = 0, rope: bool = False, qk_norm: bool = False, swiglu: bool = False,
                 context: int = 0, context_start: int = 0, linear: bool = False, experts: int = 0, features: int = 0,
                 align: int = 0):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if input_size % patch:
            raise ValueError(f"images of {input_size} pixels do not divide into patches of {patch}: choose a size that "
                             f"is a multiple of {patch}, or a model with another patch")
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        if predict not in ("v", "x", "eps"):
            raise ValueError(f"predict {predict!r}: expected v, x or eps")
        if norm not in ("layer", "rms", "rms_weight"):
            raise ValueError(f"norm {norm!r}: expected layer, rms or rms_weight")
        if rope and width // heads % 4:
            raise ValueError(f"rope: turns pairs of features for rows and for columns, so that a head's {width // heads} must be a "
                             f"multiple of 4")
        if not 0 <= context_start < depth or context and (repeats or context_start >= depth - head):
            raise ValueError(f"{context} tokens of the class at block {context_start}: expected one of {depth} blocks that run "
                             f"once, before those of a velocity head")
        if times not in (0, 1, 2) or repeats < 0 or times and repeats:
            raise ValueError(f"times {times}, repeats {repeats}: expected times 0, 1 or 2, and repeats with times 0 only, "
                             f"as a repeated stack tells its passes apart by the time embedding")
        if not 0 <= head <= depth or head and repeats:
            raise ValueError(f"a velocity head of {head} blocks: expected 0 to {depth} (the blocks), and none with repeats")
        if not 0 <= align <= depth - head:
            raise ValueError(f"tokens after {align} blocks to align: expected 1 to {depth - head}, or 0 for a third of them")
        self.patch, self.channels, self.out_channels = patch, channels, channels * (1 + learn_sigma)
        self.num_classes, self.null_class, self.predict, self.t_min = num_classes, null_class, predict, t_min
        self.shape = (channels, input_size, input_size)
        self.amp = None  # torch.bfloat16: run the network, and nothing else, under autocast
        self.recompute = False  # keep only what enters each block for the backward pass, and compute the rest again
        self.times, self.time_scale, self.repeats = times, time_scale, repeats
        self.guided, self.head = guided, head
        self.align, self.tokens = (align or min(8, max(1, depth // 3))) if features else 0, None
        self.x_embedder = (BottleneckEmbed(channels, patch, width, bottleneck) if bottleneck else
                           PatchEmbed(channels, patch, width))
        if times or repeats:
            self.t_embedder = TimestepEmbedder(width)
        if times == 2:
            self.jump_embedder = TimestepEmbedder(width)
        if guided:
            self.guide_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class)
        self.shifts = Shifts(num_classes + null_class, self.shape) if shifts else None
        self.pos_embed = nn.Parameter(position_table(width, input_size // patch), requires_grad=False)
        self.context, self.context_start = context, context_start
        if context:
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, context, width))
        self.register_buffer("rope", rope_table(width // heads, input_size // patch) if rope else None, persistent=False)
        if linear and context:
            raise ValueError("linear attention is for images alone, not with tokens of the class beside them")
        kind = dict(mlp_ratio=mlp_ratio, norm=norm, qk_norm=qk_norm, swiglu=swiglu, linear=linear, experts=experts)
        self.blocks = nn.ModuleList(Block(width, heads, **kind) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.out_channels, norm)
        if head:
            self.head_blocks = nn.ModuleList(Block(width, heads, **kind) for _ in range(head))
            self.head_layer = FinalLayer(width, patch, self.out_channels, norm)
        if features:
            self.projectors = projectors(width, features)
        self.initialise()

    state = property(lambda self: self.shape, doc="Shape of what the flow moves: the image.")

    def initialise(self) -> None:
        """DiT's initial weights: Xavier, N(0, 0.02) for the embeddings of t and y, zeros where adaLN-zero wants them."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in self.x_embedder.children():
            nn.init.xavier_uniform_(layer.weight.view(layer.out_channels, -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (m for m in self.modules() if isinstance(m, TimestepEmbedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for name in ("jump_embedder", "guide_embedder"):  # so that a flow's weights with fresh ones of these are that flow
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).mlp[2].weight)
        for layer in self.modules():
            if isinstance(layer, (Block, FinalLayer)):
                nn.init.zeros_(layer.adaLN_modulation[1].weight)
            if isinstance(layer, FinalLayer):
                nn.init.zeros_(layer.linear.weight)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, P P C), a token being rows, columns, channels -> (B, C, h, w)."""
        B, N, _ = tokens.shape
        P, side = self.patch, math.isqrt(N)
        image = tokens.view(B, side, side, P, P, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(B, self.out_channels, side * P, side * P)

    def condition(self, t: Tensor, y: Tensor, r: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """(B, W): the embeddings of the class and of as many times as the network is told. Without r, r = t.

        Of a guidance scale w the network is told 1 - 1 / w (iMF). Without w, w = 1.
        """
        c = self.y_embedder(y)
        if self.times:
            c = c + self.t_embedder(self.time_scale * t)
        if self.times == 2:
            c = c + self.jump_embedder(self.time_scale * (torch.zeros_like(t) if r is None else t - r))
        if self.guided:
            c = c + self.guide_embedder(torch.zeros_like(t) if w is None else 1 - 1 / w)
        return c

    def passes(self, c: Tensor) -> list[Tensor]:
        """The condition (B, W) of each pass through the stack of blocks: one, or in a deep generator R = `repeats`,

        which tell each other apart by the embedding of the time 1 - k / R, k = 0 .. R - 1, as the time of a flow is not
        needed there (AFM, arXiv:2511.22475, Sec. 3.7). The last layer sees c alone.
        """
        R = self.repeats
        return [c + self.t_embedder(c.new_full((len(c),), self.time_scale * (1 - k / R))) for k in range(R)] or [c]

    def raw(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, w: Tensor | None = None,
            head: bool = False) -> Tensor:
        """The official forward pass: (B, C, h, w), t (B,) in the network's own time, y (B,) -> (B, C or 2C, h, w).

        With `head` the images of the velocity head follow: (2 B, C or 2C, h, w).
        """
        with torch.autocast(x.device.type, self.amp) if self.amp else contextlib.nullcontext():
            c = self.condition(t, y, r, w)                                                        # (B, W)
            x = self.embed(x) + self.pos_embed                                                    # (B, N, W)
            blocks = list(self.blocks)
            trunk, rest = blocks[:len(blocks) - self.head], blocks[len(blocks) - self.head:]
            for own in self.passes(c):
                x = second = self.through(trunk, x, own, y)
                x = self.through(rest, x, own, y)
            out = self.drawn(self.final_layer, x, c)
            if head:
                out = torch.cat([out, self.drawn(self.head_layer, self.through(self.head_blocks, second, c, y), c)])
            return out

    def embed(self, x: Tensor) -> Tensor:
        """The tokens (B, N, W) of x, without their positions."""
        return self.x_embedder(x)

    def drawn(self, layer: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
        """What a last layer makes of the tokens x (B, N, W)."""
        return self.unpatchify(layer(x[:, self.context:], c))

    def projected(self) -> Tensor:
        """The tokens of the last call in training mode, after block `align`, as the encoder's features (B, N, F)."""
        with torch.autocast(self.tokens.device.type, self.amp) if self.amp else contextlib.nullcontext():
            out = self.projectors[0](self.tokens)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def through(self, blocks, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        """Tokens x (B, N, W) through the blocks; at block `context_start` tokens of the class join in front of them."""
        for block in blocks:
            if self.context and block is self.blocks[self.context_start]:
                x = torch.cat([(self.y_embedder(y)[:, None] + self.in_context_posemb).to(x.dtype), x], 1)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(_with_body, _body, block, x, c, self.rope, use_reentrant=False)
            else:
                x = block(x, c, self.rope)
            if self.align and self.training and block is self.blocks[self.align - 1]:
                self.tokens = x[:, -self.pos_embed.shape[1]:]  # without those of the class
        return x

    def read(self, token: Tensor, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """A token (W,) in front of the tokens x (B, N, W), all as they leave the last block: (B, 1 + N, W)."""
        x = torch.cat([token.expand(len(x), 1, -1).to(x.dtype), x], 1)
        return self.through(self.blocks, x, c, y)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, w: Tensor | None = None,
                head: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity at x_t (B, C, h, w), times t (B,) in [0, 1], labels y (B,) int64: the shape of x_t, float32 or wider.

        r (B,), the time of a jump's end, is looked at with times = 2 only; the velocity is then the jump's average.
        w (B,): the guidance scale that a guided network is told. With `head`: the pair of it and the head's velocity.
        """
        if self.predict == "eps":
            return self._velocity_from_vp_noise(x_t, t, y)
        if self.shifts:
            return self.shifts(self._velocity, x_t, t, y, r)
        return self._velocity(x_t, t, y, r, w, head)

    def _velocity(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, w: Tensor | None = None,
                  head: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """What the last layer gives, and with `head` the head's, as velocities."""
        out = self.raw(x_t, t, y, r, w, head)
        out = out[:, :self.channels] if self.out_channels > self.channels else out
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if head:
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        v = clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out
        return v.chunk(2) if head else v

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


class TokenDiT(DiT):
    """REG's network (arXiv:2507.01467): an image and its token of `token` numbers, by a frozen encoder, denoised together.

    A state is the numbers of the image and then those of the token, (B, C h w + token), so that noise, solvers and
    guidance treat both alike. Inside, the token stands before those of the image, without a position. Official names.
    """

    def __init__(self, token: int = 768, **config):
        super().__init__(**config)
        self.config |= dict(token=token)
        if self.context or self.shifts or self.config["linear"] or self.out_channels > self.channels or self.predict == "eps":
            raise ValueError("a network that denoises a token as well is SiT's: without context, linear, shifts, learn_sigma "
                             "and noise prediction")
        width = self.config["width"]
        self.cls_projectors2, self.wg_norm = nn.Linear(token, width), nn.LayerNorm(width, eps=1e-6)
        nn.init.xavier_uniform_(self.cls_projectors2.weight)
        nn.init.zeros_(self.cls_projectors2.bias)
        for layer in (m for m in self.modules() if isinstance(m, FinalLayer)):
            layer.linear_cls = nn.Linear(width, token)
            nn.init.zeros_(layer.linear_cls.weight)
            nn.init.zeros_(layer.linear_cls.bias)
        self.pos_embed = nn.Parameter(F.pad(self.pos_embed, (0, 0, 1, 0)), requires_grad=False)   # (1, 1 + N, W)

    state = property(lambda self: (math.prod(self.shape) + self.config["token"],))

    def embed(self, x: Tensor) -> Tensor:
        image, token = x[:, :math.prod(self.shape)], x[:, math.prod(self.shape):]
        token = self.wg_norm(self.cls_projectors2(token))[:, None]
        return torch.cat([token, self.x_embedder(image.unflatten(1, self.shape))], 1)             # (B, 1 + N, W)

    def drawn(self, layer: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
        x = layer.modulated(x, c)
        image = self.unpatchify(layer.linear(x[:, 1:]))
        return torch.cat([image.flatten(1), layer.linear_cls(x[:, 0])], 1)


class Discriminator(DiT):
    """A number D(x_t, t, y) for each sample: the transformer with one more token in front, read out of that token.

    As in CAFM (arXiv:2604.11521, official code): RMSNorm, no position for the token, no modulation in the head. The head
    is never zero: with adaLN-zero's zeros before it, D would stay without a gradient for ever. A network with tokens of the
    class (JiT) is read out of the first of these instead. `norm` and the other arguments are DiT's; `predict`, `t_min` and
    `learn_sigma` mean nothing here.
    """

    def __init__(self, norm: str = "rms", **config):
        super().__init__(norm=norm, **config)
        width = self.config["width"]
        if not self.context:
            self.dis_embed = nn.Parameter(0.02 * torch.randn(width))
        last = normalisation("layer" if norm == "layer" else "rms", width)
        self.final_layer = nn.Sequential(last, nn.Linear(width, 1, bias=self.context > 0))
        self.register_buffer("gradient_square", torch.zeros(()))  # of losses.NormaliseGradient: part of a run's state

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (B, C, h, w), t (B,) in [0, 1], y (B,) int64 -> (B,), float32 or wider."""
        with torch.autocast(x_t.device.type, self.amp) if self.amp else contextlib.nullcontext():
            x = self.x_embedder(x_t) + self.pos_embed                                             # (B, N, W)
            c = self.condition(t, y)                                                              # (B, W)
            x = self.through(self.blocks, x, c, y) if self.context else self.read(self.dis_embed, x, c)
            out = self.final_layer(x[:, 0])[:, 0]                                                 # (B,)
        return out.to(torch.promote_types(out.dtype, torch.float32))


class Classifier(DiT):
    """log p(y | x_t) up to a constant, for every t: AFM's guide (arXiv:2511.22475, official code and its names).

    The transformer without the class, read out of one more token. `predict`, `t_min` and `learn_sigma` mean nothing.
    """

    def __init__(self, classifier: bool = True, **config):
        super().__init__(**config | dict(context=0, context_start=0, linear=False))
        self.config |= dict(classifier=classifier)  # by which `from_config` knows it
        width, norm = self.config["width"], self.config["norm"]
        del self.y_embedder
        self.cls_embed = nn.Parameter(0.02 * torch.randn(width))
        self.final_layer = nn.Sequential(normalisation(norm, width), nn.Linear(width, self.num_classes))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w), t (B,) in [0, 1] -> logits (B, num_classes), float32 or wider."""
        with torch.autocast(x_t.device.type, self.amp) if self.amp else contextlib.nullcontext():
            x = self.x_embedder(x_t) + self.pos_embed                                             # (B, N, W)
            out = self.final_layer(self.read(self.cls_embed, x, self.t_embedder(self.time_scale * t))[:, 0])
        return out.to(torch.promote_types(out.dtype, torch.float32))


class SlowLinear(nn.Linear):
    """A linear layer that learns at 1 / 100 of the rate, as its weights are kept 100 times as large (GAT's mapping).

    Adam's steps do not depend on the size of a gradient, so they move the product by a hundredth. At full rate the
    mapping soon shrinks what comes from z, and all samples of a class are one image.
    """

    def __init__(self, inputs: int, outputs: int, rate: float = 0.01):
        super().__init__(inputs, outputs)
        self.rate = rate
        nn.init.xavier_uniform_(self.weight, gain=1 / rate)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rate * self.weight, self.rate * self.bias)


class StagedDiT(DiT):
    """CAT's generator (arXiv:2605.26449): one pass from a latent to an image in `stages` (K) coarse-to-fine stages.

    A mapping network turns z and the class, `latent` normalised numbers each, into w, which modulates every block; the
    tokens start as their positions. After floor(k depth / K) blocks, k = 1 .. K, a head adds to the image:
    h_k = sum_{j <= k} head_j (GAT, arXiv:2509.24935). z is the first `latent` numbers of the noise image x_t at t = 1, and
    the last stage is the clean image that DiT.forward turns into the velocity x_t - h_K: a jump from 1 to 0 gives h_K.

    GAT: 2-D RoPE, query-key norm, SwiGLU, scale and gate only, modulations a tenth as large at the start, a mapping of
    unit variance; here: DiT's blocks, `wake`, a mapping that is normalised, and heads a tenth as large. What fresh heads
    make of z is grain, and a generator that starts with more grain than image gets rid of it by forgetting z.
    """

    def __init__(self, stages: int = 3, latent: int = 64, **config):
        super().__init__(**config | dict(predict="x", learn_sigma=False, times=0, rope=False, context=0, context_start=0))
        self.config |= dict(stages=stages, latent=latent)
        width, depth, numbers = self.config["width"], self.config["depth"], math.prod(self.shape)
        if not 2 <= stages <= depth or not 1 <= latent <= numbers:
            raise ValueError(f"{stages} stages and a latent of {latent}: expected 2 to {depth} stages (the blocks) "
                             f"and 1 to {numbers} numbers (an image)")
        del self.x_embedder
        self.y_embedder = LabelEmbedder(self.num_classes, latent, self.null_class)
        self.latent, self.ends = latent, [depth * k // stages for k in range(1, stages + 1)]
        self.norm = RMSNorm()
        self.mapping = nn.Sequential(SlowLinear(2 * latent, width), nn.SiLU(), SlowLinear(width, width))
        self.final_layer = nn.ModuleList(FinalLayer(width, self.patch, self.channels, self.config["norm"])
                                         for _ in self.ends)
        wake(*self.blocks, *self.final_layer)
        shrink(*(head.linear for head in self.final_layer))

    def stages(self, e: Tensor, y: Tensor) -> Tensor:
        """All stages h_1 .. h_K (K, B, C, h, w), float32 or wider, from noise e (B, C, h, w) and labels y (B,)."""
        with torch.autocast(e.device.type, self.amp) if self.amp else contextlib.nullcontext():
            z = e.flatten(1)[:, :self.latent]
            w = self.norm(self.mapping(torch.cat([self.norm(z), self.norm(self.y_embedder(y))], 1)))   # (B, W)
            x, images = self.pos_embed.expand(len(e), -1, -1), []
            for k, block in enumerate(self.blocks, 1):
                x = block(x, w)
                if k in self.ends:
                    images.append(self.unpatchify(self.final_layer[len(images)](x, w)))
        images = torch.stack(images)
        return images.to(torch.promote_types(images.dtype, torch.float32)).cumsum(0)

    def raw(self, x: Tensor, t: Tensor, y: Tensor, *_) -> Tensor:
        """The last stage, whatever the times."""
        return self.stages(x, y)[-1]


class ScaleDiscriminator(DiT):
    """CAT's discriminator (arXiv:2605.26449): a number for each of K scales, finest first, each judged alone.

    Scales share the patch embedding, the blocks and the head; each has its positions, a scale embedding and a token
    that is read out. No token sees another scale, as that hurts: the same network once a scale is exactly the
    block-diagonal attention mask over all of them. GAT: the class enters by a projection in the head; here: by adaLN, as in
    `Discriminator`, because the blocks have it, and a patch embedding a tenth as large, as its random part is what gives
    the generator's images grain. With `features` the tokens of the finest scale, as they leave the last block, are
    projected to those of a frozen encoder, its token of the whole image first. `predict`, `t_min`, `learn_sigma` and
    `latent` mean nothing here.
    """

    def __init__(self, stages: int = 3, latent: int = 0, **config):
        super().__init__(**config | dict(times=0, rope=False, context=0, context_start=0, linear=False))
        self.config |= dict(stages=stages, latent=latent)
        width, size = self.config["width"], self.shape[1]
        if size % (self.patch << stages - 1):
            raise ValueError(f"an image of {size} pixels, halved {stages - 1} times, does not divide into patches of "
                             f"{self.patch}: choose fewer stages, a smaller patch or another size")
        self.sides = [size // self.patch >> k for k in range(stages)]
        tables = [position_table(width, side) for side in self.sides]
        self.pos_embed = nn.Parameter(torch.cat(tables, 1), requires_grad=False)
        self.scale_embed, self.dis_embed = (nn.Parameter(0.02 * torch.randn(stages, width)) for _ in range(2))
        self.norm = RMSNorm()
        self.final_layer = nn.Sequential(normalisation(self.config["norm"], width), nn.Linear(width, 1, bias=False))
        self.align = 0  # forward keeps the tokens itself
        wake(*self.blocks)
        shrink(self.x_embedder.proj)

    def forward(self, images: list[Tensor], y: Tensor) -> Tensor:
        """K images (B, C, h / 2^k, w / 2^k), k = 0 .. K - 1, and y (B,) -> (B, K), float32 or wider."""
        outs, positions = [], self.pos_embed.split([side * side for side in self.sides], 1)
        with torch.autocast(y.device.type, self.amp) if self.amp else contextlib.nullcontext():
            c = self.norm(self.y_embedder(y))                                                     # (B, W)
            for x, position, scale, token in zip(images, positions, self.scale_embed, self.dis_embed, strict=True):
                x = self.read(token, self.x_embedder(x) + position + scale, c)                    # (B, 1 + N / 4^k, W)
                self.tokens = self.tokens if outs else x
                outs.append(self.final_layer(x[:, 0]))
        out = torch.cat(outs, 1)                                                                  # (B, K)
        return out.to(torch.promote_types(out.dtype, torch.float32))


def wake(*layers: nn.Module) -> None:
    """Modulations of Xavier's size in place of adaLN-zero, whose zeros hide z from images, and images from D."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.adaLN_modulation[1].weight)


def shrink(*layers: nn.Module) -> None:
    """Weights a tenth as large: where pixels come and go, what is learned soon outweighs the grain of random weights."""
    for layer in layers:
        for p in layer.parameters():
            p.data.mul_(0.1)


# --------------------------------------------------------------------------------------------------------------------
# 4. Derivatives of a network with respect to its input
# --------------------------------------------------------------------------------------------------------------------
#
# Which way round? A discriminator maps an image to one number: one reverse pass gives its derivative along every
# direction. A velocity network maps an image to an image: one forward-mode pass gives its derivative along one
# direction. Each is the wrong tool for the other: reverse mode would need a pass for every output pixel, and forward
# mode a pass for every direction, at the price of two networks each and with a graph through all of it.


def input_gradient(D, x_t: Tensor, t: Tensor, y: Tensor, create_graph: bool = True,
                   body: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    """D (B,), its gradient with respect to x_t (B, C, h, w), and its derivative with respect to t (B,).

    The derivative along any direction (w, 1) is then `along(gradient, slope, w)`. create_graph: for a loss that trains D
    on these (double backward, by attention `body`); without it they are constants, and attention is fused. Samples must
    not see each other inside D.
    """
    D = bare(D)
    x_t, t = x_t.detach().requires_grad_(), t.detach().requires_grad_()
    with torch.enable_grad(), attention_body(body if create_graph else "fused"):
        out = D(x_t, t, y)
        gradient, slope = torch.autograd.grad(out.sum(), (x_t, t), create_graph=create_graph, materialize_grads=True)
    return (out if create_graph else out.detach()), gradient, slope


def along(gradient: Tensor, slope: Tensor, w: Tensor) -> Tensor:
    """J(w) = <grad_x D, w> + dD/dt (B,): the derivative of D along (w, 1) (CAFM, arXiv:2604.11521). Linear in w."""
    return (gradient * w).flatten(1).sum(1) + slope


def directional_derivatives(D, x_t: Tensor, t: Tensor, y: Tensor, directions: Tensor, route: str = "reverse",
                            body: str = "plain") -> tuple[Tensor, Tensor]:
    """D (B,) and its derivatives J (K, B) along (w, 1) for each w of `directions` (K, B, C, h, w), all with a graph.

    route "reverse": `input_gradient`, which serves every direction; a loss on J is then double backward.
    route "forward": torch.func.jvp, mapped over the directions as in CAFM's official code. The same numbers at two to
    three times the price. Here as the oracle of the other, and to measure it.
    """
    if route == "reverse":
        out, gradient, slope = input_gradient(D, x_t, t, y, body=body)
        return out, torch.stack([along(gradient, slope, w) for w in directions])
    if route != "forward":
        raise ValueError(f"route {route!r}: expected reverse or forward")
    refuse_compile("a loss on forward-mode derivatives has", "compile nothing around route 'forward', or use 'reverse'")
    D = bare(D)
    refuse(D, x_t, t, y, loss_on_tangent=True)

    def one(w):
        return torch.func.jvp(lambda x_t, t: D(x_t, t, y), (x_t, t), (w, torch.ones_like(t)))

    with attention_body(body):
        return torch.func.vmap(one, out_dims=(None, 0))(directions)


@torch.no_grad()
def time_derivative(net, x_t: Tensor, t: Tensor, y: Tensor, v: Tensor, *fixed: Tensor,
                    body: str = "plain") -> tuple[Tensor, Tensor]:
    """u = net(x_t, t, y, ..) and du/dt = (v . grad_x) u + partial u / partial t along the flow dx_t/dt = v, with all that

    follows, such as the time r of a jump's end and a guidance scale, fixed.

    Both have the shape of x_t, and no graph: they are for the target of a loss (MeanFlow, arXiv:2505.13447, Eq. 8), whose
    gradient comes from an ordinary net(x_t, t, y, r) beside it. That call may be compiled, wrapped by DDP and use fused
    attention, which this forward-mode pass can not; compile's wrapper is taken off here.
    """
    net = bare(net)
    refuse(net, x_t, t, y, *fixed)
    with attention_body(body):
        return torch.func.jvp(lambda x_t, t: net(x_t, t, y, *fixed), (x_t, t), (v, torch.ones_like(t)))


def bare(net):
    """The network without torch.compile's wrapper, which has no second derivative. DDP's wrapper is refused."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        raise ValueError("a derivative through DistributedDataParallel misses its gradient exchange: let DDP wrap the "
                         "module that takes the derivative (as train.Loss does), not the network inside")
    return getattr(net, "_orig_mod", net)


class _Watch(TorchDispatchMode):
    """Notes the names of all operators that run, below autograd."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


_seen = weakref.WeakKeyDictionary()  # network -> names of its operators


@torch.no_grad()
def refuse(net, *inputs, loss_on_tangent: bool = False) -> None:
    """A ValueError where torch's forward-mode derivative of this network would be wrong without an error.

    Custom operators count as constants there. And the tangent of nn.LayerNorm is right, but the gradient of a loss on it
    is not (relative error about 1: layer_norm_jvp reads mean and rstd as constants; pytorch issue 196700); double
    backward through LayerNorm is right. The operators are found by one pass of one sample, the first time.
    """
    if net not in _seen:
        with _Watch() as watch:
            net(*(x if x is None else x[:1] for x in inputs))
        _seen[net] = watch.seen
    known = ("aten", "prim", "prims", "c10d", "fsdp", "profiler")  # the last: FSDP's, on weights, which have no tangents
    custom = [name for name in sorted(_seen[net]) if name.split("::")[0] not in known]
    if custom:
        raise ValueError(f"the network calls the custom operator {custom[0]}, which torch.func.jvp takes for a constant: "
                         f"write it with torch's operators or as a torch.autograd.Function with a jvp")
    if loss_on_tangent and "aten::native_layer_norm" in _seen[net]:
        raise ValueError("torch gets the gradient of a loss on a forward-mode derivative of nn.LayerNorm wrong, without "
                         "an error: create the network with norm='rms', or use route 'reverse'")


# --------------------------------------------------------------------------------------------------------------------
# 5. The zoo
# --------------------------------------------------------------------------------------------------------------------

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}        # width, depth, heads

ZOO = {"glyph-S": dict(input_size=32, patch=8, channels=3, width=128, depth=4, heads=4, num_classes=10, predict="x",
                       t_min=0.01)}
ZOO |= {f"SiT-{size}/{patch}": dict(patch=patch, width=width, depth=depth, heads=heads)
        for size, (width, depth, heads) in SIZES.items() for patch in (2, 4, 8)}
JIT = dict(channels=3, predict="x", norm="rms_weight", rope=True, qk_norm=True, swiglu=True, context=32)
JIT_SIZES = {"S": (384, 12, 6, 128), "B": (768, 12, 12, 128), "L": (1024, 24, 16, 128), "H": (1280, 32, 16, 256)}
ZOO |= {f"MoE-{size}/2": ZOO[f"SiT-{size}/2"] | dict(experts=8) for size in ("S", "B", "XL")}
ZOO |= {f"LiT-{size}/2": ZOO[f"SiT-{size}/2"] | dict(linear=True) for size in SIZES}
ZOO |= {f"JiT-{size}/{patch}": JIT | dict(input_size=16 * patch, patch=patch, width=width, depth=depth, heads=heads,
                                          bottleneck=bottleneck, context_start=depth // 3)
        for size, (width, depth, heads, bottleneck) in JIT_SIZES.items() for patch in (16, 32)}


def create(name: str, **options) -> DiT:
    """A fresh network of the zoo; `options` override its entries (input_size, channels, num_classes, predict, ...).

    With `stages` among them it is a StagedDiT, with `classifier` a Classifier, with `token` a TokenDiT.
    """
    if name not in ZOO:
        raise ValueError(f"no model {name!r}: choose one of {', '.join(ZOO)}")
    return from_config(ZOO[name] | options)


def from_config(config: dict) -> DiT:
    kinds = {"stages": StagedDiT, "classifier": Classifier, "token": TokenDiT}
    return next((kind for key, kind in kinds.items() if key in config), DiT)(**config)


def multiply_adds(net: DiT) -> int:
    """Multiply-adds of one forward pass of one image: what the DiT and SiT papers call flops. Runs on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode
    x, t = torch.empty(1, *net.state, device="meta"), torch.empty(1, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta").raw(x, t, y)
    return counter.get_total_flops() // 2


# --------------------------------------------------------------------------------------------------------------------
# 6. Reading checkpoints: ours, and the official DiT, SiT and AFM files
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


def load(path, ema: int = 1, kind: str = "", heads: int = 0) -> DiT:
    """A network in eval mode from our checkpoint or an official DiT, SiT, JiT or AFM file, in our time, as a velocity.

    ema: 1, the averaged weights where the file has both (JiT's first average of two, decay 0.9999); 2, JiT's second (0.9996);
    0, the last weights. Official files do not tell two things: `kind`, "dit" (noise prediction), "sit" (velocity) or "afm"
    (jumps), else guessed from the file's name; and `heads`, else known from the width.
    All sizes are read from the tensors. FileNotFoundError or ValueError say what is wrong with a file.
    """
    content = read_checkpoint(path)
    if ema == 2 and "model_ema2" not in content:
        raise ValueError(f"{path}: holds no second average of the weights, as JiT's files do: use --ema 1, or 0 for the last ones")
    if "networks" in content:
        config = content["networks"]["G"]["config"]
        weights = content["ema"] if ema else content["networks"]["G"]["weights"]
    else:
        weights = official_weights(content, path, ema)
        config = official_config(weights, path, kind, heads)
        own_time = any("projectors" in k for part in (content, content.get("ema", {})) for k in part)
        if kind_of(path, kind, weights) == "sit" and not own_time:  # REPA's and REG's, told by projectors, have our time
            weights = reverse_time(weights)
        if kind_of(path, kind, weights) == "jit":
            weights = turn_time(weights)  # it predicts the image: only its clock runs the other way
    try:
        net = from_config(config)
    except TypeError as error:
        raise ValueError(f"{path}: made by another version of triflow ({error})") from error
    load_weights(net, weights, path)
    return net.eval()


def discriminator_weights(path, turn: bool = True) -> dict:
    """Weights of the discriminator in a checkpoint of ours, or in an official file; turn: its time runs the other way,

    as in CAFM's files and not in AFM's.
    """
    content = read_checkpoint(path)
    if "networks" in content:
        if "D" not in content["networks"]:
            raise ValueError(f"{path}: a run without a discriminator; give one of --loss cafm or afm")
        return content["networks"]["D"]["weights"]
    weights = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    weights = {k.replace("proj_out.", "final_layer."): v for k, v in weights.items()}  # its name beside JiT
    if "dis_embed" not in weights and "in_context_posemb" not in weights:
        raise ValueError(f"{path}: not a CAFM or AFM discriminator: dis_embed is missing (its first entries: "
                         f"{', '.join(map(str, list(content)[:4]))})")
    return (turn_time(weights) if turn else weights) | {"gradient_square": torch.zeros(())}


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


def official_weights(content: dict, path, ema: int = 1) -> dict:
    """The flat dict of tensors inside an official file: unwrapped, prefixes of wrappers and REPA's projectors removed."""
    for key in (("model", "ema"), ("ema", "model_ema1", "model"), ("model_ema2",))[ema]:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k.removeprefix("module.").removeprefix("net."): v for k, v in content.items() if isinstance(v, Tensor)}
    weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    needed = ("pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "x_embedder.proj.weight")
    if "x_embedder.proj1.weight" in weights:
        needed = (*needed[:3], "x_embedder.proj2.weight", "blocks.0.attn.q_norm.weight", "in_context_posemb")
    missing = [k for k in needed if k not in weights]
    if missing:
        raise ValueError(f"{path}: not a DiT, SiT, JiT or AFM file: {missing[0]} is missing (its first entries: "
                         f"{', '.join(map(str, list(content)[:4]))})")
    return weights


def kind_of(path, kind: str = "", weights: dict | tuple = ()) -> str:
    """Which official code an official file is of: jit, or dit, sit or afm (whose own names say nfe, as in xl2_2nfe_...)."""
    if "x_embedder.proj1.weight" in weights:
        return "jit"
    if "cls_projectors2.weight" in weights:
        return "sit"
    name = os.path.basename(path).lower()
    told = {kind} if kind else set(re.findall(r"(?<![a-z])(dit|sit|afm)(?![a-z])", name.replace("nfe", "-afm-")))
    if told not in ({"dit"}, {"sit"}, {"afm"}):
        raise ValueError(f"{path}: DiT, SiT and AFM files look alike; rename it so that its name has one of them in it, "
                         f"such as SiT-{name}, or give model.load kind='dit', 'sit' or 'afm'")
    return told.pop()


def official_config(weights: dict, path, kind: str = "", heads: int = 0) -> dict:
    """The arguments of DiT that fit these tensors."""
    kind = kind_of(path, kind, weights)
    if kind == "jit":
        return _jit_config(weights)
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    if not heads and width not in HEADS:
        raise ValueError(f"{path}: a file does not tell its number of heads, and width {width} is not one of DiT's "
                         f"({', '.join(map(str, HEADS))}); give model.load heads=")
    out_channels = len(weights["final_layer.linear.weight"]) // patch ** 2
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    reg = "cls_projectors2.weight" in weights  # of a token beside those of the image
    config = dict(input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch, patch=patch, channels=channels,
                  width=width, depth=depth, heads=heads or HEADS[width], null_class=kind != "afm",
                  mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) / width,
                  num_classes=len(weights["y_embedder.embedding_table.weight"]) - (kind != "afm"),
                  learn_sigma=out_channels == 2 * channels, predict="eps" if kind == "dit" else "v")
    config |= dict(token=weights["cls_projectors2.weight"].shape[1]) if reg else {}
    return config | _afm_config(weights, path, depth) if kind == "afm" else config


def _jit_config(weights: dict) -> dict:
    """The arguments of DiT for a JiT file. It does not tell context_start: a third of the depth in all of JiT's presets."""
    bottleneck, channels, patch, _ = weights["x_embedder.proj1.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    width = len(weights["x_embedder.proj2.weight"])
    return JIT | dict(input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch, patch=patch, channels=channels,
                      width=width, depth=depth, bottleneck=bottleneck,
                      heads=width // len(weights["blocks.0.attn.q_norm.weight"]),
                      num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, context_start=depth // 3,
                      context=weights["in_context_posemb"].shape[1])


def _afm_config(weights: dict, path, depth: int) -> dict:
    """One jump without a time gives the image; a file whose name says N layers repeats its blocks, else it has jumps."""
    layers = re.search(r"(\d+)-?layer", os.path.basename(path).lower())
    repeats = int(layers[1]) // depth if layers else 0
    times = int("t_embedder.mlp.0.weight" in weights and not repeats)
    return dict(times=times, repeats=repeats, time_scale=1000.0, predict="v" if times else "x")


def tell_times(given: DiT, net: DiT) -> dict:
    """The weights of `given`, which is told t, for a net that is told no time, or (t, t - r).

    Without a time the function is the one at t = 1: the embedding of that moves into the label table. With two it is the
    same whatever r: jump_embedder starts with net's own weights, whose output is zero, and so does guide_embedder. A
    velocity head starts as a copy of the last blocks. Linear attention inherits everything but attention (LiT), and experts
    everything but the MLPs. Projectors are left behind, or start afresh.
    """
    weights, own = given.state_dict(), net.state_dict()
    fresh = [part for name, part in (("linear", ".attn."), ("experts", ".mlp.")) if net.config[name] and not given.config[name]]
    fresh += ["projectors."] if net.config["features"] != given.config["features"] else []
    for part in fresh:
        weights = {k: v for k, v in weights.items() if part not in k} | {k: v for k, v in own.items() if part in k}
    if given.times and not net.times and not net.repeats:
        weights = {k: v for k, v in weights.items() if not k.startswith("t_embedder.")}
        with torch.no_grad():
            at_noise = given.t_embedder(torch.full((1,), given.time_scale))
        weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"] + at_noise
    added = {k: v for k, v in own.items() if k.startswith(("jump_embedder.", "guide_embedder."))}
    fork = len(given.blocks) - net.head
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if net.head and part == "blocks" and int(rest.split(".")[0]) >= fork:
            added[f"head_blocks.{int(rest.split('.')[0]) - fork}.{rest.partition('.')[2]}"] = value
        if net.head and part == "final_layer":
            added[f"head_layer.{rest}"] = value
    return added | weights


def reverse_time(weights: dict) -> dict:
    """The weights of v(x, t) = -net(x, 1 - t), given those of net: SiT's data end (t = 1) becomes ours (t = 0), exactly."""
    weights = turn_time(weights)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[key] = -weights[key]
    return weights


def turn_time(weights: dict) -> dict:
    """The weights of net(x, 1 - t), given those of net: all of it happens in the first layer of the time embedding,

    because cos(f (1-t)) = cos f cos(f t) + sin f sin(f t), and sin(f (1-t)) = sin f cos(f t) - cos f sin(f t).
    """
    first = weights["t_embedder.mlp.0.weight"]
    W_cos, W_sin = first.double().chunk(2, 1)
    cos_f, sin_f = sinusoid(torch.ones(1, dtype=torch.float64), first.shape[1]).chunk(2, 1)
    rotated = torch.cat([W_cos * cos_f + W_sin * sin_f, W_cos * sin_f - W_sin * cos_f], 1)
    return weights | {"t_embedder.mlp.0.weight": rotated.to(first.dtype)}


# --------------------------------------------------------------------------------------------------------------------
# 7. Run alone: the zoo, and the attention checked and timed
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    model: str = data.option("", "measure the routes on this network of the zoo; empty: width 384, 3 layers, 4 sizes")
    batch: int = data.option(2, "its batch size")
    amp: str = data.option("off", "bfloat16 autocast around its network", ("off", "bf16"))
    rounds: int = data.option(3, "rounds that a median is taken of")


def print_zoo() -> None:
    print(f"{'model':>10} {'parameters':>12} {'GFLOPs':>8}   (multiply-adds of one forward pass of one image)")
    for name in ZOO:
        with torch.device("meta"):
            net = create(name)
        print(f"{name:>10} {sum(p.numel() for p in net.parameters()) / 1e6:>11.2f}M {multiply_adds(net) / 1e9:>8.2f}")


def in_turn(calls: dict, rounds: int, device: str) -> dict:
    """Median seconds of each call (name -> function), all called in turn in each round; the first round does not count."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: np.median(values[1:]) for name, values in times.items()}


def peak_megabytes(call, device: str) -> float:
    """MB that `call` needs on top of what there is: CUDA's count, or Linux's peak resident size (elsewhere: nan)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or the pages that glibc keeps would hide what a call needs
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # set the peak back to the present size

    def kilobytes(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


def kept_bytes(call) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of what `call` returns."""
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    del result
    return sum(kept.values())


def attention_derivatives(body: str, q, k, v, dq, dk, dv, G, U) -> dict:
    """All that one can ask of an attention body: name -> tensors. dq, dk, dv, U have a leading axis of T tangents.

    The value; its gradients along G; its T tangents; the gradients of sum(U * tangents) with respect to q, k, v and the
    tangents' inputs; and the double backward, gradients of <gradients, first tangents' inputs> with respect to q, k, v, G.
    """
    inputs, tangents = ([x.detach().requires_grad_() for x in part] for part in ((q, k, v), (dq, dk, dv)))
    G = G.detach().requires_grad_(body != "fused")
    with attention_body(body):
        O = attention(*inputs)
        gradient = torch.autograd.grad(O, inputs, G, create_graph=body != "fused")
        if body == "fused":
            return {"value": [O], "gradient": gradient}
        dO = torch.func.vmap(lambda *w: torch.func.jvp(attention, tuple(inputs), w)[1])(*tangents)
        through_tangent = torch.autograd.grad((U * dO).sum(), inputs + tangents)
        double = torch.autograd.grad(gradient, inputs + [G], [x[0] for x in tangents])
    return {"value": [O], "gradient": gradient, "tangent": [dO], "gradient of tangent": through_tangent,
            "double backward": double}


def largest_error(found: dict, exact: dict) -> float:
    """Of all tensors, the largest |found - exact| / |exact|, norms over the tensor."""
    return torch.stack([(a - b).norm() / b.norm() for name in found for a, b in zip(found[name], exact[name])]).max().item()


def attention_tasks(body: str, q, k, v, G) -> dict:
    """What the table times: name -> call, or None where the body cannot."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    dq = torch.stack([q, v])

    def backward():
        torch.autograd.grad(attention(*inputs), inputs, G)

    @torch.no_grad()
    def tangent():
        torch.func.jvp(attention, (q, k, v), (k, v, q))

    def through_tangents():
        dO = torch.func.vmap(lambda w: torch.func.jvp(attention, tuple(inputs), (w, w, w))[1])(dq)
        torch.autograd.grad(dO.sum(), inputs)

    def gradients():
        return torch.autograd.grad(attention(*inputs), inputs, G, create_graph=True)

    def double_backward():
        torch.autograd.grad(gradients(), inputs, [G, G, G])

    def by(call):
        def with_body():
            with attention_body(body):
                return call()
        return with_body

    derivative = (tangent, through_tangents, double_backward, gradients)
    return {call.__name__: None if body == "fused" and call in derivative else by(call) for call in (backward, *derivative)}


def compare_attention(device: str, rounds: int) -> None:
    """Each body's errors, times and kept memory at several numbers of tokens."""
    bodies = [name for name in BODIES if name != "triton" or (triton and device == "cuda")]
    print(f"\nattention on {device}, (B, H, N, d) float32. error: largest of value, gradients, tangents, gradients of "
          f"tangents and double\nbackward, relative to float64. Times as multiples of fused forward + backward (median of "
          f"{rounds} rounds, all in turn).\nkept: MB that autograd holds for the double backward.")
    print(f"{'shape':>16} {'body':>10} {'error':>8} {'forward +':>10} {'1 tangent,':>11} {'2 tangents':>11} {'double':>9} "
          f"{'kept':>7}\n{'':>16} {'':>10} {'':>8} {'backward':>10} {'no graph':>11} {'+ backward':>11} {'backward':>9} {'MB':>7}")
    for shape in ((16, 4, 16, 32), (8, 6, 64, 64), (4, 6, 257, 72), (1, 6, 1024, 64)):
        q, k, v, G = torch.randn(4, *shape, device=device).unbind()
        tangents = torch.randn(4, 2, *shape, device=device)
        exact = attention_derivatives("plain", *(x.double() for x in (q, k, v, *tangents[:3], G, tangents[3])))
        tasks = {body: attention_tasks(body, q, k, v, G) for body in bodies}
        times = in_turn({(body, name): call for body in bodies for name, call in tasks[body].items()
                         if call and name != "gradients"}, rounds, device)
        for body in bodies:
            error = largest_error(attention_derivatives(body, q, k, v, *tangents[:3], G, tangents[3]), exact)
            ratios = [times.get((body, name), math.nan) / times["fused", "backward"]
                      for name in ("backward", "tangent", "through_tangents", "double_backward")]
            kept = kept_bytes(tasks[body]["gradients"]) / 1e6 if body != "fused" else math.nan
            cells = [f"{r:.2f}" if r == r else "-" for r in ratios] + [f"{kept:.1f}" if kept == kept else "-"]
            print(f"{str(shape):>16} {body:>10} {error:>8.0e} {cells[0]:>10} {cells[1]:>11} {cells[2]:>11} {cells[3]:>9} "
                  f"{cells[4]:>7}")


def derivative_steps(G: DiT, D: Discriminator, x_t, t, y, v, u) -> dict:
    """name -> one step of training, up to its gradients: flow matching, and the losses on derivatives by each route."""
    def flow_matching():
        (G(x_t, t, y) - v).square().mean().backward()

    def discriminator(route, body):
        out, (real, fake) = directional_derivatives(D, x_t, t, y, torch.stack([v, u]), route, body)
        ((real - 1).square().mean() + (fake + 1).square().mean() + 1e-3 * out.square().mean()).backward()

    def generator():
        w = u.detach().requires_grad_()
        _, gradient, slope = input_gradient(D, x_t, t, y, create_graph=False)
        (along(gradient, slope, w) - 1).square().mean().backward()

    def generator_forward_mode():
        w = u.detach().requires_grad_()
        D.requires_grad_(False)
        with attention_body("plain"):
            J = torch.func.jvp(lambda x_t, t: D(x_t, t, y), (x_t, t), (w, torch.ones_like(t)))[1]
        (J - 1).square().mean().backward()
        D.requires_grad_(True).pos_embed.requires_grad_(False)

    def mean_flow():
        _, du = time_derivative(G, x_t, t, y, v)
        (G(x_t, t, y) - (v - t.view(-1, 1, 1, 1) * du)).square().mean().backward()

    return {"flow matching": flow_matching,
            "D step: double backward, plain": lambda: discriminator("reverse", "plain"),
            "D step: double backward, recompute": lambda: discriminator("reverse", "recompute"),
            "D step: 2 forward tangents, plain": lambda: discriminator("forward", "plain"),
            "D step: 2 forward tangents, recompute": lambda: discriminator("forward", "recompute"),
            "G step through D: input gradient, fused": generator,
            "G step through D: forward tangent, plain": generator_forward_mode,
            "time derivative, then flow matching": mean_flow}


def compare_routes(cfg: Config, device: str, size: int, batch: int) -> None:
    """Time of each route as a multiple of a flow-matching step of the same network and batch, and peak memory."""
    options = dict(ZOO[cfg.model]) if cfg.model else dict(width=384, depth=3, heads=6, input_size=size)
    torch.manual_seed(0)
    G, D = DiT(**options).to(device), Discriminator(**options).to(device)
    for p in (*G.parameters(), *D.parameters()):
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)  # adaLN-zero's zeros would hide nothing from the clock, but look odd
    G.amp = D.amp = torch.bfloat16 if cfg.amp == "bf16" else None
    x_t, v, u = torch.randn(3, batch, *G.shape, device=device).unbind()
    t, y = torch.rand(batch, device=device), torch.randint(0, G.num_classes, (batch,), device=device)

    def alone(step):
        def run():
            for p in (*G.parameters(), *D.parameters()):
                p.grad = None
            step()
        return run

    steps = {name: alone(step) for name, step in derivative_steps(G, D, x_t, t, y, v, u).items()}
    times = in_turn(steps, cfg.rounds, device)
    print(f"\n{cfg.model or 'width 384, 3 layers'}, {G.pos_embed.shape[1]} tokens, batch {batch}, network in "
          f"{'bfloat16' if G.amp else 'float32'}; flow-matching step {times['flow matching']:.3f} s")
    for name, step in steps.items():
        print(f"{name:>42} {times[name] / times['flow matching']:>7.2f} x {peak_megabytes(step, device):>8.0f} MB")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Print the zoo; check and time the attention bodies and the derivative routes.")
    if cfg.model and cfg.model not in ZOO:
        raise ValueError(f"no model {cfg.model!r}: choose one of {', '.join(ZOO)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not cfg.model:
        print_zoo()
        compare_attention(device, cfg.rounds)
    print(f"\nderivative routes on {device}, torch {torch.__version__}: time as a multiple of a flow-matching step (median of "
          f"{cfg.rounds} rounds, all in turn),\npeak memory of the step. D step: CAFM's loss on two directions, without "
          f"making u; G step: the part through D only.")
    for size, batch in [(0, cfg.batch)] if cfg.model else [(8, 4), (16, 4), (32, 2), (64, 1)]:
        compare_routes(cfg, device, size, batch)


if __name__ == "__main__":
    data.run_cli(main)
