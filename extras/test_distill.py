"""Tests of distill, sim and dmd: networks that learn from a frozen flow."""
import math

import pytest
import torch
import torch.nn as nn

import data
import model
import sample
import train
from extras import distill, dmd, sim
from extras.test_core import TWO_MODES, ExactNet, Given, Weighted, of_velocity, standard_errors
from test_all import (SMALL_SET, checkpoint, network, on_points, quick_draws, raises, save_tiny, tiny,
                      tiny_run)

SMALL_FLOW = tiny(lambda options: model.create("tiny"))
SMALL_FLOW.load_state_dict({k: v if k == "pos_embed" else v / 4 for k, v in SMALL_FLOW.state_dict().items()})
SMALL_FLOW = save_tiny(SMALL_SET.with_name("flow.pt"), SMALL_FLOW)  # weights of 0.05, for losses about 1


def exact_flow(jumps: int = 0) -> nn.Module:
    """The exact velocity of two modes, linear for each of them, as a frozen network."""
    flow = ExactNet(TWO_MODES)
    flow.jumps = jumps
    return flow


# ---- Guided distillation ----


def guided(x, t, y, w):
    """The guided velocity of `exact_flow`, by another way than the loss has: the scores of the modes."""
    own, null = (TWO_MODES.velocity(x, t, labels) for labels in (y, None))
    return own + ((w - 1) * ((t > 0.2) & (t < 0.8)))[:, None] * (own - null)


def test_distill_learns_the_guided_velocity():
    """The guided velocity, for any w from 1 to omega_max, has no loss and no gradient; without guidance, with
    a scale that is one off, as the paper counts, or with the other sign there is one."""
    n = 400
    x, y = TWO_MODES.sample(n, data.generator("distill"))
    draws, cfg, seen = quick_draws(0, n), on_points("distill", omega_max=3.0), []

    def loss(student):
        net = network(lambda x_t, t, y, r, w: seen.append(w) or student(x_t, t, y, w))
        return distill.distill(net, x, y, draws, cfg, exact_flow())[0]

    assert loss(guided) < 1e-20 and 1 < seen[0].min() < 1.05 and 2.95 < seen[0].max() < 3
    for wrong in (lambda x, t, y, w: guided(x, t, y, 0 * w + 1), lambda x, t, y, w: guided(x, t, y, w + 1),
                  lambda x, t, y, w: guided(x, t, y, 2 - w), lambda x, t, y, w: guided(x, t, 1 - y, w)):
        assert loss(wrong) > 1e-2
    conditioned = network(lambda x_t, t, y, r, w: guided(x_t, t, y, w), guidance_conditioned=True)
    assert distill.distill(conditioned, x, y, draws, cfg, conditioned)[0] == 0


class Jumper(nn.Module):
    """As many exact jumps as it is asked for: each goes where `steps` Euler steps of the flow go."""
    guidance_conditioned, num_classes, null_class, t_min, predict = True, 2, True, 0.0, "v"

    def __init__(self, flow, jumps, steps, interval=sample.INTERVAL):
        super().__init__()
        self.flow, self.jumps, self.steps, self.interval = flow, jumps, steps, interval

    def forward(self, x_t, t, y, r, w):
        (start,), (scale,), h, u = t.unique().tolist(), w.unique().tolist(), 1 / self.jumps, self.steps
        times = [start - k * h / u for k in range(u + 1)]
        velocity = sample.guided(self.flow, scale, self.interval)
        return (x_t - sample.euler(velocity, x_t, y, times)) / h


def test_distill_halves_steps():
    """Exact jumps have no loss, of a flow and of twice as many jumps, and 4, 2 and 1 of them end where 16
    guided Euler steps of the flow do. A flow is guided in the commands' interval, which jumps learned."""
    n, flow = 50, exact_flow()
    x, y = TWO_MODES.sample(n, data.generator("jumps"))
    e = torch.randn(n, 1, generator=data.generator("noise")).double()
    four = Jumper(flow, 4, 4)
    two = Jumper(four, 2, 2, (0.0, 1.0))
    one = Jumper(two, 1, 2, (0.0, 1.0))

    def loss(student, teacher, nfe, steps, k, scale=1.5):
        cfg = on_points("distill", omega_max=3.0, nfe=nfe)
        per = steps // nfe
        grid = (1 - torch.arange(steps + 1).double() / steps).unfold(0, per + 1, per)
        draws = Given(e, guidance_scale=torch.full((n,), scale / 2).double(), time=torch.full((n,), k / nfe))
        return distill.distill(student, x, y, draws, cfg, teacher, grid)[0]

    for k in range(4):
        assert loss(four, flow, 4, 16, k) < 1e-20 < 1e-6 < loss(Jumper(flow, 4, 3), flow, 4, 16, k)
        assert loss(Jumper(flow, 4, 4, (0.0, 1.0)), flow, 4, 16, k) > 1e-6 or k in (1, 2)
    for k in range(2):
        assert loss(two, four, 2, 4, k) < 1e-20 < 1e-6 < loss(four, four, 2, 4, k)
    assert loss(one, two, 1, 2, 0) < 1e-20 < 1e-6 < loss(two, two, 1, 2, 0)
    exact = sample.sample(flow, e, y, 16, guidance=2.5, interval=sample.INTERVAL)
    for jumps in (four, two, one):
        assert (sample.sample(jumps, e, y, jumps.jumps, guidance=2.5) - exact).abs().max() < 1e-12


