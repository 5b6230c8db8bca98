"""What `jdm estimate` says of SD3 and Z-Image: tiny ones against their weights, the published ones against GPUs."""

from dataclasses import replace

import pytest
import torch

import tiny
from families import made
from jdm.cost.estimate import estimate
from jdm.cost.gpus import GIB, GPUS
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.recipes import find
from jdm.size import bytes_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("kind", ["sd35", "z-image"])
def test_estimates_count_every_weight(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = save_pipeline(made(kind), tmp_path / "teacher")
    run = tiny.run(find("nano-canny")(), tmp_path / "run", teacher)
    run = replace(run, method=replace(run.method, student=replace(run.method.student, rank=2),
                                      fake=replace(run.method.fake, rank=2)))
    model = load_model(str(teacher))
    plain = estimate(run)
    prepared = estimate(replace(run, data=replace(run.data, prepared="anywhere")))
    texts = {name: bytes_of([*part.parameters(), *part.buffers()]) for name, part in model.modules().items()
             if name.startswith("text_encoder")}
    for name, part in model.modules().items():
        whole = bytes_of([*part.parameters(), *part.buffers()])
        assert plain.memory[f"teacher: {name}"] == whole
        assert (f"teacher: {name}" in prepared.memory) == (name not in texts)
    net = model.new_controlnet()
    assert plain.memory["trained: controlnet"] == bytes_of([*net.parameters(), *net.buffers()])
    assert plain.total - prepared.total > 0.5 * sum(texts.values())
    assert prepared.memory["activations"] > 0
    passes = {"generator: transformer + ControlNet", "real score: cond and uncond in one batch"}
    assert passes <= {p.name for p in plain.passes}
    assert all(p.forward > 0 for p in plain.passes)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "most", "gpu"), [("z-image-canny", 76 * GIB, "a100"), ("sd35-canny", 38 * GIB, "")])
def test_a_published_model_fits_its_gpu(recipe, most, gpu):
    """At 1024 px and batch 1: Z-Image 80 GB, SD3.5 medium 40 GB, with 5% kept free."""
    run = find(recipe)()
    assert (run.data.size, run.batch, run.checkpointing) == (1024, 1, True)
    found = estimate(replace(run, data=replace(run.data, prepared="anywhere")))
    assert found.total <= most
    assert not gpu or found.fits(GPUS[gpu])
    assert found.notes == []
