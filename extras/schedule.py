"""Settings that change on the way of a run, as AFM's authors change them by hand (arXiv:2511.22475).

    python -m extras.schedule "4000: lr=4e-4 ot=0.001 ot_end=0.001 ema_reload=500; 6000: lr=2e-4
           d_reload=5000" --loss afm --steps 8000 --keep_every 1000 --out runs/staged
    python -m extras.schedule --resume --out runs/staged         go on; the schedule is OUT/schedule.txt

Each entry holds from its step on: any setting of train.py that is a decimal number, and two more,

    ema_reload=N      the averaged weights are copied into the generator every N steps
    d_reload=STEP     once: the discriminator becomes what it was at STEP, which --keep_every kept

The run is made of segments: `train.train` goes to the next step where something changes, and resumes with
the settings that hold from there, bit for bit as if nothing had been stopped; in between last.pt is
changed. Flags other than these are given as for train.py.
"""
import dataclasses
import shutil
import sys
from pathlib import Path

import data
import losses
import model
import train

# ----------------------------------------------------------------------------------------------------------
# 1. What a schedule says
# ----------------------------------------------------------------------------------------------------------


def read_schedule(text: str) -> dict[int, dict]:
    """{step: {setting: value}}, in the order of the steps."""
    entries = {}
    for entry in filter(str.strip, text.split(";")):
        step, _, settings = entry.partition(":")
        try:
            pairs = dict(pair.split("=") for pair in settings.replace(",", " ").split())
            entries[int(step)] = {k: (int if k.endswith("_reload") else float)(v) for k, v in pairs.items()}
        except ValueError:
            raise ValueError(f"schedule: cannot read {entry.strip()!r}; expected STEP: NAME=VALUE "
                             f"NAME=VALUE") from None
    return dict(sorted(entries.items()))


def settings_at(entries: dict, step: int, cfg: train.Config) -> tuple[train.Config, int]:
    """The settings at a step, those of cfg changed by every entry up to here, and ema_reload, or 0."""
    changes = {}
    for start in entries:
        changes |= entries[start] if start <= step else {}
    reload, _ = changes.pop("ema_reload", 0), changes.pop("d_reload", 0)
    return dataclasses.replace(cfg, **changes), reload


def next_change(entries: dict, step: int, cfg: train.Config) -> int:
    """The first step after this one before which something changes: an entry, ema_reload, or the end."""
    _, reload = settings_at(entries, step, cfg)
    ahead = [start for start in entries if start > step] + [cfg.steps]
    return min(ahead + ([step - step % reload + reload] if reload else []))


def check_schedule(entries: dict, cfg: train.Config) -> None:
    """ValueError for what cannot be, before anything is written."""
    names = [field.name for field in dataclasses.fields(cfg) if isinstance(field.default, float)]
    names += ["ema_reload", "d_reload"]
    for step, settings in entries.items():
        unknown = [k for k in settings if k not in names]
        if unknown:
            raise ValueError(f"schedule: {unknown[0]}: expected one of {', '.join(names)}")
        if step < 0 or settings.get("ema_reload", 1) < 0 or settings.get("d_reload", 1) < 0:
            raise ValueError(f"schedule: step {step}: {settings}: expected no steps before the first")
        back = settings.get("d_reload", 0)
        if back and not losses.find(cfg.loss).D:
            raise ValueError(f"schedule: d_reload={back}: --loss {cfg.loss} has no discriminator")
        kept = back < step and cfg.keep_every and back % cfg.keep_every == 0
        if back and not kept and not kept_file(cfg, back).exists():
            raise ValueError(f"schedule: d_reload={back}: step {back} is not kept before step {step}; use a "
                             f"step that --keep_every ({cfg.keep_every}) keeps")
    for start in [0, *entries]:
        losses.find(cfg.loss).check(data.checked(settings_at(entries, start, cfg)[0]))


# ----------------------------------------------------------------------------------------------------------
# 2. The run
# ----------------------------------------------------------------------------------------------------------


@data.alone
def run(cfg: train.Config, text: str) -> dict | None:
    """`train.train` by a schedule: what final.json holds, or None where a signal stopped it."""
    entries, last = read_schedule(text), Path(cfg.out) / "last.pt"
    check_schedule(entries, cfg)
    step = model.read_checkpoint(last)["step"] if cfg.resume and last.exists() else 0
    while True:
        change_checkpoint(entries, step, cfg)
        now, end = settings_at(entries, step, cfg)[0], next_change(entries, step, cfg)
        found = train.train(dataclasses.replace(now, resume=cfg.resume or step > 0), until=end)
        if data.rank() == 0:
            (last.parent / "schedule.txt").write_text(text + "\n")
        if found is None:
            return None
        step = end
        if step == cfg.steps:
            change_checkpoint(entries, step, cfg)
            return found


def change_checkpoint(entries: dict, step: int, cfg: train.Config) -> None:
    """Put averaged weights into G and an earlier D into D, in the last.pt of this step, where these are due.

    To do it twice is to do it once: a run that was stopped at such a step does it when it goes on.
    """
    last = Path(cfg.out) / "last.pt"
    period = settings_at(entries, step - 1, cfg)[1]
    reload, back = step and period and step % period == 0, entries.get(step, {}).get("d_reload", 0)
    if data.rank() == 0 and (reload or back):
        content = model.read_checkpoint(last)
        if reload:
            content["networks"]["G"]["weights"] = content["ema"]
            model.write_checkpoint(content, last)
            if cfg.keep_every and step % cfg.keep_every == 0:
                shutil.copyfile(last, kept_file(cfg, step))
        if back:
            content["networks"]["D"]["weights"] = model.discriminator_weights(kept_file(cfg, back))
            model.write_checkpoint(content, last)
    data.barrier()


def kept_file(cfg: train.Config, step: int) -> Path:
    return Path(cfg.out) / f"step_{step:07d}.pt"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return print(__doc__.strip())
    given = argv and not argv[0].startswith("-")
    cfg = train.read_settings(argv[given:])
    stored = Path(cfg.out) / "schedule.txt"
    if not given and not stored.exists():
        raise ValueError(f"which schedule? Give it first, as in '4000: lr=4e-4'; there is no {stored}")
    run(cfg, argv[0] if given else stored.read_text().strip())
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
