"""Tests of benchmark.py, its parts benchmark_*.py and attention_table.py."""
import copy
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before attention.py is imported: its kernels then run on a CPU

import data
import losses
import model
import train
from extras import (attention_table, benchmark, benchmark_checks, benchmark_fid, benchmark_plain,
                    benchmark_report, benchmark_roles, benchmark_routes, benchmark_steps, benchmark_tools)
from extras.benchmark_tools import Item
from extras.test_core import Derivatives
from test_all import SMALL_SET, TWO, checkpoint, parameters_of, raises, run, same, tiny, tiny_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    monkeypatch.setattr(data, "_glyph_set", lambda n, size, seed: data.glyphs(40, size, seed))


def strict(path) -> dict:
    """A JSON file without nan and inf."""
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(word))


def one_part(tmp_path, name: str, *flags) -> dict:
    out = tmp_path / "b.json"
    benchmark.main(["--only", name, "--device", "cpu", "--size", "tiny", "--out", str(out), *flags])
    return strict(out)


# ---- The command ----


@pytest.mark.parametrize("name", benchmark.PARTS)
def test_benchmark_at_the_smallest_sizes(name, tmp_path, capsys):
    """Every part on a CPU: rows of figures that are numbers, none failed or skipped, each printed and part of
    a row for the table of claims; the machine beside them."""
    report = one_part(tmp_path, name)
    assert set(report) == {"command", "size", "machine", "parts", "claims"} and report["size"] == "tiny"
    assert {"device", "processes", "threads", "torch", "python", "date"} <= set(report["machine"])
    rows, printed = report["parts"][name]["rows"], capsys.readouterr().out
    assert list(report["parts"]) == [name] and rows and report["parts"][name]["seconds"] > 0
    for row in rows:
        assert set(row) - {"missed"} == {"name", "figures"}, row
        assert row["figures"] and all(type(value) is float for value in row["figures"].values()), row
        assert f"  {row['name']}: " in printed
    groups = {row["name"].rpartition(": ")[0] for row in rows}
    assert len(report["claims"]) == len(groups)
    assert all(line.count(" | ") == 2 and f"--only {name}`" in line for line in report["claims"])


def test_benchmark_what_goes_wrong_is_a_row(tmp_path, monkeypatch, capsys):
    """An item that raises, figures that are not what they should be, nan, items without time, and a part
    that has none: rows, and the others go on."""
    def fails():
        raise RuntimeError("CUDA out of\nmemory")

    items = [Item("a: 1", fails), Item("a: 2", lambda: {"x": 3.0, "y": 1.0}, {"x": (None, 2), "y": (0.5, 1)}),
             Item("a: 3", lambda: {"x": float("nan"), "y": 0.4}, {"x": (None, 9), "y": (0.5, None)}),
             Item("a: 4", dict, {}, seconds=1e6), Item("a: 5", lambda: {"x": 1})]
    monkeypatch.setattr(benchmark_fid, "items", lambda size, device: items)
    rows = one_part(tmp_path, "fid", "--minutes", "1")["parts"]["fid"]["rows"]
    assert rows[0] == dict(name="a: 1", error="RuntimeError: CUDA out of memory")
    assert rows[1]["figures"] == dict(x=3, y=1) and rows[1]["missed"] == ["x 3.0, expected at most 2"]
    assert rows[2]["figures"] == dict(x="nan", y=0.4)
    assert rows[2]["missed"] == ["x nan, expected at most 9", "y 0.4, expected at least 0.5"]
    assert "takes about 1000000" in rows[3]["skipped"] and rows[4] == dict(name="a: 5", figures=dict(x=1))
    claim, = strict(tmp_path / "b.json")["claims"]
    assert claim.startswith("| a: 2: x 3, y 1   MISSED x 3.0, expected at most 2; 3: x nan")
    assert "; 5: x 1 |" in claim
    printed = capsys.readouterr().out
    assert "a: 1: FAILED RuntimeError" in printed and "a: 4: skipped" in printed and "MISSED x 3.0" in printed
    late = one_part(tmp_path, "fid", "--minutes", "-1")["parts"]["fid"]["rows"]
    assert len(late) == 5 and all(row["skipped"].startswith("0 s left") for row in late)
    monkeypatch.setattr(benchmark_fid, "items", lambda size, device: fails())
    assert "out of memory" in one_part(tmp_path, "fid")["parts"]["fid"]["rows"][0]["error"]
    raises(lambda: benchmark.main(["--only", "fids"]), "fids", "checks,run,step")
    raises(lambda: benchmark.main(["--device", "cuda"]), "no GPU", "--device cpu")


