"""`jdm completion`: what real shells offer at TAB, with the script sourced."""

import shutil
import subprocess

import pytest

from jdm.cli.completion import script
from jdm.cli.parser import SHELLS, parsers
from jdm.cli.run_flags import flags_of
from jdm.recipes import all_recipes, entries

CASES = {  # what is typed, the word at the cursor last -> some of what is offered, and what is not
    ("jdm", "comp"): ({"compare", "completion"}, {"train"}),
    ("jdm", "train", "nano-ca"): ({"nano-canny", "nano-canny-4"}, {"sd15-canny", "--seed"}),
    ("jdm", "train", "nano-canny", "--method.condition.w"): ({"--method.condition.weight"}, {"--method.fake.rank"}),
    ("jdm", "train", "nano-canny", "--precision", ""): ({"fp32", "bf16"}, {"--precision"}),
    ("jdm", "train", "mine.py", "--ste"): ({"--steps"}, {"--seed"}),
    ("jdm", "train", "nano-nct", "--trackers", ""): ({"tensorboard", "wandb"}, {"--trackers"}),
    ("jdm", "estimate", "sd15-canny", "--gpu", "h1"): ({"h100"}, {"a100"}),
    ("jdm", "prepare", "nano-canny", "--o"): ({"--out"}, {"--steps"}),
    ("jdm", "sample", "nano-so"): ({"nano-soft-edge"}, {"nano-canny"}),
    ("jdm", "export", "runs/a", "out", "--format", ""): ({"single-file", "lora"}, {"--format"}),
    ("jdm", "reproduce", "ta"): ({"table1", "table2"}, {"fig1"}),
    ("jdm", "compare", "--o"): ({"--out"}, {"--help"}),
}


def in_bash(words, file) -> str:
    quoted = " ".join(f"'{word}'" for word in words)
    code = (f"source {file}; COMP_WORDS=({quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _jdm; "
            'printf "%s\\n" "${COMPREPLY[@]}"')
    return subprocess.check_output(["bash", "-c", code], text=True)


def in_fish(words, file) -> str:
    typed = " ".join(words)
    return subprocess.check_output(["fish", "-c", f"source {file}; complete -C '{typed}'"], text=True)


def in_zsh(words, file) -> str:
    """Through the same function as in bash, under the options that zsh's bashcompinit runs it with; zsh itself drops
    what does not begin like the word."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (f"source {file}; () {{ emulate -L sh; setopt kshglob noshglob braceexpand; COMP_WORDS=({quoted}); "
            "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _jdm; printf '%s\\n' \"${COMPREPLY[@]}\"; }")
    found = subprocess.check_output(["zsh", "-f", "-c", code], text=True).splitlines()
    return "\n".join(word for word in found if word.startswith(words[-1]))


OFFERED = {"bash": in_bash, "fish": in_fish, "zsh": in_zsh}


@pytest.fixture(scope="module")
def sourced(tmp_path_factory):
    made = {}

    def file(shell):
        if shell not in made:
            made[shell] = tmp_path_factory.mktemp(shell) / "jdm"
            made[shell].write_text(script(shell))
        return made[shell]

    return file


@pytest.mark.parametrize("words", CASES, ids=" ".join)
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_offers_what_fits(shell, words, sourced):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    found = {line.split("\t")[0] for line in OFFERED[shell](words, sourced(shell)).splitlines()}
    offered, others = CASES[words]
    assert offered <= found
    assert not others & found


def test_a_script_knows_every_command_and_flag():
    text = script("bash")
    _, commands = parsers()
    for name in (*commands, *entries(), *(flag for parser in commands.values() for flag in parser.flags())):
        assert name in text
    assert all(flag in text for flag in flags_of(all_recipes()["sd15-text-guided-blind"]()))
