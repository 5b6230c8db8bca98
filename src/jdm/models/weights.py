"""Whether a network's files hold the weights of that network: its class, real numbers, all of them finite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import load_file
from torch import Tensor, nn, serialization

from jdm.errors import UsageError
from jdm.files import read_json
from jdm.models.configs import REMEDY

WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REAL = ("F16", "BF16", "F32", "F64")  # safetensors' names
BUFFERS = ("position_ids", "num_batches_tracked")  # whole numbers beside the weights


def folder_of(path: str, subfolder: str | None) -> Path | None:
    """The folder on disk that a network is read from; None for one of the hub that was not downloaded yet."""
    folder = Path(path, subfolder or "")
    if Path(path).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = "config.json" if subfolder is None else f"{subfolder}/config.json"
    found = try_to_load_from_cache(path, config)
    return Path(found).parent if isinstance(found, str) else None


def variant_of(folder: Path | None) -> str | None:
    """"fp16" or another variant where the folder holds the weights in that variant alone, else None."""
    found = {match[1] for file in _files(folder) if (match := WEIGHTS.fullmatch(file.name))}
    return found.pop() if len(found) == 1 else None


class Index(TypedDict):
    """*.safetensors.index.json, of weights in several files."""

    weight_map: dict[str, str]


def refuse_foreign(folder: Path) -> None:
    """UsageError where weights would come from a pickle, from another folder, or with an adapter laid over them."""
    if not any(folder.glob("*.safetensors*")) and (pickles := sorted(folder.glob("*.bin"))):
        raise UsageError(f"{pickles[0]} is a pickle, which is not read; give the same weights as .safetensors")
    if (adapter := folder / "adapter_config.json").exists():
        raise UsageError(f"{adapter} applies an adapter to another model's weights, which is not supported; merge it "
                         "into the network's own, or delete it")
    for index in folder.glob("*.safetensors.index.json"):
        for file in read_json(index, Index, REMEDY, needed=True)["weight_map"].values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UsageError(f"{index} names {file!r:.80}, which is no .safetensors file of its folder; {REMEDY}")


def refuse_unsound(net: nn.Module, path: str, subfolder: str | None, also: tuple[str, ...] = ()) -> None:
    """UsageError where the files are those of another class, or hold weights that are not finite real numbers.

    Args:
        also: other classes whose weights hold those of this one.
    """
    kind, folder = type(net).__name__, folder_of(path, subfolder)
    if folder is not None and (config := folder / "config.json").is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
        named = said.get("_class_name") or said.get("architectures") or kind
        if not {kind, *also} & set(named if isinstance(named, list) else [named]):
            raise UsageError(f"{config} is of a {named if isinstance(named, str) else ', '.join(map(str, named))}, not "
                             f"of a {kind}; put back the part that the model was trained with")
    for file in _files(folder):
        for name, kept in _header(file).items():
            if kept not in REAL and not name.endswith(BUFFERS):
                raise UsageError(f"{file} holds {name} in {kept}; weights must be in {', '.join(REAL)}: give the model "
                                 "that was quantised")
    if name := not_finite(net):
        raise UsageError(f"{folder or path}: {name} of the {kind} is not finite (NaN or infinity); fetch the model "
                         "again, or export an earlier checkpoint")


def not_finite(net: nn.Module) -> str:
    """The name of the first parameter with a value that is NaN or infinite; empty if there is none."""
    with torch.no_grad():
        # A sum is one pass over memory; only where it is not finite are the values themselves looked at.
        return next((name for name, p in net.named_parameters()
                     if not torch.isfinite(p.sum()) and not torch.isfinite(p).all()), "")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The weights in a .safetensors or PyTorch file, by name: real numbers, all finite.

    Raises:
        Exception: of any type; the file is damaged, or holds something else.
    """
    found = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    for name, value in found.items():
        if value.dtype not in DTYPES and not name.endswith(BUFFERS):
            raise ValueError(f"it holds {name} in {value.dtype}, where weights are real numbers")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite (NaN or infinity)")
    return found


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The named tensors of a PyTorch file, of which nothing but tensors is built."""
    more = serialization.get_safe_globals()  # torch's distributed types, which no weights hold
    serialization.clear_safe_globals()
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    finally:
        serialization.add_safe_globals(more)
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError("it holds something other than named tensors")
    return dict(found)


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    sharded = {file for index in folder.glob("*.safetensors.index.json")
               for file in read_json(index, Index, REMEDY)["weight_map"].values()}
    return [file for file in folder.glob("*.safetensors") if WEIGHTS.fullmatch(file.name) or file.name in sharded]


def types_of(folder: Path) -> list[str]:
    """The types of numbers that a network's files keep its weights in, by safetensors' names."""
    return sorted({kept for file in _files(folder) for name, kept in _header(file).items()
                   if not name.endswith(BUFFERS)})


def _header(file: Path) -> dict[str, str]:
    """Tensor -> dtype, from the first bytes of a safetensors file that was read before."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
