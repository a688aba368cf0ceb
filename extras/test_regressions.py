"""Tests of pafm, carflow, soflow, shortcut, scm, imf, meanflow_guided, curriculum, controls, mixture."""
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import losses
import model
import sample
import train
from extras import carflow, controls, curriculum, guidance, imf, meanflow_guided, mixture, pafm, scm
from extras import shortcut, soflow
from extras.gaussians import FOUR_MODES, Mixture, exact_velocity
from extras.test_core import (TWO_MODES, ByLabel, Given, Weighted, assert_composition, assert_same_loss,
                              of_velocity, one_step_case, oracle_gradient, standard_errors, wrong_maps)
from test_all import (HERE, SMALL_SET, GaussianMap, assert_close_runs, assert_same_state, checkpoint,
                      error_of, in_float64, network, on_points, raises, save_tiny, tiny, tiny_run)

# ---- pafm ----


def test_pafm_bank_draws_from_the_class():
    """Candidates are images of the sample's class, each equally often, functions of the position; half are
    mirrored where images are; a class with few images repeats them. Their latents' draws are their own."""
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 3, 4, 4)
    images[..., 0] += 100
    source = data.Arrays(images, torch.tensor([0] * 7 + [1] * 3 + [3] * 2), None)
    bank, draws = pafm.Bank(source, 5, 0), data.Draws(0, range(600))
    y = torch.arange(600) % 4
    y[y == 2] = 1  # no image has this class
    seen = ((bank(y, draws, 3)[:, :, 0, 0, 3] + 1) * 127.5).round()
    counts = [seen[y == k].flatten().long().bincount(minlength=12) for k in range(4)]
    assert counts[0][:7].gt(0).sum() == 5 and counts[0][7:].sum() == 0                       # 5 of the 7
    assert counts[0][counts[0] > 0].min() > 60
    assert (counts[1].nonzero()[:, 0] == torch.tensor([7, 8, 9])).all() and counts[3][10:].sum() == 450
    assert torch.equal(bank(y[5:9], data.Draws(0, range(5, 9)), 3), bank(y, draws, 3)[5:9])
    chosen = [pafm.Bank(source, 5, seed).items[0, :, 0, 0, 3].sort().values.tolist() for seed in range(9)]
    assert len(set(map(tuple, chosen))) > 1
    there, turned = (b(y, draws, 3) for b in (bank, pafm.Bank(source, 5, 0, mirror=True)))
    assert (there[..., 0] > there[..., 3]).all()
    assert 0.45 < (turned[..., 0] > turned[..., 3]).float().mean() < 0.55
    source.clean = lambda items, draws: draws.normal("posterior", (1,))
    noise = torch.cat([bank(y, draws, 2)[..., 0], draws.normal("posterior", (1,))], 1)
    assert (noise.T.corrcoef() - torch.eye(3)).abs().max() < 0.15


def all_of(points):
    """As a bank, but all other points in their order: x must be first of them all."""
    return lambda y, draws, n: points[1:1 + n].expand(len(y), -1, -1)


def test_pafm_target():
    """K = 1 is flow matching bit for bit. With all points as candidates the target is the velocity of the
    empirical distribution; copies of x have no spread; large dimensions and small times lose no digits."""
    points = torch.tensor([[-1.], [-.97], [.9], [1.1]]).double()  # two that t = 0.03 cannot tell apart
    x, draws, seen = points[:1].expand(50, 1), mixture.BatchDraws(0, 0, 50), []
    net = network(lambda x_t, t, y, r=None: seen.append((x_t, t)) or torch.zeros_like(x_t))
    y, cfg = torch.zeros(50).long(), on_points("pafm", candidates=4)
    loss, logs = pafm.pafm(net, x, y, draws, cfg, all_of(points))
    empirical = Mixture(points, torch.zeros(4).double(), torch.full((4,), .25).double())
    (x_t, t), = seen
    assert t.min() < 0.05 and abs(loss - empirical.velocity(x_t, t.double()).square().mean()) < 1e-6 * loss
    cfg = on_points("pafm", candidates=1)
    one = pafm.pafm(net, x.float(), None, draws, cfg, None)
    assert one[0] == losses.fm(net, x.float(), None, draws, cfg)[0] and one[1]["spread"] == 0
    for predict in ("x", "v"):
        DiT, images, y = tiny(predict=predict), torch.rand(50, 3, 8, 8) * 2 - 1, torch.arange(50) % 10
        draws, cfg = data.Draws(0, range(50)), train.configure("pafm", candidates=1)
        assert pafm.pafm(DiT, images, y, draws, cfg, None)[0] == losses.fm(DiT, images, y, draws, cfg)[0]
        DiT.draw = lambda *_: images if predict == "x" else 0 * images  # noqa: B023
        copies = lambda y, draws, n: images[:, None].expand(-1, n, -1, -1, -1)  # noqa: E731, B023
        loss, logs = pafm.pafm(DiT, images, y, draws, train.configure("pafm", candidates=3), copies)
        assert logs["spread"] == 0 and (predict == "v" or loss < 1e-9)
    t = torch.tensor([[.003], [.05], [.3], [.7], [.95]])
    x, e, others = torch.randn(5, 500), torch.randn(5, 500), torch.randn(5, 7, 500)
    others = x[:, None] + t[:, None] * others / 20  # noise of size t hardly tells them from x
    single, double = (pafm.posterior_mean(*(part.to(dtype) for part in (x, e, t[:, 0], others)))[0]
                      for dtype in (torch.float32, torch.float64))
    assert ((single - double) / t).abs().max() < 1e-4 and ((double - x) / t).abs().amax(1).min() > 1e-2


