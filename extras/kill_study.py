"""kill -9 at random moments of a run: does it always go on bit for bit, and is no partial file left?

    python -m extras.kill_study --kills 20

A run of --steps steps of a small network saves every 3 steps, keeps every sixth checkpoint and draws sample
grids. It is started, killed with SIGKILL after a random time, and resumed, until it was killed --kills times
and has ended; runs that end begin anew. Each is compared with one that was never killed: last.pt, the
checkpoints that were kept, log.jsonl but for its times, and the grids.
"""
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import train
from data import option

TRAIN = [sys.executable, str(data.extra_file("x").parent.parent / "train.py")]


@dataclasses.dataclass
class Config:
    kills: int = option(20, "how often it is killed")
    steps: int = option(60, "steps of a run")
    seed: int = option(0, "of the moments")


def command(out: Path, images: Path, cfg: Config) -> list[str]:
    flags = (f"--data {images} --model glyph-XS --steps {cfg.steps} --batch 8 --warmup 2 --log_every 1 "
             f"--device cpu --save_every 3 --keep_every 6 --sample_every 4 --sample_steps 2 --score 0 "
             f"--out {out}").split()
    return [*TRAIN, *flags, *["--resume"] * (out / "last.pt").exists()]


def same(a, b) -> bool:
    """Whether two checkpoints hold the same but for the seconds."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "out",
                                                                                     "resume"))
    return a == b


def differences(out: Path, whole: Path) -> list[str]:
    """What is not as in the run that was never killed."""
    found, names = [], [{str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (out,
                                                                                                     whole)]
    if names[0] != names[1]:
        found.append(f"files {sorted(names[0] ^ names[1])}")
    for path in sorted(whole.rglob("*")):
        other = out / path.relative_to(whole)
        if path.suffix == ".pt" and not (other.exists() and same(*(torch.load(p, weights_only=True)
                                                                   for p in (other, path)))):
            found.append(other.name)
        if path.parent.name == "samples" and not (other.exists() and other.read_bytes() == path.read_bytes()):
            found.append(f"samples/{other.name}")
    rows = [[{k: v for k,
              v in row.items() if k != "images_per_second"} for row in train.read_log(run / "log.jsonl")]
            for run in (out, whole)]
    return found + ["log.jsonl"] * (rows[0] != rows[1])


def study(cfg: Config) -> None:
    folder, rng = Path(tempfile.mkdtemp()), random.Random(cfg.seed)
    try:
        images, labels = data.glyphs(200)
        np.savez(folder / "glyphs.npz", images=images.numpy(), labels=labels.numpy())
        whole, run = folder / "whole", folder / "run"
        began = time.perf_counter()
        subprocess.run(command(whole, folder / "glyphs.npz", cfg), check=True, capture_output=True)
        seconds, kills, ends, wrong = time.perf_counter() - began, 0, 0, []
        while kills < cfg.kills or run.exists():
            process = subprocess.Popen(command(run, folder / "glyphs.npz", cfg), stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True)
            try:
                moment = rng.uniform(0.5, 1.0) * seconds if kills < cfg.kills else None
                errors = process.communicate(timeout=moment)[1]
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                step = torch.load(run / "last.pt",
                                  weights_only=True)["step"] if (run / "last.pt").exists() else 0
                print(f"kill {kills} after {moment:.2f} s, last.pt at step {step}")
                continue
            if process.returncode:
                raise ValueError(f"the run could not go on: {errors[-300:]}")
            ends += 1
            wrong += differences(run, whole)
            print(f"run {ends} ended; different: {json.dumps(wrong)}")
            shutil.rmtree(run)
        print(f"{kills} kills, {ends} runs of {cfg.steps} steps ({seconds:.1f} s each): {len(wrong)} "
              "differences")
    finally:
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> None:
    study(data.parse(Config, argv, __doc__))


if __name__ == "__main__":
    data.run_cli(main)
