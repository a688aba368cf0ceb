"""Diffusion tree sampling (arXiv:2506.20701): samples of p(x) exp(scale r(x)), for a reward r of images.

    python train.py --loss classifier --steps 1000 --out runs/judge
    python -m extras.tree runs/glyphs --verifier runs/judge      beside best-of-N and nearby search: a picture

A tree's branches are trajectories of the reverse SDE (extras/sde.py) that share their first steps. A descent
picks a child in proportion to exp(its value), or makes one; its reward updates the values on its path.
On glyphs, 20 evaluations a sample: reward -0.98, recall 0.37; best-of-N (extras/search.py) -3.99 and 0.81.
"""
import bisect
import dataclasses
import itertools
import math
import typing

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import data
import fid
import sample
from data import option
from extras import metrics, search, small
from extras.classifier import load_classifier
from extras.sde import sde_step, sde_times

METHODS = {"best of N": "#1f5fbf", "nearby": "#2f8f4e", "tree": "#c2410c"}  # and their colours


class Node:
    """A state x, the velocity there once it was asked for, and the log of what is known of E exp(scale r)."""

    def __init__(self, x: Tensor | None = None):
        self.x, self.v, self.children, self.visits, self.value = x, None, [], 0, None

    def update(self) -> None:
        """Soft Bellman backup: value = log mean exp(value) of the children."""
        values = [child.value for child in self.children]
        best, self.visits = max(values), self.visits + 1
        self.value = best + math.log(sum(math.exp(value - best) for value in values) / len(values))


def descend(root: Node, u: list[float], room: typing.Callable) -> list[Node]:
    """The path to a node with fewer children than room(node, level), chosen by uniform numbers u."""
    path = [root]
    while (node := path[-1]).children and len(node.children) >= room(node, len(path) - 1):
        shares = list(itertools.accumulate(math.exp(child.value - node.value) for child in node.children))
        path.append(node.children[bisect.bisect(shares[:-1], u[len(path) - 1] * shares[-1])])
    return path


@torch.no_grad()
def grow(velocity: typing.Callable, reward: typing.Callable, y: Tensor, steps: int, draws: data.Draws,
         shape: tuple, budget: int, each=1, scale=1.0, wide=1.0, power=0.8) -> Tensor:
    """`each` samples of each of B trees (B each, *shape), for labels y (B,), by budget evaluations a sample.

    reward (x, y) -> (B,). A node has room for wide visits^power children, one before the last step.
    """
    times = sde_times(sample.time_grid(steps))
    roots, spent, k = [Node() for _ in y], [0] * len(y), 0  # roots' children are noises, at times[0]
    room = lambda node, level: 1 if level == steps else wide * node.visits ** power              # noqa: E731
    while rows := [i for i in range(len(y)) if spent[i] + steps <= budget * each]:
        u = draws.uniform(f"tree {k}", (steps + 1,)).tolist()
        paths = {i: descend(roots[i], u[i], room) for i in rows}
        for level, r in enumerate(times):
            if new := [i for i in rows if len(paths[i]) == level + 1]:
                nodes, own = [paths[i][-1] for i in new], [draws.positions[i] for i in new]
                n = data.Draws(draws.seed, own).normal(f"tree {k} {level}", shape).to(y.device)
                for i, node, x in zip(new, nodes, step(velocity, nodes, y[new], times[level - 1], r, n)):
                    spent[i] += level > 0 and len(node.children) == 0
                    node.children.append(Node(x))
                    paths[i].append(node.children[-1])
        for i, value in zip(rows, reward(torch.stack([paths[i][-1].x for i in rows]), y[rows]).tolist()):
            paths[i][-1].value = scale * value
            for node in reversed(paths[i][:-1]):
                node.update()
        k += 1
    u = draws.uniform("tree's samples", (each, steps + 1)).tolist()
    return torch.stack([descend(root, v, lambda *_: 0)[-1].x for i, root in enumerate(roots) for v in u[i]])


