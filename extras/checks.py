"""What is refused: settings out of their bounds, and checkpoints that are not what train.py writes.

The core asks for these checks by `data.optional("checks")`, before it uses a setting and before it builds
anything of a checkpoint. Other files have the checks of what they read themselves.

    python -m extras.checks FILE.pt ...         whether these are checkpoints that can be used
"""
import dataclasses
import math
import os
import sys
import types
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import data
import losses
import model
import sample

# ---- 1. Settings ----

# The lowest and the highest value of numeric flags, and one more; others are finite and 0 or more.
BOUNDS = dict.fromkeys("""steps n batch accumulation log_every save_every sample_steps doublings d_steps
                       candidates bank repeat best_of rounds stage shard omega_max""".split(), (1, 10 ** 9))
BOUNDS |= dict.fromkeys("""ema label_drop beta1 beta2 jumps jump_low augment cg_time guide_until stitch_share
                        guidance_low guidance_high""".split(), (0, 1))
BOUNDS |= dict.fromkeys(("time_mean", "kappa", "seed", "minutes"), (-2.0 ** 63, 2.0 ** 63))
BOUNDS |= dict.fromkeys(("shift", "rho", "data_std", "interval"), (0.001, 1000))
BOUNDS |= dict.fromkeys(("score", "num", "subset"), (2, 10 ** 9, 0))  # one has no covariance
BOUNDS |= dict(batch=(1, 10 ** 6), size=(0, 2 ** 14), sample_steps=(1, 10 ** 5), workers=(-1, 1000),
               nfe=(0, 1000), beta1=(0, 0.9999), beta2=(0, 0.999999), repeats=(0, 64),
               stages=(2, 16), finest=(2, 2 ** 16))


def check_settings(cfg, *sides):
    """cfg, if its values are possible and, where `sides` are compared by fid.py, used."""
    check_values(cfg)
    if getattr(cfg, "solver", ""):
        data.lookup(sample.SOLVERS, cfg.solver, "--solver")
    for name in ("time", "jump_time"):
        if getattr(cfg, name, ""):
            data.lookup(losses.TIMES, getattr(cfg, name).partition(":")[0], f"--{name}")
    if sides:
        check_used(cfg, *sides)
    return cfg


def check_values(cfg) -> None:
    """ValueError for a setting of another type than its default, or out of `BOUNDS`."""
    for field in dataclasses.fields(cfg):
        name, value, kind = field.name, getattr(cfg, field.name), type(field.default)
        if value is None or value == field.default and type(value) is kind:
            continue
        if type(value) not in {kind, int if kind is float else kind}:
            raise ValueError(f"--{name} {value!r}: expected a value of type {kind.__name__}")
        if (choices := field.metadata.get("choices")) and str(value).partition(":")[0] not in choices:
            raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}")
        if kind in (int, float):
            low, high, *one = BOUNDS.get(name, (0, 10 ** 9 if kind is int else sys.float_info.max))
            if not low <= value <= high and value not in one:
                range = f"{low:g} to {high:g}" if high < 10 ** 9 else f"a finite number, at least {low:g}"
                raise ValueError(f"--{name} {value}: expected {range}{', or 0' if one else ''}")


def check_used(cfg, *sides) -> None:
    """ValueError for settings of a run where none is scored."""
    if not all(isinstance(side, (str, os.PathLike)) for side in sides):
        return
    runs = [s for s in map(str, sides) if s.endswith((".pt", ".pth")) or Path(s, "last.pt").exists()]
    for name in ("steps", "solver", "guidance", "codec", "labels") if not runs else ():
        if getattr(cfg, name) != getattr(type(cfg), name):
            raise ValueError(f"--{name} {getattr(cfg, name)}: how a run makes samples, and none is given")


def walk(root: Path, followlinks: bool):
    """os.walk; a folder that comes twice, by links, or cannot be read is an error."""
    def refuse(error):
        raise error
    seen = {}
    tree = os.walk(root, followlinks=followlinks, onerror=refuse) if root.is_dir() else ()
    for folder, folders, names in tree:
        found = os.stat(folder)
        first = seen.setdefault((found.st_dev, found.st_ino), folder)
        if first != folder:
            raise ValueError(f"{folder}: a link to {first}, so images would come twice; remove the link")
        yield folder, folders, names


# ---- 2. Checkpoints ----


