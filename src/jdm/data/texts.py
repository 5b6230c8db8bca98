"""Text from outside (captions, tables) as Unicode: what is certain is read, anything else is refused by name."""

from __future__ import annotations

import ast
import codecs
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jdm.errors import UsageError, remedy

MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # UTF-32's begins as UTF-16's does
MISSING = ("nan", "<na>", "none", "null", "n/a")  # how programs write that there is no caption
LONGEST_LIST = 100_000  # characters of a list that is written as text


def file_text(file: Path, encoding: str = "") -> str:
    """A text file's contents, as `unicode_of` reads them.

    Raises:
        UsageError: it is no regular file, cannot be read, or is in an encoding that was not stated.
    """
    if not file.is_file():
        raise UsageError(f"{printable(file)} is not a regular file; replace it by one, or move it away")
    try:
        return unicode_of(file.read_bytes(), printable(file), encoding)
    except OSError as error:
        raise UsageError(f"{printable(file)}: {error.strerror}; {remedy(error)}") from None


def unicode_of(raw: bytes, where: str, encoding: str = "") -> str:
    """Text by its byte order mark, else in the encoding that was stated, else in UTF-8.

    Args:
        where: the file, for messages.
        encoding: a name that Python knows, such as cp1252 or gbk; empty for UTF-8.

    Raises:
        UsageError: the bytes are in none of these; the message says what the text could be.
    """
    kind = next((name for mark, name in MARKS if raw.startswith(mark)), encoding or "utf-8")
    try:
        text = raw.decode(kind)
        text.encode()  # some encodings spell half a surrogate pair, which can be neither printed nor stored
    except LookupError:
        raise UsageError(f"--data.encoding {encoding} is not a text encoding that Python knows; give one, such as "
                         "cp1252, gbk, shift_jis or utf-16-le") from None
    except UnicodeError as error:
        remedy = "correct --data.encoding" if kind == encoding else _guessed(raw)
        raise UsageError(f"{where} is not {kind.removesuffix('-sig').upper()} text ({_place(error)}); {remedy}, or "
                         "save it as UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{where} holds null bytes, which no caption has; {_guessed(raw)}, or save it as UTF-8")
    return text


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a cell: one text, a list of texts, or a list that is written as text; none if it is missing.

    A caption that a list holds twice is drawn twice as often.

    Raises:
        UsageError: it is neither text nor a list, or says nan, none or null.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, list | tuple):
        return tuple(caption for one in value for caption in captions_of(one, where))
    if not isinstance(value, str):
        raise UsageError(f"{where}: a caption must be text or a list of texts, got {str(value)[:40]}; name the column "
                         "with the captions: --data.captions NAME")
    text = value.strip()
    if text.lower() in MISSING:
        raise UsageError(f"{where}: the caption is {text!r}, which usually stands for a missing one; write the "
                         "caption, or remove the row")
    if text.startswith("[") and text.endswith("]") and (several := _listed(text)) is not None:
        return captions_of(several, where)
    return (text,) if text else ()


def printable(name: str | Path) -> str:
    """A path as text that can be printed and stored: bytes that are no UTF-8 are written as \\xE9."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names, for a message: "a, b, c, ..."."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _listed(text: str) -> list[str] | None:
    """The texts of a list written as JSON or as Python writes it; None if the text is no such list."""
    if len(text) > LONGEST_LIST:
        return None
    for read in (json.loads, ast.literal_eval):  # neither runs code
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
            return found
    return None


def _guessed(raw: bytes) -> str:
    """Advice: how the text reads in the encoding that charset-normalizer takes it for."""
    from charset_normalizer import from_bytes

    best = from_bytes(raw[:100_000]).best()
    if best is None:
        return "say which encoding it is in: --data.encoding NAME"
    start = " ".join(str(best).split())[:40]
    return f"in {best.encoding} it would read {start!r}: if that is right say --data.encoding {best.encoding}, or " \
           "name the right one there"


def _place(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is 0x{error.object[error.start]:02X}"
    return "it holds half a surrogate pair"
