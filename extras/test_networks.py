"""Tests of jit.py, moe.py, lit.py, repa.py, reg.py, official.py and official_times.py."""
import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import fid
import losses
import model
import sample
import train
from extras import guidance, jit, lit, moe, official, official_times, reg, repa
from extras import test_formats
from extras.test_formats import SMALL_ENCODER
from test_all import (TINY, assert_same_state, check_golden, checkpoint, error_of, golden_weights, raises,
                      same, tiny, tiny_run, wave)

JIT = dict(parts=["jit.JiT"], norm="rms_weight", bottleneck=6, context=3, context_start=1)
SMALL_JIT = jit.JIT | dict(input_size=32, patch=8, width=32, depth=3, heads=2, bottleneck=8, context=2,
                           context_start=1)


def with_formula_weights(net: nn.Module) -> nn.Module:
    """The network with the weights that the golden numbers were computed with."""
    own = net.state_dict()
    net.load_state_dict(own | golden_weights({k: v.shape for k, v in own.items() if k != "pos_embed"}))
    return net.eval()


def batch_of(n: int = 4, seed: int = 0) -> tuple:
    """Images (n, 3, 8, 8), times (n,) and labels (n,)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=rng), torch.rand(n, generator=rng), torch.arange(n)


def gradients(loss: torch.Tensor, net: nn.Module) -> dict:
    named = {k: p for k, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: g for k, g in zip(named, found) if g is not None}


def stop_and_go_on(folder, **options) -> None:
    """A run of 4 steps, and one that stops after 2 and goes on, end alike to the last bit."""
    whole, parts = folder.with_name(f"{folder.name} whole"), folder
    train.train(tiny_run(whole, steps=4, log_every=1, **options))
    train.train(tiny_run(parts, steps=4, log_every=1, **options), until=2)
    assert checkpoint(parts)["step"] == 2
    train.train(tiny_run(parts, steps=4, log_every=1, resume=True, **options))
    assert_same_state(whole, parts)


def official_names(D: model.Discriminator) -> dict:
    """The weights of a discriminator as in an official file."""
    return {k.removeprefix("trunk."): v for k, v in D.state_dict().items() if k != "gradient_square"}


encoded = test_formats.encoded  # the fixture

# ---- jit.py ----


@torch.no_grad()
def test_jit_golden(tmp_path):
    """JiT's output on formula weights, from its class, through model.load: the image of its own time, and
    v = (x_t - image) / max(t, 0.05). Of a file's three sets of weights the one that is asked for is taken."""
    net = model.build(jit.JIT | dict(input_size=32, patch=8, width=48, depth=6, heads=4, num_classes=10,
                                     bottleneck=16, context=5, context_start=2))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    weights = with_formula_weights(net).state_dict()
    averages = {f"model_ema{k}": {f"net.{name}": v / k for name, v in weights.items()} for k in (1, 2)}
    file, bias = tmp_path / "checkpoint-last.pth", "final_layer.linear.bias"
    torch.save({"model": state} | averages, file)
    ours = model.load(file)
    assert ours.config == net.config and not ours.training
    for name, expected in (("ema", weights[bias]), ("last", state[bias]), ("ema2", weights[bias] / 2)):
        assert model.load(file, name).state_dict()[bias].equal(expected), name
    torch.save({"model": state, "model_ema1": averages["model_ema1"]}, tmp_path / "one.pth")
    ask = [str(tmp_path / "one.pth"), "--weights", "ema2"]
    raises(lambda: sample.main(ask), "no weights ema2", "one of ema, last")

    x, t, y = wave((2, 3, 32, 32), .37), torch.tensor([.8, .02]), torch.tensor([1, 10])
    v, ours.predict = ours(x, torch.tensor([.8, .1]), y), "v"
    image = ours(x, torch.tensor([.8, .1]), y)  # its last layer
    check_golden(image, -5.47272e-05, 2.37329070429, [0, 1, 1000, 3072, 6143],
                 [-3.283140898, 3.305665731, -3.126048565, -1.06448245, 0.840548873], 1e-5)
    assert torch.allclose(v, (x - image) / torch.tensor([.8, .1]).view(2, 1, 1, 1), atol=1e-4)
    image, ours.predict = ours(x, t, y), "x"
    assert torch.allclose(ours(x, t, y)[1], (x - image)[1] / 0.05, atol=1e-4)


def test_jit_rotary_positions():
    """They keep lengths, let products depend on offsets alone, and leave tokens in front where they are."""
    torch.manual_seed(0)
    rope, q, k = jit.rope_table(8, 4), torch.randn(1, 1, 18, 8), torch.randn(1, 1, 18, 8)
    turned = jit.rotate(q, rope)
    assert torch.equal(turned[:, :, :2], q[:, :, :2])
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    same_q, same_k = (jit.rotate(part[:, :, :1].expand(-1, -1, 16, -1), rope)[0, 0] for part in (q, k))
    products = (same_q @ same_k.T).view(4, 4, 4, 4)   # (row, column) of q, of k
    assert torch.allclose(products[0, 0, 1, 2], products[1, 1, 2, 3], atol=1e-5)
    assert torch.allclose(products[2, 1, 0, 3], products[3, 0, 1, 2], atol=1e-5)
    assert not torch.allclose(products[0, 0, 1, 2], products[0, 0, 2, 1], atol=1e-3)


