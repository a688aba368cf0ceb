"""Tests of metrics, bias, mmhm, spread, stored, inception, inception_blocks, monitor."""
import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import fid
import train
from extras import bias, inception, inception_blocks, metrics, mmhm, monitor, spread, stored
from extras.files import digest
from test_all import (CACHE, REAL, TOY, Toy, assert_same_scores, check_two_processes, error_of,
                      golden_weights, raises, rand, run, same, score_glyphs, tiny_run, toy, values, wave,
                      write_folder, write_npz)

import dataclasses
import functools
import json
import re
import tempfile
import zipfile
from pathlib import Path


# ---- metrics, bias, mmhm, spread ----


def test_metrics_inception_score_closed_forms():
    """K equally frequent one-hot predictions score K, also when sorted by class; constant ones score 1."""
    labels = torch.arange(1000) % 10
    for order in (labels, labels.sort().values):
        score = metrics.inception_score(1e4 * torch.eye(12)[order])
        assert 9.3 < score["value"] <= 10 and 0 < score["std"] < 0.3
        assert abs(metrics.inception_score(1e4 * torch.eye(12)[order], splits=1)["value"] - 10) < 1e-9
    assert abs(metrics.inception_score(torch.ones(100, 5))["value"] - 1) < 1e-9
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    kl = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert abs(metrics.inception_score(p.log(), splits=1)["value"] - kl) < 1e-6


def test_metrics_neighbour_scores():
    """Against their definition point by point; identical sets get 1, far ones 0, a collapsed one precision
    alone; precision and recall change places with the sets; more rows than a chunk, rotation and scaling
    change nothing."""
    real, fake, scores = rand(60, 5, seed=1), 0.7 * rand(80, 5, seed=2) + 0.3, metrics.neighbour_scores
    got = scores(real, fake)
    across, own, other = torch.cdist(real, fake), torch.cdist(real, real), torch.cdist(fake, fake)
    r3, r5 = (own.sort(1).values[:, k] for k in (3, 5))
    f3 = other.sort(1).values[:, 3]
    assert got["precision"] == (across <= r3[:, None]).any(0).double().mean()
    assert got["recall"] == (across <= f3).any(1).double().mean()
    assert abs(got["density"] - (across < r5[:, None]).sum() / (5 * 80)) < 1e-12
    assert got["coverage"] == (across < r5[:, None]).any(1).double().mean() and 0 < got["recall"] < 1
    back = scores(fake, real)
    assert (back["precision"], back["recall"]) == (got["recall"], got["precision"])
    turn = 3 * torch.linalg.qr(rand(5, 5, seed=3)).Q
    assert scores(real @ turn + 1, fake @ turn + 1) == got
    assert scores((real + 1e3).float(), (fake + 1e3).float()) == got  # far from 0, in float32
    many = torch.cat([real + k * 1e3 for k in range(20)]), torch.cat([fake + k * 1e3 for k in range(20)])
    assert all(abs(value - got[name]) < 1e-9 for name, value in scores(*many).items())
    assert set(scores(real, real).values()) == {1.0}
    assert set(scores(real, real + 1e3).values()) == {0.0}
    collapsed = scores(real, real[:1] + 1e-4 * rand(80, 5))
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.05
    # -3 is as far from 0 as 3 is
    line, apart = torch.arange(8.)[:, None], -10 * torch.arange(6.)[:, None] - 3
    assert scores(line, apart)["precision"] == scores(apart, line)["recall"] == 1 / 6
    raises(lambda: scores(real[:5], fake), "more than 5 images", "5")


def test_metrics_kernel_distance():
    """The unbiased MMD by its definition; equal laws average 0, a shift is positive, a rotation changes
    nothing."""
    x, y = rand(40, 6, seed=1), rand(40, 6, seed=2) + 0.5

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    within = sum(k(z[i], z[j]) for z in (x, y) for i, j in pairs) / len(pairs)
    want = within - 2 * sum(k(a, b) for a in x for b in y) / 1600
    got = metrics.kernel_distance(x, y)
    assert abs(got["value"] - want) < 1e-9 and got["std"] == 0 and got["value"] > 0.05
    turn = torch.linalg.qr(rand(6, 6, seed=3)).Q
    assert abs(metrics.kernel_distance(x @ turn, y @ turn)["value"] - want) < 1e-9
    null = metrics.kernel_distance(rand(2000, 6, seed=4), rand(2000, 6, seed=5), size=500)
    assert abs(null["value"]) < 0.01 and null["std"] > 0
    raises(lambda: metrics.kernel_distance(x[:1], y), "at least 2 images", "1 and 40")