def test_pafm_is_unbiased_and_varies_less(monkeypatch):
    """At the exact velocity the mean gradient is 0 for every K, clearly not where x is left out of the
    candidates; the loss there, which is the target's variance, falls with K."""
    values, exact = {}, pafm.posterior_mean

    def without(x, e, t, others):
        """The same with weights for others alone: their mean given x_t."""
        x_t, first = losses.interpolate(x, e, t), others[:, 0]
        away = (x_t - losses.interpolate(first, 0 * e, t)) / t[:, None].clamp_min(1e-3)
        return exact(first, away, t, others[:, 1:])

    def errors(K):
        net = Weighted(of_velocity, TWO_MODES.velocity)

        def loss(k):
            x, y = TWO_MODES.sample(1000, data.generator("pafm", k))
            more = TWO_MODES.sample(16_000, data.generator("pafm others", k))[0].view(1000, 16, 1)
            draws, cfg = mixture.BatchDraws(5, k, 1000), on_points("pafm", candidates=K)
            values[K] = pafm.pafm(net, x, y, draws, cfg, lambda y, draws, n: more[:, :n])[0]
            return values[K]
        return standard_errors(loss, net, 25)

    assert max(errors(K) for K in (4, 2, 16, 1)) < 4
    assert values[1] > values[2] > values[4] > values[16] > 0 and values[16] < 0.4 * values[1]
    monkeypatch.setattr(pafm, "posterior_mean", without)
    assert errors(4) > 6


# ---- carflow ----


def test_carflow_is_the_papers():
    """In moved coordinates z_t: the loss |v_z(z_t) - (z_1 - z_0)|^2, its gradients in both shifts too; shifts
    of 0 are plain flow matching, from which a run can start; the sampler starts at e + a, ends at z - b."""
    net = tiny(parts=["carflow.Shifts"], null_class=False).double()
    plain = model.build(net.config | dict(parts=[])).double().eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("_shift")})
    x, y, draws = torch.randn(8, 3, 8, 8).double(), torch.arange(8), data.Draws(0, range(8))
    cfg, e = train.configure("carflow"), draws.normal("noise", (3, 8, 8)).double()
    t = losses.sample_times(draws, cfg).double()
    loss, _ = losses.find("carflow").G(net, x, y, draws, cfg)
    loss.backward()
    a, b = (shift.detach().requires_grad_() for shift in net.shifts(y))
    z0, z1 = x + b, e + a
    want = (plain(losses.interpolate(z0, z1, t), t, y) - (z1 - z0)).square().mean()
    want.backward()
    assert abs(loss - want) < 1e-6
    for shift, own in ((net.source_shift, a), (net.target_shift, b)):
        assert (shift.grad[:8] - carflow.SLOWER * own.grad).abs().max() < 1e-7 < own.grad.abs().max()
        assert shift.grad[8:].abs().max() == 0
    with torch.no_grad():
        z = sample.sample(plain, e + a, y, 7)
        assert (sample.sample(net, e, y, 7) - (z - b)).abs().max() < 1e-9
        assert same_function(net, plain, x, t, y) is False
        net.load_state_dict(model.build(net.config).double().inherit(plain))
        assert same_function(net, plain, x, t, y)
    fresh = model.create("glyph-S", parts=["carflow.Shifts"])
    assert not fresh.source_shift.any() and fresh.target_shift.shape == (11, 3, 32, 32)
    assert "carflow.Shifts" not in model.discriminator(fresh.config).trunk.config["parts"]


def same_function(net, other, *inputs) -> bool:
    return torch.equal(net(*inputs), other(*inputs))


class ShiftedOptimum(nn.Module):
    """Shifts a + weight, b + extra + weight around the best velocity for shifts a, b of TWO_MODES."""
    predict, t_min, null_class = "v", 0.0, False
    a, b = torch.tensor([[.3], [-1.]]).double(), torch.tensor([[1.], [.2]]).double()

    def __init__(self, extra):
        super().__init__()
        self.extra, self.weight = extra, nn.Parameter(torch.zeros(4).double())

    def forward(self, x_t, t, y, r=None):
        def best(z, t):
            s, a, b = t[:, None], self.a[y], self.b[y]
            return TWO_MODES.velocity(z - (1 - s) * b - s * a, t, y) + a - b

        source, target = self.a + self.weight[:2, None], self.b + self.extra + self.weight[2:, None]
        return carflow.shifted(best, source[y], target[y], x_t, t)


def test_carflow_optimum():
    """At the best velocity the gradient in the shifts is 0, which it is not at a velocity for other shifts.
    The loss there is pi s0 s / 2 for N(m, s^2) and N(0, s0^2): it does not see shifts, and a learned scale s0
    would run to 0."""
    cfg = on_points("carflow")

    def errors(extra):
        net = ShiftedOptimum(extra)

        def loss(k):
            x, y = TWO_MODES.sample(2000, data.generator("shifts", k))
            return losses.fm(net, x, y, mixture.BatchDraws(6, k, 2000), cfg)[0]
        return standard_errors(loss, net, 20)

    assert errors(0.0) < 4 and errors(0.3) > 8
    x, y = TWO_MODES.sample(40_000, data.generator("scale"))
    draws = mixture.BatchDraws(0, 0, 40_000)
    for s0 in (1.0, 0.5, 0.1):
        scaled = lambda *k: s0 * draws.normal(*k)  # noqa: B023, E731
        noise = types.SimpleNamespace(normal=scaled, uniform=draws.uniform)
        unit = dataclasses.replace(TWO_MODES, means=TWO_MODES.means / s0, stds=TWO_MODES.stds / s0)
        net = network(lambda x_t, t, y: s0 * unit.velocity(x_t / s0, t.double(), y))  # noqa: B023
        assert abs(losses.fm(net, x, y, noise, cfg)[0] / (math.pi / 2 * s0 * 0.5) - 1) < 0.04


