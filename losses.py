"""Training objectives, side by side.

    name        the network gives        what the loss asks for          extra calls       derivatives      paper, arXiv
    fm          velocity v(x_t, t)       v = e - x on average            none              none             2210.02747,
                                                                                                            2401.08740
    pafm        velocity v(x_t, t)       v averaged over images that     none              none             2605.00825
                                         may have become x_t
    carflow     v of images and noise    v = e - x, where learned        none              none             2509.19300
                that classes moved       shifts have moved x_t
    repa        velocity v(x_t, t)       v = e - x; tokens inside look     none              none             2410.06940
                                         like a frozen encoder's
    reg         v of an image and of     the same; v of both             none              none             2507.01467
                an encoder's token of it
    meanflow    jump u: x_r = x_t -      u = v - (t - r) du/dt           none              u's along v      2505.13447
                (t - r) u(x_t, t, r)
    imf         the same, and v          u + (t - r) du/dt = v           one, for v        u's along its v  2512.02012
    soflow      jump u                   x_r is that from just ahead     one, for jumps    none             2512.15657
    shortcut    jump u                   x_r is that of two half jumps   two, for jumps    none             2410.12557
    ect         jump u to data, r = 0    x_0 is that from just ahead     one               none             2406.14548
    scm         jump u to data, r = 0    u = v - t du/dt, normalised     none              u's along v      2410.11081
    cafm        velocity v(x_t, t)       D's derivatives along v and     G; D and its      D's: one (G),    2604.11521
                                         e - x look alike                input gradient    two (D)
    afm         jump u: x_r = x_s -      D's values at x_r and at data   G, 2.5 times D    none             2511.22475
                (s - r) u(x_s, s, r)     look alike, on the shortest way
    cat         images h_1 .. h_K of a   D's values at every scale of h  G, 2.5 times D    none             2605.26449
                latent, coarse to fine   and of data look alike, and
                                         h_k is like h_K
    classifier  log p(y | x_t)           the label of x; guides afm      none              none             2511.22475

The tests of each are test_losses_NAME_* in test_all.py.

Time runs from data (t = 0) to noise (t = 1): x_t = (1 - t) x + t e with e ~ N(0, I), and v = dx_t/dt = e - x.

Every objective has the signature

    objective(net, x, y, draws, cfg) -> (loss, logs)

    net    velocity network (x_t, t, y) -> v, or with jumps (x_t, t, y, r) -> u; `predict`, `t_min`, `num_classes`,
           `null_class`, `guided` and `head` as in model.DiT
    x, y   clean images (B, C, h, w) float in [-1, 1] (or latents), and labels (B,) int64
    draws  data.Draws of this micro-batch: all randomness comes from here
    cfg    train.Config
    loss   scalar float32 tensor;  logs: dict of scalar tensors worth a column of log.jsonl

and the same four paragraphs: times, point, target, distance. Reading two neighbours shows what differs between papers.
An adversarial method is a pair of them, method_D(D, x, y, draws, cfg, G) and method_G(G, x, y, draws, cfg, D): the first
network is the one that the loss trains, and the other comes last.

Run alone, `python losses.py` trains each objective on a 1-D mixture whose velocity and flow map are known in closed
form: it prints the errors and draws the learned trajectories over the density in losses.png.
"""
import copy
import dataclasses
import functools
import math
import typing

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import model
from data import option

# --------------------------------------------------------------------------------------------------------------------
# 1. Shared pieces
# --------------------------------------------------------------------------------------------------------------------


def sample_times(draws: data.Draws, cfg, purpose: str = "time") -> Tensor:
    """Training times (B,) float32: uniform on [0, 1), or logit-normal, sigmoid(time_mean + time_std n), n ~ N(0, 1).

    (SD3, arXiv:2403.03206, Eq. 19.) A larger time_mean looks more at noise. JiT's P_mean = -0.8 is +0.8 here, as its
    time runs from noise to data. With a curriculum only times from `least_time` on.
    """
    u, least = draws.uniform(purpose), least_time(draws, cfg)
    if cfg.time == "uniform":
        return least + (1 - least) * u
    if least:  # by the upper tail, which may be tiny
        above = 0.5 * math.erfc((math.log(least / (1 - least)) - cfg.time_mean) / (cfg.time_std * math.sqrt(2)))
        return torch.sigmoid(cfg.time_mean - cfg.time_std * torch.special.ndtri(above * (1 - u.double()))).to(u)
    n = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)
    return torch.sigmoid(cfg.time_mean + cfg.time_std * n)


def least_time(draws: data.Draws, cfg, stages: int = 20, reach: float = 6.0) -> float:
    """Easy first, the noisiest times (arXiv:2403.10348): the smallest time of this stage, 0 when all have passed.

    The stages divide logit(t) in [-6, 6], half the log-SNR with its sign turned, evenly. paper: a stage ends when the
    loss has not fallen for some steps; here: after cfg.curriculum steps, so that a step depends on its number only.
    """
    stage = draws.positions[0] // cfg.batch // cfg.curriculum + 1 if cfg.curriculum else stages
    return 0.0 if stage >= stages else 1 / (1 + math.exp(2 * reach * stage / stages - reach))


