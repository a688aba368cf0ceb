"""What each route to a derivative costs, in flow-matching steps of the same network and batch.

    python -m extras.benchmark_routes                                           four sizes that a CPU can do
    python -m extras.benchmark_routes --model SiT-XL/2 --batch 32 --amp bf16    on a GPU: not checked yet

CAFM trains a discriminator on its derivatives along velocities; MeanFlow needs a network's time derivative.
torch's fused attention has neither a forward-mode nor a second derivative. Median costs at width 384,
3 layers, 16 to 256 tokens (2 CPU cores, 2026-11-21):

    D's loss on two derivatives   2.2 to 2.5   double backward through model.input_gradient
                                  4.3 to 4.5   two forward-mode tangents
    G's loss through D            0.7 to 0.9   model.input_gradient without a graph, fused
                                  1.4 to 2.2   a forward-mode tangent
    du/dt, then an fm step        1.9 to 2.9   model.time_derivative

At 1,024 tokens fused attention makes a flow-matching step cheap: D 3.1 against 9.9 (5.8 by closed forms), G
0.8 against 1.6, du/dt and step 2.0.
"""
import dataclasses

import torch
import torch.nn as nn

import data
import losses
import model
from data import option
from extras import cafm_routes
from extras.benchmark import in_turn, peak_megabytes

data.extra("attention", "attention backend closed_form")  # it adds it

SMALL = dict(patch=2, channels=4, width=384, depth=3, heads=6)
SIZES = (8, 4), (16, 4), (32, 2), (64, 1)  # (input size, batch)


def derivative_steps(G: nn.Module, D: nn.Module, x_t, t, y, v, u) -> dict:
    """name -> one step up to its gradients: flow matching, and losses on derivatives by each route."""
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

    def generator():
        w = u.detach().requires_grad_()
        _, gradient, slope = model.input_gradient(D, x_t, t, y, create_graph=False)
        (model.along(gradient, slope, w) - 1).square().mean().backward()

    def generator_by_tangent():
        w = u.detach().requires_grad_()
        trained = [p for p in D.parameters() if p.requires_grad]
        D.requires_grad_(False)
        with model.attention_backend("plain"):
            J = torch.func.jvp(lambda x_t, t: D(x_t, t, y), (x_t, t), (w, torch.ones_like(t)))[1]
        (J - 1).square().mean().backward()
        for p in trained:
            p.requires_grad_()

    def mean_flow():
        _, du = model.time_derivative(G, x_t, t, y, v)
        (G(x_t, t, y) - (v - losses.expand_dims(t, v) * du)).square().mean().backward()

    return {"flow matching": flow_matching,
            "D step: double backward, plain": lambda: double_backward("plain"),
            "D step: double backward, closed_form": lambda: double_backward("closed_form"),
            "D step: 2 forward tangents, plain": lambda: two_tangents("plain"),
            "D step: 2 forward tangents, closed_form": lambda: two_tangents("closed_form"),
            "G step through D: input gradient, fused": generator,
            "G step through D: forward tangent, plain": generator_by_tangent,
            "time derivative, then flow matching": mean_flow}


def print_routes(name: str, config: dict, batch: int, device: str, rounds: int, amp: bool = False) -> None:
    """Time of each route in flow-matching steps of the same network and batch, and peak memory."""
    torch.manual_seed(0)
    G = model.build(config).to(device)
    D = model.discriminator(G.config, norm=G.config["norm"].replace("layer", "rms")).to(device)
    for p in (*G.parameters(), *D.parameters()):
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)  # adaLN-zero's zeros cost the same, but look odd
    G.amp = D.trunk.amp = torch.bfloat16 if amp else None
    x_t, v, u = torch.randn(3, batch, *G.shape, device=device).unbind()
    t, y = torch.rand(batch, device=device), torch.randint(0, G.num_classes, (batch,), device=device)

    def without_gradients(step):
        def run():
            for p in (*G.parameters(), *D.parameters()):
                p.grad = None
            step()
        return run

    routes = derivative_steps(G, D, x_t, t, y, v, u)
    steps = {name: without_gradients(step) for name, step in routes.items()}
    times = in_turn(steps, rounds, device)
    unit = times["flow matching"]
    print(f"\n{name}, {G.pos_embed.shape[1]} tokens, batch {batch}, network in "
          f"{'bfloat16' if amp else 'float32'}; flow-matching step {unit:.3f} s")
    for route, step in steps.items():
        print(f"{route:>42} {times[route] / unit:>7.2f} x {peak_megabytes(step, device):>8.0f} MB")


@dataclasses.dataclass
class Config:
    model: str = option("", "a network of the zoo; empty: width 384, 3 layers, at four sizes")
    batch: int = option(2, "--model: its batch size")
    amp: str = option("off", "--model: bfloat16 autocast around it", ("off", "bf16"))
    rounds: int = option(3, "rounds that a median is taken of")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Time and memory of each route to a derivative.")
    device = data.start_processes(cfg.device).type
    print(f"\nderivative routes on {device}, torch {torch.__version__}: time in flow-matching steps, median "
          f"of {cfg.rounds}\ninterleaved rounds; peak memory of the step. D step: CAFM's loss on two "
          f"directions, without making u; G step: the part through D only.")
    if cfg.model:
        config = data.lookup(model.ZOO, cfg.model, "model")
        print_routes(cfg.model, config, cfg.batch, device, cfg.rounds, cfg.amp == "bf16")
        return
    for size, batch in SIZES:
        print_routes("width 384, 3 layers", SMALL | dict(input_size=size), batch, device, cfg.rounds)


if __name__ == "__main__":
    data.run_cli(main)
