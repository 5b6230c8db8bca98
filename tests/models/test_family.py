"""What every family answers: sharding, LoRA targets, copies, schedules without signal, and which families are read."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tiny
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.models.adapters import Adapter
from jdm.models.family import Denoiser, copied
from jdm.models.folder import save_pipeline
from jdm.run import Task
from jdm.space import unit
from jdm.training import distributed
from jdm.training.product import write_model
from jdm.training.trainer import Trainer
from tiny import nano_canny

ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.model()


def test_a_family_that_is_not_read_is_named(model, tmp_path):
    folder = save_pipeline(model, tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match=r"flux is a FluxPipeline; families that are read: StableDiffusionPipeline, "):
        load_model(str(folder))


def test_shard_units_hold_every_parameter(model):
    net = model.denoiser(controlnet=model.new_controlnet(), also=[model.new_controlnet()])
    units = net.shard_units()
    assert len(set(units)) == len(units)
    assert {id(p) for unit in units for p in unit.parameters()} == {id(p) for p in net.parameters()}
    for network in (net.backbone, *net.controlnets):  # FSDP2 wants the blocks before what holds them
        inside = [units.index(unit) for unit in network.modules() if unit in units]
        assert inside[0] == max(inside), "modules() names a network before its blocks"


def test_sharding_nothing_is_refused(monkeypatch, tmp_path, teacher):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    task = Task([], lambda step: None, {"net": nn.Linear(2, 2)}, lambda folder, averages: None)
    with pytest.raises(UsageError, match="--shard 2: this run has no network to shard; leave it out"):
        distributed.shard(task, tiny.run(nano_canny(), tmp_path, teacher, shard=2))


def test_a_lora_attaches_where_the_family_says(model):
    unet = copied(model.backbone)
    layers = Adapter(unet, "a", 2, model.lora_targets).layers
    assert layers
    assert all(path.endswith(model.lora_targets) for path in layers)
    assert len(Adapter(copied(model.backbone), "a", 2, ("to_q",)).layers) < len(layers)


def test_a_copy_trains_and_shares_nothing(model):
    net = model.backbone
    copy = copied(net)
    for ours, theirs in zip(copy.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad
        assert not theirs.requires_grad
        assert ours.data_ptr() != theirs.data_ptr()
    half = copied(nn.BatchNorm1d(2).half())
    assert {v.dtype for v in half.state_dict().values()} == {torch.float32, torch.int64}


def test_tensors_without_contents_can_be_copied():
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    copy = copied(net)
    assert all(isinstance(v, FakeTensor) for v in (*copy.parameters(), *copy.buffers()))
    assert [p.shape for p in copy.parameters()] == [p.shape for p in net.parameters()]
    assert not {id(p) for p in copy.parameters()} & {id(p) for p in net.parameters()}


def test_networks_are_replaced_by_their_role(model):
    backbone, controlnet = copied(model.backbone), model.new_controlnet()
    other = model.with_networks(backbone=backbone, controlnet=controlnet)
    assert (other.backbone, other.controlnet, other.vae) == (backbone, controlnet, model.vae)
    assert other.with_networks(controlnet=None).controlnet is None
    assert other.with_networks(controlnet=None).backbone is backbone
    assert isinstance(other.denoiser(), Denoiser)
    assert other.denoiser().controlnet is None, "a denoiser has the ControlNets that are named"


# --- zero terminal SNR ---


def without_signal(model, **changes):
    return model.with_parts(scheduler={**model.scheduler, **ZERO, **changes})


def test_v_without_terminal_signal_samples_as_in_diffusers(model):
    teacher = without_signal(model)
    assert teacher.schedule.alphas_cumprod[-1] == 0
    pipe = teacher.pipeline(DDIMScheduler.from_config(teacher.scheduler))
    pipe.set_progress_bar_config(disable=True)
    z = starting_noise(teacher.latent_shape(2, 32), seed=1)
    stock = pipe(["a coat", "a boot"], latents=z, num_inference_steps=4, guidance_scale=3.0, height=32, width=32,
                 output_type="pt").images
    assert pipe.scheduler.timesteps[0] == 999, "the level without signal"
    with torch.no_grad():
        ours = unit(teacher.space.decode(Sampler(teacher, 4, 3.0).x(z, ["a coat", "a boot"]))).clamp(0, 1)
    assert (stock - ours).abs().max() < 1e-4


def test_v_without_terminal_signal_trains_and_exports(model, tmp_path):
    teacher = save_pipeline(without_signal(model), tmp_path / "teacher")
    run = tiny.run(nano_canny(), tmp_path / "run", teacher)
    method = replace(run.method, student=replace(run.method.student, levels=(999,)),
                     fake=replace(run.method.fake, low=0.999, high=1.0))
    trainer = Trainer(replace(run, method=method))
    trainer.step(0)
    student = load_model(str(write_model(trainer)))
    assert (student.levels, student.prediction) == ((999,), "v_prediction")
    assert student.schedule.alphas_cumprod[-1] == 0
    z, control = starting_noise(student.latent_shape(2, 32), 0), torch.zeros(2, 3, 32, 32)
    assert Sampler(student).x(z, ["a", "b"], control).isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": False, "trained_betas": [0.1, 0.5, 1.0],
                                          "num_train_timesteps": 3}])
def test_epsilon_without_terminal_signal_is_refused(changes, model, tmp_path):
    folder = save_pipeline(without_signal(model, prediction_type="epsilon", **changes), tmp_path / "teacher")
    with pytest.raises(UsageError, match="predicts epsilon, from which no x0 can be read there"):
        load_model(str(folder))
