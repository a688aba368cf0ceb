"""Training: one loop for every objective, on one process or many.

    python train.py                          flow matching on glyphs: minutes on a laptop's CPU
    python train.py --loss cafm --init runs/glyphs --out runs/cafm      --loss NAME --help: its settings
    python train.py --data FOLDER --size 64 --model SiT-S/4 --predict x --out runs/mine
    torchrun --nproc_per_node=2 train.py ..  the same run, shared by two processes
    python train.py .. --resume              go on where a run stopped, bit for bit
"""
import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import data
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

import fid
import losses
import model
import sample
from data import option

# ---- 1. Settings ----


@dataclasses.dataclass(frozen=True)
class Config:
    """What objectives share; `configure` adds their own flags."""
    loss: str = option("fm", f"the objective: {', '.join(losses.LOSSES)}, of extras/, or FILE.py:NAME")
    model: str = option("glyph-S", "a network that python model.py lists")
    net: str = option("", "changes of it, such as 'depth=6 width=192'")
    predict: str = option("", "what the last layer gives; empty: the model's choice", ("", "v", "x"))
    data: str = option("glyphs", "glyphs, a folder of images, an npz, or what extras/ reads")
    size: int = option(0, "crop and scale to so many pixels; 0: the data's, at most 64")
    codec: str = option("", "decodes latents for pictures, as latents:FILE")
    mirror: str = option("auto", "flip images at random; auto: photos, not digits", ("auto", "on", "off"))
    workers: int = option(-1, "processes that read files; -1: up to 4, none for arrays")
    steps: int = option(4000, "optimizer steps")
    batch: int = option(32, "images of a step, over all processes and micro-batches")
    accumulation: int = option(1, "micro-batches of a process in a step")
    lr: float = option(4e-3, "AdamW's learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    decay: str = option("linear", "learning rate after warm-up: to 0, or constant", ("linear", "constant"))
    beta1: float = option(0.9, "AdamW's first beta")
    beta2: float = option(0.999, "AdamW's second beta")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    clip: float = option(1.0, "largest gradient norm; 0: any")
    ema: float = option(0.999, "decay of the averaged weights")
    time: str = option("logit_normal", f"training times: {', '.join(losses.TIMES)}, or of extras/")
    time_mean: float = option(0.8, "logit_normal: mean of logit(t); larger: more weight on high noise")
    time_std: float = option(0.8, "logit_normal: standard deviation of logit(t)")
    label_drop: float = option(0.1, "share of labels dropped, to learn guidance")
    seed: int = option(0, "everything random follows from it")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    amp: str = option("auto", "bfloat16 autocast; auto: on CUDA", ("auto", "bf16", "off"))
    compile: bool = option(False, "torch.compile the network")
    checkpointing: bool = option(False, "activation checkpointing: much less memory, a third more time")
    processes: str = option("replicated", "how processes share networks: replicated (DDP), or of extras/")
    out: str = option("runs/glyphs", "the run folder, or runs/DATA")
    init: str = option("", "start from this checkpoint or run folder (D from its trunk)")
    resume: bool = option(False, "go on with the run in --out")
    log_every: int = option(100, "steps between lines of log.jsonl")
    sample_every: int = option(1000, "steps between sample grids; 0: at the end")
    save_every: int = option(1000, "steps between checkpoints")
    keep_every: int = option(0, "steps between checkpoints kept as step_*.pt; 0: none")
    score: int = option(1000, "samples scored at the end; 0: none")
    sample_steps: int = option(25, "solver steps of grids and scores")
    solver: str = option("ab2", "solver of grids and scores")
    guidance: float = option(1.5, "guidance scale of grids and of the guided score")


@functools.cache
def config_class(loss: str) -> type:
    """`Config` with the objective's own flags."""
    fields = [(name, type(flag.default), flag) for name, flag in losses.find(loss).flags.items()]
    return dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)


def configure(loss: str = "fm", **settings) -> Config:
    """An objective's defaults, changed by `settings`."""
    return config_class(loss)(**usual(loss, settings) | settings | dict(loss=loss))


def usual(loss: str, given: dict) -> dict:
    """Settings in which the objective differs from fm, given these."""
    objective = losses.find(loss)
    start = {} if given.get("init") else objective.scratch or {}
    return objective.defaults | start | objective.variant(given)