def test_metrics_bias_is_what_few_images_add(capsys):
    """20 draws of 64 D images: the mean distance less B(N) is the true one within 3 standard errors, and
    the floor is the distance of a perfect generator. A reference of few images adds its share. The command
    prints both for several N."""
    d, n = 32, 2048
    scale, shift = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5, 0.05
    zero, cov, wide = 0 * scale, torch.diag(scale ** 2), torch.diag((1.3 * scale) ** 2)

    def moments(seed, std, mean):
        stats = fid.Statistics(d)
        stats.update(rand(n, d, seed=seed) * std + mean)
        return stats.finish()

    def measured(gen, n, ref, n_ref):
        gen = fid.ImageSet("generated", n, parts={fid.FRECHET: gen})
        ref = fid.ImageSet("reference", n_ref, parts={fid.FRECHET: ref})
        return bias.with_bias(gen, ref, ["bias"], TOY)["fid"]

    def excess(key, runs, truth):
        gaps = np.array([run["value"] - run[key] - truth for run in runs])
        assert abs(gaps.mean()) < 3 * gaps.std(ddof=1) / 20 ** 0.5, (key, gaps.mean())
        assert np.mean([run["value"] for run in runs]) - truth > 0.9 * runs[0][key] > 0

    truth = d * shift ** 2 + (0.3 * scale).square().sum()
    other = [measured(moments(k, 1.3 * scale, shift), n, (zero, cov), None) for k in range(20)]
    both = [measured(moments(k, 1.3 * scale, shift), n, moments(99 - k, scale, 0), n) for k in range(20)]
    perfect = [measured(moments(k, scale, 0), n, moments(99 - k, scale, 0), n) for k in range(20)]
    excess("bias", other, truth)
    excess("bias", both, truth)
    excess("floor", perfect, 0)
    assert bias.bias_and_floor(cov, None, wide, None)["bias"] is None
    # round Gaussians: all s are alike, 2 and 1
    eye, pairs = torch.eye(d, dtype=torch.float64), d * (d + 1) / 2
    one, two = (bias.bias_and_floor(4 * eye, 10, eye, n_ref) for n_ref in (None, 20))
    assert abs(one["bias"] - (4 * d + pairs) / 10) < 1e-9 and abs(one["floor"] - (d + pairs / 2) / 10) < 1e-9
    assert abs(two["bias"] - one["bias"] - (d + pairs) / 20) < 1e-9
    assert abs(two["floor"] - one["floor"] - (d + pairs / 2) / 20) < 1e-9
    few = rand(9, d, seed=5)  # a singular reference, whose eigenvalues of 0 come out negative
    own = torch.linalg.svdvals(few) ** 2
    got = bias.bias_and_floor(eye, 10, few.T @ few, None)["floor"]
    assert abs(got / bias.small_sample_bias(own, own.sum(), 10) - 1) < 1e-9
    bias.main()
    table = re.findall(r"N +(\d+) +excess ([\d.]+) +B\(N\) ([\d.]+)", capsys.readouterr().out)
    for n, found, expected in np.array(table, float):  # B(N) is about 33.5 / N
        assert abs(found - expected) < 0.5 * expected and abs(expected * n / 33.5 - 1) < 0.1, n
    assert [row[0] for row in table] == ["64", "256", "1024", "4096"]


def test_metrics_rows_stay_in_order():
    """Rows are kept as they come while their tensor grows, and are given back in order of index."""
    kept, x = metrics.Rows(3), rand(2500, 3).float()
    assert len(kept.stored) == 1000 and len(metrics.Rows(3, "cpu", 7).stored) == 7
    order = torch.randperm(2500)
    for part in order.split(700):
        kept.update(x[part], part.tolist())
    assert kept.n == 2500 and torch.equal(kept.finish(), x)


ALL = ["fd", "sfid80", "is", *metrics.NEIGHBOURS, "kid"]


def test_metrics_of_every_kind_of_images(tmp_path, capsys):
    """All eight scores, with bias and floor, of a folder, a zip, an npz, a channels-first one and batches,
    for any batch size, order of images and number of workers; each score asked for alone is the same."""
    images, labels = data.glyphs(80, seed=5)
    real, npz = write_npz(tmp_path / "real.npz", *REAL), write_npz(tmp_path / "a.npz", images, labels)
    want = toy(npz, real, metrics="all")
    assert list(values(want)) == [f"{name}_toy" for name in ALL]
    fd, precise = want["scores"]["fd_toy"], want["scores"]["precision_toy"]
    assert fd["bias"] > 0 < fd["floor"] and want["scores"]["sfid80_toy"]["bias"] > 0
    assert precise["n_ref"] == 120 and 0 < precise["value"] <= 1
    folder = write_folder(tmp_path / "png", images, labels)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(Path(folder).rglob("*.*")):
            archive.write(path, f"inside/{path.name}")
    np.savez_compressed(tmp_path / "small.npz", images=images.numpy())
    for source in (folder, str(tmp_path / "a.zip"), tmp_path / "small.npz", list(images.split(33))):
        got = toy(source, real, batch=30, metrics="all")
        assert got["n"] == 80 and got["scores"].keys() == want["scores"].keys()
        if source in (folder, str(tmp_path / "a.zip")):  # in another order, of which IS takes its parts
            got["scores"]["is_toy"] = want["scores"]["is_toy"]
        assert_same_scores(got, want)
    assert_same_scores(toy(folder, real, batch=7, workers=2, metrics="all"), toy(folder, real, metrics="all"))
    for name in (*ALL[1:], "bias", "fid"):
        one, = toy(npz, real, metrics=name.removesuffix("80"))["scores"].items()
        assert one[0].startswith("fd" if name == "bias" else ALL[0] if name == "fid" else name)
        assert one[1].items() <= want["scores"][one[0]].items(), name
    assert list(values(toy(npz, real, metrics="kid,recall"))) == ["recall_toy", "kid_toy"]
    raises(lambda: toy(npz, real, metrics="fid,fit"), "--metrics fit", "coverage")
    capsys.readouterr()
    lines = fid.as_text(toy(npz, real, metrics="all")).splitlines()
    wanted = ("fd_toy", "bias", "floor", "n 80, n_ref 120"), ("sfid80",), ("is", "std")
    for line, words in zip(lines, wanted):
        assert all(word in line for word in words) and ("real.npz" in line) == (words[0] != "is")


