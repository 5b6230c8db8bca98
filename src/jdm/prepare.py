"""`jdm prepare`: computes once, and stores on disk, what every run of a recipe would compute again (read by cache.py).

The method's needs say which text states and latents are made; of its networks only text encoders and the teacher's
autoencoder are loaded.

The results are bit-identical to those of training on the same device with the same versions and threads: prompts are
encoded one by one, and pictures in the same pieces as `encoded` uses.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
import transformers
from torch import Tensor

from jdm.data.cache import (
    LAYOUT,
    MANIFEST,
    UNREAD,
    Cache,
    distinct,
    encoder_signs,
    facts,
    sha256,
    signs,
    space_sign,
)
from jdm.data.latents import encoded_parts
from jdm.data.sources import Pictures
from jdm.errors import RunError, UsageError, remedy
from jdm.files import LOCK, alone, read_json, write, write_json
from jdm.loading import Loaded
from jdm.models.text import TextEncoder
from jdm.run import Run
from jdm.space import Space

PART = re.compile(r"\.?(text|pictures|latents|prompts|files)-[0-9a-f]{16}(\.json)?(\.draft)?")
AT_ONCE = 64  # pictures decoded in one piece
Progress = Callable[[str, int, int], None]


def prepare(run: Run, folder: Path, recipe: str = "RECIPE", progress: Progress | None = None) -> dict[str, int]:
    """Writes the preparation of a run; returns the size in bytes of each part, by folder name.

    A part is written under a draft name and then renamed; the manifest is written last, and without it nothing is
    read. Calling this again keeps complete parts whose inputs are unchanged and removes those no longer needed.

    Args:
        recipe: the recipe's name, for messages.
        progress: called with a part's name, the number done and the total.

    Raises:
        UsageError: the run could not train either, or its method uses nothing that is prepared.
        RunError: the disk is full.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("jdm prepare runs in one process; start it without torchrun")
    if (folder / MANIFEST).exists() and "layout" not in read_json(folder / MANIFEST):
        raise UsageError(f"{folder} holds another program's {MANIFEST}; choose another --out")
    try:
        with alone(folder), _swept(folder):
            run = replace(run, data=replace(run.data, prepared=""))
            draft = Draft(Loaded(run), folder, recipe, progress)
            draft.make()
            return draft.finish()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}; {remedy(error)} or choose "
                       "another --out, and run again") from error


