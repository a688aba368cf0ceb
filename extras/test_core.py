"""More tests of the core: closed forms of its objectives, and what does not fit into test_all.py.

Of extras/ it needs the Gaussian mixture alone; tests of extras/ share its toys.
"""
import dataclasses
import functools
import math
import os
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import fid
import losses
import model
import sample
import train
from extras import notes
from extras.gaussians import Mixture
from test_all import (GaussianMap, REAL, SMALL_SET, TINY, TOY, cafm_loss, checkpoint, double_backward,
                      known_distance, logged, network, on_points, parameters_of, quantile_noise, quick_draws,
                      raises, rand, same, save_tiny, spd, tiny, tiny_run, torchrun, toy, write_extra,
                      write_npz)

HALVES = torch.tensor([0.5, 0.5]).double()
TWO_MODES = Mixture(torch.tensor([[-1.5], [1.5]]).double(), HALVES, HALVES)


class ExactNet(nn.Module):
    """The exact velocity of a mixture in place of a network: a label is a component, the null label all."""
    predict, t_min, null_class, guidance_conditioned = "v", 0.0, True, False

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.num_classes, self.shape = mixture, len(mixture.weights), mixture.means.shape[1:]

    def forward(self, x_t, t, y, r=None):
        given = self.mixture.velocity(x_t, t, y.clamp_max(self.num_classes - 1))
        return torch.where((y == self.num_classes)[:, None], self.mixture.velocity(x_t, t), given)


# ---- Objectives against closed forms ----


class Weighted(nn.Module):
    """base(x, t) plus features of (x, t) with weights 0, whose gradient tells whether a loss would leave the
    base."""
    predict, t_min, num_classes, null_class, guidance_conditioned = "v", 0.0, 1, False, False

    def __init__(self, features, base=lambda x, t: 0.0):
        super().__init__()
        self.features, self.base, self.weight = features, base, nn.Parameter(torch.zeros(5).double())

    def forward(self, x_t, t, y=None, r=None):
        features = torch.stack([f.double() for f in self.features(x_t, t)])
        return self.base(x_t, t) + torch.tensordot(self.weight, features, 1)


def of_velocity(x, t):
    return torch.ones_like(x), x, t[:, None] + 0 * x, (2 * x).sin() * t[:, None], x ** 2 / 3


def of_points(x, t):
    a, b = x[:, 0], x[:, -1]
    return a, a * b, a ** 2 * (t + 1), (a + 2 * b).sin() * (t + 1), (3 * a).cos() * (t + 1)


def standard_errors(loss, net, batches=40) -> float:
    """max over the weights of |mean gradient| / its standard error, where loss(k) is that of net on batch
    k."""
    gradients = torch.stack([torch.autograd.grad(loss(k), net.weight)[0] for k in range(batches)])
    return (gradients.mean(0).abs() / (gradients.std(0) / batches ** 0.5)).max().item()


def stationarity(name, G, points=TWO_MODES.sample, n=2000, **changes) -> float:
    """`standard_errors` of fm's network at the velocity G, or of an adversarial method's D = 0 beside the
    network G."""
    objective, cfg = losses.find(name), on_points(name, **changes)
    net = Weighted(of_points) if objective.D else Weighted(of_velocity, G)
    loss, others = (objective.D, [G]) if objective.D else (objective.G, [])

    def of_batch(k):
        return loss(net, *points(n, data.generator(k)), quick_draws(k, n), cfg, *others)[0]

    return standard_errors(of_batch, net)


def exact_jump(nfe=0, factor=1.0):
    """The exact flow map of TWO_MODES as an average velocity: jumps of 1 / nfe, times factor; of any length
    for 0."""
    def u(x_s, s, y=None, r=None):
        s = s.double()
        r = (s - 1 / nfe).clamp_min(0) if nfe else r.double()
        return factor * (x_s - TWO_MODES.flow(x_s, s, r)) / (s - r)[:, None]
    return network(u)


@pytest.mark.parametrize("name, limit", [("fm", 10), ("cafm", 8), ("afm", 8)])
def test_losses_are_stationary_at_exact_networks(name, limit):
    """The mean gradient of fm at the closed-form velocity, and of D beside it in cafm and beside exact jumps
    in afm, is 0 within 4 standard errors; not so with a wrong factor, sign or direction of time."""
    v, factors = TWO_MODES.velocity, (1.0, 0.8)
    right = [(network(lambda x, t, y=None: v(x, t)), {})]
    wrong = [(network(w), {}) for w in (lambda x, t, y=None: 1.1 * v(x, t), lambda x, t, y=None: -v(x, t),
                                        lambda x, t, y=None: v(x, 1 - t), lambda x, t, y=None: -v(x, 1 - t))]
    if name == "afm":  # in 1 or 3 steps, or between any two times
        right, wrong = ([(exact_jump(nfe, f), dict(nfe=nfe, n=400)) for nfe in (1, 3, 0)] for f in factors)
    assert all(stationarity(name, net, **own) < 4 for net, own in right)
    assert all(stationarity(name, net, **own) > limit for net, own in wrong)


def test_losses_cafm_D_sees_marginals_only():
    """Noise and data N(0, s^2 I): a rotation added to the exact velocity moves no density, and D cannot leave
    0 for it. Where the density is not round, the same rotation is seen; so is a stretch."""
    def errors(stds, extra):
        def velocity(x_t, t, y):  # of each coordinate alone: the slope of `Mixture.velocity` at mean 0
            t = t[:, None].double()
            return (t - (1 - t) * stds ** 2) / (((1 - t) * stds) ** 2 + t ** 2) * x_t + x_t @ extra
        points = lambda n, rng: (torch.randn(n, 2, generator=rng) * stds, None)  # noqa: E731
        return stationarity("cafm", network(velocity), points)

    turn, stretch = torch.tensor([[[0., 1.], [-1., 0.]], [[0.3, 0.], [0., 0.3]]]).double()
    round_, long = torch.tensor([[.5, .5], [2., .5]]).double()
    assert errors(round_, 0 * turn) < 4 and errors(long, 0 * turn) < 4 and errors(round_, turn) < 4
    assert errors(long, turn) > 8 and errors(round_, stretch) > 8


class Given:
    """Draws whose every number is given: the noise, and uniform numbers by their purpose."""
    positions = range(1)

    def __init__(self, e, **uniforms):
        self.e, self.uniforms = e, {name.replace("_", " "): value for name, value in uniforms.items()}

    def normal(self, purpose, shape):
        return self.e

    def uniform(self, purpose):
        return self.uniforms[purpose.replace("'", "")]


def gaussian_pairs(n=60, jumps=True):
    """x and draws in float64: pairs of samples of N(0.7, 0.4^2) that meet at the same x_t.

    Their velocities are v +- s / sg(t): sums over a pair are exact expectations of what is linear in v.
    """
    rng = torch.Generator().manual_seed(0)
    times = torch.rand(2, n, generator=rng, dtype=torch.float64).mul(0.96).add(0.02)
    t, r = times.sort(0, descending=True).values.repeat(1, 2)
    x_t = torch.randn(n, 1, generator=rng, dtype=torch.float64).repeat(2, 1)
    net = GaussianMap()
    with torch.no_grad():
        side = torch.tensor([1.0, -1.0]).double().repeat_interleave(n)[:, None]
        v = net(x_t, t, None, t) + side * (0.4 / net.spread(t))[:, None]
    kind = torch.full_like(t, 0.99) if jumps else torch.arange(2 * n).double() % n / n
    e = x_t + (1 - t)[:, None] * v
    return x_t - t[:, None] * v, Given(e, time=t, jumps_start=t, jumps_end=r, jump_or_flow=kind)