def test_metrics_on_glyph_net_and_command_line(tmp_path, capsys):
    """On GlyphNet there are neither Inception Score nor KID, and fd_glyphs keeps its floor of real images;
    python -m extras.metrics prints all, fid.py finds a score in extras/, also when it is the main program."""
    npz = write_npz(tmp_path / "a.npz", *data.glyphs(150, seed=5))
    found = fid.evaluate(npz, "glyphs", features="glyphs", device="cpu", metrics="all")
    names = [f"{name}_glyphs" for name in metrics.NEIGHBOURS]
    assert list(values(found)) == ["fd_glyphs", *names, "accuracy"]
    floor = score_glyphs(data.glyphs(150, seed=5)[0])["floor"]
    assert abs(found["scores"]["fd_glyphs"]["floor"] - floor) < 1e-6 < found["scores"]["fd_glyphs"]["bias"]
    alone = fid.evaluate(npz, "glyphs", features="glyphs", device="cpu", metrics="recall")
    assert values(alone) == {name: values(found)[name] for name in ("recall_glyphs", "accuracy")}
    for name in ("kid", "is", "sfid"):
        raises(lambda: fid.evaluate(npz, "glyphs", features="glyphs", metrics=name), f"--metrics {name}")
    metrics.main([])
    flags = [npz, "glyphs", "--features", "glyphs", "--device", "cpu", "--batch", "50"]
    metrics.main(flags)
    out = capsys.readouterr().out
    assert "python -m extras.metrics" in out and "coverage_glyphs" in out and "bias" in out
    done = run("fid.py", *flags, "--metrics", "recall,bias")
    first, second = done.stdout.splitlines()[:2]
    assert done.returncode == 0 and first.startswith("recall_glyphs") and second.startswith("fd_glyphs")
    assert first in out and " bias " in second and " floor " in second


def test_metrics_mmhm(tmp_path, capsys):
    """The best of all in everything has 1 + 1e-3 = K / (K / (1 + 1e-3)), the worst 1e-3; lower distances
    are better; saved bounds keep a model's number when others come."""
    columns = ("fid5k", "precision")
    rows = dict(a=(2.0, 0.8), b=(4.0, 0.6), c=(3.0, 0.8))
    models = {name: dict(zip(columns, row)) for name, row in rows.items()}
    means, bounds = mmhm.mmhm(models)
    assert abs(means["a"] - 1.001) < 1e-9 and abs(means["b"] - 1e-3) < 1e-9
    assert abs(means["c"] - 2 / (1 / 0.501 + 1 / 1.001)) < 1e-9
    assert bounds == dict(fid5k=[2, 4], precision=[0.6, 0.8])
    better = models | {"d": dict(fid5k=1.0, precision=0.9)}
    kept = mmhm.mmhm(better, bounds)[0]
    assert mmhm.mmhm(better)[0]["a"] < 1 and kept["a"] == means["a"] == kept["d"]
    worse = mmhm.mmhm({"e": dict(fid5k=9.0, precision=0.8), "f": dict(fid5k=2.0, precision=0.1)}, bounds)[0]
    # beyond the bounds is 0
    assert abs(worse["e"] - 2 / (1 / 0.001 + 1 / 1.001)) < 1e-9 and worse["e"] == worse["f"]
    for name in ("sfid5k", "kid", "fd_glyphs", "fid_torchvision", "is", "recall"):
        pairs = ((1, 2), (2, 1), (1, 1))
        low, high, equal = (mmhm.mmhm({"a": {name: x}, "b": {name: y}})[0]["a"] for x, y in pairs)
        assert (low > high) == (name not in ("is", "recall")) and equal == max(low, high), name
    raises(lambda: mmhm.mmhm({"a": dict(fid5k=1.0)}, bounds), "a has the metrics fid5k", "precision")
    files = [str(tmp_path / f"{name}.json") for name in models]

    def write(file, scores):
        Path(file).write_text(json.dumps(dict(scores={name: dict(value=x) for name, x in scores.items()})))

    for file, scores in zip(files, models.values()):
        write(file, scores | dict(kid=0.1, labels=1))
    for written in (None, json.dumps(bounds)):  # writes the bounds, then reads them and lets them be
        if written:
            (tmp_path / "bounds.json").write_text(written)
        mmhm.main([",".join(files), "--bounds", str(tmp_path / "bounds.json")])
        lines = capsys.readouterr().out.splitlines()
        assert json.loads((tmp_path / "bounds.json").read_text()) == bounds
        assert "fid5k, precision" in lines[0] and lines[1].split() == ["1.0010", files[0]] and len(lines) == 4
        assert [line.split()[1] for line in lines[2:]] == [files[2], files[1]]  # the best first
    assert lines[0].endswith(f"bounds {tmp_path / 'bounds.json'}")
    write(files[1], dict(fid5k=1.0, recall=0.5))
    mmhm.main([",".join(files)])  # what all of them have
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MMHM of fid5k, bounds of these results" and lines[1].split() == ["1.0010", files[1]]
    flags = [",".join(files), "--bounds", str(tmp_path / "bounds.json")]
    raises(lambda: mmhm.main(flags), "precision", "expected")
    assert (tmp_path / "bounds.json").read_text() == written


def test_metrics_spread_of_several_sets(tmp_path, capsys):
    """A list of sets, or --repeat, gives mean, deviation and each one, and measures the reference once;
    sets of other sizes have no common name."""
    real = write_npz(tmp_path / "real.npz", *REAL)
    sets = [write_npz(tmp_path / f"{seed}.npz", *data.glyphs(60, seed=seed)) for seed in (11, 12, 13)]
    several = lambda *args, **options: spread.evaluate(*args, net=TOY, device="cpu", metrics="all", **options)
    with pytest.MonkeyPatch.context() as patch:
        batches, extract = [], TOY.extract
        patch.setattr(TOY, "extract", lambda images: batches.append(len(images)) or extract(images))
        got = several(sets, real)
        assert sum(batches) == 3 * 60 + 120
    single = [toy(one, real, metrics="all") for one in sets]
    for name, score in got["scores"].items():
        found = [one["scores"][name]["value"] for one in single]
        assert abs(score["value"] - np.mean(found)) < 1e-9
        assert abs(score["std"] - np.std(found, ddof=1)) < 1e-9
    assert [values(one) for one in got["sets"]] == [values(one) for one in single] and score["sets"] == 3
    assert "retraining" in capsys.readouterr().err and all(one in got["generated"] for one in sets)
    twice = several(sets[:1], real, subset=40, repeat=2, seed=5)
    first = toy(sets[0], real, subset=40, seed=5, metrics="is")
    assert values(twice["sets"][0])["is_toy"] == values(first)["is_toy"]
    assert values(twice["sets"][0]) != values(twice["sets"][1]) and twice["generated"] == sets[0]
    capsys.readouterr()
    spread.evaluate(sets[:1], real, net=TOY, device="cpu", metrics="recall", subset=40, repeat=2)
    assert "retraining" not in capsys.readouterr().err  # a note on FIDs only
    raises(lambda: several([sets[0], real], real), "one size", "sfid60_toy", "sfid120_toy")
    raises(lambda: several(sets, real, save_stats="a.npz"), "--save_stats a.npz", "one set")
    flags = ["glyphs", "--features", "glyphs", "--device", "cpu"]
    spread.main([",".join(sets[:2]), *flags, "--json"])
    assert len(json.loads(capsys.readouterr().out)["sets"]) == 2
    spread.main([sets[0], *flags, "--repeat", "2", "--subset", "30"])
    out = capsys.readouterr().out
    assert "fd_glyphs" in out and "std" in out and "sets 2" in out and "{" not in out


