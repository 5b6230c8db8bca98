"""One frozen UNet for real, fake, posterior and student: named adapters, checkpointing and precision."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

import tiny
from jdm.errors import UsageError
from jdm.library import load_model
from jdm.models import execution
from jdm.models.adapters import Adapter, switched_on
from jdm.models.family import with_merged
from jdm.models.stable_diffusion import StableDiffusion, UNetDenoiser
from jdm.training import checkpoint
from jdm.training.loop import train
from jdm.training.product import write_model
from jdm.training.trainer import Trainer
from tiny import nano_canny, nano_diff_instruct, nano_text_reward

TARGETS = StableDiffusion.lora_targets
LORA = {"student": 2, "fake": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.family(tmp_path_factory.mktemp("family"))


def shared(out, teacher, recipe=nano_canny, ranks=LORA, **changes):
    run = tiny.run(recipe(), out, teacher, **changes)
    return tiny.ranked(run, **ranks)


def networks_of(run):
    """The networks of a JDM task."""
    return tiny.networks(run)


def speaking(net):
    """Adapters that change what the network says."""
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.3)
    return net


def sample(networks):
    n = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, 8, 8, 8, generator=n)
    return x_t, networks.schedule.t(torch.tensor([100, 700])), ["a coat", "one dress"]


@pytest.mark.parametrize("ranks", [{}, {"fake": 2}, LORA, {"student": 2}])
def test_every_network_begins_as_the_teacher(tmp_path, teacher, ranks):
    networks = networks_of(shared(tmp_path, teacher, ranks=ranks))
    x_t, t, y = sample(networks)
    with torch.no_grad():
        real = networks.real_score(1.0)(x_t, t, y)
        assert torch.equal(networks.fake(x_t, t, y).eps, real.eps)
        assert torch.equal(next(iter(networks.posteriors.values()))(x_t, t, y), real.x0)
        assert torch.equal(networks.student(x_t, networks.schedule.timestep(t), networks.text(y)), real.eps)


def test_each_denoiser_has_its_own_adapters(tmp_path, teacher):
    networks = networks_of(shared(tmp_path, teacher))
    nets = networks.running[:4]
    assert len({id(net.backbone) for net in nets}) == 1
    speaking(networks.teacher.unet)
    x_t, t, y = sample(networks)
    with torch.no_grad():
        said = [net(x_t, networks.schedule.timestep(t), networks.text(y)) for net in nets]
        plain = load_model(str(teacher)).unet
        untouched = UNetDenoiser(plain)(x_t, networks.schedule.timestep(t), networks.text(y))
    student, real, fake, posterior = said
    assert torch.equal(real, untouched)
    for a, b in [(student, fake), (fake, posterior), (student, posterior), (fake, real), (student, real)]:
        assert (a - b).abs().max() > 1e-3


def test_the_posterior_adds_its_adapter_to_the_fakes(tmp_path, teacher):
    networks = networks_of(shared(tmp_path, teacher))
    unet = speaking(networks.teacher.unet)
    plain = with_merged(unet, networks.adapters["fake"])
    delta = with_merged(unet, networks.adapters["posterior"]).state_dict()
    base = with_merged(unet, None).state_dict()
    both = {k: v + delta[k] - base[k] for k, v in plain.state_dict().items()}
    plain.load_state_dict(both)
    x_t, t, y = sample(networks)
    with torch.no_grad():
        expected = networks.teacher.score_of(networks.text, networks.teacher.denoiser(plain))(x_t, t, y).x0
        torch.testing.assert_close(next(iter(networks.posteriors.values()))(x_t, t, y), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", [nano_canny, nano_diff_instruct, nano_text_reward])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_phase_moves_its_own_adapter_alone(tmp_path, teacher, recipe, precision):
    trainer = Trainer(shared(tmp_path, teacher, recipe, steps=8, precision=precision, checkpointing=True))
    modules = trainer.task.modules
    assert isinstance(modules["unet"], Adapter)
    assert isinstance(modules["fake"], Adapter)
    backbone = [p for p in next(iter(modules["fake"].layers.values())).parameters() if not p.requires_grad]
    before = [p.clone() for p in backbone]
    whole = list(trainer.task.phases)
    for step, phase in enumerate(whole * 2):  # an adapter's A has no gradient while its B is zero
        start = {name: _values(module) for name, module in modules.items()}
        trainer.task.phases = [phase]
        trainer._phases(step)
        own = {"fake": {"fake"}, "posterior": {"posterior"}, "generator": {"unet", "controlnet"}}[phase.name]
        moved = {name for name, module in modules.items() if not torch.equal(start[name], _values(module))}
        assert moved == own & modules.keys()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone, strict=True))


def _values(module):
    return torch.cat([v.float().flatten() for v in checkpoint.trained(module).values()])


@pytest.mark.parametrize("ranks", [LORA, {}])
def test_checkpointing_changes_no_gradient_of_any_phase(tmp_path, teacher, ranks):
    found = []
    for checkpointing in (False, True):
        run = shared(tmp_path / str(checkpointing), teacher, ranks=ranks, checkpointing=checkpointing)
        found.append(_gradients(run))
    for name, gradients in found[0].items():
        assert sum(g.abs().sum() for g in gradients) > 0, name
        for ours, theirs in zip(found[1][name], gradients, strict=True):
            if name == "generator":  # decoded picture by picture: the last bits of a sum
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
            else:
                assert torch.equal(ours, theirs)


class Kept:
    """A tensor that autograd keeps for backward; the class counts the bytes of those that are alive."""

    alive = most = 0

    def __init__(self, value):
        self.value = value
        Kept.alive += value.nbytes
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self):
        Kept.alive -= self.value.nbytes


def test_checkpointing_holds_one_picture_at_a_time(tmp_path, teacher):
    most = {}
    for checkpointing, batch in ((True, 1), (True, 4), (False, 1), (False, 4)):
        run = replace(shared(tmp_path / f"{checkpointing}{batch}", teacher, checkpointing=checkpointing), batch=batch)
        networks = networks_of(run)
        execution.settle(run, *networks.running)
        value = networks.of_pictures(lambda x, _, space=networks.space: space.decode(x).flatten(1).square().sum(1))
        x = torch.randn(networks.teacher.latent_shape(batch, 32)).requires_grad_()
        Kept.most = Kept.alive
        before = Kept.alive
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
            value(x).sum().backward()
        most[checkpointing, batch] = Kept.most - before
    assert most[True, 4] - most[True, 1] <= 3 * x[0].nbytes  # the gradient of each further picture
    assert most[False, 4] == pytest.approx(4 * most[False, 1], rel=0.06)  # masks and weights are kept once
    assert most[True, 1] < most[False, 1] / 2


def _gradients(run):
    trainer = Trainer(run)
    torch.manual_seed(1)
    for module in trainer.task.modules.values():
        speaking(module)
    state = trainer.task.begin(0)
    return {phase.name: [g for g in torch.autograd.grad(phase.loss(state, 0)[0], phase.parameters, allow_unused=True)
                         if g is not None] for phase in trainer.task.phases}


def test_recomputation_uses_the_adapters_of_the_forward(teacher):
    """Without `now_on` the recomputation runs on the bare backbone and its gradients are wrong without a word."""
    unet = load_model(str(teacher)).unet
    adapter = Adapter(unet, "fake", 2, TARGETS)
    speaking(unet)
    seen = []
    layer = next(iter(adapter.layers.values()))
    layer.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda *_: seen.append(list(layer._active_adapter)))
    unet.enable_gradient_checkpointing(execution.checkpointed)
    net = UNetDenoiser(unet, adapters=[adapter])
    x = torch.randn(1, 8, 8, 8)
    out = net(x, torch.tensor([100.0]), torch.randn(1, 16, load_model(str(teacher)).unet.config["cross_attention_dim"]))
    torch.autograd.grad(out.sum(), list(adapter.parameters()))
    assert seen == [["fake"], ["fake"]]
    assert layer._active_adapter == []


def test_switching_nests_and_comes_back(teacher):
    unet = load_model(str(teacher)).unet
    a, b = Adapter(unet, "a", 2, TARGETS), Adapter(unet, "b", 1, TARGETS)
    layer = next(iter(a.layers.values()))
    with switched_on([a]):
        with switched_on([a, b]):
            assert layer._active_adapter == ["a", "b"]
        assert layer._active_adapter == ["a"]
    assert layer._active_adapter == []
    assert {k.split(".")[-2] for k, _ in b.named_parameters()} == {"b"}
    assert not {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}


def test_bf16_trains_in_float32_and_answers_closely(tmp_path, teacher):
    exact = networks_of(shared(tmp_path, teacher))
    run = shared(tmp_path, teacher, precision="bf16")
    networks = networks_of(run)
    execution.settle(run, *networks.running)
    kinds = {p.requires_grad: p.dtype for p in networks.teacher.unet.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    x_t, t, y = sample(networks)
    with torch.no_grad():
        ours, theirs = networks.fake(x_t, t, y), exact.fake(x_t, t, y)
    assert ours.eps.dtype == ours.x0.dtype == torch.float32
    assert 0 < (ours.eps - theirs.eps).norm() / theirs.eps.norm() < 0.02


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "checkpointing": True}])
def test_a_shared_backbone_resumes_bit_exactly(tmp_path, teacher, changes):
    whole = train(shared(tmp_path / "whole", teacher, steps=3, **changes))
    run = shared(tmp_path / "parts", teacher, steps=3, **changes)
    stopped = Trainer(run)
    for step in range(2):
        stopped.step(step)
    parts = train(run)
    ours, theirs = (load_model(str(p)) for p in (whole, parts))
    for part in ("unet", "controlnet"):
        for key, value in getattr(ours, part).state_dict().items():
            assert torch.equal(value, getattr(theirs, part).state_dict()[key]), key


def test_the_checkpoint_holds_adapters_and_not_the_backbone(tmp_path, teacher):
    from safetensors import safe_open

    run = shared(tmp_path, teacher, steps=1)
    train(run)
    place = checkpoint.last(run.out)
    assert place
    with safe_open(place / "state.safetensors", "pt") as opened:
        held = set(opened.keys())
    names = [k for k in held if k.startswith(("module.unet.", "module.fake.", "module.posterior."))]
    assert names
    assert all(".lora_" in k for k in names)


def test_the_exported_unet_is_the_averaged_adapter_merged(tmp_path, teacher):
    trainer = Trainer(shared(tmp_path, teacher, steps=3))
    for step in range(3):
        trainer.step(step)
    exported = load_model(str(write_model(trainer)))
    base = load_model(str(teacher)).unet.state_dict()
    average = trainer.averages["unet"]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = average[f"{name}.lora_B.student.weight"] @ average[f"{name}.lora_A.student.weight"]
    assert delta.abs().max() > 0
    torch.testing.assert_close(exported.unet.state_dict()[f"{name}.weight"], base[f"{name}.weight"] + delta)
    assert not any("lora" in k for k in exported.unet.state_dict())


def test_a_controlnet_can_start_as_another_models(tmp_path, teacher):
    theirs = load_model(str(teacher.parent / "controlled")).controlnet
    run = shared(tmp_path, teacher)
    branch = replace(run.method.controlnet, start=str(teacher.parent / "controlled"))
    ours = networks_of(replace(run, method=replace(run.method, controlnet=branch))).student.controlnet
    assert ours
    assert theirs
    assert all(p.requires_grad for p in ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_new_controlnet_copies_the_bare_unet(tmp_path, teacher):
    networks = networks_of(shared(tmp_path, teacher))
    unet = load_model(str(teacher)).unet
    for part in ("conv_in", "down_blocks", "mid_block"):
        ours, theirs = getattr(networks.student.controlnet, part), getattr(unet, part)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)), part


def test_a_frozen_unet_with_a_rank_is_refused(tmp_path, teacher):
    run = shared(tmp_path, teacher)
    frozen = replace(run.method.student, start=str(teacher.parent / "student"), optimiser=None)
    with pytest.raises(UsageError, match=r"a frozen backbone has no LoRA to train; leave out --student\.rank 2"):
        networks_of(replace(run, method=replace(run.method, student=frozen)))


def tiny_autoencoder(folder, channels=8, blocks=3):
    net = AutoencoderTiny(latent_channels=channels, encoder_block_out_channels=(8,) * blocks, num_encoder_blocks=(1,) *
                          blocks, decoder_block_out_channels=(8,) * blocks, num_decoder_blocks=(1,) * blocks)
    net.save_pretrained(folder)
    return net


def test_a_tiny_decoder_serves_the_likelihood_alone(tmp_path, teacher):
    theirs = tiny_autoencoder(tmp_path / "tiny")
    run = shared(tmp_path / "run", teacher, decoder=str(tmp_path / "tiny"))
    networks = networks_of(run)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(networks.space.decode(x), theirs.decode(x).sample)
    vae = load_model(str(teacher)).space
    assert torch.equal(networks.teacher.space.decode(x), vae.decode(x))
    found = [_gradients(replace(run, decoder=d, out=tmp_path / str(i)))["generator"]
             for i, d in enumerate((run.decoder, ""))]
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("made", "message"), [({"channels": 4}, "latents of 4 channels to 4 times"),
                                               ({"blocks": 4}, "latents of 8 channels to 8 times")])
def test_a_tiny_decoder_of_other_latents_is_refused(tmp_path, teacher, made, message):
    tiny_autoencoder(tmp_path / "tiny", **made)
    with pytest.raises(UsageError, match=message):
        networks_of(shared(tmp_path / "run", teacher, decoder=str(tmp_path / "tiny")))


def test_what_is_no_tiny_decoder_is_refused(tmp_path, teacher):
    with pytest.raises(UsageError, match="is not a tiny autoencoder"):
        networks_of(shared(tmp_path / "run", teacher, decoder=str(teacher / "unet")))


# Layout


def test_cpu_networks_run_channels_last_and_return_contiguous(teacher):
    model = load_model(str(teacher.parent / "controlled"))
    net, seen = UNetDenoiser(model.unet, model.controlnet), {}

    def watch(module, inputs):
        seen.setdefault(names[module], inputs[0].is_contiguous(memory_format=torch.channels_last))

    names = {model.unet.conv_in: "unet", model.controlnet.conv_in: "controlnet", model.vae.decoder.conv_in: "decoder",
             model.controlnet.controlnet_cond_embedding.conv_in: "control"}
    for part in names:
        part.register_forward_pre_hook(watch)
    for part in (model.unet.conv_out, model.vae.decoder.conv_out):  # some kernels end so, and some do not
        part.register_forward_hook(lambda module, inputs, out: out.contiguous(memory_format=torch.channels_last))
    x, shown = torch.randn(2, 8, 8, 8), torch.rand(2, 3, 32, 32)
    text = model.text()(["a coat", ""])
    with torch.no_grad():
        made, pixels = net(x, torch.tensor([3, 700]), text, shown), model.space.decode(x)
        plain = net._denoised(x, torch.tensor([3, 700]), text, shown)
        decoded = model.vae.decode(x / model.space.scale + model.space.shift).sample
    assert seen == {"unet": True, "controlnet": True, "control": True, "decoder": True}
    assert made.is_contiguous()
    assert pixels.is_contiguous()
    assert torch.allclose(made, plain, atol=1e-5)  # other orders of float32 sums
    assert torch.allclose(pixels, decoded, atol=1e-5)
    assert all(p.is_contiguous() for part in model.modules().values() for p in part.parameters())
