"""A process's attention: chosen by each run's precision and device, before anything of the run is computed."""

from pathlib import Path

import pytest
import torch

import tiny
from jdm.loading import Loaded
from jdm.models.execution import choose_attention
from jdm.run import Run


@pytest.fixture(autouse=True)
def _attention():
    """As it was, for the tests after."""
    fused = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(fused)


@pytest.mark.parametrize(("precision", "device", "fused"), [
    ("fp32", "cpu", True), ("bf16", "cpu", False), ("fp32", "cuda", True), ("bf16", "cuda", True)])
def test_only_bf16_on_a_cpu_is_unfused(precision, device, fused):
    torch.backends.cuda.enable_flash_sdp(not fused)  # as a run before it left it
    choose_attention(Run(None, Path(), precision=precision, device=device))
    assert torch.backends.cuda.flash_sdp_enabled() == fused


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_a_run_chooses_attention_before_it_loads(precision, fused, teacher, tmp_path):
    torch.backends.cuda.enable_flash_sdp(not fused)
    Loaded(tiny.run(tiny.nano_canny(), tmp_path, teacher, precision=precision))
    assert torch.backends.cuda.flash_sdp_enabled() == fused