def test_carflow_shortens_the_ways():
    """Trained equally long on N(-1.5, .2^2) and N(1.5, .2^2) with their labels, a network with shifts goes a
    shorter way from z_1 to z_0 (paper: 1.54 and 0.71) to samples no worse."""
    length = {}
    for kind in (carflow.LabelledPoints, carflow.ShiftedPoints):
        states, ends = carflow.ways(kind)
        assert abs(ends.abs().mean() - 1.5) < 0.1
        length[kind] = states.diff(dim=0).abs().sum(0).mean().item()
    plain, shifted = length.values()
    assert 1.3 < plain < 1.7 and shifted < 0.75 * plain, length


# ---- curriculum ----


def test_curriculum():
    """At stage k no time is below the k-th bound, and what is there keeps its distribution; after the last
    stage times are what they are without it; words that name no curriculum are refused."""
    n = 4000
    for kind in ("uniform", "logit_normal"):
        cfg = train.Config(time="curriculum:2" + (":uniform" if kind == "uniform" else ""), batch=n)
        base = losses.sample_times(data.Draws(1, range(n)), train.Config(time=kind))
        first = torch.tensor(6 - .6).sigmoid()
        for step, least in ((0, first), (1, first), (19, 0.5)):
            t = losses.sample_times(data.Draws(0, range(step * n, (step + 1) * n)), cfg)
            allowed = base[base >= least]
            assert t.min() >= least - 1e-6
            if step == 19:  # Kolmogorov-Smirnov at 1 %
                both = torch.cat([t, allowed]).sort().values
                a, b = (torch.searchsorted(part.sort().values, both) / len(part) for part in (t, allowed))
                assert (a - b).abs().max() < 1.63 * (1 / n + 1 / len(allowed)) ** .5
        for step in (38, 39, 1000):
            draws = data.Draws(0, range(step * n, step * n + 50))
            plain = losses.sample_times(draws, train.Config(time=kind, batch=n))
            assert torch.equal(losses.sample_times(draws, cfg), plain)
    for words in ("", ":0", ":-3", ":x", ":3:other", ":3:uniform:4"):
        cfg, draws = train.Config(time=f"curriculum{words}"), data.Draws(0, range(2))
        raises(lambda: losses.sample_times(draws, cfg), f"--time {cfg.time}:", "STEPS")  # noqa: B023


# ---- imf, soflow, shortcut, scm, meanflow_guided against closed forms and their papers' formulas ----


def test_one_step_oracles():
    """At the exact average velocity of a Gaussian the gradient of imf is 0 whatever p, on jumps and on a
    mixture of both kinds, and that of scm at the exact way to the data; a shifted or scaled map has a
    gradient. That of soflow falls like its step, which ends at 0.002."""
    boundary = dict(head=0, omega_max=1.0)
    for objective, jumps, to_data, step, more in ((imf.imf, True, False, 0, boundary | dict(p=0.0)),
                                                  (imf.imf, False, False, 0, boundary | dict(p=1.0)),
                                                  (scm.scm, True, True, 10_000, dict(data_std=1.1))):
        exact = GaussianMap(to_data=to_data)
        assert oracle_gradient(objective, exact, jumps, step, **more) < 1e-12, objective
        for wrong in wrong_maps(to_data=to_data):
            assert oracle_gradient(objective, wrong, jumps, step, **more) > 0.005, objective
    assert oracle_gradient(scm.scm, exact, step=0, data_std=1.1) > 0.005  # at first without du/dt
    far, near = (oracle_gradient(soflow.soflow, GaussianMap(), step=step) for step in (0, 5886))
    assert 8 < far / near < 12 and near < 2e-3, (far, near)  # steps of 0.1 and 0.01
    for wrong in wrong_maps():
        assert all(oracle_gradient(soflow.soflow, wrong, jumps, 10_000) > 0.01 for jumps in (True, False))


def test_imf_is_its_formula():
    """Value and gradient of both forms of imf, from the paper's formula by torch.func.jvp, with the network's
    own velocity as the tangent."""
    for head in (0, 1):
        net, x, y, draws, t, r, x_t, v = one_step_case(heads=1 + head)
        own = (net(x_t, t, y, t, head=True)[1] if head else net(x_t, t, y, t)).detach()
        _, dudt = torch.func.jvp(lambda x_t, t: net(x_t, t, y, r), (x_t, t), (own, torch.ones_like(t)))
        errors = [net(x_t, t, y, r) + (t - r)[:, None] * dudt.detach() - v]
        if head:
            errors.append(net(x_t, t, y, r, head=True)[1] - v)
        want = sum((l / (l.detach() + 0.01 / 2)).mean() for l in (error.square().mean(1) for error in errors))
        loss, logs = imf.imf(net, x, y, draws, on_points("imf", p=1.0, head=head, omega_max=1.0))
        assert_same_loss(loss, want, net)
        assert abs(logs["jump"] / errors[0].square().mean() - 1) < 1e-9 and logs["flow"] == 0


def test_soflow_is_its_formula():
    """Value and gradient of a jump's loss are those of half the squared gap of two solutions, weighted."""
    net, x, y, draws, t, r, x_t, v = one_step_case()
    l = t - 0.1 * (t - r)  # noqa: E741
    f = lambda x, t: x - (t - r)[:, None] * net(x, t, y, r)  # noqa: E731
    gap = f(x_t, t) - f(x_t - (t - l)[:, None] * v, l).detach()
    q = (gap / (t - l)[:, None]).detach().square().mean(1)
    weight = 1 / (q + 0.01)
    loss, logs = soflow.soflow(net, x, y, draws, on_points("soflow", p=1.0))
    assert abs(loss / (0.5 * weight * q).mean() - 1) < 1e-9 and abs(logs["jump"] / q.mean() - 1) < 1e-9
    paper = (0.5 * gap.square().mean(1) * weight / ((t - r) * (t - l))).mean()  # b = r - t
    for a, b in zip(*(torch.autograd.grad(value, list(net.parameters())) for value in (loss, paper))):
        assert (a - b).norm() < 1e-9 * (1 + b.norm())


