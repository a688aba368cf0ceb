"""Tests of cat, afm_more, classifier, augment, search, presets, schedule, compare and shard.

The runs at the end, resumed and on two processes, are those of distill, sim and dmd, too.
"""
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import losses
import model
import sample
import train
from extras import (afm_more, augment, cat, cat_networks, cat_stages, classifier, compare, presets, repa,
                    schedule, search, shard)
from extras.gaussians import Mixture
from extras.test_core import TWO_MODES, ExactNet, Weighted, constant_G, linear_D, standard_errors
from extras.test_distill import SMALL_FLOW
from extras.test_formats import SMALL_ENCODER
import test_all as core
from test_all import (HERE, SMALL_SET, TINY, TWO, assert_close_runs, assert_same_state, checkpoint, finished,
                      in_float64, logged, quick_draws, raises, run, same, start, tiny, tiny_run)

# ---- CAT: the networks ----


def staged(**options) -> nn.Module:
    return tiny(parts=["cat_networks.Staged"], **options)


def scales(stages=3, encoder_features=0, **options) -> cat_networks.ScaleDiscriminator:
    """A discriminator of scales with random weights everywhere."""
    config = TINY | options | dict(stages=stages, encoder_features=encoder_features)
    return tiny(lambda _: cat_networks.scale_discriminator(config))


def test_cat_stages_accumulate():
    """Stage k is the sum of the first k last layers, which look after floor(k depth / K) blocks; the
    network's jump from noise is the last stage; only the first `latent` numbers of the noise count, up to
    their scale, and the label. Activation checkpointing changes nothing."""
    net = staged(depth=4, stages=3, latent=12).double()
    e, y, one = torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 7]), torch.ones(2).double()
    with torch.no_grad():
        h = net.stages(e, y)
        assert h.shape == (3, 2, 3, 8, 8) and net.ends == [1, 2, 4]
        assert (e - net(e, one, y) - h[-1]).abs().max() < 1e-12
        numbers = e.flatten(1)
        rest = torch.cat([2 * numbers[:, :12], torch.randn(2, 180)], 1).view_as(e)
        assert (net.stages(rest, y) - h).abs().max() < 1e-4 and (net.stages(-e, y) - h).abs().max() > 0.1
        assert (net.stages(e, 9 - y) - h).abs().max() > 0.1
        for k in range(3):
            net.final_layer[k].linear.bias += 1
            moved = net.stages(e, y) - h
            assert (moved - (torch.arange(3) >= k).view(3, 1, 1, 1, 1).double()).abs().max() < 1e-12
            net.final_layer[k].linear.bias -= 1
        net.blocks[2].attn.proj.bias += 1  # the third block, which only the last one sees
        moved = (net.stages(e, y) - h).flatten(1).abs().amax(1)
        assert moved[0] == moved[1] == 0 and moved[2] > 1e-3
    h = net.stages(e, y)
    net.checkpointing = True
    assert torch.equal(net.stages(e, y), h)


def test_cat_scales_do_not_see_each_other(monkeypatch):
    """d logit_k / d image_j is exactly 0 for j != k; and one pass over the tokens of all scales, under a
    block-diagonal mask, gives the same logits."""
    D = scales().double()
    images = [torch.randn(2, 3, side, side).double().requires_grad_() for side in (8, 4, 2)]
    y = torch.tensor([1, 7])
    out = D(images, y)
    assert out.shape == (2, 3) and (D(images, 9 - y) - out).abs().min() > 1e-6
    for k in range(3):
        gradients = torch.autograd.grad(out[:, k].sum(), images, retain_graph=True, materialize_grads=True)
        assert [bool(g.abs().max() > 0) for g in gradients] == [j == k for j in range(3)]
    sizes = [1 + 16, 1 + 4, 1 + 1]
    mask = torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()
    places = [model.position_table(32, side) + scale for side, scale in zip((4, 2, 1), D.scale_embed)]
    tokens = [torch.cat([token.expand(2, 1, -1), D.trunk.x_embedder(x) + place], 1)
              for token, x, place in zip(D.dis_embed, images, places)]
    masked = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask)  # noqa: E731
    monkeypatch.setitem(model.ATTENTION, "fused", masked)
    x = torch.cat(tokens, 1)
    for block in D.trunk.blocks:
        x = block(x, D.norm(D.trunk.y_embedder(y)))
    joint = torch.cat([D.final_layer(part[:, 0]) for part in x.split(sizes, 1)], 1)
    assert (joint - out).abs().max() < 1e-12


def test_cat_is_alive_from_the_start():
    """Fresh weights: z and the label move images about alike, by half of their small size and more; every
    weight has a gradient; D hears more of places than of random pixels."""
    torch.manual_seed(0)
    G = model.create("glyph-S", parts=["cat_networks.Staged"], stages=3)
    D = cat_networks.scale_discriminator(G.config)
    e, y = torch.randn(4, *G.shape), torch.tensor([0, 0, 1, 1])
    h = G.stages(e, y)
    same_z = G.stages(e[:1].expand_as(e), y)
    by_z, by_label, size = ((h[:, 0] - h[:, 1]).std(), (same_z[:, 0] - same_z[:, 2]).std(), h.std())
    assert 0.5 * size < by_z < 1.3 * by_label and 0.5 * size < by_label < 1.3 * by_z and size < 0.2
    out = D([nn.functional.avg_pool2d(x, 2 ** k) for k, x in enumerate(h.flip(0))], y)
    out.square().sum().backward()
    for net in (G, D):
        assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)
    assert D.trunk.x_embedder(torch.randn(2, 3, 32, 32)).std() < 0.3 * D.trunk.pos_embed.std()


def test_cat_mapping_is_slow():
    """Fresh, a SlowLinear gives numbers of the size of its inputs; a step of Adam moves its product by a
    hundredth. The class enters the mapping with as many numbers as z."""
    torch.manual_seed(0)
    layer, x = cat_networks.SlowLinear(64, 64), torch.randn(500, 64)
    assert 0.8 < layer(x).std() < 1.2
    eye = torch.eye(64)
    before = layer(eye).detach() - layer(0 * eye).detach()
    layer(x).square().mean().backward()
    torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=0).step()
    moved = (layer(eye).detach() - layer(0 * eye).detach() - before).abs()
    assert moved.max() < 1.01e-4 and moved.median() > 0.99e-4
    net = staged(stages=2, latent=20)
    assert all(type(net.mapping[k]) is cat_networks.SlowLinear for k in (0, 2))
    assert net.y_embedder(torch.arange(3)).shape == (3, 20)


def test_cat_refuses():
    """Sizes that cannot work are named, and so are models whose tokens are not alike at all scales."""
    raises(lambda: staged(stages=3), "3 stages", "2 to 2")
    raises(lambda: staged(stages=1), "1 stages")
    raises(lambda: staged(stages=2, latent=193), "latent of 193", "1 to 192")
    raises(lambda: scales(stages=4), "8 pixels, halved 3 times", "fewer stages")
    jit = dict(bottleneck=8, context=0, context_start=0, parts=["jit.JiT"])
    raises(lambda: scales(**jit), "--loss cat", "another --model")
    assert model.part("cat_networks.Staged").generator_only and scales(experts=2, parts=["moe.MoE"]).penalties
    assert scales(parts=["cat_networks.Staged"]).trunk.config["parts"] == []


# ---- CAT: the losses ----


class Stages:
    """In place of CAT's generator: these stages, whatever the noise."""

    def __init__(self, h):
        self.h = h

    def stages(self, e, y):
        return self.h


def cat_case(stages=3, n=8, **options) -> tuple:
    """cfg, D, x, y and stages h, in float64."""
    cfg = train.configure("cat", batch=n, stages=stages, **dict(augment=0.0) | options)
    D = scales(input_size=16, stages=stages).double()
    x, *h = torch.randn(1 + stages, n, 3, 16, 16).double()
    return cfg, D, x, torch.arange(n) % 10, torch.stack(h)


