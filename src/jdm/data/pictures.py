"""Picture files: any picture a person has -> uint8 at the size asked for, and tensors -> PNG files and sheets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from jdm.errors import RunError, UsageError, in_short
from jdm.size import Size, height_width

SMALLEST_SIDE = 8
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def load_picture(path: str | Path, size: Size) -> Tensor:
    """The picture at `path` -> [3, H, W] of that size, uint8 RGB.

    The rule: turned as its EXIF orientation says; transparent parts over black; grey repeated to three
    channels; 16-bit grey divided by 257 and float grey in [0, 1] times 255, rounded; of several frames the
    first. Then resized to cover `size`, its proportions kept (Lanczos, antialiased), and its centre kept.
    Colour profiles are not applied.

    UsageError where there is no such file, it is no whole picture that Pillow reads, a side is below
    8 pixels, or it has more pixels than Pillow's limit against decompression bombs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        problem = "it is a folder" if path.is_dir() else "there is no such file"
        raise UsageError(f"{path}: {problem}; give the path of a picture (PNG, JPEG, WebP, ...)")
    return read_picture(path, str(path), path.stat().st_size, size)


def read_picture(source: Path | BinaryIO, path: str, length: int, size: Size) -> Tensor:
    """The same for a file, or the bytes of one; `path` and `length`, in bytes, are for messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large but allowed pictures and odd metadata
            with Image.open(source) as image:
                _check_size(path, image)
                image.load()
                rgb = _rgb(path, ImageOps.exif_transpose(image))
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UsageError(f"{path}: more than {limit:,} pixels, the most that is opened; "
                         "shrink it first") from error
    except Image.UnidentifiedImageError as error:
        raise UsageError(f"{path}: not a picture that Pillow reads ({length:,} bytes); "
                         "save it as PNG, JPEG or WebP") from error
    except PermissionError as error:
        raise UsageError(f"{path}: may not be read; change its permissions or copy it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UsageError(f"{path}: damaged or incomplete ({in_short(error)}); "
                         "copy or save it again") from error
    return _covering(rgb, size)


def decoded(image: Image.Image, size: Size, name: str = "a picture") -> Tensor:
    """A picture that is open already -> [3, H, W], uint8 RGB, by the rule of `load_picture`."""
    _check_size(name, image)
    return _covering(_rgb(name, ImageOps.exif_transpose(image)), size)


def read_all(read: Callable[[Any], Tensor], items: Sequence[Any], at_once: int = os.cpu_count() or 1) -> Tensor:
    """`read` of every item -> [N, 3, H, W], several at once: decoding and resizing leave Python alone.

    NumPy puts them together: a thread that enters PyTorch's parallel loops gets OpenMP threads of its own, and then
    none of them spins between loops any more, which halves the pace of training on a CPU.
    """
    with ThreadPoolExecutor(max(1, min(at_once, len(items)))) as readers:
        return torch.from_numpy(np.stack([image.numpy() for image in readers.map(read, items)]))


def save_pictures(images: Tensor, folder: str | Path) -> list[Path]:
    """uint8 [N, 3, H, W] -> folder/000.png, ...: the paths written, in order; the folder is made.

    An older file of the same name is replaced. RunError where the disk refuses.
    """
    _check_bytes(images)
    digits = max(3, len(str(len(images) - 1)))
    paths = [Path(folder) / f"{index:0{digits}d}.png" for index in range(len(images))]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            _image(image).save(path)
    except OSError as error:
        raise RunError(f"{folder}: could not write pictures ({error.strerror or error}); "
                       "free some space or name another folder") from error
    return paths


def grid(images: Tensor, columns: int, scale: int = 1, pad: int = 2) -> Image.Image:
    """uint8 [N, 3, H, W] -> one sheet on white, row by row, each picture `scale` times larger (nearest).

    `pad` white pixels, not scaled, lie around and between the pictures. Fewer than `columns` pictures make
    a narrower sheet.
    """
    _check_bytes(images)
    if len(images) < 1 or columns < 1 or scale < 1 or pad < 0:
        raise UsageError("a sheet needs at least 1 picture, columns >= 1, scale >= 1 and pad >= 0, got "
                         f"{len(images)} pictures, columns {columns}, scale {scale}, pad {pad}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = (side * scale for side in images.shape[-2:])
    sheet = Image.new("RGB", (pad + columns * (width + pad), pad + rows * (height + pad)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = _image(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (pad + column * (width + pad), pad + row * (height + pad)))
    return sheet


def _covering(rgb: Image.Image, size: Size) -> Tensor:
    height, width = height_width(size)
    across, down = float(rgb.width), float(rgb.height)
    if across * height > down * width:
        across = down * width / height
    else:
        down = across * height / width
    left, top = (rgb.width - across) / 2, (rgb.height - down) / 2
    # A box, not a crop: the filter reads across its border, so this is resize-then-crop without the large
    # intermediate picture that a panorama would need.
    part = rgb.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
    return torch.from_numpy(np.ascontiguousarray(np.asarray(part).transpose(2, 0, 1)))


def _check_size(path: str, image: Image.Image) -> None:
    if min(image.size) < SMALLEST_SIDE:
        raise UsageError(f"{path}: both sides must be at least {SMALLEST_SIDE} pixels, got "
                         f"{image.width} x {image.height}; give a larger picture")


def _rgb(path: str, image: Image.Image) -> Image.Image:
    """Any mode -> RGB, 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(path, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UsageError(f"{path}: colour mode {image.mode} cannot be turned into RGB; "
                         "save it as an RGB PNG") from error


def _eight_bits(path: str, image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits (I;16, I) or floating point (F) -> L. Pillow's own conversion would clip."""
    grey = np.asarray(image).astype(np.float32 if image.mode == "F" else np.int64)
    top = 1 if image.mode == "F" else 65535
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= top):  # NaN too
        raise UsageError(f"{path}: grey values must be in 0..{top}, got {low:g}..{high:g}; "
                         "save it with 8 bits")
    return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))


def _check_bytes(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"pictures must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}; "
                         "jdm.space.to_bytes turns pixels in [-1, 1] into bytes")


def _image(image: Tensor) -> Image.Image:
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
