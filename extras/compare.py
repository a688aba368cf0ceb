"""Objectives on equal terms: the same network, images, steps and evaluation.

    python -m extras.compare fm,pafm,carflow,meanflow,imf,soflow,shortcut --steps 1500 --time logit_normal \\
           --time_mean 0.8 --time_std 0.8 --sample_every 0 --out runs/compare

Each is trained into a folder of --out and scored in 1, 2, 4 and 50 network evaluations. OUT/compare.json
holds the scores, OUT/compare.png a row of samples for each; what is done is not done again, and what was
stopped goes on. Flags are those of train.py; one that only some of the objectives have holds for these.

FD-glyphs / accuracy of 1,000 samples by network evaluations, unguided, EMA (1,500 steps of 32 images, one
run each, one thread of 2 CPU cores, 2026-11-21); the time of a step's loss and gradients in those of fm:

    fm          917 / 0.986    246 / 0.996     94 / 0.993   13.5 / 0.977    1
    pafm        909 / 0.991    246 / 0.995     92 / 0.990   12.7 / 0.977    1.4
    carflow    1069 / 0.977    347 / 0.990    137 / 0.984   42.8 / 0.954    1.1
    meanflow    119 / 0.863     67 / 0.993    136 / 0.992    445 / 0.979    1.7
      --p 0     185 / 0.847     82 / 0.968    103 / 0.975    290 / 0.958    1.7
    imf         268 / 0.988     95 / 0.994    146 / 0.994    429 / 0.979    2.9
    soflow      171 / 0.821     56 / 0.988    101 / 0.993    469 / 0.943    1.1
    shortcut    195 / 0.977     49 / 0.980     41 / 0.974   46.6 / 0.967    1.2
    scm         844 / 0.096    692 / 0.096    821 / 0.112   1418 / 0.103    2.2    (its own times, lr 1e-3)
    ect        1150 / 0.096   1685 / 0.100   1711 / 0.100   1714 / 0.100    1.3    (its own times, lr 1e-3)
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch

import data
import losses
import model
import sample
import train
from extras.benchmark import in_turn
from extras.benchmark_roles import role_steps

EVALUATIONS = 1, 2, 4, 50


def read_flags(names: list[str], argv: list[str]) -> dict:
    """The settings that a command line names, of train.py or of any of these objectives."""
    for name in names:
        if not losses.find(name).draws_images:
            raise ValueError(f"{name}: makes no images to compare")
    fields = {field.name: field for name in names for field in dataclasses.fields(train.config_class(name))}
    kind = dataclasses.make_dataclass("Config", [
        (key, field.type, data.option(field.default, **field.metadata)) for key, field in fields.items()])
    found = vars(data.parse(kind, argv, __doc__, **dict.fromkeys(fields)))  # None: no such flag was given
    return {key: value for key, value in found.items() if value is not None}


def settings_of(name: str, given: dict, out: Path) -> train.Config:
    """The settings of one objective's run: its own, changed by those of the given ones that it has."""
    known = {field.name for field in dataclasses.fields(train.config_class(name))}
    own = {key: value for key, value in given.items() if key in known}
    return train.configure(**own | dict(loss=name, out=str(out / name), score=0))


def compare(names: list[str], given: dict) -> None:
    """Train and score every objective; what is done stays in compare.json and is not done again."""
    out, score = Path(given.get("out", "runs/compare")), given.get("score", 1000)
    table = json.loads((out / "compare.json").read_text()) if (out / "compare.json").exists() else {}
    rows = []
    for name in names:
        cfg, last = settings_of(name, given, out), out / name / "last.pt"
        if not last.exists() or model.read_checkpoint(last)["step"] < cfg.steps:
            if not train.train(dataclasses.replace(cfg, resume=last.exists())):
                return  # a signal
        ema = model.load(last).to(data.start_processes(cfg.device))
        for steps in EVALUATIONS:
            options = train.sampling(dataclasses.replace(cfg, sample_steps=steps, solver="euler"), 1.0)
            possible = options["steps"] == steps
            if possible and str(steps) not in table.setdefault(name, {}):
                judge = dataclasses.replace(cfg, score=score)
                table[name][str(steps)] = train.score_samples(ema, judge, options, f"{name}, {steps}")
            if data.rank() == 0:
                (out / "compare.json").write_text(json.dumps(table, indent=2) + "\n")
                rows.append(strip(ema, cfg.seed, options) if possible else None)
    if data.rank() == 0:
        draw(names, rows, out / "compare.png")
        print_comparison(names, table, settings_of(names[0], given, out), score)


def strip(ema: model.DiT, seed: int, options: dict, n: int = 10) -> torch.Tensor:
    """Samples of the first n labels side by side: uint8 (3, h, n w)."""
    (_, images), = sample.generate(ema, sample.labels_for(n, ema.num_classes), seed, n, **options)
    return torch.cat(list(images), 2)


def draw(names: list[str], rows: list, path: Path) -> None:
    """A picture with a row for each objective and a strip for each number of evaluations that it has."""
    blank = torch.full_like(next(row for row in rows if row is not None), 255)
    captions = [f"{name}, {steps}" for name in names for steps in EVALUATIONS]
    strips = torch.stack([blank if row is None else row for row in rows])
    data.grid(strips, len(EVALUATIONS), captions).save(path)


def print_comparison(names: list[str], table: dict, cfg: train.Config, score: int) -> None:
    device = data.start_processes(cfg.device)
    source = data.dataset(cfg.data, cfg.size or None)
    network = dict(model=cfg.model, net=cfg.net, predict=cfg.predict)
    steps = role_steps(dict.fromkeys(["fm", *names]), source, device, cfg.batch, **network)
    times = in_turn(steps, 3, device.type)
    print(f"\n{cfg.steps} steps of {cfg.batch} images, {score} samples, unguided, EMA: FD-glyphs / accuracy\n"
          f"by network evaluations; time of loss and gradients of all roles, in flow-matching steps")
    print(f"{'objective':>12}" + "".join(f"{n:>18}" for n in EVALUATIONS) + f"{'time':>8}")
    for name in names:
        scores = [table[name].get(str(n)) for n in EVALUATIONS]
        cells = [f"{s['fd_glyphs']:>11.2f} /{s['accuracy']:>5.3f}" if s else f"{'-':>18}" for s in scores]
        own = {label.split()[1]: t for label, t in times.items() if label.split()[0] == name}  # of each role
        print(f"{name:>12}" + "".join(cells) + f"{sum(own.values()) / times['fm G']:>7.2f}x")
    floor = next(iter(table[names[0]].values()))["floor"]
    print(f"floor {floor:.2f}; wrote compare.json and compare.png in {Path(cfg.out).parent}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return print(__doc__.strip())
    names = argv[0].split(",")
    compare(names, read_flags(names, argv[1:]))
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
