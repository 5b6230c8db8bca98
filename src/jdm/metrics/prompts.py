"""Prompt agreement: how often a classifier assigns a picture to the class of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from jdm.errors import UsageError, plural
from jdm.models.classifier import Classifier
from jdm.space import from_bytes


@torch.no_grad()
def prompt_agreement(classifier: Classifier, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Share of uint8 images [N, 3, H, W] that the classifier assigns to the prompted class, labels [N].

    In [0, 1]. Compare it to the classifier's accuracy on real pictures; it can exceed that if training pulls
    pictures to the middle of a class. Leaves the classifier in eval mode.
    """
    if images.dtype != torch.uint8:
        raise UsageError(f"images must be uint8 in 0..255, got {images.dtype}; convert with space.to_bytes")
    if len(images) == 0 or labels.shape != (len(images),):
        raise UsageError(f"labels must be [N], got {list(labels.shape)} for {plural(len(images), 'image')}")
    classifier.eval()
    device = next(classifier.parameters()).device
    seen = [classifier(from_bytes(part.to(device))).argmax(1).cpu() for part in images.split(batch)]
    return float((torch.cat(seen) == labels.cpu()).double().mean())