def test_cat_values():
    """Stages that equal the data: ln 2 for both players, also augmented, so real and fake are augmented
    alike. Else the mean over scales of softplus, with d from the data and f from the stages, last one
    first, at halved resolutions, and the penalties with their weight."""
    cfg, D, x, y, h = cat_case(gp=0.0, augment=0.7)
    draws = data.Draws(0, range(8))
    assert abs(cat.cat_D(D, x, y, draws, cfg, Stages(x.expand_as(h)))[0] - math.log(2)) < 1e-12
    assert abs(cat.cat_G(Stages(x.expand_as(h)), x, y, draws, cfg, D)[0] - math.log(2)) < 1e-12
    cfg = dataclasses.replace(cfg, augment=0.0, cons=0.3)
    half = lambda x: x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))  # noqa: E731
    real, fake = D([x, half(x), half(half(x))], y), D([h[2], half(h[1]), half(half(h[0]))], y)
    loss, logs = cat.cat_D(D, x, y, draws, cfg, Stages(h))
    assert abs(loss - (1 + (fake - real).exp()).log().mean()) < 1e-12
    assert abs(logs["real"] - real.mean()) < 1e-12
    penalised, _ = cat.cat_D(D, x, y, draws, dataclasses.replace(cfg, gp=0.5), Stages(h))
    assert abs(penalised - loss - 0.5 * (logs["r1"] + logs["r2"])) < 1e-9 * penalised
    assert logs["r1"] != logs["r2"]
    loss, logs = cat.cat_G(Stages(h), x, y, draws, cfg, D)
    assert abs(loss - (1 + (real - fake).exp()).log().mean() - 0.3 * cat_stages.consistency(h, cfg)) < 1e-12
    assert logs.items() >= cat_stages.stage_logs(h).items()


