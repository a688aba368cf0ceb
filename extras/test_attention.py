"""Tests of attention.py, cafm_routes.py."""
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before attention.py is imported: its kernels then run on a CPU

import losses
import model
import train
from extras import attention, attention_table, benchmark_tools, cafm_routes, mixture
from extras.test_core import Derivatives, check_parameter_gradient, naive_attention
from extras.test_core import constant_G, linear_D
from test_all import (HERE, TINY, cafm_loss, double_backward, golden_pair, on_points,
                      parameters_of, quick_draws, raises, same, tiny, tiny_run, torchrun)

# ---- Attention ----


model.ATTENTION["naive"] = naive_attention


def attention_inputs(N, M, d, size=1.0, T=2):
    """q, k, v, T tangents of each, and the cotangents G and U of value and tangents, in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, d, dtype=torch.float64) for n in (N, M, M))
    dq, dk, dv = (torch.randn(T, *x.shape, dtype=torch.float64) for x in (q, k, v))
    return size * q, k, v, dq, dk, dv, torch.randn_like(q), torch.randn_like(dq)


@functools.lru_cache(maxsize=None)
def exact_attention(N, M, d, size=1.0, T=2, heads=2, device="cpu") -> tuple:
    """Inputs, and everything one can ask of attention at them, by the naive steps in float64."""
    inputs = [x[..., :heads, :heads, :, :].to(device) for x in attention_inputs(N, M, d, size, T)]
    exact = attention_table.derivatives("naive", *inputs)
    return inputs, {name: [x.detach() for x in tensors] for name, tensors in exact.items()}


def attention_errors(backend, dtype, *case) -> dict:
    """name -> largest relative error of what one can ask of a backend, against the naive steps in float64."""
    inputs, exact = exact_attention(*case)
    found, errors = attention_table.derivatives(backend, *(x.to(dtype) for x in inputs)), {}
    for name, tensors in found.items():
        assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(tensors, exact[name])), name
        errors[name] = torch.stack([(a.double() - b).norm() / b.norm().clamp_min(1)  # some are 0 where N = 1
                                    for a, b in zip(tensors, exact[name])]).max().item()
    return errors


def attention_error(backend, dtype, *case) -> float:
    return torch.tensor(list(attention_errors(backend, dtype, *case).values())).max().item()  # nan if one is


@pytest.mark.parametrize("backend", ["plain", "closed_form"])
def test_attention_and_all_its_derivatives(backend, monkeypatch):
    """Value, gradients, tangents, gradients of tangents (to q, k, v and to the tangents' inputs) and double
    backward of each backend against naive float64 attention, for two tangents at once, cross lengths, large
    logits and several blocks of queries: 1e-10 in float64, 1e-5 in float32. (Logits of 150 have float32
    errors of 1e-5 themselves: there the bound is twice naive float32's error.)"""
    shapes = [(N, N, d, 1) for N in (1, 17, 64, 257) for d in (8, 32, 64, 72, 80)]
    for case in shapes + [(17, 40, 72, 1), (64, 5, 8, 1), (64, 64, 32, 10), (64, 64, 32, 30)]:
        bound = 1e-5 if case[-1] < 30 else 2 * attention_error("naive", torch.float32, *case)
        for queries in (256, 16) if backend == "closed_form" else (256,):
            monkeypatch.setattr(attention, "QUERIES", queries)
            assert attention_error(backend, torch.float64, *case) < 1e-10, case
            assert attention_error(backend, torch.float32, *case) < bound, case


def test_attention_in_half_precision():
    """In bfloat16 and float16 closed forms are as exact as plain steps in that dtype, and over many keys more
    exact in every derivative, as there is float32 between products."""
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        own, plain = (attention_error(backend, dtype, 64, 64, 32) for backend in ("closed_form", "plain"))
        assert own < bound and own < 2 * plain, (dtype, own, plain)
    own, plain = (attention_errors(backend, torch.bfloat16, 16, 2000, 8)
                  for backend in ("closed_form", "plain"))
    assert all(own[name] < 0.8 * plain[name] for name in own), (own, plain)


def test_attention_passes_gradgradcheck():
    """torch's own numerical checks: backward, forward mode, batched gradients, double backward, and that of a
    call with two tangents."""
    q, k, v, dq, dk, dv, *_ = (x[..., :1, :, :].requires_grad_() for x in attention_inputs(5, 3, 4))
    check = torch.autograd.gradcheck
    assert check(attention.attention_closed_form, (q, k, v), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention.attention_closed_form, (q, k, v))
    assert check(lambda *x: attention.Attend.apply(attention.TORCH, *x)[:2], (q, k, v, dq, dk, dv))


def test_attention_under_torch_func(monkeypatch):
    """vmap over q, k, v (alone, under jvp, under grad), nested grad: as for plain steps. What is not there is
    an error."""
    func, closed_form = torch.func, attention.attention_closed_form
    stacks = [torch.randn(3, 2, 2, n, 4, dtype=torch.float64) for n in (6, 5, 5)]
    w = [torch.randn_like(x) for x in stacks]
    k, v = stacks[1][0], stacks[2][0]
    cases = {
        "vmap": lambda f: func.vmap(f)(*stacks),
        "vmap over q": lambda f: func.vmap(f, (0, None, None))(stacks[0], k, v),
        "vmap of jvp": lambda f: func.vmap(lambda p, t: func.jvp(f, p, t)[1])(tuple(stacks), tuple(w)),
        "vmap over one tangent": lambda f: func.vmap(lambda t: func.jvp(
            f, tuple(x[0] for x in stacks), (t, w[1][0], w[2][0]))[1])(w[0]),
        "vmap of grad": lambda f: func.vmap(func.grad(lambda *p: f(*p).square().sum()))(*stacks),
        "grad of grad": lambda f: func.grad(lambda q: func.grad(lambda z: f(z, k, v).square().sum())(
            q).square().sum())(stacks[0][0]),
        "grad of jvp": lambda f: func.grad(lambda q: func.jvp(
            lambda z: f(z, k, v), (q,), (w[0][0],))[1].square().sum())(stacks[0][0]),
    }
    for name, case in cases.items():
        assert (case(closed_form) - case(naive_attention)).abs().max() < 1e-11, name
    shapes, forward = [], attention.pair_forward
    monkeypatch.setattr(attention.TORCH, "forward",
                        lambda *x: (shapes.append([*x[0].shape[:-2], len(x[3])]), forward(*x))[1])
    cases["vmap over one tangent"](closed_form)
    assert shapes == [[2, 2, 0], [2, 2, 3]], "three tangents share one q, k, v"
    q, k, v = (x[0].requires_grad_() for x in stacks)
    with pytest.raises(NotImplementedError, match="one forward-mode derivative"):
        func.jvp(lambda z: func.jvp(lambda x: closed_form(x, k, v), (z,), (w[0][0],))[1], (q,), (w[0][0],))
    first, = torch.autograd.grad(closed_form(q, k, v).square().sum(), q, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        second.square().sum().backward()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator makes."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return out


def test_attention_saves_memory_linear_in_tokens():
    """What autograd holds for a double backward: proportional to N for closed_form, to N^2 for plain. No
    array is larger than a block of queries by N."""
    saved = {}
    for backend in ("plain", "closed_form"):
        for N in (256, 1024, 2048):
            q, k, v, G = torch.randn(4, 1, 1, N, 16).unbind()
            saved[backend, N] = benchmark_tools.saved_bytes(attention_table.gradients(backend, q, k, v, G))
    row = 4 * 2048 * 16
    assert saved["closed_form", 2048] <= 12 * row, "q, k, v, O, G and the gradients"
    for N in (1024, 2048):
        growth = {backend: saved[backend, N] / saved[backend, 256] for backend in ("plain", "closed_form")}
        assert abs(growth["closed_form"] / (N / 256) - 1) < 0.01, growth
        assert growth["plain"] > 0.9 * (N / 256) ** 2, growth
    with Largest() as largest:
        attention_table.tasks("closed_form", q, k, v, G)["double"]()
    assert largest.numbers == attention.QUERIES * 2048


def test_attention_backend_is_chosen_in_the_open(monkeypatch):
    """Fused unless asked otherwise, and again after the block; derivatives use the backend they are given."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    used = []
    for name, call in list(model.ATTENTION.items()):
        noted = lambda q, k, v, name=name, call=call: (used.append(name), call(q, k, v))[1]  # noqa: E731
        monkeypatch.setitem(model.ATTENTION, name, noted)
    with model.attention_backend("closed_form"):
        with model.attention_backend("plain"):
            model.attention(q, k, v)
        model.attention(q, k, v)
    model.attention(q, k, v)
    assert used == ["plain", "closed_form", "fused"]
    D, x, t, y = tiny_D(), torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])
    for call in (lambda: model.input_gradient(D, x, t, y, backend="closed_form"),
                 lambda: model.time_derivative(tiny(), x, t, y, x, backend="closed_form"),
                 lambda: cafm_routes.forward_slopes(D, x, t, y, x[None], "closed_form")):
        used.clear()
        call()
        assert used[-2:] == ["closed_form", "closed_form"], used


# ---- Triton kernels ----

needs_triton = pytest.mark.skipif(not attention.triton, reason="Triton is not installed (pip install triton)")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested compiled")
def test_triton_kernels_interpreted():
    """The Triton kernels in Triton's interpreter: everything, as for the other backends, in float32 and
    float16, head sizes that are no powers of two, cross lengths, ragged tiles, logits of several hundred.
    (It cannot do bfloat16.) And one backward call where value and two tangents have cotangents."""
    for N, M, d, T in (17, 17, 8, 2), (33, 20, 72, 1), (5, 33, 80, 1):
        assert attention_error("triton", torch.float32, N, M, d, 1, T, 1) < 1e-5, (N, M, d)
    assert attention_error("triton", torch.float16, 33, 33, 64, 1, 1, 1) < 3e-3
    # some lse < -88: exp(0 - lse) is inf beyond the edge; saturated: gradients are differences of equals
    assert attention_error("triton", torch.float32, 5, 1, 8, 100) < 1e-2
    *inputs, G, U = attention_inputs(18, 19, 8)
    exact = attention.pair_backward(*inputs, *attention.pair_forward(*inputs), G, U)
    inputs = [x.float() for x in inputs]
    found = attention.triton_backward(*inputs, *attention.triton_forward(*inputs), G.float(), U.float())
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(found, exact))


@needs_triton
def test_triton_kernels_compile_for_an_h100():
    """Every kernel becomes sm_90 machine code (no GPU is needed for that), for bfloat16 and head size 72."""
    script = """
import triton, torch
from extras import attention
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
q = torch.empty(1, 1, 1, 72, dtype=torch.bfloat16)
options = attention.launch_options(q)
build = {k: options.pop(k) for k in ("num_warps", "num_stages")}
for kernel, more in ((attention.forward_kernel, {}), (attention.backward_kernel, dict(QUERIES_SIDE=True)),
                     (attention.backward_kernel, dict(QUERIES_SIDE=False))):
    constants = options | more | dict(TANGENT=True)
    kinds = dict(N="i32", M="i32", d="i32", s="fp32", lse="*fp32", mu="*fp32", xbar="*fp32", D="*fp32")
    signature = {a: "constexpr" if a in constants else kinds.get(a, "*bf16") for a in kernel.arg_names}
    source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32)
    done = triton.compile(source, target=target, options=build)
    print(kernel.__name__, len(done.asm["cubin"]), done.metadata.shared)
    assert done.metadata.shared <= 227 * 1024
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("kernel") == 3, done.stderr[-2000:]


def test_triton_refusals(monkeypatch):
    """No Triton, no GPU, or float64: one line that names the way out."""
    q = torch.randn(1, 1, 4, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(attention, "triton", attention.triton or object())
    with model.attention_backend("triton"):
        raises(lambda: model.attention(q, q, q), "GPU", "closed_form")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        raises(lambda: model.attention(q.double(), q.double(), q.double()), "float64", "closed_form")
        monkeypatch.setattr(attention, "triton", None)
        raises(lambda: model.attention(q, q, q), "Triton", "closed_form")


# ---- Losses on derivatives: closed forms, and the forward route ----

ROUTES = [("reverse", "plain"), ("reverse", "closed_form"), ("forward", "plain"), ("forward", "closed_form")]


def slopes_by(route, backend):
    """A function: D and its derivatives along each direction, by this route."""
    slopes = {"forward": cafm_routes.forward_slopes, "reverse": double_backward}
    return functools.partial(slopes[route], backend=backend)


def tangent_loss(case, route, through=lambda tangent: tangent):
    """A loss on a forward-mode derivative straight from torch.func, where nothing is refused."""
    if route == "differences":
        return (case.difference(case.v) - 1).square().mean()
    with model.attention_backend("plain"):
        _, J = torch.func.jvp(lambda x, t: case.net(x, t, case.y), (case.x_t, case.t),
                              (case.v, torch.ones_like(case.t)))
    return (through(J) - 1).square().mean()


def tiny_D(**options):
    return tiny(model.discriminator, **dict(norm="rms") | options)


DERIVATIVE_LOSSES = {  # name -> (network, route, backend)
    "reverse, closed_form": (tiny_D, "reverse", "closed_form"),
    "reverse, closed_form, LayerNorm": (lambda: tiny_D(norm="layer"), "reverse", "closed_form"),
    "forward, plain": (tiny_D, "forward", "plain"),
    "forward, closed_form": (tiny_D, "forward", "closed_form"),
}
TANGENT_LOSSES = {"velocity": lambda: tiny(norm="rms"), "clean image": lambda: tiny(norm="rms", predict="x"),
                  "points": lambda: mixture.PointNet(2)}


@pytest.mark.parametrize("name", DERIVATIVE_LOSSES)
def test_losses_on_derivatives_have_right_gradients(name):
    """Finite differences of CAFM's loss in parameter space against autograd, in float64: by closed forms, and
    by forward mode."""
    make, route, backend = DERIVATIVE_LOSSES[name]
    case, slopes = Derivatives(make()), slopes_by(route, backend)
    check_parameter_gradient(lambda: case.cafm_D(slopes), lambda: case.cafm_D(case.differences), case.net)


@pytest.mark.parametrize("name", TANGENT_LOSSES)
def test_losses_on_tangents_have_right_gradients(name):
    """The same for a loss on one forward-mode derivative of networks that predict v or x, and of points."""
    case = Derivatives(TANGENT_LOSSES[name]())
    loss, reference = (functools.partial(tangent_loss, case, route) for route in ("forward", "differences"))
    check_parameter_gradient(loss, reference, case.net)


class NoTangent(torch.autograd.Function):
    """Attention whose forward-mode rule is dropped."""
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v):
        return model.attention_plain(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, G):
        return torch.func.vjp(model.attention_plain, *ctx.saved_tensors)[1](G)

    @staticmethod
    def jvp(ctx, dq, dk, dv):
        return torch.zeros_like(dq)


def test_finite_differences_catch_what_torch_does_not(monkeypatch):
    """The check above fails for LayerNorm in forward mode, a tangent without a graph, a dropped jvp rule."""
    def check(case, through=lambda tangent: tangent):
        check_parameter_gradient(lambda: tangent_loss(case, "forward", through),
                                 lambda: tangent_loss(case, "differences"), case.net)

    rms = Derivatives(tiny(norm="rms"))
    check(rms)
    with pytest.raises(AssertionError, match="differences"):
        check(Derivatives(tiny(norm="layer")))
    with pytest.raises(AssertionError, match="differences"):
        check(rms, lambda J: J.detach() + 0 * rms.net(rms.x_t, rms.t, rms.y))
    monkeypatch.setitem(model.ATTENTION, "plain", NoTangent.apply)
    with pytest.raises(AssertionError, match="differences"):
        check(rms)


def test_time_derivative_by_closed_forms():
    """time_derivative's du/dt by closed forms equals differences of the network along (v, 1); no graph."""
    for make in (lambda: tiny(), lambda: tiny(norm="rms", predict="x")):
        case = Derivatives(make())
        u, du = model.time_derivative(case.net, case.x_t, case.t, case.y, case.v, backend="closed_form")
        assert (u - case.net(case.x_t, case.t, case.y)).abs().max() < 1e-12
        assert not du.requires_grad and (du - case.difference(case.v)).norm() < 1e-7 * du.norm()


def test_routes_agree():
    """Double backward and mapped forward mode, by plain attention and by closed forms, give the loss and its
    gradient equal to 1e-9 in float64."""
    case = Derivatives(tiny_D())
    found = []
    for route in ROUTES:
        loss = case.cafm_D(slopes_by(*route))
        found.append((loss, torch.autograd.grad(loss, parameters_of(case.net))))
    for loss, gradient in found[1:]:
        assert abs(loss / found[0][0] - 1) < 1e-9
        assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(gradient, found[0][1]))


def test_golden_cafm_by_every_route():
    """The official CAFM numbers: D, both directional derivatives, the loss and its gradient norm."""
    G, D, x_t, t, y, v = golden_pair()
    u = G(x_t, t, y).detach()
    for route in ROUTES[1:]:
        out, J = slopes_by(*route)(D, x_t, t, y, torch.stack([v, u]))
        loss = cafm_loss(out, J)
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters_of(D))]).norm()
        for value, want in ((out, [-2.4347384, -2.1182718]),
                            (J, [[0.2932510, 0.3373561], [-0.5408010, -1.4004097]]),
                            (torch.stack([loss / 0.6600989, norm / 146.657721]), [1., 1.])):
            want = torch.tensor(want)
            assert (value - want).abs().max() <= 1e-4 * want.square().mean().sqrt(), route


