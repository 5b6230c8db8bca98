"""`jdm completion`: print a script that completes commands, recipes, flags and their values in a shell.

The script holds all words, so that TAB starts no Python. It has to be written again after an update.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jdm.cli.parser import RECIPE_COMMANDS, Parser, parsers
from jdm.cli.run_flags import flags_of
from jdm.cli.values import Among
from jdm.library import SHIPPED
from jdm.ranges import hints_of
from jdm.recipes import all_recipes

Words = Mapping[tuple[str, ...], Sequence[str]]  # keys that have the same words -> those words

BASH = """_jdm() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"
  local command="${COMP_WORDS[1]}" recipe="${COMP_WORDS[2]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="COMMANDS"
  else
    case "$command $prev" in
VALUES
    esac
    if [ -z "$words" ] && [ "${cur#-}" != "$cur" ]; then
      case "$command $recipe" in
FLAGS
      esac
    elif [ -z "$words" ] && [ "$COMP_CWORD" -eq 2 ]; then
      case "$command" in
FIRST
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _jdm jdm
"""
ZSH = f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{BASH}"
FISH = """function __jdm_words
  set -l given (commandline -opc)
  set -l cur (commandline -ct)
  set -l command $given[2]
  set -l found
  if test (count $given) -eq 1
    set found COMMANDS
  else
    switch "$command $given[-1]"
VALUES
    end
    if test -z "$found"; and string match -q -- '-*' $cur
      switch "$command $given[3]"
FLAGS
      end
    else if test -z "$found"; and test (count $given) -eq 2
      switch "$command"
FIRST
      end
    end
  end
  printf '%s\\n' $found
end
complete -c jdm -a '(__jdm_words)'
"""


def command(asked: argparse.Namespace) -> int:
    print(script(asked.shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion script of a shell of jdm.cli.parser.SHELLS."""
    template = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    cases = _fish_cases if shell == "fish" else _bash_cases
    whole, commands = parsers()
    values, flags, first = _words(commands)
    for name, text in (("COMMANDS", " ".join([*commands, *whole.flags()])), ("VALUES", cases(values)),
                       ("FLAGS", cases(flags)), ("FIRST", cases(first))):
        template = template.replace(name, text)
    return template


def _words(commands: Mapping[str, Parser]) -> tuple[Words, Words, Words]:
    """Words by "COMMAND FLAG" for a flag's value, by "COMMAND RECIPE" for flags, by "COMMAND" for what stands first."""
    values: dict[str, Sequence[str]] = {}
    flags: dict[str, Sequence[str]] = {}
    first: dict[str, Sequence[str]] = {}
    for name, parser in commands.items():
        for action in parser._actions:
            if known := _known(action):
                values |= {f"{name} {flag}": known for flag in action.option_strings}
                if not action.option_strings and name not in first:
                    first[name] = known
        if name not in RECIPE_COMMANDS:
            flags[f"{name} *"] = parser.flags()
            continue
        runs = {recipe: made() for recipe, made in all_recipes().items()}
        for recipe, run in runs.items():
            flags[f"{name} {recipe}"] = [*parser.flags(), *flags_of(run)]
            values |= {f"{name} {flag}": known for flag, known in _choices(run)}
        of_all = set.intersection(*(set(flags_of(run)) for run in runs.values()))  # for a recipe of the user's own
        flags[f"{name} *"] = [*parser.flags(), *sorted(of_all)]
        first[name] = list(runs)
    return _shared(values), _shared(flags), _shared(first)


def _known(action: argparse.Action) -> Sequence[str]:
    """The values of a flag or argument, where they are few and known."""
    if isinstance(action.type, Among):
        return action.type.names
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return list(SHIPPED) if action.metavar == "MODEL" else []


def _choices(settings: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """(flag, its values) of each field of a dataclass instance that takes one of a few words."""
    hints = hints_of(type(settings))
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from _choices(value, f"{name}.")
        elif words := _literals(hints.get(field.name)):
            yield f"--{name}", words


def _literals(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if isinstance(word, str)]
    return [word for part in get_args(hint) for word in _literals(part)]


def _shared(words: Mapping[str, Sequence[str]]) -> Words:
    """The words by all of the keys that have them; keys that end with a star, which fit more, come last."""
    found: dict[tuple[bool, tuple[str, ...]], tuple[str, ...]] = {}
    for key, own in words.items():
        place = key.endswith("*"), tuple(own)
        found[place] = (*found.get(place, ()), key)
    return {found[place]: place[1] for place in sorted(found, key=lambda place: place[0])}


def _bash_cases(words: Words) -> str:
    cases = (("|".join(map(_pattern, keys)), " ".join(own)) for keys, own in words.items())
    return "\n".join(f'      {keys}) words="{own}" ;;' for keys, own in cases)


def _fish_cases(words: Words) -> str:
    cases = ((" ".join(map(repr, keys)), " ".join(own)) for keys, own in words.items())
    return "\n".join(f"      case {keys}\n        set found {own}" for keys, own in cases)


def _pattern(key: str) -> str:
    """A key as a pattern of `case`: quoted, but for a star at its end."""
    return f'"{key[:-1]}"*' if key.endswith("*") else f'"{key}"'