def test_scm_is_trigflows():
    """Value and gradient are those of TrigFlow, computed on its circle x_a = cos a x + sin a sd e by
    torch.func.jvp: F, its derivative, g, the normalisation; du/dt comes in over a fifth of the run."""
    net, x, y, draws, t, _, x_t, v = one_step_case(times=1)
    draws.positions, sd = range(9, 10), 0.6
    a = torch.atan(t / (1 - t) / sd)

    def F(x_a, a):
        scale = (a.cos() + sd * a.sin())[:, None]
        t = sd * a.sin() / scale[:, 0]
        f = x_a / scale - t[:, None] * net(x_a / scale, t)
        return (a.cos()[:, None] * x_a - f) / (sd * a.sin())[:, None]

    cos, sin = a.cos()[:, None], a.sin()[:, None]
    x_a, dx = cos * x + sin * sd * draws.e, cos * sd * draws.e - sin * x
    _, dF = torch.func.jvp(F, (x_a, a), (dx, torch.ones_like(a)))
    g = (-cos ** 2 * (sd * F(x_a, a) - dx) - cos * sin * (x_a + sd * dF)).detach()
    g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    want = (F(x_a, a) - F(x_a, a).detach() - g).square().mean()
    assert_same_loss(scm.scm(net, x, y, draws, on_points("scm", steps=10, data_std=sd))[0], want, net)
    draws.positions = range(1, 2)  # half of the warm-up
    _, dudt = torch.func.jvp(lambda x_t, t: net(x_t, t, y), (x_t, t), (v, torch.ones_like(t)))
    dfdt = v - net(x_t, t) - 0.5 * t[:, None] * dudt
    size = (1 - t) * ((sd * (1 - t)) ** 2 + t ** 2).sqrt() * dfdt.square().mean(1).sqrt()
    loss, logs = scm.scm(net, x, y, draws, on_points("scm", steps=11, data_std=sd))
    assert abs(loss / (size / (size + 0.1)).square().mean() - 1) < 1e-9
    assert abs(logs["tangent"] / size.mean() - 1) < 1e-9


def test_shortcut_halves_and_grid():
    """Exact maps have no loss on jumps, others have; jumps have the lengths 1 .. 2 / finest and start on
    their own grid; the other samples are the shortest and learn v; omega guides the shortest halves alone."""
    n, rng = 400, torch.Generator().manual_seed(0)
    u = {name: torch.rand(n, generator=rng, dtype=torch.float64) for name in ("time", "length_of_the_jump")}
    x, e = torch.randn(2, n, 1, generator=rng, dtype=torch.float64)
    y, draws = torch.zeros(n).long(), Given(e, jump_or_flow=torch.full((n,), 0.99), **u)
    flow, cfg = Given(e, jump_or_flow=torch.zeros(n), **u), on_points("shortcut", finest=16)
    exact, other = (shortcut.shortcut(GaussianMap(wrong=wrong), x, y, draws, cfg)[0] for wrong in (1.0, 1.05))
    assert exact < 1e-24 and other > 1e-6
    net = ByLabel(3., 3., 1.)
    loss, logs = shortcut.shortcut(net, x, y, draws, on_points("shortcut", finest=16, omega=2.0))
    shortest = (u["length_of_the_jump"] ** 1.5 >= 0.75).double().mean()
    # there 1 + 2 (3 - 1) = 5, in longer ones 3
    assert abs(loss - shortest * 4) < 1e-6 and abs(logs["jump"] - loss) < 1e-6 and logs["flow"] == 0
    t, r, _ = net.seen[0]
    assert (1 / (t - r)).round().unique().tolist() == [1, 2, 4, 8] and t.max() == 1 and r.min() == 0
    assert ((t / (t - r)) % 1 == 0).all()
    loss, logs = shortcut.shortcut(net, x, y, flow, cfg)
    t, r, _ = net.seen[1]
    assert abs(loss - (3 - (e - x)).square().mean()) < 1e-6
    assert logs["jump"] == 0 and abs(logs["flow"] - loss) < 1e-6
    assert (t - r == 1 / 16).all() and len(t.unique()) == 16
    cfg = on_points("shortcut", finest=16, jump_low=0.4, time="logit_normal", time_mean=0.8, time_std=0.8)
    for drawn, start in ((draws, 0.4 + 0.6 * u["time"]), (flow, losses.sample_times(flow, cfg))):
        shortcut.shortcut(net, x, y, drawn, cfg)
        t, r, _ = net.seen[-1]
        assert (r <= start + 1e-9).all() and (start <= t + 1e-9).all() and t.min() < 0.51
    late = Given(e, **u | dict(jump_or_flow=torch.full((n,), 0.99), time=torch.full((n,), 1 - 2 ** -24)))
    shortcut.shortcut(net, x, y, late, on_points("shortcut", finest=16, jump_low=0.9))
    assert (net.seen[-1][0] == 1).all()  # where rounding gives a start of 1


def test_one_step_composition():
    """Jumps, labels and times are drawn as for meanflow, see `assert_composition`."""
    assert_composition("imf", head=0, omega_max=1.0)
    assert_composition("soflow")


def test_guided_velocity_has_its_fixed_point():
    """Where E v - u_null = d, a network at u_null + w d has no loss and no gradient, w = omega / (1 - kappa);
    without guidance, above guide_until and under the null label it is E v itself."""
    x, e, y = torch.zeros(8, 1), torch.full((8, 1), 1.5), torch.arange(8) % 2
    null, t = 0.5, torch.full((8,), 0.6)
    draws = Given(e, time=t, jumps_start=t, jumps_end=t / 2, jump_or_flow=torch.full((8,), 0.99))
    for name in ("meanflow_guided", "soflow"):
        objective = losses.find(name)

        def loss_of(net, y, **settings):
            cfg = on_points(name, jumps=0.2, **settings)  # noqa: B023
            return objective.G(net, x, y, draws, cfg, *objective.inputs("G", cfg, None, net))[0]  # noqa: B023

        for settings, w in (({}, 1.0), (dict(omega=1.0, kappa=0.5), 2.0), (dict(omega=0.2, kappa=0.92), 2.5),
                            (dict(omega=2.0), 2.0), (dict(omega=2.0, guide_until=0.59), 1.0),
                            (dict(omega=2.0, guide_until=0.61), 2.0)):
            for value, zero in ((null + w * (1.5 - null), True), (null + 1.2 * w * (1.5 - null), False)):
                net = ByLabel(value, value, null)
                loss = loss_of(net, y, **settings)
                assert (loss < 1e-10) == zero, (name, settings, value, loss)
                assert torch.autograd.grad(loss, net.values)[0][2] == 0, "no gradient through the guidance"
        null_error = loss_of(ByLabel(9.0, 9.0, 1.0), torch.full((8,), 2), omega=2.0)
        assert abs(null_error - (0.125 if name == "soflow" else 0.25)) < 1e-5  # (1.5 - 1)^2, or half of it


