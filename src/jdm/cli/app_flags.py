"""The flags of `jdm app`. Only the standard library is imported, as for all help."""

from __future__ import annotations

import argparse

from jdm.cli.parser import trust_flag
from jdm.cli.values import port, positive, token

LIMITS = {  # field of jdm.app.limits.Limits -> (default, help)
    "bytes": (8_000_000, "most bytes of a request, and of a picture file on the page"),
    "pixels": (16_000_000, "most pixels of a picture that is sent, before it is resized"),
    "pictures": (16, "most pictures of one request"),
    "waiting": (8, "requests that wait for their turn; more are told when to try again"),
    "pages": (16, "pages that draw at the same time"),
    "seconds": (60, "seconds of one request, waiting included"),
}


def app_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `jdm app`."""
    trust_flag(parser)
    parser.add_argument("models", metavar="MODEL", nargs="*", help="models to draw with, the first shown at the "
                        "start: shipped names, folders or Hugging Face ids; those of one UNet can be combined "
                        "(default: the students that ship)")
    parser.add_argument("--also", action="append", default=[], metavar="MODEL", help="another ControlNet for the UNet "
                        "of every MODEL, with a strength of its own on the page; repeatable")
    parser.add_argument("--control", help="control of every MODEL whose card names none, such as canny or "
                        "my_controls.py:Posterize")
    parser.add_argument("--compare", metavar="MODEL", help="slow model that the compare button draws with (default: "
                        "the multi-step model among MODEL and the shipped ones with the same control and autoencoder)")
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cpu or cuda")
    parser.add_argument("--threads", type=positive, help="CPU threads to compute with, at least 1 (default: one fewer "
                        "than there are cores, which leaves the browser one)")
    parser.add_argument("--static", metavar="OUT", help="serve nothing: write the page to a new folder OUT for any "
                        "static host, with the models as ONNX graphs that the browser computes; fetches the npm "
                        "package onnxruntime-web once")
    where = parser.add_argument_group("where it is served")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on; any other than this machine's own "
                       "needs a token, and one is made if none is given")
    where.add_argument("--port", type=port, default=7860, help="port to listen on, in [0, 65535]; 0 takes a free one")
    where.add_argument("--token", type=token, help="secret that every request to the API must carry, of letters, "
                       "digits, - and _, at least 8")
    where.add_argument("--open", action="store_true", help="open the page in this machine's browser once it is served")
    bounds = parser.add_argument_group("limits; a request beyond one is refused in a sentence")
    for name, (default, said) in LIMITS.items():
        bounds.add_argument(f"--max-{name}", type=positive, default=default, help=said)