def interpolate(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e, for t (B,)."""
    return (1 - beside(t, x)) * x + beside(t, x) * e


def beside(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, .., 1), to be multiplied with x (B, ...)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def progress(draws, cfg) -> float:
    """How much of the run is over at this step: 0 at the first, 1 at the last."""
    return draws.positions[0] // cfg.batch / max(1, cfg.steps - 1)


def velocity_target(net, x: Tensor, e: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = e - x; for a network that predicts x the same v written with its clamp, v = (x_t - x) / max(t, t_min).

    So a perfect prediction of x has no loss at any t, and the loss is |x - x_net|^2 / max(t, t_min)^2 (JiT).
    """
    return model.clean_velocity(x, x_t, t, net.t_min) if net.predict == "x" else e - x


def drop_labels(net, y: Tensor, draws: data.Draws, cfg, purpose: str = "label drop") -> Tensor:
    """Each label becomes the null class with probability label_drop: what classifier-free guidance needs (2207.12598)."""
    if not net.null_class:
        return y
    return torch.where(draws.uniform(purpose) < cfg.label_drop, net.num_classes, y)


def jump_or_flow(draws: data.Draws, cfg) -> Tensor:
    """Whether a sample is one of those with r < t (B,), a share `jumps`; the others, r = t, learn the velocity as in fm.

    MeanFlow's official code lets the first rows of a batch have r = t, and the very first ones the null label, so that no
    jump is ever learned without a label. Here a draw of the sample takes the place of its row: r = t where `KIND` is
    below 1 - jumps, and `drop_labels` looks at the same draw.
    """
    return draws.uniform(KIND) >= 1 - cfg.jumps


KIND = "jump or flow"


def two_times(draws: data.Draws, cfg) -> tuple[Tensor, Tensor]:
    """The times (t, r) of a jump: the larger and the smaller of two draws; r = t where the sample is not a jump."""
    one, other = sample_times(draws, cfg), sample_times(draws, cfg, "time of the jump's end")
    t = torch.maximum(one, other)
    return t, torch.where(jump_or_flow(draws, cfg), torch.minimum(one, other), t)


def guided_velocity(net, v: Tensor, x_t: Tensor, t: Tensor, y: Tensor, cfg) -> Tensor:
    """v_g = omega v + (1 - omega - kappa) u(x_t, t, t, null) + kappa u(x_t, t, t, y)   (arXiv:2505.13447, App. B.1),

    for the velocity v of a sample; v itself where t > guide_until, and under the null label. A network trained on v_g
    settles at u_null + w (E v - u_null), w = omega / (1 - kappa): guidance w at the price of none when sampling.
    """
    if cfg.omega == 1 and cfg.kappa == 0:
        return v
    with torch.no_grad():
        null, own = (net(x_t, t, label, t) for label in (torch.full_like(y, net.num_classes), y))
    guided = cfg.omega * v + (1 - cfg.omega - cfg.kappa) * null + cfg.kappa * own
    return torch.where(beside((t <= cfg.guide_until) & (y != net.num_classes), v), guided, v)


def on(rows: Tensor, call: typing.Callable, *parts: Tensor) -> Tensor:
    """call(*parts) for the samples where rows (B,), and 0 for the others, which cost nothing.

    A process that has none calls it on one in vain: where a network is sharded, the others need its share of the weights.
    """
    where = rows.nonzero()[:, 0]
    if not len(where):
        if dist.is_initialized():
            call(*(part[:1] for part in parts))
        return torch.zeros_like(parts[0])
    out = call(*(part[where] for part in parts))
    return out.new_zeros(parts[0].shape).index_put((where,), out)


def slope_of_jumps(net, x_t: Tensor, t: Tensor, r: Tensor, y: Tensor, v: Tensor, *told: Tensor) -> Tensor:
    """du/dt of u(x_t, t, r) along (v, 1) with r fixed, a constant; 0 where r = t, as it is multiplied by t - r."""
    return on(r < t, lambda *parts: model.time_derivative(net, *parts)[1], x_t, t, y, v.to(x_t.dtype), r, *told)


def adaptive(error: Tensor, p: float, c: float) -> Tensor:
    """l / sg(l + c)^p of each sample (B,), l the mean square of its error: the larger p, the more alike samples count.

    (arXiv:2505.13447, Sec. 4.3.) With p > 0 the minimiser of a noisy l is no longer a mean, unless the noise averages out
    over many pixels: use p = 0 for points.
    """
    square = error.square().flatten(1).mean(1)
    return square / (square.detach() + c) ** p


def mean_over(values: Tensor, rows: Tensor) -> Tensor:
    """The mean of values (B,) where rows (B,), 0 where there are none: for logs."""
    return (values * rows).sum() / rows.sum().clamp_min(1)


# --------------------------------------------------------------------------------------------------------------------
# 2. The objectives
# --------------------------------------------------------------------------------------------------------------------


def fm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Flow matching: E |v_net(x_t, t, y) - (e - x)|^2   (arXiv:2210.02747, Eq. 23; SiT arXiv:2401.08740, Sec. 2).

    paper: time runs from noise to data, with least noise sigma_min; here: from data to noise, with sigma_min = 0.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    v = velocity_target(net, x, e, x_t, t)

    loss = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    return loss, {}


def pafm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, bank) -> tuple[Tensor, dict]:
    """Posterior-augmented flow matching: E |v_net(x_t, t, y) - E[v | x_t, candidates]|^2   (arXiv:2605.00825)

    The candidates are x itself and K - 1 other images of its class: each may have become x_t, by another noise. The
    target's mean given x_t is that of flow matching, its variance smaller; with K = 1 it is flow matching.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    others = bank(y, draws, cfg.candidates - 1) if cfg.candidates > 1 else x[:, None][:, :0]
    mean, spread = posterior_mean(x, e, t, others)
    v = velocity_target(net, x, e, x_t, t)
    v = v + (x - mean) / t.clamp_min(net.t_min if net.predict == "x" else 1e-3).view(-1, *[1] * (x.dim() - 1))

    loss = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    return loss, {"spread": spread}


def posterior_mean(x: Tensor, e: Tensor, t: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """E[x | x_t] if x and each of `others` (B, K - 1, ...) were equally likely, and its variance (mean over pixels):

        weights ~ N(x_t; (1 - t) x_j, t^2 I),   from |x_t - (1 - t) x_j|^2 - |t e|^2, as large numbers would cancel.

    The variance, not the effective number of candidates, tells what there is to gain: near copies have much of the
    latter. paper: candidates are weighted by text likeness too, or found as neighbours; here: of the same class.
    """
    away = x[:, None] - torch.cat([x[:, None], others], 1)                                        # (B, K, ...)
    a, t = (1 - t)[:, None], t.clamp_min(1e-3)[:, None]
    gap, along = away.flatten(2).square().sum(2), (away.flatten(2) * e.flatten(1)[:, None]).sum(2)
    weights = (-(a / t) * (a / (2 * t) * gap + along)).softmax(1).view(*gap.shape, *[1] * (x.dim() - 1))
    mean = (weights * away).sum(1)                                                                # of x - x_j
    return x - mean, (weights * (away - mean[:, None]).square()).sum(1).mean()


def repa(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, features) -> tuple[Tensor, dict]:
    """Representation alignment: E |v_net(x_t, t, y) - (e - x)|^2 + align E[1 - cos(h, z)]   (arXiv:2410.06940 and its loss.py)

    h: the network's tokens after one of its first blocks, by a projector; z: a frozen encoder's features of the same
    patches of x, without noise. So the first blocks need not find out by themselves what is in an image.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(x, e, t)

    v = velocity_target(net, x, e, x_t, t)

    flow = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square().mean()
    apart = misalignment(net.projected(), features(x, draws)[:, 1:])
    return flow + cfg.align * apart, {"flow": flow, "misalignment": apart}


def reg(net, x: Tensor, y: Tensor, draws: data.Draws, cfg, features) -> tuple[Tensor, dict]:
    """Representation entanglement: `repa` of images that are denoised together with the encoder's token of them:

        E |v_net - v|^2 over the image + token E |v_net - v|^2 over the token + align E[1 - cos(h, z)]

    (arXiv:2507.01467 and its loss.py.) One time for both, and noise of the token's own. The network is a `model.TokenDiT`, its state the two side by side.
    """
    t = sample_times(draws, cfg)

    z = features(x, draws)                                                                        # (B, 1 + N, F)
    both = torch.cat([x.flatten(1), z[:, 0]], 1)                                                  # (B, C h w + F)
    e = draws.normal("noise", both.shape[1:])
    x_t = interpolate(both, e, t)

    v = velocity_target(net, both, e, x_t, t)

    error = (net(x_t, t, drop_labels(net, y, draws, cfg)) - v).square()
    flow, token = error[:, :-z.shape[2]].mean(), error[:, -z.shape[2]:].mean()
    apart = misalignment(net.projected(), z)
    return flow + cfg.token * token + cfg.align * apart, {"flow": flow, "token": token, "misalignment": apart}


def misalignment(h: Tensor, z: Tensor) -> Tensor:
    """Mean of 1 - cos(h, z) over projected tokens h and an encoder's features z, (B, N, F) both: 0 where they point alike.

    paper: -cos, which is less by 1; so a loss stays above 0, where loss.png can draw it.
    """
    if h.shape != z.shape:
        raise ValueError(f"the encoder gives features {tuple(z.shape[1:])} of an image, the network's tokens are projected to "
                         f"{tuple(h.shape[1:])}: let it see images of a size that gives as many patches")
    return (1 - F.cosine_similarity(h, z, dim=2)).mean()


def meanflow(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """MeanFlow: E w |u(x_t, t, r) - sg(v_g - (t - r) du/dt)|^2   (arXiv:2505.13447, Eq. 6-11), w: see `adaptive`.

    The average velocity u = 1 / (t - r) int_r^t v has this target, as d/dt of (t - r) u = int_r^t v shows; du/dt =
    (v_g . grad_x) u + du/dt at fixed r. Its value tells little (with p = 1 next to nothing): look at the logged `flow`,
    |u(x_t, t, t) - v_g|^2. paper: sums over pixels, c = 0.01; here: means, the same up to a constant factor.
    """
    t, r = two_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, KIND)

    v = guided_velocity(net, velocity_target(net, x, e, x_t, t), x_t, t, y, cfg)
    target = v - beside(t - r, x) * slope_of_jumps(net, x_t, t, r, y, v)

    error = net(x_t, t, y, r) - target
    return adaptive(error, cfg.p, 0.01 / x[0].numel()).mean(), two_errors(error, t, r)