def test_cat_consistency():
    """(1/3 |h1 - h4|^2 + 1/2 |h2 - h4|^2 + |h3 - h4|^2) / 3, zero for equal stages, unmoved by what all
    share. Its gradients sum to 0 over the stages, so the first layer has none; where h4 is detached the
    last one has none. "own" looks at stage k through squares of 2^(K-k) pixels only."""
    h = torch.randn(4, 2, 3, 16, 16).double()
    cfg, own = train.configure("cat"), train.configure("cat", cons_space="own")
    gap = (h[:3] - h[3]).square().mean((1, 2, 3, 4))
    value = cat_stages.consistency(h, cfg)
    assert abs(value - (gap[0] / 3 + gap[1] / 2 + gap[2]) / 3) < 1e-12
    assert cat_stages.consistency(h[:1].expand_as(h), cfg) == 0
    assert abs(cat_stages.consistency(h + h[1], cfg) - value) < 1e-12
    for detach in (False, True):
        layers = h.clone().requires_grad_()
        cat_stages.consistency(layers.cumsum(0), train.configure("cat", cons_detach=detach)).backward()
        sizes = layers.grad.flatten(1).abs().amax(1)
        assert (sizes[0] < 1e-17) == (not detach) and (sizes[3] == 0) == detach and sizes[1:3].min() > 1e-4
    for k in range(3):
        size, moved = 2 ** (3 - k), h[:1].repeat(4, 1, 1, 1, 1)
        checks = torch.ones(16, 16).double()
        checks[:, ::2] = -1  # hidden by squares of 2 and more pixels
        moved[k] += checks
        assert cat_stages.consistency(moved, own) < 1e-25 and cat_stages.consistency(moved, cfg) > 0.1
        moved[k] += (torch.arange(16) // size % 2) - checks  # squares of this very size: all of it is seen
        assert abs(cat_stages.consistency(moved, own) - cat_stages.consistency(moved, cfg)) < 1e-12


def test_cat_pyramid_and_logs():
    """The finest scale is the last stage itself, a constant stays one at all scales, and the last update
    agrees fully with what was still to come. Of stages that are 1, 3 and 0 times one pattern of mean square
    1 every logged number is known: the second goes away from the last. With two stages there is no
    cosine."""
    cfg, draws, h = train.configure("cat", augment=0.0), data.Draws(0, range(2)), torch.randn(3, 2, 3, 16, 16)
    images = cat_stages.pyramid(h, draws, cfg)
    assert torch.equal(images[0], h[2]) and [x.shape[-1] for x in images] == [16, 8, 4]
    assert all((x - 0.3).abs().max() < 1e-6 for x in cat_stages.pyramid(torch.full_like(h, 0.3), draws, cfg))
    found = cat_stages.agreement(h)
    update, rest = (h[1] - h[0]).flatten(1), (h[2] - h[0]).flatten(1)
    assert found.shape == (2,) and abs(found[1] - 1) < 1e-6
    assert abs(found[0] - ((update * rest).sum(1) / update.norm(dim=1) / rest.norm(dim=1)).mean()) < 1e-6
    pattern = torch.randn(2, 3, 4, 4).double()
    pattern /= pattern.square().mean().sqrt()
    h = torch.tensor([1., 3., 0.]).view(3, 1, 1, 1, 1) * pattern
    found = {name: round(value.item(), 9) for name, value in cat_stages.stage_logs(h).items()}
    want = {"discrepancy_1": 1, "discrepancy_2": 9, "rewriting_1": 4, "rewriting_2": 9, "cosine_1": -1}
    assert found == want
    assert list(cat_stages.stage_logs(h[:2])) == ["discrepancy_1", "rewriting_1"]


def test_cat_penalty_and_splits():
    """R1's mean over its noise is sum over scales of |grad D_k|^2 for a linear D, from every fourth sample.
    The loss of a batch is the mean of the losses of its parts: every draw belongs to a sample."""
    n, g = 40_000, [torch.tensor([[[[1.]], [[2.]], [[0.]]]]), torch.tensor([[[[.5]], [[0.]], [[-1.]]]])]
    D = lambda images, y: torch.stack([(x * w).sum((1, 2, 3)) for x, w in zip(images, g)], 1)  # noqa: E731
    images, y = [torch.zeros(n, 3, side, side).double() for side in (2, 1)], torch.zeros(n).long()
    value = cat.scale_flatness(D, images, D(images, y), y, quick_draws(0, n), "R1")
    assert abs(value / (4 * 5 + 1.25) - 1) < 0.04
    few = [x[:2] for x in images]
    assert cat.scale_flatness(D, few, D(images, y)[:2], y[:2], data.Draws(0, [1, 2]), "R1") == 0
    cfg, D, x, y, h = cat_case(augment=0.5, gp=0.5)
    G = staged(input_size=16, depth=3, stages=3).double()
    for loss, nets in ((cat.cat_D, (D, G)), (cat.cat_G, (G, D))):
        def part(a, b):
            return loss(nets[0], x[a:b], y[a:b], data.Draws(0, range(a, b)), cfg, nets[1])[0]

        assert abs(part(0, 8) - (part(0, 2) * 2 + part(2, 8) * 6) / 8) < 1e-9 * part(0, 8)


def test_cat_aligns_its_discriminator(tmp_path):
    """D's tokens of real images at the finest scale are aligned with what the encoder says of what D sees
    of them. A run takes an encoder from a file; stored features go with no augmentation."""
    G, D = staged(stages=2, latent=4), scales(stages=2, encoder_features=12)
    x, y, draws, seen = torch.rand(4, 3, 8, 8), torch.arange(4), data.Draws(0, range(4)), []
    z, cfg = torch.randn(4, 17, 12), train.configure("cat", align=2.0, augment=1.0, batch=4)

    def encoder(images, draws):
        seen.append(images)
        return z

    loss, logs = cat.cat_D(D, x, y, draws, cfg, G, encoder)
    without, _ = cat.cat_D(D, x, y, draws, cfg, G)
    assert abs(loss - without - 2 * logs["misalignment"]) < 1e-5
    real = cat_stages.pyramid(x.expand(2, *x.shape), draws, cfg)
    assert seen[0].equal(real[0]) and not seen[0].equal(x)
    out, tokens = D(real, y, project=True)
    assert tokens.shape == (4, 17, 12) and torch.equal(out, D(real, y))
    assert abs(logs["misalignment"] - repa.misalignment(tokens, z)) < 1e-6
    assert torch.equal(D([real[0], real[1] + 1], y, project=True)[1], tokens)  # the finest scale alone
    position = D.trunk.pos_embed[:, :16] + D.scale_embed[0]
    last = D.trunk.read(D.dis_embed[0], D.trunk.x_embedder(real[0]) + position, D.norm(D.trunk.y_embedder(y)))
    assert (tokens - D.projectors[0](last)).abs().max() < 1e-5 * tokens.square().mean().sqrt()

    out = tmp_path / "run"
    train.train(tiny_run(out, "cat", steps=2, encoder=SMALL_ENCODER, log_every=1))
    assert 0 < logged(out)[0]["misalignment"] < 2 and "misalignment" not in logged(out)[1]
    assert checkpoint(out)["networks"]["D"]["weights"]["projectors.0.4.bias"].shape == (12,)
    train.train(tiny_run(out, "cat", steps=3, encoder=SMALL_ENCODER, resume=True))
    train.train(tiny_run(tmp_path / "off", "cat", steps=1, encoder=SMALL_ENCODER, align=0.0))
    assert not [k for k in checkpoint(tmp_path / "off")["networks"]["D"]["weights"] if "projectors" in k]
    stored = data.dataset(str(SMALL_SET), 32)
    stored.features = (17, 12)
    raises(lambda: cat.encoder_of(train.configure("cat", augment=0.5), stored), "--augment 0.5", "--align 0")
    assert cat.encoder_of(train.configure("cat", augment=0.5, align=0.0), stored) is None


def test_cat_is_one_pass_of_stages(tmp_path, capsys):
    """A cat run samples in one call, whose result is the last stage; `python -m extras.cat` draws all of
    them; --init takes the generator of another cat run and leaves D fresh; what cannot be is refused."""
    out, picture = tmp_path / "run", tmp_path / "stages.png"
    train.main(f"--loss cat --out {out} --data {SMALL_SET} --steps 2 --batch 8 --score 0 --sample_every 0 "
               f"--device cpu".split())
    config = checkpoint(out)["config"]
    expected = dict(beta1=0.0, beta2=0.99, label_drop=0.0, lr=4e-4, gp=0.003, augment=1.0, decay="constant")
    assert {key: config[key] for key in expected} == expected
    assert train.learning_rate(999, train.configure("cat"), "D") == 1e-3
    net, labels = model.load(out / "last.pt"), sample.labels_for(3, 10)
    (_, fake), = sample.generate(net, labels, 5, steps=1, solver="euler")
    with torch.no_grad():
        h = net.stages(data.Draws(5, range(3)).normal("sample noise", net.shape), labels)
    assert (data.to_uint8(h[-1]).int() - fake.int()).abs().max() <= 1
    capsys.readouterr()
    cat_stages.main([str(out), "--n", "3", "--seed", "5", "--out", str(picture)])
    assert "3 stages" in capsys.readouterr().out
    shown = np.asarray(Image.open(picture)).transpose(2, 0, 1)[:, 2:66:2, 134:198:2]  # first row, last tile
    assert np.array_equal(shown, data.to_uint8(h[-1, :1]).numpy()[0])

    def run(name="no", loss="cat", **options):
        train.train(tiny_run(tmp_path / name, loss, **dict(model="glyph-S") | options))

    run("fm", "fm", steps=1)
    raises(lambda: cat_stages.main([str(tmp_path / "fm"), "--out", str(picture)]), "--loss cat", "DiT")
    raises(lambda: cat_stages.main([str(out), "--out", "a.npz"]), "a.npz")
    raises(lambda: sample.main([str(out), "--steps", "4"]), "--steps 4", "it is 1")
    run("more", steps=1, lr=1e-9, init=str(out))
    more, before = checkpoint(tmp_path / "more")["networks"], checkpoint(out)
    assert all((more["G"]["weights"][k] - v).abs().max() < 1e-7 for k, v in before["ema"].items())
    assert not torch.equal(more["D"]["weights"]["dis_embed"], before["networks"]["D"]["weights"]["dis_embed"])
    raises(lambda: run(stages=1), "--stages 1")
    raises(lambda: run(augment=1.5), "--augment 1.5")
    raises(lambda: run(stages=4), "halved 3 times", "fewer stages")
    raises(lambda: run("run", resume=True, stages=2), "--stages 3")
    raises(lambda: run(init=str(tmp_path / "fm")), "weights of another network")
    cat_networks.main([])
    assert "moved by" in capsys.readouterr().out


# ---- Augmentation ----


def test_augment(tmp_path, capsys):
    """Nothing at p = 0; all stages of a sample are changed alike and samples differently; with probability
    p; brightness within 0.5, shifts within an eighth, holes of half the side; the same for a sample in any
    batch."""
    n = 400
    x = torch.arange(1, 257.).view(1, 1, 1, 16, 16).repeat(2, n, 3, 1, 1) * 1000
    x[1] += 1e7
    draws = data.Draws(0, range(n))
    assert augment.augment(x, draws, 0.0) is x
    seen = augment.augment(x, draws, 0.5)
    there = seen.abs() > 600
    assert torch.equal(there[0], there[1])
    assert torch.allclose((seen[1] - seen[0])[there[0]], torch.tensor(1e7), atol=2)
    assert torch.equal(seen[:, 3:7], augment.augment(x[:, 3:7], data.Draws(0, range(3, 7)), 0.5))
    whole = augment.augment(torch.zeros(1, n, 3, 16, 16), draws, 0.5)[0]
    light = whole.flatten(1)[torch.arange(n), whole.flatten(1).abs().argmax(1)]
    assert 0.4 < light.ne(0).float().mean() < 0.6 and 0.45 < light.abs().max() <= 0.5
    always = augment.augment(x, draws, 1.0)[0, :, 0]
    inside = (always > 600).float()
    assert inside.mean() < 0.85 and len({tuple(row.tolist()) for row in inside.flatten(1)}) > 300
    source = always.div(1000).round().long() - 1                       # where a pixel came from
    here = torch.arange(256).view(16, 16)
    down, right = ((source // 16 - here // 16)[inside > 0], (source % 16 - here % 16)[inside > 0])
    assert set(zip(down.tolist(), right.tolist())) == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    holes = augment.augment(torch.full((1, n, 1, 16, 16), 9.), draws, 1.0)[0, :, 0, 2:14, 2:14].abs() < 1
    assert holes.any(2).sum(1).max() <= 9 and holes.any(1).sum(1).max() <= 9 and holes.sum((1, 2)).max() >= 64
    augment.main([str(SMALL_SET), "--out", str(tmp_path / "seen.png")])
    assert "40 images" in capsys.readouterr().out and Image.open(tmp_path / "seen.png").size == (662, 530)
    raises(lambda: augment.main([str(SMALL_SET), "--augment", "-1"]), "--augment -1")


# ---- AFM: deep, guided, augmented ----


@torch.no_grad()
def test_afm_deep_generator():
    """R passes through one stack: the k-th sees the time 1 - k / R, the last layer no time; R = 1 is the
    plain network at time 1 but for that. R adds no weights; a flow's weights start it, those of its time
    for the passes."""
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 5]), torch.rand(2)
    plain = tiny()
    for R in (1, 2, 3):
        deep = tiny(times=0, repeats=R, parts=["afm_more.Deep"])
        deep.load_state_dict(deep.inherit(plain))
        assert deep.state_dict().keys() == plain.state_dict().keys()
        assert same(deep.state_dict(), plain.state_dict())
        assert same(deep.inherit(deep), deep.state_dict())
        c, tokens = plain.y_embedder(y), plain.x_embedder(x) + plain.pos_embed
        for k in range(R):
            for block in plain.blocks:
                tokens = block(tokens, c + plain.t_embedder(torch.full((2,), 1 - k / R)))
        assert torch.allclose(deep(x, t, y), plain.unpatchify(plain.final_layer(tokens, c)), atol=1e-5), R
    one = tiny(times=0, repeats=1, parts=["afm_more.Deep"])
    one.load_state_dict(plain.state_dict())
    for net in (one, plain):
        net.final_layer.adaLN_modulation[1].weight.zero_()  # a last layer that sees no condition
    assert torch.allclose(one(x, t, y), plain(x, torch.ones(2), y), atol=1e-5)
    raises(lambda: tiny(times=1, repeats=2, parts=["afm_more.Deep"]), "repeats 2", "times 1")
    raises(lambda: tiny(times=0, repeats=0, parts=["afm_more.Deep"]), "repeats 0")
    jit = dict(parts=["jit.JiT", "afm_more.Deep"], bottleneck=8, context=2, context_start=0)
    raises(lambda: tiny(times=0, repeats=2, **jit), "tokens of the class", "another --model")


def afm_settings(**changes) -> train.Config:
    return train.configure("afm_more", **dict(batch=64, steps=10_001) | changes)


def test_afm_more_without_more_is_afm():
    """With no classifier and no augmentation both players have the losses and logs of the core's afm."""
    x, y, draws = torch.randn(8, 3, 8, 8), torch.arange(8), data.Draws(0, range(8))
    for nfe in (1, 2, 0):
        cfg = afm_settings(nfe=nfe)
        G, D = tiny(times=losses.times_of(nfe)), tiny(model.discriminator, times=min(1, losses.times_of(nfe)))
        assert same(afm_more.afm_more_D(D, x, y, draws, cfg, G), losses.afm_D(D, x, y, draws, cfg, G))
        assert same(afm_more.afm_more_G(G, x, y, draws, cfg, D), losses.afm_G(G, x, y, draws, cfg, D))


def test_afm_rates_follow_the_number_of_jumps():
    """Several jumps have slower rates, from code and from the command line, unless rates are given."""
    for nfe, *want in ((1, 6e-5, 2e-3), (2, 3e-5, 1e-3), (4, 1.5e-5, 1e-3), (0, 6e-6, 1e-3)):
        for loss in ("afm", "afm_more"):
            made = train.configure(loss, nfe=nfe), train.read_settings(["--loss", loss, f"--nfe={nfe}"])
            assert all((cfg.lr, cfg.d_lr, cfg.nfe) == (*want, nfe) for cfg in made), (loss, nfe)
    made = train.configure("afm", nfe=2, lr=7e-5), train.read_settings("--loss afm --nfe 2 --lr 7e-5".split())
    assert all((cfg.lr, cfg.d_lr) == (7e-5, 1e-3) for cfg in made)


def test_afm_augments_pairs_alike():
    """Where jumps end at the data themselves D cannot tell, also through augmentation: ln 2 for both; D
    does see it, and the transport cost does not."""
    x, y, draws = torch.randn(8, 3, 16, 16).double(), torch.arange(8), data.Draws(0, range(8))
    D = tiny(model.discriminator, input_size=16).double()
    cfg = afm_settings(augment=0.8, gp=0.0, cp=0.0, ot=0.7, ot_end=0.7)
    e = draws.normal("noise", x.shape[1:])
    G = lambda x_s, s, y, r: x_s - x  # noqa: E731
    loss, logs = afm_more.afm_more_D(D, x, y, draws, cfg, G)
    seen = D(augment.augment(x[None], draws, 0.8)[0], torch.zeros(8), y).mean()
    assert abs(loss - math.log(2)) < 1e-6 and abs(logs["real"] - seen) < 1e-9
    assert abs(logs["real"] - D(x, torch.zeros(8), y).mean()) > 1e-3
    loss, logs = afm_more.afm_more_G(G, x, y, draws, cfg, D)
    assert abs(logs["adversarial"] - math.log(2)) < 1e-6
    assert abs(loss - math.log(2) - 0.7 * (x - e).square().mean()) < 1e-6
    _, logs = afm_more.afm_more_G(lambda x_s, s, y, r: x_s, x, y, draws, cfg, D)
    seen = [D(augment.augment(image[None], draws, 0.8)[0], torch.zeros(8), y) for image in (x, 0 * x)]
    assert abs(logs["adversarial"] - nn.functional.softplus(seen[0] - seen[1]).mean()) < 1e-6


def test_afm_guide():
    """One-step jumps are noised to a time below cg_time and judged there; others are judged where they end,
    if r < 0.5."""
    n, W = 64, torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    fake, y, draws, seen = torch.randn(n, 2), torch.arange(n) % 10, quick_draws(0, n), []

    def C(x_t, t):
        seen.append((x_t, t))
        return x_t @ W + t[:, None] * torch.arange(10)

    surprise = lambda logits: logits.logsumexp(1) - logits[torch.arange(n), y]  # noqa: E731
    r = torch.arange(n) % 4 / 4
    value = afm_more.guide(C, fake, r, y, draws, afm_settings(nfe=4))
    assert torch.equal(seen[0][0], fake) and torch.equal(seen[0][1], r)
    assert abs(value - (surprise(C(fake, r)) * torch.tensor([1., 1, 0, 0]).repeat(16)).mean()) < 1e-5
    seen.clear()
    value = afm_more.guide(C, fake, 0 * r, y, draws, afm_settings(nfe=1, cg_time=0.3))
    (x_t, t), = seen
    assert 0 <= t.min() < 0.05 and 0.25 < t.max() <= 0.3 and abs(value - surprise(C(x_t, t)).mean()) < 1e-5
    noise = (x_t - (1 - t[:, None]) * fake) / t[:, None]
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2
    assert not torch.equal(noise[:, 0], noise[:, 1])
    (G, _), (D, _), x = constant_G(), linear_D(), torch.randn(n, 2)
    cfg = afm_settings(cg=0.5, cg_time=0.3)
    without, logs = afm_more.afm_more_G(G, x, y, draws, cfg, D)
    loss, more = afm_more.afm_more_G(G, x, y, draws, cfg, D, C)
    assert abs(loss - without - 0.5 * more["surprise"]) < 1e-6 < 0.1 < more["surprise"]
    assert "surprise" not in logs


def test_afm_more_runs(tmp_path, capsys):
    """--repeats: a deep generator at a fraction of the learning rate, with an ordinary D. --classifier: a
    frozen guide, from a run that makes no images, which chooses noises as well. What cannot be is
    refused."""
    def run(name, loss="afm_more", **options):
        train.train(tiny_run(tmp_path / name, loss, **dict(steps=2) | options))

    run("deep", repeats=3)
    deep = {role: saved["config"] for role, saved in checkpoint(tmp_path / "deep")["networks"].items()}
    assert deep["G"]["repeats"] == 3 and deep["D"]["parts"] == []
    assert deep["D"]["times"] == 0 and deep["D"]["norm"] == "layer"
    assert model.load(tmp_path / "deep/last.pt").repeats == 3
    cfg = tiny_run("", "afm_more", lr=0.3, d_lr=0.0, repeats=3, warmup=0)
    assert train.learning_rate(5, cfg) == 0.3 / 3 and train.learning_rate(5, cfg, "D") == 0.3
    raises(lambda: run("deep", repeats=2, steps=3, resume=True), "--repeats 3")
    run("flow", "fm", predict="v")
    run("from", init=str(tmp_path / "flow"), predict="v", lr=1e-9, steps=1, repeats=2)
    deep = model.load(tmp_path / "from/last.pt", weights="last").state_dict()
    assert all((deep[k] - ema).abs().max() < 1e-8 for k, ema in checkpoint(tmp_path / "flow")["ema"].items())

    run("judge", "classifier", score=10)
    assert not (tmp_path / "judge/samples/final.png").exists()
    assert "scores" not in json.loads((tmp_path / "judge/final.json").read_text())
    raises(lambda: sample.main([str(tmp_path / "judge")]), "judge", "makes no images")
    run("guided", classifier=str(tmp_path / "judge"), log_every=1)
    assert {row["role"]: "surprise" in row for row in logged(tmp_path / "guided")} == {"D": False, "G": True}
    cfg = tiny_run("", "afm_more", classifier=str(tmp_path / "judge"))
    C, = afm_more.inputs("G", cfg, None, model.load(tmp_path / "flow/last.pt"))
    assert not any(p.requires_grad for p in C.parameters()) and not C.training
    assert same(C.state_dict(), checkpoint(tmp_path / "judge")["ema"])
    raises(lambda: run("no", classifier=str(tmp_path / "deep")), "--classifier", "--loss classifier")
    raises(lambda: run("no", classifier=str(tmp_path / "absent")), "absent")
    raises(lambda: run("no", classifier=str(tmp_path / "judge"), net="num_classes=9"), "10 classes", "9")
    raises(lambda: run("no", nfe=2, repeats=2), "--nfe 2 --repeats 2", "single jump")
    raises(lambda: run("no", accumulation=2), "--accumulation 1")
    raises(lambda: run("no", augment=2.0), "--augment 2.0")
    capsys.readouterr()
    afm_more.main(["SiT-S/2"])
    assert re.search(r"repeats +2 +24 +\d+", capsys.readouterr().out)


# ---- The classifier ----


def test_classifier_network(tmp_path):
    """Fresh, it knows nothing and can learn; it looks at the image and at t; names are the official ones.
    JiT's tokens of the class, which would give the answer away, are left out; LiT's attention takes no
    further token."""
    torch.manual_seed(0)
    fresh = model.create("glyph-S", parts=["classifier.Classifier"])
    x, t, y = torch.randn(4, 3, 32, 32), torch.rand(4), torch.arange(4)
    logits = fresh(x, t)
    assert logits.shape == (4, 10) and (logits - logits[:1]).abs().max() < 1e-6
    nn.functional.cross_entropy(logits, y).backward()
    assert fresh.blocks[0].adaLN_modulation[1].weight.grad.norm() > 1e-3
    names = set(fresh.state_dict()) - set(model.create("glyph-S").state_dict())
    assert names == {"cls_embed", "final_layer.1.weight", "final_layer.1.bias"}
    assert not hasattr(fresh, "y_embedder")
    net, x = tiny(parts=["classifier.Classifier"]), x[:, :, :8, :8]
    assert not torch.allclose(net(x, t), net(x, 1 - t)) and not torch.allclose(net(x, t), net(x + 1, t))
    source = data.dataset(str(SMALL_SET), 32)
    jit = tiny_run(tmp_path, "classifier", model="JiT-S/16", net="width=48 depth=2 heads=2 context_start=0")
    with torch.device("meta"):
        assert train.build(jit, source).extra_tokens == 0
    raises(lambda: train.check(tiny_run(tmp_path, "classifier", model="LiT-S/2")), "LiT-S/2", "SiT")


def test_classifier_reaches_the_posterior(tmp_path, capsys):
    """The mean gradient is 0 at the exact posterior of x_t, and is not at that of another mixture. It is
    told whether the label was found; the command tells how often, by time."""
    def posterior(mixture):
        """The exact log p(y | x_t) of a mixture, and a few weighted features of one class more, at weight
        0."""
        def features(x, t):
            return torch.ones_like(t), x[:, 0], x[:, 0] * t, (2 * x[:, 0]).sin(), (3 * x[:, 0]).cos()

        def net(x_t, t):
            extra = torch.tensordot(net.weight, torch.stack([f.double() for f in features(x_t, t)]), 1)
            logits = mixture.components(x_t.double(), t.double())[0]
            return logits + torch.stack([extra, 0 * t], 1)

        net.weight = Weighted(features).weight
        return net

    def errors(mixture):
        def loss(k):
            x, y = TWO_MODES.sample(2000, data.generator("classifier oracle", k))
            cfg = train.configure("classifier", augment=0.0)
            return classifier.classifier(net, x, y, quick_draws(k, 2000), cfg)[0]
        net = posterior(mixture)
        return standard_errors(loss, net)

    assert errors(TWO_MODES) < 4 and errors(dataclasses.replace(TWO_MODES, means=0.7 * TWO_MODES.means)) > 8
    x, y = TWO_MODES.sample(500, data.generator("classifier accuracy"))
    cfg = train.configure("classifier", time="logit_normal", time_mean=-3.0, time_std=1.0, augment=0.0)
    loss, logs = classifier.classifier(posterior(TWO_MODES), x, y, quick_draws(0, 500), cfg)
    assert loss < 0.05 and logs["accuracy"] > 0.98
    _, logs = classifier.classifier(posterior(TWO_MODES), x, 1 - y, quick_draws(0, 500), cfg)
    assert logs["accuracy"] < 0.02
    found = classifier.accuracies(posterior(TWO_MODES), x, y, torch.tensor([0.0, 1.0]))
    assert found[0] > 0.98 and 0.4 < found[1] < 0.6
    train.train(tiny_run(tmp_path / "judge", "classifier", steps=1))
    train.train(tiny_run(tmp_path / "fm", steps=1))
    classifier.main([str(tmp_path / "judge"), "--n", "20"])
    assert re.search(r"t = 0.5 +0\.\d+", capsys.readouterr().out)
    raises(lambda: classifier.main([str(tmp_path / "fm")]), "DiT", "--loss classifier")


# ---- Search ----


def quantile_noise(n: int) -> torch.Tensor:
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


class Width(nn.Module):
    """The exact velocity of TWO_MODES with deviations `factor` times as large, as a network of points."""
    shape, state, num_classes, null_class = (1,), (1,), 2, False

    def __init__(self, factor):
        super().__init__()
        self.mixture, self.calls = dataclasses.replace(TWO_MODES, stds=factor * TWO_MODES.stds), 0

    def forward(self, x_t, t, y, r=None):
        self.calls += 1
        return self.mixture.velocity(x_t, t.double(), y)


def test_search_stitching():
    """Shares 0 and 1 are one network alone; between, each is called for its part of the way. A small
    network that has the modes 1.6 times too wide does no harm up to 0.4, and more and more beyond."""
    e, y, stds = quantile_noise(400), torch.zeros(400, dtype=torch.int64), {}
    for share in (0, .2, .4, .6, .8, 1):
        large, small = Width(1.0), Width(1.6)
        x = sample.sample(search.Stitched(large, small, share), e, y, 50)
        assert (large.calls, small.calls) == (50 - round(50 * share), round(50 * share))
        stds[share] = x.std().item()
    alone = sample.sample(Width(1.0), e, y, 50)
    assert torch.equal(sample.sample(search.Stitched(Width(1.0), Width(1.6), 0), e, y, 50), alone)
    assert abs(stds[0.4] / stds[0] - 1) < 0.1 and stds[0] < stds[.4] < stds[.6] < stds[.8] < stds[1], stds
    assert stds[1] > 1.5 * stds[0]
    raises(lambda: search.Stitched(Width(1), Width(1), 1.5), "share 1.5")
    raises(lambda: search.Stitched(Width(1), tiny(), 0.5), "same data")


def test_search_noise():
    """More noises, better scores, from the sample's own noise on; a step nearby never makes it worse and
    keeps the noise normal; samples do not look at each other."""
    y, draws = torch.zeros(2000, dtype=torch.int64), data.Draws(0, range(2000))
    make, verifier = lambda e, y: 2 * e + 1, lambda x, y: -(x[:, 0] - 1.5).square()  # noqa: E731
    found = {n: search.best_of(n, make, verifier, y, draws, (1,)) for n in (1, 2, 4, 16)}
    scores = [verifier(make(e, y), y).mean().item() for e in found.values()]
    assert torch.equal(found[1], draws.normal("sample noise", (1,)))
    assert scores == sorted(scores) and scores[-1] > scores[0] / 50
    assert torch.equal(found[4][7:9], search.best_of(4, make, verifier, y[7:9], data.Draws(0, [7, 8]), (1,)))
    e = found[1]
    before = verifier(make(e, y), y)
    for rounds in (1, 10):
        moved = search.search_nearby(rounds, 0.5, e, make, verifier, y, draws)
        after = verifier(make(moved, y), y)
        assert (after >= before).all() and after.mean() > before.mean()
        before = after

    def moves(x, y):
        return torch.full((len(x),), float((x != make(e, y)).any()))

    free = search.search_nearby(1, 0.5, e, make, moves, y, draws)
    assert abs(free.std() - 1) < 0.05 and abs((free * e).mean() - math.sqrt(0.75)) < 0.05


def test_search_classify():
    """The diffusion classifier with exact velocities of two overlapping Gaussians: mostly the exact answer,
    more so with more pairs, which are the same for every class."""
    half = torch.tensor([.5, .5]).double()
    mixture = Mixture(torch.tensor([[-.5], [.5]]).double(), half, half)
    net = lambda x_t, t, y, r=None: mixture.velocity(x_t, t, y)  # noqa: E731
    x, _ = mixture.sample(1500, data.generator("classify"))
    draws, right = data.Draws(0, range(1500)), (x[:, 0] > 0).long()
    agree = {k: (search.classify(net, x, draws, 2, k).argmax(1) == right).double().mean() for k in (2, 4, 16)}
    assert 0.8 < agree[2] < agree[4] < agree[16] and agree[16] > 0.94, agree
    swapped = search.classify(lambda x_t, t, y: net(x_t, t, 1 - y), x, draws, 2, 4)
    assert torch.equal(swapped.flip(1), search.classify(net, x, draws, 2, 4))


def test_search_times():
    """Four steps found by search come nearer to the exact end than four even ones; the ends stay, times
    fall, a seed gives one answer."""
    e, y = quantile_noise(100), torch.zeros(100, dtype=torch.int64)
    velocity = sample.guided(ExactNet(TWO_MODES))
    make = lambda times: sample.euler(velocity, e, y + 2, times)  # noqa: E731
    exact = TWO_MODES.flow(e, torch.ones(100).double(), torch.zeros(100).double())
    even = sample.time_grid(4)
    found = search.search_times(make, exact, even, rounds=12)
    assert found[0] == 1 and found[-1] == 0 and found == sorted(found, reverse=True) and len(found) == 5
    assert (make(found) - exact).square().mean() < 0.9 * (make(even) - exact).square().mean()
    assert found == search.search_times(make, exact, even, rounds=12)


def test_search_command(tmp_path, capsys):
    """The best of three noises pleases the classifier more than the first; a stitched run says so; what
    cannot be is refused."""
    for name, loss in (("any", "afm"), ("judge", "classifier"), ("small", "fm"), ("large", "fm")):
        train.train(tiny_run(tmp_path / name, loss, steps=2, **dict(nfe=0, lr=0.1) if loss == "afm" else {}))
    capsys.readouterr()
    judge, anyone = str(tmp_path / "judge"), str(tmp_path / "any")
    flags = [anyone, "--steps", "1", "--n", "6", "--device", "cpu"]
    search.main([*flags, "--best_of", "3", "--verifier", judge, "--out", str(tmp_path / "best.npz")])
    assert f"best of 3 noises by {judge}" in capsys.readouterr().out
    sample.main([*flags, "--out", str(tmp_path / "first.npz")])
    C, score = model.load(tmp_path / "judge/last.pt"), {}
    for name in ("best", "first"):
        with np.load(tmp_path / f"{name}.npz") as file, torch.no_grad():
            x = data.to_float(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))
            score[name] = -nn.functional.cross_entropy(C(x, torch.zeros(6)), torch.from_numpy(file["arr_1"]))
    assert score["best"] > score["first"]
    raises(lambda: search.main([*flags, "--best_of", "3"]), "--best_of 3", "both")
    raises(lambda: search.main([*flags, "--verifier", judge]), "--best_of 1", "both")
    raises(lambda: search.main([*flags, "--best_of", "3", "--verifier", anyone]), "--verifier", "DiT")
    search.main(f"{tmp_path / 'large'} --steps 4 --n 2 --stitch {tmp_path / 'small'} --device cpu "
                f"--out {tmp_path / 'a.png'}".split())
    assert "those at t > 0.6 of" in capsys.readouterr().out
    search.main(f"{tmp_path / 'large'} --steps 2 --n 2 --solver sde --best_of 2 --verifier {judge} "
                f"--device cpu --out {tmp_path / 'a.png'}".split())  # noise on the way, too
    assert "best of 2" in capsys.readouterr().out


