"""Tests of corrector, refiner and tree."""
import math

import pytest
import torch
from PIL import Image

import data
import model
import sample
import train
from extras import corrector, refiner, sde, tree
from extras.test_core import TWO_MODES, ExactNet
from test_all import (logged, network, on_points, quantile_noise, quick_draws, raises,
                      save_tiny, tiny, tiny_run)


def gaussian_velocity(x, t, y=None, r=None, s=0.5):
    """The exact velocity of data N(0, s^2), at one time."""
    return (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t * t) * x


# ---- Predictor and corrector ----


@pytest.mark.parametrize("start", [1.0, 4.0, 0.25])
def test_corrector_keeps_and_restores_a_gaussian(start):
    """Of N(0, S) in many dimensions the variance V follows its recursion, h = 2 snr^2 S^2 / V,
    V <- (1 - h / S)^2 V + 2 h: on target it stays within snr^2 of it, off target it comes back."""
    t, snr, rng = 0.3, 0.16, data.generator("corrector")
    S = (0.7 * 0.5) ** 2 + 0.3 ** 2
    V, x = start * S, (start * S) ** 0.5 * torch.randn(100, 400, generator=rng)
    for k in range(60):
        n = torch.randn(x.shape, generator=rng)
        x, h = corrector.langevin(gaussian_velocity, x, t, None, n, snr), 2 * snr ** 2 * S * S / V
        V = (1 - h / S) ** 2 * V + 2 * h
        assert abs(x.var() / V - 1) < 0.03, (k, x.var() / V)
    assert abs(V / S - 1 - snr ** 2) < 0.25 * abs(start - 1) + 1e-3


def test_corrector_of_any_solver():
    """With snr 0 every solver is itself, bit for bit; its states are corrected twice at each time of its grid
    but the ends, Heun's after both of its calls for it; few steps of Euler's end nearer to the target."""
    y, draws, s = torch.zeros(300), data.Draws(0, range(300)), 0.5
    e, grid, seen = draws.normal("e", (200,)), sample.time_grid(6), []

    def velocity(x, t, y, r=None):
        seen.append((x.clone(), t))
        return gaussian_velocity(x, t)

    for solve, calls in ((sample.euler, 3), (sample.ab2, 3), (sde.sde, 3), (sample.heun, 4)):
        seen.clear()
        same = corrector.corrected(solve, 2, 0.0)(velocity, e, y, grid, draws)
        assert torch.equal(same, solve(gaussian_velocity, e, y, grid, draws)), solve
        asked = [t for _, t in seen]
        assert [asked.count(t) for t in dict.fromkeys(asked)] == [1] + 5 * [calls], solve
    seen.clear()
    corrector.corrected(sample.heun, 2, 0.2)(velocity, e, y, grid, draws)
    (x, t), (ahead, r), (end, _) = seen[:3]
    v, v_ahead = gaussian_velocity(x, t), gaussian_velocity(ahead, r)
    assert torch.allclose(ahead, x + (r - t) * v) and torch.allclose(end, x + (r - t) * (v + v_ahead) / 2)
    solvers = (corrector.corrected(sample.euler, n, 0.2) for n in (1, 4))
    ends = [solve(gaussian_velocity, e, y, grid, draws).std() for solve in solvers]
    alone = sample.euler(gaussian_velocity, e, y, grid).std()
    assert alone < ends[0] < ends[1] < s and ends[1] > (alone + s) / 2, (alone, ends)


def test_corrector_command(tmp_path, capsys):
    """It says what it did, noise depends on (seed, sample) only, and what has no score is refused."""
    flow = str(save_tiny(tmp_path / "net.pt"))
    flags = [flow, *f"--n 2 --steps 4 --device cpu --guidance 1 --out {tmp_path}/x.png".split()]
    for solver, words in (("heun", "(16 with"), ("sde", "(13 with")):
        corrector.main([*flags, "--solver", solver, "--corrector", "3", "--snr", "0.1"])
        told = capsys.readouterr().out
        assert f"{solver} + 3 Langevin, 4 steps" in told and f"{words} the corrector's, snr 0.1)" in told
    raises(lambda: corrector.main([*flags, "--snr", "0"]), "--snr 0", "above 0")
    train.train(tiny_run(tmp_path / "jumps", "meanflow", steps=1))
    raises(lambda: corrector.main([str(tmp_path / "jumps")]), "no score", "a flow")
    net, labels = tiny(predict="x"), sample.labels_for(12, 10)
    whole, parts = (torch.cat([x for _, x in sample.generate(
        net, labels, 0, batch, steps=4, solver="corrector")]).int() for batch in (12, 5))
    assert (whole - parts).abs().max() <= 1


# ---- The refiner ----


