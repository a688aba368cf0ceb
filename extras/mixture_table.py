"""The table and the picture of runs on the 1-D mixture (extras/mixture.py).

A line of the table: rms of the velocity; rms distance to the exact flow map of the same noise, and W1 to the
exact quantiles, after 1, 2, 4 and 50 network evaluations; largest error of a mode's share; share of samples
within 3 standard deviations of a mode. The picture: trajectories of 60 noises over the density.

    python -m extras.mixture_table        of the exact velocity alone: what solver steps cost
"""
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from extras import mixture
from extras.gaussians import FOUR_MODES, exact_velocity

COUNTS = 1, 2, 4, 50  # numbers of network evaluations that are compared


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


def draw_trajectories(runs: dict, path: str, columns: int = 6) -> None:
    """A panel for each run: trajectories of 60 noises (white) over the density of x_t (blue)."""
    w, h, reach, top = 420, 300, 3.0, 22
    x = torch.linspace(reach, -reach, h)[:, None]
    log_p = [FOUR_MODES.components(x, t.expand(h))[0].logsumexp(1) for t in torch.linspace(1, 0, w)]
    density = torch.stack(log_p, 1).exp()                                                     # (h, w)
    shade = (density / density.amax(0)).sqrt()[..., None]
    panel = ((1 - shade) * torch.tensor([14, 17, 40]) + shade * torch.tensor([64, 132, 214])).to(torch.uint8)
    size = (w + 8) * min(columns, len(runs)) + 8, (h + top + 26) * -(-len(runs) // columns)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    e = torch.special.ndtri((torch.arange(60) + 0.5) / 60)[:, None]
    for k, (name, (net, sampling)) in enumerate(runs.items()):
        left, up = 8 + k % columns * (w + 8), top + k // columns * (h + top + 26)
        steps = sampling.get("steps", 1 if sampling else 100)
        sheet.paste(Image.fromarray(panel.numpy()), (left, up))
        pen.text((left, up - 18), f"{name}, {steps} step{'s' * (steps > 1)}", fill="black", font=font)
        pen.text((left, up + h + 4), f"t = 1 noise{'t = 0 data':>70}", fill="black", font=font)
        for line in mixture.trajectory(net, e, steps)[..., 0].T:
            points = [(left + s * w / steps, up + (reach - float(v)) / (2 * reach) * h)
                      for s, v in enumerate(line)]
            pen.line(points, fill="white", width=1)
    sheet.save(path)


def main() -> None:
    print_table({"exact flow": (exact_velocity, {})})


if __name__ == "__main__":
    data.run_cli(main)
