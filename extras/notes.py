"""What the core says beside its work: notes of samples that are alike, of a start, of whose flag a flag is.

The core asks for these by `data.optional("notes")`.
"""
import contextlib
import sys

import torch

import data
import losses


def warn_of_sameness(fake: list, labels: torch.Tensor, source: data.Dataset) -> None:
    """A note where the images of a class deviate half as much as the data's."""
    known, deviations = torch.as_tensor(source.labels), []
    real = [(known == k).nonzero()[:int(n), 0] for k, n in zip(*labels.unique(return_counts=True))]
    for images, classes in [*((images, labels[indices]) for indices, images in fake),
                            next(data.batches(source, [torch.cat(real).tolist()]))]:
        own = [images[classes == k].float() for k in classes.unique()]
        deviations.append(sum(x.std(0).mean() for x in own if len(x) > 1))
    if len(deviations) == 2 and deviations[0] < deviations[1] / 2:  # on process 0, which has the samples
        share = deviations[0] / deviations[1]
        data.note(f"samples of a class deviate {share:.2f} times as much as the data: the generator forgets "
                  "its noise; try a lower --lr than --d_lr, or more --ot")


def warn_of_start(cfg, source: data.Dataset) -> None:
    if source.shape[0] != 3 and not cfg.codec:
        data.note("no --codec to decode these latents, so no pictures")
    scratch = losses.find(cfg.loss).scratch
    if scratch is not None and not (cfg.init or cfg.resume):
        own = ", ".join(f"{name} {getattr(cfg, name)}" for name in scratch)
        data.note(f"{cfg.loss} is meant to start from a flow (--init RUN); from scratch: {own or 'may fail'}")


def takers(flag: str) -> str:
    """Which objectives take a flag."""
    for path in data.extra_file("any").parent.glob("[!_]*.py"):
        with contextlib.suppress(ValueError):  # one that lacks another
            path.stem.startswith("test") or data.extra(path.stem, flag)
    name = flag.removeprefix("no-")
    names = [loss for loss, objective in losses.LOSSES.items() if name in objective.flags]
    return f"--{flag} is a setting of --loss {', '.join(names)}" if names else ""


def main(argv: list[str] | None = None) -> None:
    for flag in sys.argv[1:] if argv is None else argv:
        print(takers(flag.lstrip("-")) or f"{flag}: a setting of no objective alone")


if __name__ == "__main__":
    data.run_cli(main)
