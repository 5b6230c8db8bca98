"""Measurements of a model: distance, consistency, diversity, prompt agreement, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from jdm.controls import Control, checked, load_control
from jdm.data.sources import AS_USUAL, Pictures, load_pictures
from jdm.errors import UsageError
from jdm.evaluation.questions import Questions, answers, compared_of, controls_of, in_parts
from jdm.evaluation.reference import SAMPLES, Reference, references
from jdm.evaluation.sampling import Sampler, warn_of_misfit
from jdm.files import ASSETS
from jdm.generator import Generator, starting_noise
from jdm.library import SHIPPED, load_model
from jdm.metrics.consistency import Consistency, chance, consistency
from jdm.metrics.diversity import Diversity, diversity
from jdm.metrics.extractors import ClassifierFeatures, EffLite0, Extractor
from jdm.metrics.fid import Inception
from jdm.metrics.frechet import Statistics, frechet_distance
from jdm.metrics.prompts import prompt_agreement
from jdm.metrics.scores import chosen as chosen_prompts
from jdm.metrics.scores import scores
from jdm.metrics.spread import bootstrap, frechet_bootstrap
from jdm.metrics.timing import peak_memory_mb, seconds_per_image
from jdm.models.classifier import Classifier
from jdm.models.family import Family
from jdm.rewards.classifier import PromptClassifier, nano_judge
from jdm.run import Data, Run
from jdm.size import size_of
from jdm.space import from_bytes, to_bytes, unit

FASHION = "fashion-mnist"
EXTRACTORS: dict[str, Callable[..., Extractor]] = {"inception": Inception}  # in addition to those of every evaluation
DIVERSITY_GROUPS, DIVERSITY_DRAWS = 64, 8
PROBE_SAMPLES = 1000  # samples of the reference that a probe makes for a teacher without a shipped one


@cache
def judge() -> Classifier:
    """The shipped classifier of Fashion-MNIST, trained on real training pictures only."""
    return Classifier.load(ASSETS / "nano-classifier")


@cache
def emoji_judge() -> Classifier | None:
    """The classifier of emoji by style and group, trained on real training pictures only; None if it is not shipped."""
    folder = ASSETS / "emoji-classifier"
    return Classifier.load(folder) if folder.is_dir() else None


def judge_of(source: str) -> Classifier | None:
    """The classifier of a source's pictures; None where there is none."""
    return judge() if source == FASHION else emoji_judge() if source == "emoji" else None


@cache
def second_judge() -> PromptClassifier | None:
    """nano-judge, a classifier that no run is trained on; None if it is not shipped."""
    return nano_judge() if (ASSETS / "nano-judge").is_dir() else None


def evaluate(
    model: str,
    control: str | None = None,
    n: int = 1000,
    seed: int = 0,
    source: str = "fashion-mnist",
    split: str = "test",
    steps: int | None = None,
    guidance: float | None = None,
    teacher: str = "nano-sd",
    quick: bool = False,
    scored: Sequence[str] = (),
    also: Sequence[str] = (),
    device: str | torch.device = "cpu",
    how: Data = AS_USUAL,
) -> dict[str, Any]:
    """All measurements of a model on the first n pictures of a split.

    Args:
        control: name or import path; by default the control the model was trained with.
        steps, guidance: for multi-step models; by default 50, and the model card's guidance or else 2.
        teacher: distances are measured to its uncontrolled samples.
        quick: use only the first extractor, fewer draws for diversity and fewer timings.
        scored: rewards that score pictures for their prompts, as in `metrics.scores`.
        also: further extractors, as in `extractors`.
        how: its fields say what are pictures, captions and control maps, where that is not plain.

    Returns:
        fd, fd_floor, fd_extractor (and those of a second extractor), consistency and its anchors, diversity,
        prompt_agreement, judge (in nats) and judge_accuracy, nfe, seconds_per_image at batch 64 and 1,
        peak_memory_mb, n, a score by each of `scored`, bootstrap errors as NAME_spread, and the arguments; left_out and
        unreadable where something of the source was not read.
    """
    loaded = load_model(model).to(device)
    card = loaded.card or {}
    pictures = load_pictures(source, split, loaded.size, how)
    warn_of_misfit(model, loaded, pictures)
    spec = control or card.get("control")
    if spec and loaded.controlnet is None:
        raise UsageError(f"{model} has no ControlNet; evaluate it without --control")
    asked = checked(load_control(spec), loaded.size) if spec else None
    if how.controls and asked is None:
        raise UsageError(f"--data.controls {how.controls} gives control maps, and {model} has no ControlNet; leave it "
                         "out")
    if loaded.controlnet is not None and asked is None:
        raise UsageError(f"{model} has a ControlNet; name its control with --control")
    sampler = sampler_of(loaded, steps, guidance)
    questions = Questions.of(pictures, asked, n, seed, device)
    chosen = extractors(source, quick, also, device)
    whole = load_pictures(source, "test", loaded.size, how)
    row = {"model": model, "control": spec, "split": pictures.source, "seed": seed, **_run_as(sampler),
           "method": card.get("method"), **_cut(sampler, questions.y), **_unseen(pictures)}
    made = answers(sampler, questions, asked)
    row |= measured(made, questions, asked, references(teacher, chosen, whole, device=device), chosen, sampler, quick)
    row |= cost(sampler, questions, asked, repeats=1 if quick else 3)
    return row | scores(scored, made, questions.y, device, taken=row)