def test_jit_discriminator():
    """It is alive, is read out of the class's first token, and its official file's names load."""
    x, t, y = batch_of()
    torch.manual_seed(0)
    D = model.discriminator(TINY | JIT)
    _, gradient, slope = model.input_gradient(D, x, t, y)
    real, fake = (model.along(gradient, slope, torch.randn_like(x)) for _ in range(2))
    assert real.abs().max() == 0 and not hasattr(D, "dis_embed") and D.final_layer[1].bias is not None
    ((real - 1).square().mean() + (fake + 1).square().mean()).backward()
    assert D.trunk.blocks[1].adaLN_modulation[1].weight.grad.norm() > 1e-3  # where the class's tokens join

    D = tiny(model.discriminator, **JIT)
    with torch.no_grad():
        trunk = D.trunk
        c = trunk.y_embedder(y) + trunk.t_embedder(t)
        tokens = trunk.blocks[0](trunk.x_embedder(x) + trunk.pos_embed, c)
        tokens = torch.cat([trunk.y_embedder(y)[:, None] + trunk.in_context_posemb, tokens], 1)
        token = trunk.blocks[1](tokens, c)[:, 0]
        token = token / (token.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(D(x, t, y), D.final_layer[1](token)[:, 0], atol=1e-5)

    names = {k.replace("final_layer.", "proj_out."): v for k, v in official_names(D).items()}
    found = official.discriminator_weights("D.pth", names, "cafm")
    assert found.keys() == D.state_dict().keys()
    D.load_state_dict(found)
    assert not torch.allclose(D(x, t, y), tiny(model.discriminator, **JIT)(x, t, y), atol=1e-3)
    assert torch.allclose(D(x, t, y), tiny(model.discriminator, **JIT)(x, 1 - t, y), atol=1e-4)
    raises(lambda: tiny(**JIT | dict(width=36, heads=6)), "multiple of 4")
    raises(lambda: tiny(**JIT | dict(context_start=5)), "block 5", "0 .. 1")
    raises(lambda: tiny(**JIT | dict(context=-1)), "-1 tokens")


def test_jit_trains_end_to_end(tmp_path, monkeypatch, capsys):
    """From class folders of JPEGs to measured samples, in pixels: fm and from it meanflow and cafm, each
    stopped halfway. cafm's D takes over all that both have, norms' weights too."""
    for k, image in enumerate(data.glyphs(12, 48)[0]):
        place = tmp_path / f"images/n{k % 3:08d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{k}.JPEG")
    images, first = str(tmp_path / "images"), str(tmp_path / "fm")
    monkeypatch.setitem(model.ZOO, "JiT-S/16", SMALL_JIT)
    source = dict(data=images, model="JiT-S/16", workers=0, batch=4)
    for loss, own in (("fm", {}), ("meanflow", {}), ("cafm", dict(d_warmup=1, lr=1e-9, d_lr=0.0))):
        out = tmp_path / loss
        stop_and_go_on(out, loss=loss, **source, **own, init="" if loss == "fm" else first)
        assert [row["step"] for row in train.read_log(out / "log.jsonl")] == [1, 2, 3, 4]
        steps = "1" if loss == "meanflow" else "2"
        sample.main([str(out), *f"--n 12 --steps {steps} --guidance 1 --out {out / 's.npz'}".split()])
        capsys.readouterr()
        how = "--features glyphs --size 32 --device cpu --workers 0 --json".split()
        fid.main([str(out / "s.npz"), images, *how])
        assert json.loads(capsys.readouterr().out)["scores"]["fd_glyphs"]["value"] > 0
    D, ema = checkpoint(tmp_path / "cafm")["networks"]["D"], checkpoint(tmp_path / "fm")["ema"]
    assert D["config"]["norm"] == "rms_weight" and "blocks.0.norm1.weight" in ema
    for key, value in ema.items():
        taken = D["weights"].get(f"trunk.{key}")
        assert key.startswith("final_layer") if taken is None else (taken - value).abs().max() < 1e-6, key
    net = model.load(tmp_path / "cafm/last.pt")
    assert net.num_classes == 3 and isinstance(net, jit.JiT)


# ---- moe.py ----


@torch.no_grad()
def test_moe_layer():
    """Sending tokens to their experts equals the dense sum over all experts, the weights of the others being
    0; with all used it is the full mixture. The balance is 1 for even routing and E for one expert, and
    pushes towards the even."""
    torch.manual_seed(0)
    layer, x = moe.Experts(8, 16, 4, 2), torch.randn(3, 5, 8)
    p = layer.gate(x).softmax(-1)
    kept = torch.where(p >= p.topk(2).values[..., 1:], p, 0)

    def dense(weight):
        return layer.shared_experts(x) + sum(weight[..., k:k + 1] * e(x) for k, e in enumerate(layer.experts))

    assert torch.allclose(layer(x), dense(kept), atol=1e-6)
    one = layer.experts[0]
    gated = one.down_proj(nn.functional.silu(one.gate_proj(x)) * one.up_proj(x))
    assert torch.allclose(one(x), gated, atol=1e-6)
    assert torch.equal(layer.chosen.sort(-1).values, p.topk(2).indices.sort(-1).values)
    share = 4 * nn.functional.one_hot(p.topk(2).indices, 4).float().mean((0, 1, 2))
    assert abs(layer.balance - (share * p.mean((0, 1))).sum()) < 1e-6
    layer.used = 4
    assert torch.allclose(layer(x), dense(p), atol=1e-6) and abs(layer.balance - 1) < 1e-6
    layer.used = 1
    layer.gate.weight.zero_()
    layer.gate.weight[2] = 50 * x[0, 0]
    layer(x[:1, :1].expand(3, 5, 8))
    assert abs(layer.balance - 4) < 1e-3
    layer.gate.weight.copy_(torch.randn(4, 8) * 0.5)
    with torch.enable_grad():
        for _ in range(200):
            layer(x)
            gradient, = torch.autograd.grad(layer.balance, layer.gate.weight)
            layer.gate.weight.data -= 0.5 * gradient
    assert layer.balance < 1.05
    raises(lambda: moe.Experts(8, 16, 4, 5), "4 experts of which a token uses 5")
    layer, x = layer.double(), x.double()
    p, layer.used = layer.gate(x).softmax(-1), 4
    assert (layer(x) - dense(p)).abs().max() < 1e-12


@torch.no_grad()
def test_moe_routing():
    """Shares of the experts in the middle of equal intervals of time, and by position of an image's token."""
    x, e, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    for parts in ({}, JIT | dict(parts=["jit.JiT", "moe.MoE"])):
        net, seen = tiny(**dict(parts=["moe.MoE"], experts=3) | parts), []
        for block in net.blocks:
            for p in block.adaLN_modulation.parameters():
                p *= 0.05  # or all tokens of an image went to the same experts
        hook = net.t_embedder.register_forward_pre_hook(lambda _, t: seen.append(t[0][0].item()))
        shares = moe.routing(net, x, e, y, 5)
        hook.remove()
        assert np.allclose(seen, [.1, .3, .5, .7, .9])
        assert shares["time"].shape == (2, 5, 3) and shares["position"].shape == (2, 16, 3)
        went = torch.zeros(2, 5, 16, 3)
        for k, t in enumerate((.1, .3, .5, .7, .9)):
            net((1 - t) * x + t * e, torch.full((4,), t), y)
            for layer, block in enumerate(net.blocks):
                went[layer, k] = nn.functional.one_hot(block.mlp.chosen[:, -16:], 3).float().mean((0, 2))
        assert torch.allclose(shares["time"], went.mean(2))
        assert torch.allclose(shares["position"], went.mean(1))
        assert went.std(1).max() > 0.01 and went.std(2).max() > 0.1  # it depends on both


