"""Output streams and exit codes: what a terminal, a closed pipe or a full disk does to a command."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

from jdm.errors import RunError, TerminatedError, UsageError, in_short, remedy


def prepare() -> None:
    """Makes prompts, names and messages of any script work in any terminal.

    Python starts again in UTF-8 mode where the locale has another encoding. A closed stream is opened on nothing, so
    that no file that is opened later takes its place.
    """
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower().replace("-", "") != "utf8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def failed(error: Exception) -> int:
    """Prints an error in one line and returns its exit code; an error of every process is printed by the first."""
    quiet = os.environ.get("RANK", "0") != "0" and not getattr(error, "alone", False)
    if isinstance(error, UsageError):
        return say("" if quiet else str(error), 2)
    if isinstance(error, TerminatedError):
        return say("" if quiet else str(error), 143)
    if isinstance(error, RunError):
        return say(str(error), 3)
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return 141
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # only what was typed can be that long
        return say(f"{(error.filename or '')[:100]}...: {error.strerror}; {remedy(error)}", 2)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        return say("this machine has not the memory for it; ask for fewer or smaller pictures, or a smaller batch", 3)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename or 'what is printed or written'}: "
        return say(f"{place}{error.strerror}; {remedy(error)} and run the same command again", 3)
    return say(f"failed unexpectedly ({in_short(error)}); JDM_DEBUG=1 shows where", 3)


def say(message: str, code: int) -> int:
    """Prints a message on standard error, where there is one, and returns the code."""
    if message and sys.stderr:
        with contextlib.suppress(OSError):  # the exit code still says it
            print("jdm: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def flushed(code: int) -> int:
    """The exit code, once all that was printed is written; another if a command's result could not be."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        return code or say(f"standard output could not be written ({error.strerror}); the command did its work, but "
                            "what it printed is lost", 3)
    return code


def _drop_output() -> None:
    """Sends what is left to print to nowhere, so that Python's end does not fail on it again."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
