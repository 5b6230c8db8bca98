"""Reads and writes LoRA files of stock diffusers, ComfyUI and A1111, and approximates a full student by a LoRA.

Every file written has the same rank in all layers and alpha = rank, because readers disagree about layers that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jdm.errors import UsageError
from jdm.files import parsed
from jdm.formats.single_file import refuse_pickle, unet_names
from jdm.models.adapters import Adapter

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name load_lora_weights(folder) looks for
KOHYA = "lora_unet_"
Header = TypedDict("Header", {"unet.lora_alpha": float, "unet.alpha_pattern": dict[str, float] | None}, total=False)
TEXT = ("text_encoder", "lora_te")
# Readers cannot tell the underscores of SDXL's added embedding from dots; kohya's own files use its single-file name.
KOHYA_NAMES = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
PAIR = re.compile(r"^(?P<name>.+?)[._]lora(?P<half>_A|_B|_down|_up|\.down|\.up|_linear_layer\.down|_linear_layer\.up)"
                  r"(\.\w+)?\.weight$")


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
        """The same function with every layer padded with zeros to the largest rank."""
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

    @property
    def error(self) -> float:
        return self.errors[self.lora.rank]


def adapter_lora(module: nn.Module, adapter: Adapter) -> LoRA:
    """Reads the LoRA out of an adapter inside `module`."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and adapter.name in layer.scaling:
            a, b = _weights(layer, adapter.name)
            found[path] = (a.detach(), b.detach() * layer.scaling[adapter.name])
    return LoRA(found)


def inject(lora: LoRA, module: nn.Module, name: str) -> Adapter:
    """Adds an adapter to `module` that computes the LoRA when active."""
    lora = lora.at_one_rank()
    adapter = Adapter(module, name, lora.rank, list(lora.layers))
    with torch.no_grad():
        for path, (a, b) in lora.layers.items():
            for weight, value in zip(_weights(module.get_submodule(path), name), (a, b), strict=True):
                weight.copy_(value)
    return adapter


def write_diffusers(lora: LoRA, file: Path, part: str = "unet") -> Path:
    """Writes the layout of diffusers and peft: `unet.PATH.lora_A.weight`, with alpha in the header.

    Args:
        part: the network's name in its model's folder.
    """
    lora = lora.at_one_rank()
    tensors = {f"{part}.{path}.lora_{half}.weight": t for path, pair in lora.layers.items()
               for half, t in zip("AB", pair, strict=True)}
    config = {f"{part}.r": lora.rank, f"{part}.lora_alpha": lora.rank, f"{part}.target_modules": list(lora.layers)}
    return _write(tensors, file, {"lora_adapter_metadata": json.dumps(config)})


def write_kohya(lora: LoRA, file: Path) -> Path:
    """Writes kohya's layout, which ComfyUI and A1111 read: `lora_unet_PATH.lora_down.weight`, `.alpha`."""
    lora = lora.at_one_rank()
    tensors = {}
    for path, (a, b) in lora.layers.items():
        name = KOHYA + KOHYA_NAMES.get(path, path.replace(".", "_"))
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b,
                    f"{name}.alpha": torch.tensor(float(lora.rank))}
    return _write(tensors, file, {"ss_network_module": "networks.lora", "ss_network_dim": str(lora.rank),
                                  "ss_network_alpha": str(float(lora.rank))})