def test_moe_trains(tmp_path, monkeypatch, capsys):
    """Networks of experts train on several kinds of losses: the balance of each network is part of its loss,
    and logged; resuming is exact; a run starts from one without experts; routing.json has the shares."""
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(depth=2, width=32))
    train.train(tiny_run(tmp_path / "plain", steps=1))
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(parts=["moe.MoE"], experts=3))
    for loss in ("fm", "afm"):
        stop_and_go_on(tmp_path / loss, loss=loss)
        rows = train.read_log(tmp_path / loss / "log.jsonl")
        assert len({row["role"] for row in rows}) == (2 if loss == "afm" else 1)
        assert all(row["balance"] > 0.9 * 0.01 * 2 for row in rows)  # two layers
    train.train(tiny_run(tmp_path / "free", steps=1, log_every=1, net="balance=0.0"))
    held, free = (train.read_log(tmp_path / name / "log.jsonl")[0] for name in ("fm", "free"))
    assert free["balance"] == 0 and abs(held["loss"] - free["loss"] - held["balance"]) < 1e-6

    train.train(tiny_run(tmp_path / "from", steps=1, lr=0.0, init=str(tmp_path / "plain")))
    train.train(tiny_run(tmp_path / "again", steps=1, lr=0.0, init=str(tmp_path / "fm")))
    for given, run, same_mlp in (("plain", "from", False), ("fm", "again", True)):
        weights = checkpoint(tmp_path / given)["ema"], checkpoint(tmp_path / run)["networks"]["G"]["weights"]
        for key, value in weights[1].items():
            taken = same_mlp or key.startswith("t_embedder") or ".mlp." not in key
            assert (key in weights[0] and same(weights[0][key], value)) == taken, (given, key)

    moe.main([str(tmp_path / "fm")])
    assert "block  1: shares of the experts" in capsys.readouterr().out
    shares = json.loads((tmp_path / "fm/routing.json").read_text())
    by_time, by_position = shares["layers, times, experts"], shares["layers, positions, experts"]
    assert np.shape(by_time) == (2, 10, 3) and np.shape(by_position) == (2, 16, 3)
    assert np.allclose(np.sum(by_position, 2), 1)
    assert np.allclose(np.mean(by_time, 1), np.mean(by_position, 1))
    raises(lambda: moe.main([str(tmp_path / "plain")]), "without experts", "MoE-S/2")


# ---- lit.py, and the zoo ----


@torch.no_grad()
def test_lit_attention():
    """(f(q) f(k)^T) v normalised, computed the other way round, and the convolution of v; without the latter
    a permutation of tokens permutes the output."""
    torch.manual_seed(0)
    layer, (q, k, v) = lit.LinearAttention(16, 2), torch.randn(3, 2, 2, 9, 8)
    weights = q.relu() @ k.relu().transpose(-2, -1)
    near = [layer.dwc(image.T.reshape(1, 8, 3, 3)).reshape(8, 9).T for image in v.flatten(0, 1)]
    plain = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(layer.attend(q, k, v), plain + torch.stack(near).view_as(v), atol=1e-4)
    layer.dwc.weight.zero_()
    layer.dwc.bias.zero_()
    order, x = torch.randperm(9), torch.randn(2, 9, 16)
    assert torch.allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-5)


def test_lit_starts_from_softmax_attention(tmp_path, monkeypatch):
    """A LiT takes over all but attention from an ordinary network, and all from a LiT; cafm's D, which reads
    one more token, has softmax attention; beside other tokens it is refused."""
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(depth=2, width=32))
    train.train(tiny_run(tmp_path / "plain", steps=2))
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(parts=["lit.LiT"]))
    train.train(tiny_run(tmp_path / "lit", steps=1, lr=0.0, init=str(tmp_path / "plain")))
    train.train(tiny_run(tmp_path / "again", steps=1, lr=0.0, init=str(tmp_path / "lit"), seed=1))
    ema, first, again = (checkpoint(tmp_path / name)["ema"] for name in ("plain", "lit", "again"))
    for key, value in first.items():
        if not key.endswith(("qkv.bias", "attn.proj.bias")):  # which are zero so early
            assert (key in ema and same(value, ema[key])) == (".attn." not in key), key
        assert same(value, again[key]), key
    train.train(tiny_run(tmp_path / "cafm", loss="cafm", steps=2, init=str(tmp_path / "lit"), d_warmup=0))
    D = checkpoint(tmp_path / "cafm")["networks"]["D"]["weights"]
    assert "blocks.0.attn.dwc.weight" in first and not any("dwc" in key for key in D)
    for options in (JIT, {}):
        parts = ["lit.LiT", "jit.JiT" if options else "reg.Token"]
        for own in (parts, parts[::-1]):
            raises(lambda: tiny(**options | dict(parts=own)), "linear attention", "another --model")


