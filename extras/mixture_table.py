"""The table and the picture of runs on the 1-D mixture (extras/mixture.py).

A line of the table: rms of the velocity; rms distance to the exact flow map of the same noise, and W1 to the
exact quantiles, after 1, 2, 4 and 50 network evaluations; largest error of a mode's share; share of samples
within 3 standard deviations of a mode. The picture: trajectories of 20 noises over the density of x_t, and
the density of samples over that of data.

    python -m extras.mixture_table        of the exact velocity alone: what solver steps cost
"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

import data
from extras import mixture
from extras.gaussians import FOUR_MODES, exact_velocity

COUNTS = 1, 2, 4, 50  # numbers of network evaluations that are compared
PANEL, SIDE, REACH = (300, 220), 56, 2.8  # pixels of a panel and at its right, and the largest |x| in it
BLUE, RED = (84, 148, 214), (190, 40, 30)


def print_table(runs: dict) -> None:
    """A line for each run, name -> (network, how its method samples): the columns of `point_errors`."""
    print(f"{'':34}{'rms to the exact map in n steps':^34}{'W1 in n steps':^34}\n"
          f"{'objective':>24}{'velocity':>10}" + 2 * ("".join(f"{n:>8}" for n in COUNTS) + "  ")
          + f"{'weight':>8}{'in mode':>8}")
    for name, (net, sampling) in runs.items():
        solver, only = sampling.get("solver", "euler"), sampling.get("steps")
        found = {n: mixture.point_errors(net, FOUR_MODES, n, solver) for n in COUNTS
                 if n == (only or n)}
        exact = {n: e["map"] for n, e in found.items() if n == 1 or solver == "euler"}  # else of other noise
        last = found[min(found)] if sampling else found[50]
        row = [None if only or solver != "euler" else last["velocity"], *map(exact.get, COUNTS),
               *(found[n]["W1"] if n in found else None for n in COUNTS), last["weight"], last["in mode"]]
        cells = ["-" if value is None else f"{value:.3f}" for value in row]
        widths = 10, 8, 8, 8, 8, 10, 8, 8, 8, 10, 8
        print(f"{name:>24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def draw_trajectories(runs: dict, path: str, columns: int = 4) -> None:
    """A panel for each run: trajectories of 20 noises (red) over the density of x_t (blue); at its right the
    density of 4,000 samples (red) over that of data (blue)."""
    w, h = PANEL
    cell_w, cell_h = w + SIDE + 16, h + 44
    size = columns * cell_w + 16, -(-len(runs) // columns) * cell_h + 4
    sheet = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # halved at the end: smooth lines
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=26)
    for k, (name, (net, sampling)) in enumerate(runs.items()):
        left, up = 16 + k % columns * cell_w, 22 + k // columns * cell_h
        steps = sampling.get("steps", 1 if sampling else 100)
        draw_panel(sheet, left, up, net, steps)
        title = f"{name}, {steps} step{'s' * (steps > 1)}"
        for x, y, words, anchor in ((0, -4, title, "ls"), (0, h + 3, "t = 1, noise", "la"),
                                    (w, h + 3, "t = 0, data", "ra")):
            pen.text((2 * (left + x), 2 * (up + y)), words, "black", font, anchor)
    sheet.resize(size, Image.Resampling.LANCZOS).save(path)


def draw_panel(sheet: Image.Image, left: int, up: int, net, steps: int) -> None:
    """One panel of a sheet of twice its size, its corner at (left, up)."""
    (w, h), pen = PANEL, ImageDraw.Draw(sheet)

    def place(along: float, x: float) -> tuple[float, float]:
        return 2 * (left + along), 2 * (up + (REACH - x) / (2 * REACH) * h)

    x = torch.linspace(REACH, -REACH, 2 * h)
    p = torch.stack([density(x, t) for t in torch.linspace(1, 0, 2 * w)], 1)                   # (2 h, 2 w)
    shade = (p / p.amax(0)).sqrt()[..., None]
    panel = (1 - shade) * 255 + shade * torch.tensor(BLUE)
    sheet.paste(Image.fromarray(panel.to(torch.uint8).numpy()), (2 * left, 2 * up))
    for line in mixture.trajectory(net, quantiles(20), steps)[..., 0].T.tolist():
        pen.line([place(s * w / steps, v) for s, v in enumerate(line)], RED, 3)

    found, width = mixture.trajectory(net, quantiles(4000), steps)[-1, :, 0], 0.04
    samples = (-((x[:, None] - found) / width).square() / 2).exp().mean(1) / width / math.sqrt(2 * math.pi)
    of_data, of_samples = ([place(w + 4 + SIDE * min(1.0, v / 0.8), at) for v, at in zip(values.tolist(), x)]
                           for values in (density(x, torch.tensor(0.0)), samples))
    pen.polygon([place(w + 4, REACH), *of_data, place(w + 4, -REACH)], BLUE)
    pen.line(of_samples, RED, 3)


def density(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """p_t at points x (N,)."""
    log_p, _, _ = FOUR_MODES.components(x[:, None], t.expand(len(x)))
    return log_p.logsumexp(1).exp() / math.sqrt(2 * math.pi)


def quantiles(n: int) -> torch.Tensor:
    """The noises (n, 1) in the middle of n equal shares."""
    return torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None]


def main() -> None:
    print_table({"exact flow": (exact_velocity, {})})


if __name__ == "__main__":
    data.run_cli(main)
