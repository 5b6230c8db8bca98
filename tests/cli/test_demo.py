"""`jdm demo` on the shipped models, with few steps and pictures."""

import json

import numpy as np
import torch
from PIL import Image

from jdm.cli import demo as module
from jdm.cli.demo import ASKS, demo
from jdm.controls import Canny
from jdm.data.sources import load_pictures
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.space import to_bytes

KEYS = {"fd", "fd_floor", "fd_extractor", "consistency", "consistency_chance", "diversity", "prompt_agreement", "nfe",
        "seconds_per_image", "n"}


def rows_of(sheet, columns: int = 16, side: int = 32) -> torch.Tensor:
    """uint8 [rows, columns, 3, side, side] of the sheet's pictures, each drawn twice as large."""
    pixels, step = torch.from_numpy(np.array(sheet.convert("RGB"))), 2 * side + 2
    assert pixels.shape[1] == 2 + columns * step
    rows = [torch.stack([pixels[y : y + 2 * side : 2, x : x + 2 * side : 2].permute(2, 0, 1)
                         for x in range(2, 2 + columns * step, step)]) for y in range(2, len(pixels) - step + 1, step)]
    return torch.stack(rows)


def test_demo_measures_four_generators_on_one_page(tmp_path, monkeypatch):
    # With all questions diversity and times would take most of the test, and so would batches of 32.
    diversity, cost, recipe = evaluation.noise_diversity, module.cost, module.recipe
    monkeypatch.setattr(evaluation, "noise_diversity", lambda *given: diversity(*given[:4], 3, 2))
    monkeypatch.setattr(module, "cost", lambda sampler, questions, *given, **more: cost(
        sampler, questions.head(3), *given, **more))
    monkeypatch.setattr(module, "recipe", lambda out, steps: recipe(out, steps, batch=8))
    lines: list[str] = []
    steps: list[int] = []
    metrics = demo(tmp_path, steps=6, n=16, progress=lambda step, _: steps.append(step), say=lines.append)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"controlnet50", "shipped", "fresh_before", "fresh_after"}
    assert all(set(row) >= KEYS for row in metrics.values())
    assert metrics["shipped"]["consistency"] < metrics["fresh_before"]["consistency"]
    assert metrics["shipped"]["consistency"] < metrics["shipped"]["consistency_blank"]
    assert metrics["shipped"]["fd"] < metrics["fresh_before"]["fd"]
    ratio = metrics["controlnet50"]["seconds_per_image"] / metrics["shipped"]["seconds_per_image"]
    assert ratio > 10
    assert [row["nfe"] for row in metrics.values()] == [100, 1, 1, 1]
    for key in ("fd", "consistency", "std"):
        assert metrics["fresh_after"][key] != metrics["fresh_before"][key]
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "jdm train nano-canny" in page
    assert "http" not in page
    assert any("50-step ControlNet" in line for line in lines)
    assert f"1/{ratio:.0f} of the ControlNet" in page
    assert page.count("<polyline") == 5
    assert all(f"<td>{row['fd']:.4g}</td>" in page for row in metrics.values())
    log = [json.loads(line)["step"] for line in (tmp_path / "fresh" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert log == [5, 6]
    assert "Training of the fresh student, 6 steps of batch 8" in page
    _check_sheet(rows_of(Image.open(tmp_path / "grid.png")), load_model(str(tmp_path / "fresh" / "model")))


def _check_sheet(rows, student) -> None:
    """Pictures, their edges, then the 50-step ControlNet, the shipped student, the fresh one before and after."""
    assert rows.shape == (6, 16, 3, 32, 32)
    questions = Questions.of(load_pictures("fashion-mnist", ASKS, 32), Canny(), 16, seed=0)
    shipped, after = (answers(Sampler(model), questions, Canny()) for model in (load_model("nano-canny"), student))
    edges = (255 * questions.c).byte().expand(-1, 3, -1, -1)
    for row, expected in ((0, to_bytes(2 * questions.images - 1)), (1, edges), (3, shipped), (5, after)):
        assert (rows[row].int() - expected.int()).abs().max() <= 1, f"row {row}"
    assert (rows[2].int() - rows[3].int()).abs().max() > 50
    assert not torch.equal(rows[4], rows[5])
