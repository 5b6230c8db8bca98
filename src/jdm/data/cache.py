"""The preparation that `jdm prepare` wrote, as training reads it: text states, pictures, latents.

    DIR/manifest.json      the inputs of the preparation and the names of its parts; written last
    DIR/text-*/            0.npy: hidden states [prompts, L, D]; SDXL's pooled states [prompts, P] in 1.npy
    DIR/pictures-*/        0.npy: uint8 [N, 3, size, size]; unread.json: index -> why that picture cannot be read
    DIR/latents-*/         0.npy: [N, C, h, w]
    DIR/prompts-*.json     the distinct captions of the split and "", in the order of the states
    DIR/files-*.json       name, status and SHA-256 of every file the pictures were read from

Anything that changed since is reported as an error. Arrays are memory-mapped and nothing here writes, so any number of
processes may share one folder.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from jdm.data.sources import Pictures
from jdm.data.texts import printable
from jdm.errors import UsageError, in_short
from jdm.files import read_json, sha256_of
from jdm.models.text import TextEncoder
from jdm.run import Data
from jdm.size import spelled
from jdm.space import Space

MANIFEST, UNREAD = "manifest.json", "unread.json"
LAYOUT = 3  # increase when the files, or the decoding and cropping of pictures, change
CALLED = {"size": "size", "split": "split", "n": "number of pictures", "prompts": "prompt"}  # `facts` in messages
Name = Annotated[str, Meta(pattern=r"^[a-z]+-[0-9a-f]+(\.json)?$")]  # of a part or file in the same folder
Sign = list  # identifies a file: [name, bytes, modified, changed, inode, SHA-256]; times in ns


TextPart = TypedDict("TextPart", {"part": Name, "text encoder": str, "tokenizer": str})
LatentPart = TypedDict("LatentPart", {"part": Name, "autoencoder": str})  # noqa: UP013
PicturePart = TypedDict("PicturePart", {"part": Name})  # noqa: UP013


class Prepared(TypedDict):
    """The prepared split, and the files that list its prompts and pictures."""

    size: str
    split: str
    n: Annotated[int, Meta(ge=1)]
    prompts: str
    captions: Name
    files: Name


class Manifest(TypedDict):
    """manifest.json."""

    layout: int
    recipe: str
    data: Prepared
    text: list[TextPart]
    pictures: PicturePart | None
    latents: list[LatentPart]


class Cache:
    """A finished preparation: its folder and the contents of its manifest.json."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def read(cls, folder: Path) -> Cache:
        manifest = read_json(folder / MANIFEST)
        if manifest.get("layout") != LAYOUT:
            why = "was prepared by another version" if "layout" in manifest else "holds no finished preparation"
            raise UsageError(f"{folder} {why}; run jdm prepare {manifest.get('recipe', 'RECIPE')} --out {folder}")
        remedy = f"run jdm prepare RECIPE --out {folder} again"
        return cls(folder, read_json(folder / MANIFEST, Manifest, remedy))

    def pictures(self, data: Data, loaded: Pictures) -> Pictures:
        """Returns the split with pictures, and latents if prepared, memory-mapped from disk.

        Pictures that each step cuts anew (`Data.recut`) are read from the source, as if they were not prepared.
        """
        self._check(data, loaded)
        if data.recut or self.manifest["pictures"] is None:
            return loaded
        part = self.manifest["pictures"]["part"]
        stored, place = self._arrays(part, len(loaded))[0], places(loaded.indices)
        unread = read_json(self.folder / part / UNREAD, dict[str, str], self._remedy, needed=True)
        loaded.unread.found |= {int(index): why for index, why in unread.items()}
        return replace(loaded, images=lambda chosen, frames=None: stored[place[chosen]], latents=self.latents,
                       slow=loaded.controls is not None)

    def text(self, encoder: TextEncoder) -> Mapping[str, Any]:
        """Prompt -> its text states on the CPU, in the form that `TextEncoder` caches."""
        own, made = encoder_signs(encoder), self.manifest["text"]
        for entry in made:
            if entry.items() >= own.items():
                prompts = self.listed("captions")
                return States(prompts, self._arrays(entry["part"], len(prompts)))
        known = any(entry["text encoder"] == own["text encoder"] for entry in made)
        raise self._mismatch("tokenizer" if known else "text encoder")

    def latents(self, space: Space) -> Tensor:
        """The split's latents [N, C, h, w], memory-mapped from disk."""
        for entry in self.manifest["latents"]:
            if entry["autoencoder"] == space_sign(space):
                return self._arrays(entry["part"], self.manifest["data"]["n"])[0]
        if not self.manifest["latents"]:
            raise UsageError(f"{self.folder} holds no latents, which this run's method needs; {self._remedy}")
        raise self._mismatch("autoencoder")

    def _check(self, data: Data, loaded: Pictures) -> None:
        made, now = self.manifest["data"], facts(data, loaded)
        for fact, name in CALLED.items():
            if made[fact] != now[fact]:
                detail = f" ({made[fact]}, not {now[fact]})" if fact != "prompts" else self._new_prompt(loaded)
                raise self._mismatch(name, detail)
        known = self.listed("files")
        found = signs(loaded, known)
        changed = [after[0] for before, after in zip(known, found, strict=False) if before[-1] != after[-1]]
        if changed or len(found) != len(known):
            raise self._mismatch("picture", f" ({changed[0]})" if changed else "")

    def listed(self, key: str) -> list[Any]:
        """The list in one of the manifest's files: the captions, or the files' signs."""
        schema = list[str] if key == "captions" else list[tuple[str, int, int, int, int, str]]
        return read_json(self.folder / self.manifest["data"][key], schema, self._remedy, needed=True)

    def _new_prompt(self, loaded: Pictures) -> str:
        known = set(self.listed("captions"))
        new = [prompt for prompt in distinct(loaded) if prompt not in known]
        return f" ({new[0]!r} is new)" if new else ""

    def _mismatch(self, what: str, detail: str = "") -> UsageError:
        return UsageError(f"{self.folder} was prepared with another {what} than this run's{detail}; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return (f"run jdm prepare {self.manifest['recipe']} --out {self.folder} again, with the flags of this run, or "
                "leave out --data.prepared")

    def _arrays(self, part: str, n: int) -> list[Tensor]:
        try:
            found = [mapped(file) for file in sorted((self.folder / part).glob("*.npy"))]
            lengths = {len(array) for array in found}
        except Exception as error:  # numpy reads a header with Python's tokenizer, which has errors of its own
            raise UsageError(f"{self.folder / part} is damaged ({in_short(error)}); delete it, and "
                             f"{self._remedy}") from None
        if lengths != {n}:
            raise UsageError(f"{self.folder / part} is incomplete; delete it, and {self._remedy}")
        return found


