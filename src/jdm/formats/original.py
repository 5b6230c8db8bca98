"""What a .safetensors file of Stable Diffusion's original layout is, from its header and from what lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jdm.errors import UsageError, in_short
from jdm.formats.single_file import CONTROLNET, KNOWN, TEXT, TEXTS, UNET, VAE, refuse_pickle
from jdm.models import published
from jdm.models.folder import CARD, folder_json

ENDING = ".safetensors"
PREDICTIONS = ("epsilon", "v_prediction")
FIRST = f"{UNET}input_blocks.0.0.weight"
CONFIGS = {"unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json",
           "text_encoder_2": "text_encoder_2/config.json", "controlnet": "controlnet/config.json",
           "scheduler": "scheduler/scheduler_config.json"}
PARTS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
         "controlnet": "ControlNet"}
# What a header says of the prediction: Stability's model specification.
SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
# Tensors that stand for a formulation of their own, without numbers or with one.
FOREIGN = {"ztsnr": "a zero terminal signal-to-noise ratio", "edm_mean": "EDM's noise levels",
           "edm_vpred.sigma_max": "EDM's noise levels"}
# What else a .safetensors file of that world may be: parts of its tensors' names -> what it is.
OTHERS = {
    ("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "lora_linear_layer", "hada_w", "lokr_w"):
        "a LoRA, which changes a model and is none; give the checkpoint it was made for",
    (CONTROLNET, "input_hint_block", "controlnet_cond_embedding", "controlnet_down_blocks"):
        "a ControlNet without the model that it steers; give that model's checkpoint",
    ("joint_blocks.", "double_blocks.", "single_blocks."):
        "of a family that is not read here; SD1.5, SD2 and SDXL are",
    ("emb_params", "string_to_param"): "an embedding, one word of a model; give the model's checkpoint",
    (VAE, "decoder.up", "decoder.mid"): "an autoencoder without a UNet; give the whole checkpoint",
    ("input_blocks.", "down_blocks."):
        "a UNet alone; give the checkpoint that has text encoder and autoencoder too, or the diffusers folder it is of",
}


def named(name: str) -> SingleFile | None:
    """The file that a model's name means, its header read; None where it means a folder or a hub id.

    Raises:
        UsageError: a pickle, no such file, a damaged one, or no such prediction.
    """
    path, _, asked = name.rpartition("#") if f"{ENDING}#" in name.lower() else (name, "", "")
    if Path(name).is_dir():
        return None
    refuse_pickle(Path(path), ": ComfyUI's Save Checkpoint and A1111's Checkpoint Merger write it")
    if not path.lower().endswith(ENDING):
        return None
    if asked not in ("", *PREDICTIONS):
        raise UsageError(f"{name}: what follows # is the prediction, {' or '.join(PREDICTIONS)}, got {asked!r}")
    return SingleFile.opened(Path(path), asked or None)


@dataclass(frozen=True)
class SingleFile:
    """A file's header: what it holds, before a number is read.

    Attributes:
        asked: the prediction that the name asks for. dtypes: as safetensors writes them, `F16`.
    """

    path: Path
    asked: str | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    said: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, asked: str | None = None) -> SingleFile:
        """UsageError: there is no such file, or it cannot be read."""
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        try:
            with safe_open(path, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                dtypes = {key: part.get_dtype() for key, part in slices.items()}
                return cls(path, asked, shapes, dtypes, opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None

    @property
    def beside(self) -> Path | None:
        """The folder that answers what the file does not."""
        parts = (*PARTS, "scheduler", "tokenizer", "tokenizer_2")
        folders = (self.path.with_suffix(""), self.path.parent / "config")
        return next((folder for folder in folders if any((folder / part).is_dir() for part in parts)), None)

    def beside_json(self, name: str) -> dict | None:
        return None if self.beside is None else folder_json(str(self.beside), name)

    @property
    def home(self) -> Path:
        """That folder, or where it is to be put."""
        return self.beside or self.path.parent / "config"

    @property
    def whose(self) -> str:
        """Whose shapes its tensors are to have."""
        return str(self.beside) if self.beside_json(CONFIGS["unet"]) else str(self.size)

    @property
    def size(self) -> str | None:
        """One of `single_file.KNOWN`'s, by the width of the text states that the UNet attends to."""
        widths = {shape[-1] for key, shape in self.shapes.items()
                  if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
        return next((size for (_, width), size in KNOWN.items() if widths == {width}), None)

    def refuse_others(self) -> None:
        """UsageError, with what it is, where it is no checkpoint of a Stable Diffusion."""
        if FIRST not in self.shapes:
            for marks, what in OTHERS.items():
                if any(mark in key for key in self.shapes for mark in marks):
                    raise UsageError(f"{self.path} is {what}")
            first = f"its first tensor is {min(self.shapes)}" if self.shapes else "it is empty"
            raise UsageError(f"{self.path} is no Stable Diffusion checkpoint: it has no {FIRST}; {first}")
        if foreign := next((why for key, why in FOREIGN.items() if key in self.shapes), None):
            raise UsageError(f"{self.path} was trained with {foreign}, which no schedule here has; give another model")
        for part, prefix in (("vae", VAE), ("text_encoder", (TEXT, TEXTS[0]))):
            if not any(key.startswith(prefix) for key in self.shapes):
                raise UsageError(f"{self.path} has a UNet and no {PARTS[part]}; give the checkpoint that has UNet, "
                                 "text encoder and autoencoder in one")

    def configs(self) -> dict[str, dict]:
        """Part -> config: of the folder beside the file, else the published ones of its size.

        Raises:
            UsageError: of an unknown size, or the prediction has to be said.
        """
        own = {part: config for part, name in CONFIGS.items() if (config := self.beside_json(name)) is not None}
        if "unet" in own:
            if missing := [part for part in ("vae", "text_encoder", "scheduler") if part not in own]:
                raise UsageError(f"{self.beside} has the UNet's configuration and lacks {CONFIGS[missing[0]]}")
            card = self.beside_json(CARD) or folder_json(str(self.path.parent), CARD)  # where an export puts it
            found = own if card is None else {**own, "card": card}
        else:
            found = published.of_size(self._known_size(), self._prediction(own)) | own
        scheduler = {**found["scheduler"], "prediction_type": self._prediction(own)}
        return {**found, "scheduler": scheduler}

    def _known_size(self) -> str:
        channels = self.shapes[FIRST][1]
        if self.size is None:
            known = ", ".join(KNOWN.values())
            raise UsageError(f"{self.path} is of no size that is known here ({known}); put the diffusers configs of "
                             f"its base into {self.home}")
        if channels != 4:
            raise UsageError(f"{self.path}: its UNet reads {channels} channels, as those that fill in or edit pictures "
                             "do; a teacher draws from noise alone, 4 channels")
        return self.size

    def _prediction(self, own: Mapping[str, dict]) -> str:
        if self.asked:
            return self.asked
        if "scheduler" in own:
            return own["scheduler"].get("prediction_type", "epsilon")
        said = SAID.get(self.said.get("modelspec.prediction_type", "")) or \
            ARCHITECTURES.get(self.said.get("modelspec.architecture", ""))
        if "v_pred" in self.shapes or said:
            return said or "v_prediction"
        if self.size == "SD2":
            raise UsageError(f"{self.path} does not say what its UNet predicts, and SD2 has both: write "
                             f"{self.path}#v_prediction (768-pixel models, as SD2.1) or {self.path}#epsilon (512-pixel "
                             "ones, as SD2.1-base)")
        return "epsilon"


def damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read as a safetensors file ({in_short(error)}); it may be cut short: fetch it "
                      "again")