def test_fresh_discriminator_has_no_slope_and_a_gradient():
    """A fresh D has adaLN-zero's dead gates and a live read-out: J = 0, and a gradient that ends that."""
    torch.manual_seed(0)
    D = model.discriminator(TINY | dict(norm="rms"))
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
    out, J = cafm_routes.forward_slopes(D, x, t, y, torch.randn(2, 4, 3, 8, 8))
    assert out.shape == (4,) and J.shape == (2, 4) and J.abs().max() == 0
    cafm_loss(out, J).backward()
    assert D.trunk.blocks[0].adaLN_modulation[1].weight.grad.norm() > 1e-3


class CustomOperator(nn.Module):
    def forward(self, x_t, t, y, r=None):
        return torch.ops.triflow_test.cosine(x_t)


@torch.library.custom_op("triflow_test::cosine", mutates_args=())
def cosine(x: torch.Tensor) -> torch.Tensor:
    return x.cos()


def test_custom_operators_are_refused():
    """A custom operator under jvp, which torch takes for a constant: an error that names it and the way
    out."""
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.arange(2)
    assert torch.func.jvp(cosine, (x,), (x,))[1].abs().max() == 0, "torch knows it now; the refusal can go"
    raises(lambda: model.time_derivative(CustomOperator(), x, t, y, x), "triflow_test::cosine", "jvp")