def oracle_gradient(objective, oracle, jumps=True, step=0, **settings) -> float:
    """The norm of d loss / d (m, log s) at this step of 10,001, exact in expectation."""
    x, draws = gaussian_pairs(jumps=jumps)
    draws.positions = range(step, step + 1)
    cfg = on_points(objective.__name__, **settings)
    loss, _ = objective(oracle, x, torch.zeros(len(x)).long(), draws, cfg)
    return torch.stack(torch.autograd.grad(loss, (oracle.m, oracle.log_s))).norm().item()


def wrong_maps(**options):
    return [GaussianMap(**options, **wrong) for wrong in (dict(m=0.75), dict(s=0.44), dict(wrong=1.05))]


class ByLabel(nn.Module):
    """One number for each label, at every point and time; notes times and labels of calls with a graph."""
    predict, t_min, num_classes, null_class, guidance_conditioned = "v", 0.0, 2, True, False

    def __init__(self, *values):
        super().__init__()
        self.values, self.seen = nn.Parameter(torch.tensor(values)), []

    def forward(self, x_t, t, y, r=None):
        if torch.is_grad_enabled():
            self.seen.append((t, t if r is None else r, y))
        return self.values[y].view(-1, *[1] * (x_t.dim() - 1)).expand_as(x_t)


class SmallNet(nn.Module):
    """A smooth network of points in the plane and `times` times; head=True: all of its `heads` outputs."""
    predict, t_min, num_classes, null_class, guidance_conditioned = "v", 0.0, 1, False, False

    def __init__(self, times=2, heads=1):
        super().__init__()
        self.times, self.heads = times, heads
        sizes = 2 + times, 16, 16, 2 * heads
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x_t, t, y=None, r=None, head=False):
        times = [t, torch.zeros_like(t) if r is None else t - r][:self.times]
        outs = self.layers(torch.cat([x_t, torch.stack(times, 1)], 1)).chunk(self.heads, 1)
        return outs if head else outs[0]


def one_step_case(times=2, heads=1):
    """A SmallNet in float64, x, y, draws, t, r, x_t, v."""
    torch.manual_seed(0)
    net, n = SmallNet(times, heads).double(), 12
    x, e = torch.randn(2, n, 2, dtype=torch.float64)
    t, r = torch.rand(2, n, dtype=torch.float64).mul(0.9).add(0.05).sort(0, descending=True).values
    draws = Given(e, time=t, jumps_start=t, jumps_end=r, jump_or_flow=torch.full_like(t, 0.99))
    return net, x, torch.zeros(n).long(), draws, t, r, losses.interpolate(x, e, t), e - x


def assert_same_loss(found, want, net) -> None:
    """Two losses agree in value and gradient."""
    parameters = list(net.parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (found, want))
    assert abs(found / want - 1) < 1e-9 and (a - b).norm() < 1e-9 * b.norm()


def test_losses_one_step_oracles():
    """At the exact average velocity of a Gaussian the gradient of meanflow is 0 whatever p, on jumps and on a
    mixture of both kinds; that of ect at the exact way to the data halves with its step. A shifted or scaled
    map has one."""
    for jumps, p in ((True, 0.0), (True, 1.0), (False, 0.0), (False, 1.0)):
        assert oracle_gradient(losses.meanflow, GaussianMap(), jumps, p=p) < 1e-12, (jumps, p)
        assert all(oracle_gradient(losses.meanflow, wrong, jumps, p=p) > 0.005 for wrong in wrong_maps())
    ect = functools.partial(oracle_gradient, losses.ect, step=10_000)
    far, near = (ect(GaussianMap(to_data=True), doublings=k) for k in (18, 19))
    assert 1.9 < far / near < 2.1 and near < 2e-3, (far, near)
    assert all(ect(wrong, doublings=19) > 0.02 for wrong in wrong_maps(to_data=True))


def test_losses_ect_is_edms():
    """Value and gradient are those of the paper's D(x + s e) at noise levels s = t / (1 - t), whose input our
    x_t is over 1 + s; the target is detached, x itself where r = 0, and steps shrink by stages."""
    for step, k in ((0, 1), (3, 4), (7, 8)):
        net, x, y, draws, t, *_ = one_step_case(times=1)
        draws.positions, s = range(step, step + 1), t / (1 - t)
        s_r = s * (1 - (1 + 8 * torch.sigmoid(-s)) / 2 ** k).clamp_min(0)

        def D(s):
            seen = (x + s[:, None] * draws.e) / (1 + s[:, None])
            return seen - (s / (1 + s))[:, None] * net(seen, s / (1 + s))

        gap = (D(s) - D(s_r).detach()).square().mean(1)
        want = (((gap + 0.00054 ** 2).sqrt() - 0.00054) / (s - s_r)).mean()
        loss, logs = losses.ect(net, x, y, draws, on_points("ect", steps=8, doublings=8))
        assert_same_loss(loss, want, net)
        assert (s_r == 0).any() == (step == 0) and abs(logs["jump"] - gap.mean()) < 1e-9
        assert abs(logs["gap"] - (t - s_r / (1 + s_r)).mean()) < 1e-9


def assert_composition(name, **changes) -> None:
    """Of an objective's samples a share `jumps` has r < t, the others r = t; labels are dropped among these
    alone, label_drop of all; a jump's t and r are the larger and smaller of two logit-normal draws."""
    n, net = 4000, ByLabel(0., 0., 0.)
    cfg = train.configure(name, jumps=0.3, label_drop=0.2, time_mean=-0.4, time_std=1.0, jump_time="",
                          jump_low=0.0, **changes)
    losses.find(name).G(net, torch.randn(n, 1, 1, 1), torch.arange(n) % 2, data.Draws(0, range(n)), cfg)
    (t, r, y), = net.seen
    jumps, null = r < t, y == 2
    assert (r <= t).all() and abs(jumps.float().mean() - 0.3) < 0.02 and abs(null.float().mean() - 0.2) < 0.02
    assert not (null & jumps).any() and torch.equal(y[~null], (torch.arange(n) % 2)[~null])
    both = torch.logit(torch.cat([t[jumps], r[jumps]]))
    assert abs(both.mean() + 0.4) < 0.07 and abs(both.std() - 1) < 0.05
    assert abs(torch.logit(t[~jumps]).mean() + 0.4) < 0.06


def test_losses_meanflow_pieces():
    """`assert_composition`. l / (l + c)^p by value; its gradient is that of l times the constant 1 / (l +
    c)^p; in meanflow c = 0.01 over the number of pixels; logs tell flow from jumps."""
    assert_composition("meanflow")
    error = torch.tensor([[[1., 2.]], [[0., .1]]], requires_grad=True)
    square, c = torch.tensor([2.5, .005]), 0.01
    for p in (0.0, 0.5, 1.0):
        value = losses.adaptive(error, p, c)
        assert torch.allclose(value, square / (square + c) ** p)
        gradient, = torch.autograd.grad(value.sum(), error)
        assert torch.allclose(gradient, error.detach() / ((square + c) ** p)[:, None, None])
    logs = losses.two_errors(error, torch.tensor([.5, .5]), torch.tensor([.5, .2]))
    assert abs(logs["flow"] - 2.5) < 1e-6 and abs(logs["jump"] - .005) < 1e-6
    x, y, draws = torch.zeros(8, 2, 1, 1), torch.zeros(8).long(), data.Draws(0, range(8))
    square = (3 - draws.normal("noise", (2, 1, 1))).square().flatten(1).mean(1)
    loss, _ = losses.meanflow(ByLabel(3., 0., 0.), x, y, draws, on_points("meanflow", jumps=0.0, p=0.5))
    assert abs(loss - (square / (square + 0.005).sqrt()).mean()) < 1e-5