# ---- Presets, schedules, comparisons ----


def test_presets(tmp_path, capsys, monkeypatch):
    """Each preset fits its network and objective, and sets all that the objective has defaults of its own
    for, made for glyphs: shared settings and its flags, but for files. It stands behind flags, and is printed
    with its source; a small run with one of them trains."""
    for name, (source, settings) in presets.PRESETS.items():
        cfg = train.configure(**settings)
        train.check(cfg)
        own, files = losses.find(cfg.loss), {"d_init", "encoder", "classifier"}
        unused = {"time_mean", "time_std"} if cfg.time == "uniform" else set()
        made_for_glyphs = {*own.defaults, *(own.scratch or {}), *own.flags} - files - unused
        assert "arXiv:" in source and settings.keys() >= made_for_glyphs, (name, made_for_glyphs)
        if cfg.loss not in ("repa", "reg"):  # whose networks ask an encoder
            options = losses.find(cfg.loss).network(cfg, None)
            options |= dict(predict=cfg.predict) if cfg.predict else {}
            with torch.device("meta"):
                net = model.create(cfg.model, **options)
            x = cfg.model.startswith("JiT") or "1nfe" in name or "layer" in name
            assert net.predict == ("x" if x else "v"), name
    cfg = train.configure(**presets.settings("cafm-sit-xl2"))
    turns = [losses.find("cafm").turn(step, cfg) for step in range(cfg.steps)]
    assert turns.count("G") == 2353 and train.learning_rate(20, cfg, "D") == 1e-5
    small = dict(patch=8, width=32, depth=3, heads=2, context_start=1)
    monkeypatch.setitem(model.ZOO, "JiT-B/16", model.ZOO["JiT-B/16"] | small)
    presets.main(f"jit-b16-imagenet256 --data {SMALL_SET} --size 32 --batch 4 --steps 1 --device cpu "
                 f"--sample_steps 1 --out {tmp_path / 'run'}".split())
    out, config = capsys.readouterr().out, checkpoint(tmp_path / "run")["config"]
    assert "JiT, arXiv:2511.13720" in out and "--lr 0.0002" in out and "--batch 4" in out
    want = dict(beta2=0.95, batch=4, ema=0.9999, time_mean=0.8)
    assert {k: config[k] for k in want} == want
    raises(lambda: presets.main(["dit"]), "preset dit", "cafm-sit-xl2")
    capsys.readouterr()
    split = ["afm-xl2-1nfe", "--accumulation", "2", "--device", "cpu"]
    raises(lambda: presets.main(split), "--accumulation 2")
    assert "--lr 0.0001" in capsys.readouterr().out
    presets.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in presets.PRESETS)