def test_what_torch_gets_wrong_is_refused():
    """LayerNorm under a loss on a tangent, custom operators under jvp, compile around a hand-written
    derivative: an error that names the way out, where torch would return a wrong number."""
    case = Derivatives(tiny_D(norm="layer"))
    raises(lambda: case.cafm_D(cafm_routes.forward_slopes), "LayerNorm", "norm='rms'", "cafm")
    inputs = case.x_t, case.t, case.y, case.v[None]
    raises(lambda: cafm_routes.forward_slopes(CustomOperator(), *inputs), "triflow_test::cosine")
    for call in (lambda: cafm_routes.forward_slopes(case.net, *inputs),
                 lambda: attention.attention_closed_form(*3 * [torch.randn(1, 1, 4, 8)])):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="torch.compile can get wrong"):
            torch.compile(call, backend="eager", fullgraph=True)()


def test_slopes_of_a_compiled_network():
    """torch.compile's wrapper is taken off for a derivative by forward mode or closed forms."""
    case = Derivatives(tiny_D())
    compiled = torch.compile(case.net, backend="aot_eager")
    inputs = case.x_t, case.t, case.y, case.v[None]
    for route in ROUTES[1:]:
        want, found = (slopes_by(*route)(net, *inputs) for net in (case.net, compiled))
        assert same(list(want), list(found))


