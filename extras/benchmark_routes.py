"""Part of `python -m extras.benchmark`: what each route to a derivative costs, in flow-matching steps.

CAFM trains a discriminator on its derivatives along velocities; MeanFlow needs a network's time derivative.
torch's fused attention has neither a forward-mode nor a second derivative. Here are loss and gradients of

    D step             CAFM's loss on the derivatives of D along two directions, without making them
    G step through D   the generator's, the part through D only
    time derivative    du/dt of a velocity network without a graph, then the flow-matching step

by every route and attention backend, in those of flow matching, with which they are interleaved, and the MB
that a step needs. Figures: extras/README.md.
"""
import functools

import torch
import torch.nn as nn

import losses
import model
from extras import attention_table, cafm_routes
from extras.benchmark_tools import Item, in_turn, peak_megabytes

SMALL = dict(patch=2, channels=4, width=384, depth=3, heads=6)
SIZES = {  # network: config, batch, precision
    "tiny": {"width 48": (SMALL | dict(input_size=4, width=48, depth=1), 2, "float32")},
    "small": {f"width 384, {size ** 2 // 4} tokens": (SMALL | dict(input_size=size), batch, "float32")
              for size, batch in ((8, 4), (16, 4), (32, 2))},
    "long": {"width 384, 1024 tokens": (SMALL | dict(input_size=64), 1, "float32")},
    "full": {name: (model.ZOO[name], 32, "bf16") for name in ("SiT-B/2", "SiT-XL/2")}}
ANY = "plain", "closed_form", "triton"
ROUTES = {"D step by double backward": ANY, "D step by two forward tangents": ANY,
          "G step through D by input gradient": ("fused",), "G step through D by forward tangent": ANY,
          "time derivative": ANY}
BARS = {"D step by double backward": 2.9, "G step through D by input gradient": 0.8, "time derivative": 2.2}


def items(size: str, device: torch.device) -> list[Item]:
    return [Item(f"{name}, batch {batch}, {amp}: {route}, {backend}",
                 lambda args=(size, name, route, backend): route_cost(*args, device),
                 {"fm steps": (None, BARS[route])} if route in BARS else {})
            for name, (_, batch, amp) in SIZES[size].items()
            for route, backends in ROUTES.items() for backend in backends
            if backend in attention_table.backends(device)]


def long_items(size: str, device: torch.device) -> list[Item]:
    """On a CPU, more tokens, where there is time at the end."""
    return items("long", device) if size == "small" else []


def route_cost(size: str, name: str, route: str, backend: str, device: torch.device) -> dict:
    """Time in flow-matching steps of the same network and batch, and memory on top of the weights."""
    networks, routes = build(size, name, device)

    def without_gradients(step):
        def run():
            step()
            for p in (p for net in networks for p in net.parameters()):
                p.grad = None
        return run

    step = without_gradients(lambda: routes[route](backend))
    calls = dict(step=step, unit=without_gradients(routes["flow matching"]))
    seconds = in_turn(calls, 3, device.type)
    return {"fm steps": seconds["step"] / seconds["unit"], "MB": peak_megabytes(step, device.type),
            "fm ms": 1e3 * seconds["unit"]}


@functools.lru_cache(maxsize=1)
def build(size: str, name: str, device: torch.device) -> tuple:
    """G and D of a network's size with random weights, and the routes at random inputs."""
    config, batch, amp = SIZES[size][name]
    torch.manual_seed(0)
    with device:  # a GPU fills large networks faster than a CPU
        G = model.build(config).to(device)
        D = model.discriminator(G.config, norm=G.config["norm"].replace("layer", "rms")).to(device)
    for p in (*G.parameters(), *D.parameters()):
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)  # adaLN-zero's zeros cost the same, but look odd
    G.amp = D.trunk.amp = torch.bfloat16 if amp == "bf16" else None
    x_t, v, u = torch.randn(3, batch, *G.shape, device=device).unbind()
    t, y = torch.rand(batch, device=device), torch.randint(0, G.num_classes, (batch,), device=device)
    return (G, D), derivative_steps(G, D, x_t, t, y, v, u)


def derivative_steps(G: nn.Module, D: nn.Module, x_t, t, y, v, u) -> dict:
    """name -> one step up to its gradients: flow matching, and losses on derivatives by a backend."""
    def flow_matching():
        (G(x_t, t, y) - v).square().mean().backward()

    def discriminator(out, real, fake):
        ((real - 1).square().mean() + (fake + 1).square().mean() + 1e-3 * out.square().mean()).backward()

    def double_backward(backend):
        out, gradient, slope = model.input_gradient(D, x_t, t, y, backend=backend)
        discriminator(out, model.along(gradient, slope, v), model.along(gradient, slope, u))

    def two_tangents(backend):
        out, (real, fake) = cafm_routes.forward_slopes(D, x_t, t, y, torch.stack([v, u]), backend)
        discriminator(out, real, fake)

    def generator(_fused):
        w = u.detach().requires_grad_()
        _, gradient, slope = model.input_gradient(D, x_t, t, y, create_graph=False)
        (model.along(gradient, slope, w) - 1).square().mean().backward()

    def generator_by_tangent(backend):
        w = u.detach().requires_grad_()
        trained = [p for p in D.parameters() if p.requires_grad]
        D.requires_grad_(False)
        with model.attention_backend(backend):
            J = torch.func.jvp(lambda x_t, t: D(x_t, t, y), (x_t, t), (w, torch.ones_like(t)))[1]
        (J - 1).square().mean().backward()
        for p in trained:
            p.requires_grad_()

    def mean_flow(backend):
        _, du = model.time_derivative(G, x_t, t, y, v, backend=backend)
        (G(x_t, t, y) - (v - losses.expand_dims(t, v) * du)).square().mean().backward()

    steps = double_backward, two_tangents, generator, generator_by_tangent, mean_flow
    return {"flow matching": flow_matching} | dict(zip(ROUTES, steps))