def imf(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Improved MeanFlow: E w |u + (t - r) sg(du/dt) - v_g|^2 + E w |v_net - v_g|^2   (arXiv:2512.02012, official code)

    MeanFlow as a regression on the velocity v_g, whose noise is now in the target alone: du/dt is taken along the
    network's own velocity v_net, that of its second head. Without one (--head 0, the paper's boundary form) v_net =
    u(x_t, t, t), and there is no second term. Guidance is an input of the network: see `velocity_for_scale`.

    paper: a network that is told t - r and not t, and also the interval of t in which guidance acts; here: t too, which
    flows of low dimension need, and guidance at all t. w, c: as for meanflow.
    """
    t, r = two_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, KIND)

    told = (cfg.omega_max ** draws.uniform("guidance scale"),) if net.guided else ()
    own = own_velocity(net, x_t, t, y, *told)
    v = velocity_for_scale(net, velocity_target(net, x, e, x_t, t), own, x_t, t, y, *told)
    du = slope_of_jumps(net, x_t, t, r, y, own, *told)

    u, *v_net = net(x_t, t, y, r, *told, head=True) if net.head else [net(x_t, t, y, r, *told)]
    errors = [u + beside(t - r, x) * du - v, *(head - v for head in v_net)]
    loss = sum(adaptive(error, cfg.p, 0.01 / x[0].numel()).mean() for error in errors)
    return loss, two_errors(errors[0], t, r)


@torch.no_grad()
def own_velocity(net, x_t: Tensor, t: Tensor, y: Tensor, *told: Tensor) -> Tensor:
    """The velocity that the network itself gives, a constant: by its second head, or as the jump of no length."""
    return net(x_t, t, y, t, *told, head=True)[1] if net.head else net(x_t, t, y, t, *told)


def velocity_for_scale(net, v: Tensor, own: Tensor, x_t: Tensor, t: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """v_g = v + (1 - 1 / w) (v_net(y) - v_net(null)) for a network that is told w; v under the null label (2512.02012).

    Its fixed point is v_net = v_null + w (E v - v_null). The scales of training have a density like 1 / w up to
    omega_max. Unlike in `guided_velocity` the sample's v, with all its noise, is not multiplied by w.
    """
    if w is None:
        return v
    null = own_velocity(net, x_t, t, torch.full_like(y, net.num_classes), w)
    return v + beside(1 - 1 / w, v) * (own - null)


def soflow(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """SoFlow: E w |u(x_t, t, r) - sg(u + q)|^2,  q = (f(x_t, t, r) - f(x_l, l, r)) / (t - l)   (arXiv:2512.15657)

    for the solution f(x, t, r) = x - (t - r) u(x, t, r), which must not depend on where on the way from x_t to x_l =
    x_t - (t - l) v_g it starts. q is v_g - d/dt ((t - r) u) by a difference, so this is MeanFlow without a derivative,
    and l = t - step (t - r) with a step that falls from 0.1 to 0.002 over the run. Where r = t the target is v_g. Such
    quotients need more digits than bfloat16 has: --amp off is soflow's default, and ect's.

    paper: the value of a jump's loss means nothing; here: |q|^2 with the same gradient. paper: own times for jumps and
    for velocities, and guidance that fades out above t = 0.8; here: times and guidance are meanflow's.
    """
    t, r = two_times(draws, cfg)
    ahead = ((t - r) * 0.1 * 0.02 ** progress(draws, cfg)).clamp_min(1e-4)
    l = t - ahead

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, KIND)

    v = guided_velocity(net, velocity_target(net, x, e, x_t, t), x_t, t, y, cfg)
    u = net(x_t, t, y, r)
    with torch.no_grad():
        u_l = on(r < t, net, x_t - beside(ahead, x) * v, l, y, r)
        q = v - (beside(t - r, x) * u - beside(l - r, x) * u_l) / beside(ahead, x)
    target = torch.where(beside(r < t, x), u.detach() + q, v)

    error = u - target
    half = torch.where(r < t, 0.5, 1.0)  # the paper's jumps have |f - f_l|^2 / 2
    return (half * adaptive(error, cfg.p, 0.01)).mean(), two_errors(error, t, r)


def shortcut(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Shortcut models: a jump of 1 / n, n a power of 2, goes where two of half its length go (arXiv:2410.12557, Sec. 3):

        E |u(x_t, t, r) - sg(u(x_t, t, m) + u(x_m, m, r)) / 2|^2,   m = (t + r) / 2,   x_m = x_t - (t - m) u(x_t, t, m),

    and the shortest ones, of 1 / finest, have the target v: what is learned is Euler's method in `finest` steps. omega:
    guidance of the two shortest jumps that make up the next longer one, from where it spreads to all.

    paper: targets by averaged weights, clipped to +-4; here: by the weights themselves, as in every objective here.
    """
    jumps = jump_or_flow(draws, cfg)
    level = (draws.uniform("length of the jump") * math.log2(cfg.finest)).floor()
    n = torch.where(jumps, 2 ** level, cfg.finest)
    t = ((sample_times(draws, cfg) * n).floor() + 1) / n
    r = t - 1 / n

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg, KIND)

    with torch.no_grad():
        halves = on(jumps, lambda *at: two_jumps(net, *at, cfg), x_t, t, y, r)
    target = torch.where(beside(jumps, x), halves, velocity_target(net, x, e, x_t, t))

    error = net(x_t, t, y, r) - target
    return error.square().mean(), two_errors(error, n, torch.where(jumps, 0, n))


def two_jumps(net, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor, cfg) -> Tensor:
    """The average velocity of two jumps, from t to the middle and on to r."""
    def u(x, t, r):
        own = net(x, t, y, r)
        if cfg.omega == 1:
            return own
        null = net(x, t, torch.full_like(y, net.num_classes), r)
        return null + beside(torch.where((t - r) * cfg.finest < 1.5, cfg.omega, 1.0), x) * (own - null)

    m = (t + r) / 2
    first = u(x_t, t, m)
    return (first + u(x_t - beside(t - m, x_t) * first, m, r)) / 2