SLOPES_SCRIPT = """
import data, torch, torch.nn as nn
from extras.THIS import ROUTES, cafm_loss, parameters_of, raises, slopes_by, tiny_D
class Step(nn.Module):  # what DDP wraps: the module that takes the derivative
    def __init__(self, net, route):
        super().__init__()
        self.net, self.route = net, route
    def forward(self, x, t, y, v, u):
        return cafm_loss(*slopes_by(*self.route)(self.net, x, t, y, torch.stack([v, u])))
data.start_processes("cpu")
torch.manual_seed(1)
x, v, u = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64).unbind()
t, y = torch.rand(4, dtype=torch.float64), torch.arange(4)
own = slice(2 * data.rank(), 2 * data.rank() + 2)
for route in ROUTES[1:]:
    nets = [tiny_D().double() for _ in range(2)]
    Step(nets[0], route)(x, t, y, v, u).backward()
    wrapped = nn.parallel.DistributedDataParallel(Step(nets[1], route))
    for _ in range(2):  # the second backward pass shows whether the first left DDP in order
        wrapped(*(part[own] for part in (x, t, y, v, u))).backward()
    for a, b in zip(*map(parameters_of, nets)):
        assert (2 * a.grad - b.grad).norm() <= 1e-10 * a.grad.norm(), route
    through = nn.parallel.DistributedDataParallel(nets[1])
    raises(lambda: slopes_by(*route)(through, x, t, y, v[None]), "gradient exchange")
    del wrapped, through
print("equal", flush=True)
data.stop_processes()
""".replace("THIS", Path(__file__).stem)