class Draft(Cache):
    """A preparation being written: a part that a method requests is computed first unless it is complete."""

    def __init__(self, needed: Loaded, folder: Path, recipe: str, progress: Progress | None):
        self.needed, self.progress = needed, progress or (lambda *_: None)
        run, loaded = needed.run, needed.pictures
        found = signs(loaded, _stored_signs(folder))
        self.prompts = distinct(loaded)
        self.content = sha256([[sign[-1] for sign in found], loaded.indices.tolist()])
        data = facts(run.data, loaded) | {
            "pictures": self.content, "captions": self._list(folder, "prompts", self.prompts),
            "files": self._list(folder, "files", found)}
        super().__init__(folder, {"layout": LAYOUT, "recipe": recipe, "source": run.data.source, "data": data,
                                  "made with": made_with(run), "text": [], "pictures": None, "latents": []})

    def make(self) -> None:
        """Make every part that the run needs."""
        needs, run, loaded = self.needed.needs, self.needed.run, self.needed.pictures
        rows = torch.arange(len(loaded)).split(AT_ONCE)
        if not run.data.recut:  # else each step cuts them anew, from the source
            part = self._part("pictures", [run.data.size, self.content], len(loaded),
                              ((loaded.sound(r)[1],) for r in rows), loaded.unread.found)
            self.manifest["pictures"] = {"part": part}
        for role in [role for role in needs.prompts if role in needs.models]:
            self._text(self.needed.text(role))
        if needs.latents:
            self._latents(self.needed.space, replace(super().pictures(run.data, loaded), latents=None))

    def _text(self, encoder: TextEncoder) -> None:
        asked = encoder_signs(encoder)
        part = self._part("text", [asked, self.manifest["data"]["captions"]], len(self.prompts), self._states(encoder))
        self.manifest["text"].append({**asked, "part": part})

    def finish(self) -> dict[str, int]:
        """The manifest, which makes the parts a cache; what no longer belongs is removed."""
        write_json(self.folder / MANIFEST, self.manifest)
        _sweep(self.folder)
        parts = sorted(place for place in self.folder.iterdir() if place.is_dir() and PART.fullmatch(place.name))
        return {place.name: sum(file.stat().st_size for file in place.iterdir()) for place in parts}

    def _latents(self, space: Space, stored: Pictures) -> None:
        sign, pieces = space_sign(space), ((piece,) for piece in encoded_parts(space, stored))
        part = self._part("latents", [stored.size, self.content, sign], len(stored), pieces)
        self.manifest["latents"].append({"autoencoder": sign, "part": part})

    @torch.no_grad()
    def _states(self, encoder: TextEncoder) -> Iterator[tuple[Tensor, ...]]:
        """Text states of each prompt, encoded alone, as a run with `one_by_one` does."""
        for prompt in self.prompts:
            yield tuple(tensor[None] for tensor in encoder.kept(next(iter(encoder.encode([prompt])))))

    def _part(self, name: str, of: Any, n: int, pieces: Iterator[tuple[Tensor, ...]],
              unread: Mapping[int, str] | None = None) -> str:
        """Returns the folder name of a part, writing the part if needed; the name hashes all that determines its bits.

        Args:
            of: the inputs of the part, as JSON.
            pieces: tuples of tensors; the k-th tensor of each holds the next rows of k.npy, n rows in total.
            unread: what turns out unreadable while the pieces are made.
        """
        part = f"{name}-{sha256([LAYOUT, self.manifest['made with'], of])[:16]}"
        place, draft = self.folder / part, self.folder / f".{part}.draft"
        if place.is_dir():
            return part
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            self._write(draft, name, n, pieces)
            if unread is not None:
                write(draft / UNREAD, json.dumps(unread) + "\n")
            draft.rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return part

    def _write(self, draft: Path, name: str, n: int, pieces: Iterator[tuple[Tensor, ...]]) -> None:
        first, done = next(pieces), 0
        self._check_room(sum(n * tensor[0].numel() * tensor.element_size() for tensor in first))
        with ExitStack() as opened:
            files = [opened.enter_context((draft / f"{k}.npy").open("wb")) for k in range(len(first))]
            for file, tensor in zip(files, first, strict=True):
                kind = np.lib.format.dtype_to_descr(tensor[:0].cpu().numpy().dtype)
                shape = (n, *tensor.shape[1:])
                np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
            for piece in chain([first], pieces):
                for file, tensor in zip(files, piece, strict=True):
                    file.write(tensor.cpu().contiguous().numpy().data)
                done += len(piece[0])
                self.progress(name, done, n)
            for file in files:
                file.flush()
                os.fsync(file.fileno())

    def _check_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise OSError(errno.ENOSPC, f"{wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
                          str(self.folder))

    @staticmethod
    def _list(folder: Path, name: str, values: list) -> str:
        """Writes a list as JSON to a file named by its hash; returns the name."""
        file = f"{name}-{sha256(values)[:16]}.json"
        write(folder / file, json.dumps(values) + "\n")
        return file


def made_with(run: Run) -> dict[str, Any]:
    """Versions, device and threads, on which the bits depend beside the data and the weights."""
    device = torch.device(run.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__,
            "pillow": PIL.__version__, "device": f"{device.type}, {where}", "threads": torch.get_num_threads()}


def _stored_signs(folder: Path) -> list:
    """Signs of the picture files in the existing preparation, so that unchanged files are not hashed again."""
    with suppress(UsageError):  # what another version wrote, or somebody changed, is not gone on from
        return Cache.read(folder).listed("files")
    return []


def _sweep(folder: Path) -> None:
    """Removes parts that the manifest does not name; without a manifest, also the folder if it is then empty."""
    kept = json.dumps(read_json(folder / MANIFEST))
    for place in [*folder.iterdir()]:
        if PART.fullmatch(place.name) and place.name not in kept:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    (folder / f".{MANIFEST}.draft").unlink(missing_ok=True)
    if not (folder / MANIFEST).exists():
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Removes new parts if the preparation fails; an interrupted one keeps its complete parts, to resume from."""
    try:
        yield
    except (OSError, RunError, UsageError):
        _sweep(folder)
        raise