def ect(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Consistency training in steps that shrink: E (|f(x_t, t) - sg f(x_r, r)|^2 + c^2)^(1/2) / (s_t - s_r)

    for f(x_t, t) = x_t - t u(x_t, t), x_t and x_r of one x and e (ECT, arXiv:2406.14548; iCT, arXiv:2310.14189), with
    s_r = s_t (1 - (1 + 8 sigmoid(-s_t)) / 2^k)_+, k = 1 .. doublings over the run; at first r = 0, where f is x, at small s.

    paper: EDM's noise levels s and inputs x + s e; here: s = t / (1 - t), and x_t is that input over 1 + s, so that its
    log-normal s are our logit-normal t. |.|^2 is a mean over pixels, c = 0.00054 (iCT's, and sums: a constant factor).
    """
    t = sample_times(draws, cfg)
    s = t / (1 - t)
    k = 1 + min(cfg.doublings - 1, math.floor(cfg.doublings * progress(draws, cfg)))
    s_r = s * (1 - (1 + 8 * torch.sigmoid(-s)) / 2 ** k).clamp_min(0)
    r = s_r / (1 + s_r)

    e = draws.normal("noise", x.shape[1:])
    x_t, x_r, y = interpolate(x, e, t), interpolate(x, e, r), drop_labels(net, y, draws, cfg)

    with torch.no_grad():
        target = jump(net, x_r, r, torch.zeros_like(r), y)

    error = jump(net, x_t, t, torch.zeros_like(t), y) - target
    square, c = error.square().flatten(1).mean(1), 0.00054
    return (((square + c * c).sqrt() - c) / (s - s_r)).mean(), {"gap": (t - r).mean(), "jump": square.mean()}


def scm(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """Continuous-time consistency training: E |F - sg(F + g / (|g| + 0.1))|^2   (sCM, arXiv:2410.11081, Eq. 8)

    for the change of f(x_t, t) = x_t - t u(x_t, t) along the way, df/dt = v - u - t du/dt: MeanFlow's jumps to r = 0. The
    paper's circle, tan a = t / ((1 - t) sd) for data of deviation sd, is our line by another scale: with S^2 =
    sd^2 (1 - t)^2 + t^2 its g = cos a df/da is (1 - t) S df/dt, and its network F is u S / sd plus what has no weights.

    paper: the learned weight of each t; here: none, as g, once normalised (|.|: root of the mean over pixels), is alike at
    all t. paper: a factor that grows from 0 to 1 before all that moves with a; here: before du/dt, over a fifth of the run.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(net, y, draws, cfg)

    v, u = velocity_target(net, x, e, x_t, t), net(x_t, t, y)
    _, du = model.time_derivative(net, x_t, t, y, v.to(x_t.dtype))
    slope = v - u.detach() - min(1, 5 * progress(draws, cfg)) * beside(t, x) * du
    S = ((cfg.data_std * (1 - t)) ** 2 + t ** 2).sqrt()
    g = beside((1 - t) * S, x) * slope
    size = g.square().flatten(1).mean(1).sqrt()
    target = u.detach() + g / beside((size + 0.1) * S / cfg.data_std, x)

    error = (u - target) * beside(S / cfg.data_std, x)
    return error.square().mean(), {"tangent": size.mean()}


def two_errors(error: Tensor, t: Tensor, r: Tensor) -> dict:
    """Logs: the mean square of the error where r = t, and of the jumps."""
    square = error.detach().square().flatten(1).mean(1)
    return {"flow": mean_over(square, r == t), "jump": mean_over(square, r < t)}


def cafm_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G) -> tuple[Tensor, dict]:
    """CAFM's discriminator: E (J(v) - 1)^2 + E (J(u) + 1)^2 + cp E D^2   (arXiv:2604.11521, official code)

    for the derivatives J(w) = <grad_x D, w> + dD/dt along the velocities of data, v, and of the generator, u. J is linear
    in w, so what it learns of the random v is what there is to learn of E[v | x_t]. cp fixes D up to a constant.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    v = velocity_target(G, x, e, x_t, t)
    with torch.no_grad():
        u = G(x_t, t, y)

    out, (real, fake) = slopes(D, x_t, t, y, torch.stack([v, u]), cfg)
    loss = (real - 1).square().mean() + (fake + 1).square().mean() + cfg.cp * out.square().mean()
    return loss, {"slope_real": real.mean(), "slope_fake": fake.mean(), "value": out.mean()}


def cafm_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D) -> tuple[Tensor, dict]:
    """CAFM's generator: E (J(u) - 1)^2 + ot E |u|^2   (arXiv:2604.11521, official code), |.|^2 being a mean over pixels.

    The derivatives of D are constants here, and the gradient with respect to u is 2 (J(u) - 1) grad_x D.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t, y = interpolate(x, e, t), drop_labels(G, y, draws, cfg)

    u = G(x_t, t, y)

    if cfg.route == "finite":
        _, (fake,) = slopes(D, x_t, t, y, u[None], cfg)
    else:
        _, gradient, slope = model.input_gradient(D, x_t, t, y, create_graph=False)
        fake = model.along(gradient, slope, u)
    energy = u.square().mean()
    return (fake - 1).square().mean() + ot_weight(draws, cfg) * energy, {"slope_fake": fake.mean(), "energy": energy}


def slopes(D, x_t: Tensor, t: Tensor, y: Tensor, directions: Tensor, cfg) -> tuple[Tensor, Tensor]:
    """D (B,) and its slopes (K, B) along (w, 1) for each w of `directions`: derivatives, or with --route finite

        (D(x_t, t) - D(x_t - h w, t - h)) / h,   h = min(t, interval)

    without any derivative of the network (CAMF, the finite-interval form), so that nothing limits the network.
    """
    if cfg.route != "finite":
        return model.directional_derivatives(D, x_t, t, y, directions, cfg.route)
    h = t.clamp(1e-4, cfg.interval)
    out, back = D(x_t, t, y), h.view(-1, *[1] * (x_t.dim() - 1))
    return out, torch.stack([(out - D(x_t - back * w, t - h, y)) / h for w in directions])


def afm_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G) -> tuple[Tensor, dict]:
    """AFM's discriminator, relativistic, with its penalties (arXiv:2511.22475, Eq. 4-7, Algorithm 2):

        E softplus(f - r) + gp (R1 + R2) + cp E (r + f)^2,   r = D(x_r, r), f = D(jump to r, r).

    R1, R2: see `flatness`. D never sees where a jump came from, or no generator could satisfy it. It sees data and jump
    through the same `augment`. paper: shifts by up to 30 % and three holes; here: those of `augment`, as for cat.
    """
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    with torch.no_grad():
        made = jump(G, x_s, s, r, y)
    x_r, made = augment(torch.stack([x_r, made]), draws, cfg.augment)

    real, fake = D(x_r, r, y), D(made, r, y)
    r1 = flatness(D, x_r, real, s, r, y, draws, "R1")
    r2 = flatness(D, made, fake, s, r, y, draws, "R2")
    loss = F.softplus(fake - real).mean() + cfg.gp * (r1 + r2) + cfg.cp * (real + fake).square().mean()
    return loss, {"real": real.mean(), "fake": fake.mean(), "r1": r1, "r2": r2}


def afm_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D, C=None) -> tuple[Tensor, dict]:
    """AFM's generator: E softplus(r - f) + ot E |jump - x_s|^2 / (s - r) + cg L_cg   (arXiv:2511.22475, Eq. 16-21)

    with |.|^2 a mean over pixels: of all maps to the data, the shortest. Between the jump and D its gradient is
    normalised (`NormaliseGradient`), so that `ot` means the same for every network and size. L_cg, where there is a
    classifier C: see `guide`.
    """
    s, r = jump_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_s, x_r = interpolate(x, e, s), interpolate(x, draws.normal("noise of the real side", x.shape[1:]), r)

    made = jump(G, x_s, s, r, y)

    real_seen, made_seen = augment(torch.stack([x_r, made]), draws, cfg.augment)
    with torch.no_grad():
        real = D(real_seen, r, y)
    fake = D(NormaliseGradient.apply(made_seen, D.gradient_square), r, y)
    adversarial = F.softplus(real - fake).mean()
    distance = (made - x_s).square().flatten(1).mean(1)
    loss = adversarial + ot_weight(draws, cfg) * (distance / (s - r).clamp_min(1e-3)).mean()
    logs = {"adversarial": adversarial, "distance": distance.mean()}
    if C is None:
        return loss, logs
    surprise = guide(C, made, r, y, draws, cfg)
    return loss + cfg.cg * surprise, logs | {"surprise": surprise}


def cat_D(D, x: Tensor, y: Tensor, draws: data.Draws, cfg, G, features=None) -> tuple[Tensor, dict]:
    """CAT's discriminator, one relativistic game a scale (arXiv:2605.26449; GAT, arXiv:2509.24935):

        mean over scales of E softplus(f_k - r_k) + gp (R1 + R2),   r = D(x at all scales), f = D(stages, one a scale).

    R1, R2: see `scale_flatness`. With `features`, D's tokens of real images at the finest scale are aligned as in `repa`,
    with weight align: the encoder sees what D sees. GAT: D and G see the same batch; here: each step has a batch of its
    own, as for every objective. For latents of photographs a port of the paper has gp = 0.5, augment = 1, align = 1
    (DINOv2) and one learning rate; the defaults here are for short runs on glyphs, with D faster than G: at equal rates G
    evades a D that, with G held still, soon tells its samples apart.
    """
    e = draws.normal("noise", x.shape[1:])
    with torch.no_grad():
        h = G.stages(e, y)

    real, made = pyramid(x.expand(h.shape), draws, cfg), pyramid(h, draws, cfg)

    r = D(real, y)
    apart = misalignment(D.projected(), features(real[0], draws)) if features else None
    f = D(made, y)
    r1 = scale_flatness(D, real, r, y, draws, "R1")
    r2 = scale_flatness(D, made, f, y, draws, "R2")
    loss = F.softplus(f - r).mean() + cfg.gp * (r1 + r2) + (cfg.align * apart if features else 0)
    logs = {"real": r.mean(), "fake": f.mean(), "r1": r1, "r2": r2}
    return loss, logs | ({"misalignment": apart} if features else {})


def cat_G(G, x: Tensor, y: Tensor, draws: data.Draws, cfg, D) -> tuple[Tensor, dict]:
    """CAT's generator: mean over scales of E softplus(r_k - f_k) + cons L_cons   (arXiv:2605.26449), see `consistency`.

    Logged for every stage: see `stage_logs`.
    """
    e = draws.normal("noise", x.shape[1:])
    h = G.stages(e, y)

    with torch.no_grad():
        r = D(pyramid(x.expand(h.shape), draws, cfg), y)
    f = D(pyramid(h, draws, cfg), y)

    adversarial, distance = F.softplus(r - f).mean(), consistency(h, cfg)
    return adversarial + cfg.cons * distance, {"adversarial": adversarial, "consistency": distance, **stage_logs(h)}