def test_routes_under_two_processes(tmp_path):
    """Two gloo processes give the single process's gradient for double backward through closed forms and for
    forward tangents; a derivative taken through DDP's wrapper is refused."""
    (tmp_path / "routes.py").write_text(SLOPES_SCRIPT)
    assert torchrun(2, tmp_path / "routes.py").stdout.count("equal") == 2


# ---- The objective cafm_routes ----


def test_cafm_routes_agree():
    """The forward route has cafm's loss; differences come to it as their interval shrinks."""
    torch.manual_seed(0)
    D, G, draws = mixture.PointDiscriminator(2).double(), mixture.PointNet(2).double(), quick_draws(0, 64)
    D.frequencies /= 4
    x, normal, uniform = torch.randn(64, 2).double(), draws.normal, draws.uniform
    draws.normal, draws.uniform = (lambda *a: normal(*a).double()), (lambda *a: uniform(*a).double())

    def value(objective, **settings):
        return objective(D, x, None, draws, on_points("cafm_routes", **settings), G)[0]

    exact, forward = value(losses.cafm_D), value(cafm_routes.cafm_routes_D)
    assert torch.autograd.grad(forward, list(G.parameters()), retain_graph=True, allow_unused=True)[0] is None
    near, far = (value(cafm_routes.cafm_routes_D, route="finite", interval=h) for h in (1e-4, 1e-3))
    assert abs(forward / exact - 1) < 1e-9
    assert abs(near - exact) < 1e-3 and 8 < (far - exact) / (near - exact) < 12


