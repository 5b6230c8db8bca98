"""The posterior that is trained beforehand: what it reads."""

import torch

import tiny
from jdm.loading import Loaded
from jdm.models.stable_diffusion import StableDiffusion
from jdm.posterior import Posterior
from jdm.recipes import find


def test_the_frozen_posterior_trains_on_prompts(teacher, tmp_path):
    run = tiny.run(find("nano-posterior")(), tmp_path, teacher)
    task = run.method.task(Loaded(run))
    batch, uniform = task.begin(0)
    ours, _ = task.phases[0].loss((batch, uniform), 0)
    model = StableDiffusion.load(str(teacher))  # the posterior begins as the teacher
    posterior = Posterior(model.score_of(model.text(), model.denoiser()), model.schedule, run.method.levels,
                          run.method.low, run.method.high)
    with torch.no_grad():
        exact, blind = (posterior.consistency_loss(batch.x, y, uniform, batch.eps) for y in (batch.y, [""] * 4))
    assert "" not in batch.y
    torch.testing.assert_close(ours.detach(), exact, atol=1e-6, rtol=1e-5)
    assert abs(float(exact / blind) - 1) > 1e-4