def linear_D(g=(0., 0.), b=0., c=0.):
    """D(x, t) = g x + b t + c for points (B, D), about whose game everything is known, and its (g, b)."""
    g, b = torch.tensor(g).double().requires_grad_(), torch.tensor(b).double().requires_grad_()
    return network(lambda x, t, y=None: x.double() @ g + b * t + c, gradient_square=torch.zeros(())), (g, b)


def constant_G(u=(.4, -.2)):
    """The velocity u, the same everywhere, and u."""
    u = torch.tensor(u, requires_grad=True)
    return network(lambda x_t, t, y=None, r=None: u.expand(len(x_t), -1)), u


def test_losses_cafm_value_and_optimum_of_D():
    """A constant D has the loss 2 + cp c^2. Among linear D the best has, with d = E v - u and s = d'
    Cov(v)^-1 d, the slopes s / (2 + s) and -s / (2 + s) and the loss 4 / (2 + s), exactly for the mean and
    covariance of the batch."""
    draws, (G, u) = quick_draws(0, 500), constant_G()
    x = torch.randn(500, 2, generator=data.generator("cafm")) @ torch.tensor([[1., 0.], [.5, .3]]) + 0.7
    loss = lambda D, cp=0.0: losses.cafm_D(D, x, None, draws, on_points("cafm", cp=cp), G)  # noqa: E731
    assert abs(loss(linear_D(c=3.0)[0], 0.1)[0] - (2 + 0.1 * 9)) < 1e-12

    def gradient(g, b):
        D, weights = linear_D(g, b)
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss(D)[0], weights)])

    at_zero = gradient((0., 0.), 0.)  # the loss is quadratic in (g, b)
    columns = [gradient(*at) - at_zero for at in (((1., 0.), 0.), ((0., 1.), 0.), ((0., 0.), 1.))]
    *g, b = torch.linalg.solve(torch.stack(columns, 1), -at_zero).tolist()
    value, logs = loss(linear_D(g, b)[0])
    v = (draws.normal("noise", (2,)) - x).double()
    d = v.mean(0) - u.detach().double()
    s = d @ torch.linalg.solve(torch.cov(v.T, correction=0), d)
    assert abs(value - 4 / (2 + s)) < 1e-6 and s > 0.5
    assert abs(logs["slope_real"] - s / (2 + s)) < 1e-6 and abs(logs["slope_fake"] + s / (2 + s)) < 1e-6


def test_losses_cafm_gradient_of_G():
    """dL_G / du = 2 (J(u) - 1) grad_x D, plus the transport cost's 2 ot u; no gradient reaches D."""
    (D, weights), (G, u), x = linear_D((.3, .8), .1), constant_G(), torch.randn(64, 2)
    J = (weights[0] @ u.double() + 0.1).item()
    for ot in (0.0, 0.5):
        u.grad = None
        loss, logs = losses.cafm_G(G, x, None, quick_draws(0, 64), on_points("cafm", ot=ot, ot_end=ot), D)
        loss.backward()
        assert abs(loss - ((J - 1) ** 2 + ot * u.square().mean())) < 1e-5
        assert abs(logs["slope_fake"] - J) < 1e-5
        want = 2 * (J - 1) * weights[0] + ot * u  # |u|^2 is a mean over 2 pixels: 2 ot u / 2
        assert (u.grad - want).abs().max() < 1e-5 and all(w.grad is None for w in weights)


def test_losses_afm_jumps_compose_to_the_map():
    """K exact jumps by the Euler sampler are the map F^-1(Phi(z)); the times of training are the
    sampler's."""
    e, y, one = torch.randn(200, 1).double(), torch.zeros(200).long(), torch.ones(200).double()
    want = TWO_MODES.flow(e, one, 0 * one)
    for nfe in (1, 2, 49):
        assert (sample.sample(exact_jump(nfe), e, y, nfe) - want).abs().max() < 1e-9
        s, r = losses.jump_times(quick_draws(0, 5000), on_points("afm", nfe=nfe))
        grid = torch.tensor(sample.time_grid(nfe))
        assert len(s.unique()) == nfe and (s.unique().flip(0) - grid[:-1]).abs().max() < 1e-6
        assert s.max() == 1 and r.min() == 0 and (s - r - 1 / nfe).abs().max() < 1e-6
    for steps in (1, 5):  # one network for any grid: the sampler tells it both ends
        assert (sample.sample(exact_jump(), e, y, steps, shift=2.0) - want).abs().max() < 1e-9
    s, r = losses.jump_times(quick_draws(0, 20_000), on_points("afm", nfe=0))
    assert ((0 <= r) & (r < s) & (s <= 1)).all()
    for u in (s, r / s):  # uniform both, and one tells nothing of the other
        assert abs(u.mean() - .5) < .01 and abs(u.std() - 12 ** -.5) < .01
    assert abs(torch.corrcoef(torch.stack([s, r / s]))[0, 1]) < .02


def test_losses_afm_values():
    """A D that sees nothing: ln 2 for both players. A constant added to D changes nothing but the centring
    penalty, cp (2 c)^2. The transport cost is ot w mean(u^2) for a jump of length w, and 1e-3 is the least w
    in the divisor. D compares jumps with data, noised anew where jumps end in noise; R1 and R2 count gp."""
    x, y, draws, (G, u) = torch.randn(64, 2), torch.zeros(64).long(), quick_draws(0, 64), constant_G()
    e, other = draws.normal("noise", (2,)), draws.normal("noise of the real side", (2,))
    D_loss = lambda D, **own: losses.afm_D(D, x, y, draws, on_points("afm", **own), G)  # noqa: E731
    G_loss = lambda D, **own: losses.afm_G(G, x, y, draws, on_points("afm", **own), D)  # noqa: E731
    for c in (0.0, 1.5):
        loss, logs = D_loss(linear_D(c=c)[0], cp=0.01)
        assert abs(loss - math.log(2) - 0.01 * (2 * c) ** 2) < 1e-6 and logs["r1"] == logs["r2"] == 0
        assert abs(G_loss(linear_D(c=c)[0], ot=0.0, ot_end=0.0)[0] - math.log(2)) < 1e-6
    D, softplus = linear_D((.3, .8))[0], nn.functional.softplus
    for nfe, divisor in ((1, 1), (4, 1 / 4), (5000, 1e-3)):
        loss, logs = G_loss(D, nfe=nfe, ot=0.5, ot_end=0.5)
        cost = u.square().mean() / nfe ** 2 / divisor
        assert abs(loss - logs["adversarial"] - 0.5 * cost) < 1e-5 * (1 + cost)
        assert abs(logs["distance"] - u.square().mean() / nfe ** 2) < 1e-6
    real, fake, (loss, logs) = D(x, 0), D(e - u, 0), D_loss(D, gp=0.0, cp=0.0)
    assert abs(logs["real"] - real.mean()) < 1e-6 and abs(logs["fake"] - fake.mean()) < 1e-6
    assert abs(loss - softplus(fake - real).mean()) < 1e-6
    assert abs(G_loss(D)[1]["adversarial"] - softplus(real - fake).mean()) < 1e-6
    logs, (s, r) = D_loss(D, nfe=2)[1], losses.jump_times(draws, on_points("afm", nfe=2))
    assert not torch.equal(other, e)
    assert abs(logs["real"] - D(losses.interpolate(x, other, r), r).mean()) < 1e-6
    assert abs(logs["fake"] - D(losses.interpolate(x, e, s) - u / 2, r).mean()) < 1e-6
    curved = network(lambda x, t, y=None: x.sin().sum(1) + x[:, 0] ** 3)
    (without, logs), (penalised, _) = D_loss(curved, gp=0.0), D_loss(curved, gp=2.0)
    assert abs(penalised - without - 2 * (logs["r1"] + logs["r2"])) < 1e-4 * penalised
    for name, at in (("R1", x), ("R2", (e - u).detach())):
        want = losses.flatness(curved, at, curved(at, 0), torch.ones(64), torch.zeros(64), y, draws, name)
        assert abs(logs[name.lower()] - want) < 1e-4 * want and want > 0.1


