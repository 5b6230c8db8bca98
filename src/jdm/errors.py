"""Errors that a person reads: one clear line that names the thing, the bound and the remedy."""


class UsageError(Exception):
    """Something asked for cannot be done: a bad flag, picture, folder or shape. The command exits with 2."""


class RunError(Exception):
    """A run that started well and failed: NaN, full disk, lost data. The command exits with 3."""


class TerminatedError(RunError):
    """A run that SIGTERM ended, its last step saved. The command exits with 143, as schedulers expect."""


class TeacherWarning(UserWarning):
    """A teacher that runs, but whose parts do not seem to belong together. The command line prints it in one line."""


def in_short(error: Exception) -> str:
    """An exception's type and the first line of its message, for one of the above."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
