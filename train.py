"""Training: one loop for every objective, on one process or many.

    python train.py                                        flow matching on glyphs: minutes on a laptop's CPU
    python train.py --loss cafm --init runs/glyphs --out runs/cafm      post-training; --help shows a loss's own settings
    python train.py --data FOLDER --size 64 --model SiT-S/4 --predict x --out runs/mine
    torchrun --nproc_per_node=2 train.py ...               the same run, shared by two processes
    python train.py ... --resume                           go on where a run stopped, bit for bit

A run folder holds config.json, log.jsonl (one object a logged step), loss.png, samples/*.png, last.pt (the checkpoint)
and final.json (the scores and how they were measured).

Batches, noise, times and dropped labels are functions of (seed, position in the run) alone, so neither a restart nor
the number of processes nor gradient accumulation changes what is computed, beyond the order of floating-point sums.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

import data
import fid
import losses
import model
import sample
from data import option


@dataclasses.dataclass(frozen=True)
class Config:
    loss: str = option("fm", "the training objective", tuple(losses.LOSSES))
    model: str = option("glyph-S", "a network of the zoo: python model.py lists them")
    predict: str = option("", "what the last layer predicts: v, x, or the model's own choice", ("", "v", "x"))
    data: str = option("glyphs", "glyphs, an image folder, .zip, .npz, MNIST or CIFAR-10 files, or latents of data.py encode")
    size: int = option(32, "images are cropped and scaled to this many pixels; 0: as they are (latents)")
    vae: str = option("", "the codec's file, to look at samples of latents: sd-vae-ft-mse.safetensors")
    mirror: str = option("auto", "flip images left-right at random; auto: photographs, not digits",
                              ("auto", "on", "off"))
    workers: int = option(-1, "processes that decode image files; -1: up to 4 for files, none for arrays")
    steps: int = option(4000, "optimizer steps of the whole run")
    batch: int = option(32, "global batch: images of one step, over all processes and accumulation")
    accumulation: int = option(1, "micro-batches each process adds up for a step")
    lr: float = option(4e-3, "AdamW learning rate")
    d_lr: float = option(0.0, "learning rate of the discriminator; 0: the same")
    warmup: int = option(100, "steps of linear warm-up")
    decay: str = option("linear", "learning rate after warm-up: constant, or linear to 0", ("linear", "constant"))
    beta1: float = option(0.9, "AdamW's first beta")
    beta2: float = option(0.999, "AdamW's second beta")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    ema: float = option(0.999, "decay of the averaged weights, smaller in the first steps")
    ema_reload: int = option(0, "steps between copies of the averaged weights into the generator; 0: never")
    schedule: str = option("", "settings that change on the way, such as '4000: lr=1e-4 ot=0.001 ot_end=0.001; 6000: "
                           "ema_reload=500 d_reload=5000' (d_reload: D becomes what it was at a step kept by --keep_every)")
    time: str = option("logit_normal", "distribution of the training time", ("uniform", "logit_normal"))
    time_mean: float = option(0.8, "logit-normal: mean of logit(t); larger trains more on noise (0.8, 0.8: JiT)")
    time_std: float = option(0.8, "logit-normal: standard deviation of logit(t)")
    curriculum: int = option(0, "steps of each of 20 stages that let in times from the noisiest on; 0: all times at once")
    candidates: int = option(16, "pafm: images that an average is taken over, the sample itself and others of its class")
    bank: int = option(256, "pafm: images of each class that the others are drawn from")
    label_drop: float = option(0.1, "share of labels replaced by the null label, for guidance")
    encoder: str = option("", "repa, reg, cat: FILE.py:NAME, a frozen image encoder, see README; latents bring features along")
    align: float = option(0.5, "repa, reg, and cat where there is an encoder: weight of the alignment with its features")
    align_block: int = option(0, "repa, reg: tokens are aligned after so many blocks; 0: a third of them, at most 8")
    token: float = option(0.03, "reg: weight of the loss of the encoder's token of the whole image")
    d_warmup: int = option(0, "cafm: steps of the discriminator alone before the generator's first")
    d_steps: int = option(4, "cafm: steps of the discriminator for one of the generator")
    route: str = option("reverse", "cafm: derivatives of D by one input gradient, by forward mode (the official code), or "
                        "by finite differences over --interval", ("reverse", "forward", "finite"))
    interval: float = option(0.05, "cafm --route finite: length in time")
    nfe: int = option(1, "afm: jumps from noise to data; 0: any number, one network for all times")
    repeats: int = option(0, "afm --nfe 1: a deep generator, its blocks run this often; 0: an ordinary one")
    cg: float = option(0.003, "afm: weight of the guidance by --classifier")
    cg_time: float = option(0.1, "afm --nfe 1: samples are noised up to this time for the classifier")
    cp: float = option(0.001, "cafm, afm: weight of the penalty that centres D's values")
    gp: float = option(0.25, "afm, cat: weight of the gradient penalties R1 and R2")
    ot: float = option(0.0, "cafm, afm: weight of the transport cost at the first step")
    ot_end: float = option(0.0, "cafm, afm: the same at the last step, half a cosine later")
    jumps: float = option(0.25, "meanflow, imf, soflow, shortcut: share of samples that learn a jump; others: the velocity")
    p: float = option(1.0, "meanflow, imf, soflow: a sample's loss l is divided by (l + c)^p, a constant; 0: least squares")
    omega: float = option(1.0, "meanflow, soflow: weight of the sample's velocity in the guided one; shortcut: guidance")
    kappa: float = option(0.0, "meanflow, soflow: weight of the network's own velocity in it: guidance omega / (1 - kappa)")
    guide_until: float = option(1.0, "meanflow, soflow: guide only where t is at most this (1 is noise)")
    omega_max: float = option(1.0, "imf: the network is told a guidance scale from 1 to this; 1: none")
    head: int = option(0, "imf: blocks that the velocity head has for itself; 0: no head, the boundary form")
    finest: int = option(128, "shortcut: the shortest jumps are 1 / finest long, a power of 2")
    doublings: int = option(8, "ect: stages of the run, in each of which steps are half as long as before")
    data_std: float = option(0.42, "scm: standard deviation of the data's pixels (0.42: glyphs)")
    stages: int = option(3, "cat: stages of the generator, and scales of the discriminator")
    cons: float = option(0.1, "cat: weight of the distance of the stages to the last one")
    cons_detach: bool = option(False, "cat: the last stage is a constant in it")
    cons_space: str = option("full", "cat: compare stages at full resolution, or at each one's own", ("full", "own"))
    balance: float = option(0.01, "MoE networks: weight of the term that sends tokens to all experts alike")
    augment: float = option(0.0, "afm, cat, classifier: probability of each augmentation that D or the classifier sees "
                            "images through")
    seed: int = option(0, "everything random follows from it")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    amp: str = option("auto", "bfloat16 autocast around the network; auto: on CUDA", ("auto", "bf16", "off"))
    compile: bool = option(False, "torch.compile the network")
    recompute: bool = option(False, "keep only the inputs of blocks for the backward pass: a third more time, much less memory")
    shard: bool = option(False, "processes share weights, gradients, optimizer and EMA (FSDP2) rather than hold copies")
    out: str = option("runs/glyphs", "the run folder")
    init: str = option("", "start from the weights of this checkpoint or run folder (cafm, afm: D too, but its head)")
    d_init: str = option("", "start the discriminator from that of this run, or from an official CAFM or AFM file")
    classifier: str = option("", "afm: a run of --loss classifier that guides the generator")
    resume: bool = option(False, "go on with the run in --out")
    log_every: int = option(100, "steps between lines of log.jsonl")
    sample_every: int = option(1000, "steps between sample grids; 0: only at the end")
    save_every: int = option(1000, "steps between checkpoints")
    keep_every: int = option(0, "steps between checkpoints that stay, step_0002000.pt and so on; 0: last.pt alone")
    score: int = option(1000, "samples scored at the end (glyphs only); 0: none")
    monitor: int = option(0, "samples scored at every sample grid, into scores.jsonl; 0: none")
    reference: str = option("", "what --monitor compares images with, as in fid.py; empty: the data, measured once")
    fid_weights: str = option("torchvision", "InceptionV3's weights for --monitor on images, as in fid.py --weights")
    sample_steps: int = option(25, "solver steps of grids and scores")
    solver: str = option("ab2", "solver of grids and scores", tuple(sample.FLOW_SOLVERS))
    guidance: float = option(1.5, "guidance scale of grids and of the guided score")
    preset: str = option("", "the settings of a paper, such as cafm-sit-xl2, where no flag says otherwise; they are printed")
    compare: str = option("", "train these objectives, such as fm,pafm,meanflow, alike, into folders of --out, and score each "
                          "in 1, 2, 4 and 50 network evaluations: a table and a picture; goes on where it was stopped")
    benchmark: bool = option(False, "only time training steps: against plain PyTorch, and each role of each objective")


PAPERS = dict(decay="constant", warmup=0, clip=0.0, ema=0.9999, weight_decay=0.0, lr=1e-4, batch=256, label_drop=0.1, score=0,
              log_every=100, sample_every=10_000, save_every=10_000)  # what they share; 5004 steps of 256 are an epoch of ImageNet
LATENTS = PAPERS | dict(model="SiT-XL/2", predict="v", size=0)
PIXELS = PAPERS | dict(loss="fm", size=256, batch=1024, warmup=6255, lr=2e-4, beta2=0.95, time="logit_normal", time_mean=0.8,
                       time_std=0.8, steps=750_600)
AFM = dict(loss="afm", beta1=0.0, beta2=0.9, weight_decay=0.01, label_drop=0.0, steps=1_000_000, gp=0.25, cp=0.01)
PRESETS = {  # --preset NAME: (where its settings were read, the settings)
    "sit-xl2-imagenet256": ("SiT, arXiv:2401.08740 and its train.py", LATENTS | dict(
        loss="fm", time="uniform", steps=7_000_000)),
    "jit-b16-imagenet256": ("JiT, arXiv:2511.13720 and its main_jit.py", PIXELS | dict(model="JiT-B/16")),
    "jit-h16-imagenet256": ("JiT, arXiv:2511.13720 and its main_jit.py", PIXELS | dict(model="JiT-H/16")),
    "cafm-sit-xl2": ("CAFM, arXiv:2604.11521, train_cafm_sit.yaml: give --init SiT-XL-2-256.pt", LATENTS | dict(
        loss="cafm", time="uniform", lr=1e-5, beta1=0.0, beta2=0.95, ema=0.99, d_steps=16, d_warmup=10_000, cp=0.001,
        steps=50_000)),
    "cafm-jit-h16": ("CAFM, arXiv:2604.11521, train_cafm_jit.yaml: give --init of a JiT-H/16 file", PIXELS | dict(
        loss="cafm", model="JiT-H/16", warmup=0, lr=1e-5, beta1=0.0, ema=0.99, d_steps=16, d_warmup=5000, cp=0.001,
        steps=12_500)),
    "afm-xl2-1nfe": ("AFM, arXiv:2511.22475, train_afm_1nfe.yaml and Table 11, stage 1", LATENTS | AFM | dict(
        predict="x", nfe=1, ot=0.2, ot_end=0.005)),
    "afm-xl2-2nfe": ("AFM, arXiv:2511.22475, train_afm_multi_nfe.yaml and Table 11, stage 1", LATENTS | AFM | dict(
        nfe=2, ot=0.25, ot_end=0.005, clip=5.0)),
    "afm-xl2-56layer": ("AFM, arXiv:2511.22475, train_afm_1nfe_deep.yaml and Table 11, stage 1", LATENTS | AFM | dict(
        predict="x", nfe=1, repeats=2, ot=0.2, ot_end=0.005, clip=5.0)),
    "meanflow-xl2": ("MeanFlow, arXiv:2505.13447, and a PyTorch port's README for omega, kappa", LATENTS | dict(
        loss="meanflow", time="logit_normal", time_mean=-0.4, time_std=1.0, beta2=0.95, jumps=0.25, p=1.0, omega=0.2,
        kappa=0.92, guide_until=0.75, steps=1_200_960)),
    "repa-xl2": ("REPA, arXiv:2410.06940, and its train.py: data.py encode --encoder a DINOv2-B", LATENTS | dict(
        loss="repa", time="uniform", clip=1.0, align=0.5, align_block=8, mirror="off", steps=4_000_000)),
    "reg-xl2": ("REG, arXiv:2507.01467, and its train.sh: data.py encode --encoder a DINOv2-B", LATENTS | dict(
        loss="reg", time="uniform", clip=1.0, align=0.5, align_block=8, token=0.03, mirror="off", steps=4_000_000)),
    "soflow-xl2": ("SoFlow, arXiv:2512.15657, and its train.py", LATENTS | dict(
        loss="soflow", time="logit_normal", time_mean=-0.2, time_std=1.0, beta2=0.99, jumps=0.25, p=1.0, steps=1_200_960)),
}


# --------------------------------------------------------------------------------------------------------------------
# 1. Pieces of the loop
# --------------------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """An objective and the network it trains, as one module; `others` are the networks that it only looks at.

    DistributedDataParallel wraps this rather than the network, so an objective may use the network in any way, also
    take derivatives of it. A tuple hides the others from DDP.
    """

    def __init__(self, objective, net: nn.Module, cfg: Config, *others: nn.Module):
        super().__init__()
        self.objective, self.net, self.cfg, self.others = objective, net, cfg, others

    def forward(self, images: Tensor, labels: Tensor, positions: list[int]) -> tuple[Tensor, dict]:
        draws = data.Draws(self.cfg.seed, positions, images.device)
        now = scheduled(self.cfg, positions[0] // self.cfg.batch)
        loss, logs = self.objective(self.net, data.clean(images, draws), labels, draws, now, *self.others)
        balance = model.balance_of(self.net)
        return (loss, logs) if balance is None else (loss + now.balance * balance, logs | {"balance": balance})


def micro_batch(cfg: Config) -> int:
    """Images of one forward pass on one process."""
    parts = data.world() * cfg.accumulation
    if cfg.batch < 1 or cfg.accumulation < 1 or cfg.batch % parts:
        raise ValueError(f"--batch {cfg.batch} does not divide into {data.world()} processes x {cfg.accumulation} "
                         f"accumulation steps: use a multiple of {parts}")
    return cfg.batch // parts


def positions_from(step: int, cfg: Config):
    """The positions in the run of this process's micro-batches, from `step` on: `accumulation` lists for each step."""
    size = micro_batch(cfg)
    for step in range(step, cfg.steps):
        for k in range(cfg.accumulation):
            start = step * cfg.batch + (k * data.world() + data.rank()) * size
            yield list(range(start, start + size))


