"""The operators that a network runs, and what forward mode (torch.func.jvp) gets wrong about them.

`model.time_derivative` and extras/cafm_routes.py ask `operators` before they differentiate a network: torch
2.13 takes a custom operator (`torch.library.custom_op`) for a constant under torch.func.jvp, in silence.

    python -m extras.operators CHECKPOINT         the operators of its network, or that error
"""
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import sample

KNOWN = "aten", "prim", "prims", "c10d", "fsdp", "profiler"  # the last two work on weights alone


class Watch(TorchDispatchMode):
    """Notes the names of all operators that run below autograd."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operators(net: nn.Module, *inputs) -> set[str]:
    """The names of a network's operators, found by a pass of one sample the first time.

    ValueError where one is a custom operator, whose tangent would be 0.
    """
    if not hasattr(net, "operators"):
        with Watch() as watch:
            net(*(x if x is None else x[:1] for x in inputs))
        net.operators = watch.seen
    custom = [name for name in sorted(net.operators) if name.split("::")[0] not in KNOWN]
    if custom:
        raise ValueError(f"torch.func.jvp takes the custom operator {custom[0]} for a constant: write it "
                         "with torch's operators or as a torch.autograd.Function with a jvp")
    return net.operators


def main() -> None:
    for path in sys.argv[1:]:
        net = model.load(sample.find_checkpoint(path))
        t, y = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        print(f"{path}: {', '.join(sorted(operators(net, torch.zeros(1, *net.state), t, y)))}")


if __name__ == "__main__":
    data.run_cli(main)
