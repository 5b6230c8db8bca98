"""What `jdm estimate` says of a run, against the same run measured."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from jdm.cli.parser import main
from jdm.cost import known_configs
from jdm.cost.counting import FORMULAS
from jdm.cost.estimate import Rehearsal, estimate
from jdm.cost.gpus import GPUS
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion import StableDiffusion
from jdm.models.text import TextEncoder
from jdm.recipes import all_recipes
from jdm.regularisers import Adversarial
from jdm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("untrained_judge")
RECIPES = all_recipes()
ROW = 16 * 96 * 4  # bytes of a prompt's states
CPU_ATTENTION = {op: FORMULAS[op].__wrapped__ for op in (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
                                             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)}


class Untracked(nullcontext):
    """No module is followed: PyTorch's tracker cannot be backward to an input, as the condition term goes."""

    parents = ("Global",)


@pytest.fixture(scope="module", params=["nano-canny", pytest.param("mid-size", marks=pytest.mark.slow), "wide"])
def measured(request, tmp_path_factory):
    """(estimate, trainer after a step, FLOPs of its second step, bytes autograd saved in its generator phase)."""
    place = tmp_path_factory.mktemp("estimated")
    run = tiny.run(RECIPES["nano-canny"](), place / "run", place)
    run = replace(run, model="nano-sd", batch=2)
    if request.param == "wide":
        run = replace(run, data=replace(run.data, size=(28, 44)))
    if request.param == "mid-size":
        torch.manual_seed(0)
        teacher = tiny.model()
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=tiny.VAE.latent_channels, out_channels=tiny.VAE.latent_channels,
            attention_head_dim=4, block_out_channels=(64, 128), layers_per_block=2,
            cross_attention_dim=tiny.TEACHER.text_width,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        unet.eval().requires_grad_(False)
        run = replace(run, model=str(save_pipeline(teacher.with_parts(unet=unet), place / "teacher")))
    trainer, saved = Trainer(run), {}
    trainer.task.begin(1).x.detach()  # the prompts of the measured step are remembered
    known = {p.untyped_storage()._cdata for m in trainer.task.modules.values() for p in m.parameters()}

    def packed(value):
        if value.untyped_storage()._cdata not in known and not isinstance(value, torch.nn.Parameter):
            saved[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return value

    trainer._phases(0)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    counter.mod_tracker = Untracked()  # type: ignore[assignment]
    with counter:
        trainer._phases(1)
    state = trainer.task.begin(1)
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda held: held):
        assert state.x.requires_grad  # the sample's own graph, which is held until the last phase
        trainer.task.phases[-1].loss(state, 0)
    return estimate(run), trainer, counter.get_total_flops(), sum(saved.values())


def test_estimated_flops_are_those_of_a_real_step(measured):
    found, _, flops, _ = measured
    assert found.flops == pytest.approx(flops, rel=0.01)


def test_estimated_bytes_are_those_of_a_trainer(measured):
    found, trainer, _, _ = measured
    trained = sum(p.nbytes for m in trainer.task.modules.values() for p in m.parameters())
    averages = sum(p.nbytes for average in trainer.averages.values() for p in average.values())
    states = sum(v.nbytes for o in trainer.optimizers.values() for s in o.state.values() for v in s.values())
    assert sum(v for k, v in found.memory.items() if k.startswith("trained")) == pytest.approx(trained, rel=0.01)
    assert sum(v for k, v in found.memory.items() if k.startswith("average")) == pytest.approx(averages, rel=0.01)
    assert found.memory["optimiser"] == pytest.approx(states, rel=0.01)
    for phase in trainer.task.phases:
        assert found.gradients[phase.name] == pytest.approx(sum(p.nbytes for p in phase.parameters), rel=0.01)


def test_saved_activations_are_those_autograd_keeps(measured):
    found, _, _, saved = measured
    # 15%: the estimate counts what is alive, which has a step's inputs in it; autograd's hooks see what it saves.
    assert found.saved["generator"] == pytest.approx(saved, rel=0.15)