def test_losses_afm_penalty():
    """R1's mean over its noise is w (|grad D|^2 + step^2 / 4 (2 tr H^2 + (tr H)^2)) for a quadratic D of
    Hessian H, from every fourth sample; splitting a batch changes nothing."""
    H, g, n = torch.tensor([[2., .5], [.5, -1.]]), torch.tensor([1., 2.]), 160_000
    D = lambda x, r, y: x @ g + ((x @ H) * x).sum(1) / 2  # noqa: E731
    x, s, r = torch.zeros(n, 2), torch.full((n,), .75), torch.full((n,), .25)  # the gradient here is g
    for step in (0.01, 1.0):
        value = losses.flatness(D, x, D(x, r, None), s, r, r, quick_draws(0, n), "R1", step)
        exact = 0.5 * (g @ g + step ** 2 / 4 * (2 * (H @ H).trace() + H.trace() ** 2))
        assert abs(value / exact - 1) < 0.04, (step, value, exact)

    def part(a, b):
        at, draws = torch.randn(32, 2, generator=data.generator("R1"))[a:b], data.Draws(0, range(a, b))
        return losses.flatness(D, at, D(at, r, None), s[a:b], r[a:b], r[a:b], draws, "R1")

    assert abs(part(0, 32) - (part(0, 6) * 6 + part(6, 32) * 26) / 32) < 1e-4 * part(0, 32)
    assert part(0, 32) > 1 and part(1, 3) == 0


def test_losses_gradient_normaliser():
    """Identity forward; |g| sqrt(numel) is 3.162, 2.294, .., 1.001 at calls 1, 2, 59 of one g, whatever D's
    scale."""
    for scale in (1e-4, 1.0, 1e4):
        square, sizes, g = torch.zeros(()), [], scale * torch.randn(6, 5, generator=data.generator("g"))
        for _ in range(59):
            x = torch.randn(6, 5, requires_grad=True)
            out = losses.NormaliseGradient.apply(x, square)
            out.backward(g)
            sizes.append((x.grad.norm() * 30 ** 0.5).item())
            assert torch.equal(out, x)
        assert np.allclose(sizes, [(1 - .9 ** k) ** -0.5 for k in range(1, 60)], rtol=1e-3)
        assert (x.grad / g).std() < 1e-4 * (x.grad / g).mean()


# ---- data.py ----


def test_data_centre_crop_is_adms():
    """Halve by box while twice too large, bicubic to the short side, crop the centre."""
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    x = np.asarray(data.centre_crop(Image.fromarray(ramp), 50))
    assert x.shape == (50, 50, 3)
    assert np.abs(x[25, :, 0] - (np.arange(50) + 25) * 2.0 - 0.5).max() <= 1  # pixel k of 100: of 2k and 2k+1
    noise = np.random.RandomState(0).randint(0, 256, (100, 100, 3)).astype(np.uint8)
    means = noise.reshape(50, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(data.centre_crop(Image.fromarray(noise), 50)) - means).max() <= 1
    assert data.centre_crop(Image.new("RGB", (37, 91)), 16).size == (16, 16)


