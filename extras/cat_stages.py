"""The stages h_1 .. h_K of CAT's generator: as the discriminator sees them, their loss, logs and a picture.

The objective: cat.py. `python -m extras.cat runs/cat --n 20 --out stages.png` draws the stages of each
sample from left to right; a run's log.jsonl has the numbers of `stage_logs`.
"""
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import sample
from data import option
from extras.augment import augment

# ----------------------------------------------------------------------------------------------------------
# 1. What the losses see
# ----------------------------------------------------------------------------------------------------------


def pyramid(h: Tensor, draws: data.Draws, cfg) -> list[Tensor]:
    """Stages h (K, B, C, h, w) as D sees them, finest first: h_K at full size, h_{K-1} at half of it, ...

    Augmented before that, so that all scales, data and samples have the same shift and hole.
    """
    return [F.avg_pool2d(x, 2 ** k) for k, x in enumerate(augment(h, draws, cfg.augment).flip(0))]


def consistency(h: Tensor, cfg) -> Tensor:
    """L_cons = 1 / (K - 1) sum_{k < K} w_k mean |h_k - h_K|^2 with w_k = 1 / (K - k)   (arXiv:2605.26449).

    Without `cons_detach` the last layer of the first stage has no gradient from it, because h_k - h_K is
    minus what the later ones add; with it that of the last stage has none. cons_space: compare at full
    resolution, or as D sees the stage.
    """
    gaps = h[:-1] - (h[-1].detach() if cfg.cons_detach else h[-1])
    sizes = [2 ** k if cfg.cons_space == "own" else 1 for k in range(len(h) - 1, 0, -1)]
    terms = [F.avg_pool2d(gap, size).square().mean() / (len(gaps) - k)
             for k, (gap, size) in enumerate(zip(gaps, sizes))]
    return torch.stack(terms).mean()


# ----------------------------------------------------------------------------------------------------------
# 2. What is logged
# ----------------------------------------------------------------------------------------------------------


def stage_logs(h: Tensor) -> dict:
    """Numbers of stages h (K, B, C, h, w): their distance to the image, and what the next stage changes.

    discrepancy_k = mean |h_k - h_K|^2 and rewriting_k = mean |h_k - h_{k+1}|^2 for k < K, cosine_k =
    `agreement` for k < K - 1.
    """
    h = h.detach()
    columns = {"discrepancy": (h[:-1] - h[-1]).square().mean((1, 2, 3, 4)),
               "rewriting": h.diff(dim=0).square().mean((1, 2, 3, 4)), "cosine": agreement(h)[:-1]}
    return {f"{name}_{k}": value for name, values in columns.items() for k, value in enumerate(values, 1)}


def agreement(h: Tensor) -> Tensor:
    """Cosine of the update h_{k+1} - h_k and what is still to come, h_K - h_k: (K - 1,), the last one 1."""
    return F.cosine_similarity(h.diff(dim=0).flatten(2), (h[-1] - h[:-1]).flatten(2), dim=2).mean(1)


# ----------------------------------------------------------------------------------------------------------
# 3. A picture of them
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    checkpoint: str = option("runs/cat", "a run of --loss cat")
    n: int = option(20, "samples, one a row")
    seed: int = option(0, "their seed, as that of sample.py")
    weights: str = option("ema", "which weights: ema or last", ("ema", "last"))
    out: str = option("stages.png", "the picture to write")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, "Draw the stages of samples, a row for each.", ("checkpoint",))
    net = sample.load(cfg.checkpoint, cfg, data.start_processes("auto"))
    if not hasattr(net, "stages") or not cfg.out.endswith(".png"):
        raise ValueError(f"{cfg.checkpoint}, --out {cfg.out}: expected a run of --loss cat (this is a "
                         f"{type(net).__name__}) and a .png to write")
    labels = sample.labels_for(cfg.n, net.num_classes)
    e = data.Draws(cfg.seed, range(cfg.n)).normal("sample noise", net.shape).to(net.pos_embed.device)
    h = net.stages(e, labels.to(e.device)).transpose(0, 1)                                   # (n, K, C, h, w)
    captions = [f"{label}: {k}" for label in labels.tolist() for k in range(1, h.shape[1] + 1)]
    data.grid(data.to_uint8(h.flatten(0, 1)).cpu(), h.shape[1], captions).save(cfg.out)
    print(f"wrote {cfg.out}: {cfg.n} samples, their {h.shape[1]} stages from left to right, seed {cfg.seed}")


if __name__ == "__main__":
    data.run_cli(main)
