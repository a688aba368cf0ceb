"""InceptionV3, the feature network of the FID: `python fid.py GENERATED REFERENCE` measures with it.

In two flavours, told by their files: torchvision's, and "fid", the 2015-12-05 graph that published FIDs are
made with (Heusel et al., arXiv:1706.08500). Importing this file adds "inception" to `fid.FEATURES`.
The blocks are in extras/inception_blocks.py, files of statistics in extras/stored.py. Nothing is ever
downloaded: a missing file is explained.

Checked (2 CPU cores, 2026-11-21): formula weights give the numbers of torchvision's class, and of
pytorch-fid's, to 1e-7 of the rms, also folded; one random state dict gives those of torchvision and
torch-fidelity bit for bit; tf1 is torch-fidelity's resize bit for bit, clean Pillow's bicubic to 0.01 grey
levels. Folded, in channels-last memory and eight images at once, a CPU extracts 1.86 times the images/s at
--batch 32 (10.0 against 5.4), and 2.33 times at 64. FID on the real weights: not checked yet, the files
cannot be had here.

    python -m extras.inception                 names, sizes and digests of the weights, and where they belong
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import fid
import model
from extras.files import digest, require_file
from extras.inception_blocks import Conv, Mixed, inception_blocks

# ---- 1. How images of any size become 299 pixels wide: uint8 (N, C, h, w) -> float32 (N, C, size, size) ----


def resize_tf1(x: Tensor, size: int = 299) -> Tensor:
    """Bilinear as in TensorFlow 1, the rule behind published FIDs: output i reads the input at i * n / size.

    No half-pixel shift, neighbours clamped at the edge, no antialiasing.
    """
    x = x.float()
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long()
        left, right = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
        x = left + (right - left) * (at - low).view(-1, *[1] * (3 - dim))
    return x


def resize_pytorch(x: Tensor, size: int = 299) -> Tensor:
    """Bilinear with half-pixel centres and no antialiasing, as in pytorch-fid."""
    return F.interpolate(x.float(), (size, size), mode="bilinear", align_corners=False)


def resize_clean(x: Tensor, size: int = 299) -> Tensor:
    """Antialiased bicubic, clamped to 0..255 and not rounded, as in clean-fid (arXiv:2104.11222): Pillow's
    rule."""
    return F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)


RESIZES = {"tf1": resize_tf1, "pytorch": resize_pytorch, "clean": resize_clean}

# ---- 2. The network ----

WEIGHTS = {  # flavour: number of classes, address, bytes and sha256
    "torchvision": (1000, "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth", 108_949_747,
                    "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef"),
    "fid": (1008, "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth", 95_628_359,
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")}


class InceptionV3(nn.Module):
    """uint8 (N, 3, h, w) -> features float32 (N, 2048), always in eval mode and without gradients.

    weights: a state dict file with torchvision's key names, whose number of classes tells the flavour;
    None: random ones. Images are resized by RESIZES[resize] and go to (x - 128) / 128, but to x / 127.5 - 1
    for torchvision's weights and as in pytorch-fid.
    """

    def __init__(self, weights: str | Path | None = None, flavour: str = "", resize: str = "tf1"):
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"--resize {resize}: choose from {', '.join(RESIZES)}")
        self.flavour, state = read_weights(weights, flavour) if weights else (flavour or "torchvision", None)
        self.label = f"inception {self.flavour} {digest(weights)[:8] if weights else 'random'}"
        self.suffix = "" if self.flavour == "fid" else f"_{self.flavour}"  # of the names of scores
        self.resizer, self.symmetric = RESIZES[resize], self.flavour == "torchvision" or resize == "pytorch"
        self.resize = f"{resize} to 299, {'x/127.5-1' if self.symmetric else '(x-128)/128'}"

        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3, padding=1), Conv(64, 80, 1)
        self.Conv2d_4a_3x3, channels, self.blocks = Conv(80, 192, 3), 192, inception_blocks(self.flavour)
        for name, block in self.blocks.items():
            self.add_module(name, Mixed(channels, *block))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, WEIGHTS[self.flavour][0])
        self.widths = dict(features=2048, spatial=17 * 17 * 7, logits=self.fc.out_features)
        self.at_once = sys.maxsize  # images that `extract` takes through the network together
        if state:
            try:
                self.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{weights}: not a whole InceptionV3 state dict: {reason}") from error
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stays in eval mode: with batch statistics an image's features would depend on its neighbours."""
        return super().train(False)

    def fast(self) -> "InceptionV3":
        """Fold every normalisation, and on a CPU take eight images at once, whose layers' outputs fit into
        its cache, through channels-last memory: features move by some 1e-6."""
        for unit in self.modules():
            if isinstance(unit, Conv):
                unit.fold()
        if self.fc.weight.device.type == "cpu":
            self.at_once = 8
            self.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Float (N, 3, 299, 299), already in range -> features (N, 2048), spatial (N, 2023), logits (N,
        classes).

        features: averages before the last layer (pool3). spatial: the first 7 channels of
        Mixed_6d.branch1x1 in the order h, w, channel (arXiv:2103.03841). logits lack the bias, as in the
        2015-12-05 graph.
        """
        with fid.full_float32(x.device):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2))                      # (N, 80, 73, 73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, 2)                      # (N, 192, 35, 35)
            for name in self.blocks:
                x = getattr(self, name)(x)                                     # at last (N, 2048, 8, 8)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)          # branch1x1 comes first in x
            features = x.mean((2, 3))
            return dict(features=features, spatial=spatial, logits=features @ self.fc.weight.T)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, h, w) -> what `outputs` gives."""
        outs = []
        for part in fid.check_images(images).split(min(self.at_once, max(1, len(images)))):
            x = self.resizer(part)
            outs.append(self.outputs(x / 127.5 - 1 if self.symmetric else (x - 128) / 128))
        return {name: torch.cat([out[name] for out in outs]) for name in self.widths}

    def forward(self, images: Tensor) -> Tensor:
        return self.extract(images)["features"]


