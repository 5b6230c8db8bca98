"""JDM: one-step diffusion generators that learn new controls while they are distilled."""

import os
import sys

__version__ = "0.2.0"

# libgomp's threads wait for one another in a loop, by default for 3 ms each time. Beside another busy process, which
# may hold the core of the awaited thread, that makes a training step several times slower. A bounded wait is as quick
# on a quiet machine (benchmarks/busy_core.py). libgomp reads this once, when torch loads it.
SPINS = "1000"
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
