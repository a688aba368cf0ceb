"""Mean and deviation of scores over several sample sets, or over several seeds of a run.

    python -m extras.spread A.npz,B.npz,C.npz REFERENCE [flags of fid.py]
    python -m extras.spread RUN REFERENCE --num 5000 --repeat 3         seeds one apart
    python -m extras.spread A.npz REFERENCE --subset 1000 --repeat 5    so many draws of 1,000 images

The best of several evaluations is no result; their mean and deviation are. Retraining moves an FID by 1 to
2 %, three times what new samples do (several hundred SiT runs, arXiv:2606.20536): smaller differences say
nothing of a method.
"""
import dataclasses
import json
import statistics

import data
import fid
from data import option


def evaluate(sources: list, reference="", repeat: int = 1, net=None, **options) -> dict:
    """The result of `fid.evaluate` with mean and deviation of each score over `sources` x `repeat`, seeds
    one apart.

    `sets` holds the single results. All sets are opened before one is measured, and the reference is
    measured once.
    """
    cfg = fid.Config(**options)
    if repeat < 1 or cfg.save_stats:
        raise ValueError(f"--repeat {repeat} --save_stats {cfg.save_stats or '(none)'}: expected at least 1, "
                         "and none: fid.py saves the statistics of one set")
    cfg.device = str(data.start_processes(cfg.device))
    make = data.lookup(fid.FEATURES, cfg.features, "--features")
    net = net or make(cfg.weights, cfg.resize, cfg.device)
    sides = [fid.open_set(source, net, dataclasses.replace(cfg, seed=cfg.seed + k), "generated")
             for source in sources for k in range(repeat)]
    if reference and not (isinstance(net, fid.GlyphNet) and reference == net.source):
        reference = fid.open_set(reference, net, cfg, "reference")
        fid.check_sizes([*sides, reference])
    results = [fid.evaluate(side, reference, net, **options) for side in sides]
    return spread(results) if len(results) > 1 else results[0]


def spread(results: list[dict]) -> dict:
    """Several results of the same protocol as one: dict(value, std, sets) of each score."""
    names = results[0]["scores"].keys()
    for one in results:
        if one["scores"].keys() != names:
            raise ValueError("only sample sets of one size and kind have a spread: "
                             f"{results[0]['generated']} has {', '.join(names)}; "
                             f"{one['generated']} has {', '.join(one['scores'])}")
    values = {name: [one["scores"][name]["value"] for one in results] for name in names}
    scores = {name: dict(value=statistics.mean(found), std=statistics.stdev(found), sets=len(found))
              for name, found in values.items()}
    if any("fid" in name for name in names):
        data.note("note: retraining moves an FID by 1 to 2 %, three times what new samples do: differences "
                  "below that say nothing about a method (arXiv:2606.20536)")
    generated = ", ".join(dict.fromkeys(one["generated"] for one in results))
    return results[0] | dict(scores=scores, generated=generated, sets=results)


@dataclasses.dataclass
class Config(fid.Config):
    repeat: int = option(1, "measure so often, with seeds one apart")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("generated", "reference"), own=("repeat",))
    if not cfg.generated or not cfg.reference:
        return print(__doc__.strip())
    options = vars(cfg)
    found = evaluate(options.pop("generated").split(","), options.pop("reference"), **options)
    if data.rank() == 0:
        single = {key: value for key, value in found.items() if key != "sets"}
        print(json.dumps(found) if cfg.json else fid.as_text(single))
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