class States(Mapping[str, Any]):
    """Text states on disk, by prompt."""

    def __init__(self, prompts: Sequence[str], arrays: Sequence[Tensor]):
        self.place, self.arrays = {prompt: i for i, prompt in enumerate(prompts)}, arrays

    def __getitem__(self, prompt: str) -> tuple[Tensor, ...]:
        return tuple(array[self.place[prompt]] for array in self.arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


def mapped(file: Path) -> Tensor:
    """Memory-maps an .npy file as a CPU tensor, which must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the array being read-only
        return torch.from_numpy(np.load(file, mmap_mode="r"))


def places(indices: Tensor) -> Tensor:
    """Maps each index of a source to its row in the split; -1 if it is not in the split."""
    place = torch.full((int(indices.max()) + 1,), -1)
    place[indices] = torch.arange(len(indices))
    return place


# The inputs of a preparation


def facts(data: Data, loaded: Pictures) -> dict[str, Any]:
    """Size, split, number of pictures, and the SHA-256 of all captions."""
    return {"size": spelled(data.size), "split": data.split, "n": len(loaded), "prompts": prompts_sha256(loaded)}


def prompts_sha256(loaded: Pictures) -> str:
    """SHA-256 of a split's captions, in order."""
    used, of = loaded.keys().unique(return_inverse=True)
    return sha256([[loaded.captions[k] for k in used.tolist()], of.tolist()])


def distinct(loaded: Pictures) -> list[str]:
    """The distinct captions of a split, sorted, with "" for guidance and dropout."""
    return sorted({"", *(caption for k in loaded.keys().unique().tolist() for caption in loaded.captions[k])})


def signs(loaded: Pictures, known: Sequence[Sign] = ()) -> list[Sign]:
    """Signs of all files that a split is read from. A file whose status is in `known` is not hashed again.

    The status includes the inode's change time, which programs cannot set, so that an edit is noticed even if it keeps
    the size and restores the modification time.
    """
    files = loaded.files(loaded.indices) if loaded.files else []
    if not files:  # pictures in memory are identified by their pixels
        digest = hashlib.sha256()
        for rows in torch.arange(len(loaded)).split(500):
            digest.update(loaded.sound(rows)[1].contiguous().numpy().data)
        return [[loaded.source, 0, 0, 0, 0, digest.hexdigest()]]
    before = {tuple(sign[:-1]): sign[-1] for sign in known}
    found = []
    for file in files:
        at = file.stat()
        status = [printable(file.name), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino]
        found.append([*status, before.get(tuple(status)) or sha256_of(file)])
    return found


def encoder_signs(encoder: TextEncoder) -> dict[str, str]:
    """SHA-256 of the text models' weights and of their tokenizers."""
    models, tokenizers = zip(*encoder.networks, strict=True)
    settings = [[tokenizer.model_max_length, tokenizer.pad_token, *_backend(tokenizer)] for tokenizer in tokenizers]
    return {"text encoder": sha256([*map(weights_sha256, models), getattr(encoder, "zeros", None)]),
            "tokenizer": sha256(settings)}


def space_sign(space: Space) -> str:
    """SHA-256 of an autoencoder's weights and of how its latents are scaled."""
    return sha256([weights_sha256(space.vae) if space.vae is not None else None, space.scale, space.shift])


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of every tensor of a network, with its name, dtype and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _backend(tokenizer: Any) -> list[Any]:
    """A tokenizer's vocabulary and rules, without padding and truncation, which each call sets."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return [{k: v for k, v in rules.items() if k not in ("truncation", "padding")}]
