"""Processes that share one copy of weights, gradients, AdamW's moments and EMA, rather than hold one each.

    torchrun --nproc_per_node=8 train.py --processes shard ..

This is FSDP2. The core's way, `replicated`, needs 20 bytes a parameter on each process: of SiT-XL/2 13.5 GB
(computed). Here 1.7 GB of that stay on each of eight. A block is brought together while it works; unsharded
are the EMA while it is sampled from, cafm's discriminator and accumulated gradients until a step's end, and
every network when a run starts.

Losses and checkpoints are the same: a run goes on with `--resume --processes replicated`, or the other way
round. Two processes give the losses of one to 1e-6 (logs are float32), weights, averages and optimizers to
2e-11 in float64 (gloo, 2 CPU cores, 2026-11-21). On several GPUs: not checked yet.
"""
import contextlib
import dataclasses
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import data
import model
import train

# A loss on derivatives goes backwards through a block twice, and FSDP brings it back once: this network stays
# unsharded from its first call in a step to the step's end.
TWICE_BACKWARD = {"cafm": "D"}


class Sharded(train.Replicated):
    """Each process holds 1 / world of every tensor."""

    def prepare(self, nets: dict, ema: nn.Module, cfg: train.Config) -> None:
        if not dist.is_initialized():
            return data.note("--processes shard: one process holds everything; torchrun --nproc_per_node=N "
                             "train.py .. starts N that share it")
        for role, net in nets.items():
            shard(net, keep=TWICE_BACKWARD.get(cfg.loss) == role)
        shard(ema, keep=True)  # `unsharded` brings all of it together

    def wrap(self, turn: train.Loss) -> nn.Module:
        return turn

    @contextlib.contextmanager
    def exchange(self, turn: nn.Module, nets: dict, now: bool):
        for part in sharded_parts(turn):
            part.set_requires_gradient_sync(now, recurse=False)
        yield
        if now:
            reshard(*nets.values())  # before the optimizer changes the shards

    @contextlib.contextmanager
    def unsharded(self, net: nn.Module):
        """A context in which all of the network is on every process, so that none waits for another's call.

        (Processes sample unequal numbers of batches.) For networks that `keep`.
        """
        for part in sharded_parts(net):
            part.unshard()
        yield
        reshard(net)

    def gather(self, x):
        if not isinstance(x, DTensor):
            return x
        full = x.full_tensor()
        return full.cpu() if data.rank() == 0 else None  # memory: the others need nothing

    def scatter(self, x: Tensor, own: Tensor) -> Tensor:
        if not isinstance(own, DTensor):
            return x
        return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None)

    def plain(self, x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x


def shard(net: nn.Module, keep: bool) -> None:
    """Leave each process 1 / world of every parameter: FSDP brings a block's together when it is called.

    keep: it drops them at `reshard`, and not before.
    """
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # no objective changes an output in place
    blocks = [part for part in net.modules() if isinstance(part, model.Block)]
    for part in (*blocks, net):  # the last, the root, has what is in no block
        fully_shard(part, reshard_after_forward=not keep)
    net.set_reshard_after_backward(not keep)
    for kind in type(net).__mro__:
        for name in vars(kind).get("entrances", ()):  # methods beside forward that use weights
            register_fsdp_forward_method(net, name)


def sharded_parts(*nets: nn.Module) -> list:
    """Blocks and roots that FSDP has spread over processes: none where there is one process."""
    return [part for net in nets for part in net.modules() if isinstance(part, FSDPModule)]


def reshard(*nets: nn.Module) -> None:
    """Of sharded networks keep this process's shard alone."""
    for part in sharded_parts(*nets):
        part.reshard()


train.PROCESSES["shard"] = Sharded


@dataclasses.dataclass
class Config:
    model: str = data.option("SiT-XL/2", "a network of the zoo")


def main(argv: list[str] | None = None) -> None:
    """What weights, gradients, moments and EMA of a network need on each of several processes, computed."""
    cfg = data.parse(Config, argv, main.__doc__, ("model",))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model.create(cfg.model).parameters())
    print(f"{cfg.model}, GB on each process: 5 float32 numbers a parameter of G, 4 of a D of its size")
    for world in (1, 2, 4, 8):
        flow, both = (4 * numbers * parameters / 1e9 / world for numbers in (5, 9))
        print(f"  {world} processes: fm {flow:5.1f}, adversarial {both:5.1f}")


if __name__ == "__main__":
    data.run_cli(main)
