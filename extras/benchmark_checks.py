"""Part of `python -m extras.benchmark`: what this device computes, against float64 and against the CPU.

    attention   every backend: value, gradients, tangents, gradients of a loss on tangents, double backward
                against plain attention in float64; the largest |found - exact| / |exact| of these tensors
    CPU         on a GPU, in float32: gradients of every role of the core's objectives, five steps of
                training and a sampler's images against the same on the CPU
    float32     losses of five steps in bfloat16, and on a GPU compiled, against eager float32's

The last two without TF32, which torch uses in convolutions (here that of the patches) unless told otherwise.

On a machine with a GPU `python -m pytest -k on_a_gpu` asserts the bars.
"""
import functools

import torch
import torch.nn as nn

import data
import fid
import losses
import model
import sample
import train
from extras import attention_table
from extras.benchmark_tools import Item

TOKENS = {"tiny": (5,), "small": (64, 257), "full": (256, 257, 1024, 4096)}
HEAD_SIZES = {"tiny": (8,), "small": (64, 72), "full": (64, 72)}
BARS = {"bfloat16": 3e-2, "float32": 2e-5, "float16": 4e-3}
CORE = "fm", "meanflow", "ect", "afm", "cafm"


def items(size: str, device: torch.device) -> list[Item]:
    found = []
    if device.type == "cuda":
        found += [Item(f"against the CPU: {loss}", functools.partial(gradient_parity, loss, size, device),
                       {"gradient": (None, 1e-3)}) for loss in CORE]
        found += [Item("against the CPU: five steps", functools.partial(loss_parity, size, device, "cpu"),
                       {"loss": (None, 1e-4)}),
                  Item("against the CPU: sampling", functools.partial(sampling_parity, size, device),
                       {"x": (None, 1e-4)})]
    variants = {"bf16": dict(amp="bf16")}
    if device.type == "cuda":  # minutes on a CPU
        variants |= {"compile": dict(compile=True), "bf16 and compile": dict(amp="bf16", compile=True)}
    for name, changes in variants.items():
        bars = {"loss": (None, 2e-2 if "amp" in changes else 1e-4), "graph breaks": (None, 0)}
        found.append(Item(f"against float32: {name}", seconds=45.0 * ("compile" in changes), bars=bars,
                          measure=functools.partial(loss_parity, size, device, device.type, **changes)))
    for N in TOKENS[size]:
        for dtype in BARS:
            for backend in attention_table.backends(device):
                exact = dtype == "float32" or backend in ("closed_form", "triton")
                found.append(Item(f"attention, {N} tokens, {dtype}: {backend}",
                                  functools.partial(attention_error, backend, dtype, N, size, device),
                                  {"error": (None, BARS[dtype])} if exact else {}))  # others round in between
    # Compilers last, and last of all the Triton kernels: a fault in one of these ends this part.
    return sorted(found, key=lambda item: (item.name.endswith("triton"), item.name.endswith("compile")))


# ---- 1. Attention ----


@functools.lru_cache(maxsize=3)
def exact_attention(N: int, d: int, device: torch.device) -> tuple[list, dict]:
    """q, k, v, two tangents of each, G, U in float64, and all that can be asked of attention at them."""
    rng = data.generator("attention", N, d)
    shapes = 3 * [(1, 2, N, d)] + 3 * [(2, 1, 2, N, d)] + [(1, 2, N, d), (2, 1, 2, N, d)]
    inputs = [torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes]
    exact = attention_table.derivatives("plain", *inputs)
    return inputs, {name: [x.detach() for x in tensors] for name, tensors in exact.items()}


def attention_error(backend: str, dtype: str, N: int, size: str, device: torch.device) -> dict:
    """The largest relative error, over head sizes, of all that a backend has."""
    errors = []
    for d in HEAD_SIZES[size]:
        inputs, exact = exact_attention(N, d, device)
        found = attention_table.derivatives(backend, *(x.to(getattr(torch, dtype)) for x in inputs))
        errors.append(attention_table.largest_error(found, exact))
    return {"error": torch.tensor(errors).max().item()}  # nan if one is


# ---- 2. Networks ----