def test_networks_zoo():
    """The zoo's networks of these files are found by their names; names, numbers of tensors and of trained
    values are those of the official files; multiply-adds can be counted for each kind."""
    names = {f"JiT-{size}/{patch}" for size in "SBLH" for patch in (16, 32)}
    names |= {f"MoE-{size}/2" for size in ("S", "B", "XL")} | {f"LiT-{size}/2" for size in model.SIZES}
    assert names <= set(model.ZOO)
    costs = {}
    with torch.device("meta"):
        for name, tensors, values in (("JiT-B/16", 183, 131_123_712), ("JiT-L/16", 351, 458_877_664),
                                      ("JiT-H/16", 463, 952_514_368), ("JiT-H/32", 463, None)):
            net = model.create(name)
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert len(net.state_dict()) == tensors and trained == (values or trained), name
            assert net.shape == (3, 16 * net.patch, 16 * net.patch) and net.predict == "x"
            assert net.extra_tokens == 32 and net.context_start == len(net.blocks) // 3
        jit, lit, moe = (model.create(f"{name}-glyph") for name in ("JiT", "LiT", "MoE"))
        assert jit.config["bottleneck"] == jit.config["width"] and lit.config["heads"] == 2  # found on glyphs
        for net in (jit, lit, moe):
            assert all(net.config[key] == model.ZOO["glyph-S"][key] for key in ("width", "depth", "patch"))
        for name in ("SiT-S/2", "MoE-S/2", "LiT-S/2", "JiT-S/16"):
            costs[name] = model.multiply_adds(model.create(name))
        state = {k: tuple(v.shape) for k, v in model.create("JiT-B/16").state_dict().items()}
    tokens, width, depth = 256, 384, 12
    experts = 3 * width * (2 * 4 * width + 2 * width) + 8 * width  # two of them, the shared one, and the gate
    assert costs["MoE-S/2"] - costs["SiT-S/2"] == depth * tokens * (experts - 8 * width ** 2)
    assert 0 < costs["LiT-S/2"] < costs["SiT-S/2"] < costs["JiT-S/16"]
    block = {"attn.q_norm.weight": (64,), "attn.k_norm.weight": (64,), "attn.qkv.weight": (2304, 768),
             "attn.qkv.bias": (2304,), "attn.proj.weight": (768, 768), "attn.proj.bias": (768,),
             "norm1.weight": (768,), "norm2.weight": (768,), "mlp.w12.weight": (4096, 768),
             "mlp.w12.bias": (4096,), "mlp.w3.weight": (768, 2048), "mlp.w3.bias": (768,),
             "adaLN_modulation.1.weight": (4608, 768), "adaLN_modulation.1.bias": (4608,)}
    expected = {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()} | {
        "pos_embed": (1, 256, 768), "in_context_posemb": (1, 32, 768),
        "x_embedder.proj1.weight": (128, 3, 16, 16), "x_embedder.proj2.weight": (768, 128, 1, 1),
        "x_embedder.proj2.bias": (768,),
        "y_embedder.embedding_table.weight": (1001, 768), "t_embedder.mlp.0.weight": (768, 256),
        "t_embedder.mlp.0.bias": (768,), "t_embedder.mlp.2.weight": (768, 768),
        "t_embedder.mlp.2.bias": (768,), "final_layer.norm_final.weight": (768,),
        "final_layer.linear.weight": (768, 768),
        "final_layer.linear.bias": (768,), "final_layer.adaLN_modulation.1.weight": (1536, 768),
        "final_layer.adaLN_modulation.1.bias": (1536,)}
    assert state == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["JiT-S/16", "MoE-S/2", "LiT-S/2"])
