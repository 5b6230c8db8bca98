"""Tar shards of captioned pictures in WebDataset's layout, read in place from disks or object stores.

Pictures are read one by one, by their offset in a shard, so that their order is that of any other source: the same
for every world size and after a resume. The first use reads every shard once to find offsets and captions; `datasets`
caches that table. What belongs to a sample is in samples.py.
"""

from __future__ import annotations

import glob
import io
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jdm.data.pictures import read_all, read_picture, refuse_other_aspect, sides_of
from jdm.data.report import Report
from jdm.data.samples import Left, SampleError, hidden, sample_key, samples
from jdm.data.split import Pictures, Stamp, Unread, share_of
from jdm.data.texts import printable
from jdm.errors import UsageError, in_short
from jdm.run import Data
from jdm.size import Frame, Size

RANGE, MOST_SHARDS = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}"), 100_000
READERS = 32  # requests in parallel: an object store has a high latency, but serves many at once
LAYOUT = 3  # of the table; increase when its columns or the rules of samples change, so that shards are read again
REFUSED = "samples that cannot be read as they were meant"
HEADER = 65_536  # bytes in which a picture says its size

def shard_pictures(source: str, split: str, size: Size, how: Data, own: bool = False) -> Pictures:
    """A split of tar shards.

    Args:
        source: path or URL of .tar files, with * or {00000..00099}: s3://bucket/{000..099}.tar, hf://datasets/....
        own: these shards are the split; else 1 of 20 pictures each is held out of them for validation and test.

    Raises:
        UsageError: no shard was found, one cannot be read, or what belongs to a sample is ambiguous.
    """
    shards = Shards(source, how)
    n, parts = len(shards.captions), (split,) if own else ("train", "validation", "test")
    of = [split] * n if own else share_of(n, parts[1:], shards.report)
    shards.report.splits |= {part: of.count(part) for part in parts}
    return Pictures(
        images=lambda rows, frames=None: shards.images(rows, frames or [size] * len(rows)),
        captions=tuple(shards.captions),
        labels=None,
        indices=torch.tensor([i for i, part in enumerate(of) if part == split], dtype=torch.long),
        size=size,
        source=f"{printable(source.rsplit('/', 1)[-1])}/{split}",
        files=lambda rows: shards.files(),
        slow=True,
        controls=(lambda rows, frames=None: shards.maps(rows, frames or [size] * len(rows))) if how.controls else None,
        report=shards.report,
        unread=Unread(how.unreadable),
        stamps=shards.stamps,
        name_of=shards.name_of,
        sides=shards.sides,
    )


class Shards:
    """The pictures of a set of shards, by index, and what was left out of them."""

    def __init__(self, source: str, how: Data):
        import fsspec

        try:
            self.store, _ = fsspec.core.url_to_fs(source)
            found = [self.store._strip_protocol(one) for one in _expanded(source)]
            self.shards = sorted({str(shard) for one in found for shard in self._named(one)})
            if special := [shard for shard in self.shards if Path(shard).exists() and not Path(shard).is_file()]:
                raise UsageError(f"{special[0]} is not a regular file; give .tar files")
            self.known = [[i, shard, str(self.store.ukey(shard))] for i, shard in enumerate(self.shards)]
        except UsageError:
            raise
        except Exception as error:  # a store's driver may raise anything
            raise UsageError(f"{source}: no shards could be listed ({in_short(error)}); give .tar files, such as "
                             "'shards/*.tar' or 's3://bucket/{000..099}.tar'") from None
        self.report, table = Report(source), _table(source, self.known, how)
        kept = []
        for i, rule in enumerate(table["rule"]):
            if rule == REFUSED:
                self.report.refuse(REFUSED, table[i]["name"])
            elif rule:
                self.report.leave_out(table[i]["name"], rule, count=table[i]["bytes"])
            else:
                kept.append(i)
        self.table = table.select(kept)
        self.captions = [tuple(row) for row in self.table["captions"]]

    def _named(self, one: str) -> list[str]:
        """The shards that a path means: the file of that name, or a pattern, in a folder that may have brackets."""
        folder, slash, last = one.rpartition("/")
        return ([one] if self.store.exists(one) else self.store.glob(one) or
                self.store.glob(f"{glob.escape(folder)}{slash}{last}") or [one])

    def images(self, rows: Tensor, sizes: Sequence[Size | Frame]) -> Tensor:
        """Indices [B] and a size or frame for each -> uint8 [B, 3, H, W]."""
        return read_all(lambda row, size: self._image(row, "start", "bytes", size), self._rows(rows), sizes,
                        at_once=READERS)

    def maps(self, rows: Tensor, sizes: Sequence[Size | Frame]) -> Tensor:
        """Indices [B] and a size or frame for each -> control maps, uint8 [B, 3, H, W]."""

        def one(row: dict[str, Any], size: Size | Frame) -> Tensor:
            found = self._image(row, "map_start", "map_bytes", size)
            heads = [io.BytesIO(self._bytes(row, start, min(row[length], HEADER)))
                     for start, length in (("map_start", "map_bytes"), ("start", "bytes"))]
            refuse_other_aspect(heads[0], heads[1], f"{self.shards[row['shard']]}:{row['name']}")
            return found

        return read_all(one, self._rows(rows), sizes, at_once=READERS)

    def name_of(self, index: int) -> str:
        """The shard and the picture's name in it."""
        (row,) = self._rows(torch.tensor([index]))
        return f"{self.shards[row['shard']]}:{row['name']}"

    def sides(self, rows: Tensor) -> list[tuple[int, int]]:
        """(width, height) of pictures, from their headers."""
        with ThreadPoolExecutor(READERS) as readers:
            heads = readers.map(lambda row: self._bytes(row, "start", min(row["bytes"], HEADER)), self._rows(rows))
            return sides_of([io.BytesIO(head) for head in heads])

    def stamps(self, rows: Tensor) -> list[Stamp]:
        """Name and size of pictures; the version of a shard stands for its time."""
        return [(f"{self.shards[row['shard']].rsplit('/', 1)[-1]}:{row['name']}", row["bytes"],
                 self.known[row["shard"]][2]) for row in self._rows(rows)]

    def files(self) -> list[Path]:
        """Paths of the shards.

        Raises:
            UsageError: the shards are not local files.
        """
        if not all(Path(shard).is_file() for shard in self.shards):
            raise UsageError("shards in an object store are read during training and cannot be prepared; copy them "
                             "to a disk that every process sees, or leave out --data.prepared")
        return [Path(shard) for shard in self.shards]

    def _rows(self, rows: Tensor) -> list[dict[str, Any]]:
        chosen = self.table[rows.tolist()]
        return [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]

    def _bytes(self, row: dict[str, Any], start: str, length: int) -> bytes:
        try:
            return self.store.cat_file(self.shards[row["shard"]], row[start], row[start] + length)
        except Exception as error:
            where = f"{self.shards[row['shard']]}:{row['name']}"
            raise UsageError(f"{where} could not be read ({in_short(error)}); run the same command again to resume "
                             "from the last checkpoint") from None

    def _image(self, row: dict[str, Any], start: str, length: str, size: Size | Frame) -> Tensor:
        data = self._bytes(row, start, row[length])
        return read_picture(io.BytesIO(data), f"{self.shards[row['shard']]}:{row['name']}", len(data), size)