def test_metrics_of_two_processes_equal_one(tmp_path):
    """The scores of single images too are those of one process: rows are gathered in order of index."""
    names = [f"{name}_glyphs" for name in metrics.NEIGHBOURS]
    assert list(check_two_processes(tmp_path, "all")) == ["fd_glyphs", *names, "accuracy"]


# ---- stored ----


def test_stored_statistics_stand_for_images(tmp_path, capsys):
    """ADM's file: Frechet distances from mu, sigma, mu_s, sigma_s, the others from arr_0. Other names, .pt
    files, and files without spatial statistics do as far as they go; images that no metric needs are not
    measured."""
    images, labels = data.glyphs(80, seed=5)
    npz, adm = write_npz(tmp_path / "a.npz", images, labels), str(tmp_path / "adm.npz")
    net, (whole, part) = Toy(), (REAL[0], REAL[0][:50])
    net.suffix = ""  # stands for the 2015-12-05 weights
    score = lambda *sides, net=net, wanted="all": fid.evaluate(*sides, net, metrics=wanted, device="cpu")
    own = str(tmp_path / "own.npz")
    alone = toy(write_npz(tmp_path / "whole.npz", *REAL), "", save_stats=own, metrics="all")
    assert alone["scores"] == {} and alone["reference"] is None
    with np.load(own) as file:
        known = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
        meta = json.loads(str(file["meta"]))
        assert meta == dict(features="toy", resize="none", size=[32, 32]) and file["n"] == 120
    features = TOY.extract(whole)["features"].detach().numpy()
    assert np.abs(known["sigma"] - np.cov(features, rowvar=False)).max() < 1e-12
    np.savez(adm, arr_0=part.permute(0, 2, 3, 1).numpy(), **known)
    capsys.readouterr()
    got = score(npz, adm)
    notes = capsys.readouterr().err
    assert "mu and sigma, other scores from its images (arr_0)" in notes
    assert "does not say how it was made" in notes
    assert got["n_ref"] is None and got["scores"]["recall"]["n_ref"] == 50
    frechet, rows = score(npz, own), score(npz, write_npz(tmp_path / "part.npz", part, REAL[1][:50]))
    notes = capsys.readouterr().err
    for name in metrics.NEIGHBOURS:
        assert f"own.npz has no images, nor statistics for {', '.join(metrics.NEIGHBOURS)}: skipped" in notes
    for name in ("fd", "sfid80"):
        assert abs(got["scores"][name]["value"] - frechet["scores"][name]["value"]) < 1e-9
        # of unknown size, so it counts as exact
        assert got["scores"][name]["bias"] < frechet["scores"][name]["bias"]
    for name in (*metrics.NEIGHBOURS, "kid", "is"):
        assert got["scores"][name]["value"] == rows["scores"][name]["value"], name
    np.savez(tmp_path / "alias.npz", ref_mu=known["mu"], ref_sigma=known["sigma"])
    torch.save({name: torch.from_numpy(known[name]) for name in ("mu", "sigma")}, tmp_path / "stats.pt")
    for name in ("alias.npz", "stats.pt"):
        other = score(npz, str(tmp_path / name))
        assert list(other["scores"]) == ["fd", "is"] and abs(values(other)["fd"] - values(got)["fd"]) < 1e-9
        assert f"{name} has no images, nor statistics for sfid: skipped" in capsys.readouterr().err
    lazy = Toy()
    lazy.suffix, lazy.extract = "", None
    assert list(score(str(tmp_path / "stats.pt"), adm, net=lazy, wanted="fid")["scores"]) == ["fd"]
    stored.main([adm, npz])
    assert "mu (12,), mu_s (6,)" in (out := capsys.readouterr().out)
    assert "a.npz: no statistics, and images" in out


