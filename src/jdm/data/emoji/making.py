"""Makes the emoji data set: tar shards of training, validation and test pictures, a NOTICE and a summary."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jdm.data.emoji.captions import captions
from jdm.data.emoji.drawings import drawings, vectors
from jdm.data.emoji.packages import NAMES, STYLES, Package, notice
from jdm.data.emoji.things import Emoji, all_emoji, joined, normalised, split_of
from jdm.data.npm import fetched, members
from jdm.errors import UsageError
from jdm.files import write

PER_SHARD = 8000  # pictures
# Root mean square difference of two thumbnails, in grey levels of 255: below the first, two things are one and share a
# split; what is below the second, on two sides of a split, is counted and named in the summary.
ONE, NEAR = 6.0, 14.0


@dataclass(frozen=True)
class Drawn:
    """One emoji in one style: its pictures as WebP, and a thumbnail."""

    emoji: Emoji
    style: str
    pictures: list[bytes]
    thumbnail: bytes


def make(out: Path, size: int, copies: int, progress: Callable[[str, int, int], object],
         get: Callable[[str], bytes] | None = None, packages: Sequence[Package] = STYLES,
         names: Package = NAMES) -> dict:
    """Writes {train,validation,test}-NNN.tar, NOTICE.txt and data.json to `out`; returns what data.json holds.

    Args:
        size: side of the pictures in pixels.
        copies: drawings of each training picture: as it is, and moved. There is one of held-out pictures and of those
            with a skin tone.
        progress: (what, how many are done, of how many).
        get: URL -> contents; the network's by default.

    Raises:
        UsageError: a package cannot be had, or `out` holds shards already.
    """
    if any(out.glob("*.tar")):
        raise UsageError(f"{out} holds shards already; remove them or name another folder")
    kept = out / "packages"
    tarballs = {}
    for done, package in enumerate((names, *packages)):
        progress("packages", done, 1 + len(packages))
        tarballs[package] = fetched(package, kept, get)
    files = members(tarballs.pop(names), "/en/data.json", "/en/messages.json")
    emoji = all_emoji(files["en/data.json"].decode(), files["en/messages.json"].decode())
    drawn = list(_drawn(emoji, tarballs, size, copies, progress))
    distances = _close_pairs(drawn, NEAR)
    groups = joined({one.emoji.thing for one in drawn},
                    ((drawn[a].emoji.thing, drawn[b].emoji.thing) for a, b, d in distances if d < ONE))
    sizes = Counter(groups[one.emoji.thing] for one in drawn)
    splits = [split_of(root, sizes[root]) for root in (groups[one.emoji.thing] for one in drawn)]
    for split in ("train", "validation", "test"):
        progress(f"{split} shards", 0, 0)
        _write_shards(out, split, [one for one, s in zip(drawn, splits, strict=True) if s == split])
    summary = {"size": size, "drawings": copies, "packages": [asdict(p) for p in (*packages, names)],
               "splits": _counted(drawn, splits), "joined_things": _joined_things(groups),
               "near_duplicates": _across(drawn, splits, distances)}
    write(out / "NOTICE.txt", notice())
    write(out / "data.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _drawn(emoji: dict[str, Emoji], tarballs: dict[Package, bytes], size: int, copies: int,
           progress: Callable[[str, int, int], object]) -> Iterator[Drawn]:
    jobs = [(emoji[code], style, source) for style, sources in _sources(emoji, tarballs).items()
            for code, source in sources.items() if code in emoji]
    groups = [jobs[i:i + 100] for i in range(0, len(jobs), 100)]
    # Processes, because resvg-py holds Python's lock while it draws.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _work_for_parent) as pool:
        for done, made in enumerate(pool.map(_draw, groups, [size] * len(groups), [copies] * len(groups))):
            progress("drawings", done + 1, len(groups))
            yield from made


def _work_for_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process when the parent has ended in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _draw(jobs: Sequence[tuple[Emoji, str, str | bytes]], size: int, copies: int) -> list[Drawn]:
    # Skin tones are drawn once: five of six pictures of people have one, and would be most of the data.
    return [Drawn(one, style, *drawings(one, style, source, size, 1 if one.has_skin_tone else copies))
            for one, style, source in jobs]


def _sources(emoji: dict[str, Emoji], tarballs: dict[Package, bytes]) -> dict[str, dict[str, str | bytes]]:
    """style -> code -> SVG or picture file."""
    files = {package: members(data, "chars.json", "icons.json", ".webp") for package, data in tarballs.items()}
    names = {re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-"): code for code, one in emoji.items()}
    for each in files.values():  # sets without chars.json's table use the names of those that have one
        names |= {name: normalised(code) for code, name in json.loads(each.get("chars.json", b"{}")).items()}
    found: dict[str, dict[str, str | bytes]] = {}
    for package, each in files.items():
        pictures = {normalised(Path(f).stem): data for f, data in each.items() if f.endswith(".webp")}
        found[package.style] = {**(vectors(each, names) if "icons.json" in each else {}), **pictures}
    return found


def _close_pairs(drawn: Sequence[Drawn], bound: float) -> list[tuple[int, int, float]]:
    """(a, b, distance) of pictures of different things whose thumbnails differ by less than `bound`."""
    flat = np.stack([np.frombuffer(one.thumbnail, np.uint8) for one in drawn]).astype(np.float32)
    squares = (flat**2).mean(1)
    things = np.unique([one.emoji.thing for one in drawn], return_inverse=True)[1]
    found: list[tuple[int, int, float]] = []
    for start in range(0, len(flat), 1000):
        part = slice(start, start + 1000)
        gap = squares[part, None] + squares[None] - 2 / flat.shape[1] * (flat[part] @ flat.T)
        close = (gap < bound**2) & (things[part, None] < things[None])
        found += [(start + int(a), int(b), float(max(0.0, gap[a, b]) ** 0.5)) for a, b in np.argwhere(close)]
    return found


def _write_shards(out: Path, split: str, drawn: list[Drawn]) -> None:
    """Shards in an order by hash, so that every slice of a split holds all styles and groups."""
    samples = [(f"{one.style}-{one.emoji.code}-{k}", one, picture) for one in drawn
               for k, picture in enumerate(one.pictures if split == "train" else one.pictures[:1])]
    samples.sort(key=lambda sample: hashlib.sha256(sample[0].encode()).digest())
    for number, start in enumerate(range(0, len(samples), PER_SHARD)):
        path = out / f"{split}-{number:03d}.tar"
        draft = path.with_suffix(".draft")
        with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, one, picture in samples[start:start + PER_SHARD]:
                said = {"captions": captions(one.emoji, one.style), "style": one.style, **asdict(one.emoji)}
                _add(tar, f"{key}.webp", picture)
                _add(tar, f"{key}.json", json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode())
        draft.replace(path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _counted(drawn: Sequence[Drawn], splits: Sequence[str]) -> dict[str, dict]:
    """split -> pictures (drawn as they are), things, and pictures by style and by group."""
    found = {}
    for split in ("train", "validation", "test"):
        own = [one for one, s in zip(drawn, splits, strict=True) if s == split]
        found[split] = {"pictures": len(own), "things": len({one.emoji.thing for one in own}),
                        "styles": Counter(one.style for one in own), "groups": Counter(one.emoji.group for one in own)}
    return found


def _joined_things(groups: dict[str, str]) -> list[list[str]]:
    """Things that share a split because some of their pictures are all but equal."""
    members_of: dict[str, list[str]] = {}
    for thing, root in groups.items():
        members_of.setdefault(root, []).append(thing)
    return sorted(sorted(each) for each in members_of.values() if len(each) > 1)


def _across(drawn: Sequence[Drawn], splits: Sequence[str], pairs: list[tuple[int, int, float]]) -> dict:
    """Held-out pictures with a near duplicate among the training pictures: how many, and the nearest pairs."""
    nearest: dict[int, tuple[float, int]] = {}
    for a, b, distance in pairs:
        for own, other in ((a, b), (b, a)):
            if splits[own] != "train" and splits[other] == "train":
                nearest[own] = min(nearest.get(own, (NEAR, other)), (distance, other))
    counts = Counter(splits[own] for own in nearest)
    shown = sorted((d, own, other) for own, (d, other) in nearest.items())[:40]
    return {"below": NEAR, "joined_below": ONE, **{split: counts[split] for split in ("validation", "test")},
            "nearest": [f"{drawn[a].emoji.name} / {drawn[b].emoji.name} ({drawn[a].style}): {d:.1f}"
                        for d, a, b in shown]}
