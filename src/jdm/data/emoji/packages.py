"""The npm packages that the emoji come from, each pinned, and whose work they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jdm.data import npm

LICENCES = Path(__file__).parent / "licences"


@dataclass(frozen=True)
class Package(npm.Package):
    """A package of drawings or names.

    Attributes:
        style: word by which captions call its drawings; empty if it holds names instead.
        work: the part that is used.
        author: whom its licence asks to name.
        home: address of the work's project.
        licence: SPDX name.
    """

    style: str
    work: str
    author: str
    home: str
    licence: str


GOOGLE, MICROSOFT = "Google Inc.", "Microsoft Corporation"
FLUENT, NOTO = "https://github.com/microsoft/fluentui-emoji", "https://github.com/googlefonts/noto-emoji"
NAMES = Package(
    "emojibase-data", "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==", "",
    "names and groups, from Unicode's CLDR (Unicode-3.0)", "Miles Johnson; Unicode, Inc.",
    "https://github.com/milesj/emojibase", "MIT")
STYLES = (
    Package("@lobehub/fluent-emoji-3d", "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==", "3d",
            "Fluent Emoji in 3D", f"{MICROSOFT}; LobeHub", FLUENT, "MIT"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==", "flat",
            "Fluent Emoji, flat", MICROSOFT, FLUENT, "MIT"),
    Package("@iconify-json/fluent-emoji", "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==", "glossy",
            "Fluent Emoji, in colour", MICROSOFT, FLUENT, "MIT"),
    Package("@iconify-json/noto", "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==", "noto",
            "Noto Emoji", GOOGLE, NOTO, "Apache-2.0"),
    Package("@iconify-json/noto-v1", "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==", "blob",
            "Noto Emoji, version 1", GOOGLE, NOTO, "Apache-2.0"),
    Package("@iconify-json/twemoji", "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==", "twemoji",
            "Twemoji", "Twitter, Inc. and other contributors", "https://github.com/jdecked/twemoji", "CC-BY-4.0"))


def notice() -> str:
    """Authors and licences of everything the pictures and captions are made of, with the licences' texts."""
    lines = ["The pictures, and what is trained on them, are made from these works: drawn at a small size on white,",
             "and some mirrored, shrunk, shifted and turned. Captions are made from the names and groups.", ""]
    for package in (*STYLES, NAMES):
        style = f" ({package.style} style)" if package.style else ""
        lines += [f"{package.work}{style}", f"  by {package.author}, {package.home}",
                  f"  licence {package.licence}; npm package {package.name} {package.version}", ""]
    lines += ["CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/", ""]
    for file in sorted(LICENCES.glob("*.txt")):
        lines += ["-" * 79, file.stem, "", file.read_text(encoding="utf-8")]
    return "\n".join(lines)