SCHEDULED = ("lr", "d_lr", "ema", "ot", "ot_end", "gp", "cp", "cg", "cons", "augment", "ema_reload")


@functools.cache
def schedule_entries(text: str) -> dict[int, dict]:
    """--schedule as {step: {setting: value}}, in the order of the steps."""
    entries = {}
    for entry in filter(str.strip, text.split(";")):
        step, _, settings = entry.partition(":")
        try:
            pairs = dict(pair.split("=") for pair in settings.replace(",", " ").split())
            entries[int(step)] = {k: (int if k in ("ema_reload", "d_reload") else float)(v) for k, v in pairs.items()}
        except ValueError:
            raise ValueError(f"--schedule: cannot read {entry.strip()!r}; expected STEP: NAME=VALUE NAME=VALUE") from None
        if unknown := [k for k in pairs if k not in (*SCHEDULED, "d_reload")]:
            raise ValueError(f"--schedule: {unknown[0]} is not one of {', '.join(SCHEDULED)}, d_reload")
    return dict(sorted(entries.items()))


@functools.lru_cache(maxsize=2)
def scheduled(cfg: Config, step: int) -> Config:
    """The settings at this step: those of the run, and of every entry of its schedule up to here."""
    entries = schedule_entries(cfg.schedule)
    changes = {k: v for start in entries if start <= step for k, v in entries[start].items() if k in SCHEDULED}
    return dataclasses.replace(cfg, **changes) if changes else cfg


