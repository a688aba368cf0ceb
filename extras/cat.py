"""CAT (arXiv:2605.26449): an adversarial generator in coarse-to-fine stages, judged at as many scales.

    python train.py --loss cat --out runs/cat
    python -m extras.cat runs/cat --n 20 --out stages.png      the stages of each sample, from left to right

Neighbour in the core: afm, a generator of one jump as well. Here the image comes in stages h_1 .. h_K, of
which the discriminator sees each at its own resolution, and a loss of their own holds them together. The
generator starts from a latent instead of an image of noise. The networks are in cat_networks.py.

On glyphs (2 CPU cores, 2026-11-22) the 4,000 steps of the default, half of them of G, give FD-glyphs 58.6,
accuracy 0.987 and recall 0.04 in one step (seed 1: 55.2, 0.961, 0.09), in 860 s on one thread (4,000 steps
of flow matching: 240 s). Within a class samples deviate 0.65 times as much as the data, and their mean
colours 0.87 times: the shapes vary too little. Stages 1 and 2 are 0.041 and 0.015 from the last one in mean
square. Other settings: README.md.

Three things keep it from one picture for each class (deviation 0.04, real 0.32, FD 320 after 3,000 steps
without them): a slow mapping of z (`SlowLinear`), last layers and D's patch embedding a tenth as large at
the start, and a D that learns 2.5 times as fast as G. At equal rates G evades a D that, with G held still,
soon tells its samples apart.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import losses
from data import option
from extras import cat_stages
from extras.augment import check_augment, flag
from extras.cat_networks import scale_discriminator
from extras.cat_stages import consistency, pyramid, stage_logs

# ----------------------------------------------------------------------------------------------------------
# 1. The two players
# ----------------------------------------------------------------------------------------------------------


def cat_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G, encoder=None) -> tuple[Tensor, dict]:
    """CAT's discriminator, one relativistic game a scale   (arXiv:2605.26449; GAT, arXiv:2509.24935):

        mean over scales k of E softplus(f_k - d_k) + gp (R1 + R2),

    d = D(x at all scales), f = D(stages, one a scale).

    R1, R2: see `scale_flatness`. With an encoder D's tokens of real images at the finest scale are aligned
    as in repa, with weight align: the encoder sees what D sees. GAT: D and G see the same batch; here: each
    step has a batch of its own, as for every objective. For latents of photographs a port of the paper has
    gp = 0.5, augment = 1, align = 1 (DINOv2) and one learning rate; gp and the rates here are for short runs
    on glyphs.
    """
    e = draws.normal("noise", x.shape[1:])
    with torch.no_grad():
        h = G.stages(e, y)

    data_scales, fake_scales = pyramid(x.expand(h.shape), draws, cfg), pyramid(h, draws, cfg)

    logs = {}
    if encoder:
        real, tokens = D(data_scales, y, project=True)
        misalignment = data.extra("repa", "--align").misalignment
        logs["misalignment"] = misalignment(tokens, encoder(data_scales[0], draws))
    else:
        real = D(data_scales, y)
    fake = D(fake_scales, y)
    r1 = scale_flatness(D, data_scales, real, y, draws, "R1")
    r2 = scale_flatness(D, fake_scales, fake, y, draws, "R2")
    loss = F.softplus(fake - real).mean() + cfg.gp * (r1 + r2) + cfg.align * logs.get("misalignment", 0)
    return loss, {"real": real.mean(), "fake": fake.mean(), "r1": r1, "r2": r2} | logs


def cat_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D) -> tuple[Tensor, dict]:
    """CAT's generator: mean over scales of E softplus(d_k - f_k) + cons L_cons   (arXiv:2605.26449).

    L_cons: see `consistency`. Logged for every stage: see `stage_logs`.
    """
    e = draws.normal("noise", x.shape[1:])
    h = G.stages(e, y)

    with torch.no_grad():
        real = D(pyramid(x.expand(h.shape), draws, cfg), y)
    fake = D(pyramid(h, draws, cfg), y)

    adversarial, distance = F.softplus(real - fake).mean(), consistency(h, cfg)
    logs = {"adversarial": adversarial, "consistency": distance, **stage_logs(h)}
    return adversarial + cfg.cons * distance, logs


def scale_flatness(D, images: list[Tensor], out: Tensor, y: Tensor, draws, purpose: str,
                   step: float = 0.01) -> Tensor:
    """`losses.flatness` of the sum over scales of D: E (sum_k (D_k(x + step n) - D_k(x)) / step)^2.

    n is noise of its own at every scale, so that the mean is sum_k |grad D_k|^2. It comes after `augment`:
    what is compared has the same shift and hole.
    """
    rows = losses.every_fourth(draws, y.device)
    noisy = []
    for k, x in enumerate(images):
        n = draws.normal(f"{purpose}, scale {k}", x.shape[1:])[rows]
        noisy.append(x[rows] + step * n)
    change = (D(noisy, y[rows]) - out[rows]).sum(1) / step
    return change.square().sum() * 4 / len(y)


# ----------------------------------------------------------------------------------------------------------
# 2. What the loop knows of it
# ----------------------------------------------------------------------------------------------------------


def encoder_of(cfg, source, device="cpu"):
    """What gives the features that D is aligned with (see encoders.py), or None where nothing is aligned."""
    stored = getattr(source, "features", None)
    if not cfg.align or not (cfg.encoder or stored):
        return None
    if stored and cfg.augment:
        raise ValueError(f"--augment {cfg.augment}: {cfg.data} holds features of its images as they are; use "
                         f"--augment 0, or --align 0")
    return data.extra("encoders", "--align").encoder_features(cfg, source, device)


def network(cfg, source) -> dict:
    encoder = encoder_of(cfg, source)
    width = dict(encoder_features=encoder.shape[1]) if encoder else {}
    return dict(parts=["cat_networks.Staged"], stages=cfg.stages) | width


def inputs(role: str, cfg, source, net) -> tuple:
    """D's loss looks at the features of an encoder, where there is one."""
    encoder = encoder_of(cfg, source, next(net.parameters()).device) if role == "D" else None
    return (encoder,) if encoder else ()


def check(cfg) -> None:
    check_augment(cfg)


FLAGS = dict(stages=option(3, "stages of the generator, and scales of the discriminator"),
             cons=option(0.1, "weight of the distance of the stages to the last one"),
             cons_detach=option(False, "the last stage is detached in it"),
             cons_space=option("full", "compare stages at full resolution, or at their own", ("full", "own")),
             gp=option(0.003, "weight of the gradient penalties R1 and R2"),
             encoder=option("", "align D with a frozen encoder, FILE.py:NAME; latents may have features"),
             align=option(1.0, "weight of that alignment"),
             d_lr=option(1e-3, "learning rate of the discriminator; 0: the same"),
             d_init=losses.ADVERSARIAL["d_init"])

losses.register("cat", cat_G, cat_D, turn=lambda step, cfg: "DG"[step % 2],
                alarm=lambda row, first: losses.game_alarm(row, first, indifferent=math.log(2), won=0.05),
                flags=FLAGS | flag(1.0), network=network, inputs=inputs, check=check,
                defaults=dict(beta1=0.0, beta2=0.99, label_drop=0.0, decay="constant", lr=4e-4),
                discriminator=lambda cfg, G: scale_discriminator(G.config),
                sampling=lambda cfg: dict(steps=1, solver="euler", guidance=1.0))


if __name__ == "__main__":
    data.run_cli(cat_stages.main)