def test_data_devices_that_are_not_there(monkeypatch):
    """A CUDA device that this torch, or this process, does not have is explained."""
    monkeypatch.setattr(os, "environ", dict(LOCAL_RANK="3"))
    for found, *words in ((0, "--device cuda", "--device cpu"), (2, "process 3", "--nproc_per_node=2")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
        raises(lambda: data.start_processes("cuda"), *words)


# ---- model.py ----


@pytest.mark.parametrize("loss", ["fm", "meanflow", "cafm"])
def test_model_checkpointing_blocks(loss):
    """Gradients are the same to the last bit but for cafm's second ones (1e-6), and much less is saved for
    backward."""
    cfg, objective, draws = train.configure(loss, batch=16), losses.find(loss), data.Draws(0, range(16))
    G, D = tiny(depth=8, **objective.network(cfg, None)), tiny(model.discriminator, depth=8, norm="rms")
    x, y, found = torch.randn(16, 3, 8, 8), torch.arange(16) % 10, {}
    net, value = G, lambda: objective.G(G, x, y, draws, cfg)[0]
    if objective.D:
        net, value = D, lambda: objective.D(D, x, y, draws, cfg, G)[0]
    for on in (False, True):
        saved, (net.trunk if objective.D else net).checkpointing = {}, on
        pack = lambda x: saved.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = value()
        gradients = torch.autograd.grad(out, parameters_of(net), allow_unused=True, materialize_grads=True)
        found[on] = sum(saved.values()), gradients
    for a, b in zip(found[False][1], found[True][1]):
        assert torch.equal(a, b) or objective.D and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert objective.D or found[True][0] < 0.4 * found[False][0], found


def test_model_names_and_shapes_are_the_official_ones():
    """S/2 and XL/2 have the 132 and 292 tensors of the official files, by name, shape and total count."""
    for name, tensors, values, W, depth in (("SiT-S/2", 132, 32_963_360, 384, 12),
                                            ("SiT-XL/2", 292, 675_129_632, 1152, 28)):
        with torch.device("meta"):
            net = model.create(name, learn_sigma=True)
        layers = {"t_embedder.mlp.0": (W, 256), "t_embedder.mlp.2": (W, W), "final_layer.linear": (32, W),
                  "final_layer.adaLN_modulation.1": (2 * W, W), "x_embedder.proj": (W, 4, 2, 2)}
        inside = {"attn.qkv": (3 * W, W), "attn.proj": (W, W), "mlp.fc1": (4 * W, W), "mlp.fc2": (W, 4 * W),
                  "adaLN_modulation.1": (6 * W, W)}
        layers |= {f"blocks.{i}.{layer}": shape for i in range(depth) for layer, shape in inside.items()}
        expected = {"pos_embed": (1, 256, W), "y_embedder.embedding_table.weight": (1001, W)}
        for layer, shape in layers.items():
            expected |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
        state, norms = net.state_dict(), [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
        assert {k: tuple(v.shape) for k, v in state.items()} == expected
        assert len(state) == tensors and sum(v.numel() for v in state.values()) == values
        assert len(norms) == 2 * depth + 1 and all(m.eps == 1e-6 for m in norms)


def naive_attention(q, k, v):
    S = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    e = torch.exp(S - S.amax(-1, keepdim=True).detach())
    return torch.einsum("bhnm,bhmd->bhnd", e / e.sum(-1, keepdim=True), v)


def test_model_attention_and_all_its_derivatives():
    """Value and gradients of each backend against naive float64 attention, also for cross lengths and large
    logits: 1e-10 in float64, 1e-5 in float32. Plain attention passes torch's numerical checks of backward,
    forward mode, double backward and gradients of tangents."""
    def error(attend, dtype):
        results = []
        for call, kind in ((attend, dtype), (naive_attention, torch.float64)):
            inputs = [x.to(kind).requires_grad_() for x in exact]
            results.append([call(*inputs), *torch.autograd.grad(call(*inputs), inputs, G.to(kind))])
        return torch.stack([(a - b).norm() / b.norm().clamp_min(1) for a, b in zip(*results)]).max()

    torch.manual_seed(0)
    shapes = [(N, N, d, 1) for N in (1, 17, 64, 257) for d in (8, 32, 64, 72, 80)]
    for N, M, d, size in shapes + [(17, 40, 72, 1), (64, 5, 8, 1), (64, 64, 32, 10)]:
        exact = [scale * torch.randn(2, 2, n, d).double() for n, scale in ((N, size), (M, 1), (M, 1))]
        G = torch.randn(2, 2, N, d).double()
        for backend in ("fused", "plain"):
            with model.attention_backend(backend):
                assert error(model.attention, torch.float64) < 1e-10, (backend, N, M, d, size)
                assert error(model.attention, torch.float32) < 1e-5, (backend, N, M, d, size)
    inputs = tuple(torch.randn(1, 2, n, 4).double().requires_grad_() for n in (5, 3, 3))
    assert torch.autograd.gradcheck(model.attention_plain, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(model.attention_plain, inputs, check_fwd_over_rev=True)


def test_model_attention_backend_is_chosen_in_the_open(monkeypatch):
    """Fused unless asked otherwise, and again after the block, also after an error in it; fused has no
    forward mode and says what to do; derivative routes choose their own backend."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    with pytest.raises(NotImplementedError, match="attention_backend"):
        torch.func.jvp(model.attention, (q, k, v), (q, k, v))
    used = []
    for name, call in {"other": model.attention_plain, **model.ATTENTION}.items():
        noted = lambda q, k, v, name=name, call=call: (used.append(name), call(q, k, v))[1]
        monkeypatch.setitem(model.ATTENTION, name, noted)
    with pytest.raises(ZeroDivisionError), model.attention_backend("other"):
        with model.attention_backend("plain"):
            model.attention(q, k, v)
        model.attention(q, k, v)
        1 / 0
    model.attention(q, k, v)
    assert used == ["plain", "other", "fused"]
    D, G, x, t, y = tiny(model.discriminator), tiny(), torch.randn(2, 3, 8, 8), torch.rand(2), torch.arange(2)
    for call, name in ((lambda: model.input_gradient(D, x, t, y), "plain"),
                       (lambda: model.input_gradient(D, x, t, y, backend="other"), "other"),
                       (lambda: model.input_gradient(D, x, t, y, create_graph=False), "fused"),
                       (lambda: model.time_derivative(G, x, t, y, x), "plain"),
                       (lambda: model.time_derivative(G, x, t, y, x, backend="other"), "other")):
        used.clear()
        call()
        assert used[-2:] == 2 * [name], used


def test_model_discriminator_is_alive_from_the_start():
    """A fresh D has adaLN-zero's dead gates and a live read-out: J = 0, and a gradient that ends that."""
    torch.manual_seed(0)
    D = model.discriminator(TINY)
    assert [*map(tuple, (D.dis_embed.shape, D.final_layer[1].weight.shape))] == [(32,), (1, 32)]
    v, u, x = torch.randn(3, 4, 3, 8, 8)
    out, J = double_backward(D, x, torch.rand(4), torch.arange(4), torch.stack([v, u]))
    assert D.final_layer[1].bias is None and out.shape == (4,) and J.abs().max() == 0
    cafm_loss(out, J).backward()
    assert D.trunk.blocks[0].adaLN_modulation[1].weight.grad.norm() > 1e-3


class Derivatives:
    """Inputs in float64 for losses on derivatives of a network with random weights everywhere."""

    def __init__(self, net):
        torch.manual_seed(1)
        self.net, trunk = net.double(), net.trunk if isinstance(net, model.Discriminator) else net
        self.x_t, self.v, self.u, self.w = torch.randn(4, 3, *getattr(trunk, "shape", (2,))).double().unbind()
        self.t, self.r = torch.tensor([[.1, .5, .9], [0., .2, .6]], dtype=torch.float64)
        self.y = torch.arange(3)

    def cafm_D(self, slopes=double_backward):
        return cafm_loss(*slopes(self.net, self.x_t, self.t, self.y, torch.stack([self.v, self.u])))

    def differences(self, D, x_t, t, y, directions):
        """In place of double_backward: the same by values of the network."""
        return D(x_t, t, y), torch.stack([self.difference(w) for w in directions])

    def difference(self, w, h=1e-3):
        """The derivative along (w, 1) by four values of the network: error h^4."""
        at = lambda s: self.net(self.x_t + s * w, self.t + s, self.y)
        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def check_parameter_gradient(loss, reference, net, directions=3, step=1e-4, tolerance=1e-5) -> None:
    """d loss / d parameters, by autograd, equals differences of `reference` along random unit vectors.

    The test for everything that differentiates a derivative, in float64. `reference` is the same loss with
    its derivatives replaced by differences, so that nothing of autograd is on the other side.
    """
    parameters = parameters_of(net)
    gradient = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    count = sum(p.numel() for p in parameters)
    typical = torch.cat([g.flatten() for g in gradient]).norm().item() / count ** 0.5
    for seed in range(directions):
        rng, values = torch.Generator().manual_seed(seed), []
        direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) / count ** 0.5 for p in parameters]
        for sign in (1, -2, 1):  # at + step, at - step, and back
            with torch.no_grad():
                for p, d in zip(parameters, direction):
                    p.add_(d, alpha=sign * step)
                values.append(reference().item())
        found = sum((g * d).sum().item() for g, d in zip(gradient, direction))
        difference = (values[0] - values[1]) / (2 * step)
        assert abs(found - difference) < tolerance * typical, f"autograd {found}, differences {difference}"


class PointD(nn.Module):
    """A discriminator of points (B, D)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 1))

    def forward(self, x_t, t, y):
        return self.layers(torch.cat([x_t, t[:, None]], 1))[:, 0]


DISCRIMINATORS = {"transformer": lambda: tiny(model.discriminator, norm="rms"), "points": PointD,
                  "transformer with LayerNorm": lambda: tiny(model.discriminator)}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_model_input_gradient_and_losses_on_it(name):
    """D's derivative along any direction is that of differences, and so is the gradient of CAFM's loss, which
    differentiates it once more, in parameter space. A wrong one is noticed. A D without a time has no
    slope."""
    case = Derivatives(DISCRIMINATORS[name]())
    inputs = case.x_t, case.t, case.y
    out, gradient, slope = model.input_gradient(case.net, *inputs, create_graph=False)
    assert not (out.requires_grad or gradient.requires_grad or slope.requires_grad)
    error = model.along(gradient, slope, case.w) - case.difference(case.w)
    assert error.norm() < 1e-7 * slope.norm().clamp_min(1)
    reference = lambda: case.cafm_D(case.differences)
    check_parameter_gradient(case.cafm_D, reference, case.net)
    detached = lambda *given: [part.detach() + 0 * case.net(*inputs) for part in double_backward(*given)]
    with pytest.raises(AssertionError, match="differences"):
        check_parameter_gradient(lambda: case.cafm_D(detached), reference, case.net)
    assert model.input_gradient(lambda x_t, t, y: x_t.flatten(1).sum(1), *inputs)[2].tolist() == [0, 0, 0]


def test_model_time_derivative():
    """u and du/dt along the flow of every kind of network against differences, without a graph, and with r
    fixed."""
    for net in (tiny(), tiny(norm="rms", predict="x")):
        case = Derivatives(net)
        u, du = model.time_derivative(case.net, case.x_t, case.t, case.y, case.v)
        assert (u - case.net(case.x_t, case.t, case.y)).abs().max() < 1e-12
        assert not du.requires_grad and (du - case.difference(case.v)).norm() < 1e-7 * du.norm()
    power = lambda x, t, y, r: x * losses.expand_dims(t - r, x) ** 2
    _, du = model.time_derivative(power, case.x_t, case.t, case.y, case.v, case.r)
    length = losses.expand_dims(case.t - case.r, du)
    assert torch.allclose(du, case.v * length ** 2 + 2 * case.x_t * length, atol=1e-12)


def test_model_derivatives_of_a_compiled_network():
    """torch.compile's wrapper is taken off for the derivative, and the ordinary forward beside it stays
    compiled."""
    D, case = tiny(model.discriminator).double(), Derivatives(tiny())
    compiled_D, compiled = (torch.compile(net, backend="aot_eager") for net in (D, case.net))
    inputs = case.x_t, case.t, case.y
    assert same(list(model.input_gradient(D, *inputs)), list(model.input_gradient(compiled_D, *inputs)))
    _, du = model.time_derivative(compiled, *inputs, case.v)
    assert same(du, model.time_derivative(case.net, *inputs, case.v)[1])
    (compiled(*inputs) - du).square().mean().backward()
    assert case.net.blocks[0].attn.qkv.weight.grad.norm() > 0


ROUTE_SCRIPT = """
import torch, torch.nn as nn
import data, model, THIS
class Step(nn.Module):  # what DDP wraps: the module that takes the derivative
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x, t, y, v, u):
        if isinstance(self.net, model.Discriminator):
            return THIS.cafm_loss(*THIS.double_backward(self.net, x, t, y, torch.stack([v, u])))
        _, du = model.time_derivative(self.net, x, t, y, v)
        return (self.net(x, t, y) - v + t.view(-1, 1, 1, 1) * du).square().mean()