def check_schedule(cfg: Config, kept: Path) -> None:
    for step, settings in schedule_entries(cfg.schedule).items():
        back = settings.get("d_reload", 0)
        if back and not losses.LOSSES[cfg.loss].D:
            raise ValueError(f"--schedule d_reload={back}: --loss {cfg.loss} has no discriminator")
        will_be = back < step and cfg.keep_every and back % cfg.keep_every == 0
        if back and not will_be and not (kept / f"step_{back:07d}.pt").exists():
            raise ValueError(f"--schedule d_reload={back}: step {back} is not kept before step {step}; use a step that "
                             f"--keep_every ({cfg.keep_every}) keeps")


def check(cfg: Config) -> None:
    """ValueError for settings that cannot work, before anything is written."""
    micro_batch(cfg)
    check_schedule(cfg, Path(cfg.out))
    for name in ("steps", "log_every", "save_every", "sample_steps"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected at least 1")
    if cfg.curriculum < 0 or cfg.candidates < 1 or cfg.bank < 1:
        raise ValueError(f"--curriculum {cfg.curriculum} --candidates {cfg.candidates} --bank {cfg.bank}: expected at least 0, "
                         f"1 and 1")
    if cfg.loss == "afm" and (cfg.nfe < 0 or cfg.repeats < 0 or cfg.repeats and cfg.nfe != 1):
        raise ValueError(f"--nfe {cfg.nfe} --repeats {cfg.repeats}: expected a number of jumps, or 0 for any; --repeats is "
                         f"for a deep generator of one jump")
    if not 0 <= cfg.augment <= 1:
        raise ValueError(f"--augment {cfg.augment}: expected a probability")
    if cfg.loss == "afm" and cfg.accumulation > 1:
        raise ValueError(f"--accumulation {cfg.accumulation}: afm normalises the gradient of its whole batch, so use "
                         f"--accumulation 1 and a smaller --batch or more processes")
    if cfg.recompute and cfg.loss == "cafm" and cfg.route == "forward":
        raise ValueError("--recompute: forward mode keeps nothing to compute again; use --route reverse")
    if cfg.shard and cfg.loss == "cafm" and cfg.route == "forward":
        raise ValueError("--shard --route forward: FSDP cannot bring weights together inside torch.func; drop --shard, or "
                         "use --route reverse, which gives the same numbers")
    if cfg.loss == "cafm" and (cfg.d_steps < 1 or not 0 < cfg.interval <= 1):
        raise ValueError(f"--d_steps {cfg.d_steps} --interval {cfg.interval}: expected at least 1, and in (0, 1]")
    if "jumps" in losses.LOSSES[cfg.loss].defaults and not 0 <= cfg.label_drop <= 1 - cfg.jumps <= 1:
        raise ValueError(f"--jumps {cfg.jumps} --label_drop {cfg.label_drop}: labels are dropped among the samples that "
                         f"learn no jump, so --label_drop is at most 1 - jumps")
    if not cfg.kappa < 1 or (cfg.omega, cfg.kappa) != (1, 0) and not cfg.label_drop:
        raise ValueError(f"--omega {cfg.omega} --kappa {cfg.kappa} --label_drop {cfg.label_drop}: guidance is omega / "
                         f"(1 - kappa) with kappa below 1, and needs a share of dropped labels")
    if cfg.loss == "imf" and (cfg.omega_max < 1 or cfg.omega_max > 1 and not cfg.label_drop):
        raise ValueError(f"--omega_max {cfg.omega_max} --label_drop {cfg.label_drop}: the largest guidance scale is at "
                         f"least 1, and one above 1 needs a share of dropped labels")
    if cfg.loss == "shortcut" and (cfg.finest < 2 or cfg.finest & cfg.finest - 1):
        raise ValueError(f"--finest {cfg.finest}: expected a power of 2")
    if cfg.loss in ("ect", "scm") and (cfg.doublings < 1 or not cfg.data_std > 0):
        raise ValueError(f"--doublings {cfg.doublings} --data_std {cfg.data_std}: expected at least 1, and more than 0")
    if cfg.loss == "cat" and cfg.stages < 2:
        raise ValueError(f"--stages {cfg.stages}: expected at least 2")
    if cfg.data in ("glyphs:1", "glyphs:2", "glyphs:3"):
        raise ValueError(f"--data {cfg.data}: these images are held out to score with; train on glyphs, or glyphs:4 and on")


def scored(cfg: Config) -> bool:
    """Whether samples of this run are scored: FD-glyphs needs glyphs."""
    return cfg.score > 0 and cfg.data.split(":")[0] == "glyphs" and losses.LOSSES[cfg.loss].draws_images


def learning_rate(step: int, cfg: Config, role: str = "G") -> float:
    """Linear warm-up, then constant or linear decay to 0 at the last step; a deep generator's is divided by its repeats."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    rate = cfg.d_lr or cfg.lr if role == "D" else cfg.lr / max(1, cfg.repeats)
    return rate * warm * (1 - step / cfg.steps if cfg.decay == "linear" else 1.0)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) net with d = min(decay, (1 + step) / (10 + step)), so that it forgets its start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def shard(net: nn.Module, keep: bool) -> None:
    """Leave each process 1 / world of every parameter: FSDP brings a block's together when it is called, then drops them.

    keep: not before `drop_whole`. A loss on derivatives goes back through each block twice, and FSDP brings it back once.
    """
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # no objective changes what a network gives in place
    for part in (*(m for m in net.modules() if isinstance(m, model.Block)), net):  # the root has what is in no block
        fully_shard(part, reshard_after_forward=not keep)
    net.set_reshard_after_backward(not keep)
    for entrance in ("projected", "stages"):  # beside forward
        if hasattr(net, entrance):
            register_fsdp_forward_method(net, entrance)


def sharded_parts(*nets: nn.Module) -> list:
    """Blocks and roots that FSDP has spread over processes: none without --shard."""
    return [part for net in nets for part in net.modules() if isinstance(part, FSDPModule)]


def drop_whole(*nets: nn.Module) -> None:
    """Of sharded networks keep this process's share alone."""
    for part in sharded_parts(*nets):
        part.reshard()


@contextlib.contextmanager
def whole(net: nn.Module):
    """All of a sharded network on every process inside the with block, so that none waits for another's call there.

    (Processes sample unequal numbers of batches.) For networks that `keep`.
    """
    for part in sharded_parts(net):
        part.unshard()
    yield
    drop_whole(net)


def gathered(x):
    """A sharded tensor as a plain one on the CPU of process 0 (None elsewhere: memory); anything else as it is."""
    if not isinstance(x, DTensor):
        return x
    full = x.full_tensor()
    return full.cpu() if data.rank() == 0 else None


def share(x: Tensor, own: Tensor) -> Tensor:
    """A plain tensor to be copied into `own`: where that is sharded, this process's share of it."""
    return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None) if isinstance(own, DTensor) else x