def test_benchmark_parts_are_processes(tmp_path, monkeypatch, capsys):
    """Each part is a command of its own with its share of the time; one that dies leaves its rows and why."""
    commands = []

    def run_apart(command, limit, port):
        commands.append((command, limit, port))
        if "run" in command:
            return "the process ended with status -11"
        monkeypatch.setattr(benchmark_fid, "items", lambda size, device: [Item("a", lambda: {"x": 1})])
        benchmark.main(command[3:])
        return "ended after 1 s"

    monkeypatch.setattr(benchmark, "run_apart", run_apart)
    benchmark.main(["--only", "run,fid", "--device", "cpu", "--out", f"{tmp_path}/b.json", "--minutes", "10"])
    report, (first, second) = strict(tmp_path / "b.json"), commands
    assert first[0][:3] == [sys.executable, "-m", "extras.benchmark"] and first[2] != second[2]
    share = 12 / (12 + 7) * 575
    assert abs(first[1] - share - 25) < 1 and abs(second[1] - 600) < 5  # what the first left is the second's
    assert report["parts"]["run"]["rows"] == [dict(name="run", error="the process ended with status -11")]
    assert report["parts"]["fid"]["rows"] == [dict(name="a", figures=dict(x=1)),
                                              dict(name="fid", error="ended after 1 s after a")]
    assert report["machine"]["torch"] == torch.__version__ and len(report["claims"]) == 1
    assert "3 rows: 1 with figures, 0 of them missed, 2 failed, 0 skipped" in capsys.readouterr().out
    monkeypatch.undo()
    python = [sys.executable, "-c"]
    monkeypatch.setenv("MASTER_PORT", "1000")
    code = "import os, sys; sys.exit(int(os.environ['MASTER_PORT']) - 1000)"
    assert benchmark.run_apart([*python, code], 60, port=4).endswith("status 4")
    assert benchmark.run_apart([*python, "pass"], 60) == ""
    start = time.monotonic()
    assert benchmark.run_apart([*python, "import time; time.sleep(60)"], 1) == "ended after 1 s"
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU computes, against float64 and the CPU")
def test_checks_on_a_gpu():
    """Every check at full size is within its bars."""
    device = data.start_processes("cuda")
    rows = [benchmark.measured(item) for item in benchmark_checks.items("full", device)]
    assert not [row for row in rows if "error" in row or "missed" in row]


# ---- What is measured with ----


def test_benchmark_measures():
    """Interleaved calls, one round to warm up and the median of the others; memory that a call allocates, and
    that autograd saves; operations of a training step, and peaks by the device's name."""
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = benchmark_tools.interleaved_times(calls, 3, "cpu")
    assert order == list("ab" * 4) and [len(times[name]) for name in "ab"] == [3, 3]
    slow = iter([0.2, 0, 0.2, 0])  # the first is the round to warm up
    assert 0 < benchmark_tools.in_turn({"a": lambda: time.sleep(next(slow))}, 3, "cpu")["a"] < 0.05
    x = torch.randn(1000, requires_grad=True)
    assert benchmark_tools.saved_bytes(lambda: (x.exp() * x).sum()) == 2 * 4000  # exp's result and x
    assert benchmark_tools.saved_bytes(lambda: x[:500] * x[500:]) == 4000  # one storage
    if os.path.exists("/proc/self/clear_refs"):
        for numbers in (20_000_000, 10_000_000):
            found = benchmark_tools.peak_megabytes(lambda: torch.ones(numbers).sum(), "cpu")
            assert 0.9 * numbers < found * 1e6 / 4 < 1.5 * numbers
    for name in "glyph-S", "SiT-XL/2":  # backward takes twice forward's products, but for the first layer
        forward = 2 * model.multiply_adds(model.create(name) if name == "glyph-S" else meta(name))
        assert 0.98 < benchmark_tools.training_flops(model.ZOO[name]) / (3 * forward) <= 1
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA H100 PCIe": None, "NVIDIA H200 NVL": None, "NVIDIA L4": None}
    assert {name: benchmark_tools.bfloat16_peak(name) for name in peaks} == peaks


def meta(name: str):
    with torch.device("meta"):
        return model.create(name)


# ---- Steps ----


