"""A student's folder of ONNX graphs, with its tokenizers and a card that says how they go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jdm.controls import Control
from jdm.evaluation.sampling import control_named
from jdm.export.graphs import GraphError, write
from jdm.export.parts import Parts
from jdm.files import write_json
from jdm.models.configs import CARD
from jdm.models.stock import StockModel
from jdm.size import height_width


def write_student(name: str, model: StockModel, folder: Path, half: bool = False) -> None:
    """Writes text_encoder.onnx, student.onnx, decoder.onnx, control.onnx, the tokenizers and jdm.json.

    Args:
        folder: is created.
        half: weights in float16 on disk.

    Raises:
        UsageError: the model is no student with a UNet, its control is not known, or a package is missing.
        GraphError: a part of it cannot be a graph.
    """
    parts = Parts(name, model)
    control = None if model.controlnet is None else control_named(model)
    folder.mkdir()
    for key, graph in (("text_encoder", parts.text_encoder()), ("student", parts.student()),
                       ("decoder", parts.decoder())):
        write(graph, folder / f"{key}.onnx", half)
    if control is not None:
        write_control(parts, control, folder / "control.onnx")
    for key, tokenizer in model.tokenizers.items():
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder / key)
    write_json(folder / CARD, {**(model.card or {}), "onnx": described(parts)})


def write_control(parts: Parts, control: Control, file: Path) -> bool:
    """Writes how a map is made of a picture; False if that is no function of tensors, such as OpenCV's Canny."""
    try:
        write(parts.control(control), file)
    except GraphError:
        return False
    return True


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer's files; its tokenizer.json cuts and pads to the model's length."""
    tokenizer([""], padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)


def described(parts: Parts) -> dict[str, Any]:
    """The facts a program needs to run the graphs: sizes, and each step's level, alpha and sigma."""
    steps = [{"level": level, "alpha": float(alpha), "sigma": float(sigma)} for level, alpha, sigma in
             zip(parts.model.levels or (), parts.alpha, parts.sigma, strict=True)]
    return {"size": list(height_width(parts.model.size)), "latents": list(parts.latents), "steps": steps,
            "zeros": bool(getattr(parts.text, "zeros", False))}