def check_checkpoint(content: dict, path) -> None:
    """ValueError where one of ours is not what train.py writes, or its config not that of its tensors."""
    if "networks" not in content:
        return
    def must(fine: bool, what: str) -> None:
        if not fine:
            raise ValueError(f"{path}: damaged, or not a checkpoint of train.py ({what[:99]}); make it again")

    step, seconds, networks = content.get("step", 0), content.get("seconds", 0), content["networks"]
    must(type(step) is int and 0 <= step < 2 ** 53, f"step {step!r}")
    must(type(seconds) in (int, float) and 0 <= seconds < math.inf, f"seconds {seconds!r}")
    must(isinstance(networks, dict) and {"G"} <= {*networks} <= {"G", "D"}, "networks")
    must(all(isinstance(net, dict) for net in networks.values()), "networks")
    settings = [content.get("config", {}), content.get("sampling", {}), networks["G"].get("config")]
    must(all(map(is_plain, settings)), "settings")
    config, weights = settings[-1], networks["G"].get("weights")
    for tensors in (content.get("ema"), *(net.get("weights") for net in networks.values())):
        check_stored(tensors, path)

    size, patch, width, depth = own = [config.get(k) for k in ("input_size", "patch", "width", "depth")]
    blocks, table = {k.split(".")[1] for k in weights if k.startswith("blocks.")}, weights.get("pos_embed")
    more = config.get("velocity_head", 0)  # imf's blocks beside the others
    must(all(type(n) is int and n > 0 for n in [*own, more + 1 if type(more) is int else 0])
         and len(blocks) == depth + more and table is not None
         and table.dim() == 3 and table.shape[2] == width and (size // patch) ** 2 <= table.shape[1],
         "its config is not that of its tensors")  # before any memory is asked for
    for tensors in weights, content["ema"]:  # each into a network of its own, which takes the tensors over
        try:
            with torch.device("meta"):
                net = model.build(config)
        except Exception as error:  # of whatever a part does with a wrong setting
            must(False, f"its config makes no network: {error}")
        model.load_weights(net, tensors, path)


def is_plain(settings) -> bool:
    """Whether these are finite numbers and strings by name, or a list of strings."""
    return isinstance(settings, dict) and all(
        type(k) is str and (type(v) in (bool, int, str) or type(v) is float and math.isfinite(v)
                            or k == "parts" and type(v) is list and all(type(text) is str for text in v))
        for k, v in settings.items())


def check_stored(tensors, path) -> None:
    """ValueError unless these are floats by name, and no more of them than a file of that size holds."""
    floats = torch.float16, torch.bfloat16, torch.float32, torch.float64
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: damaged: a {type(tensors).__name__} in place of weights by name")
    for name, x in tensors.items():
        fine = type(name) is str and torch.is_tensor(x) and x.dtype in floats and x.device.type == "cpu"
        if not fine or x.layout != torch.strided:
            raise ValueError(f"{path}: {name!s:.80} is no tensor of floats ({getattr(x, 'dtype', type(x))})")
    if os.path.isfile(path) and sum(x.nbytes for x in tensors.values()) > os.path.getsize(path):
        raise ValueError(f"{path}: damaged: its tensors are larger than the file")


def check_moments(optimizer, params: list, path) -> None:
    """ValueError unless these are AdamW's step and moments of each parameter or, at first, none."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    fine = isinstance(state, dict) and {*state} in (set(), {*range(len(params))})
    for i, p in enumerate(params) if state and fine else ():
        s = state[i] if isinstance(state[i], dict) else {}
        check_stored(s, path)
        fine &= [(k, tuple(x.shape)) for k, x in s.items()] == [
            ("step", ()), ("exp_avg", tuple(p.shape)), ("exp_avg_sq", tuple(p.shape))]
        fine = fine and all(x.isfinite().all() and x.min() >= 0 for k, x in s.items() if k != "exp_avg")
        fine = fine and bool(s["exp_avg"].isfinite().all())
    if not fine:
        raise ValueError(f"{path}: its optimizer is not that of the {len(params)} parameters of its network: "
                         f"damaged; start a new run with --init {path}")


def check_sampling(path, own: dict, content: dict) -> None:
    kinds = {f.name: type(f.default) for f in dataclasses.fields(sample.Config)}
    if own and (any(type(value) is not kinds.get(name) for name, value in own.items())
                or type(content.get("config", {}).get("sample_steps")) is not int):
        raise ValueError(f"{path}: damaged: sampled by {own}; train it again")


def check_finite(content: dict, step: int) -> None:
    """ValueError unless all that a checkpoint is to hold is finite."""
    if not all(x.isfinite().all() for x in tree_leaves(content) if torch.is_tensor(x)):
        raise ValueError(f"step {step}: weights or moments are not finite; last.pt, if any, is older and "
                         "sound: --resume with a lower --lr")


def run_settings(path, content: dict, **kinds: type) -> types.SimpleNamespace:
    """The settings of a checkpoint's run; ValueError unless these are there and of these types."""
    settings = content.get("config", {})
    if wrong := [name for name, kind in kinds.items() if type(settings.get(name)) is not kind]:
        raise ValueError(f"{path}: {wrong[0]} is {settings.get(wrong[0], 'missing')}: damaged, or not a run "
                         "of train.py")
    return types.SimpleNamespace(**settings)


def main(argv: list[str] | None = None) -> None:
    for path in sys.argv[1:] if argv is None else argv:
        content = model.read_checkpoint(path)
        print(f"{path}: step {content.get('step', 'unknown')}, {', '.join(map(str, content))}")


if __name__ == "__main__":
    data.run_cli(main)
