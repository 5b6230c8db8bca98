"""A fuzzer over every file that is read: each mutation is one line that names the file, or loads and works."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hostile import hold
from jdm import trust
from jdm.data.cache import LAYOUT, Cache
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.export.writers import export
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.metrics.scores import read_prompts
from jdm.models.classifier import Classifier, ClassifierConfig
from jdm.recipes import recorded
from jdm.reproduce import results
from jdm.run import described
from jdm.training import checkpoint
from jdm.training.best import Best
from jdm.training.record import Log, measurements, refuse_another
from mutations import mutated
from tiny import nano_canny

PAGE = Path(__file__).parents[1] / "docs" / "results" / "2026-11-20-table2.json"
pytestmark = pytest.mark.hostile("json")
RUN = replace(nano_canny(), out=Path("runs/x"), best="fd", probe_every=1)


@pytest.fixture
def fuzzed(fuzz_seed, record_property):
    """Mutates a file, reads it each time, and holds what is said to the rules; then the file is put back."""
    def holds(file, read, count, names=(), before="", after=""):
        """
        Args:
            names: other words of which one may stand for the file, such as its folder's.
        """
        whole, outcomes, refused = file.read_text(encoding="utf-8"), [], 0
        for what, text in mutated(whole, fuzz_seed, count):
            file.write_text(f"{before}{text}{after}", encoding="utf-8", errors="surrogateescape")
            fault = ""
            try:
                read()
            except UsageError as error:
                said, refused = str(error), refused + 1
                named = any(name in said for name in (file.name, *names))
                fault = "" if named and "\n" not in said.strip() else said
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            outcomes.append((f"{file.name} {what}", fault))
        hold(outcomes, record_property)
        file.write_text(whole, encoding="utf-8")
        read()
        assert refused > count / 4, "the mutations are too mild to show anything"

    return holds


@pytest.fixture(autouse=True)
def fresh():
    """Code that a mutated file names is forgotten."""
    yield
    trust.start([])


@pytest.mark.parametrize("name", [
    "jdm.json", "model_index.json", "unet/config.json", "vae/config.json", "controlnet/config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_a_models_files(name, student, tmp_path, fuzzed):
    folder = tmp_path / "m"
    shutil.copytree(student, folder)

    def read():
        model = load_model(str(folder))
        sampler = Sampler(model, guidance=float((model.card or {}).get("guidance", 2.0)))
        z = starting_noise(model.latent_shape(1, model.size), 0)
        sampler(z, ["a boot"], None if model.controlnet is None else torch.zeros(1, 3, 32, 32))

    fuzzed(folder / name, read, 10, names=(name.partition("/")[0],))


@pytest.mark.parametrize("name", ["jdm.json", "run.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_model_that_is_exported(name, student, tmp_path, fuzzed):
    folder = tmp_path / "m"
    shutil.copytree(student, folder)
    (folder / "run.json").write_text(json.dumps({"run": described(RUN), "data": {"n": 5}, "versions": {"torch": "2"}}))

    def read():
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        export(folder, tmp_path / "e")

    fuzzed(folder / name, read, 10, names=(name.partition("/")[0],))


def test_run_json(tmp_path, fuzzed):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"run": described(RUN), "versions": {}}))
    fuzzed(file, lambda: recorded(file), 80)


def test_run_json_of_a_run_that_goes_on(tmp_path, fuzzed):
    run, file = replace(RUN, out=tmp_path), tmp_path / "run.json"
    file.write_text(json.dumps({"run": described(run)}))
    fuzzed(file, lambda: refuse_another(run), 40, names=(str(tmp_path),))


def test_state_json(tmp_path, fuzzed):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = checkpoint.State({"net": layer}, {"phase": optimizer}, {}, {"more": [1]})
    place = checkpoint.save(state, tmp_path, 5)
    fuzzed(place / "state.json", lambda: checkpoint.load(state, place), 40, names=("recipe",))


def test_metrics_jsonl(tmp_path, fuzzed):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "fidelity": 0.5, "probe/fd": 3.5, "seconds": 1e-3}\n')

    def read():
        measurements(file)
        Best(replace(RUN, out=tmp_path), file)
        Log(file, 1)

    fuzzed(file, read, 60, before=file.read_text(), after="\n")


@pytest.fixture
def preparation(tmp_path):
    names = {"captions": "prompts-00ff.json", "files": "files-00ff.json"}
    data = {"size": "32 x 32", "split": "train", "n": 2, "prompts": "00ff", "pictures": "00ff", **names}
    made = {"layout": LAYOUT, "recipe": "nano-canny", "source": "pictures", "data": data, "made with": {"torch": "2"},
            "text": [{"text encoder": "00", "tokenizer": "00", "part": "text-00ff"}],
            "pictures": {"part": "pictures-00ff"}, "latents": [{"autoencoder": "00", "part": "latents-00ff"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    (tmp_path / names["captions"]).write_text(json.dumps(["", "a boot"]))
    (tmp_path / names["files"]).write_text(json.dumps([["a.png", 9, 8, 7, 6, "00ff"]]))
    return tmp_path


@pytest.mark.parametrize(("name", "count"), [("manifest.json", 60), ("prompts-00ff.json", 15), ("files-00ff.json", 20)])
def test_a_preparation(name, count, preparation, fuzzed):
    def read():
        cache = Cache.read(preparation)
        assert [*map(str, cache.listed("captions"))] == cache.listed("captions")
        assert all(len(sign) == 6 for sign in cache.listed("files"))
        for part in (cache.manifest["pictures"], *cache.manifest["text"], *cache.manifest["latents"]):
            assert (preparation / part["part"]).parent == preparation

    fuzzed(preparation / name, read, count, names=(str(preparation), ".json"))


def test_a_classifiers_config(tmp_path, fuzzed):
    Classifier(ClassifierConfig(widths=(4, 4, 4, 4), dimensions=8)).save(tmp_path)
    fuzzed(tmp_path / "config.json", lambda: Classifier.load(tmp_path), 30, names=(str(tmp_path),))


def test_a_page(tmp_path, fuzzed):
    file = tmp_path / "page.json"
    file.write_text(PAGE.read_text())
    fuzzed(file, lambda: results.load_page.__wrapped__(str(file)), 30)


def test_a_cell(tmp_path, fuzzed):
    file = tmp_path / "cell.json"
    record = results.Record(0, "00ff", {"fd": 2.5}, results.Tuning(2.0, {"2.0": 3.5}, 9), (results.Stage("a", 3, 4),))
    file.write_text(json.dumps(asdict(record)))
    fuzzed(file, lambda: results.load(results.Record, file), 40)


def test_prompts(tmp_path, fuzzed):
    file = tmp_path / "photo.json"
    file.write_text(json.dumps(["a boot", "a coat"]))
    fuzzed(file, lambda: read_prompts(str(file)), 15)