def learning_rate(step: int, cfg: Config, role: str = "G") -> float:
    """Linear warm-up, then constant or linear decay to 0 at the last step."""
    decay = 1 - step / cfg.steps if cfg.decay == "linear" else 1.0
    return losses.find(cfg.loss).rate(role, cfg) * min(1.0, (step + 1) / max(1, cfg.warmup)) * decay


def sampling(cfg: Config, guidance: float) -> dict:
    """How grids and scores are sampled; jumps have their own way."""
    flow = dict(steps=cfg.sample_steps, solver=cfg.solver, guidance=guidance)
    return flow | (losses.find(cfg.loss).sampling(cfg) or dict(interval=sample.INTERVAL))


# ---- 2. The loop ----


@data.alone
def train(cfg: Config, until: int = 0) -> dict | None:
    """What final.json holds; {} where the run ended at step `until`, None after a signal."""
    # Data; a network and an optimizer for each role, G and, if adversarial, D.
    device, out, objective = data.start_processes(cfg.device), Path(cfg.out), losses.find(cfg.loss)
    check(cfg)
    (cfg, source), codec = open_data(cfg), data.codec(cfg.codec, device)
    processes = data.lookup(PROCESSES, cfg.processes, "--processes")()
    nets = build_all(cfg, source, device)
    ema = copy.deepcopy(nets["G"]).eval().requires_grad_(False)
    processes.prepare(nets, ema, cfg)
    weights = {role: [p for p in net.parameters() if p.requires_grad] for role, net in nets.items()}
    opts = {role: torch.optim.AdamW(params, cfg.lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                    fused=device.type != "mps") for role, params in weights.items()}
    start, before = resume(cfg, source, nets, opts, ema, processes) if cfg.resume else (0, 0.0)
    turns = {role: processes.wrap(Loss(role, nets, cfg, source)) for role in nets}
    judge = report_start(cfg, source, nets["G"], device)
    log, began = Log(out / "log.jsonl", start, objective.alarm), time.perf_counter() - before
    bar = tqdm(range(start, until or cfg.steps), "training", cfg.steps, initial=start, disable=data.rank())

    with StopSignal(training_stream(start, cfg, source), cfg) as stop:
        for step in bar:
            role = objective.turn(step, cfg)
            opt, turn = opts[role], turns[role]
            opt.param_groups[0]["lr"] = learning_rate(step, cfg, role)
            for p, trains in ((p, name == role) for name, params in weights.items() for p in params):
                p.requires_grad_(trains)  # the other network gets no gradient

            # Gradient of the global batch's mean loss, exchanged in the last backward pass.
            values = {}
            for k, (images, labels, positions) in zip(range(cfg.accumulation), stop.stream):
                with processes.exchange(turn, nets, now=k + 1 == cfg.accumulation):
                    loss, logs = turn(images.to(device), labels.to(device), positions)
                    (loss / cfg.accumulation).backward()
                for name, value in {"loss": loss, **logs}.items():
                    values[name] = values.get(name, 0.0) + value.detach() / cfg.accumulation

            # Update of this network and, after the generator's, of the averaged weights.
            norm = nn.utils.clip_grad_norm_(weights[role], cfg.clip or math.inf)
            opt.step()
            opt.zero_grad()
            if role == "G":
                update_ema(ema, nets["G"], step, cfg.ema)

            # Records. One process that was asked to stop takes the others along.
            done, stopped = step + 1, stop.on_any_process()
            ending = bool(stopped) or done in (until, cfg.steps)
            log.note(step, role, values | {"grad_norm": processes.plain(norm)}, opt.param_groups[0]["lr"])
            save, show, write = due(done, cfg, ending)
            if write:
                log.flush(cfg, bar)  # before anything that is not finite is saved
            if save:
                save_checkpoint(out, done, began, cfg, nets, opts, ema, processes, ending)
            if show and not stopped:
                with processes.unsharded(ema):
                    write_grid(ema, cfg, out / "samples" / f"{done:07d}.png", codec, source)
                log.since = time.perf_counter()
            if stopped:
                return stop.leave(f"after step {done}; saved {out}/last.pt: --resume goes on")
    with processes.unsharded(ema):
        return finish(ema, cfg, began, codec, source, judge) if until in (0, cfg.steps) else {}


