"""Transformers over two and four processes: gradients and parameters against one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families import made
from jdm.models.folder import save_pipeline

SEVERAL = Path(__file__).parents[1] / "several.py"
KINDS = {"sd35": 1e-9, "z-image": 1e-6}  # Z-Image turns its queries and keys in float32, whatever it computes in


@pytest.fixture(scope="module", params=KINDS)
def done(request, tmp_path_factory):
    """(kind, folder in which several.py has computed GRADIENTS, what it said)."""
    out = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(request.param)
    teacher = save_pipeline(model, out / "teacher")
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ended = subprocess.run([sys.executable, str(SEVERAL), str(out), str(teacher), "scales"], capture_output=True,
                           text=True, timeout=1800, env=own | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                           check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return request.param, out, ended.stdout


@pytest.mark.parametrize("several", ["full-2x2", "full-4x4", "lora-2x2"])
def test_gradients_are_those_of_one_process(done, several):
    kind, out, _ = done
    ours, theirs = (torch.load(out / f"gradients-{name}.pt") for name in (several, f"{several[:4]}-1x1"))
    assert ours.keys() == theirs.keys()
    for phase in ("fake", "posterior", "generator"):
        a, b = (torch.cat([v.flatten() for k, v in g.items() if k.startswith(phase)]) for g in (ours, theirs))
        assert a.dtype == b.dtype == torch.float64
        assert b.norm() > 0
        assert (a - b).norm() <= KINDS[kind] * b.norm(), phase


@pytest.mark.parametrize(("setting", "share"), [("full-2x2", 2), ("full-4x4", 4), ("lora-2x2", 2)])
def test_each_process_holds_its_share(done, setting, share):
    lines = re.findall(r"bytes gradients-(\S+) \d held (\d+) of (\d+)", done[2])
    found = [int(held) / int(whole) for name, held, whole in lines if name == setting]
    assert len(found) == share
    assert all(abs(part * share - 1) < 0.1 for part in found)
