"""A fuzzer over the command line: whatever flags and files say, a command ends well or says why in one line."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import tiny
from hostile import WORDS, fault_of, hold, spoiled
from jdm import trust
from jdm.cli.parser import parsers
from jdm.cli.run_flags import flags_of
from jdm.recipes import all_recipes, entries
from jdm.run import described
from jdm.training.loop import train
from mutations import mutated
from tiny import nano_canny

OUTPUTS = ("--out", "--json", "--push")  # where the fuzzer must not write
MODEL = ("jdm.json", "model_index.json", "unet/config.json", "vae/config.json", "controlnet/config.json",
         "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder deep enough for ../x, with a control map."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    Image.new("RGB", (32, 32), "white").save("map.png")
    yield place
    trust.start([])


def flags_with_values(command):
    return [action.option_strings[0] for action in parsers()[1][command]._actions
            if action.option_strings and action.nargs != 0]


@pytest.mark.hostile("flags")
def test_flags_of_recipes_end_well(fuzz_seed, capsys, record_property):
    rng, names = random.Random(fuzz_seed), [*entries()]
    own = ("--model", "--data.source", "--data.prepared", *OUTPUTS)

    def outcomes():
        for _ in range(80):
            recipe = rng.choice(names)
            flags = [flag for flag in flags_of(all_recipes()[recipe]()) if flag not in own]
            words = [rng.choice(flags), rng.choice(WORDS)]
            asked = ["train", recipe, *words, "--model", "nowhere", "--data.source", "nowhere", "--out", "run"]
            yield f"{recipe} {words}", fault_of(asked, capsys, codes=(2,))

    hold(outcomes(), record_property)


@pytest.mark.hostile("flags")
@pytest.mark.parametrize(("command", "count"), [
    ("sample", 40), ("evaluate", 15), ("export", 15), ("compare", 5), ("reproduce", 15), ("app", 10), ("data", 10)])
def test_flags_of_commands_end_well(command, count, fuzz_seed, student, capsys, record_property):
    rng = random.Random(fuzz_seed)
    base = {
        "sample": [student, "--prompt", "a boot", "--control-map", "map.png", "--n", "1", "--out", "drawn"],
        "evaluate": [student, "--n", "2", "--split", "test[:0]"],  # refused once the model is there
        "export": [student, "new"], "compare": ["nowhere"], "app": ["nowhere", "--port", "0"],
        "reproduce": ["control", "--cells", "nowhere", "--out", "pages"], "data": ["emoji", "map.png"]}[command]
    flags = [flag for flag in flags_with_values(command) if flag not in (*OUTPUTS, "--page")]

    def outcomes():
        for _ in range(count):
            shutil.rmtree("new", ignore_errors=True)
            words = [rng.choice(flags), rng.choice(WORDS)] if flags else []
            place = rng.randrange(len(base)) if rng.random() < 0.3 else -1
            asked = [rng.choice(WORDS) if k == place else word for k, word in enumerate(base)]
            yield f"{command} {asked} {words}", fault_of([command, *asked, *words], capsys)

    hold(outcomes(), record_property)


@pytest.mark.hostile("json")
def test_a_broken_model_ends_commands_well(fuzz_seed, student, here, capsys, record_property):
    rng = random.Random(fuzz_seed)
    shutil.copytree(student, "m")
    commands = (["sample", "m", "--prompt", "a boot", "--n", "1", "--control-map", "map.png", "--out", "drawn"],
                ["sample", "m", "--prompt", "a boot", "--n", "1", "--image", "map.png", "--out", "drawn"],
                ["evaluate", "m", "--n", "2", "--split", "test[:0]"], ["export", "m", "new"],
                ["export", "m", "new", "--format", "controlnet"])

    def outcomes():
        for number in range(40):
            name = rng.choice(MODEL)
            whole = (here / "m" / name).read_text()
            (what, text), = mutated(whole, 1000 * fuzz_seed + number, 1)
            (here / "m" / name).write_text(text, errors="surrogateescape")
            shutil.rmtree("new", ignore_errors=True)
            asked = rng.choice(commands)
            yield f"{name} {what} {asked}", fault_of(asked, capsys)
            (here / "m" / name).write_text(whole)

    hold(outcomes(), record_property)


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """A run of one step, and its run.json, which makes it two."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run = tiny.run(nano_canny(), out, teacher, steps=1)
    train(run)
    return replace(run, steps=2)


@pytest.mark.hostile("json")
def test_a_broken_run_ends_commands_well(fuzz_seed, trained, here, capsys, record_property):
    rng = random.Random(fuzz_seed)
    files = ("run.json", "metrics.jsonl", "checkpoints/step-0000001/state.json", "model/jdm.json")

    def outcomes():
        for number in range(24):
            shutil.rmtree("new", ignore_errors=True)
            shutil.copytree(trained.out, "new")
            (here / "new" / "run.json").write_text(json.dumps({"run": described(replace(trained, out="new"))}))
            name = rng.choice(files)
            (what, text), = mutated((here / "new" / name).read_text(), 1000 * fuzz_seed + number, 1)
            (here / "new" / name).write_text(text, errors="surrogateescape")
            asked = rng.choice((["train", "new/run.json"], ["estimate", "new/run.json", "--gpu", "h100"],
                                ["prepare", "new/run.json", "--out", "prepared"], ["export", "new", "exported"],
                                ["compare", "new"]))
            shutil.rmtree("exported", ignore_errors=True)
            yield f"{name} {what} {asked}", fault_of(asked, capsys)

    hold(outcomes(), record_property)


def test_inputs_are_the_same_every_time():
    text = json.dumps(described(tiny.run(nano_canny(), Path("x"), Path("teacher"))))
    assert list(mutated(text, 3, 20)) == list(mutated(text, 3, 20)) != list(mutated(text, 4, 20))
    assert list(spoiled(text.encode(), 3, 20)) == list(spoiled(text.encode(), 3, 20))