def test_benchmark_plain_is_the_same_network():
    """Our weights load into the plain network, which then gives the same; its loss is flow matching's; its
    step moves the network and its average as ours."""
    for settings in dict(), dict(predict="v", channels=4, patch=2, input_size=8):
        net = tiny(**settings)
        torch.manual_seed(0)
        for p in parameters_of(net):
            torch.nn.init.normal_(p, std=0.1)
        names = "input_size", "patch", "channels", "width", "depth", "heads", "num_classes"
        plain = benchmark_plain.PlainDiT(*(net.config[name] for name in names))
        plain.load_state_dict(net.state_dict())
        ema, start = copy.deepcopy(plain), copy.deepcopy(plain)
        x, y = torch.randn(6, *net.shape), torch.arange(6)
        torch.manual_seed(1)
        e, t, drop = torch.randn_like(x), torch.sigmoid(torch.randn(6)), torch.rand(6) < 0.1
        x_t = losses.interpolate(x, e, t)
        out = net(x_t, t, torch.where(drop, net.num_classes, y))
        exact = (out - losses.velocity_target(net, x, e, x_t, t)).square().mean()
        torch.manual_seed(1)
        t_min = net.t_min if net.predict == "x" else None
        opt = torch.optim.SGD(parameters_of(plain), 0.1)
        loss = benchmark_plain.plain_step(plain, ema, opt, x, y, t_min)
        assert abs(loss / exact.detach() - 1) < 1e-5
        gradient = torch.autograd.grad(exact, parameters_of(net))
        scale = min(1, 1 / torch.cat([g.flatten() for g in gradient]).norm())
        for p, old, average, g in zip(*map(parameters_of, (plain, start, ema)), gradient):
            assert (p - (old - 0.1 * scale * g)).abs().max() < 1e-5
            assert (average - (0.999 * old + 0.001 * p)).abs().max() < 1e-6


def test_benchmark_step_is_the_loops(tmp_path, monkeypatch):
    """The step that is timed is train.py's: after one, weights and optimizer are the same bit for bit."""
    cfg, kept = tiny_run(tmp_path / "run", steps=1, clip=0.01), []
    train.train(cfg)
    for module, name in (train, "build_all"), (torch.optim, "AdamW"):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, call=call, **more: (
            kept.append(call(*given, **more)) or kept[-1]))
    benchmark_steps.training_step(cfg, data.dataset(cfg.data, 32), CPU)()
    saved = checkpoint(tmp_path / "run")["networks"]["G"]
    assert same(dict(kept[0]["G"].state_dict()), dict(saved["weights"]))
    assert same(kept[1].state_dict()["state"], saved["optimizer"]["state"])


# ---- Roles and routes ----


def test_benchmark_routes_compute_the_same():
    """The routes that are timed against each other have equal gradients."""
    G, D = tiny(norm="rms"), model.discriminator(tiny(norm="rms").config)
    for p in parameters_of(D):
        torch.nn.init.normal_(p, std=0.05)
    case = Derivatives(G)
    x_t, v, u, t = (part.float() for part in (case.x_t, case.v, case.u, case.t))
    steps, gradients = benchmark_routes.derivative_steps(G.float(), D, x_t, t, case.y, v, u), {}
    assert set(steps) == {"flow matching", *benchmark_routes.ROUTES}
    for name, backends in benchmark_routes.ROUTES.items():
        for backend in set(backends) - {"triton"}:
            for p in (*D.parameters(), *G.parameters()):
                p.grad = None
            steps[name](backend)
            own = [p.grad for p in (*D.parameters(), *G.parameters()) if p.grad is not None]
            gradients.setdefault(name.partition(" by")[0], []).append(own)
    assert [len(parts) for parts in gradients.values()] == [4, 3, 2]
    for name in "D step", "time derivative":
        for parts in gradients[name]:
            assert parts and all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(parts, gradients[name][0]))
    assert len(gradients["D step"][0]) == len(parameters_of(D)), "all of D trains again"


def test_benchmark_roles(monkeypatch):
    """Each role of an objective has a figure; the objectives of extras/ are found; a step trains its own role
    alone, and leaves no gradients behind."""
    source, settings = data.dataset(str(SMALL_SET), 32), dict(model="tiny")
    steps = benchmark_roles.role_steps(["fm", "cafm_routes", "afm"], source, CPU, 4, **settings)
    assert list(steps) == ["fm G", "cafm_routes G forward", "cafm_routes D forward", "cafm_routes G finite",
                           "cafm_routes D finite", "afm G", "afm D"], list(steps)
    imported = []
    monkeypatch.setattr(data, "extra", lambda name, why: imported.append(name))
    assert set(benchmark_roles.all_objectives()) >= {"fm", "meanflow", "ect", "afm", "cafm", "cafm_routes"}
    assert "cafm_routes" in imported and not {"attention", "benchmark", Path(__file__).stem} & set(imported)
    monkeypatch.undo()
    cfg = tiny_run("unused", "afm", batch=4)
    nets = train.build_all(cfg, source, CPU)
    weights = {role: parameters_of(net) for role, net in nets.items()}
    trained = set()
    for role, params in weights.items():
        for p in params:
            p.register_post_accumulate_grad_hook(lambda p, role=role: trained.add(role))
    for role in "DGD":
        trained.clear()
        benchmark_roles.role_step(role, nets, weights, cfg, source, CPU)()
        assert trained == {role} and all(p.grad is None for params in weights.values() for p in params)