class Loss(nn.Module):
    """An objective and the network it trains: DDP wraps both, for the derivatives in a loss."""

    def __init__(self, role: str, nets: dict, cfg: Config, source: data.Dataset):
        super().__init__()
        objective, net = losses.find(cfg.loss), nets[role]
        self.objective, self.cfg, self.clean = getattr(objective, role), cfg, source.clean
        self.net = torch.compile(net) if cfg.compile else net
        others = (other for name, other in nets.items() if name != role)
        self.others = *others, *objective.inputs(role, cfg, source, net)  # a tuple hides them from DDP

    def forward(self, items: Tensor, labels: Tensor, positions: list[int]) -> tuple[Tensor, dict]:
        draws = data.Draws(self.cfg.seed, positions, items.device)
        x = self.clean(items, draws)
        loss, logs = self.objective(self.net, x, labels, draws, self.cfg, *self.others)
        penalties = self.net.penalties() if hasattr(self.net, "penalties") else {}
        return sum(penalties.values(), loss), logs | penalties


class Replicated:
    """Each process holds all; DDP averages gradients."""

    def prepare(self, nets: dict, ema: nn.Module, cfg: Config) -> None:
        """Change networks before they have optimizers."""

    def wrap(self, turn: Loss) -> nn.Module:
        return DistributedDataParallel(turn) if dist.is_initialized() else turn

    def exchange(self, turn: nn.Module, nets: dict, now: bool):
        """A context in which backward exchanges gradients if now."""
        return contextlib.nullcontext() if now or not dist.is_initialized() else turn.no_sync()

    def unsharded(self, net: nn.Module):
        """A context in which a process can call the network alone."""
        return contextlib.nullcontext()

    # Tensors: whole on process 0, for a checkpoint; a number, on all; this process's share.
    gather = plain = staticmethod(lambda x: x)
    scatter = staticmethod(lambda x, own: x)


PROCESSES = {"replicated": Replicated}


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) net, with a smaller d in the first steps."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def micro_batch(cfg: Config) -> int:
    """Images of one forward pass on one process."""
    parts = data.world() * cfg.accumulation
    if min(cfg.batch, parts) < 1 or cfg.batch % parts:
        raise ValueError(f"--batch {cfg.batch} is no multiple of {data.world()} processes x --accumulation "
                         f"{cfg.accumulation}: use a multiple of {parts}")
    return cfg.batch // parts


def positions_from(step: int, cfg: Config):
    """The positions in this process's micro-batches from `step` on."""
    size = micro_batch(cfg)
    for start in range(step * cfg.batch + data.rank() * size, cfg.steps * cfg.batch, data.world() * size):
        yield list(range(start, start + size))


def open_data(cfg: Config) -> tuple[Config, data.Dataset]:
    """Settings with --size, else the data's in whole patches; the data."""
    source = data.dataset(cfg.data, cfg.size or None)
    if cfg.size or source.shape[0] != 3:
        return cfg, source
    (h, w), patch = source.shape[1:], data.lookup(model.ZOO, cfg.model, "model").get("patch", 2)
    size = -(-min(h, w, 64) // patch) * patch
    if {h, w} != {size}:
        data.note(f"images of {w} x {h} pixels taken at {size} x {size}, in patches of {patch}")
    return dataclasses.replace(cfg, size=size), data.dataset(cfg.data, size)


def training_stream(step: int, cfg: Config, source: data.Dataset):
    """This process's batches from `step` on: (items, labels, positions)."""
    mirror = source.mirror if cfg.mirror == "auto" else cfg.mirror == "on"
    return data.stream(source, positions_from(step, cfg), cfg.seed, mirror, cfg.workers)


# ---- 3. Networks, fresh or from a checkpoint ----


def build_all(cfg: Config, source: data.Dataset, device: torch.device) -> dict:
    """{"G": generator, "D": discriminator}, fresh or from --init; D from --d_init where given."""
    given = model.load(sample.find_checkpoint(cfg.init)) if cfg.init and not cfg.resume else None
    nets = {"G": build(cfg, source, given)}
    if losses.find(cfg.loss).D:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.fold(cfg.seed, "weights of D"))
            nets["D"] = D = losses.find(cfg.loss).discriminator(cfg, nets["G"])
        if getattr(cfg, "d_init", "") and not cfg.resume:
            weights = model.discriminator_weights(sample.find_checkpoint(cfg.d_init), cfg.loss)
            model.load_weights(D, weights, cfg.d_init)
        elif given and isinstance(D, model.Discriminator):
            inherit(D.trunk, given, cfg, at=0.0, partly=True)
    use_amp = cfg.amp == "bf16" or cfg.amp == "auto" and device.type == "cuda"
    for part in nn.ModuleDict(nets).to(device).modules():
        if isinstance(part, model.DiT):
            part.amp, part.checkpointing = torch.bfloat16 if use_amp else None, cfg.checkpointing
    return nets