class Scaled(ByLabel):
    """A network conditioned on a scale w that is, at every point, null + w d under a label; notes w."""
    guidance_conditioned = True

    def forward(self, x_t, t, y, r=None, w=None):
        self.w, guided = w, super().forward(x_t, t, y, r)
        return torch.where((y == 2)[:, None], guided, self.values[2] + w[:, None] * (guided - self.values[2]))


def test_imf_guidance_is_an_input():
    """The network v_null + w (E v - v_null) has no loss, for scales with a density like 1 / w up to
    omega_max; another one has, and under the null label the target is the sample's velocity."""
    n, cfg = 4000, on_points("imf", omega_max=4.0, head=0)
    x, e, y, draws = torch.zeros(n, 1), torch.full((n, 1), 1.5), torch.arange(n) % 2, data.Draws(0, range(n))
    draws.normal = lambda *_: e
    for value, zero in ((1.5, True), (1.6, False)):
        net = Scaled(value, value, 0.5)
        loss, _ = imf.imf(net, x, y, draws, cfg)
        assert (loss < 1e-10) == zero, loss
        assert torch.autograd.grad(loss, net.values, retain_graph=True)[0].abs().max() < 1e-5 or not zero
    assert (net.w.log() / math.log(4) - draws.uniform("guidance scale")).abs().max() < 1e-6
    assert abs(imf.imf(Scaled(9., 9., 1.), x, torch.full((n,), 2), draws, cfg)[0] - 0.25) < 1e-6


# ---- imf's network, and sampling by it ----

IMF = dict(times=2, parts=["imf.Guidance", "imf.VelocityHead"], velocity_head=1)


def test_imf_velocity_head_and_guidance_scale():
    """A flow's weights in a network with a second time, a guidance scale and a velocity head are that flow,
    whatever r and w, on both ways, with JiT's layers too; from another depth they are refused. Without w is
    w = 1, and other w count; the head is another function once its weights are; it is no part of an ordinary
    call, nor of a D."""
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([.2, .5, .9]), torch.tensor([1, 2, 10])
    r, w = t / 2, torch.tensor([1., 2., 4.])
    jit = dict(parts=["jit.JiT"], norm="rms_weight", bottleneck=6, context=3, context_start=0)
    for like in ({}, jit):
        given = tiny(predict="x", **like)
        net = model.build(given.config | IMF | dict(parts=[*like.get("parts", []), *IMF["parts"]]))
        model.load_weights(net, net.inherit(given), "flow")
        u, v = net(x, t, y, r, w, head=True)
        assert torch.equal(u, given(x, t, y)) and torch.equal(v, u) and u.abs().mean() > 0.1
        fresh = {k: 2 * v for k, v in net.state_dict().items() if k not in given.state_dict()}
        net.load_state_dict(fresh, strict=False)
        again = model.build(net.config).inherit(net)  # from an imf run, whose head is its own
        assert len(fresh) > 20 and all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    net = tiny(predict="x", **IMF)
    u, v = net(x, t, y, r, w, head=True)
    assert torch.equal(u, net(x, t, y, r, w)) and (u - v).abs().mean() > 0.1 and u.shape == v.shape == x.shape
    assert torch.allclose(net(x, t, y, r), net(x, t, y, r, torch.ones(3)))
    assert torch.allclose(u[0], net(x, t, y, r)[0], atol=1e-6)
    assert (u - net(x, t, y, r))[1:].abs().mean() > 0.01
    del net.blocks[2], net.head_layer
    assert torch.equal(net(x, t, y, r, w), u)
    assert model.discriminator(net.config).trunk.config["parts"] == [] and net.config["depth"] == 2
    deep = tiny(predict="x", depth=3)
    raises(lambda: tiny(**IMF).inherit(deep), "3 blocks", "has 2")
    raises(lambda: tiny(**IMF | dict(velocity_head=3)), "head of 3", "1 to 2")
    late = jit | dict(parts=[*jit["parts"], *IMF["parts"]], context_start=1)
    raises(lambda: tiny(**IMF | late), "head of 1", "at block 1", "last 1 of 2")


def test_imf_checkpoints_its_blocks():
    """Gradients of both ways are the same with activation checkpointing; fresh weights leave both ways 0."""
    gradients = []
    for checkpointing in (False, True):
        net = tiny(**IMF)
        net.checkpointing = checkpointing
        x, t = torch.randn(2, 3, 8, 8, generator=data.generator(1)), torch.tensor([.2, .7])
        sum(out.square().sum() for out in net(x, t, torch.tensor([1, 2]), t / 2, head=True)).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    assert all(torch.allclose(gradients[0][k], gradients[1][k]) for k in gradients[0])
    fresh = model.create("glyph-S", predict="v", **IMF)
    outs = fresh(torch.randn(2, 3, 32, 32), t, torch.tensor([1, 2]), head=True)
    assert len(outs) == 2 and not any(out.any() for out in outs)