def shares(weights: dict, net: nn.Module) -> dict:
    """`share` of the weights of a network."""
    own = net.state_dict()
    return {k: share(v, own.get(k)) for k, v in weights.items()}


def exchange(turn: nn.Module, now: bool):
    """A context whose backward pass exchanges gradients between processes, or leaves that to a later one."""
    if isinstance(turn, DistributedDataParallel):
        return contextlib.nullcontext() if now else turn.no_sync()
    for part in sharded_parts(turn):
        part.set_requires_gradient_sync(now, recurse=False)
    return contextlib.nullcontext()


class StopSignal:
    """SIGTERM or Ctrl-C asks to finish the step, save and leave; another Ctrl-C 2 seconds later ends at once.

    (torchrun passes a Ctrl-C on to processes that the terminal has told already: two signals for one key.)
    """

    def __init__(self):
        self.asked = 0.0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def note(self, number, _frame):
        now = time.monotonic()
        self.asked = self.asked or now
        if number == signal.SIGINT and now > self.asked + 2:
            raise KeyboardInterrupt

    def on_any_process(self) -> bool:
        """Whether any process was asked: all leave after the same step."""
        asked = torch.tensor([float(self.asked > 0)])
        if dist.is_initialized():
            dist.all_reduce(asked)
        return bool(asked)


# --------------------------------------------------------------------------------------------------------------------
# 2. Checkpoints and records
# --------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, step: int, seconds: float, cfg: Config, nets: dict, opts: dict, ema: nn.Module) -> None:
    """Write everything a resumed run needs, to a temporary file that then takes the place of the old checkpoint."""
    content = {"step": step, "seconds": seconds, "config": dataclasses.asdict(cfg), "ema": ema.state_dict(),
               "networks": {role: {"config": net.config, "weights": net.state_dict(),
                                   "optimizer": opts[role].state_dict()} for role, net in nets.items()}}
    content = tree_map(gathered, content)  # with --shard a matter of all processes; the file is the same as without
    if data.rank() > 0:
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}): "
                      f"free disk space, then --resume; the checkpoint before it is untouched") from error


def resume(path: Path, cfg: Config, nets: dict, opts: dict, ema: nn.Module) -> tuple[int, float]:
    """Load a checkpoint of this run into networks, optimizers and EMA; returns its step and the seconds spent so far."""
    content = model.read_checkpoint(path)
    if "networks" not in content:
        raise ValueError(f"{path}: not a checkpoint of train.py; to start from its weights use --init")
    for name, old in content["config"].items():
        new = getattr(cfg, name, None)
        if new != old and name not in ("resume", "out"):
            if name in ("loss", "model", "predict", "data", "size", "nfe", "repeats", "stages", "head", "align_block"):
                raise ValueError(f"{path}: was trained with --{name} {old}, not {new}: resume with --{name} {old}, or "
                                 f"start a new run from its weights with --init {path} --out FOLDER")
            fid.note(f"resuming with --{name} {new} (was {old})")
    for role, saved in content["networks"].items():
        model.load_weights(nets[role], shares(saved["weights"], nets[role]), path)
        state, parameters = saved["optimizer"]["state"], opts[role].param_groups[0]["params"]
        state = {i: {k: share(v, parameters[i]) if v.dim() else v for k, v in s.items()} for i, s in state.items()}
        opts[role].load_state_dict(saved["optimizer"] | {"state": state})
        for group in opts[role].param_groups:  # these came back with the state, and may have been changed on purpose
            group.update(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    model.load_weights(ema, shares(content["ema"], ema), path)
    if content["step"] > cfg.steps:
        raise ValueError(f"{path}: is at step {content['step']} already, beyond --steps {cfg.steps}; give more")
    return content["step"], content["seconds"]


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl file; a last line that a killed process left unfinished does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, the checkpoint's: the resumed run writes them anew."""
    if path.exists() and data.rank() == 0:
        path.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))


class Log:
    """Collects the numbers of each step on the device and, now and then, averages, checks and writes them.

    Waiting for the device only at these times keeps it busy. A non-finite number is found with its step and name
    before anything computed from it is saved.
    """

    def __init__(self, path: Path, alarm: float = 0.0):
        self.path, self.pending, self.rates, self.since, self.alarm = path, [], {}, time.perf_counter(), alarm

    def note(self, step: int, role: str, values: dict, lr: float) -> None:
        self.pending.append((step, role, list(values), torch.stack([v.detach().float() for v in values.values()])))
        self.rates[role] = lr

    def flush(self, cfg: Config) -> dict:
        """Write one line for each role; returns the last line. FloatingPointError for a non-finite number."""
        if not self.pending:
            return {}
        joined = torch.cat([values for *_, values in self.pending]).cpu()
        if dist.is_initialized():  # the mean over processes: the loss of the global batch
            dist.all_reduce(joined)
            joined /= data.world()
        columns = {}
        for (step, role, names, own), values in zip(self.pending, joined.split([len(v) for *_, v in self.pending])):
            check_finite(step, role, dict(zip(names, values.tolist())))
            columns.setdefault(role, (names, []))[1].append(values)
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        rate = round(len(self.pending) * cfg.batch / seconds, 1)
        lines = [{"step": step + 1, "role": role, **dict(zip(names, torch.stack(rows).mean(0).tolist())), "lr": self.rates[role],
                  "images_per_second": rate} for role, (names, rows) in columns.items()]
        if data.rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            if line["role"] == "D" and line["loss"] < self.alarm:
                fid.note(f"step {line['step']}: the discriminator wins, its loss fell to {line['loss']:.3f}: try a lower "
                         f"--d_lr or fewer --d_steps, and look at the samples")
                self.alarm = 0.0  # once
        self.pending = []
        return lines[-1]


def check_finite(step: int, role: str, values: dict) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}, network {role}: {name} is {value}. Stopped; a last.pt in the run "
                                     f"folder is older and sound. Try a lower --lr, a longer --warmup or a smaller "
                                     f"--clip, with --resume")