def pyramid(h: Tensor, draws: data.Draws, cfg) -> list[Tensor]:
    """Stages h (K, B, C, h, w) as D sees them, finest first: h_K at full size, h_{K-1} averaged over 2 x 2 pixels, ...

    Augmented before that, so that all scales, data and samples have the same shift and hole.
    """
    return [F.avg_pool2d(x, 2 ** k) for k, x in enumerate(augment(h, draws, cfg.augment).flip(0))]


def consistency(h: Tensor, cfg) -> Tensor:
    """L_cons = 1 / (K - 1) sum_{k < K} w_k mean |h_k - h_K|^2, w_k = 1 / (K - k): the last stage is everyone's anchor.

    Without `cons_detach` the head of the first stage has no gradient from it, because h_k - h_K is minus the later
    heads; with it the last one has none. cons_space: compare at full resolution, or as D sees the stage.
    """
    gaps = h[:-1] - (h[-1].detach() if cfg.cons_detach else h[-1])
    shrink = [2 ** k if cfg.cons_space == "own" else 1 for k in range(len(h) - 1, 0, -1)]
    return torch.stack([F.avg_pool2d(gap, size).square().mean() / (len(gaps) - k)
                        for k, (gap, size) in enumerate(zip(gaps, shrink))]).mean()


def agreement(h: Tensor) -> Tensor:
    """Cosine of the update h_{k+1} - h_k and what is still to come, h_K - h_k, for k < K: (K - 1,), 1 for the last."""
    return F.cosine_similarity(h.diff(dim=0).flatten(2), (h[-1] - h[:-1]).flatten(2), dim=2).mean(1)


def stage_logs(h: Tensor) -> dict:
    """discrepancy_k = mean |h_k - h_K|^2 and rewriting_k = mean |h_k - h_{k+1}|^2 for k < K, cosine_k = `agreement` for
    k < K - 1: how far a stage is from the image, how much of it the next one changes, and whether towards the image."""
    h = h.detach()
    columns = {"discrepancy": (h[:-1] - h[-1]).square().mean((1, 2, 3, 4)),
               "rewriting": h.diff(dim=0).square().mean((1, 2, 3, 4)), "cosine": agreement(h)[:-1]}
    return {f"{name}_{k}": value for name, values in columns.items() for k, value in enumerate(values, 1)}


def augment(x: Tensor, draws: data.Draws, p: float) -> Tensor:
    """DiffAugment (arXiv:2006.10738): three changes of a sample of x (K, B, C, h, w), each with probability p.

    It gets brighter or darker by up to 0.5, is shifted by up to an eighth of the image, and has a square of half its
    side cut out, with 0 where there is nothing. All draws depend on the sample alone. paper: also saturation and
    contrast.
    """
    if not p:
        return x
    (B, _, h, w), device = x.shape[1:], x.device

    def amount(name):  # (B,): uniform in [-1, 1)
        return 2 * draws.uniform(f"augment {name}") - 1

    def on(name):
        return draws.uniform(f"augment whether {name}") < p

    x = x + (0.5 * amount("brightness") * on("brightness")).view(B, 1, 1, 1)
    row, column, edge = torch.arange(h, device=device), torch.arange(w, device=device), h // 8
    down, right = ((edge * (1 + amount(name) * on("shift"))).round().long()[:, None] for name in ("down", "right"))
    rows, columns = (row + down)[:, :, None], (column + right)[:, None]                           # (B, h, 1), (B, 1, w)
    x = F.pad(x, (edge,) * 4)[:, torch.arange(B, device=device)[:, None, None], :, rows, columns].permute(3, 0, 4, 1, 2)
    far_y = (row - (amount("hole's row")[:, None] + 1) * h / 2).abs() > h / 4                     # (B, h)
    far_x = (column - (amount("hole's column")[:, None] + 1) * w / 2).abs() > w / 4
    return x * (far_y[:, :, None] | far_x[:, None] | ~on("hole")[:, None, None])[:, None]


