"""References: whose prompts they are made for, and the floor of a second set at its own sizes."""

import json
from types import SimpleNamespace

import pytest
import torch

import tiny
from jdm.data.sources import load_pictures
from jdm.evaluation import evaluate as evaluation
from jdm.evaluation import reference
from jdm.evaluation.evaluate import evaluate, validation_probe
from jdm.evaluation.reference import SEEDS, references
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.run import Data, Run

PICTURES = load_pictures("fashion-mnist", "test[:24]", 32)


class StopError(Exception):
    """Raised where a test has seen enough."""


def asked_of(calls):
    def asked(teacher, extractors, pictures, **more):
        calls.append((teacher, pictures))
        raise StopError

    return asked


@pytest.fixture
def no_measurements(monkeypatch):
    """What lies before the reference is asked for."""
    monkeypatch.setattr(evaluation, "answers", lambda *_: torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    calls = []
    monkeypatch.setattr(evaluation, "references", asked_of(calls))
    return calls


def test_a_validation_split_keeps_the_test_reference(no_measurements, teacher, untrained_judge):
    with pytest.raises(StopError):
        evaluate(str(teacher), n=4, split="test[40:60]", teacher="named", quick=True)
    ((name, pictures),) = no_measurements
    assert (name, pictures.source, len(pictures)) == ("named", "fashion-mnist/test", 10_000)


def test_a_probe_compares_with_the_test_prompts(no_measurements, untrained_judge, monkeypatch, tmp_path):
    whole, held_out = (load_pictures("fashion-mnist", split, 32) for split in ("test[:9]", "test[20:40]"))
    monkeypatch.setattr(evaluation, "Sampler", lambda teacher, generator: None)
    run = Run(None, tmp_path, model="named", data=Data(validation="test[20:40]"))
    probe = validation_probe(run, None, held_out, whole, SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    assert probe is not None
    with pytest.raises(StopError):
        probe({})
    assert no_measurements == [("named", whole)]


def test_a_run_probes_with_the_test_split(teacher, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jdm.methods.networks.validation_probe", lambda *given: seen.append(given))
    tiny.networks(tiny.run(tiny.nano_canny(), tmp_path, teacher, probe_every=1)).probe()
    ((_, _, held_out, whole, _, _),) = seen
    assert (len(held_out), len(whole)) == (64, 10_000)
    assert torch.equal(held_out.indices, whole.indices[64:128])


class Sums:
    """Features of a picture's three channels."""

    name = "sums"

    def features(self, pictures):
        return pictures.float().mean((2, 3)) / 255


def test_floors_are_the_second_sets_first_n(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference, "FLOORS", (6, 12))
    drawn = {seed: torch.randint(256, (24, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
             for seed in SEEDS}
    monkeypatch.setattr(reference, "answers", lambda sampler, questions, control: drawn[questions.seed])
    (made,) = references(str(teacher), [Sums()], PICTURES).values()
    first, second = (Sums().features(drawn[seed]) for seed in SEEDS)
    own = Statistics.of(first, "sums")
    assert frechet_distance(made.statistics, own) == pytest.approx(0, abs=1e-6)
    exact = {n: frechet_distance(Statistics.of(second[:n], "sums"), own) for n in (6, 12, 24)}
    assert {n: made.floor(n) for n in exact} == pytest.approx(exact)
    assert sorted(map(int, json.loads(made.statistics.extra["floors"]))) == [6, 12, 24]
    assert len(set(exact.values())) == 3
