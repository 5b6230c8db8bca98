"""Tiny models of the classes of SD3, SD3.5 and Z-Image: each trains, resumes, exports, and runs in stock diffusers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import jdm.evaluation.evaluate
import tiny
from families import FLOWS, made
from jdm.evaluation.sampling import Sampler
from jdm.generator import fresh_noise, starting_noise
from jdm.library import load_model
from jdm.models.adapters import Adapter
from jdm.models.execution import settle
from jdm.models.family import copied
from jdm.models.folder import save_pipeline
from jdm.models.stable_diffusion_3 import StableDiffusion3
from jdm.models.z_image import ZImage
from jdm.recipes import find
from jdm.recipes.scales import FOUR
from jdm.run import Run
from jdm.space import unit
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.product import write_model
from jdm.training.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("untrained_judge"), pytest.mark.filterwarnings("ignore::UserWarning")]
PROMPTS = ["an ankle boot", "a coat"]
STOCK = """
import json, sys
sys.modules["jdm"] = None  # importing it raises ImportError
import diffusers, torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
from safetensors.torch import load_file, save_file
folder, asked, out = sys.argv[1:]
asked, told = load_file(asked), json.loads(sys.stdin.read())
noises = iter([*asked["noises"], torch.zeros(())])
scheduling.randn_tensor = lambda *_, **__: next(noises)
pipe = getattr(diffusers, told.pop("class")).from_pretrained(folder, **told.pop("absent"))
pipe.set_progress_bar_config(disable=True)
images = pipe(control_image=2 * asked["control"] - 1, latents=asked["z"], output_type="pt", **told).images
save_file({"images": images.float().contiguous()}, out)
"""


def made_still(kind, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(kind)
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    return model.with_parts(**changes)


def jdm_run(teacher, out, levels, rank=0, name="nano-canny") -> Run:
    """JDM that begins with the ControlNet of the teacher's neighbour, none of whose projections is zero."""
    run = tiny.run(find(name)(), out, teacher, steps=3)
    method = run.method
    branch = replace(method.controlnet, start=str(teacher.with_name("loud")))
    method = replace(method, controlnet=branch, student=replace(method.student, levels=levels, rank=rank),
                     fake=replace(method.fake, loss="own", rank=rank))
    return replace(run, method=method)


@pytest.fixture(scope="module", params=FLOWS)
def family(request, tmp_path_factory):
    """(kind, folder of its tiny teacher, runs of a one-step student and a four-step one of LoRAs, both trained)."""
    place = tmp_path_factory.mktemp(request.param)
    model = made_still(request.param)
    teacher = save_pipeline(model, place / "teacher")
    save_pipeline(model.with_networks(controlnet=loud(model.new_controlnet())), place / "loud")
    runs = {1: jdm_run(teacher, place / "one", (999,)), 4: jdm_run(teacher, place / "four", FOUR, 2, "nano-canny-4")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jdm.evaluation.evaluate, "judge", tiny.judge)
        for run in runs.values():
            train(run)
    return request.param, teacher, runs


def test_a_folder_loads_as_its_indexs_family(family):
    kind, teacher, runs = family
    for folder in (teacher, runs[1].out / "model", runs[4].out / "model"):
        model = load_model(str(folder))
        assert type(model) is (ZImage if kind == "z-image" else StableDiffusion3)
        assert (model.prediction, model.size) == ("flow", 32)
    assert load_model(str(runs[4].out / "model")).levels == FOUR