def jump(G, x_s: Tensor, s: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """x_s - (s - r) u(x_s, s, y, r): from time s to r. A network that predicts x gives it directly where s = 1, r = 0."""
    return x_s - beside(s - r, x_s) * G(x_s, s, y, r)


def jump_times(draws: data.Draws, cfg) -> tuple[Tensor, Tensor]:
    """Times (s, r) of a jump: one of the nfe equal steps from 1 to 0; any, s ~ U(0, 1) and r ~ U(0, s), where nfe = 0."""
    if not cfg.nfe:
        s = 1 - draws.uniform("time")
        return s, s * draws.uniform("time of the jump's end")
    k = (draws.uniform("time") * cfg.nfe).floor()
    return 1 - k / cfg.nfe, 1 - (k + 1) / cfg.nfe


def guide(C, made: Tensor, r: Tensor, y: Tensor, draws, cfg) -> Tensor:
    """L_cg: how surprising the labels are at the jumps' ends, -log p(y | x_t') (arXiv:2511.22475, official code).

    One-step jumps end at data, where classes lie apart and a classifier has no slope: they are noised to a random time
    t' in [0, cg_time) first. Others end at t' = r, and those with r < 0.5 count.
    """
    if cfg.nfe != 1:
        return (F.cross_entropy(C(made, r), y, reduction="none") * (r < 0.5)).mean()
    t = cfg.cg_time * draws.uniform("guide's time")
    return F.cross_entropy(C(interpolate(made, draws.normal("guide's noise", made.shape[1:]), t), t), y)


def classifier(net, x: Tensor, y: Tensor, draws: data.Draws, cfg) -> tuple[Tensor, dict]:
    """AFM's guide: the cross-entropy of the label given x_t, for every t (arXiv:2511.22475, official code).

    paper: images are also rotated, scaled and sheared; here: `augment`.
    """
    t = sample_times(draws, cfg)

    e = draws.normal("noise", x.shape[1:])
    x_t = interpolate(augment(x[None], draws, cfg.augment)[0], e, t)

    logits = net(x_t, t)

    return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


def flatness(D, x: Tensor, out: Tensor, s: Tensor, r: Tensor, y: Tensor, draws, purpose: str,
             step: float = 0.01) -> Tensor:
    """R1 (at data) or R2 (at samples) by differences: E (s - r) ((D(x + step n) - D(x)) / step)^2, n ~ N(0, I).

    Its mean over n is |grad_x D|^2, and a little more where D is curved (arXiv:2511.22475, Sec. 3.5, Eq. 20). Every
    fourth sample of the run takes part.
    """
    rows = every_fourth(draws, x.device)
    n = draws.normal(purpose, x.shape[1:])[rows]
    change = (D(x[rows] + step * n, r[rows], y[rows]) - out[rows]) / step
    return ((s - r)[rows].clamp_min(1e-3) * change.square()).sum() * 4 / len(x)


def scale_flatness(D, images: list[Tensor], out: Tensor, y: Tensor, draws, purpose: str, step: float = 0.01) -> Tensor:
    """The same of the sum over scales of D, n being noise at every scale: its mean is sum_k |grad D_k|^2.

    The noise comes after `augment`: what is compared has the same shift and hole.
    """
    rows = every_fourth(draws, y.device)
    noisy = [x[rows] + step * draws.normal(f"{purpose}, scale {k}", x.shape[1:])[rows] for k, x in enumerate(images)]
    change = (D(noisy, y[rows]) - out[rows]).sum(1) / step
    return change.square().sum() * 4 / len(y)


def every_fourth(draws, device) -> Tensor:
    """Where in this micro-batch the samples are whose position in the run is a multiple of 4."""
    return torch.tensor([i for i, position in enumerate(draws.positions) if position % 4 == 0], device=device).long()


class NormaliseGradient(torch.autograd.Function):
    """Identity whose gradient g is divided by the root of `square` <- 0.9 square + 0.1 |g|^2 numel, in place.

    (AFM, arXiv:2511.22475, Eq. 23, with the root that the official code takes.) `square` (a scalar tensor, 0 at first) is
    averaged over processes: then g has the size 1 / numel in root mean square, whatever the scale of D.
    """

    @staticmethod
    def forward(x, square):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.square = inputs[1]

    @staticmethod
    def backward(ctx, g):
        now = g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() * g.numel()
        if dist.is_initialized():
            dist.all_reduce(now)
            now /= dist.get_world_size()
        ctx.square.mul_(0.9).add_(now, alpha=0.1)
        return g / (ctx.square.sqrt() + 1e-8), None


def ot_weight(draws, cfg) -> float:
    """The weight of the transport cost at this step: from `ot` to `ot_end` by half a cosine over the run."""
    return cfg.ot_end + (cfg.ot - cfg.ot_end) * 0.5 * (1 + math.cos(math.pi * progress(draws, cfg)))


def _times(nfe: int) -> int:
    """Times that a generator of jumps is told: none for one jump, the start for equal ones, both ends for any."""
    return {0: 2, 1: 0}.get(nfe, 1)


def only_G(step: int, cfg) -> str:
    return "G"


def cafm_turn(step: int, cfg) -> str:
    """D alone for d_warmup steps, then d_steps of D for one of G."""
    return "D" if step <= cfg.d_warmup or step % (cfg.d_steps + 1) < cfg.d_steps else "G"


def alternate(step: int, cfg) -> str:
    return "DG"[step % 2]


class Objective(typing.NamedTuple):
    """The loss of each network, whose turn it is at a step, and the settings in which a paper differs from fm's."""
    G: typing.Callable
    D: typing.Callable | None = None
    turn: typing.Callable = only_G
    defaults: dict = {}
    generator: typing.Callable = lambda settings: {}  # options of model.create, from a run's settings
    kind: type = model.Discriminator
    discriminator: typing.Callable = lambda settings, config: {}  # its options, beyond those of G's config
    bank: bool = False        # whether G's loss looks at a data.Bank of other images
    features: str = ""        # the role whose loss looks at a frozen encoder's features of the images
    draws_images: bool = True  # whether a run has pictures to show
    alarm: float = 0.0        # a mean loss of D below this: D has won
    sampling: typing.Callable = lambda settings: {}  # how a run's samples are made, where that is not a matter of choice


def flow_map(settings: dict) -> dict:
    """A network that jumps from any t to any r is told both; a chain of its jumps is the Euler solver.

    (SoFlow's paper re-noises instead, as `consistency_model` does; here all flow maps are sampled alike.)
    """
    return dict(solver="euler", guidance=1.0)


def consistency_model(settings: dict) -> dict:
    """A network that knows the way to the data only is sampled by going there, and part of the way back with new noise."""
    return dict(solver="renoise", guidance=1.0)


LOSSES = {
    "fm": Objective(fm),
    "pafm": Objective(pafm, bank=True),
    "carflow": Objective(fm, generator=lambda settings: dict(shifts=True)),
    "repa": Objective(repa, features="G"),
    "reg": Objective(reg, features="G"),
    "meanflow": Objective(meanflow, generator=lambda settings: dict(times=2), sampling=flow_map,
                          defaults=dict(jumps=0.25, time_mean=-0.4, time_std=1.0, sample_steps=1)),
    "imf": Objective(imf, defaults=dict(jumps=0.5, head=1, omega_max=4.0, time_mean=-0.4, time_std=1.0, sample_steps=1),
                     generator=lambda settings: dict(times=2, head=settings["head"], guided=settings["omega_max"] > 1),
                     sampling=lambda settings: dict(solver="euler") if settings["omega_max"] > 1 else flow_map(settings)),
    "soflow": Objective(soflow, generator=lambda settings: dict(times=2), sampling=flow_map,
                        defaults=dict(jumps=0.25, time_mean=-0.4, time_std=1.0, sample_steps=1, amp="off")),
    "shortcut": Objective(shortcut, generator=lambda settings: dict(times=2), sampling=flow_map,
                          defaults=dict(jumps=0.125, time="uniform", sample_steps=1)),
    "ect": Objective(ect, sampling=consistency_model,
                     defaults=dict(lr=1e-3, label_drop=0.0, time_mean=-1.1, time_std=2.0, sample_steps=1, amp="off")),
    "scm": Objective(scm, sampling=consistency_model,
                     defaults=dict(lr=1e-3, label_drop=0.0, time_mean=-1.0, time_std=1.4, sample_steps=1)),
    "cafm": Objective(cafm_G, cafm_D, cafm_turn, alarm=0.2,
                      discriminator=lambda settings, config: dict(norm=config["norm"].replace("layer", "rms"), linear=False),
                      defaults=dict(beta1=0.0, beta2=0.95, ema=0.99, decay="constant", lr=1e-4, d_warmup=1000)),
    "afm": Objective(afm_G, afm_D, alternate, alarm=0.05,
                     generator=lambda settings: dict(times=_times(settings["nfe"]), repeats=settings.get("repeats", 0)),
                     discriminator=lambda settings, config: dict(
                         times=min(1, _times(settings["nfe"])), repeats=0, linear=False,
                         norm="layer" if config["norm"] == "rms" else config["norm"]),
                     defaults=dict(beta1=0.0, beta2=0.9, label_drop=0.0, weight_decay=0.01, decay="constant", lr=5e-4,
                                   cp=0.01, ot=0.2, ot_end=0.01, clip=0.0),
                     sampling=lambda settings: dict(solver="euler", guidance=1.0,
                                                    **({"steps": settings["nfe"]} if settings["nfe"] else {}))),
    "cat": Objective(cat_G, cat_D, alternate, alarm=0.05, kind=model.ScaleDiscriminator,
                     generator=lambda settings: dict(stages=settings["stages"]),
                     defaults=dict(beta1=0.0, beta2=0.99, label_drop=0.0, decay="constant", lr=4e-4, d_lr=1e-3, gp=0.01, align=1.0),
                     features="D", sampling=lambda settings: dict(steps=1, solver="euler", guidance=1.0)),
    "classifier": Objective(classifier, draws_images=False, generator=lambda settings: dict(classifier=True, predict="v"),
                            defaults=dict(beta2=0.95, weight_decay=0.01, decay="constant", lr=1e-3, time="uniform",
                                          augment=0.4)),
}


# --------------------------------------------------------------------------------------------------------------------
# 3. A world where everything is known: the Gaussian mixture
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Mixture:
    """Data sum_k w_k N(m_k, s_k^2 I): its noised marginals, velocity, score and (in 1-D) flow map in closed form.

    means (K, D), stds (K,), weights (K,). Points x_t are (B, D), times t (B,). Work in float64 for tests.
    """
    means: Tensor
    stds: Tensor
    weights: Tensor

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, D) and the component (n,) each came from."""
        k = torch.multinomial(self.weights, n, True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise, k

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component given x_t: its probability (B, K), the offset x_t - (1-t) m_k (B, K, D), the variance (B, K)."""
        t = t[:, None]
        variance = ((1 - t) * self.stds) ** 2 + t ** 2                                              # (B, K)
        offset = x_t[:, None] - (1 - t)[..., None] * self.means                                     # (B, K, D)
        log_p = self.weights.log() - offset.square().sum(-1) / (2 * variance) - 0.5 * x_t.shape[1] * variance.log()
        return log_p.softmax(-1), offset, variance

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """E[e - x | x_t], the minimiser of flow matching; of component y alone where labels y (B,) are given.

        Within component k: E[e - x | x_t, k] = (t - (1-t) s_k^2) / ((1-t)^2 s_k^2 + t^2) (x_t - (1-t) m_k) - m_k.
        """
        p, offset, variance = self.posterior(x_t, t)
        if y is not None:
            p = nn.functional.one_hot(y, len(self.weights)).to(p)
        slope = (t[:, None] - (1 - t)[:, None] * self.stds ** 2) / variance
        return (p[..., None] * (slope[..., None] * offset - self.means)).sum(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = -E[e | x_t] / t."""
        p, offset, variance = self.posterior(x_t, t)
        return -((p / variance)[..., None] * offset).sum(1)

    def cdf(self, x_t: Tensor, t: Tensor) -> Tensor:
        """F_t(x_t) of 1-D data: (B, 1) -> (B, 1)."""
        _, offset, variance = self.posterior(x_t, t)
        return (self.weights * torch.special.ndtr(offset[..., 0] / variance.sqrt())).sum(1, keepdim=True)

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The exact flow map of 1-D data from time t to r: the monotone map, F_r(x_r) = F_t(x_t), by bisection."""
        target = self.cdf(x_t, t)
        reach = self.means.abs().max() + 10 * (1 + self.stds.max())
        low, high = torch.full_like(x_t, -reach), torch.full_like(x_t, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, r) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


FOUR_MODES = Mixture(torch.tensor([[-1.5], [-0.5], [0.4], [1.6]]), torch.tensor([0.12, 0.2, 0.1, 0.25]),
                     torch.tensor([0.2, 0.3, 0.15, 0.35]))


class PointNet(nn.Module):
    """A small velocity network for points (B, D), with the attributes that objectives ask of a network.

    Coordinates and times enter as sines and cosines of several frequencies, so that narrow modes can be told apart.
    times: 1 (t), or 2 (t and t - r), and head: as in model.DiT, but that the two ways part in the last layer only.
    """
    t_min, null_class, guided = 0.05, False, False

    def __init__(self, dimension: int = 1, width: int = 128, outputs: int = 0, predict: str = "v", times: int = 1,
                 head: int = 0, classes: int = 1, shifts: bool = False):
        super().__init__()
        self.predict, self.times, self.head, self.num_classes = predict, times, head, classes
        self.shifts = model.Shifts(classes, (dimension,)) if shifts else None
        self.register_buffer("frequencies", torch.linspace(0.5, 8, 16))
        inputs, outputs = (dimension + times) * 32 + (classes if classes > 1 else 0), outputs or dimension
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs * (2 if head else 1)))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None, head: bool = False):
        if self.shifts:
            return self.shifts(self._velocity, x_t, t, y, r)
        return self._velocity(x_t, t, y, r, head)

    def _velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None, head: bool = False):
        told = [t, torch.zeros_like(t) if r is None else t - r][:self.times]
        angle = (torch.cat([x_t, torch.stack(told, 1)], 1)[..., None] * self.frequencies).flatten(1)  # (B, (D + times) 16)
        label = [F.one_hot(y, self.num_classes).to(x_t)] if self.num_classes > 1 else []
        outs = self.layers(torch.cat([angle.sin(), angle.cos(), *label], 1)).chunk(2 if self.head else 1, 1)
        v = [model.clean_velocity(out, x_t, t, self.t_min) if self.predict == "x" else out for out in outs]
        return v if head else v[0]