def test_networks_start_at_zero(name, monkeypatch):
    """A fresh network returns exactly 0 from its last layer, its blocks are the identity, and its linear
    layers have Xavier's size, those of the patches too."""
    monkeypatch.setitem(model.ZOO, name, model.ZOO[name] | dict(depth=2, width=64, heads=2))
    net = model.create(name, predict="v", **dict(context_start=1) if name[0] == "J" else {})
    x, t, y = torch.randn(2, *net.shape), torch.rand(2), torch.tensor([3, 1000])
    assert net(x, t, y).abs().max() == 0
    tokens = torch.randn(2, 256, 64)
    assert torch.equal(net.blocks[1](tokens, torch.randn(2, 64)), tokens)
    for key, layer in (*net.blocks.named_modules(), *net.x_embedder.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "adaLN" not in key and "dwc" not in key:
            bound = math.sqrt(6 / (len(layer.weight) + layer.weight[0].numel()))
            assert 0.9 * bound < layer.weight.abs().max() <= bound, key
            assert layer.bias is None or not layer.bias.any(), key


# ---- Parts together ----

TOGETHER = {
    "JiT x REPA": JIT | dict(parts=["jit.JiT", "repa.Projected"], features=12, align=2),
    "JiT x REG": JIT | dict(parts=["jit.JiT", "repa.Projected", "reg.Token"], features=12, token=12, align=2),
    "JiT x MoE x REPA": JIT | dict(parts=["jit.JiT", "moe.MoE", "repa.Projected"], experts=3, features=12),
    "MoE x JiT x REPA": JIT | dict(parts=["moe.MoE", "repa.Projected", "jit.JiT"], experts=3, features=12),
    "LiT x REPA": dict(parts=["lit.LiT", "repa.Projected"], features=12),
    "JiT x LiT x REPA": JIT | dict(parts=["jit.JiT", "lit.LiT", "repa.Projected"], features=12, context=0),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_networks_parts_compose(name):
    """Parts know nothing of each other, and together each does what it does alone: layers, tokens, positions,
    projections. Loss and gradients are the same with activation checkpointing; bfloat16 is close; a copy,
    also one made after a call, computes the same; config rebuilds the network."""
    net = tiny(**TOGETHER[name]).train()
    x, t, y = batch_of()
    state = torch.randn(4, *net.state) if net.state != net.shape else x
    kinds = {type(net.blocks[0].attn), type(net.blocks[0].mlp)}
    assert (moe.Experts in kinds) == ("MoE" in name) and (lit.LinearAttention in kinds) == ("LiT" in name)
    assert (jit.JiTAttention in kinds) == ("JiT" in name and "LiT" not in name)
    assert (jit.SwiGLU in kinds) == ("JiT" in name and "MoE" not in name)

    def loss(net):
        out, z = net(state, t, y), torch.ones(4, net.pos_embed.shape[1], 12)
        penalties = net.penalties() if hasattr(net, "penalties") else {}
        return out.square().mean() + repa.misalignment(net.projected(), z) + sum(penalties.values())

    plain = loss(net)
    copied = copy.deepcopy(net)  # with a graph behind it
    assert copied.tokens is None and net.tokens is not None
    first = gradients(plain, net)
    assert any(k.startswith("projectors.") for k in first)
    for other in (copied, model.build(net.config)):
        other.load_state_dict(net.state_dict())
        assert torch.equal(loss(other.train()), plain)
    net.checkpointing = True
    again = loss(net)
    second = gradients(again, net)
    assert torch.equal(again, plain) and first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    net.amp = torch.bfloat16
    half = net(state, t, y)
    projected = net.projected()
    assert half.dtype == projected.dtype == torch.float32
    assert projected.equal(projected.bfloat16().float())  # by a projector in bfloat16
    net.amp, net.checkpointing = None, False
    exact = net(state, t, y)
    assert 0 < (half - exact).norm() < 0.1 * exact.norm()
    gradients(loss(net), net)


def test_networks_trunks_of_discriminators():
    """A discriminator made like a generator has its JiT layers, experts and units of time, but not what only
    generators have; its experts' balance is in its loss."""
    parts = ["official_times.TimeScale", "jit.JiT", "moe.MoE", "repa.Projected", "reg.Token"]
    G = tiny(**JIT | dict(parts=parts, experts=3, features=12, token=12))
    D = model.discriminator(G.config)
    assert D.config["parts"] == parts[:3] and D.trunk.t_embedder.scale == 1000
    x, t, y = batch_of()
    D(x, t, y)
    assert D.penalties()["balance"] > 0


# ---- repa.py and reg.py ----


class GivenDraws:
    """The interface of data.Draws that hands out the given time and noise, and drops no label."""

    def __init__(self, t, e):
        self.t, self.e, self.positions = t, e, range(len(t))

    def uniform(self, purpose, shape=()):
        return self.t if purpose == "time" else torch.ones(len(self.t), *shape)

    def normal(self, purpose, shape):
        return self.e.view(-1, *shape)


GOLDEN_ALIGNED = {  # sihyun-yu/REPA and Martinser/REG: loss.py and models/sit.py on formula weights
    "repa": dict(flow=3.990921021, misalignment=1 - .006919500, total=3.987461329 + .5, gradient=47.61169815),
    "reg": dict(flow=5.125148773, misalignment=1 - .002895074, token=2.634660959, total=5.202741146 + .5,
                gradient=55.59218216)}


@pytest.mark.parametrize("loss", GOLDEN_ALIGNED)
def test_aligned_golden(tmp_path, loss):
    """The official losses and gradient norms on formula weights. The official file loads: projectors are
    left behind, REG's is known by its token and moves image and token."""
    parts = dict(repa=["repa.Projected"], reg=["repa.Projected", "reg.Token"])[loss]
    net = with_formula_weights(model.build(dict(
        input_size=8, patch=2, channels=4, width=48, depth=2, heads=4, num_classes=10, parts=parts,
        features=24, align=1, **dict(token=24) if loss == "reg" else {}))).train()
    x, e = wave((2, 4, 8, 8), .37), wave((2, 4, 8, 8), .53, 1.0)
    z, t, y = wave((2, 17, 24), .71), torch.tensor([.2, .7]), torch.tensor([1, 10])
    e = torch.cat([e.flatten(1), wave((2, 24), .29, .5)], 1) if loss == "reg" else e
    cfg = train.configure(loss, time="uniform")
    total, logs = losses.LOSSES[loss].G(net, x, y, GivenDraws(t, e), cfg, lambda x, draws: z)
    norm = torch.cat([g.flatten().double() for g in gradients(total, net).values()]).norm()
    for name, value in ({"total": total, "gradient": norm} | logs).items():
        assert abs(value.item() / GOLDEN_ALIGNED[loss][name] - 1) < 2e-6, (name, value)

    file = tmp_path / ("last.pt" if loss == "reg" else "last-SiT.pt")  # REG's is known by its tensors
    torch.save({"ema": net.state_dict(), "model": net.state_dict()}, file)
    loaded = official.load(file, model.read_checkpoint(file), heads=4)
    assert not hasattr(loaded, "projectors") and isinstance(loaded, reg.Token) == (loss == "reg")
    state = torch.cat([x.flatten(1), z[:, 0]], 1) if loss == "reg" else x
    with torch.no_grad():
        assert (loaded(state, t, y) - net(state, t, y)).abs().max() < 1e-5


def test_aligned_facts():
    """Identical features, or any positive multiple, are not apart, opposite ones are by 2. With align 0 repa
    has fm's gradient bit for bit, and the alignment's goes to the first blocks and the projector alone."""
    torch.manual_seed(0)
    z, h = torch.randn(2, 4, 16, 12)
    assert repa.misalignment(z, z).abs() < 1e-6 and (repa.misalignment(-z, z) - 2).abs() < 1e-6
    scaled = repa.misalignment(h * torch.rand(4, 16, 1), z * 7)
    assert abs(scaled - repa.misalignment(h, z)) < 1e-6
    raises(lambda: repa.misalignment(h, z[:, 1:]), "(15, 12)", "(16, 12)")

    net = tiny(depth=3, parts=["repa.Projected"], features=12, align=2).train()
    x, t, y = batch_of()
    draws, frozen = data.Draws(0, range(4)), torch.randn(4, 17, 12)
    plain = gradients(losses.fm(net, x, y, draws, train.configure("fm"))[0], net)
    cfg = train.configure("repa", align=0.0)
    unaligned = gradients(repa.repa(net, x, y, draws, cfg, lambda x, draws: frozen)[0], net)
    more = unaligned.keys() - plain.keys()
    assert all(torch.equal(g, unaligned[k]) for k, g in plain.items())
    assert len(more) == 6 and all(k.startswith("projectors.") and (unaligned[k] == 0).all() for k in more)
    net(x, t, y)
    found = gradients(repa.misalignment(net.projected(), frozen[:, 1:]), net)
    moved = {k for k, g in found.items() if (g != 0).any()}
    kinds = {k.split(".")[0] for k in moved}
    assert kinds == {"x_embedder", "t_embedder", "y_embedder", "blocks", "projectors"}
    assert {k.split(".")[1] for k in moved if k.startswith("blocks")} == {"0", "1"}

    thirds = [model.build(dict(depth=d, width=8, heads=1, parts=["repa.Projected"], features=1)).align
              for d in (2, 12, 24, 28)]
    assert thirds == [1, 4, 8, 8]   # the last three: REPA's B, L, XL
    raises(lambda: tiny(parts=["repa.Projected"], features=1, align=3), "after 3 blocks", "1 to 2")


@torch.no_grad()
def test_reg_moves_image_and_token():
    """REG's solver state is image and token, and only the image is drawn. The aligned tokens are those of the
    image, with the encoder's own in front for reg, without those of the class; sampling keeps none."""
    net = tiny(parts=["reg.Token"], token=5)
    assert net.state == (3 * 64 + 5,) and net.shape == (3, 8, 8)
    assert net.pos_embed[0, 0].eq(0).all() and net.pos_embed.shape[1] == 17
    labels = torch.arange(3)
    (_, fake), = sample.generate(net, labels, 0, steps=2)
    e = data.Draws(0, range(3)).normal("sample noise", net.state)
    x = sample.sample(net, e, labels, 2)
    assert fake.equal(data.to_uint8(x[:, :192].view(3, 3, 8, 8)))
    changed = torch.cat([e[:, :192], e[:, 192:] + 1], 1)  # the token is seen
    assert (sample.sample(net, changed, labels, 2)[:, :192] - x[:, :192]).abs().max() > 1e-3
    raises(lambda: guidance.Guided(net, channels=3), "channels 3", "leave it at 0")

    x, t, y = batch_of(2)
    fresh, bound = model.build(TINY | dict(parts=["reg.Token"], token=5)), math.sqrt(6 / (32 + 5))
    assert not fresh(torch.randn(2, 197), t, y).any() and not fresh.cls_projectors2.bias.any()
    assert 0.9 * bound < fresh.cls_projectors2.weight.abs().max() <= bound
    for options, state, width in ((dict(parts=["jit.JiT", "repa.Projected"]), x, 16),
                                  (dict(parts=["jit.JiT", "repa.Projected", "reg.Token"], token=4),
                                   torch.randn(2, 196), 17)):
        net, seen = tiny(**JIT | dict(features=4, align=2) | options).train(), []
        net.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
        net(state, t, y)
        assert net.tokens.equal(seen[0][:, 3:]) and net.projected().shape == (2, width, 4)
        net.eval().tokens = None
        net(state, t, y)
        assert net.tokens is None


@torch.no_grad()
def test_reg_with_tokens_of_the_class():
    """Beside JiT's tokens of the class, the encoder's token goes in and out at the front of the image's."""
    net = tiny(**JIT | dict(parts=["jit.JiT", "reg.Token"], token=5))
    (x, t, y), token = batch_of(2), torch.randn(2, 5)
    c = net.y_embedder(y) + net.t_embedder(t)
    tokens = torch.cat([net.wg_norm(net.cls_projectors2(token))[:, None], net.x_embedder(x)], 1)
    tokens = net.blocks[0](tokens + net.pos_embed, c)
    tokens = torch.cat([net.y_embedder(y)[:, None] + net.in_context_posemb, tokens], 1)
    last = net.final_layer.modulated(net.blocks[1](tokens, c)[:, 3:], c)
    image = net.unpatchify(net.final_layer.linear(last[:, 1:]))
    own = net.final_layer.linear_cls(last[:, 0])
    out = net(torch.cat([x.flatten(1), token], 1), t, y)
    assert torch.allclose(out, torch.cat([image.flatten(1), own], 1), atol=1e-4)


def test_aligned_trains(tmp_path, encoded, monkeypatch, capsys):  # noqa: F811
    """repa and reg train on latents with stored features and on images with an encoder, stop and go on bit
    for bit, and start from each other; a projector stays with runs of its kind. Run alone, the files look at
    a run."""
    stored = dict(data=str(encoded / "latents"), size=0, predict="v", mirror="on")
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=1, depth=2, width=32))
    train.train(tiny_run(tmp_path / "plain", steps=2, **stored))
    for loss in ("repa", "reg"):
        options = dict(init=str(tmp_path / "plain"), align_block=2) if loss == "repa" else {}
        stop_and_go_on(tmp_path / loss, loss=loss, **stored, **options)
        assert all(0 < row["misalignment"] < 2 for row in train.read_log(tmp_path / loss / "log.jsonl"))
    nets = {loss: checkpoint(tmp_path / loss)["networks"]["G"] for loss in ("repa", "reg")}
    assert [net["config"]["align"] for net in nets.values()] == [2, 0]
    start = dict(steps=1, lr=0.0, seed=1, init=str(tmp_path / "repa"), **stored)
    train.train(tiny_run(tmp_path / "after", loss="meanflow", **start))
    train.train(tiny_run(tmp_path / "more", loss="repa", **start))
    assert "projectors.0.0.weight" not in checkpoint(tmp_path / "after")["ema"]
    more, repas = checkpoint(tmp_path / "more"), checkpoint(tmp_path / "repa")
    assert same(more["networks"]["G"]["weights"], repas["ema"])
    resumed = tiny_run(tmp_path / "repa", loss="repa", steps=4, resume=True, align_block=1,
                       init=str(tmp_path / "plain"), **stored)
    raises(lambda: train.train(resumed), "--align_block 2, not 1")
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="repa", encoder=SMALL_ENCODER, **stored)),
           "holds features")
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=8))
    raises(lambda: train.train(tiny_run(tmp_path / "no", loss="repa")), "--encoder FILE.py:NAME")
    for loss in ("repa", "reg"):
        out = tmp_path / f"pixels {loss}"
        train.train(tiny_run(out, loss=loss, steps=2, encoder=SMALL_ENCODER))
        capsys.readouterr()
        repa.main([str(out), "--n", "8", "--encoder", SMALL_ENCODER])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 12 and lines[1].startswith("t = 0.0   ") and 0 < float(lines[1].split()[3]) < 2
    reg.main([str(tmp_path / "pixels reg"), "--n", "4", "--steps", "2", "--encoder", SMALL_ENCODER])
    assert "cosine of sampled tokens" in capsys.readouterr().out
    for module in (moe, repa, reg, official):
        module.main([])  # its own text
    assert capsys.readouterr().out.count("python -m extras.") == 6
    raises(lambda: repa.main([str(tmp_path / "plain")]), "without alignment")
    raises(lambda: reg.main([str(tmp_path / "reg")]), "--encoder")