data.start_processes("cpu")
x, v, u = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64, generator=data.generator("x")).unbind()
t, y, own = torch.tensor([.1, .3, .6, .9]).double(), torch.arange(4), slice(*((0, 2), (2, 4))[data.rank()])
for make in (model.discriminator, model.build):
    alone, net = THIS.tiny(make).double(), THIS.tiny(make).double()
    Step(alone)(x, t, y, v, u).backward()
    wrapped = nn.parallel.DistributedDataParallel(Step(net))
    for _ in range(2):  # the second backward pass shows whether the first left DDP in order
        wrapped(*(part[own] for part in (x, t, y, v, u))).backward()
    for a, b in zip(THIS.parameters_of(alone), THIS.parameters_of(net)):
        assert (2 * a.grad - b.grad).norm() <= 1e-10 * a.grad.norm(), make
    wrapped = nn.parallel.DistributedDataParallel(net)
    THIS.raises(lambda: model.input_gradient(wrapped, x, t, y), "gradient exchange")
    del wrapped
print("equal", flush=True)
data.stop_processes()
""".replace("THIS", cafm_loss.__module__)


def test_model_derivatives_under_two_processes(tmp_path):
    """Two gloo processes give the single process's gradient for double backward and time derivative; a
    derivative taken through DDP's wrapper is refused."""
    (tmp_path / "routes.py").write_text(ROUTE_SCRIPT)
    assert torchrun(2, tmp_path / "routes.py").stdout.count("equal") == 2


TOY_PART = """
import torch, model
from data import Dataset
class Ones(model.Part):
    extra_tokens = 1
    def __init__(self, shift=0.0, **config):
        super().__init__(**config)
        self.config |= dict(shift=shift)
        self.shift = torch.nn.Parameter(torch.full((), shift))
    def condition(self, t, y, *more):
        return super().condition(t, y, *more) + self.shift
    def trunk(self, x, c, y=None):
        return super().trunk(torch.cat([torch.ones_like(x[:, :1]), x], 1), c, y)
    def draw(self, x, c):
        return super().draw(x[:, 1:], c)
class Sampler(model.Part):
    generator_only = True
"""


@torch.no_grad()
def test_model_parts_of_extras(tmp_path, monkeypatch):
    """A config names classes of extras/ that change a DiT, in order, with settings of their own; checkpoints
    bring them back; D reads their token, and goes without those of generators only."""
    write_extra(tmp_path, monkeypatch, "toypart", TOY_PART)
    net, plain = tiny(parts=["toypart.Sampler", "toypart.Ones"], shift=2.0), tiny()
    assert [kind.__name__ for kind in type(net).__mro__[1:5]] == ["Sampler", "Ones", "Part", "DiT"]
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.arange(2)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "shift"})
    c, tokens = plain.condition(t, y) + net.shift, plain.embed(x) + plain.pos_embed
    tokens = plain.trunk(torch.cat([torch.ones(2, 1, 32), tokens], 1), c)
    assert torch.equal(net(x, t, y), plain.draw(tokens[:, 1:], c))
    loaded = model.load(save_tiny(tmp_path / "x.pt", net))
    assert loaded.config == net.config == TINY | loaded.config | dict(shift=2.0)
    assert torch.equal(loaded(x, t, y), net(x, t, y))
    D = tiny(model.discriminator, parts=net.config["parts"], colour="unknown")
    assert D.trunk.config["parts"] == ["toypart.Ones"] and not hasattr(D, "dis_embed")
    tokens = D.trunk.trunk(D.trunk.embed(x) + D.trunk.pos_embed, D.trunk.condition(t, y))
    assert torch.equal(D(x, t, y), D.final_layer(tokens[:, 0])[:, 0])
    monkeypatch.setitem(model.ZOO, "toypart-S", TINY | dict(parts=["toypart.Ones"]))
    created = model.create("toypart-S", ["toypart.Sampler"])
    assert created.config["parts"] == ["toypart.Ones", "toypart.Sampler"]


# ---- sample.py ----


def test_sample_renoise_keeps_a_gaussian():
    """With the exact way to the data, samples keep its mean and deviation in 1 and in 4 steps."""
    n, y = 40_000, torch.zeros(40_000).long()
    normal = lambda purpose, shape: torch.randn(n, *shape, generator=data.generator(purpose))
    draws = types.SimpleNamespace(normal=normal)
    for steps in (1, 4):
        x = sample.sample(GaussianMap(to_data=True), quantile_noise(n), y, steps, "renoise", draws=draws)
        assert abs(x.mean() - 0.7) < 0.01 and abs(x.std() - 0.4) < 0.01


@torch.no_grad()
def test_sample_guidance_of_networks_that_know_the_scale():
    """A network conditioned on the scale gets it inside the interval, in one call for a step."""
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    scaled = lambda x, t, y, r, w=torch.ones(2): torch.stack([t, r, w], 1)
    scaled.guidance_conditioned = scaled.null_class = True
    for guidance, interval, w in ((3.0, (0, 1), 3.0), (3.0, (.6, 1), 1.0), (1.0, (0, 1), 1.0)):
        assert sample.guided(scaled, guidance, interval)(x, .5, y, .25).tolist() == [[.5, .25, w]] * 2


