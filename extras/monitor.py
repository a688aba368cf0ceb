"""Scores of a run's checkpoints, step by step: a line of RUN/scores.jsonl for each that has none yet.

    python train.py .. --out runs/mine --keep_every 1000
    python -m extras.monitor runs/mine --num 5000                    at any time, also while the run goes on
    python -m extras.monitor runs/mine --reference REF.npz --weights fid

Every step_*.pt that --keep_every kept gives --num unguided samples of its EMA, by the solver and steps of
the run. A run on glyphs is scored by FD-glyphs and accuracy; others by FID and Inception Score, under names
that tell number and weights (fid5k_torchvision), against the run's data, whose statistics are measured once
(RUN/reference.npz), or against --reference. Networks of latents need --reference and --codec.
"""
import dataclasses
import json
from pathlib import Path

import data
import fid
import model
import sample
from data import option
from extras.checks import run_settings


@dataclasses.dataclass
class Config:
    run: str = option("", "a run folder with step_*.pt")
    num: int = option(5000, "samples of each checkpoint")
    reference: str = option("", "what to compare images with, as in fid.py; empty: the data of the run")
    weights: str = option("torchvision", "InceptionV3's, as in fid.py")
    codec: str = option("", "what decodes latents, such as latents:FILE")
    batch: int = option(32, "samples at a time")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))


def reference_of(cfg: Config, content: dict) -> dict:
    """What `fid.evaluate` compares samples of this run with; statistics of its data are made once."""
    settings, shape = content["config"], content["networks"]["G"]["config"]
    if shape["channels"] != 3 and not (cfg.reference and cfg.codec):
        raise ValueError(f"{cfg.run}: samples of latents are decoded by --codec and compared with images: "
                         "give both it and --reference")
    if settings["data"].split(":")[0] == "glyphs" and not cfg.reference:
        return dict(reference="glyphs", features="glyphs")
    how, stored = dict(weights=cfg.weights, metrics="fid,is"), Path(cfg.run) / "reference.npz"
    if not cfg.reference and not stored.exists():
        fid.evaluate(settings["data"], size=settings["size"], save_stats=str(stored), batch=cfg.batch,
                     device=cfg.device, **how)
        data.barrier()
    return how | dict(reference=cfg.reference or str(stored))


def score(path: Path, cfg: Config) -> dict:
    """The line of scores.jsonl of one checkpoint."""
    content, (own, _) = model.read_checkpoint(path), sample.own_settings(path)
    settings = vars(run_settings(path, content, data=str, size=int, seed=int, sample_steps=int, solver=str))
    flow = {} if own else dict(steps=settings["sample_steps"], solver=settings["solver"])
    found = fid.evaluate(path, num=cfg.num, seed=settings["seed"] + 1, codec=cfg.codec, batch=cfg.batch,
                         device=cfg.device, **flow, **reference_of(cfg, content))
    values = {name: score["value"] for name, score in found.pop("scores").items()}
    return {"step": content["step"], **values, **found}


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("run",))
    if not cfg.run:
        return print(__doc__.strip())
    data.start_processes(cfg.device)
    checkpoints, log = sorted(Path(cfg.run).glob("step_*.pt")), Path(cfg.run) / "scores.jsonl"
    if not checkpoints:
        raise ValueError(f"{cfg.run}: no step_*.pt in it; train.py --keep_every N keeps one every N steps")
    known = {row["step"] for row in data.read_rows(log)}
    data.barrier()  # before anybody writes
    for path in checkpoints:
        if path.stem.removeprefix("step_").lstrip("0") in map(str, known):
            continue
        row = score(path, cfg)
        if data.rank() == 0:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            print(", ".join(f"{key} {value:g}" for key, value in numbers.items()))
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
