"""The command line. Only the standard library is imported before a command runs, so that help is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jdm import __version__, trust
from jdm.cli import streams
from jdm.cli.values import Among, drawings, factor, hint, pictures, positive, seed, seeds, share, side, text
from jdm.errors import TeacherWarning, UsageError

# Read by third parties when they are imported, so set before any of them is.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
         "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
EXAMPLES = """examples:
  jdm recipes
  jdm train nano-canny --method.condition.weight 0.5 --steps 100
  jdm sample nano-canny --prompt "ankle boot" --image photo.jpg --n 8
  jdm evaluate nano-canny --n 1000 --json out.json
  jdm reproduce table1 --dry-run"""
NARROWEST = 40  # columns that a help page is rendered for at least
# Names that flags accept, written here too because the modules that own them import torch; tests compare them.
FORMATS = ("diffusers", "single-file", "controlnet", "lora", "onnx")  # of jdm.export.writers
GPUS = ("4080", "4090", "5090", "l40s", "a100", "h100", "h200")  # of jdm.cost.gpus
RECIPE_COMMANDS = ("train", "prepare", "estimate")  # whose flags are the recipe's fields
RUN_COMMANDS = (*RECIPE_COMMANDS, "doctor")  # whose flags are those of a run
SHELLS = ("bash", "zsh", "fish")  # of jdm.cli.completion
DATA_SETS = ("emoji",)  # of jdm.data
REPRODUCED = ("table1", "table2", "table3", "fig1", "fig3", "fig6", "ddmd", "control")  # of jdm.reproduce
SCALES = ("nano", "sd15")  # of jdm.reproduce


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for a usage error, 3 for a failed run, 130 or 143 if stopped."""
    if argv is None:
        streams.prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    debug = os.environ.get("JDM_DEBUG", "0") not in ("", "0")
    if not debug:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TeacherWarning)
        warnings.formatwarning = lambda message, *_, **__: f"jdm: {' '.join(str(message).split())}\n"
    try:
        return streams.flushed(_run(arguments))
    except SystemExit:  # help or the version was shown
        if code := streams.flushed(0):
            return code
        raise
    except Exception as error:
        if debug:
            raise
        return streams.flushed(streams.failed(error))
    except KeyboardInterrupt as stop:
        return streams.say(str(stop) or "stopped", 130)


class HelpShown(SystemExit):
    """A command's help was asked for and printed."""


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    parser, commands = parsers(name)
    if name:
        if name not in commands:
            raise UsageError(f"there is no command {name!r}; {hint(name, commands)}see: jdm --help")
        trust.start(arguments[1:])
        if trust.FLAG in commands[name].flags():  # wherever it stands: a recipe's flags are not read here
            arguments = [argument for argument in arguments if argument != trust.FLAG]
        if name not in RUN_COMMANDS:
            refuse_unknown(arguments[1:], commands[name].flags(), f"jdm {name}")
    asked = parser.parse_args(arguments)
    if asked.command is None:
        parser.print_help()
        return 0
    if asked.command not in ("recipes", "data", "compare", "completion"):  # those load no model
        _silence_diffusers()
    try:
        return importlib.import_module(f"jdm.cli.{asked.command}").command(asked)
    except HelpShown:
        raise
    except SystemExit as end:  # of a user's control, reward or recipe
        import traceback

        called = [frame for frame in traceback.extract_tb(end.__traceback__) if "_sitebuiltins" not in frame.filename]
        raise UsageError(f"{called[-1].filename}, line {called[-1].lineno}, ended the program "
                         f"(sys.exit({end.code!r})); let it raise an error instead") from end


def _silence_diffusers() -> None:
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def refuse_unknown(arguments: Iterable[str], known: Sequence[str], prog: str) -> None:
    """Raise a UsageError that suggests the nearest flag if an argument is a flag that is not among the known."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known:
            raise UsageError(f"there is no flag {flag}; {hint(flag, known)}see: {prog} --help")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see: {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file := file or sys.stdout:  # argparse's own passes over a disk that is full
            file.write(message)

    def flags(self) -> list[str]:
        """Every flag it accepts, such as --seed."""
        return [flag for action in self._actions for flag in action.option_strings]


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=max(NARROWEST, shutil.get_terminal_size().columns) - 2)

    def _get_help_string(self, action: argparse.Action) -> str:
        """A flag's help, ending with its default unless it says that itself."""
        default, said = action.default, action.help or ""
        none = default is None or default is False or default in ([], argparse.SUPPRESS)
        return said if none or "(default" in said else f"{said} (default: %(default)s)"


