"""Attention whose derivatives are closed forms: in torch, and as Triton kernels.

softmax(q k' / sqrt(d)) v by four backends with one result. What autograd can do with each, and what it saves:

    backend      backward  forward  backward through  double    saved for backward    use
                           mode     the tangents      backward
    fused        yes       error    error             error     q, k, v, O            training, sampling
    plain        yes       yes      yes               yes       (N, M) arrays         derivatives, few tokens
    closed_form  yes       yes      yes               yes       q, k, v, O, tangents  derivatives, many tokens
    triton       yes       yes      yes               yes       the same              the same, on CUDA

The first two are the core's. Importing this file adds the others to `model.ATTENTION`; nothing selects them
unasked: `with model.attention_backend("closed_form"): ...`, or `backend=` of the core's derivatives.

`plain` is the fastest up to some 500 tokens. All of them are right to 1e-10 in float64, 1e-5 in float32, the
kernels to 1e-5 in Triton's interpreter, and they compile for an H100. On a GPU: not checked yet.

`python -m extras.attention` prints times and saved memory of each backend (attention_table.py).
Shapes in comments: B batch, H heads, N queries, M keys, d head size, T tangents.
"""
import math
import os
import types

import torch
from torch import Tensor

import data
import model

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with CUDA builds of torch, and only the backend 'triton' needs it
    triton = None

QUERIES = 256  # rows of the (N, M) arrays that exist at once in the torch version


def attention_closed_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the formulas below, a block of queries at a time: no (N, M) array is saved."""
    return attend(TORCH, q, k, v)


def attention_triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as Triton kernels: bfloat16, float16 and float32; on a GPU, or in Triton's interpreter."""
    check_triton(q)
    return attend(TRITON, q, k, v)


