"""The blocks of InceptionV3 (extras/inception.py): Szegedy et al., arXiv:1512.00567, Table 1 and Figs. 5-7.

Every convolution is followed by batch normalisation and ReLU. The two flavours differ in three poolings:
the 2015-12-05 graph, that of published FIDs, leaves the zero border out of its averages (torchvision counts
it), and its last block pools by maximum.

    python -m extras.inception_blocks          the blocks of both flavours, with their parameters
"""
import functools
import re
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU; the names are torchvision's."""

    def __init__(self, i: int, o: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the normalisation of eval mode into the convolution: the same function with less work."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        shift = self.bn.bias - self.bn.running_mean * scale
        self.conv.weight.copy_(self.conv.weight * scale.view(-1, 1, 1, 1))
        self.conv.bias, self.bn = nn.Parameter(shift.float(), requires_grad=False), nn.Identity()


class Mixed(nn.Module):
    """A block of parallel branches on one input, "NAME UNIT UNIT .. | NAME ..", concatenated in that order.

    A unit is channels:kernel, padded to keep its size, or channels:kernel/2 of stride 2 without padding; +
    forks. Units are called branchNAME_1, _2, .. (forked: _2a, _2b), or branchNAME alone. The input of
    branch_pool goes through `pool` first.
    """

    def __init__(self, channels: int, branches: str, pool: Callable):
        super().__init__()
        self.pool, self.chains, self.channels = pool, {}, 0
        for branch, *units in map(str.split, branches.split("|")):
            width, self.chains[branch] = channels, []
            for number, unit in enumerate(units, 1):
                name, fork = f"branch{branch}" + f"_{number}" * (len(units) > 1), unit.split("+")
                keys = [name + letter for letter in "ab"] if len(fork) == 2 else [name]
                for key, part in zip(keys, fork):
                    self.add_module(key, unit_of(width, part))
                self.chains[branch].append(keys)
                width = sum(getattr(self, key).conv.out_channels for key in keys)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for branch, chain in self.chains.items():
            h = self.pool(x) if branch == "_pool" else x
            for keys in chain:
                h = torch.cat([getattr(self, key)(h) for key in keys], 1)
            out.append(h)
        return torch.cat(out, 1)


def unit_of(width: int, text: str) -> Conv:
    """"96:3/2" -> 96 channels, kernel 3, stride 2; "192:1x7" -> kernel (1, 7)."""
    channels, *kernel = map(int, re.match(r"(\d+):(\d)(?:x(\d))?", text).groups(default=0))
    kernel = tuple(kernel) if kernel[1] else kernel[0]
    if text.endswith("/2"):
        return Conv(width, channels, kernel, stride=2)
    return Conv(width, channels, kernel, padding="same")


def inception_blocks(flavour: str) -> dict[str, tuple[str, Callable]]:
    """{name: (branches, pool)} in the order of the network; flavour: torchvision or fid."""
    a = "1x1 64:1 | 5x5 48:1 64:5 | 3x3dbl 64:1 96:3 96:3 | _pool {}:1"
    b = "3x3 384:3/2 | 3x3dbl 64:1 96:3 96:3/2 | _pool"
    c = "1x1 192:1 | 7x7 {0}:1 {0}:1x7 192:7x1 | 7x7dbl {0}:1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7 | _pool 192:1"
    d = "3x3 192:1 320:3/2 | 7x7x3 192:1 192:1x7 192:7x1 192:3/2 | _pool"
    e = "1x1 320:1 | 3x3 384:1 384:1x3+384:3x1 | 3x3dbl 448:1 384:3 384:1x3+384:3x1 | _pool 192:1"

    ours = flavour == "torchvision"
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=ours)
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)

    blocks = {f"Mixed_5{k}": (a.format(w), average) for k, w in dict(b=32, c=64, d=64).items()}
    blocks["Mixed_6a"] = b, halve
    blocks |= {f"Mixed_6{k}": (c.format(w), average) for k, w in dict(b=128, c=160, d=160, e=192).items()}
    blocks |= {"Mixed_7a": (d, halve), "Mixed_7b": (e, average)}
    return blocks | {"Mixed_7c": (e, average if ours else maximum)}


def main() -> None:
    for flavour in ("torchvision", "fid"):
        channels = 192
        for name, (branches, pool) in inception_blocks(flavour).items():
            block = Mixed(channels, branches, pool)
            channels, count = block.channels, sum(p.numel() for p in block.parameters())
            print(f"{flavour:12} {name}  {count:9,} parameters, {channels:4} channels   {branches}")


if __name__ == "__main__":
    data.run_cli(main)
