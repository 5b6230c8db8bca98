"""A user's own code: how it is imported, and checked on two pictures before hours of training depend on it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

from jdm.errors import UsageError, in_short
from jdm.files import expanded
from jdm.size import Size, height_width
from jdm.trust import refuse_data, trust_source

OWN = "_jdm_"  # what the names of modules begin with that are files of a user's


def imported(source: str) -> ModuleType:
    """Import a module by its file, `my_controls.py`, or by its name, `package.module`.

    Raises:
        UsageError: the file or module does not exist, it raises when it is run, or only a file of data names it.
    """
    refuse_data(source)
    module = _module(source)
    trust_source(source)
    return module


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            raise UsageError(f"{source} could not be imported ({in_short(error)}); a file is named with its "
                             ".py, such as my_controls.py:Posterize") from error
    path = expanded(source)
    if not path.is_file():
        raise UsageError(f"there is no file {source}; looked for {path.absolute()}")
    # The name contains a hash of the path, so that two files of the same name can both be loaded.
    name = f"{OWN}{path.stem}_{hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:  # never, for a .py file
        raise UsageError(f"{source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{source} could not be run ({in_short(error)}); try `python {source}`") from error
    return module


def probe(size: Size, seed: int) -> Tensor:
    """Two test pictures [2, 3, H, W] of uniform noise in [0, 1]; the lower half of the second is black."""
    height, width = height_width(size)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    images[1, :, height // 2 :] = 0
    return images


def check_gradient(what: str, value: object, images: Tensor, alternative: str = "") -> None:
    """Check that a user's function gave one finite value per picture, with a usable gradient.

    Args:
        what: the function's name, for error messages.
        value: what the function returned for the pictures.
        images: [B, ...], the pictures it was called with; they require a gradient.
        alternative: what a user can do if the function cannot be made differentiable; appended to the error message.

    Raises:
        UsageError: `value` is not [B] or not finite, or its gradient is missing, not finite, or 0 at every pixel.
    """
    remedy = ("keep its operations differentiable (no rounding, threshold, uint8, numpy, no_grad or .detach())"
              + (f", {alternative}" if alternative else ""))
    if not isinstance(value, Tensor) or tuple(value.shape) != (len(images),):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"{what} must return one value per picture, [{len(images)}] here, got {got}; sum or average "
                         "over all but the first dimension")
    if not value.isfinite().all():
        raise UsageError(f"{what} must be finite, got {value.tolist()}; guard its divisions and logarithms")
    if not value.requires_grad:
        raise UsageError(f"{what} has no gradient with respect to the picture; {remedy}")
    try:
        (gradient,) = torch.autograd.grad(value.sum(), images)
    except RuntimeError as error:
        raise UsageError(f"{what} cannot be differentiated with respect to the picture ({in_short(error)}); "
                         f"{remedy}") from error
    if not gradient.isfinite().all():
        raise UsageError(f"{what}'s gradient must be finite, got NaN or infinity; a square root or logarithm of 0, as "
                         "in a flat part of a picture, has none: add a small constant")
    if not gradient.any():
        raise UsageError(f"{what}'s gradient is 0 at every pixel; {remedy}")
