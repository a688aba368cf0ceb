"""Tests of small.py, real data from their files to a score, of gallery.py and denoising.py."""
import gzip
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
import model
import sample
import train
from extras import denoising, gallery, small
from extras.test_formats import idx_pair
from test_all import CACHE, assert_same_state, raises, tiny_run, write_npz

N = 300


def digits(n: int, seed: int) -> torch.Tensor:
    """Glyphs as MNIST has digits: uint8 (n, 28, 28), classes in turn."""
    return F.avg_pool2d(data.glyphs(n, 56, seed)[0].float().mean(1), 2).to(torch.uint8)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> str:
    """A folder with 300 digits in MNIST's files, as torchvision leaves them."""
    folder = tmp_path_factory.mktemp("mnist")
    (folder / "MNIST/raw").mkdir(parents=True)
    for name, content in idx_pair(digits(N, 8).numpy(), [i % 10 for i in range(N)]).items():
        (folder / f"MNIST/raw/train-{name}.gz").write_bytes(gzip.compress(content))
    return str(folder)


def small_files() -> dict:
    return {file: os.stat(f"{CACHE}/{file}").st_mtime_ns for file in os.listdir(CACHE)}


def test_small_mnist_trains_samples_scores_and_resumes(tmp_path, mnist, capsys):
    """--data FOLDER alone: the size, 28 pixels in whole patches, is told; final.json has fd_small with floor,
    bias and accuracy; a run that was stopped ends like the other; fid.py finds the same score again."""
    flags = f"--data {mnist} --model tiny --steps 4 --batch 8 --score 40 --sample_steps 2 --device cpu"
    train.main([*flags.split(), "--out", str(tmp_path / "whole")])
    out, err = capsys.readouterr()
    assert "28 x 28 pixels taken at 32 x 32, in patches of 8" in err and "within this data set" in err
    assert "300 images (3, 32, 32), 10 classes" in out and "unguided: fd_small" in out
    scores = json.loads((tmp_path / "whole/final.json").read_text())["scores"]
    known = small_files()
    half = tiny_run(tmp_path / "half", data=mnist, steps=4, warmup=100, decay="linear", score=40)
    train.train(half, until=2)
    assert json.loads((tmp_path / "half/config.json").read_text())["size"] == 32
    train.main([*flags.split(), "--out", str(tmp_path / "half"), "--resume"])
    assert_same_state(tmp_path / "whole", tmp_path / "half")
    assert json.loads((tmp_path / "half/final.json").read_text())["scores"] == scores
    assert small_files() == known, "the classifier was trained again"

    for name in ("unguided", "guided"):
        s = scores[name]
        assert 0 < s["floor"] < s["fd_small"] and s["bias"] > 0 and 0 <= s["accuracy"] <= 1 and s["n"] == 40
        assert mnist in s["protocol"] and "within this data set only" in s["protocol"]
        assert float(re.search(r"accuracy ([\d.]+) on held-out", s["protocol"])[1]) > 0.8
    options = dict(features="small", weights=mnist, device="cpu")
    run = dict(num=40, seed=1, steps=2, batch=250, metrics="fid,bias")
    again = fid.evaluate(str(tmp_path / "whole"), mnist, **options, **run)["scores"]
    for key, value in dict(value=scores["unguided"]["fd_small"], floor=scores["unguided"]["floor"]).items():
        assert abs(again["fd_small"][key] / value - 1) < 1e-5, key
    assert again["accuracy"]["value"] == pytest.approx(scores["unguided"]["accuracy"])
    sample.main([str(tmp_path / "whole"), *f"--n 20 --steps 1 --device cpu --out {tmp_path}/s.npz".split()])
    found = fid.evaluate(f"{tmp_path}/s.npz", f"{tmp_path}/s.npz", **options)["scores"]["fd_small"]
    assert abs(found["value"]) < 1e-6 < found["floor"]


def test_small_two_classifiers_rank_alike(tmp_path, mnist):
    """Real digits score near the floor, noisy ones worse, very noisy ones far worse, by the classifiers of
    two seeds, whose features are not the same."""
    real = digits(200, 9)[:, None].expand(-1, 3, -1, -1)
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0))
    sets = [(real * (1 - share) + noise * share).to(torch.uint8) for share in (0.0, 0.2, 0.6)]
    labels, found = torch.arange(200) % 10, []
    for seed in (0, 1):
        net = small.small_net(mnist, seed=seed)
        found.append([fid.score(net, fid.ImageSet("", 200, None, [(range(200), images, labels)], labels))
                      for images in sets])
        good, middle, bad = (s["fd_small"] for s in found[-1])
        assert good < 3 * found[-1][0]["floor"] and 3 * good < middle and 2 * middle < bad, (seed, found)
        accuracies = [s["accuracy"] for s in found[-1]]
        assert accuracies[0] > 0.9 and accuracies[0] >= accuracies[1] > accuracies[2], accuracies
    assert abs(found[0][0]["fd_small"] / found[1][0]["fd_small"] - 1) > 1e-3