def step(velocity: typing.Callable, nodes: list[Node], y: Tensor, t: float, r: float, n: Tensor) -> Tensor:
    """Children at time r of nodes at t, by noise n (B, ...); of roots this noise. A node is asked once."""
    if nodes[0].x is None:
        return n
    if ask := [i for i, node in enumerate(nodes) if node.v is None]:
        for i, v in zip(ask, velocity(torch.stack([nodes[i].x for i in ask]), t, y[ask])):
            nodes[i].v = v
    return sde_step(*(torch.stack([getattr(node, name) for node in nodes]) for name in "xv"), t, r, n)


@dataclasses.dataclass
class Config:
    checkpoint: str = option("", "a run of a flow that knows a null label")
    verifier: str = option("", "a run of --loss classifier; the reward is its log p(y | x)")
    n: int = option(300, "samples of each method and budget")
    steps: int = option(10, "steps from noise to data")
    budgets: str = option("10,20,40", "evaluations of the network for a sample")
    each: int = option(10, "samples of each tree")
    out: str = option("tree.png", "the picture to write")


def compared(cfg: Config, net, reward: typing.Callable, budget: int) -> dict:
    """Name -> (y, draws) -> samples; searches make theirs by ab2, which is better in few steps."""
    velocity, null = sample.guided(net), lambda y: torch.full_like(y, net.num_classes)
    blind, shape = lambda x, t, y: velocity(x, t, null(y)), net.shape
    make, tries = lambda e, y: sample.sample(net, e, null(y), cfg.steps, "ab2"), budget // cfg.steps
    return {"best of N": lambda y, draws: make(search.best_of(tries, make, reward, y, draws, shape), y),
            "nearby": lambda y, draws: make(search.search_nearby(
                tries - 1, 0.5, draws.normal("sample noise", shape), make, reward, y, draws), y),
            "tree": lambda y, draws: grow(blind, reward, y, cfg.steps, draws, shape, budget, cfg.each)}


def draw(rows: list[tuple], out: str) -> None:
    """Reward and recall by the logarithm of evaluations, from rows (method, evaluations, reward, recall)."""
    pen = ImageDraw.Draw(sheet := Image.new("RGB", (640, 250), "white"))
    for left, column, title in ((20, 2, "reward"), (340, 3, "recall")):
        low, *_, high = sorted(row[column] for row in rows)
        pen.text((left, 4), f"{title}, {low:.2f} to {high:.2f}", fill="black")
        for k, (name, colour) in enumerate(METHODS.items()):
            own = [(math.log2(row[1] / rows[0][1]), row[column]) for row in rows if row[0] == name]
            pen.line([(left + 60 * a, 225 - 200 * (b - low) / (high - low or 1)) for a, b in own], colour, 2)
            pen.text((left + 90 * k, 234), name, fill=colour)
    sheet.save(out)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("checkpoint",))
    net, gn = sample.load(cfg.checkpoint, sample.Config(), "cpu"), fid.glyph_net()
    C, rows = load_classifier(cfg.verifier, net, "--verifier"), []
    reward = lambda x, y: C(x, x.new_zeros(len(x))).log_softmax(1).gather(1, y[:, None])[:, 0]   # noqa: E731
    real = gn.extract(data.glyphs(cfg.n, seed=1)[0])["features"]
    print(f"{'method':>10} {'evaluations':>12} {'reward':>8} {'recall':>7} {'accuracy':>9} {'FD-glyphs':>10}")
    for name, budget in itertools.product(METHODS, map(int, cfg.budgets.split(","))):
        method, each = compared(cfg, net, reward, budget)[name], cfg.each if name == "tree" else 1
        y = sample.labels_for(cfg.n // each, net.num_classes)
        x = torch.cat([method(y[k], data.Draws(0, k.tolist())) for k in torch.arange(len(y)).split(50)])
        labels, images = y.repeat_interleave(each), data.to_uint8(x)
        nearest = metrics.neighbour_scores(real, gn.extract(images)["features"])
        rows.append((name, budget, reward(x, labels).mean().item(), nearest["recall"]))
        print("{:>10} {:>12} {:>8.3f} {:>7.2f} {accuracy:>9.3f} {fd_glyphs:>10.1f}".format(
            *rows[-1], **small.score_glyphs(images, labels)), flush=True)
    draw(rows, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    data.run_cli(main)