def build(cfg: Config, source: data.Dataset, given: model.DiT | None = None) -> model.DiT:
    """The generator: fresh, from `given`, or as the checkpoint of the run that is resumed has it."""
    if cfg.resume:
        return model.build(model.read_checkpoint(Path(cfg.out) / "last.pt")["networks"]["G"]["config"])

    # Options: of the data, the objective, the given network, and --net.
    options = dict(input_size=source.shape[1], channels=source.shape[0], num_classes=source.num_classes)
    options |= losses.find(cfg.loss).network(cfg, source)
    options |= dict(predict=cfg.predict) if cfg.predict else {}
    if given:
        parts = [name for name in given.config["parts"] if model.part(name).inherited]
        options["parts"] = [*parts, *options.get("parts", [])]
        inherited = {name for kind in type(given).__mro__ for name in getattr(kind, "inherited", ())}
        options |= {name: given.config[name] for name in inherited}
    try:
        changes = dict(pair.split("=") for pair in cfg.net.split())
        options |= {name: ast.literal_eval(value) for name, value in changes.items()}
        options["parts"] = [*options.get("parts", [])]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"--net {cfg.net}: expected something like 'depth=6 width=192'") from None

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.fold(cfg.seed, "weights"))
        net = model.create(cfg.model, **options)
    if given:
        check_given(given, net, cfg)
        inherit(net, given, cfg)
    return net


def inherit(net: model.DiT, given: model.DiT, cfg: Config, at: float = 1.0, partly: bool = False) -> None:
    """Start from --init's weights; `at`: see `DiT.inherit`."""
    weights, own, table = net.inherit(given, at), net.state_dict(), "y_embedder.embedding_table.weight"
    if given.num_classes != net.num_classes:
        weights[table] = own[table]
    if partly:
        weights = own | {k: v for k, v in weights.items() if k in own}
    model.load_weights(net, weights, cfg.init)


def save_checkpoint(out, step: int, began: float, cfg, nets, opts, ema, processes, ending: bool) -> None:
    """Write all that a resumed run needs, to last.pt at the end, else to next.pt until it is confirmed."""
    networks = {role: {"config": net.config, "weights": net.state_dict(),
                       "optimizer": opts[role].state_dict()} for role, net in nets.items()}
    content = dict(step=step, seconds=time.perf_counter() - began, config=dataclasses.asdict(cfg),
                   ema=ema.state_dict(), sampling=losses.find(cfg.loss).sampling(cfg), networks=networks)
    content = tree_map(processes.gather, content)
    if data.rank() > 0:
        return
    if checks := data.optional("checks"):
        checks.check_finite(content, step)
    path = out / ("last.pt" if ending else "next.pt")
    model.write_checkpoint(content, path)
    if curves := data.optional("curves"):
        curves.draw_loss(out / "log.jsonl", out / "loss.png")
    if cfg.keep_every and step % cfg.keep_every == 0:
        with data.replacing(out / f"step_{step:07d}.pt") as aside:
            shutil.copyfile(path, aside)


def resume(cfg: Config, source: data.Dataset, nets, opts, ema, processes) -> tuple[int, float]:
    """(step, seconds so far) of last.pt, loaded into networks, optimizers and EMA."""
    content = model.read_checkpoint(path := Path(cfg.out) / "last.pt")
    check_resume(path, content, cfg, source)

    model.load_weights(ema, content["ema"], path, processes.scatter)
    for role, saved in content["networks"].items():
        model.load_weights(nets[role], saved["weights"], path, processes.scatter)
        own, params = opts[role].state_dict(), opts[role].param_groups[0]["params"]
        if checks := data.optional("checks"):
            checks.check_moments(saved.get("optimizer"), params, path)
        own["state"] = {i: {k: processes.scatter(v.clone(), p) if v.dim() else v for k, v in s.items()}
                        for (i, s), p in zip(saved["optimizer"]["state"].items(), params)}
        opts[role].load_state_dict(own)
    return content["step"], content["seconds"]


# ---- 4. Records: log, pictures, scores ----