def test_small_shares_are_disjoint_and_the_file_follows_the_data(tmp_path, mnist):
    """No image both trains the classifier and measures; classes come in turn, also where a class is short; a
    file is named after data and seed."""
    images, labels = data.glyphs(60, 16, 8)
    images[:, 0, 0, 0] = torch.arange(60)  # tells which one it is
    keep = torch.tensor([i for i in range(60) if i % 10 or i < 30])  # three of class 0
    npz = write_npz(tmp_path / "a.npz", images[keep], labels[keep])
    net = small.SmallNet(npz, data.dataset(npz))
    shares = [net.real(60, 16, seed) for seed in (1, 2, 3)]
    own = [set(items[:, 0, 0, 0].tolist()) for items, _ in shares]
    assert not own[0] & own[1] | own[0] & own[2] | own[1] & own[2] and len(set.union(*own)) == len(keep)
    assert all(torch.equal(share[1], torch.arange(60) % 10) for share in shares)
    assert net.real(10, 32, 1)[0].shape == (10, 3, 32, 32)
    other = write_npz(tmp_path / "b.npz", images[keep], labels[keep].flip(0))
    nets = net, small.SmallNet(other, data.dataset(other))
    assert len({fid.glyph_net_file(one, (seed,)) for one in nets for seed in (0, 1)}) == 4
    assert fid.glyph_net_file(net, (0,)) == fid.glyph_net_file(small.SmallNet(npz, data.dataset(npz)), (0,))


def test_small_says_in_one_line_why_there_is_no_score(tmp_path, capsys):
    """Without labels, or with too few images of a class, a run ends without a score, and fid.py refuses."""
    images, labels = data.glyphs(24, 16)
    (tmp_path / "flat").mkdir()
    for k in range(3):
        Image.fromarray(images[k].permute(1, 2, 0).numpy()).save(tmp_path / f"flat/{k}.png")
    few = write_npz(tmp_path / "few.npz", images, labels)
    for source, why in ((str(tmp_path / "flat"), "no labels"), (few, "2 images of a class")):
        result = train.train(tiny_run(tmp_path / f"run {why}", data=source, size=16, steps=2, score=20))
        notes = capsys.readouterr().err
        assert "scores" not in result and notes.count(f"no score: {source} has {why}") == 1, notes
        raises(lambda: small.small_net(source), "--features small", source, why)
    raises(lambda: fid.evaluate(few, few, features="small"), "--features small", "--weights PATH")


def test_small_size_follows_from_the_data(tmp_path, capsys):
    """Without --size a set is taken at its own size in whole patches, at most 64 pixels, and squarely."""
    for (w, h), size in (((32, 32), 32), ((28, 28), 32), ((40, 30), 32), ((200, 100), 64)):
        images = torch.zeros(2, 3, h, w, dtype=torch.uint8)
        npz = write_npz(tmp_path / f"{w}.npz", images, torch.zeros(2, dtype=torch.int64))
        cfg, source = train.open_data(tiny_run(tmp_path, data=npz))
        assert source.shape == (3, size, size) and cfg.size == size
        told = f"{w} x {h} pixels taken at {size} x {size}" in capsys.readouterr().err
        assert told == ((w, h) != (32, 32))
    assert train.open_data(tiny_run(tmp_path, data=npz, size=16))[1].shape == (3, 16, 16)
    for flags, out in (("", "glyphs"), ("--data a/mnist", "mnist"), ("--data m.npz", "m"), ("--out o", "o"),
                       ("--data m.npz --out o", "o")):
        assert train.read_settings(flags.split()).out == (out if "--out" in flags else f"runs/{out}"), flags


def test_small_alone(mnist, capsys):
    """`python -m extras.small` shows how good the classifier is; without a path, its usage."""
    small.main([mnist, "--n", "50"])
    assert "\nfloor of 50 images" in capsys.readouterr().out
    small.main([])
    assert "fd_small" in capsys.readouterr().out