# ---- Attention, checks, scores ----


def test_benchmark_attention(monkeypatch):
    """Each task runs with its backend; fused has two. An error is the largest of the tensors'; a backend that
    is wrong by a thousandth is seen."""
    found = attention_table.largest_error({"a": [torch.ones(2), torch.tensor([3., 4.4])]},
                                          {"a": [torch.ones(2), torch.tensor([3., 4.])]})
    assert abs(found - 0.08) < 1e-6
    used, q = [], torch.randn(1, 1, 4, 8)
    for name, call in list(model.ATTENTION.items()):
        noted = lambda q, k, v, name=name, call=call: (used.append(name), call(q, k, v))[1]  # noqa: E731
        monkeypatch.setitem(model.ATTENTION, name, noted)
    tasks = attention_table.tasks("closed_form", q, q, q, q)
    for call in (*tasks.values(), attention_table.gradients("closed_form", q, q, q, q)):
        call()
    assert list(tasks) == ["forward", "backward", "1 tangent", "2 tangents", "double"]
    assert list(attention_table.tasks("fused", q, q, q, q)) == ["forward", "backward"]
    assert len(used) >= 6 and set(used) == {"closed_form"}
    wrong = lambda q, k, v: 1.001 * model.attention_plain(q, k, v)  # noqa: E731
    monkeypatch.setitem(model.ATTENTION, "wrong", wrong)
    for backend, low, high in ("wrong", 9e-4, 1e-2), ("plain", 1e-9, 1e-6):
        error = benchmark_checks.attention_error(backend, "float32", 5, "tiny", CPU)["error"]
        assert low < error < high, (backend, error)


def test_benchmark_checks_see_differences(monkeypatch):
    """The CPU against itself is exact for every objective, training and sampling; a device whose network
    differs is not."""
    def parities():
        found = [benchmark_checks.gradient_parity(loss, "tiny", CPU) for loss in benchmark_checks.CORE]
        found.append(benchmark_checks.loss_parity("tiny", CPU, "cpu"))
        found.append(benchmark_checks.sampling_parity("tiny", CPU))
        return [value for part in found for value in part.values()]

    assert parities() == [0.0] * 7
    made, networks = [], benchmark_checks.networks

    def every_second_differs(*given):
        nets = networks(*given)
        made.append(nets)
        if len(made) % 2 == 0:
            nets["G"].x_embedder.proj.weight.data *= 1.1
        return nets

    monkeypatch.setattr(benchmark_checks, "networks", every_second_differs)
    assert min(parities()) > 1e-4


def test_benchmark_fid():
    """Both Frechet distances are right."""
    figures = benchmark_fid.distance(48, CPU)
    assert figures["error"] < 1e-9 and figures["sqrtm error"] < 1e-9 and figures["sqrtm s"] > 0


def test_benchmark_report_of_a_gpu(monkeypatch):
    """The device's name, memory, driver and peak; a driver that nvidia-smi does not tell is unknown."""
    properties = type("P", (), dict(name="NVIDIA H200", total_memory=150e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = benchmark_report.machine(torch.device("cuda:0"))
    assert found["device"] == "NVIDIA H200" and found["bfloat16_peak_tflops"] == 989
    assert found["memory_gb"] == 150 and "driver" in found


def test_benchmark_run_alone(tmp_path):
    """`python -m extras.attention` is a part of the benchmark; two processes write one report of it."""
    flags = "--device", "cpu", "--size", "tiny", "--out", f"{tmp_path}/b.json"
    attention_table.main([*flags, "--minutes", "-1"])
    assert len(strict(tmp_path / "b.json")["parts"]["attention"]["rows"]) == 3
    done = run(*TWO[:-1], "-m", "extras.benchmark", *flags, "--only", "attention,step")
    report = strict(tmp_path / "b.json")
    assert done.returncode == 0 and report["machine"]["processes"] == 2, done.stderr
    assert [len(part["rows"]) for part in report["parts"].values()] == [3, 3]
    assert not [row for part in report["parts"].values() for row in part["rows"] if "figures" not in row]
