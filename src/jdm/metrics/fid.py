"""Inception features for FID as papers report it (arXiv 1706.08500), through torch-fidelity."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from jdm.errors import UsageError, in_short
from jdm.metrics.extractors import checked_images
from jdm.rewards.networks import read_weights


class Inception:
    """2048 pooled features of TensorFlow's 2015 Inception: the Frechet distance on them is FID.

    torch-fidelity resizes and computes as TensorFlow did. It needs torchvision, so it is an extra: pip install
    'jdm[fid]'.

    Args:
        weights: file of the published weights; by default torch-fidelity downloads and caches them.
        device: device on which the network runs.
        batch: pictures per pass.
    """

    def __init__(self, weights: str = "", device: str | torch.device = "cpu", batch: int = 32):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise UsageError(f"FID needs torch-fidelity and the torchvision that matches your torch "
                             f"({in_short(error)}); pip install 'jdm[fid]'") from error
        if weights and not Path(weights).is_file():
            raise UsageError(f"{weights}: no such file of Inception's weights; leave it out to download them")
        if weights:
            read_weights("FID", Path(weights))  # torch-fidelity would unpickle any object; this refuses all but tensors
        own = f"-{hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]}" if weights else ""
        self.name, self.batch, self.device = f"inception-2048{own}", batch, torch.device(device)
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                              feature_extractor_weights_path=weights or None)
        except Exception as error:  # offline, or weights of another network
            raise UsageError(f"Inception's weights could not be loaded ({in_short(error)}); fetch torch-fidelity's "
                             "file and name it: --extractor inception:FILE") from error
        self._net = net.to(self.device).eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, 2048] on the CPU."""
        checked_images(images)
        return torch.cat([self._net(part.to(self.device))[0].float().cpu() for part in images.split(self.batch)])
