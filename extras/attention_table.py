"""Errors, times and saved memory of each attention backend: `python -m extras.attention`.

The error is the largest of the value, its gradients, two tangents, the gradients of a loss on these and the
double backward, each relative to plain attention in float64. Times are multiples of fused forward + backward:

    backward      forward + backward
    1 tangent     the forward-mode derivative along one direction, without a graph
    2 tangents    along two, and the gradient of a loss on them
    double        the gradient of a loss on gradients
    saved         MB that autograd holds for it
"""
import dataclasses

import torch

import data
import model
from data import option
from extras import attention
from extras.benchmark import in_turn, saved_bytes

SHAPES = (16, 4, 16, 32), (8, 6, 64, 64), (4, 6, 257, 72), (1, 6, 1024, 64)  # (B, H, N, d)


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


def tasks(backend: str, q, k, v, G) -> dict:
    """What is timed: name -> function without arguments. The fused backend has only the first."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    two = torch.stack([q, v])

    def backward():
        torch.autograd.grad(model.attention(*inputs), inputs, G)

    @torch.no_grad()
    def tangent():
        torch.func.jvp(model.attention, (q, k, v), (k, v, q))

    def through_tangents():
        dO = torch.func.vmap(lambda w: torch.func.jvp(model.attention, tuple(inputs), (w, w, w))[1])(two)
        torch.autograd.grad(dO.sum(), inputs)

    def gradients():
        return torch.autograd.grad(model.attention(*inputs), inputs, G, create_graph=True)

    def double_backward():
        torch.autograd.grad(gradients(), inputs, [G, G, G])

    def by_backend(call):
        def run():
            with model.attention_backend(backend):
                return call()
        return run

    others = () if backend == "fused" else (tangent, through_tangents, double_backward, gradients)
    return {call.__name__: by_backend(call) for call in (backward, *others)}


def print_table(device: str = "cpu", rounds: int = 3, shapes: tuple = SHAPES) -> None:
    """Each backend's error, times and saved memory, for several numbers of tokens."""
    kernels = ["triton"] if attention.triton and device == "cuda" else []
    backends = ["fused", "plain", "closed_form", *kernels]
    print(f"\nattention on {device}, (B, H, N, d) float32; times in fused forward + backward, median of "
          f"{rounds} interleaved rounds")
    print(f"{'shape':>16} {'backend':>12} {'error':>8} {'backward':>10} {'1 tangent':>10} {'2 tangents':>10} "
          f"{'double':>10} {'saved':>10}")
    for shape in shapes:
        q, k, v, G = torch.randn(4, *shape, device=device).unbind()
        dq, dk, dv, U = torch.randn(4, 2, *shape, device=device).unbind()
        inputs = q, k, v, dq, dk, dv, G, U
        exact = derivatives("plain", *(x.double() for x in inputs))
        calls = {backend: tasks(backend, q, k, v, G) for backend in backends}
        gradients = {backend: calls[backend].pop("gradients") for backend in backends[1:]}
        timed = {(backend, name): call for backend in backends for name, call in calls[backend].items()}
        times = in_turn(timed, rounds, device)
        for backend in backends:
            error = largest_error(derivatives(backend, *inputs), exact)
            cells = [f"{times[backend, name] / times['fused', 'backward']:.2f}" for name in calls[backend]]
            cells += [f"{saved_bytes(gradients[backend]) / 1e6:.1f}"] if backend in gradients else 4 * ["-"]
            print(f"{str(shape):>16} {backend:>12} {error:>8.0e}" + "".join(f"{text:>11}" for text in cells))


@dataclasses.dataclass
class Config:
    rounds: int = option(3, "rounds that a median is taken of")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Check and time the attention backends.")
    print_table(data.start_processes(cfg.device).type, cfg.rounds)


if __name__ == "__main__":
    data.run_cli(main)