def test_attention_is_as_on_the_runs_own_device(teacher, tmp_path):
    """A GPU's kernel keeps no matrix of all pairs of positions; a CPU's in bf16 does."""
    run = replace(tiny.run(RECIPES["nano-diff-instruct"](), tmp_path, teacher, precision="bf16"), batch=2)
    on = {device: estimate(replace(run, device=device)).memory["activations"] for device in ("cuda", "cpu")}
    assert on["cuda"] < on["cpu"]


def test_a_terms_module_is_counted(teacher, tmp_path):
    ddmd = RECIPES["nano-ddmd-4"]()
    with_critic = replace(ddmd, method=replace(ddmd.method, regulariser=Adversarial()))
    run = tiny.run(with_critic, tmp_path, teacher)
    found, plain = estimate(run), estimate(replace(run, method=ddmd.method))
    trainer = Trainer(run)
    heads = sum(p.nbytes for p in trainer.task.modules["regulariser"].parameters())
    (phase,) = (p for p in trainer.task.phases if p.name == "regulariser")
    assert found.gradients["regulariser"] == sum(p.nbytes for p in phase.parameters) == heads > 0
    more = {key: sum(v for k, v in e.memory.items() if k.startswith("trained")) for key, e in
            (("found", found), ("plain", plain))}
    assert more["found"] - more["plain"] == heads
    assert found.flops > plain.flops


@pytest.mark.parametrize(("name", "unet", "text"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 123_060_480),
    ("stabilityai/stable-diffusion-2-1-base", 865_910_724, 340_387_840),
    ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, 123_060_480)])
def test_known_shapes_have_the_published_numbers_of_parameters(name, unet, text):
    with torch.device("meta"):
        model = known_configs.without_weights(name)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.modules().items()}
    assert (counts["unet"], counts["text_encoder"], counts["vae"]) == (unet, text, 83_653_863)
    assert counts.get("text_encoder_2", 694_659_840) == 694_659_840


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    assert main(["estimate", "nano-diff-instruct", "--batch", "2", "--gpu", "h100", "--json",
                 str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [g["gpu"] for g in found["gpus"]] == [GPUS["h100"].name]
    assert found["total"] == pytest.approx(sum(found["memory"].values()))
    assert "fake score's training" in capsys.readouterr().out


def test_unknown_flags_and_gpus_are_refused(capsys):
    assert main(["estimate", "nano-canny", "--gpu", "h10"]) == 2
    assert "did you mean h100?" in capsys.readouterr().err
    assert main(["estimate", "nano-canny", "--bach", "2"]) == 2
    assert "did you mean --batch?" in capsys.readouterr().err


# Prompts remembered on the device


def test_the_oldest_prompts_are_forgotten_beyond_the_bound(teacher):
    model: StableDiffusion = load_model(str(teacher))
    bounded = TextEncoder(model.text_encoder, model.tokenizer, capacity=3 * ROW, one_by_one=True)
    free = model.text(one_by_one=True)
    seen = []
    bounded.encode = lambda prompts: seen.extend(prompts) or free.encode(prompts)  # type: ignore[method-assign]
    for asked in (["a", "b", "c"], ["d", "a"], ["b", "d"], ["a", "c"], ["e", "f", "g", "h", "e"]):
        assert torch.equal(bounded(asked), free(asked))  # type: ignore[arg-type]
        assert bounded._held == ROW * len(bounded._memory) <= 3 * ROW
    assert seen == [*"abcdaefgh"]
    assert list(bounded._memory) == ["f", "g", "h"]
    bounded.forget()
    assert bounded._held == 0


def test_the_estimate_counts_no_more_than_is_remembered(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("jdm.cost.estimate.REMEMBERED", 5 * ROW)
    run = tiny.run(all_recipes()["nano-canny"](), tmp_path / "run", teacher, steps=2)
    found = []
    for batch in (1, 4):
        rehearsal = Rehearsal(replace(run, batch=batch))
        rehearsal.shapes.text()(["a picture"])
        found.append(rehearsal._prompts())
    assert found == [2 * ROW, 5 * ROW]