def test_sample_conditions_the_network_on_its_guidance():
    """A network that takes the scale gets it inside the interval, in one call; less than 1 is refused."""
    net = tiny(times=2, parts=["imf.Guidance"])
    x, y, t = torch.randn(4, 3, 8, 8), torch.arange(4), torch.full((4,), .5)
    with torch.no_grad():
        for scale, interval, w in ((3.0, (0, 1), 3.0), (3.0, (.6, 1), 1.0), (1.0, (0, 1), 1.0)):
            found = sample.guided(net, scale, interval)(x, .5, y, .25)
            assert torch.allclose(found, net(x, t, y, t / 2, torch.full((4,), w)), atol=1e-6)
    assert "at least 1" in error_of(sample.guided, net, 0.5)
    assert "no reference" in error_of(guidance.Guided, net, net)
    assert "conditioned on guidance 3" in sample.describe(1, "euler", 3.0, conditioned=True)


# ---- On the 1-D mixture ----


def test_losses_mixture_is_consistent():
    """The closed forms agree with one another: score = grad log density by autograd, score = -(x + (1 - t) v)
    / t, the flow map follows the velocity, and v of one component is the Gaussian's."""
    means = torch.tensor([[-1., 0.5], [1., 0.], [0., 2.]]).double()
    stds, weights = torch.tensor([[.2, .5, .3], [.3, .5, .2]]).double()
    x, t = torch.randn(50, 2).double().requires_grad_(), torch.rand(50, 1).double() * .9 + .05
    mixture = Mixture(means, stds, weights)
    std = (((1 - t) * stds) ** 2 + t ** 2).sqrt()
    parts = torch.distributions.Normal((1 - t[..., None]) * means, std[..., None])
    log_p = torch.logsumexp(parts.log_prob(x[:, None]).sum(-1) + weights.log(), 1)
    score = torch.autograd.grad(log_p.sum(), x)[0]
    assert (mixture.score(x, t[:, 0]) - score).abs().max() < 1e-12
    assert (-(x + (1 - t) * mixture.velocity(x, t[:, 0])) / t - score).abs().max() < 1e-11
    x, t, h = torch.randn(20, 1).double(), torch.full((20,), .6).double(), 1e-4
    slope = (TWO_MODES.flow(x, t, t + h) - TWO_MODES.flow(x, t, t - h)) / (2 * h)
    assert (slope - TWO_MODES.velocity(x, t)).abs().max() < 1e-6
    one = Mixture(TWO_MODES.means[1:], TWO_MODES.stds[1:], torch.ones(1).double())
    assert torch.allclose(TWO_MODES.velocity(x, t, torch.ones(20).long()), one.velocity(x, t))


@pytest.mark.parametrize("name, bound, predict", [
    ("meanflow", 0.6, "v"), ("imf", 0.6, "v"), ("soflow", 0.6, "v"), ("shortcut", 0.3, "v"),
    ("ect", 0.3, "v"), ("ect", 0.3, "x"), ("scm", 0.3, "v"), ("scm", 0.3, "x")])
def test_mixture_one_step_networks_learn_it(name, bound, predict):
    """A tenth of the full run brings one-step samples near the closed form, where fm's have W1 = 1 (three
    seeds gave 0.41 to 0.48, and 0.13 to 0.16). Without a boundary condition those that predict x get lost."""
    cfg = mixture.point_settings(name, steps=250, batch=256, predict=predict)
    errors = mixture.point_errors(mixture.train_points(name, FOUR_MODES, cfg), FOUR_MODES, 1)
    assert errors["W1"] < bound, errors


@pytest.mark.parametrize("name, steps, bounds", [
    ("fm", 800, dict(velocity=0.16, map=0.16, W1=0.08)),
    ("cafm", 1000, dict(velocity=0.4, W1=0.13, weight=0.08)), ("afm", 1000, dict(W1=0.15, weight=0.06))])
def test_mixture_networks_reach_the_exact_sampler(name, steps, bounds):
    """A part of the full run brings fm's velocity, flow map and samples, cafm's velocity and afm's one-step
    samples near the closed form."""
    net = mixture.train_points(name, FOUR_MODES, mixture.point_settings(name, steps=steps))
    errors = mixture.point_errors(net, FOUR_MODES, 1 if name == "afm" else 50)
    assert all(errors[key] < bound for key, bound in bounds.items()) and errors["in mode"] > 0.93, errors


def test_mixture_errors_are_zero_where_they_should_be():
    """At the exact velocity there is no error of it, 50 steps come near the exact map, and one step does not;
    exact jumps end alike in one step and in four; half of the way back there is half of the noise."""
    exact, modes = exact_velocity, FOUR_MODES
    errors = mixture.point_errors(exact, modes, 50)
    assert errors["velocity"] < 1e-6 and errors["map"] < 0.05 and errors["W1"] < 0.03
    assert errors["in mode"] > 0.99 and mixture.point_errors(exact, modes, 1)["W1"] > 0.9
    jump = lambda x, t, y, r: (x - modes.flow(x, t, r)) / (t - r)[:, None]  # noqa: E731
    e = torch.tensor([[-1.], [0.], [2.]]).double()
    ends = [mixture.trajectory(jump, e, steps)[-1] for steps in (1, 4)]
    assert (ends[0] - ends[1]).abs().max() < 1e-9
    states = mixture.trajectory(lambda x, t, *_: x / t[:, None], torch.ones(4000, 1), 2, "renoise")
    assert abs(states[1].std() - 0.5) < 0.02 and states[2].abs().max() < 1e-6


