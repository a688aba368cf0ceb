"""The folder itself: every extra stands alone, and breaks only what names it. And tests of small extras."""
import ast
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import sample
import train
from extras import curves, files, gaussians, guidance, operators, sde
from extras.gaussians import Mixture
from extras.test_core import TWO_MODES, ExactNet
from test_all import (HERE, network, quantile_noise, quick_draws, raises, run, save_tiny, tiny,
                      tiny_run)

FILES = Path(sde.__file__).parent.glob("*.py")
NAMES = sorted(path.stem for path in FILES if not path.stem.startswith(("test", "__")))

CHILDREN = """
import importlib, json, os, sys
import data, fid, losses, model, sample, train
names, here = json.loads(sys.argv[1]), data.extra_file("any").parent

class Absent:  # finds nothing under the name of a file that was removed
    def find_spec(self, name, *_):
        if name == f"extras.{removed}":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def in_a_child(work):
    read, write = os.pipe()
    if not os.fork():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    answer = b""
    while part := os.read(read, 65536):
        answer += part
    os.wait()
    os.close(read)
    return json.loads(answer)

def alone():
    importlib.import_module(f"extras.{name}")
    return sorted(m.removeprefix("extras.") for m in sys.modules if m.startswith("extras."))

def without():
    sys.meta_path.insert(0, Absent())
    there, failed = data.extra_file, {}
    data.extra_file = lambda file: there(f"no {file}" if file == removed else file)
    for other in names:
        if other != removed:
            try:
                data.extra(other, "it")
            except ValueError as error:
                failed[other] = str(error)
    return failed

def theirs():
    for name in names:
        importlib.import_module(f"extras.{name}")
    return [m for m in sys.modules if not m.startswith("extras") and m != "__main__"]

for module in in_a_child(theirs):  # what other packages they import, once for all children
    try:
        importlib.import_module(module)
    except Exception:
        pass

found = {}
for name in names:
    removed = name
    found[name] = in_a_child(alone), in_a_child(without)
print(json.dumps(found))
"""


def source(name: str) -> str:
    return (Path(sde.__file__).parent / f"{name}.py").read_text()


def needs(asked: bool) -> dict:
    """Of each extra those that it imports at its top, or that it asks data.extra for, and what these need."""
    found = {}
    for name in NAMES:
        nodes = [n for n in ast.parse(source(name)).body if isinstance(n, ast.ImportFrom)]
        found[name] = {alias.name for node in nodes if node.module == "extras" for alias in node.names}
        found[name] |= {node.module[7:] for node in nodes if node.module.startswith("extras.")}
        found[name] |= {other for other in NAMES if asked
                        and re.search(f'(extra|optional)\\("{other}"', source(name))}
    for _ in NAMES:
        found = {name: own.union(*(found[other] for other in own)) for name, own in found.items()}
    return found


def test_extras_stand_alone_and_break_only_what_names_them():
    """Each imports in a process of its own, with none but those it names; without it only those fail."""
    done = run("-c", CHILDREN, json.dumps(NAMES))
    assert done.returncode == 0, done.stderr[-2000:]
    surely, perhaps = needs(False), needs(True)
    for name, (loaded, failed) in json.loads(done.stdout).items():
        assert {name} | surely[name] <= set(loaded) <= {name} | perhaps[name], (name, loaded)
        assert {other for other in NAMES if name in surely[other]} <= set(failed), (name, failed)
        assert set(failed) <= {other for other in NAMES if name in perhaps[other]}, (name, failed)
        assert all(name in text and "\n" not in text for text in failed.values()), (name, failed)


def test_extras_and_the_core_run_alone():
    """What has a `main` ends in calling it; an extra without one is not said to run alone."""
    for name in ["data", "fid", "losses", "model", "sample", "train", *(f"extras/{name}" for name in NAMES)]:
        text = (HERE / f"{name}.py").read_text()
        ending = r'\nif __name__ == "__main__":\n    (data\.)?run_cli\((\w+\.)?main\)\n$'
        said = "\ndef main(" in text or f"python -m {name.replace('/', '.')} " in text
        assert bool(re.search(ending, text)) == said, name


def test_sde_keeps_the_marginals():
    """For N(0, s^2) data the Euler-Maruyama variance obeys its recursion, and so samples end with std near s;
    the one with w for 2 w (a mix of the paper's and the code's symbols) would not."""
    s, steps, n = 0.5, 100, 40_000
    gaussian = Mixture(torch.zeros(1, 1).double(), torch.tensor([s]).double(), torch.ones(1).double())
    e = quantile_noise(n)[torch.randperm(n, generator=data.generator("sde"))]
    x = sample.sample(ExactNet(gaussian), e, torch.zeros(n).long(), steps, "sde", draws=quick_draws(0, n))
    variance, times = 1.0, [*np.linspace(1, .04, steps), 0]
    for t, r in zip(times, times[1:]):
        h, total = t - r, (1 - t) ** 2 * s * s + t * t
        slope = (t - (1 - t) * s * s) / total + t / total                # v - w s = slope x with w = t
        variance = (1 - h * slope) ** 2 * variance + (2 * t * h if r > 0 else 0)
    assert abs(x.var().item() / variance - 1) < 0.03, (x.var(), variance)
    assert abs(variance ** .5 - s) < 0.02
    asked = []
    sde.sde(lambda x, t, y: asked.append(t) or x, e[:2], None, sample.time_grid(10), quick_draws(0, 2))
    assert np.allclose(asked, np.linspace(1, .04, 10))


