"""Objectives side by side: one flow, every method from it, one table and one picture.

    python -m extras.compare fm,meanflow,ect,afm --init runs/glyphs --out runs/compare      each at its best
    python -m extras.compare fm,pafm,carflow --steps 1500 --out runs/short                  on equal terms

Each is trained into a folder of --out with its own settings, but for the flags given (those of train.py; one
that only some of the objectives have holds for these), and scored in 1, 2, 4 and 25 network evaluations.
OUT/compare.json holds the scores, OUT/compare.md the table, OUT/compare.png a row of samples for each; what
is done is not done again, and what was stopped goes on. fm is not trained again where --init is given: its
row is that flow. Results: extras/README.md.
"""
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import data
import fid
import losses
import model
import sample
import train
from extras.benchmark_tools import in_turn
from extras.benchmark_roles import role_steps

EVALUATIONS = 1, 2, 4, 25


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
    out = Path(given.get("out", "runs/compare"))
    done, rows = read_done(out / "compare.json"), []
    for name in names:
        cfg, record = settings_of(name, given, out), done.setdefault(name, {"seconds": 0.0, "scores": {}})
        last = sample.find_checkpoint(cfg.init) if name == "fm" and cfg.init else out / name / "last.pt"
        if not last.exists() or last.parent == out / name and model.read_checkpoint(last)["step"] < cfg.steps:
            began = time.process_time()
            ended = train.train(dataclasses.replace(cfg, resume=last.exists()))
            record["seconds"] += time.process_time() - began
            write(done, out)
            if ended is None:
                return  # a signal
        ema = model.load(last).to(data.start_processes(cfg.device))
        for steps in EVALUATIONS:
            options = train.sampling(dataclasses.replace(cfg, sample_steps=steps), 1.0)
            possible = options["steps"] == steps
            if possible and str(steps) not in record["scores"]:
                how = dataclasses.replace(cfg, score=given.get("score", 1000))
                record["scores"][str(steps)] = train.score_samples(ema, how, fid.glyph_net(), options,
                                                                   f"{name}, {steps}", "fid,recall")
                write(done, out)
            if data.rank() == 0:
                rows.append(strip(ema, cfg.seed, options) if possible else None)
    if data.rank() == 0:
        draw(names, rows, out / "compare.png")
        (out / "compare.md").write_text(table := as_table(names, done, settings_of(names[0], given, out)))
        print(f"\n{table}wrote compare.json, compare.md and compare.png in {out}")


def read_done(path: Path) -> dict:
    """What compare.json holds: for each objective its seconds and scores by number of evaluations."""
    try:
        done = json.loads(path.read_text()) if path.exists() else {}
        for record in done.values():
            record["seconds"] + 0.0, [s["fd_glyphs"] + s["accuracy"] for s in record["scores"].values()]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}); remove it") from None
    return done


def write(done: dict, out: Path) -> None:
    if data.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(done, indent=2) + "\n")


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


def as_table(names: list[str], done: dict, cfg: train.Config) -> str:
    """Markdown: FD-glyphs / accuracy / recall by evaluations, seconds, time of a step of all roles."""
    device = data.start_processes(cfg.device)
    source = data.dataset(cfg.data, cfg.size or None)
    network = dict(model=cfg.model, net=cfg.net, predict=cfg.predict)
    steps = role_steps(dict.fromkeys(["fm", *names]), source, device, cfg.batch, **network)
    times = in_turn(steps, 3, device.type)
    lines = [f"| FD-glyphs / accuracy / recall in | {' | '.join(map(str, EVALUATIONS))} | CPU s | step |",
             "|---" * (len(EVALUATIONS) + 3) + "|"]
    for name in names:
        scores = [done[name]["scores"].get(str(n)) for n in EVALUATIONS]
        cells = [f"{s['fd_glyphs']:.1f} / {s['accuracy']:.3f} / {s['recall_glyphs']:.2f}" if s else ""
                 for s in scores]
        own = sum(t for label, t in times.items() if label.split()[0] == name) / times["fm G"]
        lines.append(f"| {name} | {' | '.join(cells)} | {done[name]['seconds']:.0f} | {own:.1f} |")
    score = next(iter(done[names[0]]["scores"].values()))
    lines += ["", f"{score['n']} samples, unguided, EMA; floor {score['floor']:.2f}; step: loss and "
                  "gradients of all roles, in those of fm", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return print(__doc__.strip())
    names = argv[0].split(",")
    compare(names, read_flags(names, argv[1:]))
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
