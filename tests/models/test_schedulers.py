"""Scheduler configs: read by the rules of their own class in diffusers; what makes no sense is refused."""

import diffusers
import pytest
import torch

from jdm.errors import UsageError
from jdm.models import nano
from jdm.models.schedulers import KINDS, alphas_cumprod, checked_scheduler, complete, ddim_scheduler, scheduler_of


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_the_classs_default(kind):
    own = getattr(diffusers, kind)()
    assert complete({"_class_name": kind}) == {k: own.config[k] for k in complete({"_class_name": kind})
                                               if k != "_class_name"} | {"_class_name": kind}
    torch.testing.assert_close(alphas_cumprod({"_class_name": kind}), own.alphas_cumprod)
    assert type(scheduler_of({"_class_name": kind})).__name__ == kind


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_clips_only_if_the_class_does(kind):
    betas = {k: v for k, v in nano.SCHEDULER.items() if k != "clip_sample"}
    own = getattr(diffusers, kind)().config.get("clip_sample", False)
    assert ddim_scheduler({**betas, "_class_name": kind}).config["clip_sample"] == own


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler", "Odd", None, 5])
@pytest.mark.hostile("parts")
def test_schedulers_without_a_table_are_refused(kind):
    with pytest.raises(UsageError, match=r"of_it/config\.json: the scheduler's config"):
        checked_scheduler({**nano.SCHEDULER, "_class_name": kind}, "of_it/config.json")


@pytest.mark.parametrize("wrong", [
    {"beta_start": -1}, {"beta_start": float("nan")}, {"beta_end": 2}, {"beta_end": "x"}, {"beta_schedule": "exp"},
    {"num_train_timesteps": 0}, {"num_train_timesteps": 10**12}, {"num_train_timesteps": True},
    {"prediction_type": "flow_prediction"}, {"prediction_type": None}, {"clip_sample": "no"}, {"trained_betas": []},
    {"trained_betas": [0.1, 0.2]}, {"trained_betas": [float("nan")] * 1000}, {"steps_offset": -1},
    {"timestep_spacing": "odd"}, {"beta_start": 0.5, "beta_end": 1e-5},
    {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
    {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}], ids=str)
@pytest.mark.hostile("parts")
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=r"^of_it/config\.json: "):
        checked_scheduler({**nano.SCHEDULER, **wrong}, "of_it/config.json")