def test_cafm_routes_gradient_of_G():
    """By both routes dL_G / du = 2 (J(u) - 1) grad_x D, plus the transport cost's 2 ot u."""
    (D, (g, _)), (G, u), x = linear_D((.3, .8), .1), constant_G(), torch.randn(64, 2)
    J = (g @ u.double() + 0.1).item()
    for route in ("forward", "finite"):
        for ot in (0.0, 0.5):
            cfg = on_points("cafm_routes", ot=ot, ot_end=ot, route=route)
            loss, logs = cafm_routes.cafm_routes_G(G, x, None, quick_draws(0, 64), cfg, D)
            gradient, = torch.autograd.grad(loss, u)
            want = 2 * (J - 1) * g + ot * u  # |u|^2 is a mean over 2 numbers: 2 ot u / 2
            assert abs(loss - ((J - 1) ** 2 + ot * u.square().mean())) < 1e-5
            assert abs(logs["slope_fake"] - J) < 1e-5 and (gradient - want).abs().max() < 1e-5


def test_cafm_routes_trains_and_refuses(tmp_path):
    """It is cafm but for the losses. A run by each route moves both networks; a wrong interval, checkpointing
    or sharding under forward mode are refused in one line."""
    own, cafm = losses.LOSSES["cafm_routes"], losses.LOSSES["cafm"]
    for name in ("turn", "alarm", "defaults", "network", "discriminator", "inputs", "sampling", "rate"):
        assert getattr(own, name) == getattr(cafm, name), name
    assert own.flags.keys() - cafm.flags.keys() == {"route", "interval"}
    assert all(own.flags[name] is flag for name, flag in cafm.flags.items())
    for route in ("forward", "finite"):
        train.train(tiny_run(tmp_path / route, "cafm_routes", route=route, steps=3, d_warmup=0, d_steps=1))
        rows = train.read_log(tmp_path / route / "log.jsonl")
        assert {row["role"] for row in rows} == {"D", "G"} and all(row["grad_norm"] > 0 for row in rows)

    def start(**options):
        train.train(tiny_run(tmp_path / "no", "cafm_routes", **options))

    raises(lambda: start(route="finite", interval=0.0), "--interval 0")
    raises(lambda: start(processes="shard"), "--processes shard", "--loss cafm")
    raises(lambda: start(checkpointing=True), "--checkpointing", "--loss cafm")
    raises(lambda: start(d_steps=0), "--d_steps 0")


def test_cafm_routes_run_alone(tmp_path, capsys):
    """`python -m extras.cafm_routes` prints a line for cafm and for each route, and draws them."""
    cafm_routes.main(["--steps", "2", "--out", str(tmp_path / "routes.png")])
    printed = capsys.readouterr().out
    assert printed.count("cafm_routes") >= 2 and "finite" in printed and (tmp_path / "routes.png").is_file()