def draw_loss(log: Path, picture: Path) -> None:
    """loss.png: the loss of each role over the steps, both axes labelled, the loss on a logarithmic scale."""
    rows = [row for row in read_log(log) if row["loss"] > 0]
    if len(rows) < 2:
        return
    w, h, left, low = 660, 360, 56, 28
    steps, values = [row["step"] for row in rows], [math.log10(row["loss"]) for row in rows]
    bottom, top = min(values), max(max(values), min(values) + 1e-3)
    sheet = Image.new("RGB", (w, h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)

    def at(step, value):
        return (left + (w - left - 24) * step / max(steps),
                12 + (h - low - 24) * (top - value) / (top - bottom))

    for k in range(5):
        value, step = bottom + (top - bottom) * k / 4, round(max(steps) * k / 4)
        pen.line([at(0, value), at(max(steps), value)], fill="#dddddd")
        pen.text((4, at(0, value)[1] - 7), f"{10 ** value:.3g}", fill="black", font=font)
        pen.text((at(step, bottom)[0] - 12, h - low + 8), str(step), fill="black", font=font)
    for role, colour in zip(dict.fromkeys(row["role"] for row in rows), ("#1f5fbf", "#c2410c")):
        line = [at(s, v) for s, v, row in zip(steps, values, rows) if row["role"] == role]
        pen.line(line, fill=colour, width=2)
        pen.text((line[-1][0] - 60, line[-1][1] - 20), f"loss {role}", fill=colour, font=font)
    sheet.save(picture)


def sampling(cfg: Config, guidance: float) -> dict:
    """How grids and scores are sampled: a generator of jumps in its own way, a velocity as the config says."""
    flow = dict(steps=cfg.sample_steps, solver=cfg.solver, guidance=guidance)
    return flow | losses.LOSSES[cfg.loss].sampling(dataclasses.asdict(cfg))


def write_grid(ema: nn.Module, cfg: Config, path: Path, codec: data.VAE | None, rows: int = 4) -> None:
    """A guided sample grid, one column for each of up to ten classes (ten columns of one), always from the same noise."""
    if not losses.LOSSES[cfg.loss].draws_images or ema.shape[0] != 3 and codec is None:
        return
    shown = min(10, ema.num_classes)
    columns = shown if shown > 1 else 10
    labels = sample.labels_for(rows * columns, ema.num_classes, list(range(shown)))
    options = sampling(cfg, cfg.guidance if ema.null_class else 1.0)
    made = sample.generate(ema, labels, cfg.seed, len(labels), codec=codec, **options)
    sample.write_samples(made, labels, sample.image_shape(ema, codec), path, columns)


def protocol(ema: nn.Module, cfg: Config, options: dict) -> str:
    """How the samples of a score were made, in words; options: those of `sample.sample`."""
    return (f"{sample.describe(told=ema.guided, **options)}, EMA weights, labels in turn, seed {cfg.seed + 1}, network in "
            f"{'bfloat16' if ema.amp else 'float32'}")


def score_samples(ema: nn.Module, cfg: Config, options: dict, progress: str) -> dict:
    """`fid.score_glyphs` of cfg.score samples made by these options of `sample.sample`, each process its share of them."""
    labels = sample.labels_for(cfg.score, ema.num_classes)
    made = list(sample.generate(ema, labels, cfg.seed + 1, progress=progress, **options))
    images = torch.cat([images for _, images in made]) if made else torch.empty(0, *ema.shape, dtype=torch.uint8)
    return fid.score_glyphs(images, labels[[i for indices, _ in made for i in indices]])


def score(ema: nn.Module, cfg: Config) -> dict:
    """FD-glyphs and class accuracy of cfg.score samples without and (for a flow) with guidance, with their protocol."""
    results = {}
    for name, guidance in (("unguided", 1.0), ("guided", cfg.guidance)):
        options = sampling(cfg, guidance)
        if options["guidance"] != guidance:
            continue
        results[name] = score_samples(ema, cfg, options, f"scoring {name} samples")
        results[name]["protocol"] = protocol(ema, cfg, options)
    return results


def monitor_reference(cfg: Config, source, out: Path, device: torch.device) -> dict:
    """What `fid.evaluate` compares samples of this run with; statistics of the data are made once, before training."""
    if source.shape[0] != 3 and not (cfg.reference and cfg.vae):
        raise ValueError(f"--monitor {cfg.monitor}: samples of latents are decoded by --vae and compared with images: give both "
                         f"it and --reference")
    if cfg.data.split(":")[0] == "glyphs" and not cfg.reference:
        return dict(reference="glyphs", features="glyphs", device=str(device))
    how, stored = dict(weights=cfg.fid_weights, device=str(device), metrics="fid,is"), out / "reference.npz"
    if not cfg.reference and not stored.exists():
        fid.evaluate(cfg.data, size=cfg.size, save_stats=str(stored), **how)
        data.barrier()
    return how | dict(reference=cfg.reference or str(stored))


def monitor(ema: nn.Module, cfg: Config, against: dict, step: int, path: Path, codec: data.VAE | None) -> None:
    """Add a line to scores.jsonl: cfg.monitor unguided samples, under names that tell their number (fid5k)."""
    options = sampling(cfg, 1.0)
    made = sample.generate(ema, sample.labels_for(cfg.monitor, ema.num_classes), cfg.seed + 1, codec=codec, **options)
    found = fid.evaluate((images for _, images in made), **against)
    values = {name: score["value"] for name, score in found.pop("scores").items()}
    if data.rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, **values, **found, "made": protocol(ema, cfg, options)}) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# 3. The loop
# --------------------------------------------------------------------------------------------------------------------


def load_features(cfg: Config, source, mirror: bool, device: torch.device):
    """What tokens are aligned with, (x, draws) -> (B, 1 + N, F) and its `shape`; None where nothing is."""
    role, stored = losses.LOSSES[cfg.loss].features, getattr(source, "features", None)
    if not role or role == "D" and not (cfg.align and (cfg.encoder or stored)):
        return None
    if stored and (cfg.encoder or role == "D" and cfg.augment):
        raise ValueError(f"--encoder {cfg.encoder or '(none)'} --augment {cfg.augment}: {cfg.data} holds features of its images as "
                         f"they are; use neither, or --align 0")
    if stored:
        return data.StoredFeatures(source, mirror)
    if not cfg.encoder or source.shape[0] != 3:
        raise ValueError(f"--loss {cfg.loss} needs a frozen encoder: for images give --encoder FILE.py:NAME; latents need its "
                         f"features beside them, by data.py encode --encoder FILE.py:NAME")
    return data.Encoder(cfg.encoder, source.shape[1], device)


def feature_options(cfg: Config, features) -> dict:
    """Options of a generator whose tokens are aligned, and that in REG denoises the encoder's token of the image as well."""
    if not features or losses.LOSSES[cfg.loss].features != "G":
        return {}
    width = features.shape[1]
    return dict(features=width, align=cfg.align_block) | (dict(token=width) if cfg.loss == "reg" else {})


def build(cfg: Config, source, device: torch.device, features=None) -> model.DiT:
    """The network for this data, freshly initialised or from --init; features: see `load_features`."""
    options = dict(input_size=source.shape[1], channels=source.shape[0], num_classes=source.num_classes)
    options |= losses.LOSSES[cfg.loss].generator(dataclasses.asdict(cfg)) | feature_options(cfg, features)
    options |= dict(predict=cfg.predict) if cfg.predict else {}
    path = sample.find_checkpoint(cfg.out if cfg.resume else cfg.init) if cfg.resume or cfg.init else None
    given = model.load(path) if path else None
    if given:  # a matter of the file that a run starts from: official ones differ in these
        options |= {k: given.config.get(k, v) for k, v in dict(learn_sigma=False, null_class=True, time_scale=1.0).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.fold(cfg.seed, "weights"))
        net = model.create(cfg.model, **options)
    if given and not cfg.resume:
        if given.predict != net.predict:
            raise ValueError(f"--init {path}: predicts {given.predict}, this run {net.predict}: give --predict {given.predict}"
                             f", or a --model that predicts it")
        weights, table = model.tell_times(given, net), "y_embedder.embedding_table.weight"
        if given.num_classes != net.num_classes:
            fid.note(f"--init: {path} knows {given.num_classes} classes, the data has {net.num_classes}: "
                     f"the label embedding starts afresh")
            weights[table] = net.state_dict()[table]
        model.load_weights(net, weights, path)
    use_amp = cfg.amp == "bf16" or (cfg.amp == "auto" and device.type == "cuda")
    net.amp, net.recompute = torch.bfloat16 if use_amp else None, cfg.recompute
    return net.to(device)