def test_stored_refusals(tmp_path, capsys):
    """Statistics of other weights, resize rules or sizes do not compare, nor do unrecorded ones with any
    but the FID's features; pickles, damaged files and images of several sizes are refused, before any image
    is measured."""
    npz = write_npz(tmp_path / "a.npz", *REAL)
    stats, other = str(tmp_path / "stats.npz"), str(tmp_path / "other.npz")
    toy(npz, "", save_stats=stats)
    never, official = Toy(), Toy()
    never.extract, official.suffix = None, ""
    early = lambda *sides, net=never, **options: fid.evaluate(*sides, net=net, device="cpu", **options)
    with np.load(stats) as file:
        parts = dict(file)
    for key, value in (("features", "inception fid 6726825d"), ("resize", "clean"), ("size", [64, 64])):
        np.savez(other, **parts | {"meta": json.dumps(json.loads(str(parts["meta"])) | {key: value})})
        for pair in ((npz, other), (other, npz)):
            words = ("[64, 64]", "[32, 32]", "--size")
            raises(lambda: early(*pair), *words if key == "size" else (f"{key}={value}", f"{key}=", "--save"))
        assert key == "size" or error_of(early, npz, other).startswith(f"{other}: statistics were made with ")
    np.savez(tmp_path / "bare.npz", mu=parts["mu"], sigma=parts["sigma"])
    torch.save(dict(mu=torch.zeros(12)), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    for name in ("edm.pkl", "edm.pickle", "broken.npz"):
        (tmp_path / name).write_bytes(b"PK")
    junk = tmp_path / "junk.npz"
    with zipfile.ZipFile(junk, "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY junk")
    np.savez(tmp_path / "none.npz", x=parts["mu"])
    table = [(stats, dict(num=100), f"found 120 images in {stats}", "--num asks for 100"),
             (tmp_path / "bare.npz", {}, "does not say how it was made", "--weights fid", "--save_stats"),
             (tmp_path / "bare.npz", dict(num=50, net=official), "an unknown number", "50"),
             (tmp_path / "edm.pkl", {}, "edm.pkl", "numpy.savez"),
             (tmp_path / "edm.pickle", {}, "edm.pickle", "numpy.savez"),
             (tmp_path / "half.pt", dict(num=5), "half.pt", "damaged"),
             (tmp_path / "broken.npz", {}, "broken.npz", "not a readable npz"),
             (junk, {}, "junk.npz", "not a readable npz"),
             (tmp_path / "none.npz", {}, "holds x", "arr_0"),
             (npz, dict(save_stats="a.txt"), "a.txt", ".npz")]
    for source, options, *words in table:
        raises(lambda: early(source, stats, **options), *words)
    mixed = tmp_path / "mixed"
    write_folder(mixed, *REAL)
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    for exif, words in ((None, "48x40 (1: 0/odd.png)"), (turned, "40x48 (1: 0/odd.png)")):
        Image.new("RGB", (48, 40)).save(mixed / "0" / "odd.png", exif=exif)
        raises(lambda: early(str(mixed), npz), f"2 sizes: 32x32 (120), {words}", "--size")
        raises(lambda: early(npz, mixed), words)
    assert toy(str(mixed), npz, size=32)["n"] == 121
    (mixed / "0" / "odd.png").write_bytes(b"no image")
    raises(lambda: early(str(mixed), npz), f"{mixed}/0/odd.png: not a readable image", "remove it")
    assert toy(stats, npz, num=120)["n"] == 120 and capsys.readouterr().err.count("JPEG") == 0


def test_stored_warns_of_jpeg_files(tmp_path, capsys):
    """JPEG files among the generated are told of, once; among the reference they are not; few samples come
    with the floor where bias is asked for."""
    real = write_npz(tmp_path / "real.npz", *REAL)
    (tmp_path / "jpg").mkdir()
    for i, image in enumerate(REAL[0][:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "jpg" / f"{i}.JPG")
    got = toy(str(tmp_path / "jpg"), real, metrics="bias")
    notes = capsys.readouterr().err
    assert notes.count("JPEG") == 1 and f"(floor ~{got['scores']['fd_toy']['floor']:.3g})" in notes
    toy(real, str(tmp_path / "jpg"))
    assert capsys.readouterr().err == ""
    for path in (tmp_path / "jpg").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    toy(str(tmp_path / "jpg"), real)
    notes = capsys.readouterr().err
    assert "JPEG" in notes and "floor" not in notes and "only N=20 < 24 samples" in notes


def test_stored_statistics_of_glyphs(tmp_path):
    """Statistics on GlyphNet's features compare with held-out glyphs and with the images they are of."""
    npz, stats = write_npz(tmp_path / "a.npz", *data.glyphs(150, seed=5)), str(tmp_path / "stats.npz")
    how = dict(features="glyphs", device="cpu")
    got = fid.evaluate(npz, "glyphs", save_stats=stats, **how)
    again = fid.evaluate(stats, "glyphs", **how)
    assert values(again) == {"fd_glyphs": values(got)["fd_glyphs"]}
    assert abs(again["scores"]["fd_glyphs"]["floor"] - got["scores"]["fd_glyphs"]["floor"]) < 1e-9
    assert abs(values(fid.evaluate(npz, stats, **how))["fd_glyphs"]) < 1e-8


# ---- inception ----

AUX = {f"AuxLogits.{unit}.{name}": shape for unit, o, conv in (("conv0", 128, (128, 768, 1, 1)),
                                                              ("conv1", 768, (768, 128, 5, 5)))
       for name, shape in {"conv.weight": conv, **{f"bn.{k}": (o,) for k in
                           ("weight", "bias", "running_mean", "running_var")}}.items()}
AUX |= {"AuxLogits.fc.weight": (1000, 768), "AuxLogits.fc.bias": (1000,)}


def inception_shapes(flavour):
    """Names and shapes of the official file, without batch counters."""
    own = inception.InceptionV3(flavour=flavour).state_dict()
    own = {name: tuple(value.shape) for name, value in own.items()
           if not name.endswith("num_batches_tracked")}
    return own | AUX if flavour == "torchvision" else own


@functools.lru_cache(maxsize=None)
def golden_file(flavour):
    """A weights file with the golden weights, the auxiliary head and batch counters in it as in
    torchvision's."""
    path = Path(tempfile.mkdtemp()) / f"{flavour}.pth"
    state = golden_weights(inception_shapes(flavour))
    state["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, path)
    return path


def close(value, want, tolerance=1e-4):
    """Largest error relative to the rms of the wanted values."""
    value, want = torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    error = (value - want).abs().max() / want.square().mean().sqrt()
    assert error <= tolerance, f"relative error {error:.1e}: {value.tolist()} against {want.tolist()}"


def summary(x, at):
    """Mean, rms and the values at flat indices, as in golden.md."""
    x = x.double().flatten()
    return [x.mean().item(), x.square().mean().sqrt().item(), *x[at].tolist()]


def test_inception_has_the_names_and_sizes_of_the_files():
    """484 tensors and 27,161,264 parameters with torchvision's auxiliary head; 472 and 23,850,960 for the
    FID."""
    for flavour, tensors, parameters in (("torchvision", 484, 27_161_264), ("fid", 472, 23_850_960)):
        shapes = inception_shapes(flavour)
        trained = [s for n, s in shapes.items() if not n.endswith(("running_mean", "running_var"))]
        assert len(shapes) == tensors and sum(int(np.prod(s)) for s in trained) == parameters
    rows = "branch7x7_2 branch7x7dbl_3 branch7x7dbl_5 branch7x7x3_2 branch3x3_2a branch3x3dbl_3a".split()
    columns = "branch7x7_3 branch7x7dbl_2 branch7x7dbl_4 branch7x7x3_3 branch3x3_2b branch3x3dbl_3b".split()
    for name in [name for name in shapes if name.endswith("conv.weight")]:
        unit, (*_, high, wide) = name.split(".")[-3], shapes[name]
        assert (high < wide, high > wide) == (unit in rows, unit in columns), name
    assert shapes["fc.weight"] == (1008, 2048)


def test_inception_golden():
    """Both flavours, recognised from their files, give the numbers of torchvision and of pytorch-fid on a
    wave, and so they do with folded normalisation in channels-last memory; an image does not depend on its
    batch."""
    x, seen = wave((2, 3, 299, 299), .0137), []
    net = inception.InceptionV3(golden_file("torchvision"))
    net.train()
    out = net.outputs(x)
    assert net.flavour == "torchvision" and not net.training
    close(summary(out["features"], [0, 1, 1365, 2048, 4095]),
          [0.1132500644, 0.2243506167, 0.9033113718, 0.8530551791, 0.1643990576, 0.9033060074, 0.3203912675])
    close(summary(out["logits"] + net.fc.bias, [0, 1, 666, 1000, 1999]),
          [0.0038307788, 0.6621285819, -0.8854402900, -0.9017716050, -0.8211702108, -0.8854588866,
           0.8038506508])
    net = inception.InceptionV3(golden_file("fid"))
    out = net.outputs(x)
    assert net.flavour == "fid"
    close(summary(out["features"], [0, 1, 1365, 2048, 4095]),
          [0.1181154694, 0.2483061382, 0.9254347086, 1.0329910517, 0.0, 0.9254313111, 0.1479515433])
    close(summary(out["logits"], [0, 1, 672, 1008, 2015]),
          [0.0118307078, 0.7277952804, -0.9783409834, -0.9400481582, -0.5902845860, -0.9783401489,
           0.3934402466])
    close(summary(out["spatial"], [])[:2], [0.2028957800, 0.2759872773])
    net.fast()
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, result: seen.append(result))
    again = net.outputs(x[1:])
    assert torch.equal(again["spatial"].view(1, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    hook.remove()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for name in out:
        close(again[name].flatten(), out[name][1:].flatten(), 1e-5)
    calls, images = [], data.glyphs(3)[0]
    parts = lambda x: {name: x.flatten(1)[:, :width] for name, width in net.widths.items()}
    net.outputs = lambda x: calls.append(len(x)) or parts(x)
    assert net.at_once == 8
    net.at_once, whole = 2, net.extract(images)
    assert same(net.extract(images), whole) and calls == [3, 2, 1]  # in their order


def test_inception_pooling():
    """Averages of ones stay 1 at the border for the FID, whose graph leaves the padding out, and lose it
    with torchvision; the last block of the FID pools by maximum; blocks that halve the size have no
    convolution after their maximum."""
    for flavour in ("fid", "torchvision"):
        blocks, seen = inception_blocks.inception_blocks(flavour), {}
        for name, (branches, pool) in blocks.items():
            block = inception_blocks.Mixed(4, branches, pool)
            if hasattr(block, "branch_pool"):
                pooled = lambda module, args: seen.update({name: args[0][0, 0]})
                block.branch_pool.register_forward_pre_hook(pooled)
            out = block(-torch.ones(1, 4, 5, 5) if name == "Mixed_7c" else torch.ones(1, 4, 5, 5))
            assert out.shape[2] == (2 if name in ("Mixed_6a", "Mixed_7a") else 5)
            assert name in seen or out[0, -1, 0, 0] == 1
        rim = torch.tensor([2 / 3, 1, 1, 1, 2 / 3])
        want = {name: torch.outer(rim, rim) if flavour == "torchvision" else torch.ones(5, 5)
                for name in seen}
        want["Mixed_7c"] = -want["Mixed_7c"]  # an average of -1, or their maximum, which no padding may reach
        assert len(seen) == 9 and all(torch.allclose(seen[name], want[name]) for name in seen)
    blocks = inception_blocks.inception_blocks("fid")
    average, maximum = blocks["Mixed_7b"][1], blocks["Mixed_7c"][1]
    point = torch.zeros(1, 1, 5, 5).index_fill(3, torch.tensor(2), 9)
    assert maximum(point).max() == 9 and average(point).max() == 3


def test_inception_precision():
    """Features of float32 are those of float64 to 1e-5 of the rms, in a small image; no gradient is kept."""
    net, x = inception.InceptionV3(golden_file("fid")), wave((1, 3, 107, 107), .0137)
    out = net.outputs(x)
    for name, wide in net.double().outputs(x.double()).items():
        assert wide.dtype == torch.float64 and not out[name].requires_grad
        close(out[name].flatten(), wide.flatten(), 1e-5)
    assert (out["spatial"] >= 0).all() and out["spatial"].max() > 0


def test_inception_preprocessing():
    """uint8 images are resized and mapped as documented; autocast changes nothing."""
    image = data.glyphs(1)[0]
    torch.manual_seed(0)
    for resize, function in inception.RESIZES.items():
        net = inception.InceptionV3(flavour="fid", resize=resize)
        x, seen = function(image), []
        hook = net.Conv2d_1a_3x3.register_forward_hook(lambda module, args, result: seen.append(args[0]))
        got = net(image)
        hook.remove()
        assert torch.equal(seen[0], x / 127.5 - 1 if resize == "pytorch" else (x - 128) / 128)
        assert got.dtype == torch.float32 and got.shape == (1, 2048) and net.resize.startswith(resize)
    assert inception.InceptionV3(flavour="fid").resize == "tf1 to 299, (x-128)/128"
    assert inception.InceptionV3(flavour="torchvision").resize == "tf1 to 299, x/127.5-1"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(image), got)
    raises(lambda: net(image.float()), "data.to_uint8", "float32")
    for wrong in (image[:, :1], image[0].permute(1, 0, 2)):
        raises(lambda: net(wrong), "(N, 3, h, w)")
    raises(lambda: inception.InceptionV3(resize="bilinear"), "--resize bilinear", "tf1, pytorch, clean")


def test_inception_resize_rules():
    """tf1 reads input i n / 299: a ramp of n becomes i n / 299 up to the clamped edge, and any image what
    StyleGAN's shifted grid gives; pytorch is half a pixel further; clean is Pillow's bicubic of float
    images. 299 pixels stay."""
    rng = torch.Generator().manual_seed(0)
    same = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=rng)
    assert torch.equal(inception.resize_tf1(same), same.float())
    for resize in inception.RESIZES.values():
        assert (resize(torch.full((1, 3, 40, 50), 77, dtype=torch.uint8)) - 77).abs().max() < 1e-4
    for n in (32, 256, 512):
        ramp = torch.arange(n, dtype=torch.float32).expand(1, 1, n, n)
        want = (torch.arange(299) * n / 299).clamp_max(n - 1).expand(1, 1, 299, 299)
        assert (inception.resize_tf1(ramp) - want).abs().max() < 1e-4
        assert (inception.resize_tf1(ramp.mT) - want.mT).abs().max() < 1e-4
        phase = inception.resize_pytorch(ramp) - inception.resize_tf1(ramp) - 0.5 * (n / 299 - 1)
        assert phase[..., 20:-20].abs().max() < 1e-3
        image = torch.randint(0, 256, (1, 3, n, n), dtype=torch.uint8, generator=rng)
        theta = torch.eye(2, 3)[None]
        theta[0, :, 2] += 1 / n - 1 / 299
        grid = nn.functional.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
        shifted = nn.functional.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
        # float32 grid; a wrong rule is off by 50
        assert (inception.resize_tf1(image) - shifted).abs().max() < 0.05
        for channel, got in zip(image[0], inception.resize_clean(image)[0]):
            pillow = Image.fromarray(channel.float().numpy(), "F")
            pillow = pillow.resize((299, 299), Image.Resampling.BICUBIC)
            assert np.abs(got.numpy() - np.array(pillow).clip(0, 255)).max() < 0.01


def test_inception_weights_files_that_cannot_be_used(tmp_path, capsys):
    """Missing, cut, foreign, incomplete and wrongly named weights are one-line errors that say what to do."""
    raises(lambda: inception.load_inception("torchvision"), CACHE, "0cc3c7bd", "108,949,747",
           "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth")
    raises(lambda: inception.load_inception("fid"), "95,628,359", "6726825d0af5f729", "mseitzer")
    half = Path(CACHE) / "pt_inception-2015-12-05-6726825d.pth"
    half.write_bytes(b"half")
    raises(lambda: inception.load_inception("fid"), "4 bytes", "incomplete")
    inception.main()
    assert f"{half} is there" in (out := capsys.readouterr().out) and "0cc3c7bd.pth is not there" in out
    half.unlink()
    raises(lambda: inception.load_inception("no.pth"), "no.pth", "torchvision")
    whole = golden_file("fid")
    raises(lambda: inception.InceptionV3(whole, "torchvision"), "fid weights, not torchvision", "1008")
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:1_000_000])
    raises(lambda: inception.InceptionV3(tmp_path / "cut.pth"), "cut.pth", "incomplete")
    state = torch.load(whole, weights_only=True)
    torch.save({"fc.weight": torch.zeros(10, 2048)}, tmp_path / "ten.pth")
    raises(lambda: inception.InceptionV3(tmp_path / "ten.pth"), "1000 or 1008")
    state.pop("Mixed_6a.branch3x3.bn.running_var")
    torch.save(state, tmp_path / "less.pth")
    raises(lambda: inception.InceptionV3(tmp_path / "less.pth"), "Mixed_6a.branch3x3.bn.running_var")
    raises(lambda: fid.main([str(tmp_path), str(tmp_path)]), "inception_v3_google-0cc3c7bd.pth")