def test_schedule(tmp_path, capsys):
    """Entries change settings from their step on; ema_reload puts the averaged weights into G; d_reload
    brings back D as it was kept. A run resumed amid all this equals one that was not stopped, and so does
    one that was killed before the change of a checkpoint. What cannot be read or done is refused."""
    entries = schedule.read_schedule("4: lr=0.5 ot=0.3, ot_end=0.3; 2: lr=0.2")
    cfg = tiny_run("", "afm", lr=1.0, warmup=0, ot=0.1, ot_end=0.1)
    now = [schedule.settings_at(entries, k, cfg)[0] for k in range(6)]
    assert [train.learning_rate(k, at) for k, at in enumerate(now)] == [1, 1, .2, .2, .5, .5]
    assert [(at.ot, at.ot_end) for at in now] == 4 * [(0.1, 0.1)] + 2 * [(0.3, 0.3)]
    assert [schedule.next_change(entries, k, cfg) for k in (0, 2, 3, 4)] == [2, 4, 4, 10]
    reload = schedule.read_schedule("3: ema_reload=2; 6: ema_reload=0")
    assert [schedule.next_change(reload, k, cfg) for k in (0, 3, 4, 6)] == [3, 4, 6, 10]

    options = dict(steps=8, keep_every=2, lr=1e-3, log_every=1, ot=0.1, ot_end=0.1)
    text = "3: lr=2e-3; 6: d_reload=4 ema_reload=8 d_lr=1e-12"
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert schedule.run(tiny_run(a, "afm", **options), text)["steps"] == 8
    assert sorted(p.name for p in a.glob("step_*.pt")) == [f"step_000000{k}.pt" for k in (2, 4, 6, 8)]
    kept = [torch.load(a / f"step_000000{k}.pt", weights_only=True) for k in (4, 6, 8)]
    D = [k["networks"]["D"]["weights"]["dis_embed"] for k in kept]
    assert torch.allclose(D[2], D[0], atol=1e-9) and (D[1] - D[0]).abs().max() > 1e-4
    G = [k["networks"]["G"]["weights"] for k in kept]
    assert same(G[2], kept[2]["ema"]) and not same(G[1], kept[1]["ema"])
    assert same(kept[2]["networks"], checkpoint(a)["networks"]) and not list(a.glob("*.tmp"))
    rates = {(row["step"], row["role"]): row["lr"] for row in logged(a)}
    assert rates[2, "G"] == 1e-3 and rates[4, "G"] == rates[5, "D"] == 2e-3 and rates[7, "D"] == 1e-12

    schedule.run(tiny_run(b, "afm", **options | dict(steps=5)), text.split(";")[0])
    schedule.run(tiny_run(b, "afm", resume=True, **options), text)
    assert_same_state(a, b)
    cfg = tiny_run(c, "afm", **options)
    train.train(cfg, until=3)                                             # as the first segment
    train.train(dataclasses.replace(cfg, lr=2e-3, resume=True), until=6)  # killed here: D is not changed yet
    (c / "schedule.txt").write_text(text + "\n")
    schedule.main(["--resume", "--out", str(c)])
    assert_same_state(a, c)
    assert model.load(a / "step_0000004.pt").times == 0

    def run(text, loss="afm", **more):
        schedule.run(tiny_run(tmp_path / "no", loss, **more), text)

    raises(lambda: run("4 lr=1"), "'4 lr=1'", "STEP: NAME=VALUE")
    raises(lambda: run("4: lr=x"), "lr=x")
    raises(lambda: run("4: model=2"), "model", "ot_end", "d_reload")
    raises(lambda: run("4: ot=2", "fm"), "ot", "lr")
    raises(lambda: run("4: d_reload=2"), "d_reload=2", "--keep_every (0)")
    raises(lambda: run("4: d_reload=6", keep_every=2), "step 6 is not kept before step 4")
    raises(lambda: run("4: d_reload=2", "fm", keep_every=2), "no discriminator")
    raises(lambda: run("4: augment=2", "cat"), "--augment 2.0")
    assert not (tmp_path / "no").exists()
    raises(lambda: schedule.main(["--out", str(tmp_path / "no")]), "which schedule", "schedule.txt")
    capsys.readouterr()
    schedule.main([])
    assert "ema_reload=N" in capsys.readouterr().out