def build_discriminator(cfg: Config, net: model.DiT, features=None) -> nn.Module:
    """A discriminator of the generator's size: from its trunk after --init (cafm, afm), from --d_init, or fresh."""
    objective = losses.LOSSES[cfg.loss]
    options = objective.discriminator(dataclasses.asdict(cfg), net.config) | (
        dict(features=features.shape[1]) if features else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.fold(cfg.seed, "weights of D"))
        D = objective.kind(**net.config | options)
    if cfg.d_init and not cfg.resume:
        given = model.discriminator_weights(sample.find_checkpoint(cfg.d_init), turn=cfg.loss == "cafm")
        model.load_weights(D, given, cfg.d_init)
    elif cfg.init and not cfg.resume and objective.kind is model.Discriminator:
        own = D.state_dict()
        trunk = {k: v for k, v in net.state_dict().items() if k in own and not k.startswith("final_layer.")}
        model.load_weights(D, own | trunk, cfg.init)
    if cfg.loss == "cafm" and not (cfg.init or cfg.resume):
        fid.note("cafm without --init trains from scratch, which is slower than post-training a flow: give --init "
                 "RUN_OR_CHECKPOINT to start from one")
    D.amp, D.recompute = net.amp, net.recompute
    return D.to(net.pos_embed.device)


def load_classifier(cfg: Config, net: model.DiT) -> list[nn.Module]:
    """The classifier that guides afm's generator, with its averaged weights, frozen: [] where there is none."""
    if not cfg.classifier:
        return []
    C = model.load(sample.find_checkpoint(cfg.classifier))
    if cfg.loss != "afm" or not isinstance(C, model.Classifier) or (C.shape, C.num_classes) != (net.shape, net.num_classes):
        raise ValueError(f"--classifier {cfg.classifier}: guides --loss afm, and must be a run of --loss classifier on the "
                         f"same data; it is a {type(C).__name__} of {C.num_classes} classes and {C.shape}")
    C.amp = net.amp
    return [C.requires_grad_(False).to(net.pos_embed.device)]


def train(cfg: Config) -> dict:
    """Run the whole training; returns what final.json holds, or {} when a signal stopped it early."""
    device = data.start_processes(cfg.device)
    out = Path(cfg.out)
    check(cfg)
    if cfg.resume and not (out / "last.pt").exists():
        raise FileNotFoundError(f"--resume: there is no {out / 'last.pt'} to go on with")
    if (out / "last.pt").exists() and not cfg.resume:
        raise ValueError(f"{out} already holds a run: go on with it by --resume, or name another folder with --out")
    data.barrier()
    (out / "samples").mkdir(parents=True, exist_ok=True)

    # Data, networks and optimizers: a pair for each role of the objective.
    source = data.dataset(cfg.data, cfg.size or None)
    codec = data.load_vae(cfg.vae).to(device) if cfg.vae else None
    if source.shape[0] == 4 and not codec:
        fid.note("no --vae, so no pictures of samples: give the codec's file to see them")
    mirror = source.mirror if cfg.mirror == "auto" else cfg.mirror == "on"
    objective = losses.LOSSES[cfg.loss]
    features = load_features(cfg, source, mirror, device)
    nets = {"G": build(cfg, source, device, features)}
    if objective.D:
        nets["D"] = build_discriminator(cfg, nets["G"], features)
    ema = copy.deepcopy(nets["G"]).eval().requires_grad_(False)
    sharded = cfg.shard and dist.is_initialized()
    if sharded:
        for name, net in {**nets, "ema": ema}.items():
            shard(net, keep=name == "ema" or (cfg.loss, name, cfg.route) == ("cafm", "D", "reverse"))
    elif cfg.shard:
        fid.note("--shard: one process holds everything; torchrun --nproc_per_node=N train.py .. starts N that share it")
    trained = {role: [p for p in net.parameters() if p.requires_grad] for role, net in nets.items()}
    opts = {role: torch.optim.AdamW(parameters, cfg.lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                    fused=device.type != "mps") for role, parameters in trained.items()}
    start, before = resume(out / "last.pt", cfg, nets, opts, ema) if cfg.resume else (0, 0.0)
    against = monitor_reference(cfg, source, out, device) if cfg.monitor else {}
    if scored(cfg):
        fid.glyph_net()  # trained now rather than after the run, should anything be wrong with its place
    guides = {"G": load_classifier(cfg, nets["G"]), "D": []}
    guides["G"] += [data.Bank(source, cfg.bank, cfg.seed, mirror, device)] if objective.bank else []
    if features:
        guides[objective.features].append(features)
    turns = {role: Loss(getattr(objective, role), torch.compile(net) if cfg.compile else net, cfg,
                        *(other for name, other in nets.items() if name != role), *guides[role])
             for role, net in nets.items()}
    if dist.is_initialized() and not sharded:
        turns = {role: DistributedDataParallel(turn) for role, turn in turns.items()}
    if data.rank() == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        parameters = sum(p.numel() for p in nets["G"].parameters()) / 1e6
        print(f"{cfg.loss} of {cfg.model} ({parameters:.2f}M parameters) on {cfg.data}: {len(source):,} images "
              f"{source.shape}, {source.num_classes} classes, on {device} x {data.world()}; run folder {out}")

    workers = cfg.workers if cfg.workers >= 0 else min(4, os.cpu_count()) if isinstance(source, data.Files) else 0
    stream = data.stream(source, positions_from(start, cfg), cfg.seed, mirror, workers)
    for name in ("log.jsonl", "scores.jsonl"):
        rewind(out / name, start)
    log, line, stopped, began = Log(out / "log.jsonl", objective.alarm), {}, False, time.perf_counter() - before
    with StopSignal() as stop, \
         tqdm(total=cfg.steps, initial=start, desc="training", disable=data.rank() > 0) as bar:
        for step in range(start, cfg.steps):
            now, role = scheduled(cfg, step), objective.turn(step, cfg)
            opt, turn = opts[role], turns[role]
            opt.param_groups[0]["lr"] = learning_rate(step, now, role)
            if back := schedule_entries(cfg.schedule).get(step, {}).get("d_reload"):
                nets["D"].load_state_dict(shares(model.discriminator_weights(out / f"step_{back:07d}.pt"), nets["D"]))
            for name, parameters in trained.items():  # the other network stands still: no gradient for its weights
                for p in parameters:
                    p.requires_grad_(name == role)

            # Gradient of the mean loss over the global batch. Processes exchange gradients in the last backward only.
            values = {}
            for k in range(cfg.accumulation):
                images, labels, positions = next(stream)
                with exchange(turn, now=k + 1 == cfg.accumulation):
                    loss, logs = turn(images.to(device), labels.to(device), positions)
                    (loss / cfg.accumulation).backward()
                for name, value in {"loss": loss, **logs}.items():
                    values[name] = values.get(name, 0.0) + value.detach() / cfg.accumulation
            drop_whole(*nets.values())  # before its shares change
            norm = nn.utils.clip_grad_norm_(trained[role], cfg.clip or math.inf)
            norm = norm.full_tensor() if sharded else norm
            opt.step()
            opt.zero_grad()
            done = step + 1
            if role == "G":
                update_ema(ema, nets["G"], step, now.ema)
            if now.ema_reload and done % now.ema_reload == 0:
                nets["G"].load_state_dict(ema.state_dict())

            # Records. All processes leave together: the one that was asked to stop takes the others along.
            log.note(step, role, {**values, "grad_norm": norm}, opt.param_groups[0]["lr"])
            stopped = stop.on_any_process()
            last = stopped or done == cfg.steps
            keep = cfg.keep_every and done % cfg.keep_every == 0
            save = last or keep or done % cfg.save_every == 0
            show = cfg.sample_every and done % cfg.sample_every == 0
            if done % cfg.log_every == 0 or save or show:
                line = log.flush(cfg) or line
                bar.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{line['images_per_second']:.0f}", refresh=False)
            bar.update()
            if save:
                save_checkpoint(out / "last.pt", done, time.perf_counter() - began, cfg, nets, opts, ema)
            if save and data.rank() == 0:
                draw_loss(out / "log.jsonl", out / "loss.png")
                if keep:
                    shutil.copyfile(out / "last.pt", out / f"step_{done:07d}.pt")
            if show and not stopped:
                with whole(ema):
                    write_grid(ema, cfg, out / "samples" / f"{done:07d}.png", codec)
                    if cfg.monitor:
                        monitor(ema, cfg, against, done, out / "scores.jsonl", codec)
                log.since = time.perf_counter()
            if stopped:
                break
    if stopped:
        if data.rank() == 0:
            print(f"stopped by a signal after step {done}; saved {out / 'last.pt'}. Go on with --resume")
        return {}
    with whole(ema):
        if model.balance_of(nets["G"]) is not None and data.rank() == 0:
            write_routing(ema, source, cfg, out / "routing.json")
        return finish(ema, cfg, out, time.perf_counter() - began, codec)


