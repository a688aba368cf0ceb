"""Part of `python -m extras.benchmark`: times and saved memory of attention alone, by each backend.

Times are multiples of the forward pass of torch's fused attention, and, "/ plain", of plain attention's time
for the same; all of these interleaved. `python -m extras.attention` prints this part; benchmark_checks.py has
the errors.

    forward       without a graph
    backward      forward + backward
    1 tangent     the forward-mode derivative along one direction, without a graph
    2 tangents    along two, and the gradient of a loss on them
    double        the gradient of a loss on gradients
    saved MB      that autograd holds for it
"""
import sys

import torch

import data
import model
from extras import attention
from extras.benchmark_tools import Item, in_turn, saved_bytes

SIZES = {  # dtype, shapes (B, H, N, d)
    "tiny": (torch.float32, [(1, 2, 16, 8)]),
    "small": (torch.float32, [(8, 6, 64, 64), (4, 6, 257, 72), (1, 6, 1024, 64)]),
    "full": (torch.bfloat16, [(16384 // N, 16, N, d) for N in (256, 1024, 4096) for d in (64, 72)])}


def backends(device: torch.device) -> list[str]:
    """Those that run on this device."""
    kernels = ["triton"] if attention.triton and device.type == "cuda" else []
    return ["fused", "plain", "closed_form", *kernels]


def items(size: str, device: torch.device) -> list[Item]:
    dtype, shapes = SIZES[size]
    return [Item(f"(B, H, N, d) = {shape}, {str(dtype)[6:]}: {backend}",
                 lambda args=(backend, shape, dtype): costs(*args, device))
            for shape in shapes for backend in backends(device)]


def costs(backend: str, shape: tuple, dtype: torch.dtype, device: torch.device) -> dict:
    """Times of a backend in fused forward passes and in plain attention's times, and MB saved."""
    q, k, v, G = torch.randn(4, *shape, device=device, dtype=dtype).unbind()
    own, plain = tasks(backend, q, k, v, G), tasks("plain", q, k, v, G)
    calls = {"unit": tasks("fused", q, k, v, G)["forward"]}
    calls |= {("own", name): own[name] for name in own}
    calls |= {("plain", name): plain[name] for name in own if backend not in ("fused", "plain")}
    repeated = {name: lambda call=call: [call() for _ in range(5)] and None for name, call in calls.items()}
    seconds = in_turn(repeated, 3, device.type)
    figures = {}
    for name in own:
        figures[name] = seconds["own", name] / seconds["unit"]
        if ("plain", name) in seconds:
            figures[f"{name} / plain"] = seconds["own", name] / seconds["plain", name]
    saved = {"saved MB": saved_bytes(gradients(backend, q, k, v, G)) / 1e6} if backend != "fused" else {}
    return figures | saved | {"fused forward ms": 200 * seconds["unit"]}


def derivatives(backend: str, q, k, v, dq, dk, dv, G, U) -> dict:
    """All that can be asked of a backend: name -> tensors. dq, dk, dv, U have a leading axis of T tangents.

    The value; its gradients along G; its T tangents; the gradients of sum(U * tangents) with respect to q, k,
    v, dq, dk, dv; and the double backward: of <gradients, (dq, dk, dv)[0]> with respect to q, k, v, G.
    """
    inputs, tangents = ([x.detach().requires_grad_() for x in part] for part in ((q, k, v), (dq, dk, dv)))
    G = G.detach().requires_grad_(backend != "fused")
    with model.attention_backend(backend):
        O = model.attention(*inputs)
        gradient = torch.autograd.grad(O, inputs, G, create_graph=backend != "fused")
        if backend == "fused":
            return {"value": [O], "gradient": gradient}
        dO = torch.func.vmap(lambda *w: torch.func.jvp(model.attention, tuple(inputs), w)[1])(*tangents)
        through_tangent = torch.autograd.grad((U * dO).sum(), inputs + tangents)
        double = torch.autograd.grad(gradient, inputs + [G], [x[0] for x in tangents])
    return {"value": [O], "gradient": gradient, "tangent": [dO], "gradient of tangent": through_tangent,
            "double backward": double}


def largest_error(found: dict, exact: dict) -> float:
    """Of all tensors, the largest |found - exact| / |exact|, norms over the tensor."""
    pairs = [(a, b) for name in found for a, b in zip(found[name], exact[name])]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def by_backend(backend: str, call):
    def run():
        with model.attention_backend(backend):
            return call()
    return run


def gradients(backend: str, q, k, v, G):
    """A function without arguments that gives attention's gradients, with a graph."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return by_backend(backend, lambda: torch.autograd.grad(
        model.attention(*inputs), inputs, G, create_graph=True))


def tasks(backend: str, q, k, v, G) -> dict:
    """What is timed: name -> function without arguments. The fused backend has only the first two."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    two = torch.stack([q, v])

    @torch.no_grad()
    def forward():
        model.attention(q, k, v)

    def backward():
        torch.autograd.grad(model.attention(*inputs), inputs, G)

    @torch.no_grad()
    def tangent():
        torch.func.jvp(model.attention, (q, k, v), (k, v, q))

    def through_tangents():
        dO = torch.func.vmap(lambda w: torch.func.jvp(model.attention, tuple(inputs), (w, w, w))[1])(two)
        torch.autograd.grad(dO.sum(), inputs)

    def double_backward():
        first = torch.autograd.grad(model.attention(*inputs), inputs, G, create_graph=True)
        torch.autograd.grad(first, inputs, [G, G, G])

    calls = {"forward": forward, "backward": backward, "1 tangent": tangent, "2 tangents": through_tangents,
             "double": double_backward}
    known = list(calls)[:2 if backend == "fused" else 5]
    return {name: by_backend(backend, calls[name]) for name in known}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    data.extra("benchmark", "attention's times").main(["--only", "attention", *argv])


if __name__ == "__main__":
    data.run_cli(main)