def parsers(flags_of: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """The parser of `jdm` and those of its commands, by name.

    Args:
        flags_of: the one command whose flags are added, so that starting is quick; None for those of every command.
    """
    parser = Parser("jdm", description="One-step diffusion generators that learn new controls.", epilog=EXAMPLES,
                    formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jdm {__version__}", help="print the version and exit")
    under = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    made: dict[str, Parser] = {}

    def command(name: str, summary: str, *flags: Callable[[argparse.ArgumentParser], None]) -> None:
        made[name] = under.add_parser(name, help=summary, description=summary, formatter_class=_Help,
                                      allow_abbrev=False)
        for add in flags if flags_of in (None, name) else ():
            add(made[name])

    command("recipes", "list the recipes that can be trained")
    command("train", "train a recipe, or resume its run where it stopped", _run_flags)
    command("prepare", "compute text states, pictures and latents once, and store them for training", _run_flags,
            prepare_flags)
    command("estimate", "estimate a run's memory, FLOPs and GPU-hours without loading a model", _run_flags,
            estimate_flags)
    command("doctor", "read a source of pictures once, or a model, and say what training would find wrong with it",
            _doctor_flags)
    command("sample", "draw pictures for a prompt, and for a control measured on your own picture", _sample_flags)
    command("evaluate", "measure a model on the pictures of a data set", _evaluate_flags)
    command("compare", "put the curves, settings and previews of runs on one page, which needs no network",
            _compare_flags)
    command("export", "write a run's model as a folder that other programs load", _export_flags)
    command("reproduce", "reproduce a table or figure of the paper beside the published one", _reproduce_flags)
    command("data", "make a data set to train on, from public packages: emoji pictures with captions", _data_flags)
    command("app", "draw in the browser, and the picture follows the hand: a page on this machine", _app_flags)
    command("demo", "sample, train, evaluate and report on the shipped models, in minutes on a CPU", _demo_flags)
    command("completion", "print a script by which a shell completes commands, recipes and flags",
            _completion_flags)
    return parser, made


def trust_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(trust.FLAG, action="store_true", help="run code that a model's jdm.json or a run.json names, "
                        "after showing where it is; code that you name yourself needs no such flag")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    trust_flag(parser)
    parser.add_argument("recipe", metavar="RECIPE|FILE.py|run.json", help="name of a recipe (see: jdm recipes), a file "
                        "of your own with a function recipe(), or the record that a run left")
    rest = parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--FLAG VALUE",
                               help="any fields of the run to change; for a list: jdm train RECIPE --help")
    rest.required = False


def own_parser(command: str, flags: Callable[[argparse.ArgumentParser], None],
               first: str = "RECIPE|FILE.py|run.json") -> Parser:
    """A parser of the flags of a command that are not the run's, wherever they stand among those.

    Args:
        first: what stands before the flags, for help.
    """
    parser = Parser(f"jdm {command}", usage=f"jdm {command} {first} [--FLAG VALUE ...]", add_help=False,
                    description="Flags of the command itself, then the run's;\na flag that both have is the command's.",
                    formatter_class=_Help, allow_abbrev=False)
    flags(parser)
    return parser


def prepare_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `jdm prepare` that are not the run's."""
    parser.add_argument("--out", metavar="FOLDER", help="folder to write to (default: runs/prepared/RECIPE)")


def estimate_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `jdm estimate` that are not the run's."""
    parser.add_argument("--gpu", action="append", type=Among(GPUS), help=f"GPU to estimate times for: "
                        f"{', '.join(GPUS)}; repeatable (default: all of them)")
    parser.add_argument("--json", metavar="FILE", help="file to write the numbers to, as JSON")


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    trust_flag(parser)
    parser.add_argument("what", metavar="DATA|MODEL", help="pictures as --data.source of jdm train names them, or the "
                        "folder, file or id of a model")
    doctor_flags(parser)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--FLAG VALUE", help="fields of the run, such as "
                        "--data.pictures '*.jpg', --data.size 64 or --control canny; list: jdm doctor DATA --help")


def doctor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `jdm doctor` that are not the run's."""
    parser.add_argument("--recipe", metavar="RECIPE", help="recipe whose size, control and teacher are those that the "
                        "pictures are looked at with (default: none)")
    parser.add_argument("--out", default="doctor.html", metavar="FILE", help="page to write, with the table and 24 "
                        "pictures, their captions and control maps")


