"""One command that measures everything a machine can show, and writes it down.

    python -m extras.benchmark                                     ten minutes on a GPU, five on a CPU
    torchrun --nproc_per_node=8 -m extras.benchmark                the same on several GPUs
    python -m extras.benchmark --only step,roles --minutes 5       some parts

    checks      values and derivatives against float64, the CPU and float32    benchmark_checks.py
    run         `python train.py`: seconds, FD-glyphs, accuracy                benchmark_steps.py
    step        a training step: images/s, memory, share of the peak           benchmark_steps.py
    roles       each role of objectives, each route to a derivative            benchmark_roles, _routes
    attention   attention alone, by each backend                               attention_table.py
    noise       the share of a step that drawing noise takes                   benchmark_steps.py
    fid         Frechet distance, InceptionV3, all scores                      benchmark_fid.py

It prints a row for each measurement and writes benchmark.json: the machine, every figure, and rows as they go
into the table of claims (extras/README.md). The most valuable come first. Each part has a share of the time,
and what it leaves is the next one's. What there is no time for is a row that says so, as is what fails. A
part is a process of its own: a fault of a kernel or an endless loop ends no other. "MISSED" marks a figure
that is not as expected. Under torchrun `run` and `step` share their work, the others run on each GPU alike.
"""
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
from data import option
from extras.benchmark_report import as_line, describe, machine, plain_number, tell, write

# name -> share of the time, files of extras/ and their functions that give items
PARTS = {"checks": (17, "benchmark_checks.items"),
         "run": (12, "benchmark_steps.run_items"),
         "step": (32, "benchmark_steps.step_items"),
         "roles": (19, "benchmark_routes.items benchmark_roles.items benchmark_routes.long_items"),
         "attention": (8, "attention_table.items"),
         "noise": (5, "benchmark_steps.noise_items"),
         "fid": (7, "benchmark_fid.items")}
GRACE = 25.0  # seconds that the last measurement of a part may go on

# ---- 1. One part, in this process ----


def measure_part(name: str, size: str, device: torch.device, deadline: float, report: dict, out: Path):
    """Each item of a part becomes a row in report["parts"][name], and in the file at once: its figures, what
    went wrong, or why it was skipped."""
    part, began, items = dict(seconds=0.0, rows=[]), time.monotonic(), []

    def add(row: dict) -> None:
        part["rows"].append(row)
        part["seconds"] = round(time.monotonic() - began, 1)
        tell(f"  {describe(row)}")
        write(report, out)

    report["parts"][name] = part
    try:
        for path in PARTS[name][1].split():
            file, function = path.split(".")
            items += getattr(data.extra(file, f"--only {name}"), function)(size, device)
    except Exception as error:
        add(dict(name=name, error=as_line(error)))
    for item in items:
        left = deadline - time.monotonic()
        if agree(left <= item.seconds):
            needs = f", it takes about {item.seconds:.0f}" if item.seconds else ""
            add(dict(name=item.name, skipped=f"{max(left, 0):.0f} s left{needs}"))
        else:
            add(measured(item))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured(item) -> dict:
    """A row: the name, and figures and those that are not what they should be, or the error."""
    error, figures = "", {}
    try:
        figures = {name: plain_number(value) for name, value in item.measure().items()}
    except Exception as problem:  # out of memory, a compiler's, a wrong kernel's, ..
        error = as_line(problem)
    if dist.is_initialized():
        errors = [None] * data.world()
        dist.all_gather_object(errors, error)
        error = next(filter(None, errors), "")
    if error:
        return dict(name=item.name, error=error)
    missed = [f"{name} {figures[name]}, expected {limits(*bars)}" for name, bars in item.bars.items()
              if name in figures and not within(float(figures[name]), *bars)]
    return dict(name=item.name, figures=figures) | (dict(missed=missed) if missed else {})


def within(value: float, least: float | None, most: float | None) -> bool:
    """Whether a figure is what it should be; nan never is."""
    return (-math.inf if least is None else least) <= value <= (math.inf if most is None else most)


