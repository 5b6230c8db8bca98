"""Every sh and Python block of README.md and docs/*.md: run on tiny models, or listed with the reason why it is not."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import documented
from jdm.cli.parser import (
    RECIPE_COMMANDS,
    doctor_flags,
    estimate_flags,
    own_parser,
    parsers,
    prepare_flags,
    refuse_unknown,
)
from jdm.cli.run_flags import flags_of, in_full, run_of
from jdm.recipes import all_recipes, find

SHELL = [(page, command) for page in documented.PAGES for command in documented.commands(page)]
TOOLS = ("jdm", "torchrun", "python", "python3")
RUN_HERE = [page for page in documented.PAGES if list(documented.steps(page))]
APART = ("docs/z-image.md", "docs/sd15.md")  # tests/test_cookbook.py runs them
OTHERS = {"--trust-code"}  # flags of the whole program
OWN = {"train": lambda parser: None, "prepare": prepare_flags, "estimate": estimate_flags, "doctor": doctor_flags}


def test_every_command_is_run_or_says_why():
    unknown = [command for page, command in SHELL if not documented.reason(page, command)
               and shlex.split(command)[0] not in TOOLS]
    assert unknown == []


def test_no_reason_is_left_over():
    used = {key for key in documented.NOT_RUN for page, command in SHELL
            if key[0] in ("", page) and command.startswith(key[1])}
    assert set(documented.NOT_RUN) == used


def test_a_block_has_a_known_language():
    for page, file in documented.PAGES.items():
        opened = [line.removeprefix("```") for line in file.read_text().splitlines() if line.startswith("```")][::2]
        assert set(opened) <= {"sh", "python", "json", "yaml", ""}, page


@pytest.mark.parametrize(("page", "command"), SHELL)
def test_commands_have_flags_that_exist(page, command):
    words = shlex.split(command.replace("&&", ";").split(">")[0].split(";")[0], comments=True)
    if "jdm" not in words or command.startswith("#!"):
        return
    name, *rest = words[words.index("jdm") + 1:]
    parser, commands = parsers()
    if name not in OWN:
        refuse_unknown(rest, commands[name].flags(), command)
        parser.parse_args([name, *rest])
        return
    own = own_parser(name, OWN[name])
    recipe = rest[0] if name in RECIPE_COMMANDS else rest[rest.index("--recipe") + 1] if "--recipe" in rest \
        else "nano-canny"
    known = [*flags_of(run_of(recipe)), *own.flags()]
    refuse_unknown([in_full(word, known) for word in rest], known, command)


def test_flags_in_the_text_exist():
    """Flags between backticks are of some command or recipe; other trainers' stand in a first column."""
    known = {flag for parser in parsers()[1].values() for flag in parser.flags()} | OTHERS
    known |= {flag for add in OWN.values() for flag in own_parser("", add).flags()}
    examples = [find(str(file)) for file in (documented.ROOT / "examples").glob("new_*.py")]
    known |= {flag for recipe in (*all_recipes().values(), *examples) for flag in flags_of(recipe())}
    for page, file in documented.PAGES.items():
        if page == "docs/log.md":  # what was tried with the flags of its day
            continue
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.M) if page == "docs/porting.md" else text
        named = {flag for span in re.findall(r"`((?:jdm |--)[^`]+)`", text)
                 for flag in re.findall(r"(?<!\S)(--[\w.-]+)", span)}
        ends = {flag.rpartition(".")[2] for flag in known} | {flag.partition(".")[2] for flag in known}
        assert {flag for flag in named - known if flag.removeprefix("--") not in ends} == set(), page


def test_warnings_are_quoted_as_they_are_printed():
    text = " ".join(documented.PAGES["docs/troubleshooting.md"].read_text().split())
    source = " ".join((documented.ROOT / "src" / "jdm" / "training" / "monitors.py").read_text().split())
    for said in ("the fake score's loss is", "it no longer follows the student", "guidance over-bakes",
                 "the student collapses and ignores z"):
        assert said in text
        assert said in source


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(documented.working_folder(tmp_path))
    return tmp_path


def assert_made(words: list[str], place: Path) -> None:
    """A command that draws or trains leaves pictures that show something, or weights, where it was told to."""
    if "--out" not in words or words[:2] not in (["jdm", "sample"], ["jdm", "train"]):
        return
    out = place / words[words.index("--out") + 1]
    if words[1] == "train":
        assert all(tensor.isfinite().all() for file in (out / "model").rglob("*.safetensors")
                   for tensor in load_file(file).values())
        assert list((out / "model").rglob("*.safetensors"))
    else:
        assert all(low < high for low, high in Image.open(out / "000.png").getextrema()), words


@pytest.mark.parametrize("page", [pytest.param(page, marks=[] if page == "docs/index.md" else pytest.mark.slow)
                                  for page in RUN_HERE if page not in APART])
def test_a_pages_blocks_run(page, place):
    for language, text in documented.steps(page):
        if language == "sh":
            documented.run(text)
        else:
            exec(text, {"edges": Image.open("photo.jpg").resize((32, 32))})
        assert_made(shlex.split(text) if language == "sh" else [], place)