def test_mixture_run_alone_writes_the_picture(tmp_path, capsys, monkeypatch):
    """`python losses.py` and `python -m extras.NAME` print a line for each run and write a picture; what
    needs images is refused."""
    core = "fm", "meanflow", "ect", "afm", "cafm"
    command, out = ["--steps", "3", "--seed", "1", "--out"], tmp_path / "losses.png"
    mixture.main([*command, str(out)])
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("exact flow", *core)) and f"wrote {out}" in shown
    assert Image.open(out).size[0] > 800
    carflow.main([*command, str(out)])
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("fm", "carflow")) and f"wrote {out}" in shown
    captions = (np.asarray(Image.open(out))[:20] < 128).all(2)  # black, unlike the ways
    assert captions[:, :420].sum() > 50 < captions[:, 436:].sum()
    meanflow_guided.main()
    assert "2.50" in capsys.readouterr().out
    raises(lambda: mixture.main(["--losses", "carflow"]), "--losses carflow", "needs images")

    asked = {}
    monkeypatch.setattr(mixture, "show", lambda runs, out: asked.update({out: runs}))
    for module in (pafm, soflow, shortcut, scm, imf, curriculum, controls):
        module.main([*command, module.__name__])
    for out, names in (("pafm", ("fm", "pafm, 4 candidates", "pafm")), ("soflow", ("meanflow", "soflow")),
                       ("shortcut", ("meanflow", "shortcut")),
                       ("scm", ("ect", "scm", "ect, of x", "scm, of x")),
                       ("imf", ("meanflow", "imf")), ("curriculum", ("fm", "fm, curriculum")),
                       ("controls", controls.CONTROLS)):
        assert asked[f"extras.{out}"].keys() == dict.fromkeys(names).keys()
        for name, changes in asked[f"extras.{out}"].items():
            cfg = mixture.point_settings(name.split(",")[0], **changes)
            assert (cfg.steps, cfg.seed) == (3, 1)
            net = mixture.train_points(name.split(",")[0], FOUR_MODES, cfg)
            assert all(p.isfinite().all() for p in net.parameters()), name
    own = {name: mixture.point_settings(name.split(",")[0], **its) for name, its in controls.CONTROLS.items()}
    assert own["meanflow, no jumps"].jumps == own["imf, no head"].head == 0 < own["meanflow"].jumps
    assert own["afm, x, no transport cost"].ot == 0 < own["afm, x"].ot and own["imf"].head == 1
    assert own["cafm"].d_steps > own["cafm, 1 D step for 1 of G"].d_steps == 1 == own["meanflow, p = 1"].p


# ---- Runs ----

SMALL_FLOW = tiny(lambda _: model.create("tiny", predict="v"))
OWN = {"pafm": dict(candidates=3, bank=8), "carflow": {},
       "imf": dict(head=1, omega_max=4.0, time_mean=-0.4, p=0.5),
       "soflow": dict(jumps=0.5, kappa=0.5), "shortcut": dict(jumps=0.5, omega=2.0), "scm": {},
       "meanflow_guided": dict(jumps=0.5, omega=0.8, kappa=0.4),
       "refiner": dict(flow=str(save_tiny(SMALL_SET.with_name("flow_x.pt"), SMALL_FLOW)))}
# (processes, accumulation, how they share a network). soflow's steps are of two images, so that a process may
# have no jump; carflow's sharded blocks are checkpointed; pafm and shortcut call networks as others do.
SPLITS = dict.fromkeys(("pafm", "carflow", "meanflow_guided", "refiner"), [(2, 2, "replicated")])
SPLITS |= dict.fromkeys(("imf", "soflow", "shortcut", "scm"), [(2, 1, "replicated")])
for name in ("carflow", "imf", "soflow", "scm", "meanflow_guided", "refiner"):
    SPLITS[name] = [*SPLITS[name], (2, SPLITS[name][0][1], "shard")]


def float64_run(folder, loss, processes=1, accumulation=1, sharing="replicated"):
    """A run of 5 steps in float64 with AdamW, EMA and clipping; returns its folder."""
    out = folder / f"{loss} {processes} {accumulation} {sharing}"
    options = dict(data=str(folder / "glyphs.npz"), steps=5, batch=2 if loss == "soflow" else 8,
                   accumulation=accumulation, processes=sharing,
                   checkpointing=sharing == "shard" and loss == "carflow")
    with in_float64():
        train.train(tiny_run(out, loss, **options, **OWN[loss]))
    return out


@pytest.fixture(scope="module", autouse=True)
def two_process_runs(request, tmp_path_factory):
    """(folder, process): the runs of two processes, all in one torchrun, made beside the other tests."""
    if not any(item.name.startswith("test_two_processes_equal_one") for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("split")
    shutil.copyfile(SMALL_SET, folder / "glyphs.npz")
    (folder / "run.py").write_text(f"import sys\nfrom pathlib import Path\n"
                                   f"sys.path[:0] = {[str(HERE), os.path.dirname(__file__)]!r}\n"
                                   f"import {__name__} as tests\n"
                                   f"for loss, splits in tests.SPLITS.items():\n    for split in splits:\n"
                                   f"        tests.float64_run(Path({str(folder)!r}), loss, *split)\n")
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 --".split()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, *command, str(folder / "run.py")], stdout=output,
                                   stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   start_new_session=True)
    yield folder, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("loss", SPLITS)
def test_two_processes_equal_one(tmp_path, two_process_runs, loss):
    """After 5 steps in float64 with AdamW, EMA and clipping, two gloo processes, sharded or not, have the
    weights, averages and optimizers of one process to 1e-9, with and without accumulation, and its losses."""
    folder, process = two_process_runs
    assert process.wait(timeout=400) == 0, (folder / "output.txt").read_text()[-3000:]
    shutil.copyfile(SMALL_SET, tmp_path / "glyphs.npz")
    whole = float64_run(tmp_path, loss)
    for processes, accumulation, sharing in SPLITS[loss]:
        assert_close_runs(whole, folder / f"{loss} {processes} {accumulation} {sharing}")


@pytest.mark.parametrize("loss", ["pafm", "imf", "refiner"])
def test_resume_is_bitwise(tmp_path, loss):
    """10 steps, and 5 + resume + 5, give the same weights, averages and optimizers bit for bit."""
    a, b = tmp_path / "a", tmp_path / "b"
    train.train(tiny_run(a, loss, **OWN[loss]))
    assert train.train(tiny_run(b, loss, **OWN[loss]), until=5) == {}
    train.train(tiny_run(b, loss, resume=True, **OWN[loss]))
    assert_same_state(a, b)


