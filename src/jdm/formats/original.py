"""Identifies a .safetensors file in Stable Diffusion's original layout, from its header and the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jdm.errors import UsageError, in_short, plural
from jdm.formats.single_file import CONTROLNET, SIZES, TEXT, TEXTS, UNET, VAE, refuse_pickle
from jdm.models import published
from jdm.models.folder import CARD, folder_json

ENDING = ".safetensors"
PREDICTIONS = ("epsilon", "v_prediction")
FIRST = f"{UNET}input_blocks.0.0.weight"
PARTS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
         "controlnet": "ControlNet"}
CONFIGS = {**{part: f"{part}/config.json" for part in PARTS}, "scheduler": "scheduler/scheduler_config.json"}
# The prediction type in a header that follows Stability's model specification.
SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
# Marker tensors, empty or with one number, of formulations that are not supported.
FOREIGN = {"ztsnr": "a zero terminal signal-to-noise ratio", "edm_mean": "EDM's noise levels",
           "edm_vpred.sigma_max": "EDM's noise levels"}
# Other kinds of .safetensors file: parts of its tensors' names -> what the file is, and the remedy.
OTHERS = {
    ("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "lora_linear_layer", "hada_w", "lokr_w"):
        "a LoRA, which modifies a model; give the checkpoint it was made for",
    (CONTROLNET, "input_hint_block", "controlnet_cond_embedding", "controlnet_down_blocks"):
        "a ControlNet without its model; give the model's checkpoint",
    ("joint_blocks.", "noise_refiner."):
        "a transformer of SD3 or Z-Image; put its base's diffusers folder beside it, named as the file is without its "
        "ending",
    ("double_blocks.", "single_blocks."):
        "of an unsupported model family; SD1.5, SD2, SDXL, SD3 and Z-Image are supported",
    ("emb_params", "string_to_param"): "an embedding of one word; give the checkpoint of a whole model",
    (VAE, "decoder.up", "decoder.mid"): "an autoencoder without a UNet; give the whole checkpoint",
    ("input_blocks.", "down_blocks."):
        "only a UNet; give the checkpoint that also has text encoder and autoencoder, or its diffusers folder",
}


def named(name: str) -> SingleFile | None:
    """Reads the header of the single file that `name` refers to; returns None if it is a folder or a hub id.

    Raises:
        UsageError: the file is a pickle, missing or damaged, or the prediction after # is unknown.
    """
    path, _, asked = name.rpartition("#") if f"{ENDING}#" in name.lower() else (name, "", "")
    if Path(name).is_dir():
        return None
    refuse_pickle(Path(path), ", which ComfyUI's Save Checkpoint and A1111's Checkpoint Merger write")
    if not path.lower().endswith(ENDING):
        return None
    if asked not in ("", *PREDICTIONS):
        raise UsageError(f"{name}: the prediction after # must be {' or '.join(PREDICTIONS)}, got {asked!r}")
    return SingleFile.opened(Path(path), asked or None)


@dataclass(frozen=True)
class SingleFile:
    """The header of a single file; no tensor is read.

    Attributes:
        asked: the prediction that the name gives after #, or None.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor, as safetensors writes it: `F16`.
        said: the header's metadata.
    """

    path: Path
    asked: str | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    said: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, asked: str | None = None) -> SingleFile:
        """Reads the header at `path`. Raises UsageError if the file does not exist or cannot be read."""
        if not path.is_file():
            raise UsageError(f"{path}: no such file; check the path")
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
        """The folder with the configurations that the file lacks, or None."""
        parts = (*PARTS, "scheduler", "tokenizer", "tokenizer_2")
        folders = (self.path.with_suffix(""), self.path.parent / "config")
        return next((folder for folder in folders if any((folder / part).is_dir() for part in parts)), None)

    def beside_json(self, name: str) -> dict | None:
        return None if self.beside is None else folder_json(str(self.beside), name)

    @property
    def home(self) -> Path:
        """The folder `beside`, or the one to create if there is none."""
        return self.beside or self.path.parent / "config"

    @property
    def reference(self) -> str:
        """Name, for messages, of the model whose shapes the tensors must have: the folder beside, or a known size."""
        return str(self.beside) if self.beside_json(CONFIGS["unet"]) else str(self.known_size)

    @property
    def known_size(self) -> str | None:
        """The size in `single_file.SIZES` with this width of the text states that the UNet attends to, or None."""
        widths = {shape[-1] for key, shape in self.shapes.items()
                  if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
        return next((size for (_, width), size in SIZES.items() if widths == {width}), None)

    def refuse_others(self) -> None:
        """Raises UsageError, saying what the file is, unless it is a Stable Diffusion checkpoint."""
        if FIRST not in self.shapes:
            for marks, what in OTHERS.items():
                if any(mark in key for key in self.shapes for mark in marks):
                    raise UsageError(f"{self.path} is {what}")
            first = f"its first tensor is {min(self.shapes)}" if self.shapes else "it is empty"
            raise UsageError(f"{self.path} is not a Stable Diffusion checkpoint: it has no {FIRST}; {first}")
        if foreign := next((why for key, why in FOREIGN.items() if key in self.shapes), None):
            raise UsageError(f"{self.path} was trained with {foreign}, which is not supported; give another model")
        for part, prefix in (("vae", VAE), ("text_encoder", (TEXT, TEXTS[0]))):
            if not any(key.startswith(prefix) for key in self.shapes):
                raise UsageError(f"{self.path} has a UNet but no {PARTS[part]}; give a checkpoint that holds UNet, "
                                 "text encoder and autoencoder")

    def configs(self) -> dict[str, dict]:
        """Part -> config, from the folder beside the file, or else the published config of its size.

        Raises:
            UsageError: the file is of another kind, its size is unknown, or its name must give the prediction.
        """
        self.refuse_others()
        own = {part: config for part, name in CONFIGS.items() if (config := self.beside_json(name)) is not None}
        if "unet" in own:
            if missing := [part for part in ("vae", "text_encoder", "scheduler") if part not in own]:
                raise UsageError(f"{self.beside} has the UNet's configuration but lacks {CONFIGS[missing[0]]}")
            card = self.beside_json(CARD) or folder_json(str(self.path.parent), CARD)  # where an export puts it
            found = own if card is None else {**own, "card": card}
        else:
            found = published.of_size(self._required_size(), self._prediction(own)) | own
        scheduler = {**found["scheduler"], "prediction_type": self._prediction(own)}
        return {**found, "scheduler": scheduler}

    def _required_size(self) -> str:
        channels = self.shapes[FIRST][1]
        if self.known_size is None:
            known = ", ".join(SIZES.values())
            raise UsageError(f"{self.path} has no known size ({known}); put the diffusers configs of its base into "
                             f"{self.home}")
        if channels != 4:
            raise UsageError(f"{self.path}: its UNet reads {plural(channels, 'channel')}, as models for inpainting or "
                             "editing do; a teacher must read 4, the noise alone")
        return self.known_size

    def _prediction(self, own: Mapping[str, dict]) -> str:
        if self.asked:
            return self.asked
        if "scheduler" in own:
            return own["scheduler"].get("prediction_type", "epsilon")
        said = SAID.get(self.said.get("modelspec.prediction_type", "")) or \
            ARCHITECTURES.get(self.said.get("modelspec.architecture", ""))
        if "v_pred" in self.shapes or said:
            return said or "v_prediction"
        if self.known_size == "SD2":
            raise UsageError(f"{self.path} does not say what its UNet predicts, and SD2 has both: write "
                             f"{self.path}#v_prediction (768-pixel models, as SD2.1) or {self.path}#epsilon (512-pixel "
                             "models, as SD2.1-base)")
        return "epsilon"


def damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read as a safetensors file ({in_short(error)}); it may be truncated; fetch it "
                      "again")