def test_sample_guidance_sharpens_as_theory_says():
    """On two modes: s = 1 gives the class N(1.5, 0.5^2), classifier-free guidance overshoots its mean, an
    interval less so."""
    n, moments = 4000, []
    for options in ((), (3.,), (3., (.2, .7))):
        x = sample.sample(ExactNet(TWO_MODES), quantile_noise(n), torch.ones(n).long(), 80, "ab2", *options)
        moments.append((x.mean().item(), x.std().item()))
    plain, guided, in_interval = moments
    assert abs(plain[0] - 1.5) < .01 and abs(plain[1] - .5) < .01 and guided[0] > 1.9 and guided[1] < .35
    assert 1.6 < in_interval[0] < 1.8 and in_interval[1] < .35


def test_sample_noise_codec_and_state():
    """Noise may be given, latents are decoded, and what a state holds beside the image is left out."""
    numbers, zero = torch.linspace(-1, 1, 300), nn.Parameter(torch.zeros(1))
    net = network(lambda x, t, y, r: 2 * x, shape=(4, 8, 8), state=(300,), parameters=lambda: iter([zero]))
    codec = types.SimpleNamespace(image_shape=lambda shape: (3, *shape[1:]), decode=lambda x: -x[:, :3])
    noise = lambda draws, y, options: numbers.expand(len(y), 300)
    fakes = sample.generate(net, torch.arange(12), 0, 5, noise=noise, codec=codec, steps=1)
    want = data.to_uint8(numbers[:192].view(1, 3, 8, 8))
    assert torch.equal(torch.cat([x for _, x in fakes]), want.expand(12, 3, 8, 8))
    assert sample.image_shape(net, codec) == (3, 8, 8)


def test_sample_jumps_in_its_own_way(tmp_path, capsys):
    """A checkpoint of jumps brings its solver, which is not a matter of choice, and its number of steps."""
    jumps, own = str(tmp_path / "jumps.pt"), dict(solver="euler", guidance=1.0)
    save_tiny(jumps, sampling=own, config=dict(sample_steps=7))
    sample.main([jumps, "--out", str(tmp_path / "jumps.png"), "--n", "2", "--device", "cpu"])
    assert "euler, 7 steps, 7 network evaluations, no guidance, ema weights" in capsys.readouterr().out
    raises(lambda: sample.main([jumps, "--solver", "heun"]), "--solver heun", "out (it is euler)")


def test_sample_diverged_images_leave_no_file(tmp_path):
    """Non-finite samples stop with the count, and no scratch file or half-written output stays behind."""
    net, labels = tiny(predict="x"), sample.labels_for(4, 10)
    net.final_layer.linear.bias.data.fill_(float("nan"))
    for name in ("x.png", "x.npz"):
        fake = sample.generate(net, labels, 0, steps=1)
        raises(lambda: sample.write_samples(fake, labels, net.shape, tmp_path / name), "4 of 4")
    assert not list(tmp_path.iterdir())


def test_sample_says_how_it_was_done():
    """Every setting that changes the images stands in the line beside a number."""
    for guidance, options, words in (
            (2, dict(interval=(.1, 1.0)), "evaluations (doubled where guided), guidance 2 on t in [0.1, 1]"),
            (1, dict(shift=3.0), "heun, 4 steps, 7 network evaluations, grid shift 3 rho 1, no guidance"),
            (2, dict(rho=2.0), "rho 2 (doubled where guided), guidance 2"),
            (3, dict(conditioned=True), "evaluations, conditioned on guidance 3")):
        assert words in sample.describe(4, "heun", guidance, **options)


# ---- fid.py ----


def test_fid_frechet_of_covariances_that_do_not_commute():
    """With T = 1 + E symmetric positive, N(m, S) and N(m', T S T) are |m - m'|^2 + tr(E S E) apart: d = 64,
    2048."""
    for d in (64, 2048):
        mu1, cov1, mu2, cov2, exact = known_distance(d)
        assert (cov1 @ cov2 - cov2 @ cov1).abs().max() > 1e-4 and exact > 0.1
        assert abs(fid.frechet_distance(mu1, cov1, mu2, cov2) - exact) < 1e-9, d


def test_fid_names_of_scores(tmp_path):
    """fid only for the 2015-12-05 weights and 50,000 images, and other weights say so; as text each score
    has its reference beside it, and rounding does not make a distance negative."""
    official, other = (types.SimpleNamespace(flavour=s, suffix=s) for s in ("", "_torchvision"))
    names = [fid.score_name("fid", official, n) for n in (50_000, 49_999, 10_000, None)]
    assert names == ["fid", "fid49999", "fid10k", "fid_of_unknown_n"]
    names = [fid.score_name("fid", other, n) for n in (50_000, 5000)]
    assert names == ["fid_torchvision", "fid5k_torchvision"]
    assert fid.score_name("fid", fid.GlyphNet, 5000) == "fd_glyphs"
    assert fid.score_name("fid", TOY, 5) == "fd_toy"
    npz = write_npz(tmp_path / "real.npz", *REAL)
    first, *rest = fid.as_text(toy(npz, npz)).splitlines()
    assert all(word in first for word in ("fd_toy ", " 0.0000", "n 120, n_ref 120", "real.npz"))
    assert f"reference  {npz}" in rest and "resize     none" in rest
    scores = dict(fid5k=dict(value=-1e-9, bias=0.25, floor=None, n=5000, n_ref=1), accuracy=dict(value=0.5))
    text = fid.as_text(dict(scores=scores, reference="real", sampling="", n=5))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "fid5k 0.000000 bias 0.25, n 5,000, n_ref 1, against real", "accuracy 0.500000", "reference real",
        "n 5"]


def test_fid_frechet_rank_deficient():
    """Singular covariances: rank one is |u|^2 + |w|^2 - 2 |u.w|; without a common direction the traces add
    up; N < D samples match the singular values of X1 X2^T."""
    u, w, zero = rand(64, 1, seed=1), rand(64, 1, seed=2), torch.zeros(64)
    want = u.square().sum() + w.square().sum() - 2 * (u * w).sum().abs()
    assert abs(fid.frechet_distance(zero, u @ u.T, zero, w @ w.T) - want) < 1e-6
    few, rest = torch.linalg.qr(spd(64, 6)).Q.split((9, 55), 1)
    assert abs(fid.frechet_distance(zero, few @ few.T, zero, rest @ rest.T) - 64) < 1e-5
    for d, n, m in ((64, 30, 40), (512, 100, 200)):
        scale = torch.arange(1, d + 1) ** -0.5
        x, y = rand(n, d, seed=3) * scale, rand(m, d, seed=4) * scale
        x, y = x - x.mean(0), y - y.mean(0)
        trace = 2 * torch.linalg.svdvals(x @ y.T).sum() / ((n - 1) * (m - 1)) ** .5
        want = x.square().sum() / (n - 1) + y.square().sum() / (m - 1) - trace
        nil = torch.zeros(d)
        assert abs(fid.frechet_distance(nil, x.T @ x / (n - 1), nil, y.T @ y / (m - 1)) - want) < 1e-6
    x = x[:30, :64] - x[:30, :64].mean(0)
    one_sided = fid.frechet_distance(zero, x.T @ x / 29, zero, spd(64, 5))
    assert abs(one_sided - fid.frechet_distance(zero, spd(64, 5), zero, x.T @ x / 29)) < 1e-9


