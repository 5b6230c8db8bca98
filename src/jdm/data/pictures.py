"""Picture files: reading any common picture as uint8 at a given size, and writing PNG files and contact sheets."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from jdm.data.texts import printable
from jdm.errors import UsageError, in_short, plural, remedy
from jdm.files import expanded, write
from jdm.size import Frame, Size, height_width

SMALLEST_SIDE = 8
ASPECT = 0.05  # by how much the proportions of a control map may differ from its picture's
ORIENTATION = 0x0112  # in EXIF; from 5 on a picture lies on its side
# Whatever a file is named, Pillow tries these alone: for PostScript, say, it would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "QOI", "PCX")
SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
            ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".qoi", ".pcx"}


class UnreadableError(UsageError):
    """Pictures that are there and cannot be read: damaged, too small, or no pictures at all.

    Attributes:
        at: place in what was to be read -> why.
    """

    def __init__(self, message: str, at: Mapping[int, str] | None = None):
        super().__init__(message)
        self.at = {0: message} if at is None else dict(at)


def load_picture(path: str | Path, size: Size | Frame) -> Tensor:
    """Reads the picture at `path` as uint8 RGB [3, H, W] of the given size.

    It is rotated by its EXIF orientation; transparency is composited over black; grey is repeated to three
    channels; 16-bit grey is divided by 257 and float grey in [0, 1] multiplied by 255, both rounded; only
    the first frame is read. The picture is then resized to cover `size`, keeping its proportions (Lanczos,
    antialiased), and cropped at the centre, or where a Frame says. Colour profiles are not applied.

    Raises UsageError if the file does not exist or may not be read, and UnreadableError, which is one, if Pillow
    cannot read it as a whole picture, a side is below 8 pixels, or it has more pixels than Pillow's limit against
    decompression bombs.
    """
    try:
        path = expanded(path)
        there, folder, other = path.is_file(), path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, nobody's home, a null byte
        raise UsageError(f"{str(path)[:100]}: no file can have this path ({in_short(error)[:80]}); give the path of a "
                         "picture (PNG, JPEG, WebP, ...)") from None
    if not there:
        problem = "it is a folder" if folder else "it is not a regular file" if other else "there is no such file"
        raise UsageError(f"{path}: {problem}; give the path of a picture (PNG, JPEG, WebP, ...)")
    return read_picture(path, printable(path), path.stat().st_size, size)


def read_picture(source: Path | BinaryIO, path: str, length: int, size: Size | Frame,
                 most: int | None = None) -> Tensor:
    """`load_picture` for an open file or a path.

    Args:
        path, length: name and bytes, only for messages.
        most: pixels that the picture may have, checked before any is decoded; Pillow's own limit where None.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large but allowed pictures and odd metadata
            with _opened(source) as image:
                _check_size(path, image)
                if most is not None and image.width * image.height > most:
                    raise UsageError(f"{path}: {image.width} x {image.height} are more than {most:,} pixels, the limit "
                                     "here; shrink it first")
                image.load()
                rgb = _rgb(path, ImageOps.exif_transpose(image))
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableError(f"{path}: more than {limit:,} pixels, the limit for opening a picture; "
                         "shrink it first") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableError(f"{path}: not a picture that Pillow reads ({length:,} bytes); "
                         "save it as PNG, JPEG or WebP") from error
    except PermissionError as error:
        raise UsageError(f"{path}: permission denied; change its permissions or copy it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the picture
            raise UsageError(f"{path}: {error.strerror}; {remedy(error)}") from error
        raise UnreadableError(f"{path}: damaged or incomplete ({in_short(error)}); "
                              "copy or save it again") from error
    return _covering(rgb, size)


def _opened(source: Path | BinaryIO) -> Image.Image:
    """The picture, before it is decoded. A PNG's checksums are compared, which decoding does not do for its pixels."""
    image = Image.open(source, formats=FORMATS)
    if image.format != "PNG":
        return image
    image.verify()
    return Image.open(source, formats=["PNG"])


def decoded(image: Image.Image, size: Size | Frame, name: str = "a picture") -> Tensor:
    """`load_picture` for an image that is already open: uint8 RGB [3, H, W]."""
    _check_size(name, image)
    return _covering(_rgb(name, ImageOps.exif_transpose(image)), size)


def refuse_other_aspect(drawn: Path | BinaryIO, picture: Path | BinaryIO, name: str) -> None:
    """UnreadableError where a control map has other proportions than its picture, so that it would not lie on it.

    Only the headers of both are read.
    """
    try:
        sides = sides_of([drawn, picture])
    except Exception as error:  # as in `read_picture`
        raise UnreadableError(f"{name}: damaged or incomplete ({in_short(error)}); copy or save it again") from error
    (width, height), (across, down) = sides
    if not 1 - ASPECT <= width * down / (height * across) <= 1 + ASPECT:
        raise UnreadableError(f"{name}: this control map is {width} x {height} and its picture {across} x {down}; give "
                              "a map of the picture's own proportions")


def sides_of(files: Sequence[Path | BinaryIO]) -> list[tuple[int, int]]:
    """(width, height) of pictures as they are seen, from their headers; whatever Pillow raises where it reads none."""
    def upright(file: Path | BinaryIO) -> tuple[int, int]:
        with Image.open(file, formats=FORMATS) as image:
            return image.size if image.getexif().get(ORIENTATION, 1) < 5 else (image.height, image.width)

    return [upright(file) for file in files]


def read_all(read: Callable[..., Tensor], *items: Sequence[Any], at_once: int = os.cpu_count() or 1) -> Tensor:
    """Calls `read` as `map` does, in threads -> [N, 3, H, W]; decoding and resizing release Python's lock.

    Raises UnreadableError with the places of all pictures that cannot be read.

    NumPy stacks the pictures: a thread that enters PyTorch's parallel loops gets its own OpenMP threads, after which
    no OpenMP thread spins between loops, which halves the speed of training on a CPU.
    """
    def tried(item: tuple[Any, ...]) -> np.ndarray | UnreadableError:
        try:
            return read(*item).numpy()
        except UnreadableError as error:
            return error

    asked = list(zip(*items, strict=True))
    with ThreadPoolExecutor(max(1, min(at_once, len(asked)))) as readers:
        found = list(readers.map(tried, asked))
    if bad := {place: str(one) for place, one in enumerate(found) if isinstance(one, UnreadableError)}:
        raise UnreadableError(next(iter(bad.values())), bad)
    return torch.from_numpy(np.stack(found))  # type: ignore[arg-type]


def save_pictures(images: Tensor, folder: str | Path) -> list[Path]:
    """Writes uint8 [N, 3, H, W] as folder/000.png, ...; returns the paths in order.

    Creates the folder and replaces files of the same names. Raises RunError if the disk cannot be written.
    """
    _check_bytes(images)
    paths = [Path(folder) / name for name in numbered(len(images))]
    for path, image in zip(paths, images, strict=True):
        save_picture(_image(image), path)
    return paths


def numbered(n: int) -> list[str]:
    """The names of n pictures: 000.png, 001.png, ..."""
    digits = max(3, len(str(n - 1)))
    return [f"{index:0{digits}d}.png" for index in range(n)]


def save_picture(image: Image.Image, path: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Writes a PNG file that says it is this program's (`is_ours`); whole or not at all, as `files.write`.

    Args:
        notes: further texts in the file, by keyword.
    """
    content, signed = io.BytesIO(), PngInfo()
    for keyword, text in {"Software": "jdm", **(notes or {})}.items():
        signed.add_itxt(keyword, text)
    image.save(content, "PNG", pnginfo=signed)
    return write(path, content.getvalue())


def is_ours(path: Path) -> bool:
    """True for a picture that `save_picture` wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == "jdm"
    except (OSError, ValueError, SyntaxError):
        return False


def grid(images: Tensor, columns: int, scale: int = 1, pad: int = 2) -> Image.Image:
    """Arranges uint8 [N, 3, H, W] row by row on a white sheet, each picture `scale` times larger (nearest).

    `pad` unscaled white pixels surround and separate the pictures. Fewer than `columns` pictures make a
    narrower sheet.
    """
    _check_bytes(images)
    if len(images) < 1 or columns < 1 or scale < 1 or pad < 0:
        raise UsageError("a sheet needs at least 1 picture, columns >= 1, scale >= 1 and pad >= 0, got "
                         f"{plural(len(images), 'picture')}, columns {columns}, scale {scale}, pad {pad}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = (side * scale for side in images.shape[-2:])
    sheet = Image.new("RGB", (pad + columns * (width + pad), pad + rows * (height + pad)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = _image(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (pad + column * (width + pad), pad + row * (height + pad)))
    return sheet


def _covering(rgb: Image.Image, size: Size | Frame) -> Tensor:
    frame = size if isinstance(size, Frame) else Frame(size)
    height, width = height_width(frame.size)
    across, down = float(rgb.width), float(rgb.height)
    if across * height > down * width:
        across = down * width / height
    else:
        down = across * height / width
    left, top = (rgb.width - across) * frame.across, (rgb.height - down) * frame.down
    # `box` instead of a crop: the filter reads beyond its border, so the result is that of resizing and then
    # cropping, without the large intermediate picture that a panorama would need.
    part = rgb.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
    return torch.from_numpy(np.ascontiguousarray(np.asarray(part).transpose(2, 0, 1)))


def _check_size(path: str, image: Image.Image) -> None:
    if min(image.size) < SMALLEST_SIDE:
        raise UnreadableError(f"{path}: both sides must be at least {SMALLEST_SIDE} pixels, got "
                              f"{image.width} x {image.height}; give a larger picture")


def _rgb(path: str, image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(path, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnreadableError(f"{path}: colour mode {image.mode} cannot be converted to RGB; "
                              "save it as an RGB PNG") from error


def _eight_bits(path: str, image: Image.Image) -> Image.Image:
    """Converts 16-bit, 32-bit (I;16, I) or float (F) grey to L; Pillow's own conversion would clip."""
    grey = np.asarray(image).astype(np.float32 if image.mode == "F" else np.int64)
    top = 1 if image.mode == "F" else 65535
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= top):  # also true for NaN
        raise UnreadableError(f"{path}: grey values must be in 0..{top}, got {low:g}..{high:g}; "
                              "save it with 8 bits")
    return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))


def _check_bytes(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"pictures must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}; "
                         "convert pixels in [-1, 1] with jdm.space.to_bytes")


def _image(image: Tensor) -> Image.Image:
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
