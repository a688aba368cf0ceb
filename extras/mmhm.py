"""MMHM: one number for each of several models from the scores of `fid.py --json` (arXiv:2603.14186).

    python fid.py a.npz REFERENCE --metrics all --json > a.json        and so on
    python -m extras.mmhm a.json,b.json,c.json                         the best of them first
    python -m extras.mmhm a.json,b.json --bounds bounds.json           the same bounds for later comparisons

The min-max harmonic mean of K scores, K / sum_k 1 / (1e-3 + u_k), where u_k is 1 at the best and 0 at the
worst value within the bounds of score k. By default those are the extremes of the models at hand: then
adding one changes all. Given the same bounds, numbers compare over time; beyond them u_k stays 0 or 1.
Taken are Frechet distances, Inception Score, precision and recall, as far as all models have them. paper:
FID, IS, CLIP and Pick scores; here: what we have.
"""
import dataclasses
import json
from pathlib import Path

import data
from data import option

SMALL = ("fid", "sfid", "fd_", "kid")  # of these scores less is better
TAKEN = ("fid", "fd_", "is", "precision", "recall")


def mmhm(models: dict[str, dict[str, float]], bounds: dict | None = None) -> tuple[dict, dict]:
    """{model: mean} and the bounds {score: [lowest, highest]}, from {model: {score: value}}.

    ValueError where models have other scores than each other or than the bounds.
    """
    names = set(bounds or next(iter(models.values())))
    for label, scores in models.items():
        if scores.keys() != names:
            raise ValueError(f"{label} has the metrics {', '.join(scores)}; "
                             f"expected {', '.join(sorted(names))}")
    columns = {name: [scores[name] for scores in models.values()] for name in sorted(names)}
    bounds = bounds or {name: [min(column), max(column)] for name, column in columns.items()}

    def share(name: str, x: float) -> float:
        low, high = bounds[name]
        if high == low:
            return 1.0
        u = min(1.0, max(0.0, (x - low) / (high - low)))
        return 1 - u if name.startswith(SMALL) else u

    return {label: len(scores) / sum(1 / (1e-3 + share(name, x)) for name, x in scores.items())
            for label, scores in models.items()}, bounds


def read(file: str, take):
    """What `take` finds in a JSON file."""
    try:
        return take(json.loads(Path(file).read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not a result of fid.py --json, nor bounds ({what})") from None


def rank_models(files: list[str], bounds_file: str = "") -> str:
    """The table of several results of --json; writes the bounds to their file where it is not there yet."""
    known = read(bounds_file, lambda found: {name: (low + 0.0, high + 0.0) for name, (low, high) in
                                             found.items()}) if Path(bounds_file).is_file() else None
    models = {file: read(file, lambda found: {name: score["value"] + 0.0 for name, score in
                                              found["scores"].items()}) for file in files}
    common = [name for name in known or models[files[0]]
              if name.startswith(TAKEN) and all(name in scores for scores in models.values())]
    compared = {file: {name: scores[name] for name in common} for file, scores in models.items()}
    means, bounds = mmhm(compared, known)
    if bounds_file and not known:
        Path(bounds_file).write_text(json.dumps(bounds, indent=2) + "\n")
    lines = [f"{mean:.4f}   {file}" for file, mean in sorted(means.items(), key=lambda item: -item[1])]
    origin = bounds_file if known else "of these results"
    return "\n".join([f"MMHM of {', '.join(bounds)}, bounds {origin}", *lines])


@dataclasses.dataclass
class Config:
    results: str = option("", "A.json,B.json,..: results of fid.py --json")
    bounds: str = option("", "a JSON file of lowest and highest scores, written if it is not there")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("results",))
    print(rank_models(cfg.results.split(","), cfg.bounds) if cfg.results else __doc__.strip())


if __name__ == "__main__":
    data.run_cli(main)