@pytest.mark.parametrize("steps", [1, 4])
def test_stock_diffusers_reproduces_the_student(family, steps, tmp_path):
    kind, _, runs = family
    folder = runs[steps].out / "model"
    student = load_model(str(folder))
    control = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float().expand(-1, 3, -1, -1)
    shape = student.latent_shape(2, 32)
    z, noises = starting_noise(shape, 5), [fresh_noise(shape, 5, k) for k in range(1, steps)]
    with torch.no_grad():
        ours, other = (unit(student.space.decode(Sampler(student).x(z, PROMPTS, c, lambda k: noises[k - 1])))
                       .clamp(0, 1) for c in (control, 1 - control))
    assert (ours - other).abs().max() > 2e-3, "a control that changes nothing would prove nothing"
    save_file({"z": z, "control": control.contiguous(), "noises": torch.stack(noises) if noises else torch.zeros(0)},
              tmp_path / "asked.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, entry in index.items() if entry == [None, None] and name in student.PARTS]
    more = {"height": 32, "width": 32, "controlnet_conditioning_scale": 1.0} if kind == "z-image" else {
        "max_sequence_length": student.tokens}
    told = {"prompt": PROMPTS, "class": index["_class_name"], "absent": dict.fromkeys(absent), **more,
            **student.asked(student.levels, 1.0, 1000)}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", STOCK, folder, tmp_path / "asked.safetensors", tmp_path / "out"],
                          input=json.dumps(told), text=True, capture_output=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (load_file(tmp_path / "out")["images"] - ours).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_run_ends_with_the_same_bits(family, steps, tmp_path):
    run = family[2][steps]
    halfway = Trainer(replace(run, out=tmp_path))
    halfway.step(0)
    del halfway
    train(replace(run, out=tmp_path))
    a, b = (load_file(checkpoint.last(out) / "state.safetensors") for out in (run.out, tmp_path))
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("name", ["nano-controlnet", "nano-nct", "nano-ddmd-4", "nano-text-reward", "nano-posterior"])
def test_every_method_trains_on_it(family, name, tmp_path):
    _, teacher, runs = family
    run = tiny.run(find(name)(), tmp_path / "run", teacher)
    if name == "nano-nct":
        base = str(runs[1].out / "model")
        run = replace(run, method=replace(run.method, base=base, base_levels=(999,)))
    trainer = Trainer(run)
    before = {k: v.clone() for m in trainer.task.modules.values() for k, v in checkpoint.trained(m).items()}
    trainer.step(0)
    trainer.step(1)
    after = {k: v for m in trainer.task.modules.values() for k, v in checkpoint.trained(m).items()}
    assert any(not torch.equal(v, before[k]) for k, v in after.items())
    levels = {"nano-ddmd-4": FOUR, "nano-text-reward": (625,), "nano-nct": (999,)}.get(name)
    assert load_model(str(write_model(trainer))).levels == levels


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guided_steps_equal_the_stock_pipelines(family, guidance):
    kind, teacher, _ = family
    model = load_model(str(teacher))
    pipe = model.pipeline(FlowMatchEulerDiscreteScheduler.from_config(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    z = starting_noise(model.latent_shape(2, 32), seed=1)
    told = model.asked(None, guidance, 1000) | {"num_inference_steps": 4}
    told |= {} if kind == "z-image" else {"max_sequence_length": model.tokens}
    stock = pipe([*PROMPTS], latents=z, height=32, width=32, output_type="pt", **told).images
    with torch.no_grad():
        ours = unit(model.space.decode(Sampler(model, 4, guidance).x(z, PROMPTS))).clamp(0, 1)
    assert (stock - ours).abs().max() < 1e-4


def test_velocity_and_time_are_the_networks(family):
    """eps - x0 at s, as each stock pipeline reads its network's output and fills its timestep."""
    kind, teacher, _ = family
    model = load_model(str(teacher))
    x_t, t = starting_noise(model.latent_shape(3, 32), 0), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    text, s = model.text()(["a coat"] * 3), model.schedule.sigma(t)
    with torch.no_grad():
        ours = model.denoiser()(x_t, model.schedule.timestep(t), text)
        if kind == "z-image":
            states = [row[:n] for row, n in zip(text[0], text[1]["lengths"], strict=True)]
            stock = -torch.stack(model.transformer(list(x_t.unsqueeze(2)), 1 - s, states).sample).squeeze(2)
        else:
            stock = model.transformer(x_t, text[0], text[1]["pooled"], 1000 * s).sample
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_follows_the_picture(kind):
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "time_shift_type": kind}
    model = made_still("sd3")
    model = model.with_parts(scheduler=model.scheduler | dynamic)
    shifts = []
    for size in (32, 64):
        wide = model.at(size)
        tokens = (size // 8) ** 2
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(wide.scheduler)
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=0.5 + 0.65 * (tokens - 256) / (4096 - 256))
        t = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
        torch.testing.assert_close(wide.schedule.sigma(t), scheduler.sigmas[:-1], atol=1e-6, rtol=0)
        static = wide.step_scheduler((999, 599, 199))
        assert (static["shift"], static["use_dynamic_shifting"]) == (wide.schedule.shift, False)
        shifts.append(wide.schedule.shift)
    assert shifts[0] != shifts[1]


def loud(net):
    """The network, none of whose projections is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("kind", FLOWS)
def test_a_new_controlnet_changes_nothing_yet(kind):
    model = made_still(kind)
    net = model.new_controlnet()
    x_t, at = starting_noise(model.latent_shape(2, 32), 0), torch.full((2,), 500.0)
    text, control = model.text()(PROMPTS), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain, with_net = model.denoiser()(x_t, at, text), model.denoiser(controlnet=net)
        assert torch.equal(with_net(x_t, at, text, control), plain)
        loud(net)
        assert (with_net(x_t, at, text, control) - plain).abs().max() > 1e-3
        assert torch.equal(model.denoiser()(x_t, at, text), plain), "the teacher does not change"


@pytest.mark.parametrize("kind", FLOWS)
def test_checkpointing_changes_no_gradient(kind, tmp_path):
    model = made_still(kind)
    x_t, at = starting_noise(model.latent_shape(2, 32), 0), torch.full((2,), 500.0)
    text, control = model.text()(PROMPTS), torch.rand(2, 3, 32, 32)
    found = []
    for checkpointing in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            backbone = copied(model.backbone).requires_grad_(False)
            adapter = Adapter(backbone, "student", 2, model.lora_targets)
        net = model.denoiser(backbone, loud(model.new_controlnet()), (adapter,))
        for key, p in adapter.named_parameters():
            p.data.normal_(generator=torch.Generator().manual_seed(len(key)))
        run = replace(tiny.run(find("nano-canny")(), tmp_path, tmp_path), checkpointing=checkpointing)
        settle(run, net)
        loss = net(x_t, at, text, control).square().mean()
        trained = [*adapter.parameters(), *net.controlnet.parameters()]
        found.append(torch.autograd.grad(loss, trained, allow_unused=True))
    assert sum(g is not None and bool(g.any()) for g in found[0]) > len(found[0]) / 2
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", FLOWS)
def test_shard_units_hold_every_parameter(kind):
    model = made_still(kind)
    net = model.denoiser(controlnet=model.new_controlnet(), also=[model.new_controlnet()])
    units = net.shard_units()
    assert len(set(units)) == len(units)
    assert {id(p) for unit in units for p in unit.parameters()} == {id(p) for p in net.parameters()}
    for network in (net.backbone, *net.controlnets):  # FSDP2 wants the blocks before what holds them
        inside = [units.index(unit) for unit in network.modules() if unit in units]
        assert inside[0] == max(inside)


@pytest.mark.parametrize("kind", FLOWS)
def test_features_are_pictures_of_tokens(kind):
    model = made_still(kind)
    x_t = starting_noise(model.latent_shape(2, (32, 64)), 0).requires_grad_()
    found = model.denoiser().features(x_t, torch.full((2,), 500.0), model.text()(PROMPTS))
    assert [tuple(f.shape) for f in found] == [(2, 16, 4, 8)] * len(found)
    assert len(found) == 4
    touched = torch.autograd.grad(found[0][..., 0, 0].sum(), x_t)[0].abs().sum((0, 1))
    assert touched[:2, :2].mean() > 10 * touched[4:, 8:].mean(), "the first token is the first corner"


@pytest.mark.parametrize("kind", ["sd35", "z-image"])
def test_frozen_weights_in_eight_bits_still_train(kind, tmp_path):
    teacher = save_pipeline(made_still(kind), tmp_path / "teacher")
    run = replace(jdm_run_of(teacher, tmp_path / "run"), precision="bf16", frozen="fp8")
    trainer = Trainer(run)
    backbone = trainer.task.frozen[0].backbone
    small = [p for p in backbone.parameters() if p.dtype == torch.float8_e4m3fn]
    frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad and p.ndim == 2)
    assert sum(p.numel() for p in small) > (0.6 if kind == "sd35" else 0.05) * frozen
    assert not any(p.requires_grad for p in small)
    logs = trainer.step(0)
    assert all(torch.isfinite(torch.tensor(float(logs[f"{p}/gradient"]))) for p in ("fake", "posterior", "generator"))
    whole = load_model(str(teacher)).transformer.state_dict()
    exported = load_model(str(write_model(trainer))).transformer.state_dict()
    apart = max(float((exported[k] - whole[k]).norm() / whole[k].norm().clamp(min=1e-3)) for k in whole
                if whole[k].ndim == 2)
    assert 0 < apart < 0.1, "three bits of mantissa"


def jdm_run_of(teacher, out) -> Run:
    """JDM whose student, fake score and posterior are LoRAs of one backbone."""
    run = tiny.run(find("nano-canny")(), out, teacher)
    method = run.method
    return replace(run, method=replace(method, student=replace(method.student, levels=(999,), rank=2),
                                       fake=replace(method.fake, loss="own", rank=2)))


def test_a_flows_fake_score_learns_the_velocity(tmp_path):
    """The fake phase's loss is the error of what the network puts out, not of the eps read from it."""
    teacher = save_pipeline(made_still("sd3"), tmp_path / "teacher")
    losses = {}
    for loss in ("own", "eps", "x0"):
        run = jdm_run_of(teacher, tmp_path / loss)
        trainer = Trainer(replace(run, method=replace(run.method, fake=replace(run.method.fake, loss=loss))))
        state = trainer.task.begin(0)
        losses[loss] = float(trainer.task.phases[0].loss(state, 0)[0])
        if loss == "own":
            schedule, fake = load_model(str(teacher)).schedule, trainer.task.frozen[2]
            x_t, t, eps = state.noised("fake/0", schedule, 0.0, 1.0)
            velocity = fake(x_t, schedule.timestep(t), load_model(str(teacher)).text()(state.y))
            exact = float((velocity - (eps - state.x.detach())).square().mean())
    assert losses["own"] == pytest.approx(exact, rel=1e-4)
    assert losses["own"] > losses["eps"], "alpha is below 1"
    assert losses["own"] > losses["x0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd35", "z-image"])
def test_compiling_changes_no_value(kind, monkeypatch):
    monkeypatch.setattr("jdm.models.execution.BACKEND", "aot_eager")  # the graphs of inductor, run by eager kernels
    model = made_still(kind)
    net = model.denoiser(controlnet=loud(model.new_controlnet()))
    trained = list(net.controlnet.parameters())
    asked = (starting_noise(model.latent_shape(2, 32), 0), torch.full((2,), 500.0), model.text()(PROMPTS),
             torch.rand(2, 3, 32, 32))
    found = []
    for compiled in (False, True):
        if compiled:
            settle(replace(tiny.run(find("nano-canny")(), Path(), Path()), compile=True), net)
        out = net(*asked)
        found.append([out, *(g for g in torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
                             if g is not None)])
    assert len(found[0]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