def due(done: int, cfg: Config, ending: bool) -> tuple[bool, bool, bool]:
    """Whether to save a checkpoint, show samples and write to the log after step `done`."""
    log_every = cfg.log_every if cfg.steps >= cfg.log_every else max(1, cfg.steps // 20)
    periods = cfg.save_every, cfg.keep_every, cfg.sample_every, log_every
    save, keep, show, write = (period != 0 and done % period == 0 for period in periods)
    save = save or keep or ending
    return save, show, write or save or show


class Log:
    """Collects the numbers of each step on the device, which is waited for now and then."""

    def __init__(self, path: Path, start: int, alarm=lambda row, first: ""):
        self.path, self.pending, self.since = path, [], time.perf_counter()
        self.alarm, self.told = alarm, set()
        rows = [row for row in read_log(path) if row["step"] <= start]
        self.first = {row["role"]: row for row in reversed(rows)}
        if path.exists() and data.rank() == 0:  # lines after the checkpoint come again
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def note(self, step: int, role: str, values: dict, lr: float) -> None:
        confirm(self.path.parent, step, role, values)
        self.pending.append((step, role, {k: v.detach().float() for k, v in values.items()}, lr))

    def flush(self, cfg: Config, bar: tqdm) -> None:
        """Write a line of means for each role."""
        joined = torch.stack([v for _, _, values, _ in self.pending for v in values.values()]).cpu()
        if dist.is_initialized():
            dist.all_reduce(joined)
            joined /= data.world()
        numbers, rows = iter(joined.tolist()), {}
        for step, role, values, lr in self.pending:
            row = {name: next(numbers) for name in values}
            check_finite(row, step, role)
            rows.setdefault(role, []).append(row | {"lr": lr})
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        speed = round(len(self.pending) * cfg.batch / seconds, 1)
        self.pending = []
        for role, own in rows.items():
            means = {k: sum(row[k] for row in own) / len(own) for k in own[0]} | {"lr": own[-1]["lr"]}
            rows[role] = {"step": step + 1, "role": role, **means, "images_per_second": speed}
        if data.rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows.values())
        for role, row in rows.items():
            wrong = self.alarm(row, self.first.setdefault(role, row))
            if wrong and wrong not in self.told:  # once
                data.note(f"step {step + 1}: {wrong} (loss {row['loss']:.3f})")
                self.told.add(wrong)
        bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{speed:.0f}", refresh=False)


def write_grid(ema: nn.Module, cfg: Config, path: Path, codec, source: data.Dataset) -> None:
    """A guided grid of fixed noise: a column for each of up to ten classes, or ten of one."""
    if not losses.find(cfg.loss).draws_images or ema.shape[0] != 3 and codec is None:
        return
    shown = min(10, ema.num_classes)
    columns = shown if shown > 1 else 10
    labels = sample.labels_for(4 * columns, shown)
    options = sampling(cfg, cfg.guidance if ema.null_class else 1.0)
    fake = list(sample.generate(ema, labels, cfg.seed, len(labels), codec=codec, **options))
    if losses.find(cfg.loss).D and source.shape[0] == 3 and (notes := data.optional("notes")):
        notes.warn_of_sameness(fake, labels, source)
    sample.write_samples(fake, labels, sample.image_shape(ema, codec), path, columns)


def score_samples(ema: nn.Module, cfg: Config, judge, options: dict, progress: str, metrics="") -> dict:
    """`fid.score` of cfg.score samples, made by these options, and the protocol."""
    labels = sample.labels_for(cfg.score, ema.num_classes)
    fake = sample.generate(ema, labels, cfg.seed + 1, **options)
    batches = ((own, images, labels[own]) for own, images in fake)
    gen = fid.ImageSet(progress, cfg.score, list(ema.shape[1:]), batches, labels)
    scores = fid.score(judge, gen, metrics)
    how = sample.describe(conditioned=ema.guidance_conditioned, **options)
    return scores | dict(protocol=f"{how}, EMA weights, labels in turn, seed {cfg.seed + 1}, network in "
                                  f"{'bfloat16' if ema.amp else 'float32'}; {judge.label}")


def say(text: str) -> None:
    if data.rank() == 0:
        print(text)


