"""Recipes by name, by file, or by the record a run left. Names and summaries are read without importing torch."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from jdm.errors import UsageError
from jdm.files import expanded, fitted, read_json
from jdm.trust import note_data

if TYPE_CHECKING:
    from jdm.run import Run


@dataclass(frozen=True)
class Entry:
    """A recipe's place in the source.

    Attributes:
        summary: the first line of its docstring.
        scale: the scale it is laid over; empty for a function without arguments.
    """

    name: str
    summary: str
    module: str
    function: str
    scale: str = ""

    def load(self) -> Callable[[], Run]:
        recipe = getattr(importlib.import_module(self.module), self.function)
        if not self.scale:
            return recipe
        scales = importlib.import_module(f"{__name__}.scales").SCALES
        return lambda: recipe(scales[self.scale])


SCALES = ("nano", "sd15")  # the keys of scales.SCALES, which is not imported for its names
FILES = ("students", "emoji", "transformers", "yardsticks", "ablations", "blocks")  # in the order they are shown


def groups() -> dict[str, list[Entry]]:
    """The package's recipes under the first line of their file, from the source alone."""
    found: dict[str, list[Entry]] = {}
    for stem in FILES:
        tree = ast.parse((Path(__file__).parent / f"{stem}.py").read_text(encoding="utf-8"))
        title = (ast.get_docstring(tree) or stem).split("\n")[0]
        found[title] = [entry for node in tree.body for entry in _entries(node, f"{__name__}.{stem}")]
    return found


def entries() -> dict[str, Entry]:
    """Every recipe of the package, by name, from the source alone."""
    return {entry.name: entry for group in groups().values() for entry in group}


def _entries(node: ast.stmt, module: str) -> list[Entry]:
    """The recipes of a function: one without arguments is one, one that takes a scale is one for each scale."""
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        return []
    name, summary = node.name.replace("_", "-"), (ast.get_docstring(node) or "").split("\n")[0]
    if _is_recipe(node):
        return [Entry(name, summary, module, node.name)]
    if _returns_run(node) and [ast.unparse(a.annotation) for a in node.args.args if a.annotation] == ["Scale"]:
        return [Entry(f"{scale}-{name}", summary, module, node.name, scale) for scale in SCALES]
    return []


def all_recipes() -> dict[str, Callable[[], Run]]:
    """Every recipe's function, by name."""
    return {name: entry.load() for name, entry in entries().items()}


def find(spec: str) -> Callable[[], Run]:
    """A recipe by name, a FILE.py with one, or the run.json of a run to repeat.

    Raises:
        UsageError: there is none of that name; the nearest is suggested.
    """
    if spec.endswith(".py"):
        return _from_file(spec)
    if spec.endswith(".json"):
        return lambda: recorded(Path(spec))
    known = entries()
    if spec in known:
        return known[spec].load()
    near = difflib.get_close_matches(spec.replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(known)};"
    raise UsageError(f"there is no recipe {spec!r}; {hint} your own is named by its file, such as my_recipe.py")


def recorded(file: Path) -> Run:
    """The run that a run.json describes, to be repeated exactly. Code that it names runs only if a person names it too.

    Raises:
        UsageError: the file is not such a record, a value does not fit its field, or the method is not this package's.
    """
    from jdm.run import Record, Run

    remedy = "give the run.json that a run left, or name the recipe instead"
    description = read_json(file, Record, remedy, needed=True)["run"]
    note_data(description, file)
    try:
        run = _rebuilt(description, _types(), str(file), "run")
    except RecursionError:
        raise UsageError(f"{file}: run is nested too deeply; {remedy}") from None
    if not isinstance(run, Run) or not hasattr(run.method, "needs"):
        raise UsageError(f"{file}: run: it is not a `Run` with a method; {remedy}")
    return run


def _rebuilt(value: dict[str, Any], types: Mapping[str, type], file: str, key: str) -> Any:
    """The inverse of `run.described`: JSON -> dataclass. JSON's lists become tuples, strings Path where declared."""
    other = "it was written by another version, or by code of your own: name the recipe instead"
    kind = types.get(str(value.get("type")))
    if kind is None:
        raise UsageError(f"{file}: {key}.type: {value.get('type')!r:.60} is not a known type; {other}")
    hints, declared = get_type_hints(kind), {f.name: f for f in fields(kind)}
    if unknown := sorted(value.keys() - declared.keys() - {"type"}):
        raise UsageError(f"{file}: {key}: {kind.__name__} has no field {unknown[0]!r:.60}; {other}")
    found = {}
    for name, own in declared.items():
        if name in value:
            found[name] = _field(value[name], hints[name], types, file, f"{key}.{name}")
        elif own.default is MISSING and own.default_factory is MISSING:
            raise UsageError(f"{file}: {key}: there is no `{name}`; {other}")
    try:
        return kind(**found)
    except UsageError as error:  # a value out of the range that its class checks
        raise UsageError(f"{file}: {key}: {error}") from None


def _field(value: Any, hint: Any, types: Mapping[str, type], file: str, key: str) -> Any:
    """A field's JSON as the type that the field declares, which may be one of several dataclasses."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    nested = tuple(option for option in options if is_dataclass(option))
    if isinstance(value, dict) and (nested or hint is Any):
        value = _rebuilt(value, types, file, key)
        if hint is Any or isinstance(value, nested):  # type: ignore[arg-type]
            return value
    if nested and (value is not None or type(None) not in options):
        wanted = " or ".join(option.__name__ for option in nested)  # type: ignore[union-attr]
        raise UsageError(f"{file}: {key}: expected `{wanted}`, got `{type(value).__name__}`; give a value that fits")
    if nested:
        return None
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{file}: {key}: must be below 2^63; give a value that fits")
    found = fitted(value, str if hint is Path else hint, file, "give a value that fits", key)
    return Path(found) if hint is Path else found


def _types() -> dict[str, type]:
    """The dataclasses a record may name: the run's own and those of every method."""
    import jdm.methods

    modules = ["jdm.run", "jdm.models.classifier", "jdm.models.nano", "jdm.models.nano_flow", "jdm.levels",
               "jdm.posterior", "jdm.terms", "jdm.regularisers",
               *(f"jdm.methods.{m.name}" for m in pkgutil.iter_modules(jdm.methods.__path__))]
    found = [v for m in modules for v in vars(importlib.import_module(m)).values()]
    return {v.__name__: v for v in found if isinstance(v, type) and is_dataclass(v)}


def _from_file(path: str) -> Callable[[], Run]:
    """FILE.py's function `recipe`, or the only one that returns a Run."""
    from jdm.user_code import imported

    module = imported(path)
    if hasattr(module, "recipe"):
        return module.recipe
    functions = {n.name: n for n in ast.parse(expanded(path).read_text(encoding="utf-8")).body
                 if isinstance(n, ast.FunctionDef) and _is_recipe(n)}
    if len(functions) == 1:
        return getattr(module, next(iter(functions)))
    have = f"has {len(functions)} ({', '.join(functions)})" if functions else "has none"
    raise UsageError(f"{path} must have a function recipe() -> Run, without arguments; it {have}")


def _is_recipe(node: ast.FunctionDef) -> bool:
    arguments = node.args
    wanted = any([arguments.posonlyargs, arguments.args, arguments.kwonlyargs, arguments.vararg, arguments.kwarg])
    return not wanted and not node.name.startswith("_") and _returns_run(node)


def _returns_run(node: ast.FunctionDef) -> bool:
    returns = ast.unparse(node.returns) if node.returns else ""
    return returns.strip("'\"").split(".")[-1] == "Run"
