"""The page without a server: a folder with which a browser draws by itself, for any static host."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jdm.app.limits import Limits
from jdm.app.students import Named, Student
from jdm.app.studio import bounds, described
from jdm.controls import Strokes
from jdm.controls.strokes import UNIT
from jdm.data.npm import Package, fetched, members
from jdm.errors import UsageError
from jdm.export import onnx_folder
from jdm.export.graphs import write
from jdm.export.parts import Parts
from jdm.files import ASSETS, replaced, write_json
from jdm.files import write as write_file
from jdm.library import SHIPPED
from jdm.size import Size, height_width

PAGE = Path(__file__).parent / "page"
NOTICE = "NOTICE.txt"
RUNTIME = Package("onnxruntime-web", "1.30.0",
                  "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==")
PROGRAM, MACHINE = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"  # its JavaScript and WebAssembly
PACKED = "onnxruntime.wasm.gz"
SCRIPTS = {"cv2.Canny": "canny", "jdm.controls.strokes.Strokes": "strokes"}  # what the page measures without a graph
# The page loads nothing from elsewhere, and says so to the browser.
POLICY = ("default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
          "form-action 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:")


def write_page(out: Path, students: Sequence[Student], limits: Limits, say: Callable[[str], object]) -> int:
    """Writes the page, the runtime and the students' graphs with weights in float16; returns the bytes of all files.

    Students of one UNet share its graph, and each ControlNet has one.

    Args:
        out: a new or empty folder; it is written whole or not at all.
        say: told which part is being written.

    Raises:
        UsageError: `out` is not empty, a student cannot be a graph, or the runtime cannot be fetched.
        RunError: a graph computes something else than PyTorch, or the disk cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} already exists and is not empty; name a new folder")
    with replaced(out) as draft:
        shutil.copytree(PAGE, draft, ignore=shutil.ignore_patterns("server.js"))
        _set_engine(draft / "index.html")
        say("fetching onnxruntime-web")
        _write_runtime(draft)
        written = _Written(draft, say)
        models = [{**described(student).model_dump(), "compare": None, "graphs": written.student(student)}
                  for student in students]
        _add_notices(draft / NOTICE, students)
        graphs = [file for file in sorted((draft / "models").rglob("*")) if file.is_file()]
        files = [PACKED, *(file.relative_to(draft).as_posix() for file in graphs)]
        found = {"models": models, "limits": bounds(limits).model_dump(), "device": "cpu", "runtime": PACKED,
                 "files": {name: (draft / name).stat().st_size for name in files}}
        write_json(draft / "models.json", found)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