def evaluate_prompts(model: str, prompts: Mapping[str, list[str]], scored: Sequence[str], n: int = 800, seed: int = 0,
                     steps: int | None = None, guidance: float | None = None,
                     device: str | torch.device = "cpu") -> dict[str, Any]:
    """Scores of a text-to-image model on the first n prompts of each style (`metrics.scores.read_prompts`).

    Raises:
        UsageError: the model has a ControlNet, or `scored` is empty.
    """
    loaded = load_model(model).to(device)
    if loaded.controlnet is not None:
        raise UsageError(f"{model} has a ControlNet, and prompts alone give it no control; evaluate it on pictures")
    if not scored:
        raise UsageError("prompts without pictures need scores; name them: --scores clip,hpsv2,aesthetic")
    sampler = sampler_of(loaded, steps, guidance)
    asked, styles = chosen_prompts(prompts, n)
    made = sampler(starting_noise(loaded.latent_shape(len(asked), loaded.size), seed), asked, seed=seed)
    row = {"model": model, "seed": seed, **_run_as(sampler), **_cut(sampler, asked), "n": len(asked),
           "nfe": sampler.nfe}
    return row | scores(scored, made, asked, device, styles, taken=row)


def _unseen(pictures: Pictures) -> dict[str, int]:
    """How much of a source was left out by its layout, and how many pictures could not be read, where any."""
    left = sum(each.count for each in pictures.report.left_out.values())
    found = {"left_out": left, "unreadable": len(pictures.unread.found)}
    return {name: count for name, count in found.items() if count}


def _cut(sampler: Sampler, prompts: Sequence[str]) -> dict[str, int]:
    """How many prompts are too long for the model's text encoder, where any is."""
    cut = len(sampler.text.overlong(prompts))
    return {"prompts_cut": cut} if cut else {}


def sampler_of(model: Family, steps: int | None = None, guidance: float | None = None) -> Sampler:
    """Fills in what was not given: a student's own steps, 50 for other models; the guidance of the card, or 2."""
    own = float((model.card or {}).get("guidance", 2.0))
    return Sampler(model, steps, own if guidance is None else guidance)


def _run_as(sampler: Sampler) -> dict[str, Any]:
    guided = sampler.steps > 1 and not sampler.model.levels
    return {"steps": sampler.steps, "guidance": sampler.guidance if guided else None}


def extractors(source: str, quick: bool = False, also: Sequence[str] = (),
               device: str | torch.device = "cpu") -> list[Extractor]:
    """Feature extractors for distances. `fd` uses the first: the shipped classifier if it was trained on the data.

    Args:
        also: "inception", or "inception:FILE" with its weights, for FID. It comes first if the classifier was not
            trained on the data.
    """
    own = judge_of(source)
    known: list[Extractor] = [ClassifierFeatures(own)] if own else []
    more = [EXTRACTORS[name](weights, device) for name, _, weights in (spec.partition(":") for spec in _checked(also))]
    if quick and (known or more):
        return [*known, *more]
    return [*known, *more, EffLite0(device, batch=4 if torch.device(device).type == "cpu" else 256)]