# ---- official.py and official_times.py ----

GOLDEN_DIT = dict(mean=-0.0488414675, rms=1.9277289440, at=[0, 1, 341, 512, 1023], tolerance=1e-5,
                  values=[-2.7806444168, -0.5940889120, -0.3481149375, -0.4613337815, -2.4208440781])
GOLDEN_SIT = dict(mean=-0.0647085268, rms=1.9310491060, at=[0, 1, 170, 256, 511], tolerance=1e-5,
                  values=[-2.7806115150, -0.5944840908, -2.8435714245, -0.4608496130, -2.9931080341])


def golden_dit() -> model.DiT:
    size = dict(input_size=8, patch=2, channels=4, width=48, depth=2, heads=4, num_classes=10)
    return with_formula_weights(model.build(size | dict(learn_sigma=True)))


def load_official(path, **options) -> model.DiT:
    return official.load(path, model.read_checkpoint(path), **options)


@torch.no_grad()
def test_official_layouts(tmp_path):
    """Official layouts (plain, ema, module prefix, an argparse.Namespace beside, projectors) load, with every
    size read from the tensors. SiT's golden numbers are met with v(x, t) = -SiT(x, 1 - t); REPA's SiT has our
    time, which its projectors tell."""
    net = golden_dit()
    plain = net.state_dict()
    layouts = {"plain": plain, "prefix": {f"module.{k}": v for k, v in plain.items()},
               "wrapped": {"model": {k: 0 * v for k, v in plain.items()}, "ema": plain,
                           "args": argparse.Namespace(lr=1e-4)},
               "repa": {"ema": plain | {"projectors.0.weight": torch.zeros(3)}}}
    x, t, y = wave((2, 4, 8, 8), .37), torch.tensor([.3, .6]), torch.tensor([1, 10])
    for name, content in layouts.items():
        torch.save(content, tmp_path / f"DiT-{name}.pt")
        loaded = load_official(tmp_path / f"DiT-{name}.pt", heads=4)
        assert loaded.config == net.config | dict(parts=["official_times.VPNoise"]) and not loaded.training
        assert same(dict(loaded.state_dict()), dict(plain)), name
        assert torch.isfinite(loaded(x, t, y)).all()
    last = load_official(tmp_path / "DiT-wrapped.pt", weights="last", heads=4)
    assert last.state_dict()["blocks.0.attn.qkv.weight"].abs().max() == 0
    raises(lambda: load_official(tmp_path / "DiT-repa.pt", weights="last"), "no weights last", "one of ema")
    for name, sign in (("edition-sit-xl", -1), ("sit-repa", 1)):
        extra = {"projectors.0.weight": torch.zeros(3)} if sign == 1 else {}
        torch.save({"ema": plain | extra}, tmp_path / f"{name}.pt")
        raw, loaded = net(x, t if sign == 1 else 1 - t, y), load_official(tmp_path / f"{name}.pt", heads=4)
        assert torch.allclose(loaded(x, t, y), sign * raw, atol=1e-5), name
    ours = load_official(tmp_path / "edition-sit-xl.pt", heads=4)
    check_golden(-ours(x, torch.tensor([.8, .1]), y), **GOLDEN_SIT)