def read_lora(path: str | Path, unet: nn.Module) -> LoRA:
    """Reads a LoRA of a UNet in any common layout: peft's, diffusers' older ones, kohya's.

    Args:
        path: a safetensors file, or a folder with a pytorch_lora_weights.safetensors.
        unet: a UNet2DConditionModel; needed because kohya's names have underscores for dots.

    Raises:
        UsageError: the file is missing, a pickle, not a plain LoRA, made for another UNet, or also changes the text
            encoder.
    """
    file = Path(path) / DIFFUSERS_FILE if Path(path).is_dir() else Path(path)
    refuse_pickle(file)
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            told = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{file} could not be read as a LoRA ({_first(error)}); give a .safetensors file") from None
    header = parsed(told, f"{file}: lora_adapter_metadata", Header, "fetch the file again")
    paths = _paths(unet)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.startswith(TEXT):
            raise UsageError(f"{file} also changes the text encoder ({key}), which an adapter of the UNet cannot hold; "
                             "give a LoRA of the UNet alone")
        found = PAIR.match(key)
        if found is None and not key.endswith(".alpha"):
            raise UsageError(f"{file} is not a plain LoRA: it has {key}; LoHa, LoKr and DoRA cannot be read")
        name = found["name"] if found else key.removesuffix(".alpha")
        layer = paths.get(_plain(name))
        if layer is None:
            raise UsageError(f"{file} was made for another UNet: this one has no layer for {name}")
        if found is None:
            alphas[layer] = float(tensor)
        else:
            halves.setdefault(layer, {})["A" if found["half"].endswith(("A", "down")) else "B"] = tensor
    if not halves:
        raise UsageError(f"{file} holds no LoRA of a UNet; give another file")
    return LoRA({k: _pair(file, k, v, unet, alphas.get(k, _header_alpha(header, k))) for k, v in halves.items()})


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


def _weights(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


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


def _paths(unet: nn.Module) -> dict[str, str]:
    """Every name a file may give a layer -> its path: the path, or kohya's form of it or of its single-file path."""
    names = {path.replace(".base_layer", ""): m for path, m in unet.named_modules()
             if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in path}
    single = unet_names(unet.config)  # type: ignore[arg-type]
    found = {}
    for path in names:
        above, tail = path, ""
        while above and above not in single:
            above, _, last = above.rpartition(".")
            tail = f"_{last}{tail}"
        theirs = single.get(above, above).replace(".", "_") + tail
        found |= {path: path, f"{KOHYA}{path.replace('.', '_')}": path, f"{KOHYA}{theirs}": path}
    return found


def _plain(name: str) -> str:
    """Removes prefixes and infixes that some writers add to a layer's path."""
    for prefix in ("unet.", "base_model.model.", "diffusion_model."):
        name = name.removeprefix(prefix)
    name = name.replace(".processor.to_", ".to_")
    return f"{name}.0" if name.endswith(".to_out") else name


def _pair(file: Path, path: str, halves: Mapping[str, Tensor], unet: nn.Module,
          alpha: float | None) -> tuple[Tensor, Tensor]:
    """Checks and returns a layer's (A, B), with alpha / rank multiplied into B."""
    if len(halves) != 2:
        raise UsageError(f"{file} holds half of a LoRA: {path} lacks its {'up' if 'A' in halves else 'down'} weight")
    a, b = halves["A"].float(), halves["B"].float()
    layer = unet.get_submodule(path)
    weight: Tensor = getattr(layer, "base_layer", layer).weight  # type: ignore[assignment]
    if weight.ndim == 4 and a.ndim == 2:  # some writers flatten 1x1 convolutions
        a, b = a[:, :, None, None], b[:, :, None, None]
    if weight.ndim == 2 and a.ndim == 4:
        a, b = a.flatten(1), b.flatten(1)
    if a.shape[1:] != weight.shape[1:] or b.shape[0] != weight.shape[0] or b.shape[1] != a.shape[0]:
        raise UsageError(f"{file} was made for another UNet: {path} is {list(weight.shape)} here, its LoRA has "
                         f"{list(a.shape)} and {list(b.shape)}")
    return a, b if alpha is None else b * (alpha / len(a))


def _header_alpha(header: Mapping, path: str) -> float | None:
    """A layer's alpha from the header that diffusers writes, or None."""
    for pattern, alpha in (header.get("unet.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return alpha
    return header.get("unet.lora_alpha")


def _filled(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor


def _write(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str]) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt", **header})
    return file


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