def test_inception_names_of_scores():
    """fid only for the 2015-12-05 weights and 50,000 images, and other weights say so in every name."""
    nets = [inception.InceptionV3(flavour=flavour) for flavour in ("fid", "torchvision")]
    for name, n, *want in (("fid", 50_000, "fid", "fid_torchvision"),
                           ("fid", 5000, "fid5k", "fid5k_torchvision"),
                           ("sfid", 49_999, "sfid49999", "sfid49999_torchvision"),
                           ("is", 10, "is", "is_torchvision"),
                           ("precision", 10, "precision", "precision_torchvision")):
        assert [fid.score_name(name, net, n) for net in nets] == want


def test_inception_end_to_end(tmp_path, capsys):
    """From a weights file: statistics of the folded network, whose means are the plain one's; the protocol
    is told."""
    weights, npz = golden_file("torchvision"), write_npz(tmp_path / "a.npz", *data.glyphs(6))
    stats = tmp_path / "stats.npz"
    state = torch.random.get_rng_state()
    flags = f"--weights {weights} --save_stats {stats} --json --device cpu --batch 4 --metrics all"
    fid.main([npz, *flags.split()])
    assert torch.equal(torch.random.get_rng_state(), state)
    printed = capsys.readouterr()
    got, net = json.loads(printed.out), inception.InceptionV3(weights)
    assert "not comparable with published FIDs" in printed.err
    assert got["features"] == f"inception torchvision {digest(weights)[:8]}" and got["size"] == [32, 32]
    assert got["resize"] == net.resize and got["n"] == 6
    images = data.glyphs(6)[0]
    plain, fast = net.extract(images), net.fast()
    out = [fast.extract(part) for part in images.split(4)]  # the spread of these is near float32's resolution
    with np.load(stats) as file:
        for mean, cov, kind in (("mu", "sigma", "features"), ("mu_s", "sigma_s", "spatial")):
            assert np.abs(file[mean] - plain[kind].double().mean(0).numpy()).max() < 1e-5
            want = np.cov(torch.cat([part[kind] for part in out]).double().numpy(), rowvar=False)
            assert 0 < np.abs(file[cov] - want).max() < 1e-4 * np.abs(want).max()


