"""HED soft edges (arXiv 1504.06375), in the architecture of the weights that published ControlNets used."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdm.controls.base import Control
from jdm.controls.filters import in_pieces
from jdm.errors import UsageError, in_short
from jdm.files import expanded
from jdm.models import hub
from jdm.models.weights import read_tensors
from jdm.schedule import precise

FILE = "ControlNetHED.pth"
WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
SMALLEST = 16  # four halvings leave one pixel
REMEDY = f"fetch {FILE} of lllyasviel/Annotators and name it: class MyHED(HED): weights = \"{FILE}\""


class HED(Control):
    """c = sigmoid of the mean of five side outputs, each upsampled bilinearly to the picture's size.

    The weights are read at the first measurement. To use your own copy, write a subclass in a file of your own:

        class MyHED(HED):
            weights = "models/ControlNetHED.pth"

    Attributes:
        weights: a file (.safetensors, or a pickle that contains only tensors), a folder with ControlNetHED.pth
            or ControlNetHED.safetensors, or a hub id, from which ControlNetHED.pth is downloaded.
        widths: channels of the five blocks; the published weights have these.
    """

    name = "hed"
    channels = 1
    weights: str = "lllyasviel/Annotators"
    widths: tuple[int, ...] = WIDTHS

    def __init__(self, weights: str | None = None):
        if weights is not None:
            self.weights = weights

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], at least 16 px -> c [B, 1, H, W] in [0, 1], differentiable.

        c is float32 or wider, on the pictures' device. Raises UsageError if the weights cannot be loaded.
        """
        height, width = images.shape[-2:]
        if min(height, width) < SMALLEST:
            raise UsageError(f"hed needs pictures of at least {SMALLEST} x {SMALLEST}, got {height} x {width}; "
                             "soft-edge measures smaller ones")
        images = precise(images)
        network = self.network.to(images.device, images.dtype)
        return in_pieces(lambda part: torch.sigmoid(network(255 * part)), images)

    @cached_property
    def network(self) -> HEDNetwork:
        """The frozen network with its weights loaded."""
        with torch.device("meta"):
            network = HEDNetwork(self.widths)
        file = _found(self.weights)
        state = _read(file)
        _check(file, state, network.state_dict())
        network.load_state_dict(state, assign=True)
        return network.float().eval().requires_grad_(False)


class HEDNetwork(nn.Module):
    """Five VGG blocks with a side output each: RGB [B, 3, H, W] in 0..255 -> mean logit [B, 1, H, W].

    Parameters are named as in the published weights: norm, block1.convs.0.weight, block1.projection.weight, ...
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, (inputs, width, depth) in enumerate(zip((3, *widths), widths, depths, strict=False), 1):
            self.add_module(f"block{number}", Block(inputs, width, depth))

    def forward(self, images: Tensor) -> Tensor:
        size, features, sides = images.shape[-2:], images - self.norm, []
        for number, block in enumerate(self.children()):
            features, side = block(functional.max_pool2d(features, 2) if number else features)
            sides.append(functional.interpolate(side, size, mode="bilinear", align_corners=False))
        return torch.stack(sides).mean(0)


class Block(nn.Module):
    """`depth` 3x3 convolutions, each with a ReLU -> (features [B, width, H, W], side output [B, 1, H, W])."""

    def __init__(self, inputs: int, width: int, depth: int):
        super().__init__()
        channels = (inputs, *[width] * depth)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            features = functional.relu(conv(features))
        return features, self.projection(features)


def _found(place: str) -> Path:
    """Returns the weights file for a path or hub id; downloads it for a hub id."""
    path = expanded(place)
    if path.is_dir():
        names = [FILE, str(Path(FILE).with_suffix(".safetensors"))]
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            raise UsageError(f"the folder {place} holds neither {' nor '.join(names)}; {REMEDY}")
        return files[0]
    if path.is_file():
        return path
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or place.count("/") != 1:
        raise UsageError(f"hed's weights {place} do not exist; {REMEDY}")
    from huggingface_hub import hf_hub_download

    hub.unreachable()
    try:
        return Path(hf_hub_download(place, FILE))
    except Exception as error:  # no network, no such repository, a full disk
        raise UsageError(f"hed's weights could not be fetched from {place} ({in_short(error)}); {REMEDY}") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(file)
    except Exception as error:  # a file may be damaged in any way
        raise UsageError(f"{file} cannot be read as weights ({in_short(error)}); {REMEDY}") from error


def _check(file: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key in [*expected, *state]:
        got, wanted = (list(where[key].shape) if key in where else "nothing" for where in (state, expected))
        if got != wanted:
            raise UsageError(f"{file} does not hold HED's weights: {key} must be {wanted}, got {got}; {REMEDY}")
