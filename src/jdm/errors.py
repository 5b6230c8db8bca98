"""Errors that a person reads: one clear line that names the thing, the bound and the remedy."""

import errno
import os
import re

REMEDIES = {errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
            errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENAMETOOLONG: "choose a shorter name",
            errno.EISDIR: "move that folder away", errno.ENOTDIR: "choose another place",
            errno.EEXIST: "choose another place", errno.ENOENT: "put it back, or choose another place",
            errno.ELOOP: "mend the link", errno.EIO: "mend the disk"}
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class _ReportedError(Exception):
    alone = False  # True for an error that one of a run's processes has, and not the first


class UsageError(_ReportedError):
    """Something asked for cannot be done: a bad flag, picture, folder or shape. The command exits with 2."""


class RunError(_ReportedError):
    """A run that started well and failed: NaN, full disk, lost data. The command exits with 3."""


class TerminatedError(RunError):
    """A run that SIGTERM ended, its last step saved. The command exits with 143, as schedulers expect."""


class TeacherWarning(UserWarning):
    """A teacher that runs, but whose parts do not seem to belong together. The command line prints it in one line."""


def plural(number: int, noun: str) -> str:
    """A number and its noun: "1 picture", "2,000 pictures", "2 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def in_short(error: BaseException) -> str:
    """An exception's type and the first line of its message, for one of the above."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def os_errno(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library only quotes it in its message."""
    quoted = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
    return getattr(error, "errno", None) or (int(quoted[1]) if quoted else None)


def remedy(error: BaseException) -> str:
    """Advice for an error of the operating system, such as "free some space"."""
    number, quoted = os_errno(error), re.search(r"\[Errno \d+\][^']*'([^']+)'", str(error))
    name = getattr(error, "filename", None) or (quoted and quoted[1])
    if number not in FORBIDDEN:
        return REMEDIES.get(number or 0, "free some space")
    if name and os.path.exists(name) and not os.access(name, os.R_OK):
        return f"allow reading it (chmod u+r {name})"
    return "choose a folder that can be written"