def attend(kernels, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attend` without tangents (T = 0). Its forward-mode rule brings them in where they are asked for."""
    if torch.compiler.is_compiling():  # pytorch issue 192985
        raise RuntimeError("the backends 'closed_form' and 'triton' have derivatives that torch.compile "
                           "can get wrong without an error: compile with backend 'fused' or 'plain'")
    return Attend.apply(kernels, q, k, v, *(x.new_empty(0, *x.shape) for x in (q, k, v)))[0]


# ---- 1. The formulas ----


def pair_forward(q, k, v, dq, dk, dv):
    """O = attention(q, k, v) (B, H, N, d), its tangents dO (T, B, H, N, d) along dq, dk, dv (T, B, H, ., d).

    With s = 1 / sqrt(d):

        S  = s q k'               P  = softmax(S)                O  = P v
        dS = s (dq k' + q dk')    dP = P * (dS - rowsum(P*dS))   dO = dP v + P dv

    Matrix products in the dtype of q, everything between them in float32 or wider.
    """
    s, wide = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    blocks = []
    for q, dq in zip(q.split(QUERIES, -2), dq.split(QUERIES, -2)):
        P = (s * (q @ k.mT).to(wide)).softmax(-1)                                    # (B, H, QUERIES, M)
        dS = s * (dq @ k.mT + q @ dk.mT).to(wide)                                    # (T, B, H, QUERIES, M)
        dP = P * (dS - (P * dS).sum(-1, keepdim=True))
        P, dP = P.to(v.dtype), dP.to(v.dtype)
        blocks.append((P @ v, dP @ v + P @ dv))
    return tuple(torch.cat(parts, -2) for parts in zip(*blocks))


def pair_backward(q, k, v, dq, dk, dv, O, dO, G, U):
    """Gradients of sum(G*O) + sum(U*dO) with respect to q, k, v, dq, dk, dv; G like O, U like dO.

    With S, P, dS of `pair_forward`, W = dS - rowsum(P*dS), sums over tangents, and two numbers a row:

        xbar = rowsum(U*O)          gdS = P * (U v' - xbar)
        D    = rowsum(G*O + U*dO)   gS  = P * (G v' + U dv' - D) + gdS * W

        gq  = s (gS k + gdS dk)     gk  = s (gS' q + gdS' dq)     gv  = P' G + (P*W)' U
        gdq = s gdS k               gdk = s gdS' q                gdv = P' U

    Softmax has the symmetric Jacobian J = diag(P) - P P', so gdS = J (U v'), where rowsum(P * U v') = xbar.
    In gS the terms with rowsum(P*dS) of the softmax correction cancel, which leaves D.
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
    """xbar = rowsum(U*O) (T, B, H, N, 1), and D = rowsum(G*O) + sum over T of rowsum(U*dO) (B, H, N, 1)."""
    wide = torch.promote_types(O.dtype, torch.float32)
    O, dO, G, U = O.to(wide), dO.to(wide), G.to(wide), U.to(wide)
    xbar = (U * O).sum(-1, keepdim=True)
    return xbar, (G * O).sum(-1, keepdim=True) + (U * dO).sum((0, -1))[..., None]


# ---- 2. As autograd functions ----


class Attend(torch.autograd.Function):
    """(kernels, q, k, v, dq, dk, dv) -> O, dO and the row statistics that the kernels' backward pass needs.

    `kernels` are TORCH or TRITON. With T = 0 this is attention, whose forward-mode derivative is Attend with
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
            raise NotImplementedError("attention has one forward-mode derivative: take the other in reverse")
        dO = Attend.apply(ctx.kernels, q, k, v, dq[None], dk[None], dv[None])[1]
        return dO[0], none, *ctx.statistics * [None]

    @staticmethod
    def vmap(info, in_dims, kernels, *tensors):
        """A mapped axis V of tangents alone joins T, and q, k, v are shared; any other joins the batch B."""
        V, shared = info.batch_size, in_dims[1:4] == (None, None, None)
        q, k, v, *tangents = (x.expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
                              for x, dim in zip(tensors, in_dims[1:]))           # (V, B, ...), (V, T, B, ...)
        if shared:
            out = Attend.apply(kernels, *tensors[:3], *(x.flatten(0, 1) for x in tangents))
            is_tangent = [x.dim() == out[1].dim() for x in out]
            split = (x.unflatten(0, (V, -1)) if yes else x for x, yes in zip(out, is_tangent))
            return tuple(split), tuple(0 if yes else None for yes in is_tangent)
        primal = (x.flatten(0, 1) for x in (q, k, v))
        out = Attend.apply(kernels, *primal, *(x.transpose(0, 1).flatten(1, 2) for x in tangents))
        axes = tuple(x.dim() - out[0].dim() for x in out)                        # where V is: 0, or 1 after T
        return tuple(x.unflatten(axis, (V, q.shape[1])) for x, axis in zip(out, axes)), axes


class AttendBackward(torch.autograd.Function):
    """Attend's backward pass as a function of its own, so that it has a backward pass too: double backward.

    Along (a, b, c) at its outputs gq, gk, gv the sum <a, gq> + <b, gk> + <c, gv> is <G, dO> with attention's
    tangent dO along (a, b, c). So dO is the gradient with respect to G, and those with respect to q, k, v are
    Attend's own backward pass with U = G. Nothing new is needed, and a third derivative is an error.
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
            raise NotImplementedError("attention is differentiable twice, not a third time: use 'plain'")
        primal, tangents = (q, k, v), (a[None], b[None], c[None])
        O, dO, *statistics = Attend.apply(ctx.kernels, *primal, *tangents)
        gq, gk, gv, *_ = AttendBackward.apply(ctx.kernels, *primal, *tangents, O, dO, *statistics,
                                              torch.zeros_like(G), G[None])
        return None, gq, gk, gv, None, *ctx.others * [None], dO[0], None


# forward(q, k, v, dq, dk, dv) -> (O, dO, *statistics)
# backward(the same six, O, dO, *statistics, G, U) -> gq, gk, gv, gdq, gdk, gdv
TORCH = types.SimpleNamespace(forward=pair_forward, backward=pair_backward)


# ---- 3. As Triton kernels ----
#
# One program computes one tile of rows and walks over the tiles of the other axis, so no (N, M) array exists.
# Tensors are (B H, N, d), contiguous; the axis d is padded to WIDTH, a power of two. The row statistics with
# which backward computes P and W again, tile by tile, are lse = logsumexp(S) and mu = rowsum(P*dS).

if triton:
    @triton.jit
    def read_tile(pointer, start, length, d, TILE: tl.constexpr, WIDTH: tl.constexpr):
        """Rows start .. start + TILE of a (length, d) matrix, then zeros. For a vector d = WIDTH = 1."""
        row, column = start + tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
        return tl.load(pointer + row * d + column, (row < length) & (column < d), 0.0)

    @triton.jit
    def read_pair(a, b, start, length, d, TILE: tl.constexpr, WIDTH: tl.constexpr):
        """The same rows of two matrices."""
        return read_tile(a, start, length, d, TILE, WIDTH), read_tile(b, start, length, d, TILE, WIDTH)

    @triton.jit
    def write_tile(pointer, value, start, length, d, TILE: tl.constexpr, WIDTH: tl.constexpr):
        row, column = start + tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (row < length) & (column < d)
        tl.store(pointer + row * d + column, value.to(pointer.dtype.element_ty), inside)

    @triton.jit
    def mm(a, b, EXACT: tl.constexpr):
        """a b with float32 sums; float32 factors as three TF32 terms if EXACT (almost float32), else one."""
        return tl.dot(a, b, input_precision="tf32x3" if EXACT else "tf32")

    @triton.jit
    def forward_kernel(q, k, v, dq, dk, dv, O, dO, lse, mu, N, M, d, s, TANGENT: tl.constexpr,
                       TILE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
        """O, lse, and with a TANGENT dO, mu of one tile of queries: softmax by a running maximum m.

        l, A, R, B: sums over keys of e, e v, e dS and e dS v + e dv, e = exp(S - m), rescaled when m grows.
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
            K, V = read_pair(k + columns, v + columns, key, M, d, TILE, WIDTH)
            inside = (key + tl.arange(0, TILE) < M)[None, :]
            S = tl.where(inside, s * mm(Q, tl.trans(K), EXACT), float("-inf"))
            higher = tl.maximum(m, tl.max(S, 1, keep_dims=True))
            rescale, e = tl.exp(m - higher), tl.exp(S - higher)
            m = higher
            l = rescale * l + tl.sum(e, 1, keep_dims=True)
            A = rescale * A + mm(e.to(V.dtype), V, EXACT)
            if TANGENT:
                dK, dV = read_pair(dk + columns, dv + columns, key, M, d, TILE, WIDTH)
                E = e * s * (mm(dQ, tl.trans(K), EXACT) + mm(Q, tl.trans(dK), EXACT))
                R = rescale * R + tl.sum(E, 1, keep_dims=True)
                B = rescale * B + mm(E.to(V.dtype), V, EXACT) + mm(e.to(V.dtype), dV, EXACT)
        write_tile(O + rows, A / l, start, N, d, TILE, WIDTH)
        write_tile(lse + head * N, m + tl.log(l), start, N, 1, TILE, 1)
        if TANGENT:
            write_tile(dO + rows, B / l - R / l * (A / l), start, N, d, TILE, WIDTH)
            write_tile(mu + head * N, R / l, start, N, 1, TILE, 1)

    @triton.jit
    def pair_tile(Q, K, V, dQ, dK, dV, G, U, lse, mu, xbar, D, row, key, N, M, s, TANGENT: tl.constexpr,
                  TILE: tl.constexpr, EXACT: tl.constexpr):
        """P, P*W, s gS, s gdS of `pair_backward` for a tile of queries and one of keys, in the dtype of Q."""
        inside = (row + tl.arange(0, TILE) < N)[:, None] & (key + tl.arange(0, TILE) < M)[None, :]
        lse_, D_ = read_pair(lse, D, row, N, 1, TILE, 1)
        P = tl.where(inside, tl.exp(s * mm(Q, tl.trans(K), EXACT) - lse_), 0.0)
        gS = P * (mm(G, tl.trans(V), EXACT) - D_)
        PW, gdS = P, P
        if TANGENT:
            mu_, xbar_ = read_pair(mu, xbar, row, N, 1, TILE, 1)
            W = s * (mm(dQ, tl.trans(K), EXACT) + mm(Q, tl.trans(dK), EXACT)) - mu_
            PW, gdS = P * W, P * (mm(U, tl.trans(V), EXACT) - xbar_)
            gS += P * mm(U, tl.trans(dV), EXACT) + gdS * W
        return P.to(Q.dtype), PW.to(Q.dtype), (s * gS).to(Q.dtype), (s * gdS).to(Q.dtype)

    @triton.jit
    def backward_kernel(q, k, v, dq, dk, dv, G, U, lse, mu, xbar, D, gq, gk, gv, gdq, gdk, gdv, N, M, d, s,
                        QUERIES_SIDE: tl.constexpr, TANGENT: tl.constexpr, TILE: tl.constexpr,
                        WIDTH: tl.constexpr, EXACT: tl.constexpr):
        """gq, gdq of a tile of queries, over all keys, or gk, gv, gdk, gdv of one of keys, over queries."""
        head, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE
        rows, columns, numbers = head * N * d, head * M * d, head * N
        first, second = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        third, fourth = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        for other in range(0, M if QUERIES_SIDE else N, TILE):
            row = own if QUERIES_SIDE else other
            key = other if QUERIES_SIDE else own
            Q, g = read_pair(q + rows, G + rows, row, N, d, TILE, WIDTH)
            K, V = read_pair(k + columns, v + columns, key, M, d, TILE, WIDTH)
            dQ, u, dK, dV = Q, g, K, V
            if TANGENT:
                dQ, u = read_pair(dq + rows, U + rows, row, N, d, TILE, WIDTH)
                dK, dV = read_pair(dk + columns, dv + columns, key, M, d, TILE, WIDTH)
            P, PW, gS, gdS = pair_tile(Q, K, V, dQ, dK, dV, g, u, lse + numbers, mu + numbers, xbar + numbers,
                                       D + numbers, row, key, N, M, s, TANGENT, TILE, EXACT)
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
        raise ValueError("attention backend 'triton' needs Triton, which CUDA builds of torch bring along "
                         "(elsewhere: pip install triton); backend 'closed_form' does the same everywhere")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"attention backend 'triton' runs on a GPU, not {q.device}: use 'closed_form', or "
                         f"start Python with TRITON_INTERPRET=1 to watch the kernels run, slowly")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention backend 'triton' has float32 sums, not {q.dtype}: use 'closed_form'")


def launch_options(q: Tensor) -> dict:
    """Tiles whose sums stay in the registers of an H100 (float32 beyond d = 64 does not fit)."""
    tile, width = 16 if q.dtype == torch.float32 else 32, max(16, triton.next_power_of_2(q.shape[-1]))
    exact, warps = not torch.backends.cuda.matmul.allow_tf32, 4 if width <= 64 else 8
    return dict(TILE=tile, WIDTH=width, EXACT=exact, num_warps=warps, num_stages=2)


def triton_forward(q, k, v, dq, dk, dv):
    """`pair_forward` by forward_kernel, one launch a tangent: (O, dO, lse, mu)."""
    (B, H, N, d), M, T, options = q.shape, k.shape[-2], len(dq), launch_options(q)
    q, k, v, dq, dk, dv = (x.contiguous() for x in (q, k, v, dq, dk, dv))
    O, dO = torch.empty_like(q), torch.empty_like(dq)
    lse, mu = (q.new_empty(*shape, B, H, N, 1, dtype=torch.float32) for shape in ((), (T,)))
    tangents = zip(dq, dk, dv, dO, mu) if T else [(q, k, v, O, lse)]  # the kernel does not look at the latter
    for dq_, dk_, dv_, dO_, mu_ in tangents:
        forward_kernel[triton.cdiv(N, options["TILE"]), B * H](
            q, k, v, dq_, dk_, dv_, O, dO_, lse, mu_, N, M, d, 1 / math.sqrt(d), TANGENT=T > 0, **options)
    return O, dO, lse, mu


def triton_backward(q, k, v, dq, dk, dv, O, dO, lse, mu, G, U):
    """`pair_backward` by backward_kernel: two launches a tangent, G going with the first tangent."""
    (B, H, N, d), M, T, options = q.shape, k.shape[-2], len(dq), launch_options(q)
    xbar, D = row_sums(O, dO, G, U)
    q, k, v, dq, dk, dv, G, U, xbar, D = (x.contiguous() for x in (q, k, v, dq, dk, dv, G, U, xbar, D))
    gdq, gdk, gdv = torch.empty_like(dq), torch.empty_like(dk), torch.empty_like(dv)
    sums = []
    for i in range(max(T, 1)):
        if T > 1:  # D is linear in (G, U): each launch takes its own part
            D = row_sums(O, dO[i:i + 1], G, U[i:i + 1])[1]
        dq_, dk_, dv_, U_, mu_, xbar_, gdq_, gdk_, gdv_ = (
            (x[i] for x in (dq, dk, dv, U, mu, xbar, gdq, gdk, gdv)) if T else (q, k, v, G, lse, D, q, k, v))
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for length, queries_side in ((N, True), (M, False)):
            backward_kernel[triton.cdiv(length, options["TILE"]), B * H](
                q, k, v, dq_, dk_, dv_, G, U_, lse, mu_, xbar_, D, gq, gk, gv, gdq_, gdk_, gdv_, N, M, d,
                1 / math.sqrt(d), QUERIES_SIDE=queries_side, TANGENT=T > 0, **options)
        sums.append((gq, gk, gv))
        G = torch.zeros_like(G)
    return *(sum(parts) for parts in zip(*sums)), gdq, gdk, gdv


TRITON = types.SimpleNamespace(forward=triton_forward, backward=triton_backward)
model.ATTENTION |= {"closed_form": attention_closed_form, "triton": attention_triton}

if __name__ == "__main__":
    data.run_cli(data.extra("attention_table", "the table of times").main)
