"""loss.png of a run folder, which train.py draws at every checkpoint: the loss of each role over the steps.

    python -m extras.curves runs/glyphs ...         draw it now
"""
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data
import train


def draw_loss(log: Path, picture: Path) -> None:
    """loss.png: each role's loss, on a logarithmic scale, over the steps."""
    rows = [row for row in train.read_log(log) if row["loss"] > 0]
    if not rows:
        return
    values, last = [math.log10(row["loss"]) for row in rows], rows[-1]["step"]
    bottom, top = min(values), max(max(values), min(values) + 1e-3)
    sheet = Image.new("RGB", (660, 360), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(size=12)

    def at(step, value):
        return 56 + 580 * step / last, 12 + 308 * (top - value) / (top - bottom)

    for k in range(5):
        step, value = round(last * k / 4), bottom + (top - bottom) * k / 4
        pen.line([at(0, value), at(last, value)], fill="#dddddd")
        pen.text((4, at(0, value)[1] - 7), f"{10 ** value:.3g}", fill="black")
        pen.text((at(step, value)[0] - 12, 340), str(step), fill="black")
    for role, colour in zip(dict.fromkeys(row["role"] for row in rows), ("#1f5fbf", "#c2410c")):
        line = [at(row["step"], value) for row, value in zip(rows, values) if row["role"] == role]
        pen.line(line, fill=colour, width=2)
        pen.circle(line[-1], 2, fill=colour)
        pen.text((line[-1][0] - 60, line[-1][1] - 20), f"loss {role}", fill=colour)
    sheet.save(picture)


def main() -> None:
    for run in sys.argv[1:]:
        draw_loss(Path(run, "log.jsonl"), Path(run, "loss.png"))
        print(f"wrote {Path(run, 'loss.png')}")


if __name__ == "__main__":
    data.run_cli(main)
