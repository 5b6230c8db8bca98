"""What commands write and print: nothing of others is overwritten, and what cannot be written is said."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from jdm.cli import checks, console
from jdm.cli import evaluate as command
from jdm.cli.parser import main
from jdm.data import pictures
from jdm.errors import RunError, UsageError

OURS = ("model", "seed")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "white").save("photo.png")
    return tmp_path


FOREIGN = {
    "json of another program": lambda: Path("x").write_text('{"a": 1}'),
    "list": lambda: Path("x").write_text("[1]"),
    "deep": lambda: Path("x").write_text("[" * 100_000),
    "text": lambda: Path("x").write_text("mine"),
    "picture": lambda: Path("photo.png").rename("x"),
    "folder": lambda: Path("x").mkdir(),
    "fifo": lambda: os.mkfifo("x"),
    "device": lambda: Path("x").symlink_to("/dev/null"),
    "dangling link": lambda: Path("x").symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.hostile("folders")
def test_a_json_file_of_others_is_kept(kind, here):
    FOREIGN[kind]()
    with pytest.raises(UsageError, match="x is there and this command did not write it; choose another --json"):
        checks.json_output("x", [], OURS)


def test_own_and_new_json_files_are_written(here):
    Path("own").write_text(json.dumps({"model": "m", "seed": 0, "n": 3}))
    Path("empty").touch()
    assert [checks.json_output(name, [], OURS) for name in ("own", "empty", "new", "a/b/new")]
    assert checks.json_output(None, [], OURS) is None
    with pytest.raises(UsageError, match="own would be overwritten and is read by this command"):
        checks.json_output("own", ["own"], OURS)


@pytest.mark.hostile("folders")
def test_pictures_of_others_are_kept(here, capsys):
    sample = ["sample", "nano-canny", "--prompt", "boot", "--n", "1", "--out", "."]
    Path("photo.png").rename("000.png")
    before = Path("000.png").read_bytes()
    assert main([*sample, "--image", "000.png"]) == 2
    assert "000.png would be overwritten and is read by this command" in capsys.readouterr().err
    assert main([*sample, "--image", "elsewhere.png"]) == 2
    assert "000.png is there and this command did not write it; choose another --out" in capsys.readouterr().err
    assert Path("000.png").read_bytes() == before


@pytest.mark.hostile("folders")
def test_own_pictures_are_known_and_replaced(here):
    assert not pictures.is_ours(Path("photo.png"))
    saved = pictures.save_picture(Image.new("RGB", (8, 8)), Path("own.png"))
    assert pictures.is_ours(saved)
    checks.free_of_others([saved], ["photo.png", None], pictures.is_ours, "--out")
    Path("link.png").symlink_to("own.png")
    with pytest.raises(UsageError, match=r"link\.png is there"):
        checks.free_of_others([Path("link.png")], [], pictures.is_ours, "--out")


@pytest.mark.hostile("trouble")
def test_numbers_are_printed_before_a_file_fails(here, monkeypatch, capsys):
    def full(path, text):
        raise RunError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(command.evaluation, "evaluate", lambda *_: {"model": "m", "seed": 0, "fd": 12.345})
    monkeypatch.setattr(command.files, "write", full)
    assert main(["evaluate", "nano-canny", "--json", "x.json"]) == 3
    said = capsys.readouterr()
    assert "12.345" in said.out
    assert "x.json could not be written" in said.err


@pytest.mark.parametrize("code", ["sys.exit(0)", "sys.exit('bye')", "exit()", "quit(3)", "raise SystemExit"])
@pytest.mark.parametrize("where", ["module", "function"])
@pytest.mark.hostile("trouble")
def test_user_code_that_exits_is_an_error(code, where, here, capsys):
    inside = f"import sys\n{code}\n" if where == "module" else f"import sys\ndef recipe():\n    {code}\n"
    Path("mine.py").write_text(inside)
    assert main(["train", "mine.py"]) == 2
    assert "mine.py" in capsys.readouterr().err


@pytest.mark.parametrize(("redirected", "code", "said"), [
    ("recipes > /dev/full", 3, "No space left on device"), ("recipes >&-", 3, "it is closed"),
    ("--help > /dev/full", 3, "No space left on device"),
    ("--version >&-", 3, "it is closed"), ("nope >&-", 2, "there is no command"), ("nope 2>&-", 2, ""),
    ("recipes > /dev/full 2> /dev/full", 3, ""), ("recipes >&- 2>&- <&-", 3, ""), ("nope > /dev/full", 2, "nope")])
@pytest.mark.hostile("terminal")
def test_a_lost_output_is_said(redirected, code, said):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m jdm {redirected}"], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
@pytest.mark.hostile("terminal")
def test_any_script_is_printed_in_any_locale(locale):
    bare = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "jdm", "grün-靴"], env=bare, capture_output=True, check=False)
    assert done.returncode == 2
    assert "there is no command 'grün-靴'" in done.stderr.decode()


@pytest.mark.parametrize("flag", ["-O", "-OO"])
@pytest.mark.hostile("terminal")
def test_help_is_whole_under_optimisation(flag):
    plain, optimised = (subprocess.check_output([sys.executable, *flags, "-m", "jdm", "recipes"])
                        for flags in ((), (flag,)))
    assert plain == optimised


ENVIRONMENTS = {
    "no home": {"HOME": None}, "home nowhere": {"HOME": "/nowhere"}, "home that is a file": {"HOME": "/dev/null"},
    "columns in words": {"COLUMNS": "wide"}, "no columns": {"COLUMNS": "0"}, "columns below none": {"COLUMNS": "-7"},
    "no terminal": {"TERM": None}, "dumb terminal": {"TERM": "dumb"}, "unknown terminal": {"TERM": "\udcff"},
    "unknown language": {"LANG": "xx_YY.UTF-99", "LC_ALL": None}, "threads in words": {"OMP_NUM_THREADS": "two"},
    "no room for drafts": {"TMPDIR": "/nowhere"}, "caches that are a file": {"XDG_CACHE_HOME": "/dev/null"},
    "empty": {"JDM_DEBUG": "", "HF_HOME": "", "PYTHONUTF8": "0"},
}


@cache
def ended(name: str, *words: str) -> tuple[int, bytes, bytes]:
    """Exit code and output of a command in an odd environment; in this one for a name that is none of those."""
    env = {k: v for k, v in {**os.environ, **ENVIRONMENTS.get(name, {})}.items() if v is not None}
    done = subprocess.run([sys.executable, "-m", "jdm", *words], env=env, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.hostile("terminal")
@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("words", [("recipes",), ("sample", "nano-canny", "--promt", "x")])
def test_an_odd_environment_changes_no_answer(words, name):
    assert ended(name, *words) == ended("plain", *words)


@pytest.mark.parametrize("columns", ["1", "4", "300"])
@pytest.mark.hostile("terminal")
def test_a_table_is_printed_in_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    console.table(["measurement", "value"], [["consistency", "0.123"]], title="nano-canny")
    assert "0.123" in capsys.readouterr().out


def test_a_closed_pipe_reaches_the_command_line(monkeypatch):
    with pytest.raises(BrokenPipeError):
        console._Console().on_broken_pipe()