def loss_of(flow, net, m=0.0, s=0.5, **changes):
    x = m + s * torch.randn(500, 1, generator=data.generator("refiner")).double()
    cfg = on_points("refiner", reach=0.3, **changes)
    return refiner.refiner(net, x, torch.zeros(500), quick_draws(0, 500), cfg, flow)


def test_refiner_optimum():
    """It has no loss where it gives the exact velocity; where data are a point the flow is straight, and the
    last velocity is exact already (another sign would leave the line); of a Gaussian that is off by what
    the flow turns over the step."""
    slope = lambda t: ((t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t ** 2))[:, None]                 # noqa: E731
    gaussian = network(lambda x, t, y: slope(t) * x)
    point = network(lambda x, t, y: (x - 0.7) / t[:, None])
    exact, kept = lambda x, t, y, v: slope(t) * x, lambda x, t, y, v: v                          # noqa: E731
    assert loss_of(gaussian, exact)[0] < 1e-20
    loss, logs = loss_of(gaussian, kept)
    seen = []
    loss_of(gaussian, lambda x, t, y, v: seen.append((x, t, v)) or v)
    (x, r, v), = seen
    assert loss == logs["kept"] > 0.01 and torch.allclose(loss, (slope(r) * x - v).square().mean())
    point.predict, point.t_min = "x", 0.1  # so that no time below is asked for
    assert loss_of(point, kept, 0.7, 0.0)[0] < 1e-9
    loss_of(point, lambda x, t, y, v: seen.append((x, t, v)) or v, 0.7, 0.0)
    r = seen[1][1]
    t = 0.1 + 0.9 * quick_draws(0, 500).uniform("time")
    assert r.min() == torch.tensor(0.1) and (t >= r).all() and 0.1 < (t - r).mean() < (t - r).max() <= 0.3
    assert (seen[1][0] - 0.7 - r[:, None] * seen[1][2]).abs().max() < 1e-6                       # on the line


def test_refiner_network_starts_at_the_last_velocity():
    """A fresh one changes nothing; both inputs count after that; without channels of v it would be a DiT."""
    net = model.create("tiny", parts=["refiner.Refiner"], predict="v", depth=1)
    x, v, t, y = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(net(x, t, y, v), v) and len(net.blocks) == 1
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    moved = [net(*at) - at[3] for at in ((x, t, y, v), (x, t, y, 2 * v), (2 * x, t, y, v))]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((moved[0], moved[1]), (moved[0], moved[2])))


def test_refiner_schedules():
    """P8 is ab2 and H8 Heun's method in eight steps; so is P1R7 with the exact velocity for a
    refiner, which is asked for the last seven, with the velocity before."""
    velocity, e, y = sample.guided(ExactNet(TWO_MODES)), quantile_noise(50), torch.zeros(50).long()
    grid, lasts = sample.time_grid(8), []

    def net(x, t, y, v):
        lasts.append(v)
        return velocity(x, t[0].item(), y)

    run = lambda schedule: refiner.scheduled(schedule, net)(velocity, e, y, grid)                # noqa: E731
    for schedule, solver in (("P8", sample.ab2), ("H8", sample.heun), ("P1R7", sample.ab2)):
        assert torch.allclose(run(schedule), solver(velocity, e, y, grid), atol=1e-12), schedule
    assert len(lasts) == 7 and torch.equal(lasts[0], velocity(e, 1.0, y))
    assert refiner.scheduled("H1P5R3", net).kinds == "HPPPPPRRR"
    for wrong in ("R2P1", "X3", "", "P0", "3P"):
        raises(lambda: refiner.scheduled(wrong, net), f"schedule {wrong}", "H1P5R3")             # noqa: B023


def test_refiner_trains_and_runs(tmp_path, capsys):
    """It learns, and its command compares schedules; it makes no images alone; what cannot be is refused.
    Resuming and two processes: in test_regressions.py."""
    flow, a = str(tmp_path / "flow"), tmp_path / "a"
    train.train(tiny_run(flow, steps=10, lr=3e-3))
    train.train(tiny_run(a, "refiner", flow=flow, steps=40, lr=1e-2, reach=0.5, log_every=10))
    last = logged(a)[-1]
    assert last["loss"] < 0.8 * last["kept"], last
    capsys.readouterr()
    out = tmp_path / "refiner.png"
    refiner.main([str(a), "--schedules", "P3,H1P1R2", "--n", "20", "--out", str(out)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:3] for row in rows if row and row[0] in ("P3", "H1P1R2")}
    assert found == {"P3": ["3", "0"], "H1P1R2": ["3", "2"]} and Image.open(out).width > 1000
    raises(lambda: sample.main([str(a)]), "makes no images")
    raises(lambda: refiner.main([flow]), "not a run of --loss refiner")
    small = str(save_tiny(tmp_path / "8.pt"))
    for options, words in ((dict(flow=""), ("--flow (none)",)), (dict(flow=flow, reach=0.0), ("--reach 0.",)),
                           (dict(flow=small), ("(3, 8, 8)", "(3, 32, 32)"))):
        raises(lambda: train.train(tiny_run(tmp_path / "no", "refiner", **options)), *words)     # noqa: B023