def _checked(also: Sequence[str]) -> Sequence[str]:
    for spec in also:
        if spec.partition(":")[0] not in EXTRACTORS:
            raise UsageError(f"there is no extractor {spec!r}; the known ones are {', '.join(EXTRACTORS)}")
    return also


def measured(
    pictures: Tensor,
    questions: Questions,
    control: Control | None,
    targets: dict[str, Reference],
    chosen: list[Extractor],
    sampler: Sampler,
    quick: bool = False,
) -> dict[str, Any]:
    """Measurements of uint8 pictures [N, 3, H, W]; the first extractor gives `fd`, others `fd_NAME`."""
    row: dict[str, Any] = {"n": len(pictures)}
    for place, extractor in enumerate(chosen):
        suffix = "" if place == 0 else f"_{extractor.name.split('-')[0]}"
        features = extractor.features(pictures)
        target = targets[extractor.name]
        distance = frechet_distance(Statistics.of(features, extractor.name), target.statistics)
        row |= {f"fd{suffix}": distance, f"fd_floor{suffix}": target.floor(len(pictures)),
                f"fd_extractor{suffix}": extractor.name}
        if place == 0 and features.shape[1] < 512:  # wider features take seconds per draw
            row["fd_spread"] = frechet_bootstrap(features, target.statistics)[1]
    if control is not None and questions.c is not None:
        row |= _consistency(pictures, questions, control, sampler)
    own = judge_of(questions.source)
    if own and questions.labels is not None:
        agreed = prompt_agreement(own, pictures, questions.labels)
        row |= {"prompt_agreement": agreed, "prompt_agreement_spread": (agreed * (1 - agreed) / len(pictures)) ** 0.5}
        row |= _judged(pictures, questions, questions.labels)
    differing = noise_diversity(sampler, questions, control, chosen[0], 16 if quick else DIVERSITY_GROUPS)
    row |= {"diversity": differing.mean, "diversity_spread": bootstrap(differing.per_group)[1]}
    return row | {"nfe": sampler.nfe} | _std(pictures)


def cost(sampler: Sampler, questions: Questions, control: Control | None, batches: tuple[int, ...] = (64, 1),
         repeats: int = 3) -> dict[str, Any]:
    """Seconds per picture from prompt and control to pixels, at each batch size, and peak memory in MiB."""
    row: dict[str, Any] = {}
    for batch in batches:
        part = questions.head(min(batch, len(questions)))

        def once(part: Questions = part) -> Tensor:
            sampler.text.forget()
            return answers(sampler, part, control)

        key = "seconds_per_image" if batch != 1 else "seconds_per_image_batch1"
        row[key] = seconds_per_image(once, len(part), repeats)
    device = next(sampler.net.parameters()).device
    return row | {"peak_memory_mb": peak_memory_mb(device), "device": str(device), "threads": torch.get_num_threads()}


def noise_diversity(sampler: Sampler, questions: Questions, control: Control | None, extractor: Extractor,
                    groups: int = DIVERSITY_GROUPS, draws: int = DIVERSITY_DRAWS) -> Diversity:
    """Diversity over z at fixed (y, c): mean pairwise feature distance."""
    part = questions.head(min(groups, len(questions)))
    z = starting_noise(sampler.model.latent_shape(len(part) * draws, size_of(part.images)), part.seed + 1)
    y = [caption for caption in part.y for _ in range(draws)]
    shown = None
    if control is not None and part.c is not None:
        shown = control.image(part.c).repeat_interleave(draws, 0)
    features = extractor.features(sampler(z, y, shown, seed=part.seed + 1))
    return diversity(features.view(len(part), draws, -1))


