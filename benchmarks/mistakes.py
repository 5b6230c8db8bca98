"""Plausible mistakes in the method's law and its measurements, and for each the test that fails for it.

    python benchmarks/mistakes.py [--only WORDS]

Makes each mistake in a scratch copy of the source, by replacing one piece of text, and runs its test there: the test
must fail, and pass without the mistake. benchmarks/robustness.py writes the table of them into docs/robustness.md;
tests/benchmarks/test_mistakes.py checks that each piece of text and each test is still there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imported once, before a process is forked for each mistake.
SLOW = ("torch", "datasets", "cv2", "scipy", "peft", "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")


@dataclass(frozen=True)
class Mistake:
    """`before` in src/jdm/`file` becomes `after`.

    Attributes:
        what: the mistake, in words.
        test: FILE::NAME below tests, which fails for it.
    """

    what: str
    file: str
    before: str
    after: str
    test: str


STEP, ENGINE = "methods/test_step.py", "methods/test_engine.py"
EVALUATE, REFERENCE = "evaluation/test_evaluate.py", "evaluation/test_reference.py"
ONE_PICTURE = f"{STEP}::test_prompt_picture_and_control_are_one_pictures"
OF = "unit(from_bytes(images)).to(run.device)"
MISTAKES = (
    Mistake("a distillation's control map is of the mirrored picture", "methods/step.py",
            "control_of(control, self.images, maps, luck)", "control_of(control, self.images.flip(3), maps, luck)",
            ONE_PICTURE),
    Mistake("a distillation's control map is of another picture", "methods/step.py",
            "control_of(control, self.images, maps, luck)", "control_of(control, self.images.roll(1, 0), maps, luck)",
            ONE_PICTURE),
    Mistake("a multi-step ControlNet's control map is of the mirrored picture", "methods/controlnet.py",
            f"{OF}, maps, luck", f"{OF}.flip(3), maps, luck", ONE_PICTURE),
    Mistake("a denoised one-step ControlNet's control map is of the mirrored picture", "methods/dsm_controlnet.py",
            f"{OF}, maps", f"{OF}.flip(3), maps", ONE_PICTURE),
    Mistake("noise consistency's control map is of the mirrored sample", "methods/nct.py",
            "decode(x)).clamp(0, 1)", "decode(x)).clamp(0, 1).flip(3)",
            f"{STEP}::test_noise_consistency_measures_clamped_unmirrored_samples"),
    Mistake("the student is shown the mirrored map, the likelihood the right one", "methods/step.py",
            "control.image(self.c)", "control.image(self.c).flip(3)",
            f"{STEP}::test_student_and_likelihood_see_one_control"),
    Mistake("an evaluation's control map is of the mirrored picture", "evaluation/questions.py",
            "controls_of(control, images, device))", "controls_of(control, images.flip(3), device))",
            f"{EVALUATE}::test_prompt_and_control_come_from_one_picture"),
    Mistake("the condition term's own levels reuse the fidelity's random numbers", "methods/step.py",
            "step.noised(levels.stream,", 'step.noised("generator",',
            f"{ENGINE}::test_each_term_has_its_own_stream_and_lambda"),
    Mistake("the condition term uses the fidelity's lambda", "terms.py",
            "lambda_t(self.lambda_t, at", 'lambda_t(at.of.terms["fidelity"].lambda_t, at',
            f"{ENGINE}::test_each_term_has_its_own_stream_and_lambda"),
    Mistake("every term is held to the last term's bound", "directions.py",
            "bounds[name] * length", "[*bounds.values()][-1] * length",
            f"{ENGINE}::test_each_term_is_held_to_its_own_bound"),
    Mistake("gradients are clipped by the last group's norm", "training/trainer.py",
            "get_total_norm(present)", "get_total_norm(present[-1:])",
            "training/test_loop.py::test_the_bound_is_on_all_groups_together"),
    Mistake("the student's gradient is clipped by the fake score's bound", "methods/engine.py",
            "clip=self.student.clip", "clip=self.fake.clip",
            f"{ENGINE}::test_each_phase_has_its_own_bound_and_rate"),
    Mistake("the posterior is trained without the prompt", "methods/engine.py",
            "step.x, step.y, uniform, eps", 'step.x, [""] * len(step.x), uniform, eps',
            f"{ENGINE}::test_the_posterior_trains_on_prompts_and_samples"),
    Mistake("the frozen posterior is trained without the prompt", "methods/posterior_training.py",
            "batch.x, batch.y, uniform", 'batch.x, [""] * len(batch.x), uniform',
            "methods/test_posterior_training.py::test_the_frozen_posterior_trains_on_prompts"),
    Mistake("every repeat of the fake score's phase has the same noise", "methods/engine.py",
            'f"fake/{repeat}"', '"fake/0"', f"{ENGINE}::test_each_fake_repeat_has_noise_of_its_own"),
    Mistake("the loop asks every repeat of a phase as the first", "training/trainer.py",
            "phase.loss(parts[turn], repeat)", "phase.loss(parts[turn], 0)",
            "training/test_loop.py::test_a_repeated_phase_shares_batch_not_noise"),
    Mistake("averages forget buffers", "training/averages.py",
            "average[name].copy_(now[name])", "pass",
            "training/test_averages.py::test_buffers_are_copied_and_parameters_averaged"),
    Mistake("diversity is measured with another control for every sample of a group", "evaluation/evaluate.py",
            "repeat_interleave(draws, 0)", "repeat(draws, 1, 1, 1)",
            f"{EVALUATE}::test_diversity_varies_noise_alone_within_a_group"),
    Mistake("diversity is measured on the noise of the pictures", "evaluation/evaluate.py",
            "size_of(part.images)), part.seed + 1)", "size_of(part.images)), part.seed)",
            f"{EVALUATE}::test_diversity_varies_noise_alone_within_a_group"),
    Mistake("the floor is that of another number of pictures", "evaluation/evaluate.py",
            "target.floor(len(pictures))", "target.floor(1000)", f"{EVALUATE}::test_the_floor_is_that_of_n_pictures"),
    Mistake("every floor is that of the whole second set", "evaluation/reference.py",
            "Statistics.of(others[:k],", "Statistics.of(others,",
            f"{REFERENCE}::test_floors_are_the_second_sets_first_n"),
    Mistake("an evaluation reads a guidance of 0 as none given", "evaluation/evaluate.py",
            "own if guidance is None else guidance", "guidance or own", f"{EVALUATE}::test_a_guidance_of_zero_is_one"),
    Mistake("a term's guidance of 0 is read as none given", "methods/step.py",
            "self.of.guidance if guidance is None else guidance", "guidance or self.of.guidance",
            f"{ENGINE}::test_the_teacher_is_asked_at_each_terms_guidance"),
    Mistake("an evaluation's reference is of the split that is evaluated", "evaluation/evaluate.py",
            'whole = load_pictures(source, "test",', "whole = load_pictures(source, split,",
            f"{REFERENCE}::test_a_validation_split_keeps_the_test_reference"),
    Mistake("a probe's reference is of the validation pictures", "evaluation/evaluate.py",
            "references(run.model, [extractor], whole,", "references(run.model, [extractor], held_out,",
            f"{REFERENCE}::test_a_probe_compares_with_the_test_prompts"),
    Mistake("a run's probe is given another split than the test's", "methods/networks.py",
            'loaded.split("test")', "loaded.held_out", f"{REFERENCE}::test_a_run_probes_with_the_test_split"),
    Mistake("noise consistency's control is measured on unclamped samples", "methods/nct.py",
            "decode(x)).clamp(0, 1)", "decode(x))",
            f"{STEP}::test_noise_consistency_measures_clamped_unmirrored_samples"),
    Mistake("noise consistency's multiplier moves once for every part of a batch", "methods/nct.py",
            "return torch.stack(kept).sum(), {",
            'self.dual_step(multiplier, {"boundary_loss": bound.detach()})\n        return torch.stack(kept).sum(), {',
            "training/test_accumulation.py::test_the_multiplier_moves_once_a_step"),
)


def table() -> str:
    """The mistakes and their tests, in Markdown."""
    rows = "".join(f"| {each.what} | `{each.test.rpartition('::')[2]}` |\n" for each in MISTAKES)
    return f"| mistake | the test that fails for it |\n|---|---|\n{rows}"


def ended(copy: Path, tests: Iterable[str]) -> int:
    """The exit code of tests in the copy, in a process that has torch and diffusers, and this package not yet."""
    log = copy / "log"
    child = os.fork()
    if not child:
        os.chdir(copy)
        sys.path.insert(0, str(copy / "src"))
        sys.dont_write_bytecode = True
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os._exit(pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):  # no test ran
        print(log.read_text()[-2000:])
    return code


def caught(mistake: Mistake, copy: Path) -> bool:
    """Makes the mistake in the copy, and says whether its test fails; the copy is afterwards as before."""
    file = copy / "src" / "jdm" / mistake.file
    whole = file.read_text()
    file.write_text(whole.replace(mistake.before, mistake.after))
    code = ended(copy, [mistake.test])
    file.write_text(whole)
    return code == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words of the mistakes to make (default: all)")
    for name in SLOW:
        importlib.import_module(name)
    chosen = [each for each in MISTAKES if parser.parse_args().only in each.what]
    missed = []
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
        (copy / "src" / "jdm" / "assets").symlink_to(ROOT / "src" / "jdm" / "assets")
        shutil.copy(ROOT / "pyproject.toml", copy)
        if ended(copy, dict.fromkeys(each.test for each in chosen)):
            raise SystemExit("the tests fail without a mistake; run them with pytest")
        for each in chosen:
            found = caught(each, copy)
            print(f"{'caught' if found else 'MISSED'}  {each.what}: {each.test}", flush=True)
            missed += [] if found else [each]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