def test_schedule_stops(tmp_path, monkeypatch):
    """A signal ends the run, also in the last step of a segment; nothing is changed then, and --resume goes
    on."""
    monkeypatch.setattr(train.StopSignal, "on_any_process", lambda self: stops.pop())
    stops, cfg = [True, False, False], tiny_run(tmp_path, "afm", steps=6)
    assert schedule.run(cfg, "3: ema_reload=3") is None and checkpoint(tmp_path)["step"] == 3
    stops[:] = 3 * [False]
    assert schedule.run(dataclasses.replace(cfg, resume=True), "3: ema_reload=3")["steps"] == 6
    assert same(checkpoint(tmp_path)["networks"]["G"]["weights"], checkpoint(tmp_path)["ema"])


def test_compare(tmp_path, capsys, monkeypatch):
    """Each objective is trained in a folder of its own, scored where it can be sampled, drawn in a row and
    printed in a table; a flag holds for those that have it; a second call finds it all done; one that was
    stopped goes on."""
    monkeypatch.setattr(compare, "EVALUATIONS", (1, 3))
    flags = (f"fm,afm,carflow --out {tmp_path} --data {SMALL_SET} --model tiny --batch 8 --d_lr 3e-4 "
             f"--device cpu --score 20 --sample_every 0 --log_every 1 --sample_steps 2 --guidance 1 "
             f"--steps").split()
    compare.main([*flags, "2"])
    table = json.loads((tmp_path / "compare.json").read_text())
    columns = {name: list(row["scores"]) for name, row in table.items()}
    assert columns == {"fm": ["1", "3"], "afm": ["1"], "carflow": ["1", "3"]}
    scores = [score for row in table.values() for score in row["scores"].values()]
    assert all(score["n"] == 20 and score["fd_glyphs"] > score["floor"] for score in scores)
    assert all(0 <= score["recall_glyphs"] <= 1 for score in scores)
    assert all(row["seconds"] > 0.01 for row in table.values())
    config = {name: checkpoint(tmp_path / name)["config"] for name in ("fm", "afm")}
    assert table["fm"]["scores"]["1"] != table["fm"]["scores"]["3"]
    assert config["afm"]["beta1"] == 0 and config["fm"]["beta1"] == 0.9
    assert config["afm"]["d_lr"] == 3e-4 and config["afm"]["lr"] == 6e-5 and config["fm"]["lr"] == 4e-3
    out = capsys.readouterr().out
    assert re.search(r"\| fm \| [\d.]+ / [\d.]+ / [\d.]+ \| [\d.]+ / [\d.]+ / [\d.]+ \| \d+ \| 1.0 \|", out)
    assert re.search(r"\| afm \| [\d.]+ / [\d.]+ / [\d.]+ \|  \| \d+ \| [\d.]+ \|", out)
    assert (tmp_path / "compare.md").read_text() in out
    picture = Image.open(tmp_path / "compare.png")
    assert picture.size == (2 * 322 + 2, 3 * 48 + 2)
    row = np.asarray(picture)[50:80]
    assert row[:, 330:].min() == 255 > row[:, :320].min()  # afm has one column
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")}
    compare.main([*flags, "2"])
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")}
    shutil.rmtree(tmp_path / "carflow")
    compare.main([*flags, "2"])
    again = json.loads((tmp_path / "compare.json").read_text())
    assert again["fm"] == table["fm"] and again["carflow"]["scores"] == table["carflow"]["scores"]
    compare.main([*flags, "3"])
    assert checkpoint(tmp_path / "fm")["step"] == 3
    compare.main([*flags, "2", "--init", str(tmp_path / "fm"), "--out", str(tmp_path / "from")])
    assert not (tmp_path / "from/fm").exists() and (tmp_path / "from/afm/last.pt").exists()
    raises(lambda: compare.main(["fm,nothing", "--out", str(tmp_path)]), "nothing", "afm")
    raises(lambda: compare.main(["classifier", "--out", str(tmp_path)]), "classifier", "no images")
    raises(lambda: compare.main(["fm", "--cons", "1"]), "--cons")
    compare.main([])
    assert "side by side" in capsys.readouterr().out