# ---- The tree ----


def test_tree_backs_up_and_descends():
    """Values are log means of exp(value); a way goes to a child in proportion to that, and so to the leaves
    of a whole tree by exp(reward), if all nodes have as many children."""
    root, shares = tree.Node(), ((1, 3), (2, 10))
    for numbers in shares:
        inner = tree.Node()
        for number in numbers:
            inner.children.append(tree.Node())
            inner.children[-1].value = math.log(number)
        inner.update()
        root.children.append(inner)
    root.update()
    assert [round(math.exp(c.value), 9) for c in (*root.children, root)] == [2, 6, 4] and root.visits == 1
    count = {}
    for a in range(64):
        for b in range(60):
            path = tree.descend(root, [(a + 0.5) / 64, (b + 0.5) / 60], lambda *_: 0)
            value = round(math.exp(path[-1].value))
            count[value] = count.get(value, 0) + 1 / 3840
    assert len(path) == 3 and all(abs(count[k] - k / 16) < 1e-9 for k in (1, 2, 3, 10)), count
    assert tree.descend(root, [0.9, 0.9], lambda node, level: 3 if level == 0 else 0) == [root]


def test_tree_samples_the_tilted_density():
    """Chains of three steps end in N(0, V), by their recursion; with reward -(x - c)^2 / 2 the tree's samples
    are nearly of N(scale c V, V) / (1 + scale V), where the best of as many chains go too far. Without scale
    they are the chain's. No tree has more than its budget, or knows of another."""
    steps, n, c, scale, calls = 3, 500, 1.5, 2.0, torch.zeros(500)
    y, draws, V = torch.arange(n), data.Draws(0, range(n)), 1.0
    grid = sample.time_grid(steps)
    times = sde.sde_times(grid)
    for t, r in zip(times, times[1:]):
        V *= sde.sde_step(1.0, gaussian_velocity(1.0, t, s=1), t, r, 0.0) ** 2
        V += 2 * t * (t - r) if r else 0

    def velocity(x, t, y):
        calls[y] += 1
        return gaussian_velocity(x, t, s=1)

    reward = lambda x, y: -(x[:, 0] - c).square() / 2                                            # noqa: E731
    grow = lambda y, draws, *more: tree.grow(velocity, reward, y, steps, draws, (1,), *more)     # noqa: E731
    x = grow(y, draws, 48, 1, scale)
    assert calls.max() <= 48 and calls.mean() > 45
    mean, std = scale * c * V / (1 + scale * V), (V / (1 + scale * V)) ** 0.5
    exact = mean + std * quantile_noise(n)
    chains = [data.Draws(k, range(n)) for k in range(1, 17)]
    ends = torch.stack([sde.sde(velocity, d.normal("e", (1,)), y, grid, d) for d in chains])
    best = ends.gather(0, torch.stack([reward(x, y) for x in ends]).argmax(0)[None, :, None])[0]
    away = [(found.sort(0).values - exact).abs().mean().item() for found in (x, best)]
    assert away[0] < 0.18 < 0.35 < away[1], away
    free = grow(y, draws, 12, 1, 0.0)
    assert abs(free.mean()) < 0.12 and abs(free.var() / V - 1) < 0.2, (free.mean(), free.var(), V)
    assert torch.equal(x[7:9], grow(y[7:9], data.Draws(0, [7, 8]), 48, 1, scale))
    calls.zero_()
    many = grow(y[:100], data.Draws(0, range(100)), 24, 5, scale)
    assert calls.max() <= 120 and many.shape == (500, 1)
    assert (many.sort(0).values - exact).abs().mean() < 0.18


def test_tree_command(tmp_path, capsys):
    """A table and a picture of three methods; a flow without a null label, or no classifier, is refused."""
    for name, loss in (("fm", "fm"), ("judge", "classifier")):
        train.train(tiny_run(tmp_path / name, loss, steps=2))
    capsys.readouterr()
    flags = f"{tmp_path}/fm --n 10 --each 2 --steps 3 --budgets 3,9 --out {tmp_path}/tree.png".split()
    tree.main([*flags, "--verifier", str(tmp_path / "judge")])
    told = capsys.readouterr().out
    assert all(told.count(name) == 2 for name in ("best of N", "nearby")) and "wrote" in told
    assert Image.open(tmp_path / "tree.png").size == (640, 250)
    raises(lambda: tree.main([*flags, "--verifier", str(tmp_path / "fm")]), "--verifier", "DiT")
