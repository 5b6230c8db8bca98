"""Every recipe: it trains, exports and logs on tiny models, and its record makes it again."""

import json
import math
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jdm.recipes import all_recipes, entries, recorded
from jdm.run import Optimiser, described
from jdm.training import checkpoint
from jdm.training.loop import train
from tiny import same

RECIPES = all_recipes()
pytestmark = pytest.mark.usefixtures("untrained_judge")


# What a recipe leaves where it is: a gradient that is exactly 0, a rate of 0, a table of sines, queries of text that
# nothing reads after the last block.
STILL = {f"{family}-nct-{name}": part for family in ("nano", "sd15")
         for name, part in (("no-consistency", "controlnet."), ("no-dual", "multiplier."))}
STILL["nano-flow-teacher"] = ("transformer.pos_embed.pos_embed", *(
    f"transformer.transformer_blocks.5.attn.{name}" for name in ("add_q_proj", "norm_added_q")))


# SD1.5's overlays are nano's at other rates, in bfloat16 and with a LoRA for the fake score. These stand for the rest,
# which `make test-slow` trains too, and so it does the ablations.
SD15 = ("canny", "canny-4", "canny-lora", "controlled-fake", "hed", "nct")


def trained() -> list:
    """Every recipe; slow, the ablations, and those of SD1.5 that have a twin of nano's and are not in `SD15`."""
    def is_slow(name: str) -> bool:
        scale, _, overlay = name.partition("-")
        twin = scale == "sd15" and overlay not in SD15 and f"nano-{overlay}" in RECIPES
        return twin or (entries()[name].module == "jdm.recipes.ablations" and overlay not in SD15)

    return [pytest.param(name, marks=pytest.mark.slow) if is_slow(name) else name for name in sorted(entries())]


@pytest.mark.parametrize("name", trained())
def test_every_recipe_trains_exports_and_logs(name, teacher, tmp_path):
    run = tiny.run(RECIPES[name](), tmp_path, teacher)
    folder = train(replace(run, method=at_full_rate(run.method)))
    first, last = (load_file(place / "state.safetensors") for place in checkpoint.all_checkpoints(tmp_path))
    before, after = under(first, "module."), under(last, "module.")
    still = {k for k in after if torch.equal(before[k], after[k]) and not asleep(k)}
    assert still == {k for k in after if k.startswith(STILL.get(name, "-")) and not asleep(k)}
    averages, parts = under(last, "average."), under(first, "average.")
    assert len(averages) > 30
    for key in (k for k in averages if averages[k].is_floating_point() and ".running_" not in k):
        expected = parts[key].lerp(after[key], 1 - 2 / 11)  # the average's decay at step 1
        torch.testing.assert_close(averages[key], expected, atol=1e-6, rtol=1e-5)
    for part in sorted({k.split(".")[0] for k in averages}):
        average, found = under(averages, f"{part}."), exported(folder, part)
        if any(".lora_" in k for k in average):
            torch.testing.assert_close(found, merged(average, exported(teacher, part), run.precision))
        else:
            assert same(found, average)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2]
    assert all(math.isfinite(v) for r in rows for v in r.values())


def at_full_rate(method):
    """Without warm-up and with steps that show: a weight of 1 is not moved by less than 6e-8."""
    if isinstance(method, Optimiser):
        return replace(method, warmup=0, lr=method.lr and max(method.lr, 1e-3))
    nested = {k: at_full_rate(v) for k, v in vars(method).items() if is_dataclass(v)}
    return replace(method, **nested)


def asleep(key: str) -> bool:
    """Behind two zero convolutions in a row: it wakes at the third step."""
    return "controlnet_cond_embedding" in key and "conv_out" not in key


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def merged(lora: dict[str, torch.Tensor], base: dict[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """W + B A, of the frozen W that it was trained on."""
    whole = {k: v.bfloat16().float() if precision == "bf16" else v for k, v in base.items()}
    for key in (k for k in lora if ".lora_A." in k):
        path, b = key.partition(".lora_A.")[0], lora[key.replace(".lora_A.", ".lora_B.")]
        whole[f"{path}.weight"] += (b.flatten(1) @ lora[key].flatten(1)).view_as(whole[f"{path}.weight"])
    return whole


def exported(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The one file of weights in a part's folder, or in that of a model of one part."""
    (file,) = (folder / part if (folder / part).is_dir() else folder).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", sorted(entries()))
def test_every_recipe_survives_its_own_record(name, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"run": described(RECIPES[name]())}))
    assert recorded(tmp_path / "run.json") == RECIPES[name]()
