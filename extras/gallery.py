"""Pictures of what runs make: a table of samples, or how samples come about.

    python -m extras.gallery runs/glyphs runs/ect runs/mf runs/afm          gallery.png: a row for each run
    python -m extras.gallery runs/glyphs:4,25 runs/ect:1,2,4                 of these numbers of evaluations
    python -m extras.gallery runs/glyphs runs/mf runs/afm --out noise.gif    animated, from noise to digit

All start from the same noise and labels, without guidance, by the averaged weights. A cell is blank where the
method has no such number of network evaluations, as one that only goes from noise to data.

In the animation a frame is one evaluation. A flow moves a little in each; beside its state x_t stands where
its velocity points, x_t - t v, the mean of the images that may lie ahead: blurred at first, which is why it
takes many steps. A method of jumps is there after one.
"""
import dataclasses
import itertools
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import model
import sample
from data import option

EVALUATIONS = 1, 2, 4, 25
DIGITS, COLUMNS = 10, 5  # in a cell
COLOURS = 64             # of an animation


@dataclasses.dataclass
class Run:
    """A trained run: its name, network, and how it is sampled in n evaluations."""
    path: str
    counts: tuple = EVALUATIONS

    def __post_init__(self):
        named = re.fullmatch(r"(.+):(\d+(?:,\d+)*)", self.path)
        if named:
            self.path, self.counts = named[1], [int(n) for n in named[2].split(",")]
        file = sample.find_checkpoint(self.path)
        self.name, self.net = Path(self.path).name, model.load(file)
        self.own, _ = sample.own_settings(file)  # what is fixed, of a run of jumps
        self.solver = model.read_checkpoint(file)["config"]["solver"]
        if named and (wrong := [n for n in self.counts if not self.options(n)]):
            raise ValueError(f"{self.path}:{wrong[0]}: this run takes {self.own['steps']} evaluations")

    def options(self, n: int) -> dict | None:
        """Settings of `sample.sample` for n evaluations, or None where it has no such number."""
        found = dict(steps=n, solver=self.solver, guidance=1.0) | self.own
        return found if found["steps"] == n else None

    def samples(self, n: int, seed: int) -> torch.Tensor:
        labels = sample.labels_for(DIGITS, self.net.num_classes)
        (_, images), = sample.generate(self.net, labels, seed, DIGITS, **self.options(n))
        return images

    def way(self, n: int, seed: int) -> list[tuple]:
        """(t, state x_t, x_t - t v) at each of n evaluations, and (0, samples, samples) at the end."""
        labels, seen = sample.labels_for(DIGITS, self.net.num_classes), []
        draws = data.Draws(seed, range(DIGITS))
        hook = self.net.register_forward_hook(lambda net, given, v: seen.append((given[1], given[0], v)))
        x = sample.sample(self.net, draws.normal("sample noise", self.net.state), labels, draws=draws,
                          **self.options(n))
        hook.remove()
        seen.append((torch.zeros(DIGITS), x, x))
        return [(float(t[0]), data.to_uint8(x_t), data.to_uint8(x_t - t[0] * v)) for t, x_t, v in seen]


def table(runs: list[Run], seed: int) -> Image.Image:
    """A row for each run, a column for each number of evaluations."""
    cells = {(row, n): data.grid(run.samples(n, seed), COLUMNS) for row, run in enumerate(runs)
             for n in run.counts if run.options(n)}
    counts = sorted({n for _, n in cells})
    w, h = next(iter(cells.values())).size
    top, gap, font = 36, 14, ImageFont.load_default(size=20)
    left = 24 + round(max(font.getlength(run.name) for run in runs))
    sheet = Image.new("RGB", (left + len(counts) * (w + gap), top + len(runs) * (h + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, n in enumerate(counts):
        words = f"{n} evaluation{'s' * (n > 1)}"
        pen.text((left + k * (w + gap) + w / 2, top / 2), words, "black", font, "mm")
    for row, run in enumerate(runs):
        up = top + row * (h + gap)
        pen.text((left - 12, up + h / 2), run.name, "black", font, "rm")
        for k, n in enumerate(counts):
            if (row, n) in cells:
                sheet.paste(cells[row, n], (left + k * (w + gap), up))
    return sheet


def animation(runs: list[Run], seed: int) -> list[Image.Image]:
    """A frame for each evaluation: side by side, each run's state and, of a flow, where it points."""
    panels = []  # (title, what it says at each evaluation, its pictures)
    for run in runs:
        n = run.own.get("steps", 1) if run.own else max(run.counts)
        times, states, ahead = zip(*run.way(n, seed))
        says = [f"t = {t:.2f}" for t in times[:-1]] + [f"done: {n} evaluation{'s' * (n > 1)}"]
        panels.append((f"{run.name}: x_t", says, states))
        if n > 1:
            panels.append((f"{run.name}: x_t - t v", says, ahead))
    frames, font = [], ImageFont.load_default(size=18)
    for k in range(max(len(says) for _, says, _ in panels)):
        cells = [data.grid(pictures[min(k, len(pictures) - 1)], COLUMNS) for _, _, pictures in panels]
        w, h = cells[0].size
        frame = Image.new("RGB", (len(cells) * (w + 14) - 14, h + 52), "white")
        pen = ImageDraw.Draw(frame)
        for (title, says, _), cell, left in zip(panels, cells, range(0, frame.width, w + 14)):
            pen.text((left + 2, 14), title, "black", font, "lm")
            frame.paste(cell, (left, 26))
            pen.text((left + 2, h + 40), says[min(k, len(says) - 1)], "black", font, "lm")
        frames.append(frame)
    ends = Image.new("RGB", (frame.width, 2 * frame.height))
    ends.paste(frames[0])
    ends.paste(frame, (0, frame.height))
    palette = ends.quantize(COLOURS)  # one for all: what stands still costs nothing
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


@dataclasses.dataclass
class Config:
    out: str = option("gallery.png", "the picture to write: a .png table or an animated .gif")
    seed: int = option(0, "of the noise")


def runs_and_settings(config: type, argv: list[str] | None, description: str) -> tuple:
    """The runs that a command line names before its flags, and its settings; without runs it shows how."""
    argv = sys.argv[1:] if argv is None else argv
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg = data.parse(config, argv[len(paths):], description)
    if not paths:
        print(description.strip())
    return paths, cfg


def main(argv: list[str] | None = None) -> None:
    paths, cfg = runs_and_settings(Config, argv, __doc__)
    if not paths:
        return
    runs = [Run(path) for path in paths]
    if cfg.out.endswith(".gif"):
        first, *rest = animation(runs, cfg.seed)
        pauses = [1000, *[120] * (len(rest) - 1), 3000]
        first.save(cfg.out, save_all=True, append_images=rest, duration=pauses, loop=0)
    else:
        table(runs, cfg.seed).save(cfg.out)
    print(f"wrote {cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    data.run_cli(main)