def test_fid_frechet_closed_forms():
    """1-D, shift, scaling, commuting, point mass, rotation, symmetry and self, at d = 64, to 1e-9."""
    d, c1, c2, m1, m2 = 64, spd(64, 1), spd(64, 2), rand(64, seed=3), rand(64, seed=4)
    fd, zero = fid.frechet_distance, torch.zeros(64, 64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert abs(fd(one[0] * 2, one * 9, one[0] * 5, one * 25) - ((2 - 5) ** 2 + (3 - 5) ** 2)) < 1e-12
    assert abs(fd(m1, c1, m2, c1) - (m1 - m2).square().sum()) < 1e-9
    assert abs(fd(m1, c1, m1, c1)) < 1e-9
    assert abs(fd(m1, c1, m1, 4 * c1) - c1.trace()) < 1e-9
    q, a, b = torch.linalg.qr(c1).Q, torch.rand(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64)
    assert abs(fd(m1, q * a @ q.T, m1, q * b @ q.T) - (a.sqrt() - b.sqrt()).square().sum()) < 1e-9
    assert abs(fd(m1, c1, m2, zero) - (m1 - m2).square().sum() - c1.trace()) < 1e-9
    assert abs(fd(m1, c1, m2, c2) - fd(m2, c2, m1, c1)) < 1e-9
    assert abs(fd(m1, c1, m2, c2) - fd(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)) < 1e-9


# ---- train.py ----


def test_train_log_lines(tmp_path):
    """A line has, of each role, the means over the steps since the last line, and the learning rate of its
    last step. An infinite number stops the run as NaN does, before the line is written."""
    rows = {}
    for every in (1, 4):
        options = dict(steps=8, log_every=every, warmup=3, decay="linear")
        train.train(cfg := tiny_run(tmp_path / str(every), "afm", **options))
        rows[every] = logged(tmp_path / str(every))
    for line in rows[4]:
        own = [row for row in rows[1] if row["role"] == line["role"] and 0 <= line["step"] - row["step"] < 4]
        assert line["lr"] == own[-1]["lr"] == train.learning_rate(own[-1]["step"] - 1, cfg, line["role"])
        assert len(own) > 1 and own[0]["lr"] != line["lr"] and own[0]["loss"] != own[-1]["loss"]
        for key in line.keys() - {"step", "role", "lr", "images_per_second"}:
            assert abs(line[key] - np.mean([row[key] for row in own])) <= 1e-6 * abs(line[key]), key
    assert [(row["step"], row["role"]) for row in rows[4]] == [(4, "D"), (4, "G"), (8, "D"), (8, "G")]
    for value in (math.inf, -math.inf, math.nan):
        log = train.Log(tmp_path / "log.jsonl", 0)
        log.note(3, "G", {"loss": torch.tensor(1.0), "flow": torch.tensor(value)}, 0.1)
        with pytest.raises(ValueError, match=f"step 3, network G: flow is {value}"):
            log.flush(cfg, None)
    assert not (tmp_path / "log.jsonl").exists()


def test_train_amp_and_compile_reach_the_networks(tmp_path, monkeypatch):
    """--amp bf16 runs the blocks of every network under bfloat16 on a CPU too, auto and off do not; weights
    stay in float32; --compile compiles the network of each role."""
    seen, compiled, attend = set(), [], model.attention
    monkeypatch.setattr(model, "attention", lambda q, k, v: seen.add(q.dtype) or attend(q, k, v))
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    for amp, want in (("bf16", torch.bfloat16), ("auto", torch.float32), ("off", torch.float32)):
        train.train(tiny_run(tmp_path / amp, "afm", steps=2, amp=amp, compile=amp == "off"))
        assert seen == {want} and len(compiled) == 2 * (amp == "off"), amp
        seen.clear()
        networks = checkpoint(tmp_path / amp)["networks"].values()
        assert {v.dtype for net in networks for v in net["weights"].values()} == {torch.float32}
    assert {type(net).__name__ for net in compiled} == {"Discriminator", "DiT"}


def test_train_refuses_to_resume_as_another_network_or_sampler(tmp_path, capsys, monkeypatch):
    """A flag of the objective is fixed where it changes the network alone, or the sampling alone; one that
    changes neither is told, and goes on."""
    flags = {name: data.option(1, "a number") for name in ("jumps_of_net", "steps_of_sampler", "weight")}
    resumed = dataclasses.replace(losses.find("fm"), name="resumed", flags=flags,
                                  network=lambda cfg, source: dict(times=cfg.jumps_of_net),
                                  sampling=lambda cfg: dict(steps=cfg.steps_of_sampler))
    monkeypatch.setitem(losses.LOSSES, "resumed", resumed)
    cfg = train.configure("resumed")
    for name in flags:
        old = dict(networks={"G": {}}, step=1, seconds=0.0, config=dataclasses.asdict(cfg) | {name: 2})
        call = functools.partial(train.check_resume, tmp_path / "last.pt", old, cfg, None)
        if name == "weight":
            call()
        else:
            raises(call, f"--{name} 2, not 1", "--init")
    assert capsys.readouterr().err.count("resuming with") == 1


def test_train_alarms(tmp_path, capsys):
    """An alarm is told once: D that wins; D that is dead, at its indifferent loss and without slope; targets
    of ect that run away; a generator whose samples of a class are alike, not one of the data's variety."""
    log = train.Log(tmp_path / "log.jsonl", 0, losses.find("cafm").alarm)
    for step, value in ((0, 1.9), (1, 0.1), (2, 0.05)):
        log.note(step, "D", {"loss": torch.tensor(value)}, 0.1)
        log.note(step, "G", {"loss": torch.tensor(0.01)}, 0.2)
        log.flush(train.Config(), types.SimpleNamespace(set_postfix=lambda **_: None))
    told = capsys.readouterr().err
    assert told.count("the discriminator wins") == 1 and "step 2" in told and "0.100" in told
    assert [(row["role"], row["lr"]) for row in logged(tmp_path)] == [("D", 0.1), ("G", 0.2)] * 3
    first = dict(role="D", step=100, loss=2.0)
    for name, loss, r1, word in (("afm", 0.692, 1e-4, "dead"), ("afm", 0.692, 1e-2, ""), ("afm", 0.66, 0, ""),
                                 ("afm", 0.04, 1, "wins"), ("cafm", 1.995, 0, "dead"), ("cafm", 0.6, 0, "")):
        alarm, row = losses.find(name).alarm, dict(role="D", loss=loss, r1=r1, step=200)
        assert word in alarm(row, first) and bool(word) == bool(alarm(row, first))
        assert not alarm(row | dict(step=100), first) and not alarm(row | dict(role="G"), first)
    grows = losses.find("ect").alarm
    assert "run away" in grows(dict(loss=0.9), dict(loss=0.4)) and not grows(dict(loss=0.7), dict(loss=0.4))
    source, labels = data.dataset(str(SMALL_SET)), sample.labels_for(40, 10)
    images = data.glyphs(40, 32, 5)[0]
    for share, told in ((1.0, False), (0.7, False), (0.4, True), (0.0, True)):
        alike = share * images + (1 - share) * images[labels]
        notes.warn_of_sameness([(list(range(40)), alike.to(torch.uint8))], labels, source)
        assert ("forgets its noise" in capsys.readouterr().err) == told, share