# ---- monitor ----


def test_monitor_scores_the_checkpoints_that_a_run_kept(tmp_path, capsys):
    """A line for each step_*.pt that has none: FD-glyphs and accuracy on glyphs; on other data samples are
    measured by InceptionV3 against the data, whose statistics are made once; names tell number and
    weights."""
    out = tmp_path / "glyphs"
    train.train(tiny_run(out, data="glyphs", steps=2, keep_every=1, sample_steps=3))
    for steps in ([1, 2], [1, 2]):  # the second time there is nothing to do
        monitor.main([str(out), "--num", "20", "--device", "cpu"])
        rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == steps
    assert rows[0]["fd_glyphs"] > 0 and 0 <= rows[0]["accuracy"] <= 1 and rows[0]["reference"] == "glyphs:1"
    assert rows[0]["sampling"].startswith("ab2, 3 steps, ")
    assert "seed 1" in rows[0]["sampling"] and rows[0]["n"] == 20
    assert rows[0]["fd_glyphs"] != rows[1]["fd_glyphs"] and not (out / "reference.npz").exists()

    out, small = tmp_path / "files", write_npz(tmp_path / "a.npz", *data.glyphs(4))
    train.train(tiny_run(out, data=small, steps=1, batch=4, keep_every=1))
    weights = ["--weights", str(golden_file("torchvision")), "--device", "cpu"]
    monitor.main([str(out), "--num", "3", *weights])
    row, = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
    assert row["step"] == 1 and row["fid3_torchvision"] > 0 and row["is_torchvision"] >= 1 and row["n"] == 3
    assert row["n_ref"] == 4 and row["reference"].endswith("reference.npz") and "fid" not in row
    raises(lambda: monitor.main([str(tmp_path), "--device", "cpu"]), "no step_*.pt", "--keep_every")


