"""The worked examples of docs/extending.md: as the page shows them, trained for a step, held to their promises."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from jdm.levels import Levels
from jdm.recipes import find
from jdm.training.trainer import Trainer
from jdm.user_code import imported

ROOT = Path(__file__).parents[1]
EXAMPLES = ("new_recipe.py", "new_term.py", "new_method.py")


def lines_of(name: str, kind: str) -> int:
    """Lines of the first class or function of an example."""
    tree = ast.parse((ROOT / "examples" / name).read_text())
    node = next(n for n in tree.body if type(n).__name__ == kind)
    return node.end_lineno - node.lineno + 1


def test_the_page_shows_the_example_files():
    shown = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs" / "extending.md").read_text(), re.S)
    assert shown == [(ROOT / "examples" / name).read_text().rstrip() for name in EXAMPLES]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_trains(name, teacher, tmp_path, untrained_judge):
    run = find(str(ROOT / "examples" / name))()
    trainer = Trainer(tiny.run(run, tmp_path, teacher))
    before = [p.clone() for p in trainer.task.modules["unet"].parameters()]
    logs = trainer.step(0)
    assert all(float(v) == pytest.approx(float(v)) for v in logs.values())  # finite
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.task.modules["unet"].parameters(), strict=True))


def test_extensions_are_as_short_as_promised():
    assert lines_of("new_recipe.py", "FunctionDef") <= 15
    assert lines_of("new_term.py", "ClassDef") <= 30
    assert len((ROOT / "examples" / "new_method.py").read_text().splitlines()) <= 50


def test_the_terms_direction_has_its_closed_form():
    module = imported(str(ROOT / "examples" / "new_term.py"))
    x = 5 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    exact = -2.0 * 2 * x.sign() * (x.abs() - 4).clamp(min=0)
    torch.testing.assert_close(module.InRange(weight=2.0).direction(type("At", (), {"x": x})), exact)


def test_an_augmentation_draws_levels_of_its_own():
    method = find(str(ROOT / "examples" / "new_recipe.py"))().method
    levels = {name: term.levels for name, term in method.distillation().terms.items()}
    assert levels["fidelity"] == levels["condition"] == Levels()
    assert levels["augmentation"] not in (levels["fidelity"], replace(Levels(), low=0.3))
