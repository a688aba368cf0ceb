"""Mixture of experts in place of each MLP: DiT-MoE (arXiv:2407.11633).

Of E experts a token uses two, and one more expert is shared by all tokens: more weights at little more cost.
As routing could send all tokens to a few experts, training adds a term to its loss that evens them out.

    python train.py --model MoE-S/2 --data latents --size 0 --predict v --out runs/moe    (8 experts a block)
    python train.py --model MoE-S/2 .. --net 'experts=16 balance=0.02'
    python -m extras.moe runs/moe        routing.json: which experts get the tokens, by time and position

The term is counted over what one process sees at a time, so it changes a little with their number and with
--accumulation. `--init` of a SiT file gives the network all weights but those of the MLPs. Nothing was
trained at this size: not checked yet. `--compile` gave the losses of the plain network to 2e-7 (3 steps of
width 32).
"""
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import model
import sample
from data import option
from extras.checks import run_settings

# ---- 1. The layer ----


class Expert(nn.Module):
    """down (silu(gate x) up x), without biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """DiT-MoE's layer (arXiv:2407.11633): E experts, of which each token uses `used`, and a shared one.

        p = softmax(gate x),   out = shared(x) + sum over the `used` largest p_i of p_i expert_i(x)

    After a call `balance` = sum_i f_i P_i, with P_i the mean of p_i over tokens and f_i E times the share of
    choices that fell on i: 1 for even routing, up to E for one expert alone. `chosen` (B, N, used) says which
    experts each token went to.
    """

    def __init__(self, width: int, hidden: int, experts: int, used: int = 2):
        super().__init__()
        if not 1 <= used <= experts:
            raise ValueError(f"{experts} experts of which a token uses {used}: expected 1 to {experts}")
        self.used, self.balance, self.chosen = used, None, None
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))
        self.shared_experts = Expert(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, E = x.flatten(0, -2), len(self.experts)                                  # (B N, W)
        scores = self.gate(tokens)
        p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)      # (B N, E)
        weight, chosen = p.topk(self.used, -1)                                           # (B N, used)
        share = E * F.one_hot(chosen, E).to(p.dtype).mean((0, 1))
        self.balance = (share * p.mean(0)).sum()
        self.chosen = chosen.view(*x.shape[:-1], self.used)

        out = self.shared_experts(tokens)
        for k, expert in enumerate(self.experts):
            if chosen.is_meta:  # where multiply-adds are counted: an even share
                rows = slot = chosen.new_zeros(chosen.numel() // E)
            else:
                rows, slot = (chosen == k).nonzero(as_tuple=True)
            own = weight[rows, slot, None] * expert(tokens[rows])
            out = out.index_add(0, rows, own.to(out.dtype))
        return out.view_as(x)

    def __getstate__(self) -> dict:
        """What a copy of the layer is made of: not what its last call left, which has a graph."""
        return self.__dict__ | dict(balance=None, chosen=None)


# ---- 2. The part ----


class MoE(model.Part):
    """A DiT of `Experts` in place of MLPs. balance: weight, in the loss, of the term that evens them out."""

    def __init__(self, experts: int = 8, used: int = 2, balance: float = 0.01, **config):
        self.experts, self.used = experts, used
        super().__init__(**config)
        self.config |= dict(experts=experts, used=used, balance=balance)

    def make_block(self) -> nn.Module:
        c, block = self.config, super().make_block()
        block.mlp = Experts(c["width"], int(c["width"] * c["mlp_ratio"]), self.experts, self.used)
        return block

    def penalties(self) -> dict:
        """balance times the sum of the layers' `balance`, of the last call."""
        return {"balance": self.config["balance"] * sum(layer.balance for layer in expert_layers(self))}

    def inherit(self, given: model.DiT, at: float = 1.0) -> dict:
        """From a network without experts: all but the MLPs, which stay as they are."""
        weights = super().inherit(given, at)
        if isinstance(given, MoE):
            return weights
        own = {k: v for k, v in self.state_dict().items() if of_an_mlp(k)}
        return {k: v for k, v in weights.items() if not of_an_mlp(k)} | own


def of_an_mlp(name: str) -> bool:
    return name.startswith("blocks.") and ".mlp." in name  # the time's embedder has a layer of this name too


def expert_layers(net: nn.Module) -> list[Experts]:
    return [layer for layer in net.modules() if isinstance(layer, Experts)]


for size in ("S", "B", "XL"):
    model.ZOO[f"MoE-{size}/2"] = model.ZOO[f"SiT-{size}/2"] | dict(parts=["moe.MoE"])
model.ZOO["MoE-glyph"] = model.ZOO["glyph-S"] | dict(parts=["moe.MoE"])

# ---- 3. Run alone: where tokens go ----


@torch.no_grad()
def routing(net: nn.Module, x: Tensor, e: Tensor, y: Tensor, times: int = 10) -> dict:
    """The experts' shares of the tokens, by time (L, times, E) and by position (L, N, E), for the L layers.

    As DiT-MoE analyses them: routing that follows the position or the class early in the flow, and evens out.
    x (B, C, h, w) clean, e noise, y (B,); times are the middles of equal intervals. Only tokens of the image
    count.
    """
    layers, shares, N = expert_layers(net), [], net.pos_embed.shape[1]
    for k in range(times):
        t = x.new_full((len(x),), (k + 0.5) / times)
        net((1 - t[0]) * x + t[0] * e, t, y)
        chosen = torch.stack([layer.chosen[:, -N:] for layer in layers])                    # (L, B, N, used)
        shares.append(F.one_hot(chosen, len(layers[0].experts)).float().mean((1, 3)))
    shares = torch.stack(shares, 1)                                                      # (L, times, N, E)
    return {"time": shares.mean(2), "position": shares.mean(1)}


@dataclasses.dataclass
class Config:
    run: str = option("", "a run folder, or a checkpoint, of a network with experts")
    n: int = option(64, "training images to look at")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    out: str = option("", "the file to write; empty: routing.json beside the checkpoint")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Write which experts get the tokens of training images.", ("run",))
    if not cfg.run:
        return print(__doc__.strip())
    path, device = sample.find_checkpoint(cfg.run), data.start_processes(cfg.device)
    run = vars(run_settings(path, model.read_checkpoint(path), data=str, size=int, seed=int))
    net = model.load(path).to(device)
    if not expert_layers(net):
        raise ValueError(f"{path}: a network without experts; give a run of --model MoE-S/2 or the like")
    source, draws = data.dataset(run["data"], run["size"] or None), data.Draws(run["seed"], range(cfg.n))
    items, labels, _ = next(data.stream(source, [list(range(cfg.n))], run["seed"]))
    x, e = source.clean(items, draws).to(device), draws.normal("noise", net.shape).to(device)
    shares = routing(net, x, e, labels.to(device))
    out = Path(cfg.out or path.with_name("routing.json"))
    out.write_text(json.dumps({"layers, times, experts": shares["time"].tolist(),
                               "layers, positions, experts": shares["position"].tolist()}) + "\n")
    for k, layer in enumerate(shares["time"].mean(1).tolist()):
        print(f"block {k:>2}: shares of the experts " + " ".join(f"{share:.2f}" for share in layer))
    print(f"wrote {out}: shares of the experts in {cfg.n} images, by time and by position")


if __name__ == "__main__":
    data.run_cli(main)
