"""Reading the official weight files of DiT, SiT, REPA, REG, JiT, AFM and CAFM.

`model.load` comes here with what is no checkpoint of ours, so every script takes such a file where it takes
a run. All sizes are read from the tensors; each network becomes a velocity in our time (t = 1 is noise):

    DiT (arXiv:2212.09748)   noise prediction on a diffusion schedule: the part `VPNoise`
    SiT (arXiv:2401.08740)   v(x, t) = -net(x, 1 - t): `reverse_time`; CAFM's generators as well
    REPA, REG                SiT in our time, told by its projectors, which are left behind
    JiT (arXiv:2511.13720)   the clean image at time 1 - t: `turn_time`
    AFM (arXiv:2511.22475)   jumps in our time times a thousand: the part `TimeScale`

A file does not tell whether it is DiT's, SiT's or AFM's (guessed from its name) nor how many heads it has
(guessed from its width). Where that fails, make a checkpoint of ours of it:

    python sample.py DiT-XL-2-256x256.pt --codec latents:sd-vae-ft-mse.safetensors
    python -m extras.guidance DiT-XL-2-256x256.pt --guide_channels 3 ..     guided as in the papers' figures
    python -m extras.official FILE                                        what it is
    python -m extras.official FILE --kind sit --heads 8 --out sit.pt

Tested on files of these layouts, made of formula weights, against numbers from the official classes; no
official file could be had: not checked yet.
"""
import dataclasses
import math
import os
import re

import torch

import data
import model
from data import option
from extras.official_times import reverse_time, turn_time

# ---- 1. Reading a file ----

HEADS = {width: heads for width, _, heads in model.SIZES.values()}
KEYS = dict(ema=("ema", "model_ema1", "model"), last=("model",), ema2=("model_ema2",))  # --weights -> where
TABLE = "y_embedder.embedding_table.weight"


def load(path, content: dict, weights: str = "ema", kind: str = "", heads: int = 0) -> model.DiT:
    """The network of an official file that holds `content`: a velocity in our time, in eval mode.

    weights: "ema", averaged ones where there are any; "last"; "ema2", JiT's second average (decay 0.9996).
    kind ("dit", "sit", "afm") and heads: where they cannot be guessed. ValueError for other files.
    """
    tensors = find_weights(path, content, weights)
    our_time = any("projectors" in k for k in tensors)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("projectors.")}
    kind = kind_of(path, kind, tensors)
    net = model.build(dit_config(tensors, path, kind, heads) if kind != "jit" else jit_config(tensors))
    if kind == "jit":
        tensors = turn_time(tensors)
    elif kind == "sit" and not our_time:
        tensors = reverse_time(tensors)
    model.load_weights(net, tensors, path)
    return net.eval()


def find_weights(path, content: dict, weights: str) -> dict:
    """The tensors of an official file by name, without the prefixes of wrappers."""
    held = [key for key in ("ema", "model_ema1", "model_ema2", "model") if isinstance(content.get(key), dict)]
    known = [name for name, keys in KEYS.items() if set(keys) & set(held)] or ["ema", "last"]
    if weights not in known:
        raise ValueError(f"{path}: holds no weights {weights}; choose one of {', '.join(known)}")
    content = next((content[key] for key in KEYS[weights] if key in held), content)
    tensors = {k.removeprefix("module.").removeprefix("net."): v for k, v in content.items()
               if torch.is_tensor(v)}
    needed = ["pos_embed", TABLE, "final_layer.linear.weight"]
    if "x_embedder.proj1.weight" in tensors:
        needed += ["x_embedder.proj2.weight", "blocks.0.attn.q_norm.weight", "in_context_posemb"]
    else:
        needed += ["x_embedder.proj.weight", "blocks.0.mlp.fc1.weight"]
    refuse_without(needed, tensors, path, "not a DiT, SiT, JiT or AFM file")
    return tensors


def refuse_without(needed: list, tensors: dict, path, what: str) -> None:
    for name in needed:
        if name not in tensors:
            first = ", ".join(map(str, list(tensors)[:4]))
            raise ValueError(f"{path}: {what}: {name} is missing (its first entries: {first})")


def kind_of(path, kind: str = "", tensors: dict | tuple = ()) -> str:
    """dit, sit, jit or afm, by the tensors or the file's name (AFM's say nfe, as in xl2_2nfe_...)."""
    if "x_embedder.proj1.weight" in tensors:
        return "jit"
    if "cls_projectors2.weight" in tensors:
        return "sit"
    name = os.path.basename(path).lower().replace("nfe", "-afm-")
    found = {kind} if kind else set(re.findall(r"(?<![a-z])(dit|sit|afm)(?![a-z])", name))
    if found not in ({"dit"}, {"sit"}, {"afm"}):
        raise ValueError(f"{path}: DiT, SiT and AFM files look alike; let its name have one of them in it, "
                         f"or give its --kind to python -m extras.official {path} --out FILE")
    return found.pop()