def write_routing(ema: nn.Module, source, cfg: Config, path: Path, n: int = 64) -> None:
    """routing.json: the experts' shares of the tokens of n images, by time and by position, see `model.routing`."""
    device, draws = ema.pos_embed.device, data.Draws(cfg.seed, range(n))
    items, labels, _ = next(data.stream(source, [list(range(n))], cfg.seed))
    x, e = data.clean(items, draws).to(device), draws.normal("noise", ema.shape).to(device)
    shares = model.routing(ema, x, e, labels.to(device))
    path.write_text(json.dumps({"layers, times, experts": shares["time"].tolist(),
                                "layers, positions, experts": shares["position"].tolist()}) + "\n")


def finish(ema: nn.Module, cfg: Config, out: Path, seconds: float, codec: data.VAE | None) -> dict:
    """The last grid, and final.json with the scores."""
    write_grid(ema, cfg, out / "samples" / "final.png", codec)
    result = {"steps": cfg.steps, "images_seen": cfg.steps * cfg.batch, "training_seconds": round(seconds, 1)}
    if scored(cfg):
        result["scores"] = score(ema, cfg)
    if data.rank() == 0:
        (out / "final.json").write_text(json.dumps(result, indent=2) + "\n")
        for name, s in result.get("scores", {}).items():
            print(f"{name:>9}: FD-glyphs {s['fd_glyphs']:.3f} (floor {s['floor']:.3f}), accuracy {s['accuracy']:.3f}; "
                  f"{s['n']:,} samples against as many held-out images; {s['protocol']}")
        shown = f"samples: {out / 'samples' / 'final.png'}   " if losses.LOSSES[cfg.loss].draws_images else ""
        print(f"{shown}loss: {out / 'loss.png'}   scores: {out / 'final.json'}")
    return result


# --------------------------------------------------------------------------------------------------------------------
# 4. Benchmark: what the fused parts are worth
# --------------------------------------------------------------------------------------------------------------------


def plain_step(net: nn.Module, ema: nn.Module, opt, x: Tensor, y: Tensor, cfg: Config, step: int) -> None:
    """A flow-matching step as one would first write it: math attention, an optimizer and an EMA of Python loops."""
    with sdpa_kernel(SDPBackend.MATH):
        loss, _ = losses.fm(net, x, y, data.Draws(cfg.seed, range(len(x)), x.device), cfg)
        loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), cfg.clip, foreach=False)
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        for averaged, p in zip(ema.parameters(), net.parameters()):
            averaged.mul_(cfg.ema).add_(p, alpha=1 - cfg.ema)


def our_step(net: nn.Module, ema: nn.Module, opt, x: Tensor, y: Tensor, cfg: Config, step: int) -> None:
    """The step of the training loop."""
    losses.fm(net, x, y, data.Draws(cfg.seed, range(len(x)), x.device), cfg)[0].backward()
    nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
    opt.step()
    opt.zero_grad()
    update_ema(ema, net, step, cfg.ema)


def benchmark(cfg: Config, rounds: int = 5) -> None:
    """Print images/s of a training step of two networks, and its ratio to the plain step timed in turn with it."""
    device = data.start_processes(cfg.device)
    print(f"training step, float32, on {device} with {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"median of {rounds} rounds, both in turn")
    print(f"{'model':>8} {'batch':>6} {'tokens':>7} {'images/s':>9} {'plain images/s':>15} {'ratio':>6}  ratios of the rounds")
    on_gpu = device.type == "cuda"
    for name, batch, steps in (("glyph-S", 64, 10), ("SiT-S/2", 64 if on_gpu else 2, 10 if on_gpu else 2)):
        torch.manual_seed(0)
        net = model.create(name).to(device)
        ema = copy.deepcopy(net).requires_grad_(False)
        x, y = torch.rand(batch, *net.shape, device=device) * 2 - 1, torch.arange(batch, device=device) % 10
        run = {our_step: torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True),
               plain_step: torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], foreach=False)}
        times = {step: [] for step in run}
        for _ in range(rounds + 1):
            for step, opt in run.items():
                start = time.perf_counter()
                for k in range(steps):
                    step(net, ema, opt, x, y, cfg, k)
                if on_gpu:
                    torch.cuda.synchronize()
                times[step].append(time.perf_counter() - start)
        ours, plain = (np.array(times[step][1:]) / steps / batch for step in (our_step, plain_step))
        print(f"{name:>8} {batch:>6} {net.pos_embed.shape[1]:>7} {1 / np.median(ours):>9.1f} {1 / np.median(plain):>15.1f} "
              f"{np.median(plain / ours):>6.2f}  {' '.join(f'{r:.2f}' for r in plain / ours)}")


def role_costs(cfg: Config, rounds: int = 5, batch: int = 32) -> None:
    """Print time and peak memory of each role of each objective, up to its gradients, in flow-matching steps."""
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu")
    steps = role_steps(cfg, losses.LOSSES, device, batch)
    print(f"\nloss and gradients of each role on glyph-S, batch {batch}, float32, on {device}: time in flow-matching "
          f"steps,\nmedian of {rounds} rounds in turn, and peak memory")
    times = model.in_turn(steps, rounds, device.type)
    for name, step in steps.items():
        print(f"{name:>16} {times[name] / times['fm G']:>7.2f} x {model.peak_megabytes(step, device.type):>8.0f} MB")


