"""The command line: a thin skin over the Python API. Only the standard library is imported before a command runs."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from jdm import __version__
from jdm.errors import RunError, TerminatedError, UsageError, in_short

# Read by third parties when they are imported, so set before any of them is.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
         "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
DISK = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space",
        errno.EROFS: "choose a folder that can be written", errno.EACCES: "choose a folder that can be written",
        errno.EPERM: "choose a folder that can be written"}
EXAMPLES = """examples:
  jdm recipes
  jdm train nano-canny --method.condition-weight 0.5 --steps 100
  jdm sample nano-canny --prompt "ankle boot" --image photo.jpg --n 8
  jdm evaluate nano-canny --n 1000 --json out.json
  jdm reproduce table1 --dry-run"""
FORMATS = ("diffusers", "single-file", "controlnet", "lora")  # of jdm.export.writers, which is not imported
MODELS = "nano-sd, nano-canny, nano-controlnet, nano-{soft-edge,silhouette,lowres}, a folder, a .safetensors, a hub id"
GPUS = ("4080", "4090", "5090", "l40s", "a100", "h100", "h200")  # the keys of jdm.cost.gpus.GPUS, likewise
# The keys of jdm.reproduce.tables.TABLES and of its scales, which are not imported for their names.
REPRODUCED, SCALES = ("table1", "table2", "table3", "fig1", "fig3", "fig6"), ("nano", "sd15")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for a usage error, 3 for a failed run, 130 or 143 where stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    debug = os.environ.get("JDM_DEBUG", "0") not in ("", "0")
    if not debug:
        warnings.simplefilter("ignore")
    try:
        return _run(arguments)
    except Exception as error:
        if debug:
            raise
        return _failed(error)
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "stopped", 130)


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    if arguments and not arguments[0].startswith("-"):
        name = arguments[0]
        if name not in commands:
            raise UsageError(f"there is no command {name!r}; {_hint(name, commands)}see: jdm --help")
        if name not in ("train", "prepare", "estimate"):  # their flags are the recipe's fields
            refuse_unknown(arguments[1:], commands[name].flags(), f"jdm {name}")
    asked = parser.parse_args(arguments)
    if asked.command is None:
        parser.print_help()
        return 0
    if asked.command == "recipes":
        return _recipes()
    from jdm.cli import commands as bodies

    body: Callable[[argparse.Namespace], int] = getattr(bodies, asked.command)
    return body(asked)


def refuse_unknown(arguments: Iterable[str], known: Sequence[str], prog: str) -> None:
    """UsageError, with the nearest flag, if any of the arguments is a flag that is not known."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known:
            raise UsageError(f"there is no flag {flag}; {_hint(flag, known)}see: {prog} --help")


def _hint(word: str, known: Iterable[str]) -> str:
    tails: dict[str, str] = {}
    for name in known:
        tails.setdefault(name.split(".")[-1].lstrip("-"), name)
        tails.setdefault(name, name)
    near = difflib.get_close_matches(word, tails, n=1) or difflib.get_close_matches(
        word.lstrip("-").split(".")[-1], tails, n=1)
    return f"did you mean {tails[near[0]]}? " if near else ""


def _failed(error: Exception) -> int:
    quiet = os.environ.get("RANK", "0") != "0"  # what every process of a run says alike, the first says for all
    if isinstance(error, UsageError):
        return _say("" if quiet else str(error), 2)
    if isinstance(error, TerminatedError):
        return _say("" if quiet else str(error), 143)
    if isinstance(error, RunError):
        return _say(str(error), 3)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush to
        return 141
    if isinstance(error, OSError) and error.errno in DISK:
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}; {DISK[error.errno]} and run the same command again", 3)
    return _say(f"failed unexpectedly ({in_short(error)}); JDM_DEBUG=1 shows where", 3)


