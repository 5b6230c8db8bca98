"""Makes the shipped reference statistics: 2 x 5,000 uncontrolled samples of nano-sd, both extractors.

    python benchmarks/make_reference.py [OUT]
"""

import os
import sys
import tempfile
from pathlib import Path

from jdm.data.sources import load_pictures
from jdm.evaluation.evaluate import judge
from jdm.evaluation.reference import references
from jdm.files import ASSETS
from jdm.metrics.extractors import ClassifierFeatures, EffLite0


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "reference"
    extractors = [ClassifierFeatures(judge()), EffLite0()]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        found = references("nano-sd", extractors, load_pictures("fashion-mnist", "test", 32))
        for name, reference in found.items():
            reference.statistics.save(out / f"{name}.safetensors")
            print(name, reference.statistics.extra)


if __name__ == "__main__":
    main()