def role_steps(cfg: Config, names, device: torch.device, batch: int) -> dict:
    """{"cafm D reverse": a function that computes this role's loss and gradients, ...} on glyph-S."""
    steps = {}
    for name in names:
        objective = losses.LOSSES[name]
        for route in ("reverse", "forward", "finite") if name == "cafm" else ("",):
            settings = objective.defaults | ({"route": route} if route else {})
            own = dataclasses.replace(cfg, loss=name, init="", d_init="", **settings)
            features = _ones if objective.features == "G" else None  # an encoder that costs nothing
            options = objective.generator(dataclasses.asdict(own)) | feature_options(own, features)
            with contextlib.redirect_stderr(io.StringIO()):  # no advice here
                nets = {"G": model.create("glyph-S", **options).to(device)}
                if objective.D:
                    nets["D"] = build_discriminator(own, nets["G"])
            for role in nets:
                steps[f"{name} {role} {route}".strip()] = _role_step(objective, role, nets, own, batch)
    return steps


def _ones(x: Tensor, draws) -> Tensor:
    return x.new_ones(len(x), *_ones.shape)


_ones.shape = (1 + 16, 768)  # glyph-S has 16 tokens


def _role_step(objective: losses.Objective, role: str, nets: dict, cfg: Config, batch: int):
    x = torch.rand(batch, *nets["G"].shape, device=nets["G"].pos_embed.device) * 2 - 1
    y, draws = torch.arange(batch, device=x.device) % 10, data.Draws(cfg.seed, range(batch), x.device)
    others = [net for name, net in nets.items() if name != role]
    others += [data.Bank(data.dataset("glyphs:4", 32), cfg.bank, cfg.seed, device=x.device)] if objective.bank else []
    others += [_ones] if objective.features == role == "G" else []

    def step():
        for name, net in nets.items():
            net.requires_grad_(name == role).zero_grad()
            net.pos_embed.requires_grad_(False)
        getattr(objective, role)(nets[role], x, y, draws, cfg, *others)[0].backward()

    return step


# --------------------------------------------------------------------------------------------------------------------
# 5. Comparison: many objectives, the same network, images and evaluation
# --------------------------------------------------------------------------------------------------------------------

EVALUATIONS = (1, 2, 4, 50)


def compare(argv: list[str], cfg: Config) -> None:
    """Train and score every objective of --compare; what is done stays in OUT/compare.json and is not done again."""
    names, out = cfg.compare.split(","), Path(cfg.out)
    if unknown := [n for n in names if n not in losses.LOSSES or not losses.LOSSES[n].draws_images]:
        raise ValueError(f"--compare {unknown[0]}: choose from "
                         f"{', '.join(n for n, o in losses.LOSSES.items() if o.draws_images)}")
    known = out / "compare.json"
    table, rows = json.loads(known.read_text()) if known.exists() else {}, []
    for name in names:
        own = data.parse(Config, [*argv, "--loss", name, "--out", str(out / name), "--score", "0"], None,
                         **losses.LOSSES[name].defaults)
        last = out / name / "last.pt"
        if not last.exists() or model.read_checkpoint(last)["step"] < own.steps:
            if not train(dataclasses.replace(own, compare="", resume=last.exists())):
                return  # a signal
        ema = model.load(last).to(data.start_processes(cfg.device))
        for steps in EVALUATIONS:
            options = sampling(dataclasses.replace(own, sample_steps=steps, solver="euler"), 1.0)
            if options["steps"] == steps and str(steps) not in table.setdefault(name, {}):
                table[name][str(steps)] = score_samples(ema, cfg, options, f"{name}, {steps}")
                known.write_text(json.dumps(table, indent=2) + "\n")
            rows.append(_strip(ema, cfg.seed, options) if options["steps"] == steps else None)
    blank = torch.full_like(next(row for row in rows if row is not None), 255)
    captions = [f"{name}, {steps}" for name in names for steps in EVALUATIONS]
    rows = torch.stack([blank if row is None else row for row in rows])
    data.grid(rows, len(EVALUATIONS), captions).save(out / "compare.png")
    print_comparison(names, table, cfg)


def _strip(ema: model.DiT, seed: int, options: dict, n: int = 10) -> torch.Tensor:
    """Samples of the first n labels side by side: uint8 (3, h, n w)."""
    (_, images), = sample.generate(ema, sample.labels_for(n, ema.num_classes), seed, n, **options)
    return torch.cat(list(images), 2)


def print_comparison(names: list[str], table: dict, cfg: Config) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu")
    times = model.in_turn(role_steps(cfg, dict.fromkeys(["fm", *names]), device, cfg.batch), 3, device.type)
    print(f"\n{cfg.steps} steps of {cfg.batch} images, {cfg.score} samples, unguided, EMA: FD-glyphs / accuracy by network "
          f"evaluations; time of a step's loss and gradients (of all its roles) in flow-matching steps")
    print(f"{'objective':>12}" + "".join(f"{steps:>18}" for steps in EVALUATIONS) + f"{'time':>8}")
    for name in names:
        scores = [table[name].get(str(steps)) for steps in EVALUATIONS]
        cost = sum(t for role, t in times.items() if role.split()[0] == name and role.split()[-1] in ("G", "D", "reverse"))
        print(f"{name:>12}" + "".join(f"{s['fd_glyphs']:>11.2f} /{s['accuracy']:>5.3f}" if s else f"{'-':>18}" for s in scores)
              + f"{cost / times['fm G']:>7.2f}x")
    print(f"floor {next(iter(table[names[0]].values()))['floor']:.2f}; wrote {cfg.out}/compare.json and compare.png")


def main(argv: list[str] | None = None) -> None:
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--loss", default="")
    given.add_argument("--preset", default="")
    asked, _ = given.parse_known_args(argv)
    if asked.preset not in ("", *PRESETS):
        raise ValueError(f"--preset {asked.preset}: choose one of {', '.join(PRESETS)}")
    source, preset = PRESETS.get(asked.preset, ("", {}))
    method = losses.LOSSES.get(asked.loss or preset.get("loss", "fm"), losses.LOSSES["fm"])
    cfg = data.parse(Config, argv, __doc__, **method.defaults | preset)
    if source and data.rank() == 0:
        print(f"{cfg.preset}, settings of {source}: {' '.join(f'--{k} {getattr(cfg, k)}' for k in preset)}")
    if cfg.benchmark:
        benchmark(cfg)
        return role_costs(cfg)
    if cfg.compare:
        return compare(sys.argv[1:] if argv is None else argv, cfg)
    if cfg.resume and (Path(cfg.out) / "last.pt").exists():  # go on as the run was; flags given now have the last word
        was = model.read_checkpoint(Path(cfg.out) / "last.pt").get("config", {})
        was = {k: v for k, v in was.items() if hasattr(cfg, k) and k not in ("out", "resume")}
        cfg = data.parse(Config, argv, __doc__, **was)
    try:
        train(cfg)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise ValueError(f"interrupted; {cfg.out}/last.pt, where it is there, goes on with --resume") from None
    data.stop_processes()


if __name__ == "__main__":
    data.run_cli(main)