# ---- Runs: resumed, on two processes, sharded ----

OWN = {  # settings with which each role soon gets a step
    "cat": dict(augment=0.5, beta1=0.0, lr=1e-3), "classifier": dict(augment=0.4),
    "afm_more": dict(repeats=2, augment=0.4, ot=0.1, ot_end=0.1, lr=5e-4),
    "pafm": dict(candidates=3, bank=8), "carflow": {},
    "meanflow_guided": dict(jumps=0.5, omega=0.8, kappa=0.4, time_mean=-0.4, time_std=1.0),
    "imf": dict(head=1, omega_max=4.0, time_mean=-0.4), "soflow": dict(jumps=0.5, kappa=0.5), "scm": {},
    "shortcut": dict(jumps=0.5, time="uniform", omega=2.0),
    "repa": dict(encoder=SMALL_ENCODER), "reg": dict(encoder=SMALL_ENCODER),
    "distill": dict(init=str(SMALL_FLOW), nfe=4, flow_steps=8),
    "sim": dict(init=str(SMALL_FLOW), d_warmup=1), "dmd": dict(init=str(SMALL_FLOW), d_warmup=1, d_steps=2)}
SPLITS = {  # (processes, accumulation, sharded) of runs that are alike
    "cat": ((2, 2, False), (2, 1, True)), "classifier": ((2, 2, False),),
    "afm_more": ((2, 1, False), (2, 1, True)), "pafm": ((2, 2, False),),
    "carflow": ((2, 2, False), (2, 2, True)),
    "meanflow_guided": ((2, 2, False), (2, 2, True)), "shortcut": ((2, 1, False),),
    "distill": ((2, 2, False),), "sim": ((2, 2, False), (2, 1, True)), "dmd": ((2, 1, False),)}
