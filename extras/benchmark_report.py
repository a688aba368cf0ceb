"""The report of `python -m extras.benchmark`: the machine, rows as lines, the file, the table of claims."""
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

import data
from extras.benchmark_tools import bfloat16_peak


def machine(device: torch.device) -> dict:
    """The device and the software that the figures are of."""
    found = dict(device=processor(), processes=data.world(),
                 threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                 date=time.strftime("%Y-%m-%d"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peak = bfloat16_peak(properties.name)
        found |= dict(device=properties.name, memory_gb=round(properties.total_memory / 1e9, 1),
                      cuda=torch.version.cuda, bfloat16_peak_tflops=peak / 1e12 if peak else "unknown")
        try:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.check_output(asked, text=True, timeout=20).split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            found["driver"] = "unknown"
    return found


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def plain_number(value) -> float | str:
    """Four digits; "nan" and "inf", which JSON has no numbers for, as words."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(float(value))


def as_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe(row: dict) -> str:
    """A row as a line."""
    if "error" in row:
        return f"{row['name']}: FAILED {row['error']}"
    if "skipped" in row:
        return f"{row['name']}: skipped, {row['skipped']}"
    figures = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row["figures"].items())
    return f"{row['name']}: {figures}" + "".join(f"   MISSED {text}" for text in row.get("missed", []))


def claims(report: dict) -> list[str]:
    """Rows of the table of claims: one for what the rows of a part have in common, up to the colon."""
    where, groups = report["machine"], {}
    for name, part in report["parts"].items():
        for row in part["rows"]:
            group, _, variant = row["name"].rpartition(": ")
            if "figures" in row:
                groups.setdefault((name, group), []).append(describe(row | dict(name=variant)))
    how = f"{where.get('device')} x {where.get('processes')}, torch {where.get('torch')}, {where.get('date')}"
    return [f"| {group + ': ' if group else ''}{'; '.join(rows)} | {how} | `python -m extras.benchmark "
            f"--only {name}` |" for (name, group), rows in groups.items()]


def write(report: dict, out: Path) -> None:
    """Write the file by way of a temporary one, so that it is whole at any time."""
    if first_process():
        report["claims"] = claims(report)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".tmp")
        unfinished.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        os.replace(unfinished, out)


def first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0  # also where no process group is


def tell(text: str) -> None:
    if first_process():
        print(text, flush=True)