def test_sde_noise_depends_on_seed_and_sample_only():
    """Batches may be split in any way: the same images; another seed gives others."""
    net, labels = tiny(predict="x"), sample.labels_for(12, 10)

    def images(seed, batch):
        made = sample.generate(net, labels, seed, batch, steps=4, solver="sde")
        return torch.cat([x for _, x in made]).int()

    assert (images(0, 12) - images(0, 5)).abs().max() <= 1
    assert (images(0, 12) - images(1, 12)).abs().max() > 20


def test_files_required_files_are_explained_and_checked(tmp_path):
    """A missing file gives URL, path, size and digest; a wrong one is refused; nothing is downloaded."""
    path = tmp_path / "weights.bin"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of b"test"
    call = lambda: files.require_file(path, "weights", "https://example.org/w", 4, digest)
    raises(call, str(path), "https://example.org/w", "4 bytes", digest)
    for content, word in ((b"tes", "incomplete"), (b"tesu", "sha256")):
        path.write_bytes(content)
        raises(call, word, "https://example.org/w")
    path.write_bytes(b"test")
    assert call() == files.require_file(path, "weights", "url", 4, digest[:8]) == path


@torch.no_grad()
def test_guidance_by_a_network_and_of_channels(tmp_path, capsys):
    """Autoguidance by the network itself is the identity; by a 1.6 times wider mixture it narrows the class
    N(1.5, 0.5^2) without moving its mean. With 3 channels the fourth keeps the velocity under the label, the
    others are sample.py's. What cannot be is refused; the command says how it guided."""
    exact, wide = (ExactNet(dataclasses.replace(TWO_MODES, stds=k * TWO_MODES.stds)) for k in (1, 1.6))
    e, y, t = quantile_noise(4000), torch.ones(4000).long(), torch.full((4000,), .5).double()
    same = sample.guided(guidance.Guided(exact, exact), 3)(e, .5, y)
    assert torch.allclose(same, exact(e, t, y), atol=1e-12)
    x = sample.sample(guidance.Guided(exact, wide), e, y, 80, "ab2", 2.0)
    assert abs(x.mean() - 1.5) < .01 and x.std() < .35
    net, x, y = tiny(channels=4), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    first = guidance.Guided(net, channels=3)
    plain, every, three = (sample.guided(*how)(x, .5, y) for how in ((net, 1), (net, 2), (first, 2)))
    assert torch.equal(three[:, :3], every[:, :3]) and (three[:, 3:] - plain[:, 3:]).abs().max() < 1e-5
    assert (every[:, 3:] - plain[:, 3:]).abs().max() > 1e-2
    assert torch.equal(sample.guided(first, 1)(x, .5, y), plain)

    token, scaled = network(lambda *_: x, state=(5,)), network(lambda *_: x, guidance_conditioned=True)
    raises(lambda: guidance.Guided(token, channels=3), "channels 3", "leave it at 0")
    raises(lambda: guidance.Guided(scaled, net), "no reference")
    raises(lambda: guidance.Guided(tiny(null_class=False), channels=3), "null label", "a reference")
    raises(lambda: sample.guided(first, 0.5), "at least 1")
    path = str(save_tiny(tmp_path / "net.pt"))
    command = [path, *f"--n 2 --steps 2 --device cpu --out {tmp_path}/x.png --reference {path}".split()]
    raises(lambda: guidance.main([*command, "--guidance", "1"]), "--reference", "guidance 1 is none")
    guidance.main([*command, "--guidance", "2", "--guide_channels", "1"])
    told = capsys.readouterr().out
    words = f"(autoguidance by {path}, of the first 1 channels; evaluations doubled)"
    assert f"conditioned on guidance 2 on t in [0.2, 0.8] {words}" in told


def test_curves_of_a_run(tmp_path, capsys, monkeypatch):
    """A run leaves loss.png, also one of 30 steps; the file alone draws it again."""
    train.train(tiny_run(tmp_path, steps=30, log_every=100))
    curve = np.asarray(Image.open(tmp_path / "loss.png"))
    assert (curve == (31, 95, 191)).all(-1).sum() > 500
    (tmp_path / "loss.png").unlink()
    monkeypatch.setattr("sys.argv", ["", str(tmp_path)])
    curves.main()
    assert "loss.png" in capsys.readouterr().out and np.array_equal(Image.open(tmp_path / "loss.png"), curve)


def test_curves_name_their_values(tmp_path, monkeypatch):
    """The scale of loss.png is logarithmic: its lines are named by the loss and by the step."""
    rows = [dict(step=step, role="G", loss=loss) for step, loss in ((2, 10.0), (4, 0.1))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, write = [], curves.ImageDraw.ImageDraw.text
    noted = lambda pen, at, text, **more: texts.append((text, at)) or write(pen, at, text, **more)
    monkeypatch.setattr(curves.ImageDraw.ImageDraw, "text", noted)
    curves.draw_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    scale, steps = texts[0:10:2], texts[1:10:2]
    assert [text for text, _ in scale] == ["0.1", "0.316", "1", "3.16", "10"]
    assert np.allclose(np.diff([y for _, (_, y) in scale]), -77)
    assert [text for text, _ in steps] == ["0", "1", "2", "3", "4"]


def test_small_commands(tmp_path, capsys, monkeypatch):
    """files, operators and gaussians, run alone, show the digest of a file, a network's operators, and ways
    from noise to data."""
    path = save_tiny(tmp_path / "net.pt")
    monkeypatch.setattr("sys.argv", ["", str(path)])
    for extra, word in ((files, files.digest(path)), (operators, "aten::"), (gaussians, "  1.00   -2.00")):
        extra.main()
        assert word in capsys.readouterr().out