def report_start(cfg: Config, source: data.Dataset, net: nn.Module, device: torch.device):
    """Write config.json, say what is trained; the classifier that scores."""
    if notes := data.optional("notes"):
        notes.warn_of_start(cfg, source)
    if data.rank() == 0:
        Path(cfg.out, "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    size = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{cfg.loss} of {cfg.model} ({size:.2f}M parameters) on {cfg.data}: {len(source):,} images "
        f"{tuple(source.shape)}, {source.num_classes} classes, on {device} x {data.world()}, into {cfg.out}")
    if cfg.score > 0 and losses.find(cfg.loss).draws_images:
        if cfg.data.split(":")[0] == "glyphs":
            return fid.glyph_net()
        return (small := data.optional("small")) and small.judge(cfg.data, source)


def finish(ema: nn.Module, cfg: Config, began: float, codec, source, judge) -> dict:
    """The last grid and final.json: scores without and, for a flow, with guidance."""
    out, seconds = Path(cfg.out), round(time.perf_counter() - began, 1)
    write_grid(ema, cfg, out / "samples" / "final.png", codec, source)
    result = dict(steps=cfg.steps, images_seen=cfg.steps * cfg.batch, training_seconds=seconds)
    for name, guidance in ("unguided", 1.0), ("guided", cfg.guidance):
        options = sampling(cfg, guidance)
        if judge and options["guidance"] == guidance:
            s = score_samples(ema, cfg, judge, options, f"scoring {name} samples")
            result.setdefault("scores", {})[name] = s
            fd = next(iter(s))
            say(f"{name:>9}: {fd} {s[fd]:.3f} (floor {s['floor']:.3f}), accuracy "
                f"{s['accuracy']:.3f}; {s['n']:,} samples against as many held-out images; {s['protocol']}")
    if data.rank() == 0:
        (out / "final.json").write_text(json.dumps(result, indent=2) + "\n")
    say(f"wrote samples/ and final.json in {out}")
    return result


# ---- 5. The command line ----


def read_settings(argv: list[str] | None, **defaults) -> Config:
    """The settings of a command line; with --resume, the run's, changed by flags given now."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in dict(loss="", init="", data="", nfe="", out=defaults.get("out", "")).items():
        given.add_argument(f"--{name}", default=default)
    given.add_argument("--resume", action="store_true")
    asked, _ = given.parse_known_args(argv)
    asked.out = asked.out or f"runs/{Path(asked.data or Config.data).stem}"
    last = Path(asked.out) / "last.pt"
    was = model.read_checkpoint(last).get("config", {}) if asked.resume and last.exists() else {}
    was, code = without_code(was, asked, last)
    loss = asked.loss or was.get("loss") or defaults.get("loss", "fm")
    objective, kind = losses.find(loss), config_class(loss)
    named = was | {k: v for k, v in vars(asked).items() if v} | dict(loss=loss)
    known = usual(loss, named) | defaults | {k: v for k, v in named.items() if hasattr(kind, k)}
    takers = getattr(data.optional("notes"), "takers", lambda flag: "")
    cfg = data.parse(kind, argv, __doc__, own=tuple(objective.flags), elsewhere=takers, **known)
    return check_code(cfg, code, last)


def main(argv: list[str] | None = None, **defaults) -> None:
    cfg = read_settings(argv, **defaults)
    try:
        train(cfg)
    except KeyboardInterrupt:
        raise ValueError(f"interrupted; --resume goes on from {cfg.out}/last.pt, if any") from None
    data.stop_processes()


# ---- 6. Guards: signals, and settings and runs that are refused ----


class StopSignal:
    """SIGTERM, SIGHUP, Ctrl-C or unreadable data: finish the step, save, leave; Ctrl-C 2 s later: end."""
    asked, failed, stopped = 0.0, None, 0

    def __init__(self, stream=(), cfg: Config | None = None):
        self.stream = getattr(data.optional("faults"), "ahead", lambda stream, *_: stream)(stream, cfg, self)

    def __enter__(self):
        no_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[:2 if no_hangup else 3]
        self.before = {s: signal.signal(s, self.note) for s in numbers}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if self.stream:
            self.stream.close()  # with the workers that read ahead

    def note(self, number, _frame):
        self.asked = self.asked or time.monotonic()
        if number == signal.SIGINT and time.monotonic() > self.asked + 2:  # sooner: torchrun's copy
            raise KeyboardInterrupt

    def on_any_process(self) -> int:
        """0, 1 where any process was asked to stop, or 2 where one has no data."""
        asked = torch.tensor(2 if self.failed else int(self.asked > 0))
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.stopped = int(asked)
        return self.stopped

    def leave(self, where: str) -> None:
        if self.failed:
            raise ValueError(f"{self.failed} ({where})")
        if self.stopped == 2:
            raise ConnectionError("another process has no data")
        say(f"stopped by a signal {where}")


def confirm(out: Path, step: int, role: str, values: dict) -> None:
    """next.pt becomes last.pt when the loss after it is finite."""
    if data.rank() == 0 and (out / "next.pt").exists():
        check_finite({name: float(value) for name, value in values.items()}, step, role)
        os.replace(out / "next.pt", out / "last.pt")


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl."""
    return [row for row in data.read_rows(path)
            if type(row.get("role")) is str and type(row.get("loss")) is float and math.isfinite(row["loss"])]


