"""What is lost without an ingredient: methods on the 1-D mixture, with a piece taken away.

    python -m extras.controls              all of them: a table, and controls.png

W1 in 1, 2, 4 and 50 steps of sampling, seed 0 (of cafm in 50 and of afm in 1, seeds 0 / 1):

    meanflow                        0.083, 0.074, 0.047, 0.016
    meanflow, no jumps              0.968, 0.236, 0.184, 0.029      a flow: one step does not do
    meanflow, p = 1                 0.184, 0.203, 0.217, 0.217      biased where noise does not average out
    imf                             0.075, 0.077, 0.052, 0.013
    imf, no head                    0.077, 0.067, 0.040, 0.017      no worse, on points
    cafm                            0.041 / 0.051
    cafm, 1 D step for 1 of G       0.076 / 0.086
    afm                             0.032 / 0.036
    afm, x                          0.039 / 0.037                   the network gives where to jump
    afm, x, no transport cost       32.9 / 12.4                     nothing ties it to the data's scale

A generator that gives the jump starts next to the shortest map, and in one dimension stays there also without
the cost.
"""
import data
from extras import mixture

CONTROLS = {"meanflow": {}, "meanflow, p = 1": dict(p=1.0), "meanflow, no jumps": dict(jumps=0.0),
            "imf": {}, "imf, no head": dict(head=0, kind=mixture.PointNet),
            "cafm": {}, "cafm, 1 D step for 1 of G": dict(d_steps=1),
            "afm": {}, "afm, x": dict(predict="x"),
            "afm, x, no transport cost": dict(predict="x", ot=0.0, ot_end=0.0)}


def main(argv: list[str] | None = None) -> None:
    about = "Train methods on a 1-D mixture, with a piece taken away."
    mixture.command(argv, about, "controls.png", lambda cfg: CONTROLS)


if __name__ == "__main__":
    data.run_cli(main)