def dit_config(tensors: dict, path, kind: str, heads: int) -> dict:
    """The config of the network of a DiT, SiT, REG or AFM file."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if not heads and width not in HEADS:
        raise ValueError(f"{path}: its number of heads is unknown, as width {width} is not one of DiT's; "
                         f"give its --heads to python -m extras.official {path} --out FILE")
    config = shared_config(tensors, patch) | dict(
        channels=channels, width=width, heads=heads or HEADS[width], null_class=kind != "afm",
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / width,
        num_classes=len(tensors[TABLE]) - (kind != "afm"),
        learn_sigma=len(tensors["final_layer.linear.weight"]) == 2 * channels * patch ** 2)
    if "cls_projectors2.weight" in tensors:
        config |= dict(parts=["reg.Token"], token=tensors["cls_projectors2.weight"].shape[1])
    if kind == "dit":
        config |= dict(parts=["official_times.VPNoise"])
    return config | afm_config(tensors, path, config["depth"]) if kind == "afm" else config


def shared_config(tensors: dict, patch: int) -> dict:
    depth = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
    return dict(depth=depth, patch=patch, input_size=math.isqrt(tensors["pos_embed"].shape[1]) * patch)


def afm_config(tensors: dict, path, depth: int) -> dict:
    """One jump, without a time, gives the image. A file whose name says N layers repeats its blocks."""
    layers = re.search(r"(\d+)-?layer", os.path.basename(path).lower())
    deep = dict(repeats=int(layers[1]) // depth) if layers else {}
    times = int("t_embedder.mlp.0.weight" in tensors and not deep)
    parts = ["official_times.TimeScale", *["afm_more.Deep"] * bool(deep)]
    return deep | dict(parts=parts, times=times, predict="v" if times else "x")


def jit_config(tensors: dict) -> dict:
    """The config of the network of a JiT file; its context starts at a third, as in all of JiT's presets."""
    bottleneck, channels, patch, _ = tensors["x_embedder.proj1.weight"].shape
    shared, width = shared_config(tensors, patch), len(tensors["x_embedder.proj2.weight"])
    return shared | dict(parts=["jit.JiT"], predict="x", norm="rms_weight", channels=channels, width=width,
                         heads=width // len(tensors["blocks.0.attn.q_norm.weight"]), bottleneck=bottleneck,
                         num_classes=len(tensors[TABLE]) - 1, context_start=shared["depth"] // 3,
                         context=tensors["in_context_posemb"].shape[1])


def discriminator_weights(path, content: dict, loss: str = "") -> dict:
    """The weights of our Discriminator from an official file. CAFM's time is turned, AFM's (afm) is ours."""
    tensors = {k.removeprefix("module."): v for k, v in content.items() if torch.is_tensor(v)}
    tensors = {k.replace("proj_out.", "final_layer."): v for k, v in tensors.items()}  # its name beside JiT
    if "in_context_posemb" not in tensors:
        refuse_without(["dis_embed"], tensors, path, "not a CAFM or AFM discriminator")
    if not loss.startswith("afm") and "t_embedder.mlp.0.weight" in tensors:
        tensors = turn_time(tensors)
    own = ("dis_embed", "final_layer.")
    tensors = {k if k.startswith(own) else f"trunk.{k}": v for k, v in tensors.items()}
    return tensors | {"gradient_square": torch.zeros(())}


# ---- 2. Run alone: what a file is ----


@dataclasses.dataclass
class Config:
    file: str = option("", "an official file of weights")
    kind: str = option("", "dit, sit or afm, where its name does not say so", ("", "dit", "sit", "afm"))
    heads: int = option(0, "its number of heads, where its width is not one of DiT's")
    weights: str = option("ema", "ema, last or ema2 (JiT's second average)", tuple(KEYS))
    out: str = option("", "a checkpoint of ours to write")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "What an official file is; a checkpoint of ours made of it.", ("file",))
    if not cfg.file:
        return print(__doc__.strip())
    net = load(cfg.file, model.read_checkpoint(cfg.file), cfg.weights, cfg.kind, cfg.heads)
    print(f"{cfg.file}: {sum(p.numel() for p in net.parameters()):,} values; {net.config}")
    if cfg.out:
        weights = net.state_dict()
        torch.save({"networks": {"G": {"config": net.config, "weights": weights}}, "ema": weights}, cfg.out)
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    data.run_cli(main)
