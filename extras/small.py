"""fd_small: the score of samples of any labelled images, where no InceptionV3 is at hand.

    python train.py --data PATH                                          ends with it
    python fid.py A PATH --features small --weights PATH --num 1000      A: a run, or a set of samples
    python fid.py A B --features small --weights PATH                    any two sets
    python -m extras.small PATH                                          how good its classifier is

As GlyphNet for the digits that the program draws: the same small network is trained on the data's own
labels, and the score is the Frechet distance between its features of samples and of as many real images.

The images of a class are shared out: a third trains the classifier, two thirds only measure. `floor` is the
distance between those two, what a perfect generator gets; `bias` what so few images add, to first order (see
bias.py); `accuracy` the share of samples whose class it finds, to be compared with its accuracy on real
images, which its label tells. Real images come with their classes in turn, as samples do. A generator has
trained on all of them, so that one which repeats its training images is not found out.

The numbers compare within one data set and one classifier, whose label is printed with them, and with no
published FID. It is kept in a file named after its code and the data, once for all runs.
"""
import dataclasses
import functools

import torch
from torch import Tensor

import data
import fid
from data import option

CHUNK = 500  # images read at a time


class SmallNet(fid.GlyphNet):
    """GlyphNet for the classes of another data set."""
    suffix, metrics = "_small", "fid,bias" if data.optional("bias") else "fid"

    def __init__(self, path: str, images: data.Dataset):
        super().__init__(images.num_classes)
        self.source, self.images = path, images
        self.seen = min(24_000, 10 * len(images))  # images of one pass, some of them several times
        labels = torch.as_tensor(images.labels)
        order = torch.randperm(len(labels), generator=data.generator("shares of", labels.numpy().tobytes()))
        self.members = [order[labels[order] == k].tolist() for k in range(images.num_classes)]
        self.accuracy = None

    @property
    def label(self) -> str:
        weights = super().label.removeprefix("glyphnet ")
        return (f"classifier {weights} of {self.source}, accuracy {self.accuracy:.3f} on held-out images; "
                "compares within this data set only")

    def real(self, n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """n images uint8 (n, 3, size, size), their classes in turn, and labels (n,): of seeds 1, 2 and 3 from
        three thirds of the data, which is begun again where it is too short."""
        images = self.images if self.images.shape[1:] == (size, size) else data.dataset(self.source, size)
        thirds, labels = [own[seed % 3::3] for own in self.members], torch.arange(n) % len(self.members)
        chosen = [thirds[k][i // len(thirds) % len(thirds[k])] for i, k in enumerate(labels.tolist())]
        lists = [chosen[start:start + CHUNK] for start in range(0, n, CHUNK)]
        return torch.cat([items for items, _ in data.batches(images, lists, -1)]), labels


def small_net(path: str, images: data.Dataset | None = None, seed: int = 0) -> SmallNet:
    """The classifier of the data set at a path, trained where no file of it is there yet."""
    images = images or data.dataset(path)
    if why := lacking(images):
        raise ValueError(f"--features small: {path} {why}")
    net = fid.glyph_net(functools.partial(SmallNet, path, images), seed)
    real, labels = net.real(1000, 32, 1)
    found = torch.cat([net.extract(part)["logits"].argmax(1) for part in real.split(CHUNK)])
    net.accuracy = (found == labels).float().mean().item()
    return net


def lacking(images: data.Dataset) -> str:
    """What the data set lacks to be scored, or "" for nothing."""
    fewest = torch.as_tensor(images.labels).bincount(minlength=images.num_classes).min()
    if images.shape[0] != 3:
        return "holds latents: decoded samples compare by InceptionV3"
    if images.num_classes < 2:
        return "has no labels to train a classifier on: compare samples by InceptionV3"
    return f"has {fewest} images of a class: at least 3 are needed" if fewest < 3 else ""


def judge(path: str, images: data.Dataset) -> SmallNet | None:
    """What scores the samples of a training run; None, and a note that says why, where nothing can."""
    if why := lacking(images):
        return data.note(f"no score: {path} {why} (python fid.py RUN {path} --num 50000)")
    net = small_net(path, images)
    data.note(f"warning: fd_small is no FID: {net.label}")
    return net


def features(weights: str, resize: str, device) -> SmallNet:
    """For fid.py: weights is the path of the data set."""
    if weights == "torchvision":
        raise ValueError("--features small: --weights PATH says of which data set the classifier is")
    return small_net(weights).to(device)


fid.FEATURES["small"] = features


def score_glyphs(images: Tensor, labels: Tensor) -> dict:
    """dict(fd_glyphs, floor, accuracy, n, ..) of glyphs at hand: uint8 (N, 3, s, s), labels (N,)."""
    batches = [(range(len(images)), images, labels)]
    return fid.score(fid.glyph_net(), fid.ImageSet("", None, None, batches, labels))


@dataclasses.dataclass
class Config:
    path: str = option("", "a data set with labels, as for train.py --data")
    n: int = option(1000, "images of each of two sets")
    seed: int = option(0, "of the classifier: weights and order")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("path",))
    if not cfg.path:
        return print(__doc__.strip())
    net = small_net(cfg.path, seed=cfg.seed)
    _, floor = fid.real_glyphs(net, cfg.n, 32, [fid.FRECHET])
    print(f"{net.label}\nfloor of {cfg.n:,} images {floor:.3f}")


if __name__ == "__main__":
    data.run_cli(main)
