"""Fixtures that several test files share."""

import os
from fnmatch import fnmatch

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
LONG = ("training/test_every_recipe.py", "training/test_distributed.py", "test_strangers_path.py",
        "training/test_transformer_shards.py", "app/test_page.py", "app/test_static.py", "cost/test_estimate.py",
        "models/test_backbone.py", "export/test_onnx.py", "formats/test_single_file.py",
        "formats/test_single_file_import.py", "cli/test_demo.py", "data/test_prepare.py")


# Left to `make test-slow` beside what is marked so: each takes 10 to 60 seconds, and another test in the same file does
# the same on another family, at another precision, with another method or in fewer steps.
SLOW = (
    "benchmarks/test_benchmarks.py::test_settings_of_openmp_are_timed_alone_and_busy",
    "benchmarks/test_benchmarks.py::test_steps_from_files_are_timed_beside_memory",
    "controls/test_image_prompt.py::test_an_estimate_counts_the_encoder*",
    "cost/test_estimate.py::test_estimated_flops_are_those_of_a_real_step?wide?",
    "cost/test_estimate_transformers.py::test_estimates_count_every_weight*",
    "export/test_onnx.py::test_graphs_of_four_steps_equal_pytorch",
    "models/test_backbone.py::test_a_phase_moves_its_own_adapter_alone?bf16*",
    "models/test_backbone.py::test_a_shared_backbone_resumes_bit_exactly?changes1?",
    "models/test_families.py::test_a_wide_student_runs_in_stock_diffusers?sd21-v?",
    "models/test_families.py::test_a_wide_student_runs_in_stock_diffusers?sdxl?",
    "models/test_families.py::test_stock_diffusers_reproduces_the_one_step_student?sd21-v?",
    "models/test_nano.py::test_two_processes_make_the_same_vocabulary",
    "models/test_transformers.py::test_stock_diffusers_reproduces_the_student?sd35-1?",
    "models/test_transformers.py::test_stock_diffusers_reproduces_the_student?z-image-4?",
    "models/test_transformers.py::*?sd3?",
    "models/test_transformers.py::*?sd3-*",
    "test_cookbook.py::test_every_command_of_the_page_runs*",
    "training/test_transformer_shards.py::*?z-image-*",
    "training/test_distributed.py::test_sigterm_finishes_the_step_and_saves_it?1?",
    *(f"training/test_previews.py::test_previews_leave_every_number_as_it_was?{name}?" for name in (
        "nano-canny-4", "nano-controlled-teacher", "nano-nct", "nano-teacher", "nano-text-reward", "nano-vae",
        "sd15-canny-lora")),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(fnmatch(item.nodeid, f"tests/{pattern}") for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
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
