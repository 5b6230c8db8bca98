"""Writes LoRA files of stock diffusers, ComfyUI and A1111, and approximates a full student by a LoRA.

Every file written has the same rank in all layers and alpha = rank, because readers disagree about layers that differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.errors import UsageError
from jdm.formats.single_file import save

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name load_lora_weights(folder) looks for
KOHYA = "lora_unet_"
# Readers cannot tell the underscores of SDXL's added embedding from dots; kohya's own files use its single-file name.
KOHYA_NAMES = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}


@dataclass(frozen=True)
class LoRA:
    """W + B A for named layers of a UNet; B includes the scale alpha / rank.

    Attributes:
        layers: path -> (A [r, in, ...], B [out, r, ...]); a convolution's A has its kernel, its B is 1x1.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(a) for a, _ in self.layers.values())

    def at_one_rank(self) -> LoRA:
        """This LoRA with every layer padded with zeros to the largest rank, which changes no output."""
        rank = self.rank
        return LoRA({path: (_filled(a, 0, rank), _filled(b, 1, rank)) for path, (a, b) in self.layers.items()})


@dataclass(frozen=True)
class Difference:
    """The LoRA nearest to the change of weights dW in training, and its errors.

    Attributes:
        errors: rank -> || dW - B A || / || dW || over all layers that a LoRA can hold, for this rank and others.
        left_out: norm of the change in biases and normalisations, which a LoRA cannot hold, relative to the whole
            change.
    """

    lora: LoRA
    errors: dict[int, float]
    left_out: float


def write_diffusers(lora: LoRA, file: Path, part: str = "unet") -> Path:
    """Writes the layout of diffusers and peft: `unet.PATH.lora_A.weight`, with alpha in the header.

    Args:
        part: the network's name in its model's folder.
    """
    lora = lora.at_one_rank()
    tensors = {f"{part}.{path}.lora_{half}.weight": t for path, pair in lora.layers.items()
               for half, t in zip("AB", pair, strict=True)}
    config = {f"{part}.r": lora.rank, f"{part}.lora_alpha": lora.rank, f"{part}.target_modules": list(lora.layers)}
    return save(tensors, file, lora_adapter_metadata=json.dumps(config))


def write_kohya(lora: LoRA, file: Path) -> Path:
    """Writes kohya's layout, which ComfyUI and A1111 read: `lora_unet_PATH.lora_down.weight`, `.alpha`."""
    lora = lora.at_one_rank()
    tensors = {}
    for path, (a, b) in lora.layers.items():
        name = KOHYA + KOHYA_NAMES.get(path, path.replace(".", "_"))
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b,
                    f"{name}.alpha": torch.tensor(float(lora.rank))}
    return save(tensors, file, ss_network_module="networks.lora", ss_network_dim=str(lora.rank),
                ss_network_alpha=str(float(lora.rank)))


def difference_lora(base: nn.Module, tuned: nn.Module, rank: int) -> Difference:
    """The rank-r LoRA nearest to tuned - base, layer by layer: the truncated SVD of each difference (Eckart-Young).

    Covers every linear and convolution layer; a convolution's weight is taken as a matrix [out, in * kernel].

    Raises:
        UsageError: the two differ in shape, or are equal.
    """
    if rank < 1:
        raise UsageError(f"LoRA rank must be at least 1, got {rank}")
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if before.keys() != after.keys() or any(before[k].shape != after[k].shape for k in before):
        raise UsageError("the student and its base are UNets of different shapes; name the model it was trained from")
    layers = {f"{path}.weight" for path, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found, values, rest = {}, [], 0.0
    for key in before:
        change = (after[key].detach() - before[key].detach().to(after[key].device)).double()
        if key not in layers:
            rest += float(change.square().sum())
        elif bool(change.any()):
            a, b, squares = _truncated(change.flatten(1), rank)
            found[key.removesuffix(".weight")] = (a.unflatten(1, change.shape[1:]).float(),
                                                  b.reshape(*b.shape, *[1] * (change.ndim - 2)).float())
            values.append(squares)
    if not found:
        raise UsageError("the student's UNet equals its base's in every layer; there is nothing to write as a LoRA")
    lora, held = LoRA(found), sum(float(v.sum()) for v in values)
    ranks = {2**k for k in range(max(len(v) for v in values).bit_length())} | {lora.rank}
    errors = {r: (sum(float(v[r:].sum()) for v in values) / held) ** 0.5 for r in sorted(ranks)}
    return Difference(lora, errors, (rest / (held + rest)) ** 0.5)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, squared singular values) with B A the nearest matrix of this rank, from the smaller Gram matrix.

    Needs float64: rounding the squares to 1e-16 of the largest is an error of 1e-8 of the largest singular value.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    u = vectors[:, :rank]
    v = u.T @ wide
    share = squares[:rank].clamp_min(1e-16 * squares[0]) ** 0.25  # gives A and B the same magnitude, for float16
    u, v = u * share, v / share[:, None]
    return (u.T, v.T, squares) if tall else (v, u, squares)


def _filled(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor
