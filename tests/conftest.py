"""Fixtures that several test files share."""

import os

# Read when the packages are imported; what the command line sets for its users.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, or the processes wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import hostile
import jdm  # noqa: F401  bounds OpenMP's waiting, before any test file imports torch


def pytest_addoption(parser):
    parser.addoption("--fuzz-seeds", type=int, default=1, help="seeds that each fuzzer draws its inputs from")


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("--fuzz-seeds")))


# Files of a minute and more come first, so that no process is left with one at the end.
LONG = ("training/test_every_recipe.py", "training/test_distributed.py", "app/test_page.py", "app/test_static.py",
        "cost/test_estimate.py", "models/test_backbone.py", "export/test_onnx.py", "formats/test_single_file.py",
        "formats/test_single_file_import.py", "cli/test_demo.py", "data/test_prepare.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((n for n, file in enumerate(LONG) if item.path.match(file)), len(LONG)))
    for item in items:
        for mark in item.iter_markers("hostile"):
            assert mark.args[0] in hostile.KINDS, f"{item.nodeid}: no such kind of hostile input"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Folder of the tiny model; `student` and `controlled` lie beside it."""
    import torch

    import tiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.family(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def student(teacher):
    """Folder of a one-step student of the tiny model, with a ControlNet for canny."""
    return teacher.with_name("student")


@pytest.fixture(scope="session")
def controlled(teacher):
    """Folder of the tiny model with a multi-step ControlNet for canny."""
    return teacher.with_name("controlled")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Folder of a tiny transformers CLIP with its tokenizer."""
    import torch
    from transformers import CLIPModel

    import scoring

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scoring.stirred(CLIPModel(scoring.clip_config())).save_pretrained(folder)
    scoring.TOKENS.save_pretrained(folder)
    return folder


@pytest.fixture
def untrained_judge(monkeypatch):
    """The measurements of a run use an untrained classifier: quick, and independent of what ships."""
    import jdm.evaluation.evaluate
    import tiny

    monkeypatch.setattr(jdm.evaluation.evaluate, "judge", tiny.judge)