SPLITS |= dict.fromkeys(("imf", "soflow", "scm", "repa", "reg"), ((2, 1, False), (2, 1, True)))
SPLITS |= {"fm": ((2, 2, True),), "meanflow": ((2, 2, True),), "ect": ((2, 1, True),), "afm": ((2, 1, True),),
           "cafm": ((2, 2, True),)}  # unsharded: in test_all.py


def float64_run(folder, loss, processes, accumulation, sharded) -> Path:
    """A run in FOLDER/LOSS (PROCESSES, ACCUMULATION, SHARDED): AdamW, EMA and clipping.

    12 steps of cafm, 7 of others with a D, 5. soflow's steps are of two images, so that a process may have
    no jump in its share; carflow's sharded blocks are computed again.
    """
    steps, batch = {"cafm": 12}.get(loss, 7 if losses.find(loss).D else 5), 2 if loss == "soflow" else 8
    out = Path(folder) / f"{loss} {processes, accumulation, sharded}"
    how = dict(data=str(Path(folder) / "glyphs.npz"), steps=steps, batch=batch, clip=1.0,
               accumulation=accumulation, processes="shard" if sharded else "replicated",
               checkpointing=sharded and loss == "carflow")
    with in_float64():
        train.train(tiny_run(out, loss, **how | OWN.get(loss, core.OWN.get(loss, {}))))
    return out


def reload_run(folder, name, **options) -> None:
    """Six steps of cafm, D going back to its third at the last, and G to its average twice."""
    with in_float64():
        own = dict(data=str(Path(folder) / "glyphs.npz"), steps=6, log_every=1, keep_every=3)
        cfg = tiny_run(Path(folder) / name, "cafm", **own | core.OWN["cafm"] | options)
        schedule.run(cfg, "0: ema_reload=3; 5: d_reload=3")


def two_process_runs(folder) -> None:
    for loss, splits in SPLITS.items():
        for split in splits:
            float64_run(folder, loss, *split)
    reload_run(folder, "sharded", processes="shard")
    reload_run(folder, "one, then sharded", processes="shard", resume=True)


SCRIPT = """
import os, sys
sys.path[:0] = {here!r}, {here!r} + "/extras"
import {name} as tests
if "RANK" in os.environ:
    tests.two_process_runs({folder!r})
else:
    tests.run_alone({folder!r})
    tests.run_two(__file__)
"""


def run_two(script) -> None:
    """Become the torchrun of this script."""
    os.execv(sys.executable, [sys.executable, *TWO, script])


def run_alone(folder) -> None:
    """The run of one process, and a copy of its first half that two will go on with."""
    folder = Path(folder)
    reload_run(folder, "one")
    (folder / "one, then sharded").mkdir()
    for name in ("last.pt", "step_0000003.pt"):
        shutil.copyfile(folder / "one/step_0000003.pt", folder / "one, then sharded" / name)
    shutil.copyfile(folder / "one/log.jsonl", folder / "one, then sharded/log.jsonl")


@pytest.fixture(scope="session", autouse=True)
def split_runs_of_extras(request, tmp_path_factory):
    """A call that gives the folder of the runs of two processes: one torchrun makes them all beside the
    first tests."""
    if not any("split_runs_of_extras" in item.fixturenames and item.name.startswith("test_runs_")
               for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("split")
    shutil.copyfile(SMALL_SET, folder / "glyphs.npz")
    script = SCRIPT.format(here=str(HERE), name=Path(__file__).stem, folder=str(folder))
    (folder / "run.py").write_text(script)
    process = start(folder / "run.py", output=open(folder / "output.txt", "w"))

    yield from finished(process, folder)


@pytest.mark.parametrize("loss", SPLITS)
def test_runs_of_two_processes_equal_one(tmp_path, split_runs_of_extras, loss):
    """After 5 to 12 steps in float64 with AdamW, EMA and clipping, two gloo processes, sharded or not, have
    the weights, averages and optimizers of one process to 1e-9, with and without accumulation, and log the
    same losses."""
    shutil.copyfile(SMALL_SET, tmp_path / "glyphs.npz")
    whole = float64_run(tmp_path, loss, 1, 1, False)
    for split in SPLITS[loss]:
        assert_close_runs(whole, split_runs_of_extras() / f"{loss} {split}")
    with in_float64():
        cfg = tiny_run("", loss, **OWN.get(loss, {}))
        fresh = train.build(cfg, data.dataset(str(SMALL_SET), 32)).state_dict()
    key = "blocks.0.attn.qkv.weight"
    assert (checkpoint(whole)["networks"]["G"]["weights"][key] - fresh[key]).abs().max() > 1e-4  # it learned


def test_runs_sharded_go_on(split_runs_of_extras, capsys):
    """Six steps of cafm, with D and G taken back, equal three on one process and three sharded on two, and
    the other way round; sharded processes draw the same picture."""
    folder = split_runs_of_extras()
    back = folder / "sharded, then one"
    shutil.copytree(folder / "sharded", back)
    shutil.copyfile(back / "step_0000003.pt", back / "last.pt")
    reload_run(folder, back.name, processes="shard", resume=True)
    assert "--processes shard: one process holds everything; torchrun" in capsys.readouterr().err
    for other in (folder / "sharded", folder / "one, then sharded", back):
        assert_close_runs(folder / "one", other)
    pictures = [Image.open(folder / name / "samples/final.png") for name in ("one", "sharded")]
    one, other = (np.array(picture).astype(int) for picture in pictures)
    assert np.abs(one - other).max() <= 1
    command = f"train.py --data {SMALL_SET} --steps 1 --score 0 --device cpu --processes shard --out".split()
    done = run(*command, folder / "command")  # as a script, too, it finds extras/shard.py
    assert done.returncode == 0 and "one process holds everything" in done.stderr, done.stderr
    shard.main(["SiT-XL/2"])
    assert re.search(r"1 processes: fm +13.5", capsys.readouterr().out)


def test_sharded_networks_register_their_entrances():
    """What is called beside forward is named by its part, so that FSDP brings the weights together there as
    well."""
    assert "stages" in vars(cat_networks.Staged)["entrances"] and hasattr(cat_networks.Staged, "stages")
    assert "projected" in vars(repa.Projected)["entrances"] and hasattr(repa.Projected, "projected")


@pytest.mark.parametrize("loss, accumulation", [("cat", 2), ("classifier", 1), ("afm_more", 1),
                                                ("distill", 2), ("sim", 2), ("dmd", 1)])
def test_resume_is_bitwise(tmp_path, loss, accumulation, monkeypatch):
    """As for the core's objectives: 5 steps, and 5 more after --resume, are 10 in a row, bit for bit."""
    monkeypatch.setitem(core.OWN, loss, OWN[loss])
    core.test_train_resume_is_bitwise(tmp_path, loss, accumulation)


@pytest.mark.parametrize("loss", ["cat", "afm_more", "sim", "dmd"])
def test_one_network_moves_at_a_time(tmp_path, loss, monkeypatch):
    """As for the core's: a step of D leaves G and its EMA where they were, and the other way round."""
    monkeypatch.setitem(core.OWN, loss, OWN[loss])
    core.test_train_moves_one_network_at_a_time(tmp_path, loss, monkeypatch)