def _model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="nano-sd, nano-canny, nano-controlnet, nano-soft-edge, "
                        "nano-silhouette, nano-lowres, a folder, a .safetensors file or a Hugging Face id")


def _sampler_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `jdm sample` and `jdm evaluate` share."""
    trust_flag(parser)
    parser.add_argument("--control", help="control to measure, such as canny or my_controls.py:Posterize (default: "
                        "the one the model was trained with)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the starting noise, a whole number below 2^40")
    parser.add_argument("--steps", type=positive,
                        help="sampling steps, at least 1 (default: a student's own, 50 for other models)")
    parser.add_argument("--guidance", type=factor, help="classifier-free guidance scale of a multi-step model, in "
                        "[0, 100]; 1 turns guidance off (default: the model's own, or 2)")
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cpu or cuda")


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument("--prompt", required=True, type=text, help="text to draw pictures for")
    parser.add_argument("--image", metavar="FILE", help="picture to measure the control on, of any format and size")
    parser.add_argument("--control-map", metavar="FILE", help="ready control map to use instead of --image; as large "
                        "as the pictures the model draws")
    parser.add_argument("--also", action="append", default=[], metavar="MODEL", help="another ControlNet for the same "
                        "UNet, with its control measured on the same picture; repeatable")
    parser.add_argument("--strength", action="append", type=factor, default=[], help="factor on each control in "
                        "turn, the model's own first, in [0, 100]; 0 ignores a control; repeatable (default: 1)")
    parser.add_argument("--n", type=pictures, default=4, help="number of pictures to draw, in [1, 10000]")
    parser.add_argument("--to-seed", type=seed, default=0, help="seed whose noise is blended into that of --seed, a "
                        "whole number below 2^40")
    parser.add_argument("--blend", type=share, default=0.0, help="way from the noise of --seed to that of --to-seed, "
                        "in [0, 1]")
    parser.add_argument("--size", type=side, nargs="+", metavar="PIXELS", help="side of a square, or height and "
                        "width, in pixels, in [1, 4096] (default: the size the model was trained at)")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="folder to write control.png, 000.png, ... "
                        "and grid.png to")
    _sampler_flags(parser)
    steering = parser.add_argument_group("control of a model that has not learnt it, while it samples")
    steering.add_argument("--steer", metavar="CONTROL", help="control to steer to, measured on --image, such as canny")
    steering.add_argument("--posterior", metavar="MODEL", help="folder of the posterior p(x | x_t) that jdm train "
                          "nano-posterior left, one pass more a step (default: the model's own x0, differentiated)")
    steering.add_argument("--steer-weight", type=float, metavar="W", help="factor on the gradient, above 0 "
                          "(default: 1)")


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument("--n", type=positive, default=1000, help="number of pictures to measure; with --prompts, "
                        "number of each style")
    parser.add_argument("--data.source", dest="source", default="fashion-mnist", help="fashion-mnist, emoji, a folder "
                        "of captioned pictures, .tar shards or a Hugging Face data set")
    parser.add_argument("--split", default="test", help="split of the data, or a slice of one, such as test[:1000]")
    parser.add_argument("--teacher", default="nano-sd", metavar="MODEL", help="model to whose samples without control "
                        "the Frechet distance is measured")
    parser.add_argument("--quick", action="store_true", help="measure faster and less precisely: one feature "
                        "extractor, fewer draws and timings")
    parser.add_argument("--scores", help="networks that score pictures, separated by commas: clip, hpsv2, aesthetic, "
                        "pick-score, image-reward, or my_rewards.py:brightness; NAME:FOLDER gives their weights")
    parser.add_argument("--prompts", metavar="PATH", help="file of prompts, or folder with a JSON list for each style: "
                        "draw pictures for them and compute --scores alone")
    parser.add_argument("--extractor", action="append", default=[], help="further features for the Frechet distance: "
                        "inception or inception:FILE gives FID and needs pip install 'jdm[fid]'; repeatable")
    parser.add_argument("--json", metavar="FILE", help="file to write the numbers to, as JSON")
    _sampler_flags(parser)
    from jdm.cli.layout_flags import layout_flags

    layout_flags(parser)


def _app_flags(parser: argparse.ArgumentParser) -> None:
    from jdm.cli.app_flags import app_flags  # which has this module's types

    app_flags(parser)


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not, such as runs/mine")
    parser.add_argument("--out", default="compare.html", metavar="FILE", help="page to write")


def _completion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", type=Among(SHELLS), help=f"shell to write for: {', '.join(SHELLS)}")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    trust_flag(parser)
    parser.add_argument("run", metavar="RUN", help="folder of a run, finished or not, or of a model")
    parser.add_argument("out", metavar="OUT", help="new folder to write the model to")
    parser.add_argument("--format", type=Among(FORMATS), default="diffusers", help="diffusers: a complete diffusers "
                        "folder; single-file: one file for ComfyUI and A1111; controlnet: the ControlNet alone, in "
                        "both layouts; lora: the UNet's difference from its base, in both layouts; onnx: a student's "
                        "graphs for onnxruntime")
    parser.add_argument("--rank", type=positive, help="rank of the LoRA, at least 1 (default: 64)")
    parser.add_argument("--base", metavar="MODEL", help="model the LoRA is applied to (default: the run's teacher)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="number format of the "
                        "weights on disk")
    parser.add_argument("--metrics", metavar="FILE", help="file that jdm evaluate --json wrote, to quote in the README")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the finished folder to Hugging Face by this name")


def _reproduce_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", type=Among(REPRODUCED),
                        help=f"table or figure to reproduce: {', '.join(REPRODUCED)}")
    parser.add_argument("--seeds", type=seeds, default=1, help="number of training seeds, in [1, 100]: 0, 1, ...")
    parser.add_argument("--cells", help="cells to fill, as COLUMN/ROW, COLUMN or ROW, separated by commas; * and ? "
                        "are wildcards, such as canny/nct* (default: every row, some on fewer columns)")
    parser.add_argument("--n", type=positive, help="number of pictures per cell (default: 5000, 1000 for figures, "
                        "2000 for ddmd and control)")
    parser.add_argument("--steps", type=positive, help="steps of every training run (default: each recipe's "
                        "own; 500 for ddmd and control at scale nano)")
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER", help="folder for models and measured "
                        "cells, reused by later calls")
    parser.add_argument("--page", default="docs/results", metavar="FOLDER", help="folder to write the page and its "
                        "numbers to")
    parser.add_argument("--scale", type=Among(SCALES), default="nano", help="recipes to fill the table with: "
                        f"{' or '.join(SCALES)}")
    parser.add_argument("--model", help="other teacher, a folder or Hugging Face id; no shipped model is used then")
    parser.add_argument("--guide", metavar="MODEL", help="other model for guidance in table3 (default: SD2.1 at scale "
                        "sd15)")
    parser.add_argument("--source", help="other pictures: any --data.source that jdm train accepts")
    parser.add_argument("--prompts", metavar="PATH", help="prompts to score text-to-image models on, as in jdm "
                        "evaluate (default: the pictures' captions)")
    parser.add_argument("--scores", help="networks that score pictures, as in jdm evaluate (default: the scale's own)")
    parser.add_argument("--device", help="device to compute on (default: cpu at scale nano, cuda at sd15)")
    parser.add_argument("--known", action="append", default=[], metavar="PAGE.json", help="earlier page whose cells "
                        "are reused if recipe, pictures and measurements agree; repeatable")
    parser.add_argument("--quick", action="store_true", help="measure faster and less precisely: one feature "
                        "extractor, fewer draws and timings")
    parser.add_argument("--dry-run", "--list", action="store_true", dest="dry_run",
                        help="only list the cells: which are filled, and what the others would cost")
    parser.add_argument("--no-run", action="store_true", help="write the page from the cells that are already filled")


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", type=Among(DATA_SETS), help="data set to make: emoji")
    parser.add_argument("out", metavar="OUT", help="folder to write shards, NOTICE.txt and data.json to; the emoji "
                        "recipes look in data/emoji. Downloaded packages are kept in its sub-folder packages")
    parser.add_argument("--size", type=side, default=64, help="side of the pictures in pixels, in [1, 4096]")
    parser.add_argument("--drawings", type=drawings, default=4, help="drawings of each training picture, in [1, 100]: "
                        "one as it is, the others shifted, turned, smaller or mirrored")


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="folder to write report.html, "
                        "metrics.json, grid.png and the trained student to")
    parser.add_argument("--steps", type=positive, default=300, help="training steps of the fresh student, at least 1")
    parser.add_argument("--n", type=positive, default=500, help="number of pictures per measurement")
