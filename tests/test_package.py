"""Importing the package bounds how long OpenMP's threads wait for one another."""

import os
import re
import subprocess
import sys

import pytest

import jdm

UNSET = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}


def read_by_openmp(code: str, **variables: str) -> int:
    """How many turns libgomp waits for, as it says itself when it is loaded."""
    done = subprocess.run([sys.executable, "-c", code], env={**UNSET, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
                          capture_output=True, text=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("this PyTorch runs on another OpenMP than libgomp")
    return int(found[1])


def test_importing_the_package_bounds_openmps_wait():
    assert read_by_openmp("import jdm, torch") == int(jdm.SPINS)
    assert read_by_openmp("import torch") > 100 * int(jdm.SPINS)


@pytest.mark.parametrize(("name", "value", "spins"), [("GOMP_SPINCOUNT", "7", 7), ("OMP_WAIT_POLICY", "PASSIVE", 0)])
def test_a_users_own_wait_is_kept(name, value, spins):
    assert read_by_openmp("import jdm, torch", **{name: value}) == spins


def test_nothing_is_set_once_torch_is_loaded():
    code = "import os, torch, jdm; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert subprocess.run([sys.executable, "-c", code], env=UNSET, capture_output=True, text=True).stdout == "None\n"