def read_weights(path: str | Path, flavour: str = "") -> tuple[str, dict[str, Tensor]]:
    """(flavour, state dict without the auxiliary head) of a file; flavour: what it must be, if given."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file not found: {path}; give {', '.join(WEIGHTS)}, or a path")
    try:
        state = model.read_checkpoint(path)
        found = {classes: name for name, (classes, *_) in WEIGHTS.items()}[len(state["fc.weight"])]
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, .. for damage, KeyError for others
        raise ValueError(f"{path}: not an InceptionV3 state dict with 1000 or 1008 classes, or an incomplete "
                         f"download ({type(error).__name__})") from error
    if flavour not in ("", found):
        raise ValueError(f"{path}: weights of {WEIGHTS[found][0]} classes: {found} weights, not {flavour}")
    return found, {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}


def place(flavour: str) -> Path:
    return fid.cache_folder() / WEIGHTS[flavour][1].split("/")[-1]


def load_inception(weights: str = "torchvision", resize: str = "tf1") -> InceptionV3:
    """InceptionV3 with the weights "torchvision" or "fid" of `fid.cache_folder()`, checked, or of a file."""
    path, flavour = weights, ""
    if weights in WEIGHTS:
        path, flavour = place(weights), weights
        require_file(path, f"InceptionV3 weights ({weights})", *WEIGHTS[weights][1:])
    with torch.random.fork_rng(devices=[]):  # a network is drawn at random before its weights are read
        return InceptionV3(path, flavour, resize)


def features(weights: str, resize: str, device) -> InceptionV3:
    net = load_inception(weights, resize).to(device).fast()
    if net.suffix:
        data.note("warning: these weights are not comparable with published FIDs: see --weights fid")
    return net


fid.FEATURES["inception"] = features


def main() -> None:
    for flavour, (classes, url, size, sha256) in WEIGHTS.items():
        print(f"{flavour}: {classes} classes, {size:,} bytes, sha256 {sha256}")
        print(f"  {url}\n  {place(flavour)} is {'' if place(flavour).exists() else 'not '}there")


if __name__ == "__main__":
    data.run_cli(main)