@torch.no_grad()
def test_official_dit_predicts_noise_on_its_schedule():
    """DiT's golden numbers are the noise that VPNoise turns into a velocity: at the step of t and the input
    scaled by |(1 - t, t)|. Given exactly for Gaussian data, it becomes that data's exact velocity."""
    x, y, net = wave((2, 4, 8, 8), .37), torch.tensor([1, 10]), golden_dit()
    net.channels = 8  # with the half that is dropped
    check_golden(net(x, torch.tensor([3., 500.]), y), **GOLDEN_DIT)
    t = torch.tensor([.3, .6]).view(2, 1, 1, 1)
    e = golden_dit()(x / (t ** 2 + (1 - t) ** 2).sqrt(), official_times.vp_step(t.flatten()), y)
    dit = model.build(net.config | dict(parts=["official_times.VPNoise"]))
    dit.load_state_dict(net.state_dict())
    assert torch.allclose(dit(x, t.flatten(), y), e - (x - t * e) / (1 - t), atol=1e-5)

    s, alpha_bar = 0.7, torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    class ExactNoise:  # E[e | x] for x = sqrt(abar) x0 + sqrt(1 - abar) e, abar between two steps
        def __init__(self):
            self.config = {}

        def forward(self, x, n, y):
            log_snr = torch.log(alpha_bar / (1 - alpha_bar))
            low = n.long().clamp(0, 998)
            between = log_snr[low] + (n - low) * (log_snr[low + 1] - log_snr[low])
            a = torch.sigmoid(between).view(-1, 1, 1, 1)
            return (1 - a).sqrt() / (a * s * s + 1 - a) * x

    exact_net = type("ExactDiT", (official_times.VPNoise, ExactNoise), {})()
    t = torch.tensor([.02, .1, .5, .9, .99], dtype=torch.float64)
    x, tt = torch.randn(5, 3, 8, 8, dtype=torch.float64), t.view(-1, 1, 1, 1)
    exact = (tt - (1 - tt) * s * s) / ((1 - tt) ** 2 * s * s + tt ** 2) * x
    assert (exact_net.forward(x, t, None) - exact).abs().max() < 1e-9
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.isfinite(exact_net.forward(x[:2], ends, None)).all()
    assert np.allclose(official_times.vp_step(torch.tensor([.1, .5, .9])), [29.9, 258.1, 658.2], atol=0.1)


@torch.no_grad()
def test_official_afm_files(tmp_path):
    """AFM's layout: no null class, no time for one jump (which gives the image), times a thousand for K of
    them, a file of 4 layers with 2 blocks runs them twice; its time is ours."""
    (x, _, _), y, t = batch_of(2), torch.tensor([0, 9]), torch.tensor([.5, 1.])
    scale = dict(null_class=False, parts=["official_times.TimeScale"], time_scale=1000.0)
    deep = dict(times=0, predict="x", repeats=2, parts=["official_times.TimeScale", "afm_more.Deep"])
    for name, options in (("tiny_1nfe_FID2.pth", dict(times=0, predict="x")), ("tiny_2nfe.pth", {}),
                          ("tiny_4layer_1nfe.pth", deep)):
        net = tiny(**scale | options)
        torch.save(net.state_dict(), tmp_path / name)
        loaded = load_official(tmp_path / name, heads=2)
        assert loaded.config == net.config and torch.equal(loaded(x, t, y), net(x, t, y)), name
    two = load_official(tmp_path / "tiny_2nfe.pth", heads=2)
    c = two.y_embedder(y) + embedded_by(two.t_embedder, t)
    assert torch.allclose(two.condition(t, y), c, atol=1e-5)
    jumps = tiny(**scale | dict(times=2))
    embedded = embedded_by(jumps.t_embedder, t) + embedded_by(jumps.jump_embedder, t - t / 3)
    assert torch.allclose(jumps.condition(t, y, t / 3), jumps.y_embedder(y) + embedded, atol=1e-3)
    one = load_official(tmp_path / "tiny_1nfe_FID2.pth", heads=2)
    jump = losses.jump(one, x, torch.ones(2), torch.zeros(2), y)
    one.predict = "v"
    assert (jump - one(x, t, y)).abs().max() < 1e-5  # the image
    raises(lambda: sample.sample(one, x, y, 4), "steps 4", "--steps 1")

    four = load_official(tmp_path / "tiny_4layer_1nfe.pth", heads=2)
    c, tokens = four.y_embedder(y), four.x_embedder(x) + four.pos_embed
    for k in range(2):
        for block in four.blocks:
            tokens = block(tokens, c + embedded_by(four.t_embedder, torch.full((2,), 1 - k / 2)))
    image = four.unpatchify(four.final_layer(tokens, c))
    four.predict = "v"
    assert torch.allclose(four(x, t, y), image, atol=1e-4)