def test_runs_start_from_a_flow_and_know_how_they_are_sampled(tmp_path, capsys):
    """A flow's weights start each method as that flow. sample.py takes the solver and the number of steps
    from the run, another number on request, and guidance only where the network is conditioned on it."""
    train.train(tiny_run(tmp_path / "fm", steps=1))
    flow, x = model.load(tmp_path / "fm/last.pt"), torch.randn(2, 3, 32, 32)
    t, y, told = torch.tensor([.3, .8]), torch.tensor([1, 10]), lambda: capsys.readouterr().out
    for loss, solver in (("imf", "euler"), ("soflow", "euler"), ("shortcut", "euler"), ("scm", "renoise"),
                         ("carflow", ""), ("pafm", "")):
        out = tmp_path / loss
        start = dict(init=str(tmp_path / "fm"), steps=1, lr=0.0, sample_steps=1)
        train.train(tiny_run(out, loss, **start, **OWN[loss]))
        net = model.load(out / "last.pt")
        assert torch.equal(net(x, t, y, t / 2), flow(x, t, y)), loss
        command = [str(out), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")]
        if not solver:
            assert model.read_checkpoint(out / "last.pt")["sampling"] == {}
            continue
        for steps in ([], ["--steps", "2"]):
            told()
            sample.main(command + steps)
            assert f"{solver}, {2 if steps else 1} steps" in told()
        other = "ab2" if solver == "renoise" else "heun"
        raises(lambda: sample.main([*command, "--solver", other]), f"--solver {other}", f"it is {solver}")
        if loss == "imf":
            sample.main([*command, "--guidance", "3"])
            assert "conditioned on guidance 3" in told()
        else:
            raises(lambda: sample.main([*command, "--guidance", "3"]), "--guidance 3", "it is 1")
            raises(lambda: guidance.main([*command, "--reference", str(tmp_path / "fm")]), "--reference")
    assert train.sampling(train.configure("imf"), 1.5)["guidance"] == 1.0


def test_refusals(tmp_path):
    """Settings that cannot be are refused in one line, before anything is written; so is another network on
    resuming."""
    for loss, options, words in (
            ("meanflow_guided", dict(kappa=1.0), ("--kappa 1.0",)),
            ("meanflow_guided", dict(jumps=0.95), ("--jumps 0.95", "--label_drop 0.1")),
            ("soflow", dict(omega=2.0, label_drop=0.0), ("--omega 2.0", "dropped labels")),
            ("soflow", dict(jumps=0.95), ("--jumps 0.95", "--label_drop 0.1")),
            ("imf", dict(omega_max=0.5), ("--omega_max 0.5", "at least 1")),
            ("imf", dict(omega_max=4.0, label_drop=0.0), ("--omega_max 4.0", "dropped labels")),
            ("imf", dict(jumps=0.95), ("--jumps 0.95", "--label_drop 0.1")),
            ("shortcut", dict(finest=12), ("--finest 12", "power of 2")),
            ("shortcut", dict(finest=1), ("--finest 1", "expected 2 to")),
            ("shortcut", dict(jumps=0.95), ("--jumps 0.95",)),
            ("shortcut", dict(omega=2.0, label_drop=0.0), ("--omega 2.0", "dropped labels")),
            ("scm", dict(data_std=0.0), ("--data_std 0.0",)),
            ("pafm", dict(candidates=0), ("--candidates 0", "at least 1")),
            ("pafm", dict(bank=0), ("--bank 0", "at least 1"))):
        raises(lambda: train.train(tiny_run(tmp_path / "no", loss, **options)), *words)  # noqa: B023
    assert not (tmp_path / "no").exists()
    raises(lambda: train.train(tiny_run(tmp_path / "net", "imf", head=9)), "head of 9", "1 to 3")
    own = dict(head=1, omega_max=4.0)
    train.train(tiny_run(tmp_path / "imf", "imf", steps=1, **own))
    for options, words in ((dict(head=2), "--head 1"), (dict(omega_max=1.0), "--omega_max 4.0")):
        cfg = tiny_run(tmp_path / "imf", "imf", resume=True, **own | options)
        raises(lambda: train.train(cfg), words)  # noqa: B023
    assert checkpoint(tmp_path / "imf")["networks"]["G"]["config"]["velocity_head"] == 1


def test_defaults():
    """The settings that each method brings along, from a flow and from scratch, and what it asks of the
    network."""
    from_flow = dict(lr=1e-3, sample_steps=1, jump_time="uniform", jump_low=0.2)
    for loss, settings in (
            ("pafm", dict(candidates=16, bank=256, time_mean=0.8, label_drop=0.1)),
            ("imf", dict(jumps=0.35, p=1.0, head=0, omega_max=1.0, **from_flow)),
            ("soflow", dict(jumps=0.5, p=1.0, amp="off", omega=1.0, **from_flow)),
            ("shortcut", dict(jumps=0.5, jump_low=0.2, finest=32, omega=1.0, sample_steps=1)),
            ("scm", dict(lr=1e-3, label_drop=0.0, time_mean=-1.0, time_std=1.4, data_std=0.42)),
            ("meanflow_guided", dict(jumps=0.5, p=1.0, omega=1.0, kappa=0.0, guide_until=1.0))):
        cfg = train.configure(loss, init="a flow")
        assert {name: getattr(cfg, name) for name in settings} == settings, loss
        assert train.configure(loss).lr == (1e-3 if loss == "scm" else 4e-3), loss
        times = losses.find(loss).network(cfg, None).get("times", 1)
        assert times == (1 if loss in ("pafm", "scm") else 2), loss
    cfg = train.configure("imf")
    assert losses.find("imf").network(cfg, None) == dict(times=2, parts=[])
