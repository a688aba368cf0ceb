"""Bad input, faults and strangers' files: nothing executes, nothing is lost, one line says why.

TABLE has the rows: what is done, and the words of the one line that it must end with, by exit status 2.
"""
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import model
import sample
import train
from extras import (classics, compare, curves, encoders, formats, guidance, latents, mmhm, presets, repa,
                    schedule, search, stored)
from test_all import HERE, SMALL_SET, TWO, checkpoint, flags, logged, run, same, start, tiny_run

CELL = "blocks.0.attn.qkv.weight"


def ends(call, *words) -> None:
    """By data.run_cli the call ends with status 2 and one line, which has the words."""
    before, text = {s: signal.getsignal(s) for s in (*data.ENDS, signal.SIGCHLD)}, io.StringIO()
    try:
        with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as end:
            data.run_cli(lambda: call())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    told = [line for line in text.getvalue().splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(told) == 1 and text.getvalue().splitlines()[-1] == told[0]
    missing = [word for word in words if word not in told[0]]
    assert not missing, f"{missing} not in: {told[0]}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of two steps, which no test changes."""
    out = tmp_path_factory.mktemp("runs") / "base"
    train.train(tiny_run(out, steps=2))
    return out


def in_G(**changes):
    return lambda c: c["networks"]["G"]["config"].update(changes)


def weight(change):
    def both(c):
        for weights in (c["networks"]["G"]["weights"], c["ema"]):
            weights[CELL] = change(weights[CELL])
    return both


def moment(**changes):
    return lambda c: c["networks"]["G"]["optimizer"]["state"][5].update(changes)


def put(*path, value=None):
    """A change of a nested dict: the value at a path, or without one its removal."""
    def change(c):
        for key in path[:-1]:
            c = c[key]
        c.pop(path[-1]) if value is None else c.update({path[-1]: value})
    return change


G, OPT = ("networks", "G"), ("networks", "G", "optimizer")
CHECKPOINTS = [  # a change of last.pt, and the words of the line
    (moment(exp_avg=torch.zeros(1)), "optimizer"), (moment(exp_avg=torch.zeros(9, 9)), "--init"),
    (moment(exp_avg_sq=torch.zeros(())), "optimizer"), (moment(step="x"), "no tensor of floats"),
    (moment(step=torch.tensor(math.nan)), "optimizer"), (moment(step=torch.tensor(-3.0)), "optimizer"),
    (moment(more=torch.zeros(1)), "optimizer"), (put(*OPT, "state", 5), "optimizer"),
    (put(*OPT, "state", 99, value={}), "optimizer"), (put(*OPT, "state", value=[1]), "optimizer"),
    (put(*OPT), "optimizer"), (put(*OPT, value=[3]), "optimizer"),
    *((in_G(**{k: v}), "config") for k, v in dict(
        width=4_000_000, depth=10 ** 7, heads=0, patch=0, input_size=-32, channels=0, num_classes=-1,
        mlp_ratio=1e9, t_min=0.0, predict="y", norm="z", times=9, parts=["os.system"]).items()),
    (in_G(width="x"), "config"), (in_G(width=48.0), "config"), (in_G(depth=2), "config"),
    (in_G(num_classes=10 ** 9), "config"), (in_G(patch=1), "config"), (in_G(input_size=10 ** 9), "config"),
    (in_G(width=None), "settings"), (in_G(t_min=math.nan), "settings"), (in_G(parts=[3]), "settings"),
    (in_G(parts=["jit.JiT"] * 3), "each once"), (put(*G, "config"), "settings"),
    (put(*G, "config", value=[1]), "settings"), (put(*G, "weights"), "in place of weights"),
    (put(*G, "weights", value=[1]), "in place of weights"), (put("networks", value=[1]), "networks"),
    (put(*G), "networks"), (put("networks", "Z", value={}), "networks"), (put("ema"), "in place of weights"),
    (put("ema", CELL), "is missing"), (put("ema", "more", value=torch.ones(1)), "is unknown"),
    (put("step", value=-7), "step -7"), (put("step", value="x"), "step 'x'"),
    (put("step", value=1.5), "step 1.5"),
    (put("step", value=True), "step True"), (put("step", value=10 ** 30), "step"), (put("step"), "--init"),
    (put("seconds", value=math.nan), "seconds nan"), (put("seconds", value="x"), "seconds"),
    (put("config"), "--init"), (put("config", value=[1]), "settings"),
    (put("config", "lr", value="x"), "--lr"), (put("config", "loss", value=["fm"]), "settings"),
    (put("config", "guidance", value=math.inf), "settings"), (put("config", "ema", value=2.0), "--ema 2.0"),
    (put("config", "sample_steps", value=10 ** 9), "--sample_steps"),
    (put("config", "seed", value=1.5), "seed"),
    (put("sampling", value=[1]), "settings"),
    *((weight(change), word) for change, word in (
        (lambda x: x.int(), "torch.int32"), (lambda x: x.bool(), "torch.bool"), (lambda x: "x", "no tensor"),
        (lambda x: x.to(torch.complex64), "torch.complex64"), (lambda x: x * math.nan, "not finite"),
        (lambda x: x / 0, "not finite"), (lambda x: x[:3], "the network has"),
        (lambda x: x.to("meta"), "no tensor"),
        (lambda x: x.to_sparse(), "no tensor"), (lambda x: torch.zeros(1).expand(10 ** 6, 10 ** 6),
                                                 "larger than"))),
]


def test_faults_checkpoints_are_checked_before_they_are_used(base, tmp_path):
    """A last.pt that is not what train.py writes: one line that names it, from --resume or its flag, and, for
    what sampling needs, from sample.py; no memory is asked for. A check sum that is wrong is seen."""
    whole = torch.load(base / "last.pt", weights_only=True)
    for change, *words in CHECKPOINTS:
        content = copy.deepcopy(whole)
        change(content)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        torch.save(content, tmp_path / "run/last.pt")
        ends(lambda: train.main(flags(tmp_path / "run", "--resume", "--steps", 4)), *words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KB
    raw = bytearray((base / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "run/last.pt").write_bytes(raw)
    ends(lambda: sample.main([str(tmp_path / "run")]), "last.pt", "damaged")


def code_rows(base, tmp_path):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(x): return x.flatten(2)\n")
    for name, value in (("encoder", f"{evil}:f"), ("loss", f"{evil}:f"), ("codec", f"{evil}:f"),
                        ("time", f"{evil}:f"), ("model", f"{evil}:f"), ("processes", str(evil)),
                        ("solver", str(evil))):
        content = torch.load(base / "last.pt", weights_only=True)
        content["config"] |= {name: value} | (dict(loss="repa") if name == "encoder" else {})
        out = tmp_path / name
        out.mkdir()
        torch.save(content, out / "last.pt")
        argv = ["--resume", "--out", str(out), "--data", str(SMALL_SET), "--steps", "4", "--device", "cpu"]
        yield lambda: train.main(argv), f"--{name}", "again"
    yield lambda: repa.main([str(tmp_path / "encoder")]), "--encoder", "again"


def test_faults_no_checkpoint_names_code(base, tmp_path):
    """Whatever a checkpoint's settings say, no file of Python that they name is run: the user names it again.
    Nor are words passed on that advise to trust a pickle."""
    for call, *words in code_rows(base, tmp_path):
        ends(call, *words)
    assert not (tmp_path / "ran").exists()
    assert encoders.Encoder(f"{tmp_path}/evil.py:f", 8).shape and (tmp_path / "ran").exists()  # it can run
    ends(lambda: encoders.Encoder(str(tmp_path / "evil:f"), 8), "FILE.py:NAME")
    torch.save({"a": Path("x")}, tmp_path / "p.pt")
    with pytest.raises(ValueError) as error:
        model.read_checkpoint(tmp_path / "p.pt")
    assert "weights_only" not in str(error.value) and "trust" not in str(error.value)


VALUES = {  # command -> flags that make no sense
    "train": """
    --clip -1, --ema 2, --ema nan, --label_drop 1.5, --time_std -1, --time_mean nan, --lr inf, --lr -1,
    --beta1 1, --beta2 2, --weight_decay -1, --steps 0, --batch -8, --batch 1000000000000, --accumulation 0,
    --size -32, --size 1000000000, --warmup -1, --save_every 0, --keep_every -1, --sample_every -2, --score 1,
    --sample_steps 0, --sample_steps 1000000000, --guidance nan, --guidance -1, --workers -2,
    --gp -1 --loss afm,
    --d_lr nan --loss afm, --nfe -1 --loss afm, --d_warmup -1 --loss cafm, --d_steps 0 --loss cafm,
    --data_std nan --loss ect, --doublings 0 --loss ect, --p inf --loss meanflow, --net width=nan,
    --net width=1e400, --net depth=0, --net heads=0, --net t_min=0.0, --net mlp_ratio=-1, --net patch='x',
    --net parts=['os.system'], --net parts=3, --net null_class=7, --solver zz, --time zz""",
    "sample": """
    --n -5, --n 0, --steps 0, --steps 1000000000, --guidance nan, --shift 0, --shift inf, --rho nan,
    --guidance_low -1, --guidance_high 2, --batch 0, --out x.jpg, --out x.PT, --classes -1, --guidance -3""",
    "fid": "--num 1, --num -1, --batch 0, --size -32, --subset 1, --guidance nan, --steps 5, --labels random",
    "data": "--n -5, --n 0, --size -32",
    "guidance": "--guide_channels 99, --guide_channels -1", "search": "--stitch_share 2, --best_of -1",
    "schedule": """
    5: lr=-1|5: lr=nan|5: lr=inf|5: ema=3|-5: lr=1e-3|1: ema_reload=-2|1: label_drop=2|1: clip=-1|x|
    5: size=3"""}


def test_faults_values_that_make_no_sense(base, tmp_path):
    """Numbers out of their bounds, NaN and infinity, of every command, in --net and in schedules: a line that
    names the flag, before anything is made."""
    commands = dict(
        train=(train.main, flags(tmp_path / "new", "--steps", 2)),
        sample=(sample.main, [str(base), "--device", "cpu"]),
        fid=(fid.main, [str(SMALL_SET), "glyphs", "--features", "glyphs"]),
        data=(data.main, [str(SMALL_SET)]),
        guidance=(guidance.main, [str(base), "--n", "2"]), search=(search.main, [str(base), "--n", "2"]))
    for name, (main, argv) in commands.items():
        for row in VALUES[name].split(","):
            flag, value, *more = row.split()
            name = {"--net": "", "--steps": "steps", "--classes": "class"}.get(flag, flag)
            ends(lambda: main([*argv, flag, value, *more]), name)
    for row in VALUES["schedule"].split("|"):
        ends(lambda: schedule.main([row.strip(), *flags(tmp_path / "new", "--steps", 9)]))
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


def test_faults_no_option_is_without_effect(base, tmp_path):
    """A preset or --init beside --resume, and names of files that are not written: refused."""
    ends(lambda: presets.main(["sit-xl2-imagenet256", "--resume", "--out", str(base)]), "--resume",
         "own settings")
    ends(lambda: train.main(flags(base, "--resume", "--init", base, "--steps", 4)), "--init")
    sample.main([str(base), *f"--n 2 --steps 1 --device cpu --out {tmp_path}/X.PNG".split()])
    assert (tmp_path / "X.PNG").is_file()


def picture(path: Path, size=(8, 8), mode="RGB") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path.read_bytes()


def npy(shape: str, kind="|u1") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def packed(path: Path, *, at: dict | None = None, how=0, **members) -> Path:
    """A zip of members; at: bytes that are changed, by their place in the first entry of its directory."""
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in members.items():
            file.writestr(name, content)
    raw = bytearray(path.read_bytes())
    for place, value in (at or {}).items():
        raw[raw.index(b"PK\1\2") + place] = raw[place - 2] = value
    path.write_bytes(raw)
    return path


def image_rows(P: Path):
    """(what data.py looks at, size, words)."""
    for name, link, to in (("loop", "b", "."), ("deep", "a/x", "../a"), ("twice", "b", "a")):
        picture(P / name / "a/1.png")
        (P / name / link).symlink_to(to)
        yield P / name, 8, "link", "remove"
    for name in ("file.png", "gone.png"):
        picture(P / name[:4] / "1.png")
        (P / name[:4] / name).symlink_to(name if name == "file.png" else "nothing")
        yield P / name[:4], 8, name, "repair or remove"
    picture(P / "pipe/1.png")
    os.mkfifo(P / "pipe/2.png")
    yield P / "pipe", 8, "2.png", "pipe"
    for name in ("f.npz", "f.zip"):
        os.mkfifo(P / name)
        yield P / name, 0, name, "pipe"
    (P / "float").mkdir()
    Image.fromarray(np.ones((8, 8), np.float32)).save(P / "float/1.tiff")
    yield P / "float", 0, "1.tiff", "8 or 16 bits"
    picture(P / "long/1.png", (60000, 1))
    yield P / "long", 256, "1.png", "too long"
    np.savez(P / "long.npz", images=np.zeros((2, 1, 60000, 3), np.uint8))
    yield P / "long.npz", 256, "long.npz: images", "too long"
    png = picture(P / "one/1.png")
    yield packed(P / "e.zip", at={8: 1}, **{"a.png": png}), 0, "a.png", "encrypted"
    yield packed(P / "m.zip", at={10: 77}, **{"a.png": png}), 0, "a.png"
    yield packed(P / "n.zip", **{"a.png": b""}), 0, "a.png", "not a readable image"
    yield packed(P / "z.zip"), 0, "z.zip", "no images"
    for k, text in enumerate(('[1]', '{"labels": 3}', '{"labels": [["a.png", "x"]]}',
                              '{"labels": [["a.png", -1]]}',
                              '{"labels": [["a.png", 1e9]]}', '{"labels": [["a.png", null]]}', "null x",
                              '{"labels": [["a.png", 99999999999999999999]]}', "[" * 100_000, "\xff")):
        yield packed(P / f"{k}.zip", **{"a.png": png, "dataset.json": text}), 0, f"{k}.zip"
    for k, (shape, how) in enumerate([(shape, how) for how in (0, 8) for shape in (
            "(1000000000, 32, 32, 3)", "(-1, 8, 8, 3)", "(0, 8, 8, 3)", "(2, 0, 0, 3)", "()",
            "(2, 2, 2, 2, 2)")]):
        yield packed(P / f"h{k}.npz", how=how, **{"images.npy": npy(shape) + bytes(100)}), 0, f"h{k}.npz"
    for k, labels in enumerate((np.array(["a", "b"]), np.array([0.5, 1]), np.array([-1, 0]),
                                np.array([0, 10 ** 9]),
                                np.array([[0], [1]]), np.array([None, 1]), np.array(3))):
        np.savez(P / f"l{k}.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=labels)
        yield P / f"l{k}.npz", 0, f"l{k}.npz"
    for k, images in enumerate((struct.pack(">4i", 0x803, -1, -1, 1) + b"x", b"", b"\0\0\x08\x03",
                                struct.pack(">4i", 0x803, *[2 ** 31 - 1] * 3) + b"x")):
        (P / f"idx{k}").mkdir()
        (P / f"idx{k}/train-images-idx3-ubyte").write_bytes(images)
        (P / f"idx{k}/train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 1) + b"\0")
        yield P / f"idx{k}", 0, "idx3", "get it again"


def test_faults_files_of_images(tmp_path, monkeypatch):
    """Loops of links, pipes, floats, strips, encrypted or lying archives and arrays: a line names the file
    and,
    of archives, the member. What would unpack to gigabytes is refused by its size."""
    for source, size, *words in image_rows(tmp_path):
        ends(lambda: data.main([str(source), "--size", str(size), "--out", str(tmp_path / "o.png")]), *words)
    [monkeypatch.setattr(file, "LARGEST", 10_000) for file in (formats, classics)]
    members = {"a.png": bytes(20_000), "images.npy": npy("(1, 80, 80, 3)") + bytes(19_200)}
    for name in ("bomb.zip", "bomb.npz"):
        packed(tmp_path / name, how=8, **members)
        ends(lambda: data.main([str(tmp_path / name)]), name, "bytes")
    (tmp_path / "gz").mkdir()
    with gzip.open(tmp_path / "gz/train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4i", 0x803, 1, 200, 200) + bytes(40_000))
    (tmp_path / "gz/train-labels-idx1-ubyte.gz").write_bytes(b"x")
    ends(lambda: data.main([str(tmp_path / "gz")]), "idx3", "get it again")


def record_rows(P: Path):
    """(call, words) for damaged files of ours."""
    L, S, C = P / "latents", P / "s.npz", P / "compare"
    L.mkdir()
    C.mkdir()
    good = dict(source="x", count=4, classes=["a", "b"], size=64, shard=4, shape=[4, 8, 8], scale=0.18,
                codec="q",
                encoder="", features=None)
    np.save(L / "moments_00000.npy", np.zeros((4, 2, 8, 8, 8), np.float16))
    np.save(L / "labels.npy", np.array([0, 1, 0, 1]))
    for name, value in [("shard", 0), ("shard", "x"), ("shard", True), ("count", 0), ("count", 10 ** 12),
                        ("count", 5), ("classes", "ab"), ("classes", [1, 2]), ("classes", ["a"]),
                        ("size", "x"),
                        ("shape", [4, 8]), ("shape", [4, 9, 9]), ("shape", [-4, 8, 8]), ("scale", math.nan),
                        ("scale", "x"), ("features", 3), ("features", [1, 2])]:
        (L / "manifest.json").write_text(json.dumps(good | {name: value}))
        yield lambda: data.dataset(str(L)), "latents/"
    for text in ("[]", "null", "3", "{", "[" * 100_000):
        (L / "manifest.json").write_text(text)
        yield lambda: data.dataset(str(L)), "manifest.json"
    (L / "manifest.json").write_text(json.dumps(good))
    for labels in ([0, 1, 0, 9], [0, -1, 0, 1], [0.0, 1, 0, 1], [0, 1]):
        np.save(L / "labels.npy", np.array(labels))
        yield lambda: data.dataset(str(L)), "labels.npy"
    net = fid.GlyphNet()
    for meta in ("[]", "3", "null", '{"size": "x"}', '{"features": 3}', "{", '{"size": [1]}'):
        np.savez(S, mu=np.zeros(64), sigma=np.eye(64), n=3, meta=meta)
        yield lambda: stored.find(str(S), net, fid.Config(), "reference"), "s.npz", "--save_stats"
    for wrong in (dict(n="x"), dict(n=-3), dict(n=np.array([1, 2])), dict(n=math.nan),
                  dict(mu=np.array("x"))):
        np.savez(S, **dict(mu=np.zeros(64), sigma=np.eye(64), n=3, meta="{}") | wrong)
        yield lambda: stored.find(str(S), net, fid.Config(), "reference"), "s.npz", "--save_stats"
    for text in ("[]", "null", "3", '{"fm": 3}', '{"fm": {"seconds": "x", "scores": {}}}', '{"fm": {}}',
                 '{"fm": {"seconds": 1, "scores": {"1": 3}}}'):
        (C / "compare.json").write_text(text)
        yield lambda: compare.main(["fm", "--out", str(C), "--steps", "2"]), "compare.json", "remove it"
        yield lambda: mmhm.main([str(C / "compare.json")]), "compare.json"
    for k, header in enumerate((
            '{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', "[" * 100_000, "[1]",
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}',
            '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            '{"a": {"dtype": ["x"], "shape": [1], "data_offsets": [0, 4]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
            '{"a": {"dtype": "F32", "shape": [1%s, 0], "data_offsets": [0, 0]}}' % ("0" * 30))):
        path = P / f"{k}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(64))
        yield lambda: latents.load_vae(path), path.name


def test_faults_files_of_ours(base, tmp_path, capsys):
    """A damaged manifest, statistics, comparison or .safetensors: a line names it. Lines of log.jsonl that
    are none are left out. A GlyphNet with NaN is trained again; without a home TRIFLOW_CACHE is named."""
    for call, *words in record_rows(tmp_path):
        ends(call, *words)
    for line in (b"null", b"3", b"\xff\xfe", b"[1]", b'{"step": "x"}', b'{"step": 1}', b"[" * 100_000,
                 b'{"step": 1, "role": 3, "loss": "x"}', b'{"step": 1, "role": "G", "loss": null}'):
        (tmp_path / "log.jsonl").write_bytes(line + b"\n" + (base / "log.jsonl").read_bytes())
        assert same(train.read_log(tmp_path / "log.jsonl"), logged(base))
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 2, "role": "G", "loss": 1e400}')
    curves.draw_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    cache = "import fid, os, data\nos.setuid(54321)\ndata.run_cli(fid.cache_folder)"
    env = {key: value for key, value in os.environ.items() if key not in ("TRIFLOW_CACHE", "HOME")}
    if os.getuid() == 0:
        done = subprocess.run([sys.executable, "-c", cache], env=env, cwd=HERE, capture_output=True,
                              text=True)
        assert done.returncode == 2 and "TRIFLOW_CACHE" in done.stderr, done.stderr
    path = fid.glyph_net_file(fid.GlyphNet())
    fid.glyph_net()
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"head.1.bias": weights["head.1.bias"] * math.nan}, path)
    assert same(dict(fid.glyph_net().state_dict()), weights) and "damaged" in capsys.readouterr().err


# ---- A fuzz test ----


def samples(P: Path, base: Path) -> dict:
    """{file: what reads it}, each of which succeeds."""
    picture(P / "set/a/1.png")
    np.savez(P / "f.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.array([0, 1, 0]))
    png = (P / "set/a/1.png").read_bytes()
    packed(P / "f.zip",
           **{"a.png": png, "b.png": png, "dataset.json": '{"labels": [["a.png", 0], ["b.png", 1]]}'})
    (P / "idx").mkdir()
    (P / "idx/images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 2, 4, 4) + bytes(32))
    (P / "idx/labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 2) + bytes(2))
    header = json.dumps({k: dict(dtype="F32", shape=[2, 2], data_offsets=[16 * i, 16 * i + 16])
                         for i, k in enumerate("ab")}).encode()
    (P / "f.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    about = dict(source="x", count=4, classes=["a", "b"], size=64, shard=4, shape=[4, 8, 8], scale=0.18,
                 codec="q",
                 encoder="", features=None)
    (P / "latents").mkdir()
    (P / "latents/manifest.json").write_text(json.dumps(about))
    np.save(P / "latents/labels.npy", np.array([0, 1, 0, 1]))
    np.save(P / "latents/moments_00000.npy", np.zeros((4, 2, 8, 8, 8), np.float16))
    shutil.copyfile(base / "last.pt", P / "f.pt")
    shutil.copyfile(base / "log.jsonl", P / "log.jsonl")

    def look(name):
        source = data.dataset(str(P / name))
        return [source.item(i) for i in range(len(source))]
    return {P / "f.npz": lambda: look("f.npz"), P / "f.zip": lambda: look("f.zip"),
            P / "idx/images-idx3-ubyte": lambda: look("idx"),
            P / "latents/manifest.json": lambda: look("latents"),
            P / "f.safetensors": lambda: latents.read_safetensors(P / "f.safetensors"),
            P / "f.pt": lambda: model.load(P / "f.pt"),
            P / "log.jsonl": lambda: (train.read_log(P / "log.jsonl"),
                                      curves.draw_loss(P / "log.jsonl", P / "loss.png"))}


def damage(raw: bytes, rng: random.Random) -> bytes:
    """A byte changed, the end cut off, or a word or number of its text in another's place."""
    kind, at, new = rng.randrange(4), rng.randrange(len(raw)), bytearray(raw)
    if kind == 0:
        return raw[:at]
    words = [m.span() for m in re.finditer(rb"[a-z_]{4,}|\d+", raw[:4000])]
    if kind == 1 and words:
        (a, b), other = rng.choice(words), rng.choice([b"null", b"-1", b"1e400", b"x", b"99999999999", b"[]"])
        return raw[:a] + other + raw[b:]
    for _ in range(rng.choice([1, 1, 8])):
        new[rng.randrange(min(len(new), rng.choice([60, 4000, len(new)])))] = rng.randrange(256)
    return bytes(new)


def test_faults_fuzz(base, tmp_path):
    """300 damaged files: each is read, or refused in one line; within 10 seconds and 2 GiB, without a signal.
    In a process of its own, because that is what a signal would end."""
    files = samples(tmp_path, base)
    for read in files.values():
        read()
    child = os.fork()
    if not child:
        status = 1
        try:
            for case in range(300):
                rng, path = random.Random(case), [*files][case % len(files)]
                whole = path.read_bytes()
                path.write_bytes(damage(whole, rng))
                signal.alarm(10)
                try:
                    files[path]()
                except (ValueError, OSError) as error:
                    assert len(str(error).splitlines()) <= 1, error
                except BaseException as error:
                    print(f"case {case}, {path.name}: {type(error).__name__}: {error}", flush=True)
                    raise
                path.write_bytes(whole)
            status = 2 if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2 << 20 else 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- Processes: signals, workers, locks, full disks, torchrun ----


def wait_for(process, ready, seconds=120) -> None:
    end = time.time() + seconds
    while not ready():
        assert process.poll() is None and time.time() < end, process.communicate(timeout=5)
        time.sleep(0.05)


def folder(path: Path, n=12) -> Path:
    for k in range(n):
        (path / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(path / str(k % 2) / f"{k}.png")
    return path


def small(out, images, *more) -> list[str]:
    return flags(out, "--data", images, "--size", "8", "--model", "glyph-XS", "--net", "patch=4",
                 "--log_every", "1", *more)


def test_faults_data_errors_save_first(tmp_path):
    """A file that is cut short is told after the step that was begun, which is saved; the mended run ends as
    one that was never stopped. So is a worker that is killed. Nothing is left that a killed process left."""
    images = folder(tmp_path / "images")
    whole, broken = (images / "1/5.png").read_bytes(), images / "1/5.png"
    broken.write_bytes(whole[:20])
    for out in ("a", "b"):
        argv = small(tmp_path / out, images, "--steps", 12, "--batch", 1, "--workers", 0)
        if out == "a":
            ends(lambda: train.main(argv), "5.png", "after step", "last.pt", "--resume")
            step = checkpoint(tmp_path / "a")["step"]
            assert 0 < step < 12 and not (tmp_path / "a/.lock").exists()
            (tmp_path / "a/.1234.last.pt").write_bytes(b"partial")
            (tmp_path / "a/next.pt").write_bytes(b"partial")
            broken.write_bytes(whole)
            argv = [*argv, "--resume"]
        train.main(argv)
    assert same(checkpoint(tmp_path / "a")["networks"], checkpoint(tmp_path / "b")["networks"])
    assert not [*(tmp_path / "a").glob(".*")] and not (tmp_path / "a/next.pt").exists()
    process = start(HERE / "train.py", *small(tmp_path / "w", images, "--steps", 10 ** 6, "--batch", 4,
                                              "--workers", 2))
    wait_for(process, lambda: len(logged(tmp_path / "w")) > 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "--workers" in errors.splitlines()[-1] and checkpoint(tmp_path / "w")["step"] > 2


def test_faults_a_diverging_run_leaves_a_sound_checkpoint(tmp_path):
    """With --save_every 1 the checkpoint before which the loss was finite stays, not one that led to another;
    one whose weights are not finite is not written."""
    train.train(tiny_run(tmp_path / "run", steps=3))
    before = (tmp_path / "run/last.pt").read_bytes()
    ends(lambda: train.main(flags(tmp_path / "run", "--resume", "--steps", 9, "--lr", 1e30, "--save_every",
                                  1)),
         "older and sound")
    assert (tmp_path / "run/last.pt").read_bytes() == before
    ends(lambda: train.main(flags(tmp_path / "one", "--steps", 1, "--lr", 1e39, "--warmup", 0, "--keep_every",
                                  1)),
         "not finite")
    assert not [*(tmp_path / "one").glob("*.pt")]


def test_faults_one_run_in_a_folder(tmp_path):
    """A second run in the folder of one that is alive is refused, with the first one's number; SIGHUP ends
    that like SIGTERM, and after kill -9 the folder is free."""
    out = tmp_path / "run"
    for number in signal.SIGHUP, signal.SIGKILL:
        resumed = ["--resume"] * (out / "last.pt").exists()
        process = start(HERE / "train.py", *flags(out, "--model", "glyph-XS", "--steps", 10 ** 6,
                                                  "--log_every", 1, *resumed))
        lines = len(logged(out))
        wait_for(process, lambda: len(logged(out)) > lines + 2)
        ends(lambda: train.main(flags(out, "--model", "glyph-XS", "--resume", "--steps", 10 ** 6)), str(out),
             f"process {process.pid}")
        process.send_signal(number)
        text, errors = process.communicate(timeout=60)
        assert process.returncode == (0 if number == signal.SIGHUP else -9), errors
    train.main(flags(out, "--model", "glyph-XS", "--resume", "--steps", checkpoint(out)["step"] + 1))
    assert not (out / ".lock").exists()


def test_faults_ctrl_c_is_one_line(base, tmp_path):
    """Ctrl-C while sampling, or with a worker that waits for ever: one line, no traceback, no file left."""
    sampling = ["--n", 10 ** 5, "--steps", 50, "--batch", 8, "--device", "cpu", "--out", tmp_path / "s.npz"]
    process = start(HERE / "sample.py", base, *sampling)
    wait_for(process, lambda: (tmp_path / "s.npz.tmp.npy").exists())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "interrupted" in errors.splitlines()[-1], errors
    assert not [*tmp_path.iterdir()]


def test_faults_full_disk_is_told(base, tmp_path):
    """Space that is not there (a limit on file sizes) is one line before the sampling, not a bus error."""
    script = "import data, resource, sys, sample\n"
    script += f"sys.argv = 'x {base} --n 9000 --out {tmp_path}/s.npz'.split()\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, [10 ** 6] * 2)\ndata.run_cli(sample.main)"
    done = run(script=script)
    assert done.returncode == 2 and "free disk space" in done.stderr.splitlines()[-1], done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fault", ["killed", "data"])
def test_faults_torchrun_ends_together(tmp_path, fault):
    """Of two processes one is killed, or has an image that is cut short: the other ends within 30 seconds,
    and a line says which and why."""
    images, out = folder(tmp_path / "images"), tmp_path / "run"
    process = start(*TWO, HERE / "train.py", *small(out, images, "--steps", 10 ** 6, "--batch", 2,
                                                    "--workers", 0))
    wait_for(process, lambda: len(logged(out)) > 2)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    began = time.time()
    if fault == "killed":
        os.kill(ranks[-1], signal.SIGKILL)
    else:
        (images / "1/5.png").write_bytes(b"short")
    text, errors = process.communicate(timeout=60)
    told = [line for line in errors.splitlines() if "error: rank" in line]
    assert process.returncode != 0 and time.time() - began < 30 and told, errors
    assert any(("is gone" if fault == "killed" else "5.png") in line for line in told), told
    assert fault == "killed" or checkpoint(out)["step"] > 2