def _std(pictures: Tensor) -> dict[str, float]:
    """std of the pixels in [-1, 1] over all pictures, with its bootstrap error."""
    pixels = from_bytes(pictures).flatten(1).double()
    means, squares = pixels.mean(1), pixels.square().mean(1)

    def std(rows: Tensor) -> float:
        return float((squares[rows].mean() - means[rows].mean() ** 2).clamp(min=0).sqrt())

    return {"std": float(pixels.std()), "std_spread": bootstrap(std, len(pixels))[1]}


@torch.no_grad()
def _judged(pictures: Tensor, questions: Questions, labels: Tensor) -> dict[str, float]:
    """nano-judge's mean log-probability of the prompted class, in nats, and its prompt agreement; {} without it."""
    other = second_judge() if questions.source == FASHION else None
    if other is None:
        return {}
    parts = torch.arange(len(pictures)).split(250)
    said = [other(unit(from_bytes(pictures[rows])), [questions.y[int(i)] for i in rows]) for rows in parts]
    return {"judge": torch.cat(said).mean().item(),
            "judge_accuracy": prompt_agreement(other.classifier, pictures, labels)}


@torch.no_grad()
def _consistency(pictures: Tensor, questions: Questions, control: Control, sampler: Sampler) -> dict[str, float]:
    assert questions.c is not None
    device = next(sampler.net.parameters()).device
    c = compared_of(control, questions.c, device)
    seen = compared_of(control, controls_of(control, unit(from_bytes(pictures)), device), device)
    space = sampler.model.space
    back = [to_bytes(space.decode(space.encode(part.to(device) * 2 - 1))).cpu() for part in in_parts(questions.images)]
    trip = compared_of(control, controls_of(control, unit(from_bytes(torch.cat(back))), device), device)
    anchors = Consistency.of(control, c, seen, size_of(pictures), trip)
    spread = bootstrap(consistency(c, seen, control))[1]
    row = {"consistency": anchors.value, "consistency_spread": spread, "consistency_chance": anchors.chance,
           "consistency_blank": anchors.blank, "consistency_round_trip": anchors.round_trip or 0.0}
    ignoring = chance(c, seen, prompts=questions.y, control=control)
    if len(ignoring) > 1:  # pictures with captions of their own have nobody to be compared with
        row |= {"consistency_same_prompt": float(ignoring.mean()),
                "consistency_same_prompt_spread": bootstrap(ignoring)[1]}
    return row


def validation_probe(run: Run, control: Control | None, held_out: Pictures, whole: Pictures, teacher: Family,
                     generator: Callable[[], Generator], n: int = 500
                     ) -> Callable[[dict[str, nn.Module]], dict[str, float]] | None:
    """A function that measures distance, consistency and agreement of the averaged student on n validation pictures.

    Returns None if the data has fewer than two validation pictures, or fewer than two test pictures.

    Args:
        held_out: the validation pictures.
        whole: the test pictures, on whose prompts the reference is sampled.
        generator: the student's generator, as it is when it is measured.
    """
    if len(held_out) < 2 or len(whole) < 2:
        return None  # a folder too small to spare the two that a covariance needs
    extractor = extractors(run.data.source)[0]

    @cache
    def target() -> Statistics:
        samples = SAMPLES if run.model in SHIPPED else PROBE_SAMPLES
        return references(run.model, [extractor], whole, samples=samples, device=run.device)[extractor.name].statistics

    def probe(_: dict[str, nn.Module]) -> dict[str, float]:
        questions = Questions.of(held_out, control, min(n, len(held_out)), 0, run.device)
        sampler = Sampler(teacher, generator=generator())
        pictures = answers(sampler, questions, control)
        own = Statistics.of(extractor.features(pictures), extractor.name)
        row = {"fd": frechet_distance(own, target())}
        if control is not None and questions.c is not None:
            seen = controls_of(control, unit(from_bytes(pictures)), run.device)
            c, seen = (compared_of(control, maps, run.device) for maps in (questions.c, seen))
            row["consistency"] = consistency(c, seen, control).mean().item()
        own = judge_of(questions.source)
        if own and questions.labels is not None:
            row["prompt_agreement"] = prompt_agreement(own, pictures, questions.labels)
            row |= _judged(pictures, questions, questions.labels)
        return row

    return probe