class _Written:
    """The graphs of a folder, each written once; what they are called is their path in it."""

    def __init__(self, folder: Path, say: Callable[[str], object]):
        self.folder, self.say = folder, say
        self.shared: dict[int, dict[str, Any]] = {}  # by the UNet
        self.controls: dict[tuple[int, str], dict[str, Any]] = {}  # by the UNet and the ControlNet's name

    def student(self, student: Student) -> dict[str, Any]:
        """Returns the settings and files with which the page draws a student."""
        parts = Parts(student.name, student.model)
        controls = {named.model: self._control(named, parts) for named in student.controls}  # first: one may be refused
        key = id(student.model.backbone)
        if key not in self.shared:
            self.shared[key] = self._shared(student, parts)
        return {**self.shared[key], "controls": controls}

    def _shared(self, student: Student, parts: Parts) -> dict[str, Any]:
        place = self._place(student.name)
        graphs = {"text_encoder": parts.text_encoder(), "unet": parts.unet(), "decoder": parts.decoder()}
        for name, graph in graphs.items():
            self.say(f"{student.name}: {name}")
            write(graph, place / f"{name}.onnx", half=True)
        tokenizers = []
        for i, (_, tokenizer) in enumerate(parts.text.networks):
            onnx_folder.write_tokenizer(tokenizer, draft := place / f"draft-{i}")
            tokenizers.append(self._named((draft / "tokenizer.json").rename(place / f"tokenizer-{i}.json")))
            shutil.rmtree(draft)
        return {**onnx_folder.described(parts), "tokenizers": tokenizers,
                **{name: self._named(place / f"{name}.onnx") for name in graphs}}

    def _control(self, named: Named, parts: Parts) -> dict[str, Any]:
        key = id(parts.model.backbone), named.model
        if key not in self.controls:
            self.say(f"{named.model}: {named.control.name}")
            place = self._place(f"{named.model}-{named.control.name}")
            measure = self._measure(named, parts, place / "control.onnx")
            write(parts.controlnet(named.net), place / "controlnet.onnx", half=True)
            self.controls[key] = {"controlnet": self._named(place / "controlnet.onnx"), **measure}
        return self.controls[key]

    def _measure(self, named: Named, parts: Parts, file: Path) -> dict[str, Any]:
        """Returns how the page measures a control: by a script of its own, or by a graph."""
        settings = named.control.preprocessor
        if script := SCRIPTS.get(settings["function"]):
            more = {"blur": blur_weights(named.control, parts.model.size)} if isinstance(named.control, Strokes) else {}
            return {"script": script, "settings": {**settings, **more}}
        if not onnx_folder.write_control(parts, named.control, file):
            raise UsageError(f"{named.model}: its control {named.control.name} is not made of tensor operations alone, "
                             "so that no browser can measure it; leave that model out")
        return {"graph": self._named(file)}

    def _place(self, name: str) -> Path:
        """A new folder for a model."""
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
        taken = {place.name for place in (self.folder / "models").glob("*")}
        found = next(name for i in range(1000) if (name := f"{stem}-{i}" if i else stem) not in taken)
        (place := self.folder / "models" / found).mkdir(parents=True)
        return place

    def _named(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def blur_weights(control: Strokes, size: Size) -> list[int]:
    """The weights of the Gaussian that a control blurs pictures with, in OpenCV's whole numbers, which sum to 256."""
    stripe = np.zeros((1, 255, 3), np.uint8)
    stripe[:, 127] = 255
    blurred = cv2.GaussianBlur(stripe, (0, 0), control.smoothing * min(height_width(size)) / UNIT)[0, :, 0]
    weights = blurred[blurred > 0].astype(int)
    weights[len(weights) // 2] += 256 - weights.sum()  # one of 128 or more is seen as one less
    return weights.tolist()


def _set_engine(index: Path) -> None:
    """Makes the page compute by itself."""
    text = index.read_text(encoding="utf-8")
    server = '<meta name="engine" content="./server.js">'
    assert server in text
    write_file(index, text.replace(server, f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
                                           '  <meta name="engine" content="./browser.js">'))


def _write_runtime(folder: Path) -> None:
    """Writes onnxruntime-web: its program, and its WebAssembly packed to a quarter."""
    files = members(fetched(RUNTIME, cache()), PROGRAM, MACHINE)
    write_file(folder / "onnxruntime.js", files[PROGRAM])
    write_file(folder / PACKED, gzip.compress(files[MACHINE], mtime=0))


def cache() -> Path:
    """The folder that keeps fetched packages."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdm" / "npm"


def _add_notices(file: Path, students: Sequence[Student]) -> None:
    """Appends the NOTICE.txt of each model that has one."""
    parts = [file.read_text(encoding="utf-8")]
    for name in dict.fromkeys(named for student in students for named in
                              (student.name, *(control.model for control in student.controls))):
        places = [Path(name), *(ASSETS / part for part in SHIPPED.get(name, ()) if part)]
        notices = [place / NOTICE for place in places]
        parts += [notice.read_text(encoding="utf-8") for notice in notices if notice.is_file()]
    write_file(file, f"\n{'-' * 79}\n\n".join(dict.fromkeys(parts)))