def test_monitor_chooses_the_reference(tmp_path, monkeypatch):
    """Given, or the statistics of the data, made once at its size; latents need a reference and a codec; of
    several processes all measure and one writes."""
    content = dict(config=dict(data="files", size=32), networks=dict(G=dict(config=dict(channels=3))))
    calls, other = [], monitor.Config(run=str(tmp_path), reference="other.npz")
    monkeypatch.setattr(fid, "evaluate", lambda *args, **how: calls.append(how) or dict(scores={}))
    assert monitor.reference_of(other, content) == dict(weights="torchvision", metrics="fid,is",
                                                        reference="other.npz")
    assert not calls
    found = monitor.reference_of(monitor.Config(run=str(tmp_path)), content)
    assert found["reference"] == calls[0]["save_stats"] == str(tmp_path / "reference.npz")
    assert calls[0]["size"] == 32
    (tmp_path / "reference.npz").write_bytes(b"")
    assert monitor.reference_of(monitor.Config(run=str(tmp_path)), content) == found and len(calls) == 1
    glyphs = content | dict(config=dict(data="glyphs:3", size=32))
    found = monitor.reference_of(monitor.Config(run=str(tmp_path)), glyphs)
    assert found == dict(reference="glyphs", features="glyphs")
    assert monitor.reference_of(other, glyphs)["reference"] == "other.npz"
    latents = content | dict(networks=dict(G=dict(config=dict(channels=4))))
    for cfg in (other, monitor.Config(run=str(tmp_path), codec="latents:x")):
        raises(lambda: monitor.reference_of(cfg, latents), "--codec", "--reference")
    decoded = dataclasses.replace(other, codec="latents:x")
    assert monitor.reference_of(decoded, latents)["reference"] == "other.npz"
    monkeypatch.setattr(data, "rank", lambda: 1)
    monkeypatch.setattr(monitor, "score", lambda path, cfg: calls.append(path) or {})
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    monitor.main([str(tmp_path), "--device", "cpu"])
    assert calls[-1].name == "step_0000001.pt" and not (tmp_path / "scores.jsonl").exists()


def test_metrics_of_a_network_conditioned_on_guidance(tmp_path):
    """A run that takes the guidance scale as an input is measured with it, and says so."""
    real = write_npz(tmp_path / "real.npz", *REAL)
    train.train(tiny_run(tmp_path / "imf", "imf", steps=1, omega_max=3.0))
    how = toy(str(tmp_path / "imf"), real, num=8, guidance=2.0)["sampling"]
    assert how.startswith("euler, 2 steps, 2 network evaluations, conditioned on guidance 2")
