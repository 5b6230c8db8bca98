"""Measures a teacher: prompt agreement and distance to real test pictures, by guidance.

    python benchmarks/teacher_quality.py [--model nano-sd] [--n 5000] [--guidance 1 1.5 2 3] [--json out.json]

Also prints two bounds: the classifier's agreement with the labels of real test pictures, and the distance between two
disjoint halves of the real test pictures, which is the floor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from jdm.data.sources import load_pictures
from jdm.evaluation.evaluate import judge
from jdm.evaluation.questions import Questions, answers
from jdm.evaluation.sampling import Sampler
from jdm.library import load_model
from jdm.metrics.extractors import ClassifierFeatures, EffLite0
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.prompts import prompt_agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-sd")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--efflite0", action="store_true", help="also use the second extractor; 10 ms per picture")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.model).with_networks(controlnet=None)
    pictures = load_pictures("fashion-mnist", "test", model.size)
    real = pictures.batch(torch.arange(len(pictures)))
    labels = pictures.label(torch.arange(len(pictures)))
    extractors = [ClassifierFeatures(judge()), *([EffLite0()] if args.efflite0 else [])]
    features = {e.name: e.features(real) for e in extractors}
    floors = {name: frechet_distance(Statistics.of(f[::2], name), Statistics.of(f[1::2], name))
              for name, f in features.items()}
    ceiling = prompt_agreement(judge(), real, labels)
    print(f"classifier on real test pictures: {ceiling:.4f}; floors between halves: {floors}")
    rows = []
    for guidance in args.guidance:
        start = time.perf_counter()
        questions = Questions.of(pictures, None, args.n, args.seed)
        made = answers(Sampler(model, args.steps, guidance), questions, None)
        seconds = time.perf_counter() - start
        row = {"guidance": guidance, "n": args.n, "agreement": prompt_agreement(judge(), made, questions.labels)}
        for e in extractors:
            own, target = (Statistics.of(f, e.name) for f in (e.features(made), features[e.name]))
            distance = frechet_distance(own, target)
            row |= {f"fd/{e.name}": distance, f"fd_over_floor/{e.name}": distance / floors[e.name]}
        print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), f"({seconds:.0f} s)", flush=True)
        rows.append(row)
    if args.json:
        record = {"model": args.model, "steps": args.steps, "seed": args.seed, "ceiling": ceiling, "floors": floors}
        args.json.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