def embedded_by(embedder, t):
    """The embedding of a thousand t."""
    return embedder.mlp(model.sinusoid(1000 * t, 256))


@torch.no_grad()
def test_official_discriminators(tmp_path):
    """CAFM's discriminator has its time turned, AFM's is as it is; both have the names of ours after that,
    and start a run by --d_init."""
    x, t, y = batch_of(2)
    one_jump = dict(times=0, null_class=False)
    for loss, options in (("cafm", dict(norm="rms")), ("afm", one_jump), ("afm", {})):
        D = tiny(model.discriminator, **options)
        torch.save({f"module.{k}": v for k, v in official_names(D).items()}, tmp_path / "d.pth")
        again = model.discriminator(TINY | options)
        again.load_state_dict(model.discriminator_weights(tmp_path / "d.pth", loss))
        assert torch.allclose(again(x, t, y), D(x, 1 - t if loss == "cafm" else t, y), atol=1e-4), loss
        assert loss != "cafm" or not torch.allclose(again(x, t, y), D(x, t, y), atol=1e-2)

    with torch.enable_grad():
        train.train(tiny_run(tmp_path / "fm", steps=1))
    D = tiny(model.discriminator, **model.load(tmp_path / "fm/last.pt").config | dict(norm="rms"))
    torch.save(official_names(D), tmp_path / "official.pt")
    with torch.enable_grad():
        train.train(tiny_run(tmp_path / "cafm", loss="cafm", steps=1, lr=1e-9, d_lr=0.0,
                             init=str(tmp_path / "fm"), d_init=str(tmp_path / "official.pt")))
    start = checkpoint(tmp_path / "cafm")["networks"]["D"]["weights"]
    for key, value in D.state_dict().items():
        assert "t_embedder.mlp.0" in key or (start[key] - value).abs().max() < 1e-7, key
    torch.save({"a": torch.ones(1)}, tmp_path / "nothing.pt")
    load = lambda: model.discriminator_weights(tmp_path / "nothing.pt", "cafm")  # noqa: E731
    raises(load, "dis_embed is missing", "entries: a")


@torch.no_grad()
def test_official_units_of_time_are_inherited(tmp_path, capsys, monkeypatch):
    """`python -m extras.official` makes a checkpoint of ours of a file that does not tell enough; a run that
    starts from an AFM file keeps its units of time, for both networks, also where the new one has no time."""
    net = tiny(input_size=32, patch=8, null_class=False, parts=["official_times.TimeScale"])
    torch.save(net.state_dict(), tmp_path / "some.pth")
    for flags, words in (([], "--kind"), (["--kind", "afm"], "--heads")):
        command = [str(tmp_path / "some.pth"), *flags]
        raises(lambda: official.main(command), words, "python -m extras.official")
    ours = str(tmp_path / "ours.pt")
    official.main([str(tmp_path / "some.pth"), "--kind", "afm", "--heads", "2", "--out", ours])
    assert "'time_scale': 1000.0" in capsys.readouterr().out
    given = model.load(ours)
    assert same(dict(given.state_dict()), dict(net.state_dict()))

    small = dict(input_size=32, patch=8, channels=3, width=32, depth=2, heads=2, num_classes=10)
    monkeypatch.setitem(model.ZOO, "small", small)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    for nfe in (2, 1, 0):
        out = tmp_path / str(nfe)
        with torch.enable_grad():
            train.train(tiny_run(out, loss="afm", model="small", nfe=nfe, init=ours, steps=2, lr=0.0))
        saved = checkpoint(out)["networks"]
        assert all(part["config"]["parts"] == ["official_times.TimeScale"] for part in saved.values())
        t = torch.ones(2) if nfe == 1 else torch.tensor([.5, 1.])
        assert torch.allclose(model.load(out / "last.pt")(x, t, y), given(x, t, y), atol=1e-5), nfe


def test_official_refusals(tmp_path, capsys):
    """What cannot be told of a file, and files of something else: one line each."""
    torch.save(golden_dit().state_dict(), tmp_path / "tiny.pt")
    raises(lambda: model.load(tmp_path / "tiny.pt"), "look alike", "--kind")
    raises(lambda: load_official(tmp_path / "tiny.pt", kind="dit"), "number of heads", "width 48", "--heads")
    raises(lambda: load_official(tmp_path / "tiny.pt", weights="best"), "no weights best", "one of ema, last")
    official.main([str(tmp_path / "tiny.pt"), *f"--kind dit --heads 4 --out {tmp_path / 'ours.pt'}".split()])
    start = tiny_run(tmp_path / "run", predict="v", init=str(tmp_path / "ours.pt"))
    raises(lambda: train.train(start), "predicts eps, this run v")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "dit-other.pt")
    assert "pos_embed is missing" in error_of(model.load, tmp_path / "dit-other.pt")
    torch.save(tiny(parts=["moe.MoE"], experts=3).state_dict(), tmp_path / "dit-moe.pt")
    assert "mlp.fc1.weight is missing" in error_of(model.load, tmp_path / "dit-moe.pt")
    torch.save({"model": {"net.x_embedder.proj1.weight": torch.zeros(2)}}, tmp_path / "jit.pt")
    raises(lambda: model.load(tmp_path / "jit.pt"), "JiT", "pos_embed is missing")
    assert official.kind_of("any.pt", "afm") == "afm" and official.kind_of("edit-SiT.pt") == "sit"
    for name in ("tiny.pt", "dit-sit.pt", "editsite.pt"):
        assert "AFM" in error_of(official.kind_of, name)
    official_times.main([])
    assert "t = 0.5   step  258.1 of 1,000" in capsys.readouterr().out