def check_finite(row: dict, step: int, role: str) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise ValueError(f"step {step}, network {role}: {name} is {value}; last.pt, if any, is "
                             "older and sound: --resume with a lower --lr or --clip")


def check(cfg: Config) -> None:
    """ValueError for settings that cannot work; else the run folder is made."""
    micro_batch(data.checked(cfg))
    losses.find(cfg.loss).check(cfg)
    if cfg.data in ("glyphs:1", "glyphs:2", "glyphs:3"):
        raise ValueError(f"--data {cfg.data}: held out to score with; use glyphs, or glyphs:4 and on")
    out, last = Path(cfg.out), Path(cfg.out) / "last.pt"
    if cfg.resume and not last.exists():
        raise FileNotFoundError(f"--resume: there is no {last} to go on with")
    if last.exists() and not cfg.resume:
        raise ValueError(f"{out} holds a run already: give --resume to go on, or another --out")
    data.barrier()
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for left in [*out.glob(".[0-9]*"), *out.glob("samples/.[0-9]*"), out / "next.pt"] * (data.rank() == 0):
        left.unlink(missing_ok=True)  # by a process that was killed


def without_code(was: dict, asked, path) -> tuple[dict, dict]:
    """A checkpoint's settings that name no code, and those that do: the user names these again."""
    again = "loss" if asked.loss else ""
    code = {k: v for k, v in was.items() if k != again and (k == "encoder" or ".py" in str(v))}
    check_code(asked, code, path)
    return {name: value for name, value in was.items() if name not in code}, code


def check_code(cfg, code: dict, path):
    for name, value in [pair for pair in code.items() if getattr(cfg, *pair) != pair[1]]:
        raise ValueError(f"{path}: give again the --{name} {value} that it was trained with")
    return cfg


def check_given(given: model.DiT, net: model.DiT, cfg: Config) -> None:
    if given.predict != net.predict:
        raise ValueError(f"--init {cfg.init}: predicts {given.predict}, this run {net.predict}: give "
                         f"--predict {given.predict}, or a --model that predicts it")
    if given.num_classes != net.num_classes:
        data.note(f"--init knows {given.num_classes} classes, not {net.num_classes}: new label embedding")


def check_resume(path: Path, content: dict, cfg: Config, source: data.Dataset) -> None:
    """ValueError where a checkpoint is not of this run; a note of changed settings."""
    objective = losses.find(cfg.loss)
    roles = {"G", "D"} if objective.D else {"G"}
    if not {"step", "seconds", "config", "networks"} <= {*content} or {*content["networks"]} != roles:
        raise ValueError(f"{path}: not a checkpoint of --loss {cfg.loss} to go on with: use --init {path}")
    for name, old in content["config"].items():
        new = getattr(cfg, name, None)
        if new == old or name in ("resume", "out"):
            continue
        fixed = name in ("loss", "model", "net", "predict", "data", "size", "init", "d_init")
        if name in objective.flags:  # where the network or its sampling changes
            was = dataclasses.replace(cfg, **{name: old})
            fixed = objective.network(was, source) != objective.network(cfg, source)
            fixed = fixed or objective.sampling(was) != objective.sampling(cfg)
        if fixed:
            raise ValueError(f"{path}: was trained with --{name} {old}, not {new}: resume with {old}, or "
                             f"start a new run with --init {path}")
        data.note(f"resuming with --{name} {new} (was {old})")
    if content["step"] > cfg.steps:
        raise ValueError(f"{path}: step {content['step']} is beyond --steps {cfg.steps}; give more")


if __name__ == "__main__":
    data.run_cli(main)