class HostDraws(data.Draws):
    """The CPU's numbers, which a GPU's differ from, on any device."""

    def normal(self, purpose: str, shape: tuple) -> torch.Tensor:
        return data.Draws(self.seed, self.positions).normal(purpose, shape).to(self.device)


def networks(cfg, source, device: torch.device) -> dict:
    """The run's networks with the same random weights on every device, none of them zero."""
    nets = train.build_all(cfg, source, torch.device("cpu"))
    for role, net in nets.items():
        rng = data.generator("weights", role)
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1, generator=rng)
        for part in net.to(device).modules():
            if isinstance(part, model.DiT):
                part.amp = torch.bfloat16 if cfg.amp == "bf16" else None
    return nets


def first_loss(cfg, role: str, nets: dict, source, device: torch.device) -> torch.Tensor:
    """The loss of a role on the first images, by numbers drawn on the CPU."""
    objective = losses.find(cfg.loss)
    images, labels = source[list(range(cfg.batch))]
    draws = HostDraws(cfg.seed, range(cfg.batch), device)
    others = [other for name, other in nets.items() if name != role]
    x = source.clean(images.to(device), draws)
    return getattr(objective, role)(nets[role], x, labels.to(device), draws, cfg, *others)[0]


def settings(size: str, **changes) -> tuple[dict, data.Dataset]:
    """The settings of a run in float32, and its data."""
    small = dict(model="glyph-XS", batch=4) if size == "tiny" else dict(model="glyph-S", batch=32)
    return small | dict(amp="off") | changes, data.dataset("glyphs", 32)


def gradient_parity(name: str, size: str, device: torch.device) -> dict:
    """The largest relative difference, over roles, of all gradients to those on the CPU."""
    options, source = settings(size)
    cfg, worst = train.configure(name, **options), []
    for role in train.build_all(cfg, source, torch.device("cpu")):
        gradients = []
        for where in (torch.device("cpu"), device):
            nets = networks(cfg, source, where)
            weights = [p for p in nets[role].parameters() if p.requires_grad]
            with fid.full_float32(where):
                loss = first_loss(cfg, role, nets, source, where)
                own = torch.autograd.grad(loss, weights, materialize_grads=True)
            gradients.append(torch.cat([g.flatten().cpu() for g in own]))
        worst.append((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    return {"gradient": torch.stack(worst).max().item()}


def loss_parity(size: str, device: torch.device, reference: str, **changes) -> dict:
    """The largest relative difference of flow matching's losses in five steps on one batch to those of the
    eager float32 network on the reference device; with compile, also the graph breaks in the network."""
    found, figures = [], {}
    for where, own in ((torch.device(reference), {}), (device, changes)):
        options, source = settings(size, **own)
        cfg = train.configure("fm", **options)
        nets = networks(cfg, source, where)
        weights = [p for p in nets["G"].parameters() if p.requires_grad]
        opt, values = torch.optim.AdamW(weights, 1e-3), []
        used = dict(G=torch.compile(nets["G"]) if cfg.compile else nets["G"])
        for _ in range(5):
            with fid.full_float32(where):
                loss = first_loss(cfg, "G", used, source, where)
                loss.backward()
            opt.step()
            opt.zero_grad()
            values.append(loss.detach().cpu())
        found.append(torch.stack(values))
    if "compile" in changes:
        x, t = torch.randn(4, *nets["G"].shape, device=device), torch.rand(4, device=device)
        explained = torch._dynamo.explain(nets["G"])(x, t, torch.arange(4, device=device))
        figures["graph breaks"] = explained.graph_break_count
        torch.compiler.reset()
    return {"loss": ((found[1] - found[0]) / found[0]).abs().max().item()} | figures


def sampling_parity(size: str, device: torch.device) -> dict:
    """The relative difference of eight Heun steps, guided, to those on the CPU, from the same noise."""
    options, source = settings(size)
    cfg, x = train.configure("fm", **options), []
    for where in (torch.device("cpu"), device):
        net = networks(cfg, source, where)["G"].eval()
        e = HostDraws(0, range(8), where).normal("noise", net.shape)
        with fid.full_float32(where):
            x.append(sample.sample(net, e, torch.arange(8, device=where), 8, "heun", 1.5).cpu())
    return {"x": ((x[1] - x[0]).norm() / x[0].norm()).item()}
