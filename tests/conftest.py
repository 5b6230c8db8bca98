"""Fixtures that several test files share."""

import os

# Read when the packages are imported; what the command line sets for its users.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Folder of the tiny model."""
    import torch

    import tiny
    from jdm.models.stable_diffusion import save_pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_pipeline(tiny.model(), tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def student(teacher, tmp_path_factory):
    """Folder of a one-step student of the tiny model, with a ControlNet for canny."""
    import torch

    import tiny
    from jdm.models.stable_diffusion import StableDiffusion

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tiny.student(StableDiffusion.load(str(teacher)), tmp_path_factory.mktemp("tiny") / "student")


@pytest.fixture
def untrained_judge(monkeypatch):
    """The measurements of a run use an untrained classifier: quick, and independent of what ships."""
    import jdm.evaluate
    import tiny

    monkeypatch.setattr(jdm.evaluate, "judge", tiny.judge)