def limits(least: float | None, most: float | None) -> str:
    return " and ".join(f"at {word} {value:g}" for word, value in (("least", least), ("most", most))
                        if value is not None)


def agree(yes: bool) -> bool:
    """Whether it is so on any process."""
    flag = torch.tensor(float(yes))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


# ---- 2. All parts, each in a process of its own ----


def run_parts(names: list[str], cfg, seconds: float, report: dict) -> None:
    """Add each part's rows to the report. A part may go on until its share of the time, and those before it,
    are over, then GRACE more, and is then ended."""
    began, total = time.monotonic(), sum(PARTS[name][0] for name in names)
    usable, done = max(seconds - GRACE, 0.8 * seconds), 0
    with tempfile.TemporaryDirectory() as folder:
        for k, name in enumerate(names):
            done += PARTS[name][0]
            left = began + usable * done / total - time.monotonic()
            tell(f"\n{k + 1}/{len(names)} {name}, {left:.0f} s")
            file = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", "extras.benchmark", "--only", name, "--out", str(file),
                       "--size", cfg.size, "--device", cfg.device,
                       "--minutes", f"{left / 60 if left > 1 else -1:.3f}"]  # 0 would be the default
            ended = run_apart(command, left + GRACE, port=k + 1)
            found = json.loads(file.read_text()) if file.exists() else {}
            report["machine"] = report["machine"] or found.get("machine", {})
            part = found.get("parts", {}).get(name, dict(seconds=0.0, rows=[]))
            if ended:
                after = f" after {part['rows'][-1]['name']}" if part["rows"] else ""
                part["rows"].append(dict(name=name, error=f"{ended}{after}"))
                tell(f"  {describe(part['rows'][-1])}")
            report["parts"][name] = part
            write(report, Path(cfg.out))


def run_apart(command: list[str], limit: float, port: int = 0) -> str:
    """Run a command in the repository; "", or how it ended. Under torchrun the commands of all processes meet
    at a port of their own: the agent's store still has what the part before left there."""
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        environment |= dict(MASTER_PORT=str(int(environment["MASTER_PORT"]) + port),
                            TORCHELASTIC_USE_AGENT_STORE="False")
    try:
        status = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment,
                                timeout=max(limit, 1)).returncode
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    return f"the process ended with status {status}" if status else ""


# ---- 3. Command line ----


@dataclasses.dataclass
class Config:
    only: str = option("", f"some of the parts {','.join(PARTS)}; empty: all")
    size: str = option("auto", "full, small or tiny; auto: full on a GPU", ("auto", "full", "small", "tiny"))
    minutes: float = option(0.0, "the most that it takes; 0: 10 on a GPU, 5 on a CPU")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))
    out: str = option("benchmark.json", "the file to write")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__)
    names = cfg.only.split(",") if cfg.only else list(PARTS)
    if wrong := [name for name in names if name not in PARTS]:
        raise ValueError(f"--only {wrong[0]}: expected some of {','.join(PARTS)}")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    gpu = cfg.device == "cuda"
    cfg.size = ("full" if gpu else "small") if cfg.size == "auto" else cfg.size
    seconds, began = 60 * (cfg.minutes or (10 if gpu else 5)), time.monotonic()
    report = dict(command="python -m extras.benchmark", size=cfg.size, machine={}, parts={}, claims=[])
    if len(names) == 1:
        device = data.start_processes(cfg.device)
        report["machine"] = machine(device)
        measure_part(names[0], cfg.size, device, began + seconds, report, Path(cfg.out))
        return data.stop_processes()
    run_parts(names, cfg, seconds, report)
    rows = [row for part in report["parts"].values() for row in part["rows"]]
    counts = ", ".join(f"{sum(key in row for row in rows)} {word}" for key, word in dict(
        figures="with figures", missed="of them missed", error="failed", skipped="skipped").items())
    tell(f"\n{len(rows)} rows: {counts}; {time.monotonic() - began:.0f} s; wrote {cfg.out}")


if __name__ == "__main__":
    data.run_cli(main)
