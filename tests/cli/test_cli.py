"""The commands: what they print, what they refuse, and their exit codes."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdm.cli.parser import main
from jdm.recipes import entries, recorded
from jdm.training import checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


def jdm(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jdm", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, **options)


@pytest.fixture
def complaint(capsys):
    """Runs a command in this process; returns its exit code and the one line it complained with."""

    def run(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line.startswith("jdm: ")]
        assert len(said) == 1, lines
        assert "Traceback" not in "".join(lines)
        return code, said[0]

    return run


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def small(teacher, out, *more) -> list:
    """Flags that cut a recipe down to the tiny model."""
    return ["--model", teacher, "--out", out, "--data.split", "test[:64]", "--data.validation", "test[64:128]",
            "--steps", "2", "--batch", "4", "--probe-every", "0", "--save-every", "1", *more]


# Answers


@pytest.mark.parametrize("argument", ["--help", "recipes"])
def test_help_and_recipes_take_less_than_a_second(argument):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "nano-canny" in jdm(argument).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 1  # of processor time: the wall clock is the machine's other work as well


def test_help_and_recipes_import_no_third_party():
    code = ("import sys; from jdm.cli.parser import main; main([]); main(['recipes']); "
            "print([m for m in ('torch', 'numpy', 'tyro', 'rich', 'diffusers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]"


def test_recipes_lists_every_recipe_in_a_group(capsys):
    assert main(["recipes"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    rows = [line for line in lines if line.startswith("  ")]
    assert sorted(line.split()[0] for line in rows) == sorted(entries())
    assert all(len(line.split()) > 3 for line in rows)
    assert 1 < len(lines) - len(rows) < 20
    assert lines[0] not in rows


def test_recipes_prints_the_groups_of_the_package(capsys, monkeypatch):
    some = list(entries().values())
    monkeypatch.setattr("jdm.recipes.groups", lambda: {"Ours": some[:2], "Others": some[2:3]}, raising=False)
    assert main(["recipes"]) == 0
    starts = [line.split("  ")[0 if line[:1] != " " else 1] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["Ours", some[0].name, some[1].name, "", "Others", some[2].name]


def test_wrong_recipe_exits_with_2_in_one_line():
    done = jdm("train", "nano-cany")
    assert done.returncode == 2
    assert done.stderr.startswith("jdm: there is no recipe 'nano-cany'; did you mean nano-canny?")
    assert done.stderr.count("\n") == 1


def test_debugging_shows_the_traceback():
    done = jdm("smaple", env={**os.environ, "JDM_DEBUG": "1"})
    assert "Traceback" in done.stderr


# Training by flags


def test_a_users_control_trains_and_samples(teacher, photo, tmp_path, capsys, untrained_judge):
    control = f"{EXAMPLES / 'my_controls.py'}:Posterize"
    out = tmp_path / "run"
    assert main(["train", "nano-canny", *map(str, small(teacher, out)), "--control", control,
                 "--posterior.rank", "2", "--condition.weight=0.5"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "model")
    assert "step 2/2" in printed.err
    assert "fidelity" in printed.err
    assert "condition" in printed.err
    method = recorded(out / "run.json").method
    assert (method.control, method.condition.weight, method.condition.posterior.rank) == (control, 0.5, 2)
    pictures = tmp_path / "pictures"
    drawn = ["sample", str(out / "model"), "--prompt", "ankle boot", "--image", str(photo), "--n", "2", "--out",
             str(pictures)]
    assert main(drawn) == 2
    assert "jdm.json names code" in capsys.readouterr().err
    assert main([*drawn, "--control", control]) == 0
    assert sorted(p.name for p in pictures.iterdir()) == ["000.png", "001.png", "control.png", "grid.png"]
    shown = np.asarray(Image.open(pictures / "control.png"))
    assert shown.shape == (32, 32, 3)
    assert (shown[..., 0] == shown[..., 1]).all()


def test_pictures_that_are_not_square(teacher, photo, tmp_path, capsys, untrained_judge):
    assert main(["train", "nano-canny", *map(str, small(teacher, tmp_path / "run")), "--data.size", "28", "44"]) == 0
    asked = ["sample", str(tmp_path / "run" / "model"), "--prompt", "ankle boot", "--n", "1"]
    for name, more, wanted in (("own", [], (44, 28)), ("side", ["--size", "36"], (36, 36)),
                               ("tall", ["--size", "40", "32"], (32, 40))):
        assert main([*asked, "--image", str(photo), *more, "--out", str(tmp_path / name)]) == 0
        for file in ("000.png", "control.png"):
            assert Image.open(tmp_path / name / file).size == wanted
    assert main([*asked, "--control-map", str(tmp_path / "own" / "control.png"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "000.png").read_bytes() == (tmp_path / "own" / "000.png").read_bytes()
    capsys.readouterr()
    shown = ["--control-map", str(tmp_path / "tall" / "control.png"), "--out", str(tmp_path / "refused")]
    for more, message in ((shown, "must be 28 x 44 pixels (height x width), got 40 x 32"),
                          (["--size", "30", "44"], "both sides of a picture must be multiples of 4, got 30 x 44"),
                          (["--size", "1", "2", "3"], "--size is a side, or height and width; got 3 numbers")):
        assert main([*asked, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_users_recipe_is_a_file(teacher, tmp_path, untrained_judge):
    recipe = tmp_path / "mine.py"
    recipe.write_text("from pathlib import Path\nfrom jdm.methods.diff_instruct import DiffInstruct\n"
                      "from jdm.run import Run\n\n\ndef shoes() -> Run:\n"
                      "    return Run(method=DiffInstruct(), out=Path('unused'))\n")
    assert main(["train", str(recipe), *map(str, small(teacher, tmp_path / "run"))]) == 0
    assert main(["train", str(tmp_path / "run" / "run.json"), "--out", str(tmp_path / "again")]) == 0
    a, b = (tmp_path / run / "model/unet/diffusion_pytorch_model.safetensors" for run in ("run", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_ready_map_gives_its_pictures_samples(student, photo, tmp_path):
    for name, more in (("a", ["--image", photo]), ("b", ["--control-map", tmp_path / "a" / "control.png"])):
        assert main(["sample", str(student), "--prompt", "a coat", *map(str, more), "--n", "2", "--seed", "7",
                     "--out", str(tmp_path / name)]) == 0
    for name in ("000.png", "001.png", "control.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Refusals


@pytest.mark.parametrize(("arguments", "said"), [
    ("trian nano-canny", "there is no command 'trian'; did you mean train?"),
    ("sample nano-canny --promt boot", "there is no flag --promt; did you mean --prompt?"),
    ("sample nano-canny", "the following arguments are required: --prompt"),
    ("sample nano-canny --prompt boot --n 0", "must be a whole number in [1, 10000], got '0'"),
    ("evaluate nano-canny --sede 1", "there is no flag --sede; did you mean --seed?"),
    ("evaluate nano-canny --n many", "must be a whole number, at least 1, got 'many'"),
    ("train", "the following arguments are required: RECIPE"),
    ("train nano-cany", "there is no recipe 'nano-cany'; did you mean nano-canny?"),
    ("train nowhere.py", "there is no file nowhere.py"),
    ("train nowhere.json", "nowhere.json: there is no such file"),
    ("train nano-canny --method.condition.wieght 1",
     "there is no flag --method.condition.wieght; did you mean --method.condition.weight?"),
    ("train nano-canny --stesp 1", "there is no flag --stesp; did you mean --steps?"),
    ("train nano-canny --steps many", "--steps"),
    ("train nano-canny --steps", "--steps"),
    ("train nano-canny --method.fidelity.normaliser all", "--method.fidelity.normaliser"),
    ("train nano-canny --device gpu9", "--device gpu9 cannot be used here"),
    ("train nano-canny --control cany", "did you mean 'canny'?"),
    ("export nowhere out", "nowhere is not a run"),
])
@pytest.mark.hostile("flags")
def test_a_usage_error_names_its_remedy(arguments, said, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = complaint(*arguments.split())
    assert code == 2
    assert said in line


@pytest.mark.hostile("parts")
def test_a_folder_without_a_model(complaint, tmp_path):
    assert complaint("sample", tmp_path, "--prompt", "x") == (
        2, f"jdm: {tmp_path} is not a model: model_index.json is missing; a diffusers folder has one at its top")
    code, line = complaint("sample", tmp_path / "nowhere", "--prompt", "x")
    assert code == 2
    assert "no such folder" in line


@pytest.mark.hostile("parts")
def test_a_damaged_model(complaint, student, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    code, line = complaint("sample", broken, "--prompt", "x")
    assert code == 2
    assert f"{broken} could not be loaded" in line


@pytest.mark.parametrize(("make", "said"), [
    (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 9), "photo.png"),
    (lambda path: Image.new("RGB", (4, 40)).save(path), "at least 8 pixels, got 4 x 40"),
    (lambda path: path.mkdir(), "it is a folder"),
    (lambda path: None, "there is no such file"),
])
@pytest.mark.hostile("data")
def test_a_file_that_is_no_picture(make, said, complaint, student, tmp_path):
    path = tmp_path / "photo.png"
    make(path)
    code, line = complaint("sample", student, "--prompt", "x", "--image", path, "--out", tmp_path / "o")
    assert code == 2
    assert said in line


def test_a_control_that_does_not_fit_the_model(complaint, student, teacher, photo, tmp_path):
    out = ["--out", tmp_path / "o"]
    Image.new("L", (40, 32)).save(tmp_path / "map.png")
    asked = {
        (student, "--control-map", tmp_path / "map.png"): "must be 32 x 32 pixels (height x width), got 32 x 40",
        (student,): "give --image with a picture",
        (student, "--image", photo, "--control-map", photo): "not both",
        (student, "--control-map", photo, "--control", "canny"): "leave it out where --control-map is given",
        (teacher, "--image", photo): "this model takes no control; leave out --image",
        (student, "--image", photo, "--steps", "4"): "draws in one step; asked for 4",
    }
    for arguments, said in asked.items():
        code, line = complaint("sample", *arguments, "--prompt", "x", *out)
        assert code == 2
        assert said in line


@pytest.mark.parametrize(("body", "said"), [
    ("return images.mean()", "must return [B, channels, H, W]"),
    ("return (images[:, :1] > 0.5).float()", "has no gradient"),
    ("return images.nothing", "Mine.h failed"),
])
@pytest.mark.hostile("flags")
def test_a_control_class_with_a_fault(body, said, complaint, student, photo, teacher, tmp_path, untrained_judge):
    source = f"from jdm.controls import Control\n\n\nclass Mine(Control):\n    def h(self, images):\n        {body}\n"
    (tmp_path / "mine.py").write_text(source)
    control = ["--control", f"{tmp_path / 'mine.py'}:Mine"]
    commands = [["sample", student, "--prompt", "x", "--image", photo, "--out", tmp_path / "o"],
                ["train", "nano-canny", *small(teacher, tmp_path / "run")]]
    if "gradient" in said:  # which drawing does not need
        assert main([str(a) for a in (*commands.pop(0), *control)]) == 0
    for command in commands:
        code, line = complaint(*command, *control)
        assert code == 2
        assert said in line
        assert "Mine" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.hostile("data")
def test_a_missing_caption(complaint, teacher, tmp_path, untrained_judge):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "1.png")
    code, line = complaint("train", "nano-canny", *small(teacher, tmp_path / "run"), "--data.source",
                           tmp_path / "pictures")
    assert code == 2
    assert "1.png has no caption; put it into 1.txt" in line


@pytest.mark.hostile("trouble")
def test_nan_exits_with_3_and_names_phase(complaint, teacher, tmp_path, untrained_judge):
    code, line = complaint("train", "nano-canny", *small(teacher, tmp_path / "run"),
                           "--method.fake.optimiser.lr", "1e38", "--method.fake.optimiser.warmup", "1")
    assert code == 3
    assert "phase " in line
    assert "not finite at step" in line
    assert str(checkpoint.last(tmp_path / "run") or "none yet") in line


@pytest.mark.hostile("trouble")
def test_full_disk_exits_with_3_and_names_checkpoint(complaint, teacher, tmp_path, monkeypatch, untrained_judge):
    original = checkpoint.save_file

    def full(tensors, path):
        if "0000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, line = complaint("train", "nano-canny", *small(teacher, tmp_path / "run"))
    assert code == 3
    assert "No space left" in line
    assert "step-0000001" in line


def test_an_interrupted_run_says_where_it_resumes(complaint, teacher, tmp_path, monkeypatch, untrained_judge):
    from jdm.cli.progress import TrainingProgress

    def stop(self, done, logs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "__call__", stop)
    code, line = complaint("train", "nano-canny", *small(teacher, tmp_path / "run"))
    assert code == 130
    assert "step-0000001" in line


def test_evaluate_writes_json_where_it_can(complaint, tmp_path, monkeypatch, capsys):
    import jdm.evaluation.evaluate

    monkeypatch.setattr(jdm.evaluation.evaluate, "evaluate",
                        lambda *asked: {"fd": 1.5, "n": asked[2], "model": asked[0]})
    out = tmp_path / "new" / "out.json"
    assert main(["evaluate", "nano-canny", "--control", "canny", "--n", "20", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == {"fd": 1.5, "n": 20, "model": "nano-canny"}
    assert "1.5" in capsys.readouterr().out
    (tmp_path / "file").touch()
    code, line = complaint("evaluate", "nano-canny", "--json", tmp_path / "file" / "out.json")
    assert code == 2
    assert "cannot be made" in line


def test_only_the_first_process_prints_an_error(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "no-such-recipe"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