def _table(source: str, shards: Sequence[Any], how: Data) -> Any:
    """The rows of `_members` as a data set, cached by `datasets` until a shard or what is asked of it changes."""
    from datasets import Dataset, Features, List, Value

    kinds = Features({"shard": Value("int32"), "start": Value("int64"), "bytes": Value("int64"),
                      "name": Value("string"), "captions": List(Value("string")), "map_start": Value("int64"),
                      "map_bytes": Value("int64"), "rule": Value("string")})
    wanted = {"layout": LAYOUT, "pictures": how.pictures, "captions": how.captions, "controls": how.controls,
              "encoding": how.encoding}
    try:
        return Dataset.from_generator(_members, features=kinds,
                                       gen_kwargs={"source": source, "shards": shards, "wanted": wanted})
    except Exception as error:
        raise UsageError(_root_message(error)) from None


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


def _members(source: str, shards: list[tuple[int, str, str]], wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a row for each sample, and one for each rule that left files of a shard out, with their number.

    Args:
        shards: number, path and version key of each; `datasets` caches the table by its arguments, so that a changed
            key makes it read the shard again.
        wanted: fields of `Data`, and the layout of the table.
    """
    import fsspec

    store, _ = fsspec.core.url_to_fs(source)
    asked = Data(**{name: value for name, value in wanted.items() if name != "layout"})
    empty = {"start": 0, "captions": [], "map_start": 0, "map_bytes": 0}
    for index, shard, _ in shards:
        left: Left = {}
        seen: set[str] = set()
        try:
            with store.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = (m for m in _files(tar, file) if not hidden(m.name, left))
                for key, files in groupby(members, key=lambda m: sample_key(m.name)):
                    try:
                        if key in seen:
                            raise SampleError(f"{key} comes twice, or its files do not lie side by side; write the "
                                              "shard again, each sample once and its files together")
                        seen.add(key)
                        for sample in list(samples(tar, key, list(files), asked, left)):
                            yield {"shard": index, "rule": "", **sample}
                    except SampleError as error:
                        yield {"shard": index, "rule": REFUSED, "name": f"{shard}: {error}", "bytes": 0, **empty}
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise UsageError(f"{shard}: not a whole tar file ({in_short(error)}); fetch it again") from None
        for rule, (name, count) in left.items():
            yield {"shard": index, "rule": rule, "name": printable(name), "bytes": count, **empty}


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


def _root_message(error: BaseException) -> str:
    """Message of the UsageError from `_members`, which `datasets` wraps in exceptions of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else f"the shards could not be read ({in_short(error)})"  # type: ignore[arg-type]