def test_gallery_table_and_animation(tmp_path, capsys):
    """A row for each run, blank where a method has no such number of evaluations; an animation from noise to
    the samples, where a run of one jump is done after its first frame."""
    for loss, options in (("fm", {}), ("afm", dict(init=str(tmp_path / "fm")))):
        train.train(tiny_run(tmp_path / loss, loss, steps=2, **options))
    flow, jump = str(tmp_path / "fm"), str(tmp_path / "afm")
    gallery.main([flow + ":1,3", jump, "--out", str(tmp_path / "g.png")])
    rows = [gallery.Run(f"{flow}:1,3"), gallery.Run(jump)]
    assert [run.options(2) is None for run in rows] == [False, True] and rows[0].counts == [1, 3]
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "g.png")))                        # (h, w, 3)
    w, h = data.grid(rows[0].samples(3, 0), gallery.COLUMNS).size
    cells = [[sheet[36 + r * (h + 14):, -(2 - c) * (w + 14):][:h, :w] for c in range(2)] for r in range(2)]
    assert [[bool((cell == 255).all()) for cell in row] for row in cells] == [[False, False], [False, True]]
    shown = np.array(data.grid(rows[0].samples(3, 0), gallery.COLUMNS))
    assert torch.equal(cells[0][1], torch.from_numpy(shown))

    gallery.main([flow + ":5", jump, "--out", str(tmp_path / "g.gif")])
    assert "MB" in capsys.readouterr().out and (tmp_path / "g.gif").stat().st_size < 1e6
    with Image.open(tmp_path / "g.gif") as file:
        assert file.n_frames == 6 and file.width == 3 * (w + 14) - 14
    way = gallery.Run(f"{flow}:5").way(5, 0)
    assert [round(t, 3) for t, *_ in way] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    noise = data.Draws(0, range(10)).normal("sample noise", (3, 32, 32))
    assert torch.equal(way[0][1], data.to_uint8(noise))
    assert torch.equal(way[-1][1], gallery.Run(flow).samples(5, 0))
    way = gallery.Run(jump).way(1, 0)
    assert len(way) == 2 and torch.equal(way[0][2], way[1][1])  # where a jump points is where it ends
    raises(lambda: gallery.Run(jump + ":2"), f"{jump}:2", "takes 1 evaluations")
    gallery.main([])
    assert "noise.gif" in capsys.readouterr().out


def test_denoising_tells_error_and_contrast(tmp_path, capsys):
    """A network that predicts 0.7 x + 0.1 has contrast 0.7 and an error that is known, also below t_min and
    for images of a second call; a table has two lines for each run, of all times."""
    x, y = data.to_float(data.glyphs(260, 8)[0]), torch.arange(260)
    e = data.Draws(0, range(260)).normal("noise", x.shape[1:])

    class Known(torch.nn.Module):
        t_min = 0.05

        def forward(self, x_t, t, y):
            at = t.view(-1, 1, 1, 1)
            assert (x_t - (1 - at) * x[y] - at * e[y]).abs().max() < 1e-6
            return (x_t - 0.7 * x[y] - 0.1) / at.clamp_min(self.t_min)

    want = (0.3 * x - 0.1).square().mean().sqrt()
    for t in (0.03, 0.5, 1.0):
        error, contrast = denoising.error_and_contrast(denoising.denoise(Known(), x, y, t), x)
        assert abs(error - want) < 1e-5 and abs(contrast - 0.7) < 1e-5

    for loss, options in (("fm", {}), ("afm", dict(init=str(tmp_path / "fm")))):
        train.train(tiny_run(tmp_path / loss, loss, steps=2, **options))
    images, y = data.glyphs(30, seed=1)
    small = ["--n", "20", "--device", "cpu", "--data", write_npz(tmp_path / "other.npz", images, y)]
    denoising.main([str(tmp_path / "fm"), *small])
    head, _, error, contrast, _, last = capsys.readouterr().out.strip().splitlines()[-6:]
    assert [line.count("|") for line in (head, error, contrast)] == [14] * 3 and "20 images" in last
    x, y, net = data.to_float(images[:20]), y[:20], model.load(tmp_path / "fm" / "last.pt")
    for k, t in ((3, 0.06), (13, 0.97)):
        found = denoising.error_and_contrast(denoising.denoise(net, x, y, t), x)
        assert [line.split("|")[k] for line in (error, contrast)] == [f" {value:.3f} " for value in found]
    raises(lambda: denoising.main([str(tmp_path / "afm"), *small]), "afm", "only jumps")
    small[-1] = write_npz(tmp_path / "twelve.npz", images[:12], torch.arange(12))
    raises(lambda: denoising.main([str(tmp_path / "fm"), *small]), "10 classes", "12")
    raises(lambda: denoising.main([str(tmp_path / "fm"), "--n", "0"]), "--n 0")
    denoising.main([])
    assert "contrast" in capsys.readouterr().out