def test_distill_runs(tmp_path, capsys):
    """A flow's weights start as that flow; 4, 2 and 1 jumps are learned by one command, each from the run
    before, which goes on where it was stopped. What cannot be is refused."""
    init, x, y = dict(init=str(SMALL_FLOW), omega_max=3.0), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    train.train(tiny_run(tmp_path / "guided", "distill", steps=1, lr=0.0, **init))
    flow, net, t = model.load(SMALL_FLOW), model.load(tmp_path / "guided/last.pt"), torch.tensor([.3, .8])
    assert torch.equal(net(x, t, y, t, 1 + t), flow(x, t, y)) and net.guidance_conditioned
    T, grid = distill.inputs("G", tiny_run("", "distill", nfe=8, **init), None, net)
    assert grid.shape == (8, 5) and T.t_min == 0.05 and not any(p.requires_grad for p in T.parameters())
    assert grid[0].tolist() == [1, .96875, .9375, .90625, .875]
    assert grid[7].tolist() == [.125, .09375, .0625, 0, 0]                # no step from below t_min
    flags = f"--nfe 4 --data {SMALL_SET} --model tiny --batch 8 --steps 2 --score 0 --device cpu".split()
    for _ in range(2):
        distill.main([str(tmp_path / "guided"), *flags, "--out", str(tmp_path / "halved")])
    for jumps, before in ((4, "guided"), (2, "halved/4"), (1, "halved/2")):
        content = checkpoint(tmp_path / f"halved/{jumps}")
        assert content["sampling"] == dict(steps=jumps, solver="euler") and content["step"] == 2
        assert content["config"]["init"] == str(tmp_path / before)
    capsys.readouterr()
    flags = f"--guidance 3 --device cpu --n 2 --out {tmp_path}/x.png".split()
    sample.main([str(tmp_path / "halved/2"), *flags])
    assert "2 network evaluations, conditioned on guidance 3," in capsys.readouterr().out
    distill.main([])
    assert "python -m extras.distill" in capsys.readouterr().out

    def run(loss="distill", **options):
        train.train(tiny_run(tmp_path / "no", loss, **dict(init=str(SMALL_FLOW)) | options))

    for loss in ("distill", "sim", "dmd"):
        raises(lambda: run(loss, init=""), f"--loss {loss}", "--init RUN")  # noqa: B023
    raises(lambda: run(nfe=5), "--nfe 5", "32 steps", "--flow_steps")
    raises(lambda: run(nfe=3, init=str(tmp_path / "halved/4")), "--nfe 3", "4 jumps")
    raises(lambda: run(init=str(tmp_path / "halved/4")), "--nfe 0", "4 jumps")
    raises(lambda: run(omega_max=0.5), "--omega_max 0.5")
    for loss, options, words in (("distill", dict(null_class=False), "null label"),
                                 ("sim", dict(times=2), "2 times")):
        path = save_tiny(tmp_path / "other.pt", model.create("tiny", **options))
        raises(lambda: run(loss, init=str(path)), "other.pt", words)  # noqa: B023
    raises(lambda: run("sim", init=str(tmp_path / "halved/1")), "weights of another network")
    raises(lambda: run("sim", d_steps=0), "--d_steps 0")


# ---- Score implicit matching, distribution matching ----


class Shifted(nn.Module):
    """The generator m + s e, with both to learn, and the exact flow of its samples."""
    num_classes, predict, t_min = 1, "v", 0.0

    def __init__(self, m: float, s: float = 1.0):
        super().__init__()
        self.m, self.s = (nn.Parameter(torch.tensor(float(v), dtype=torch.float64)) for v in (m, s))

    def forward(self, x_t, t, y, r):
        return x_t - self.m - self.s * x_t

    def flow(self):
        m, s = self.m.detach()[None, None], self.s.detach()[None]
        return ExactNet(type(TWO_MODES)(m, s, torch.ones(1).double()))


def draws_of(n: int, k: int = 0):
    """Draws of n points whose times are evenly spread over 0.1 .. 0.9."""
    draws, rng = quick_draws(k, n), data.generator("points", k)
    draws.uniform = lambda purpose: (.1 + .8 * (torch.arange(n).double() + .5) / n if purpose == "time"
                                     else torch.zeros(n))
    draws.normal = lambda purpose, shape: torch.randn(n, *shape, generator=rng, dtype=torch.float64)
    return draws


def gradients(objective, G, n=4000, **changes):
    x, y = torch.full((n, 1), math.nan).double(), torch.full((n,), 99)  # data, which it must not look at
    cfg, T = on_points(objective.__name__[:3], **changes), Shifted(1.0).flow()
    loss, _ = objective(G, x, y, draws_of(n), cfg, G.flow(), T)
    return torch.stack(torch.autograd.grad(loss, (G.m, G.s)))


