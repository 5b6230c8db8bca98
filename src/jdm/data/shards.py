"""Tar shards of captioned pictures in WebDataset's layout, read in place from disks or object stores.

Pictures are read one by one, by their offset in a shard, so that their order is that of any other source: the same
for every world size and after a resume. The first use reads every shard once to find offsets and captions; `datasets`
caches that table.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from torch import Tensor

from jdm.data.pictures import SUFFIXES, read_all, read_picture
from jdm.errors import UsageError, in_short
from jdm.size import Size

RANGE, MOST_SHARDS = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}"), 100_000
READERS = 32  # requests in parallel: an object store has a high latency, but serves many at once


class Shards:
    """The pictures of a set of shards, by index.

    Args:
        source: path or URL of .tar files, with * or {00000..00099}: s3://bucket/{000..099}.tar, hf://datasets/....

    Raises:
        UsageError: no shard was found, one cannot be read, or a picture has no caption.
    """

    def __init__(self, source: str):
        import fsspec
        from datasets import Dataset, Features, List, Value

        try:
            self.store, _ = fsspec.core.url_to_fs(source)
            found = [self.store._strip_protocol(one) for one in _expanded(source)]
            self.shards = sorted({str(shard) for one in found for shard in (self.store.glob(one) or [one])})
            if special := [shard for shard in self.shards if Path(shard).exists() and not Path(shard).is_file()]:
                raise UsageError(f"{special[0]} is not a regular file; give .tar files")
            known = [[i, shard, str(self.store.ukey(shard))] for i, shard in enumerate(self.shards)]
        except UsageError:
            raise
        except Exception as error:  # a store's driver may raise anything
            raise UsageError(f"{source}: no shards could be listed ({in_short(error)}); give .tar files, such as "
                             "'shards/*.tar' or 's3://bucket/{000..099}.tar'") from None
        kinds = Features({"shard": Value("int32"), "start": Value("int64"), "bytes": Value("int64"),
                          "name": Value("string"), "captions": List(Value("string"))})
        try:
            table = Dataset.from_generator(_members, features=kinds, gen_kwargs={"source": source, "shards": known})
        except Exception as error:
            raise UsageError(_root_message(error)) from None
        self.table, self.captions = table, [tuple(row) for row in table["captions"]]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows: Tensor, size: Size) -> Tensor:
        """Indices [B] -> uint8 [B, 3, H, W]."""
        chosen = self.table[rows.tolist()]
        places = list(zip(chosen["shard"], chosen["start"], chosen["bytes"], chosen["name"], strict=True))
        return read_all(lambda place: self._image(place, size), places, READERS)

    def files(self) -> list[Path]:
        """Paths of the shards.

        Raises:
            UsageError: the shards are not local files.
        """
        if not all(Path(shard).is_file() for shard in self.shards):
            raise UsageError("shards in an object store are read during training and cannot be prepared; copy them "
                             "to a disk that every process sees, or leave out --data.prepared")
        return [Path(shard) for shard in self.shards]

    def _image(self, place: tuple[int, int, int, str], size: Size) -> Tensor:
        shard, start, length, name = place
        where = f"{self.shards[shard]}:{name}"
        try:
            data = self.store.cat_file(self.shards[shard], start, start + length)
        except Exception as error:
            raise UsageError(f"{where} could not be read ({in_short(error)}); run the same command again to resume "
                             "from the last checkpoint") from None
        return read_picture(io.BytesIO(data), where, len(data), size)


def _expanded(source: str) -> list[str]:
    """Expands ranges: a{08..10}.tar -> a08.tar, a09.tar, a10.tar."""
    ranges = [(int(low), int(high)) for low, high in RANGE.findall(source)]
    if any(high < low for low, high in ranges):
        raise UsageError(f"{source}: a range of shards goes from the lower number to the higher, such as {{000..099}}")
    count = math.prod(high - low + 1 for low, high in ranges)
    if count > MOST_SHARDS:
        raise UsageError(f"{source}: {count:,} shards, at most {MOST_SHARDS:,} can be listed; narrow the ranges")
    match = RANGE.search(source)
    if match is None:
        return [source]
    low, high = match.groups()
    numbers = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [rest for n in numbers for rest in _expanded(source[: match.start()] + n + source[match.end() :])]


def _members(source: str, shards: list[tuple[int, str, str]]) -> Iterator[dict[str, Any]]:
    """Yields each picture's offset and caption. A sample is adjacent files with equal names up to the first dot.

    Args:
        shards: number, path and version key of each; `datasets` caches the table by its arguments, so that a changed
            key makes it read the shard again.
    """
    import fsspec

    store, _ = fsspec.core.url_to_fs(source)
    for index, shard, _ in shards:
        try:
            with store.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, files in groupby(_files(tar, file), key=lambda m: _sample_key(m.name)):
                    if (found := _sample(tar, shard, key, list(files))) is not None:
                        yield {"shard": index, **found}
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise UsageError(f"{shard}: not a whole tar file ({in_short(error)}); fetch it again") from None


def _files(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    yield from (member for member in tar if member.isfile())
    file.seek(tar.offset)
    rest = file.read(1 << 20)
    if len(rest) < tarfile.BLOCKSIZE:
        raise EOFError(f"it stops at byte {tar.offset:,}, before its end mark")
    while rest:  # tarfile takes a header that it cannot read for the end
        if rest.strip(b"\0"):
            raise EOFError(f"after byte {tar.offset:,} there is neither a file nor the end")
        rest = file.read(1 << 20)


def _sample_key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".")[0])


def _sample(tar: tarfile.TarFile, shard: str, key: str, files: list[tarfile.TarInfo]) -> dict[str, Any] | None:
    by_suffix = {PurePosixPath(file.name).suffix.lower(): file for file in files}
    picture = next((file for suffix, file in by_suffix.items() if suffix in SUFFIXES), None)
    if picture is None:  # its download failed when the shard was written; only the text remains
        return None
    captions: list[str] = []
    for suffix in (".txt", ".json"):
        if not captions and suffix in by_suffix and (data := tar.extractfile(by_suffix[suffix])):
            text = data.read().decode("utf-8", errors="replace")
            captions = [c for c in ([text] if suffix == ".txt" else _json_captions(text)) if c.strip()]
    if not captions:
        raise UsageError(f"{shard}: {picture.name} has no caption; put {PurePosixPath(key).name}.txt beside it, or a "
                         f"{PurePosixPath(key).name}.json with a caption or captions")
    return {"start": picture.offset_data, "bytes": picture.size, "name": picture.name,
            "captions": [caption.strip() for caption in captions]}


def _json_captions(text: str) -> list[str]:
    """The list `captions`, of which training draws one at a time, or else the one `caption` or `text`."""
    try:
        values = json.loads(text)
        several = values.get("captions")
        found = several if isinstance(several, list) else [values.get("caption") or values.get("text") or ""]
        return [str(caption) for caption in found]
    except (ValueError, AttributeError, RecursionError):
        return []


def _root_message(error: BaseException) -> str:
    """Message of the UsageError from `_members`, which `datasets` wraps in exceptions of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else f"the shards could not be read ({in_short(error)})"  # type: ignore[arg-type]