class PointDiscriminator(PointNet):
    """A number for each point: (B, D), (B,) -> (B,)."""

    def __init__(self, dimension: int = 1, width: int = 128):
        super().__init__(dimension, width, outputs=1)
        self.register_buffer("gradient_square", torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t)[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# 4. Run alone: every objective against the closed form
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Settings of one run on points; `SETTINGS` has those of each objective that points are enough for."""
    steps: int = 2000
    batch: int = 512
    lr: float = 2e-3
    d_lr: float = 2e-3
    predict: str = "v"
    betas: tuple = (0.9, 0.999)
    width: int = 128
    classes: int = 1  # that the network is told; 1: none
    shifts: bool = False
    decay: bool = True  # of the learning rate, linearly to 0
    ema: float = 0.0
    time: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    curriculum: int = 0
    candidates: int = 16
    label_drop: float = 0.0
    cp: float = 0.001
    ot: float = 0.0
    ot_end: float = 0.0
    gp: float = 0.05
    augment: float = 0.0
    nfe: int = 1
    d_steps: int = 4
    d_warmup: int = 0
    route: str = "reverse"
    interval: float = 0.05
    jumps: float = 0.5
    p: float = 0.0
    omega: float = 1.0
    kappa: float = 0.0
    guide_until: float = 1.0
    omega_max: float = 1.0
    head: int = 0
    finest: int = 128
    doublings: int = 8
    data_std: float = 1.1
    seed: int = 0


ADVERSARIAL = Config(batch=256, betas=(0.0, 0.9), lr=1e-3, d_lr=1e-3, decay=False)
SETTINGS = {
    "fm": Config(),
    "pafm": Config(),
    "meanflow": Config(steps=2500, ema=0.99),
    "imf": Config(steps=2500, ema=0.99, head=1),
    "soflow": Config(steps=2500, ema=0.99),
    "shortcut": Config(steps=2500, ema=0.99),
    "ect": Config(steps=2500, ema=0.99, time="logit_normal", time_std=1.5),
    "scm": Config(steps=2500, ema=0.99),
    "cafm": dataclasses.replace(ADVERSARIAL, steps=2400, ema=0.95),
    "afm": dataclasses.replace(ADVERSARIAL, steps=1500, ema=0.99, cp=0.01, ot=0.2, ot_end=0.05),
}
CONTROLS = {  # what is lost without an ingredient; "x": the network gives where to jump, rather than the jump
    "meanflow, p = 1": dataclasses.replace(SETTINGS["meanflow"], p=1.0),
    "meanflow, no jumps": dataclasses.replace(SETTINGS["meanflow"], jumps=0.0),
    "imf, no head": dataclasses.replace(SETTINGS["imf"], head=0),
    "cafm, 1 D step for 1 of G": dataclasses.replace(SETTINGS["cafm"], d_steps=1),
    "afm x": dataclasses.replace(SETTINGS["afm"], predict="x"),
    "afm x, no transport cost": dataclasses.replace(SETTINGS["afm"], predict="x", ot=0.0, ot_end=0.0),
}


def train_points(name: str, mixture: Mixture, cfg: Config | None = None) -> PointNet:
    """Train a PointNet, and a discriminator where there is one, on draws of the mixture; returns the averaged network."""
    cfg, objective = cfg or SETTINGS[name], LOSSES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        times = max(1, objective.generator(dataclasses.asdict(cfg)).get("times", 1))
        nets = {"G": PointNet(mixture.means.shape[1], cfg.width, predict=cfg.predict, times=times, head=cfg.head,
                              classes=cfg.classes, shifts=cfg.shifts)}
        if objective.D:
            nets["D"] = PointDiscriminator(mixture.means.shape[1])
    rates = {"G": cfg.lr, "D": cfg.d_lr}
    opts = {role: torch.optim.AdamW(net.parameters(), rates[role], cfg.betas, weight_decay=0)
            for role, net in nets.items()}
    ema = copy.deepcopy(nets["G"]).requires_grad_(False)
    bank = [functools.partial(draw_others, mixture)] if objective.bank else []
    bar = tqdm(range(cfg.steps), desc=name)
    for step in bar:
        role = objective.turn(step, cfg)
        others = [net for other, net in nets.items() if other != role] + bank
        opts[role].param_groups[0]["lr"] = rates[role] * (1 - step / cfg.steps if cfg.decay else 1)
        x, y = mixture.sample(cfg.batch, data.generator(cfg.seed, "points", step))
        loss, _ = getattr(objective, role)(nets[role], x, y, BatchDraws(cfg.seed, step, cfg.batch), cfg, *others)
        loss.backward()
        opts[role].step()
        for opt in opts.values():
            opt.zero_grad()
        if role == "G":
            torch._foreach_lerp_(list(ema.parameters()), list(nets["G"].parameters()), 1 - cfg.ema)
        if step % 100 == 0:
            bar.set_postfix({f"loss {role}": f"{loss.item():.3f}"})
    return ema.eval()


def draw_others(mixture: Mixture, y: Tensor, draws, n: int) -> Tensor:
    """As data.Bank, for points without classes: n other points (B, n, D) for each of a batch."""
    x, _ = mixture.sample(len(y) * n, data.generator("others", draws.positions[0]))
    return x.view(len(y), n, -1)


class BatchDraws:
    """The interface of data.Draws with one generator a batch: fast, where batches are never split."""

    def __init__(self, seed: int, step: int, batch: int):
        self.key, self.batch, self.positions = (seed, step), batch, range(step * batch, (step + 1) * batch)

    def normal(self, purpose: str, shape: tuple) -> Tensor:
        return torch.randn(self.batch, *shape, generator=data.generator(*self.key, purpose))

    def uniform(self, purpose: str, shape: tuple = ()) -> Tensor:
        return torch.rand(self.batch, *shape, generator=data.generator(*self.key, purpose))


@torch.no_grad()
def trajectory(velocity: typing.Callable, e: Tensor, steps: int, solver: str = "euler") -> Tensor:
    """Euler steps from noise e (B, D) at t = 1 to data at t = 0, jumps of a flow map: all states (steps + 1, B, D).

    solver "renoise", for consistency models: each step goes to the data, and back to its end with new noise.
    """
    states = [e]
    for k in range(steps):
        t, r = (torch.full((len(e),), 1 - i / steps, dtype=e.dtype) for i in (k, k + 1))
        end = torch.zeros_like(r) if solver == "renoise" else r
        x = states[-1] - beside(t - end, e) * velocity(states[-1], t, None, end)
        n = torch.randn(e.shape, generator=data.generator("renoise points", k)).to(e)
        states.append(interpolate(x, n, r) if solver == "renoise" else x)
    return torch.stack(states)


@torch.no_grad()
def point_errors(net, mixture: Mixture, steps: int = 50, solver: str = "euler", n: int = 4000) -> dict:
    """Errors against the closed form of 1-D data: n samples by `steps` steps of a solver of `trajectory`.

    velocity: rms over (x_t, t). map: rms to the exact flow map of the same noises. W1: to the exact quantiles. weight:
    largest error of a mode's share, by the nearest mean. in mode: share within 3 deviations of it.
    """
    x, _ = mixture.sample(n, data.generator("evaluate points"))
    u = (torch.arange(n) + 0.5) / n
    e = torch.special.ndtri(u)[:, None]
    t = u[torch.randperm(n, generator=data.generator("evaluate times"))]
    x_t = interpolate(x, e[torch.randperm(n, generator=data.generator("evaluate noise"))], t)
    made, exact = trajectory(net, e, steps, solver)[-1], exact_samples(mixture, n)
    velocity = (net(x_t, t, None, t) - mixture.velocity(x_t, t)).square().mean().sqrt().item()
    away = (made - mixture.means.T).abs()                                                          # (n, K)
    share = away.argmin(1).bincount(minlength=len(mixture.weights)) / n
    return {"velocity": velocity, "map": (made - exact).square().mean().sqrt().item(),
            "W1": (made.sort(0).values - exact).abs().mean().item(),
            "weight": (share - mixture.weights).abs().max().item(),
            "in mode": (away / mixture.stds).amin(1).le(3).float().mean().item()}


def exact_velocity(x_t: Tensor, t: Tensor, y=None, r=None) -> Tensor:
    """That of FOUR_MODES, called as a network is."""
    return FOUR_MODES.velocity(x_t, t)


COUNTS = 1, 2, 4, 50  # numbers of network evaluations that are compared


def print_table(runs: dict) -> None:
    """A line for each run: name -> (network, Config, how its method samples)."""
    print(f"{'':>28} {'':>6} {'':>6} {'':>9}  {'rms to the exact map in n steps':^32}  {'W1 in n steps':^32}\n"
          f"{'objective':>28} {'steps':>6} {'batch':>6} {'velocity':>9}  " + 2 * ("".join(f"{n:>8}" for n in COUNTS) + "  ")
          + f"{'weight':>8}{'in mode':>8}  of n")
    for name, (net, cfg, sampling) in runs.items():
        counts = (sampling["steps"],) if "steps" in sampling else COUNTS
        solver = sampling.get("solver", "euler")
        found = {n: point_errors(net, FOUR_MODES, n, solver) for n in counts}
        own, flow = counts[0] if sampling else 50, solver == "euler" and "steps" not in sampling
        cells = {(key, n): errors[key] for n, errors in found.items() for key in ("map", "W1")
                 if key == "W1" or n == 1 or solver == "euler"}  # new noise on the way: no longer the map of the first one
        velocity = found[own]["velocity"] if flow else math.nan
        row = [velocity, *(cells.get((key, n), math.nan) for key in ("map", "W1") for n in COUNTS),
               found[own]["weight"], found[own]["in mode"]]
        text = [f"{value:.3f}" if value == value else "-" for value in row]
        print(f"{name:>28} {cfg.steps:>6} {cfg.batch:>6} {text[0]:>9}  " + "".join(f"{v:>8}" for v in text[1:5]) + "  "
              + "".join(f"{v:>8}" for v in text[5:9]) + "  " + "".join(f"{v:>8}" for v in text[9:]) + f"  {own}")


@functools.lru_cache(maxsize=1)
def exact_samples(mixture: Mixture, n: int) -> Tensor:
    """Where the exact flow map brings the n quantiles of the noise."""
    e = torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None].double()
    return mixture.flow(e, torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))


def draw_trajectories(nets: dict, calls: dict, mixture: Mixture, path: str, lines: int = 60, columns: int = 6) -> None:
    """One panel for the exact flow and one for each network: trajectories (white) over the density of x_t (blue).

    A network that jumps is drawn by straight lines, in as many steps as `calls` has for it.
    """
    w, h, reach, top = 420, 300, 3.0, 22
    columns, rows = min(columns, 1 + len(nets)), -(-(1 + len(nets)) // columns)
    t = torch.linspace(1, 0, w)
    x = torch.linspace(reach, -reach, h)
    density = torch.stack([_density(mixture, x, s) for s in t], 1)
    shade = (density / density.amax(0)).sqrt()[..., None]
    panel = ((1 - shade) * torch.tensor([14, 17, 40]) + shade * torch.tensor([64, 132, 214])).to(torch.uint8).numpy()
    sheet = Image.new("RGB", ((w + 8) * columns + 8, (h + top + 26) * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    e = torch.special.ndtri((torch.arange(lines) + 0.5) / lines)[:, None]
    for k, (name, velocity) in enumerate({"exact flow": exact_velocity, **nets}.items()):
        left, up = 8 + k % columns * (w + 8), top + k // columns * (h + top + 26)
        steps = calls.get(name, 100)
        sheet.paste(Image.fromarray(panel), (left, up))
        pen.text((left, up - 18), f"{name}, {steps} step{'s' * (steps > 1)}", fill="black", font=font)
        pen.text((left, up + h + 4), "t = 1 noise", fill="black", font=font)
        pen.text((left + w - 62, up + h + 4), "t = 0 data", fill="black", font=font)
        states = trajectory(velocity, e, steps)[..., 0]
        for line in states.T:
            points = [(left + s * w / steps, up + (reach - float(v)) / (2 * reach) * h) for s, v in enumerate(line)]
            pen.line(points, fill="white", width=1)
    sheet.save(path)


def _density(mixture: Mixture, x: Tensor, t: Tensor) -> Tensor:
    std = (((1 - t) * mixture.stds) ** 2 + t ** 2).sqrt()
    z = (x[:, None] - (1 - t) * mixture.means[:, 0]) / std
    return (mixture.weights * torch.exp(-z ** 2 / 2) / std).sum(1)


@dataclasses.dataclass
class Options:
    losses: str = option("", "objectives to train, such as fm,afm; empty: all")
    steps: int = option(0, "steps of each; 0: as many as it needs")
    controls: bool = option(False, "also train what lacks an ingredient: afm without transport cost, imf without its head, ..")
    seed: int = option(0, "seed of weights, data and noise")
    out: str = option("losses.png", "the picture to write")


def main(argv: list[str] | None = None) -> None:
    options = data.parse(Options, argv, "Train every objective on a 1-D mixture and compare with the closed form.")
    names = options.losses.split(",") if options.losses else list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        raise ValueError(f"--losses {unknown[0]}: choose from {', '.join(SETTINGS)} (cat needs images: scales)")
    runs = {name: SETTINGS[name] for name in names} | (CONTROLS if options.controls else {})
    trained = {"exact v": (exact_velocity, Config(steps=0, batch=0), {})}
    for name, cfg in runs.items():
        method = name.split(",")[0].split(" ")[0]
        cfg = dataclasses.replace(cfg, seed=options.seed, steps=options.steps or cfg.steps)
        trained[name] = train_points(method, FOUR_MODES, cfg), cfg, LOSSES[method].sampling(dataclasses.asdict(cfg))
    print(f"\n1-D mixture of four modes against its closed form, seed {options.seed} (the columns: see point_errors)")
    print_table(trained)
    calls = {name: sampling.get("steps", 1 if sampling else 100) for name, (*_, sampling) in trained.items()}
    draw_trajectories({name: trained[name][0] for name in names}, calls, FOUR_MODES, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    data.run_cli(main)