def test_sim_has_the_exact_gradients(monkeypatch):
    """From N(mu, 1) to N(1, 1) with exact scores: bounded, 0 at mu = 1, and towards it on both sides, to two
    digits -0.83, -0.58, 0, 0.58, 0.84 for w = 1, c = 0.1 and t ~ U(0.1, 0.9); with its own w as its integral
    over t. The gradient by m and s, too, is that of E w (|s_G - s_T|^2 + c^2)^(1/2) by s_G alone."""
    means = (0, 0.9, 1, 1.1, 3)
    t = .1 + .8 * (torch.arange(4000).double() + .5) / 4000
    k = (1 - t) / ((1 - t) ** 2 + t ** 2)
    for w, c in ((t ** 2 / (1 - t), 0.01), (torch.ones(1), 0.1)):
        found = [gradients(sim.sim_G, Shifted(m), c=c)[0].item() for m in means]
        for m, value in zip(means, found):
            d = k * (m - 1)
            assert abs(value - (w * k * d / (d ** 2 + c ** 2).sqrt()).mean()) < 1e-9
        monkeypatch.setattr(sim, "weight", torch.ones_like)
    assert all(abs(a - b) < 0.006 for a, b in zip(found, (-.83, -.58, 0, .58, .84))), found

    G, n = Shifted(0.4, 0.6), 400_000
    draws = draws_of(n)
    with torch.no_grad():
        g, _ = sim.generated(G, torch.zeros(n, 1).double(), draws)
        x_t, _, t = sim.noised(g, G, draws, on_points("sim"))
        score_T = -(x_t[:, 0] - (1 - t)) / ((1 - t) ** 2 + t ** 2)
    score_G = -(x_t[:, 0] - (1 - t) * G.m) / (((1 - t) * G.s) ** 2 + t ** 2)
    distance = ((score_G - score_T).square() + 0.1 ** 2).sqrt().mean()
    want = torch.stack(torch.autograd.grad(distance, (G.m, G.s)))
    assert (gradients(sim.sim_G, G, n, c=0.1) - want).abs().max() < 0.02 < 0.3 < want.abs().min()


def test_dmd_has_the_exact_gradient():
    """From N(mu, 1) to N(1, 1): t^2 (mu - 1) / ((1 - t)^2 + t^2) over |g - E[x | x_t]|, on the same draws."""
    for m in (0, 0.9, 1, 1.1, 3):
        found, draws, cfg = gradients(dmd.dmd_G, G := Shifted(m)), draws_of(4000), on_points("dmd")
        g, _ = sim.generated(G, torch.zeros(4000, 1).double(), draws)
        x_t, _, t = sim.noised(g.detach(), G, draws, cfg)
        total = ((1 - t) ** 2 + t ** 2)[:, None]
        clean = ((1 - t)[:, None] * x_t + t[:, None] ** 2) / total
        want = (t[:, None] ** 2 * (m - 1) / total / (g - clean).abs()).mean()
        assert abs(found[0] - want) < 1e-9 and (found[0] > 0) == (m > 1) and (found[0] != 0) == (m != 1)


def test_sim_learns_the_flow_of_the_samples():
    """D's mean gradient is 0 at the exact velocity of the samples, and not at that of the teacher."""
    G, y = Shifted(0.4, 0.6), None

    def errors(flow):
        x, cfg = torch.full((2000, 1), math.nan), on_points("sim")
        net = Weighted(of_velocity, flow.mixture.velocity)
        return standard_errors(lambda k: sim.sim_D(net, x, y, quick_draws(k, 2000), cfg, G)[0], net)

    assert errors(G.flow()) < 4 < 6 < errors(Shifted(1.0).flow())


@pytest.mark.parametrize("loss", ["sim", "dmd"])
def test_sim_does_not_look_at_data(tmp_path, loss, monkeypatch):
    """Images that are not finite and labels of no class train the same networks, bit for bit."""
    own = dict(init=str(SMALL_FLOW), d_warmup=1, steps=6, amp="off")
    train.train(tiny_run(tmp_path / "a", loss, **own))
    stream = train.training_stream
    monkeypatch.setattr(train, "training_stream", lambda *given: (
        (torch.full_like(items.float(), math.nan), labels + 99, positions)
        for items, labels, positions in stream(*given)))
    monkeypatch.setattr(data.Arrays, "clean", lambda self, items, draws: items)
    train.train(tiny_run(tmp_path / "b", loss, **own))
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert all(torch.equal(a["ema"][key], b["ema"][key]) for key in a["ema"])
    flow = model.load(SMALL_FLOW).state_dict()
    for role, net in a["networks"].items():
        key = "blocks.0.attn.qkv.weight"
        assert torch.equal(net["weights"][key], b["networks"][role]["weights"][key])
        assert 1e-6 < (net["weights"][key] - flow[key]).abs().max() < 0.1  # both begin as the flow, and learn
