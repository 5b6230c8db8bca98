"""A small classifier of 32x32 pictures; its logits give prompt agreement, its penultimate features distances."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jdm.errors import UsageError, in_short
from jdm.files import fitted, read_json
from jdm.ranges import Count

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST = 8192  # channels, features or classes
SIDE, PATCH = 32, 4  # sides of a mixer's pictures and of its patches


@dataclass(frozen=True)
class ClassifierConfig:
    """The settings from which a `Classifier` is built.

    Attributes:
        name: name of the trained classifier, for tables and statistics; it should include the data.
        classes: number of classes.
        trunk: convolutions, or for a second opinion mixer, a residual network over patches (MLP-Mixer, arXiv
            2105.01601).
        widths: for convolutions, channels of the stem and of the three stages, at 1/2, 1/2, 1/4 and 1/8 of the
            side; for a mixer, channels of its stem, then of its blocks, all equal.
        dimensions: number of penultimate features.
        grey: average the three channels first. Suited to grey data, on which colour filters would stay at their
            initialisation; such a classifier cannot see a tint.
    """

    name: str = "classifier"
    classes: Count = 10
    trunk: Literal["convolutions", "mixer"] = "convolutions"
    widths: tuple[Count, ...] = (32, 64, 128, 160)
    dimensions: Count = 128
    grey: bool = True


class Classifier(nn.Module):
    """pixels [B, 3, H, W] in [-1, 1] -> logits [B, classes]; designed for 32x32.

    0.5M parameters, channels-last throughout. Convolutions take pictures from 8x8 up, a mixer only 32x32. The
    penultimate features come from a batch normalisation without an activation: centred, of unit scale on the
    training data and without a peak at 0, so that they are close to the Gaussians that the Frechet distance assumes.
    """

    def __init__(self, config: ClassifierConfig | None = None):
        super().__init__()
        self.config = config or ClassifierConfig()
        self.trunk = {"convolutions": _convolutions, "mixer": _mixer}[self.config.trunk](self.config)
        dimensions = self.config.dimensions
        self.penultimate = nn.Sequential(
            nn.Linear(self.config.widths[-1], dimensions, bias=False), nn.BatchNorm1d(dimensions)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dimensions, self.config.classes))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> [B, dimensions], before the last activation."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(f"pixels must be [B, 3, H, W], got {list(pixels.shape)}; repeat a grey channel")
        if not pixels.is_floating_point():
            raise UsageError(f"pixels must be float in [-1, 1], got {pixels.dtype}; use space.from_bytes")
        if self.config.trunk == "mixer" and pixels.shape[2:] != (SIDE, SIDE):
            raise UsageError(f"pixels must be {SIDE}x{SIDE} for a mixer, got {list(pixels.shape[2:])}; "
                             "resize them, or use convolutions")
        x = pixels.mean(1, keepdim=True) if self.config.grey else pixels
        return self.penultimate(self.trunk(x.contiguous(memory_format=torch.channels_last)))

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> [B, classes], unnormalised."""
        return self.head(self.features(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits(pixels)

    def fingerprint(self) -> str:
        """First eight hexadecimal digits of the weights' SHA-256: equal after save and load."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:8]

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, creating the folder if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """Loads a classifier written by `save`, in eval mode on the CPU."""
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UsageError(f"{folder} holds no {name}; give a folder written by Classifier.save")
        try:
            values = read_json(folder / CONFIG)
            unknown = set(values) - {field.name for field in fields(ClassifierConfig)}
            if unknown:
                raise UsageError(f"{folder / CONFIG} has unknown fields: {', '.join(sorted(unknown))}")
            config = fitted(values, ClassifierConfig, str(folder / CONFIG), "give a folder written by Classifier.save")
            if not all(0 < wide <= LARGEST for wide in (*config.widths, config.dimensions, config.classes)):
                raise UsageError(f"{folder / CONFIG}: widths, dimensions and classes must be in 1..{LARGEST}; give a "
                                 "folder written by Classifier.save")
            model = cls(config)
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (ValueError, IndexError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{folder} is not a saved classifier: {in_short(error)}") from error
        return model.eval()


def _convolutions(config: ClassifierConfig) -> nn.Sequential:
    stem, *stages = config.widths
    layers = [_block(1 if config.grey else 3, stem, kernel=5, stride=2)]
    for k, (before, after) in enumerate(zip([stem, *stages[:-1]], stages, strict=True)):
        layers += [nn.MaxPool2d(2)] * (k > 0) + [_block(before, after)]
    return nn.Sequential(*layers, _block(stages[-1], stages[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _block(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _mixer(config: ClassifierConfig) -> nn.Sequential:
    stem, width = config.widths[:2]
    if set(config.widths[1:]) != {width}:
        raise UsageError(f"widths of a mixer must be equal after the first, got {config.widths}; "
                         "its blocks are residual")
    patches = [nn.Conv2d(1 if config.grey else 3, stem, 5, 2, 2), nn.GELU(), nn.Conv2d(stem, width, 3, 2, 1)]
    blocks = [_Mixing((SIDE // PATCH) ** 2, width) for _ in config.widths[1:]]
    pooled = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.LayerNorm(width)]
    return nn.Sequential(*patches, nn.Flatten(2), *blocks, *pooled)


class _Mixing(nn.Module):
    """One mixer block: x [B, width, patches] + a network across patches + a network across channels, each residual."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.across, self.within = (
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for n in (patches, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norms[0](x.mT).mT)
        return x + self.within(self.norms[1](x.mT)).mT
