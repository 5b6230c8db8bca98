"""Reads the index of a checkpoint of several processes: a pickle, of which only the known types are built."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

FILE = ".metadata"  # torch's name for it
LARGEST = 2**28  # bytes of an index; one of SDXL has a few million
TYPES = {(kind.__module__, kind.__name__): kind for kind in (
    metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata,
    metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size,
)} | {("torch.serialization", "_get_layout"): torch.serialization._get_layout,
     ("pathlib", "PosixPath"): PurePosixPath}  # of the folder it was written to; not used


class Reader(dcp.FileSystemReader):
    """torch's reader, except that its index cannot run code or name a file outside the checkpoint's folder."""

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """The index.

        Raises:
            ValueError: it is damaged, has another type in it, or names a file elsewhere.
        """
        with (Path(self.path) / FILE).open("rb") as file:
            text = file.read(LARGEST + 1)
        try:
            found = _Unpickler(io.BytesIO(text)).load()
            _check(found, sum(file.stat().st_size for file in Path(self.path).iterdir()))
        except Exception as error:  # what a damaged pickle raises is any exception
            raise ValueError(f"{FILE} is not the index of a checkpoint: {error}") from None
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TYPES:
            return TYPES[module, name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise ValueError(f"it holds {module}.{name}, which is not read")


def _check(found: Any, room: int) -> None:
    """Raises ValueError, AttributeError or TypeError unless every tensor has a place in the checkpoint's own files.

    Args:
        room: bytes of those files, which no tensor can exceed.
    """
    if type(found) is not metadata.Metadata or type(found.state_dict_metadata) is not dict:
        raise ValueError("it is of another type")
    for key, tensor in found.state_dict_metadata.items():
        if type(key) is not str or type(tensor) is not metadata.TensorStorageMetadata:
            raise ValueError("it describes something that is not a tensor")
        if type(tensor.properties.dtype) is not torch.dtype or type(tensor.size) is not torch.Size:
            raise ValueError(f"{key} has no type or shape")
        if min(tensor.size, default=0) < 0 or tensor.size.numel() * tensor.properties.dtype.itemsize > room:
            raise ValueError(f"{key} of {list(tensor.size)} is larger than its files")
    for index, place in found.storage_data.items():
        if type(index) is not metadata.MetadataIndex or type(place) is not filesystem._StorageInfo:
            raise ValueError("a place is of another type")
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"{place.relative_path} is no file of the checkpoint")
