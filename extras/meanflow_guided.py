"""MeanFlow with guidance trained into the network, at no cost in sampling (arXiv:2505.13447, App. B.1).

Beside `meanflow` in losses.py the velocity of a sample is replaced by a guided one, made of the network's
own velocities with and without the label. The settings of the paper's XL/2: omega 0.2, kappa 0.92,
guide_until 0.75, which is guidance omega / (1 - kappa) = 2.5 where t is at most 0.75.

    python train.py --loss meanflow_guided --omega 0.8 --kappa 0.4 --init runs/glyphs --out runs/guided
    python -m extras.meanflow_guided          its guidance omega / (1 - kappa) for some settings
"""
import torch
from torch import Tensor

import data
import losses
from data import option
from losses import expand_dims


def guided_velocity(net, v: Tensor, x_t: Tensor, t: Tensor, y: Tensor, cfg) -> Tensor:
    """v_g = omega v + (1 - omega - kappa) u(x_t, t, t, null) + kappa u(x_t, t, t, y),

    for the velocity v of a sample; v itself where t > guide_until, and under the null label. A network
    trained on v_g settles at u_null + w (E v - u_null), w = omega / (1 - kappa): guidance w at no cost in
    sampling.
    """
    if cfg.omega == 1 and cfg.kappa == 0:
        return v
    with torch.no_grad():
        null, own = (net(x_t, t, label, t) for label in (torch.full_like(y, net.num_classes), y))
    guided = cfg.omega * v + (1 - cfg.omega - cfg.kappa) * null + cfg.kappa * own
    return torch.where(expand_dims((t <= cfg.guide_until) & (y != net.num_classes), v), guided, v)


GUIDED = dict(omega=option(1.0, "weight of the sample's velocity in the guided one"),
              kappa=option(0.0, "weight of the network's velocity in it: guidance is omega / (1 - kappa)"),
              guide_until=option(1.0, "guide only where t is at most this (1 is noise)"))

losses.register("meanflow_guided", losses.meanflow, flags=losses.JUMPS | GUIDED, defaults=losses.FROM_FLOW,
                scratch=losses.FROM_SCRATCH,
                check=lambda cfg: check_guided(cfg), sampling=losses.flow_map,
                network=lambda cfg, source: dict(times=2), inputs=lambda *_: (guided_velocity,))


def check_guided(cfg) -> None:
    losses.check_jumps(cfg)
    if not cfg.kappa < 1 or (cfg.omega, cfg.kappa) != (1, 0) and not cfg.label_drop:
        raise ValueError(f"--omega {cfg.omega} --kappa {cfg.kappa} --label_drop {cfg.label_drop}: guidance "
                         "is omega / (1 - kappa) with kappa below 1, and needs a share of dropped labels")


def main() -> None:
    print(f"{'omega':>7}{'kappa':>7}{'guidance':>10}")
    for omega, kappa in ((1.0, 0.0), (1.0, 0.5), (0.8, 0.4), (0.2, 0.92)):
        print(f"{omega:>7}{kappa:>7}{omega / (1 - kappa):>10.2f}")


if __name__ == "__main__":
    data.run_cli(main)