def _say(message: str, code: int) -> int:
    if message:
        print("jdm: " + " ".join(message.split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see: {self.prog} --help")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser("jdm", description="One-step diffusion generators that learn new controls.", epilog=EXAMPLES,
                     formatter_class=plain, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jdm {__version__}")
    under = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    made: dict[str, _Parser] = {}

    def command(name: str, summary: str) -> _Parser:
        made[name] = under.add_parser(name, help=summary, description=summary, formatter_class=plain,
                                      allow_abbrev=False)
        return made[name]

    command("recipes", "list the recipes")
    train = command("train", "train a recipe, resuming where a run stopped")
    train.add_argument("recipe", metavar="RECIPE|FILE.py|run.json", help="see: jdm recipes")
    rest = train.add_argument("flags", nargs=argparse.REMAINDER, metavar="--FLAG VALUE",
                              help="fields of the run; see: jdm train RECIPE --help")
    rest.required = False
    _run_flags(command("prepare", "what training would compute again, on disk: text states, pictures, latents"),
               prepared_flags)
    _run_flags(command("estimate", "a run's memory, FLOPs and GPU-hours, before anything is loaded"), cost_flags)
    _sample_flags(command("sample", "pictures for a prompt, and for a control measured on a picture of yours"))
    _evaluate_flags(command("evaluate", "measure a model"))
    _export_flags(command("export", "a run's model as a folder that stock software loads"))
    _reproduce_flags(command("reproduce", "a table or figure of the paper, beside the published one"))
    demo = command("demo", "sample, train, evaluate and report on the shipped models, in minutes on a CPU")
    demo.add_argument("--out", default="runs/demo")
    demo.add_argument("--steps", type=_positive, default=300, help="of training")
    demo.add_argument("--n", type=_positive, default=500, help="pictures per measurement")
    return parser, made


def _run_flags(parser: _Parser, own: Callable[[argparse.ArgumentParser], None]) -> None:
    """A recipe, the flags of its run, and the command's `own` among them."""
    parser.add_argument("recipe", metavar="RECIPE|FILE.py|run.json", help="see: jdm recipes")
    rest = parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--FLAG VALUE", help="as in jdm train; and")
    rest.required = False
    own(parser)


def prepared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `jdm prepare` that are not the run's."""
    parser.add_argument("--out", help="folder; runs/prepared/RECIPE where not given")


def cost_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `jdm estimate` that are not the run's."""
    parser.add_argument("--gpu", action="append", type=_among(GPUS), help=f"{', '.join(GPUS)}; repeatable; all of them "
                        "where not given")
    parser.add_argument("--json", help="file for the numbers")


def _sample_flags(sample: _Parser) -> None:
    sample.add_argument("model", metavar="MODEL",
                        help=MODELS)
    sample.add_argument("--prompt", required=True)
    sample.add_argument("--image", help="a picture to measure the control on: any format, any size")
    sample.add_argument("--control", help="canny or my_controls.py:Posterize; the model's own where not given")
    sample.add_argument("--control-map", help="a ready control map, as large as the model's pictures")
    sample.add_argument("--also", action="append", default=[], metavar="MODEL",
                        help="a further ControlNet for the same UNet, measured on the same picture; repeatable")
    sample.add_argument("--strength", action="append", type=float, default=[],
                        help="of each control in turn, the model's own first; 1 where not given; repeatable")
    sample.add_argument("--n", type=_positive, default=4, help="how many")
    sample.add_argument("--size", type=_positive, nargs="+", metavar="PIXELS",
                        help="a square's side, or height and width; the model's own where not given")
    sample.add_argument("--seed", type=_seed, default=0)
    sample.add_argument("--steps", type=_positive, help="a student's own, 50 for others where not given")
    sample.add_argument("--guidance", type=float, help="of models with many steps; 1 is none")
    sample.add_argument("--out", default="samples", help="folder for control.png, 000.png, ... and grid.png")
    sample.add_argument("--device", default="cpu")


def _evaluate_flags(evaluate: _Parser) -> None:
    evaluate.add_argument("model", metavar="MODEL",
                          help=MODELS)
    evaluate.add_argument("--control", help="canny or my_controls.py:Posterize; the model's own where not given")
    evaluate.add_argument("--n", type=_positive, default=1000, help="pictures")
    evaluate.add_argument("--seed", type=_seed, default=0)
    evaluate.add_argument("--json", help="file for the numbers")
    evaluate.add_argument("--data.source", dest="source", default="fashion-mnist", help="as in jdm train")
    evaluate.add_argument("--split", default="test", help="test, validation or a slice: test[:1000]")
    evaluate.add_argument("--steps", type=_positive, help="a student's own, 50 for others where not given")
    evaluate.add_argument("--guidance", type=float, help="of models with many steps; 1 is none")
    evaluate.add_argument("--teacher", default="nano-sd", help="distances are taken to its uncontrolled samples")
    evaluate.add_argument("--quick", action="store_true", help="one extractor, fewer draws, fewer timings")
    evaluate.add_argument("--scores", help="clip, hpsv2, aesthetic, pick-score, image-reward (hpsv2:FOLDER where its "
                          "weights are elsewhere), or my_rewards.py:brightness; separated by commas")
    evaluate.add_argument("--prompts", help="a folder of JSON lists, one a style, or a file: text-to-image, scored "
                          "alone; --n of each style")
    evaluate.add_argument("--extractor", action="append", default=[], help="inception or inception:FILE: FID too; it "
                          "needs pip install 'jdm[fid]'")
    evaluate.add_argument("--device", default="cpu")


def _export_flags(export: _Parser) -> None:
    export.add_argument("run", metavar="RUN", help="a run's folder, finished or not, or a model's")
    export.add_argument("out", metavar="OUT", help="a new folder")
    export.add_argument("--format", type=_among(FORMATS), default="diffusers",
                        help="diffusers: a whole folder; single-file: for ComfyUI and A1111; controlnet: it alone, for "
                             "either; lora: the UNet's difference from its base, for either")
    export.add_argument("--rank", type=_positive, help="of the LoRA; 64 where not given")
    export.add_argument("--base", metavar="MODEL", help="what the LoRA is laid over; the run's teacher where not given")
    export.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
                        help="precision of the weights on disk")
    export.add_argument("--metrics", metavar="out.json", help="what jdm evaluate --json wrote, for the README")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the finished folder to the hub, under this name")


def _reproduce_flags(reproduce: _Parser) -> None:
    reproduce.add_argument("table", metavar="TABLE", type=_among(REPRODUCED), help=", ".join(REPRODUCED))
    reproduce.add_argument("--seeds", type=_positive, default=1, help="training seeds 0, 1, ...")
    reproduce.add_argument("--cells", help="which to fill: canny/nct,... as column/row, or one of both; * and ? fit")
    reproduce.add_argument("--n", type=_positive, help="pictures per cell; 5000, of figures 1000, where not given")
    reproduce.add_argument("--steps", type=_positive, help="of every training; the recipes' own where not given")
    reproduce.add_argument("--out", default="runs/reproduce", help="folder for models and cells, reused between calls")
    reproduce.add_argument("--page", default="docs/results", help="folder for the page and its numbers")
    reproduce.add_argument("--scale", type=_among(SCALES), default="nano", help=", ".join(SCALES))
    reproduce.add_argument("--model", help="another teacher: a folder or hub id; then nothing that ships is used")
    reproduce.add_argument("--guide", help="another better teacher for table3; of sd15 it is SD2.1")
    reproduce.add_argument("--source", help="other pictures, as in jdm train")
    reproduce.add_argument("--prompts", help="that text-to-image models are scored on, as in jdm evaluate; those of "
                           "the pictures where not given")
    reproduce.add_argument("--scores", help="as in jdm evaluate, in place of the scale's own")
    reproduce.add_argument("--device", help="the scale's own where not given: cpu, of sd15 cuda")
    reproduce.add_argument("--known", action="append", default=[], metavar="PAGE.json", help="take the cells of a page "
                           "that were made by the same recipes, pictures and measurements")
    reproduce.add_argument("--quick", action="store_true", help="one extractor, fewer draws, fewer timings")
    reproduce.add_argument("--dry-run", "--list", action="store_true", dest="dry_run",
                           help="print the cells, what is there and what the rest would cost")
    reproduce.add_argument("--no-run", action="store_true", help="write the page from what is there")


def _among(names: Sequence[str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"there is no {text!r}; {_hint(text, names) or ', '.join(names)}")
        return text

    return name


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**40:
        raise argparse.ArgumentTypeError(f"must be a whole number in 0..2^40, got {text!r}")
    return int(text)


def _recipes() -> int:
    from jdm.recipes import entries

    found = entries()
    width = max(len(name) for name in found)
    for name, entry in found.items():
        print(f"{name:{width}}  {entry.summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
