"""Rewards: loaded by name or file, checked before they are trained on; the shipped one and its judge."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jdm.data.sources import FASHION_CLASSES, load_pictures
from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.metrics.prompts import prompt_agreement
from jdm.models.classifier import Classifier, ClassifierConfig
from jdm.recipes import all_recipes, recorded
from jdm.rewards import PromptClassifier, checked_reward, load_reward, reward_name
from jdm.rewards.base import NAMED
from jdm.rewards.classifier import fashion_captions, nano_reward
from jdm.space import from_bytes, unit

PROMPTS = ["a coat", "one ankle boot"]
CAPTIONS = (("dark", "a dark picture"), ("bright",))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(trunk: str = "convolutions", **changes) -> Classifier:
    """Untrained, with statistics and weights off their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (4, 6, 6) if trunk == "mixer" else (4, 4, 6, 6)
        model = Classifier(ClassifierConfig(trunk=trunk, widths=widths, dimensions=5, **changes))  # type: ignore[arg-type]
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32) * 2 - 1)
    return model.eval()


def brightness(images: Tensor, prompts) -> Tensor:
    return images.mean((1, 2, 3))


# load_reward


MINE = """
from jdm.errors import UsageError
def brightness(images, prompts): return images.mean((1, 2, 3))
class Contrast:
    name = "contrast"
    def __call__(self, images, prompts): return images.flatten(1).std(1)
class Needy:
    def __init__(self, k): pass
class Silent: pass
class Refusing:
    def __init__(self): raise UsageError("needs this and that")
made = Contrast()
number = 3
"""


def test_functions_classes_and_objects_can_be_rewards(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    for name, expected in (("brightness", images.mean((1, 2, 3))), ("Contrast", images.flatten(1).std(1)),
                           ("made", images.flatten(1).std(1))):
        reward = load_reward(f"{tmp_path / 'mine.py'}:{name}")
        assert checked_reward(reward, 8, PROMPTS) is reward
        assert torch.equal(reward(images, PROMPTS), expected)
        assert reward_name(reward) == {"made": "contrast"}.get(name, name.lower())


def test_known_rewards_load_by_name_and_place(tmp_path):
    assert reward_name(load_reward("nano-reward")) == "nano-reward"
    assert reward_name(load_reward("nano-judge")) == "nano-judge"
    tiny(name="my-clothes").save(tmp_path)
    assert reward_name(load_reward(f"nano-reward:{tmp_path}")) == "my-clothes"
    assert load_reward("jdm.rewards.classifier:nano_reward") is nano_reward


@pytest.mark.parametrize(("spec", "message"), [
    ("nano-rewrd", "no reward 'nano-rewrd'; did you mean 'nano-reward'"),
    ("zzz", "the known ones are nano-reward, nano-judge, clip, pick-score, hpsv2, aesthetic, image-reward"),
    ("hpsv3:weights.pt", "no reward 'hpsv3'; did you mean hpsv2:weights.pt"),
    ("nano-reward:", r"there is no reward 'nano-reward:'.*my_rewards\.py:brightness"),
    ("nano-reward:{folder}", r"holds no config\.json"),
    ("{file}", "name your own by file and function"),
    ("{folder}/none.py:it", r"there is no file .*none\.py"),
    ("{file}:brigthness", "no function or class brigthness; did you mean brightness"),
    ("{file}:zzz", "it defines: brightness, Contrast, Needy, Silent, Refusing"),
    ("{file}:Needy", r"without arguments .TypeError.*default"),
    ("{file}:Silent", r"is not a reward but Silent; write `def Silent.images, prompts.`"),
    ("{file}:number", "is not a reward but int"),
    ("{file}:Refusing", "^needs this and that$"),
    ("{folder}/raises.py:it", r"raises\.py could not be run .ZeroDivisionError: "),
    ("no.such.package:it", r"could not be imported .ModuleNotFoundError"),
])
def test_an_unloadable_reward_is_refused_in_one_line(spec, message, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "raises.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=message) as caught:
        load_reward(spec.format(file=tmp_path / "mine.py", folder=tmp_path))
    assert "\n" not in str(caught.value)


# checked_reward


def test_good_rewards_pass_the_check_under_no_grad():
    for reward in (brightness, PromptClassifier(tiny()), PromptClassifier(tiny("mixer"))):
        with torch.no_grad():
            assert checked_reward(reward, 32, PROMPTS[:1]) is reward


@pytest.mark.parametrize(("reward", "message"), [
    (lambda x, p: x.mean(), r"one value per picture, \[2\] here, got \[\]; sum or average"),
    (lambda x, p: x.mean((2, 3)), r"\[2\] here, got \[2, 3\]"),
    (lambda x, p: None, "got NoneType"),
    (lambda x, p: x.amin((1, 2, 3)).log(), r"must be finite, got \[.*guard its divisions and logarithms"),
    (lambda x, p: x.mean((1, 2, 3)) * float("nan"), r"must be finite, got \[nan, nan\]"),
    (lambda x, p: x.detach().mean((1, 2, 3)), r"no gradient with respect to the picture; keep its operations"),
    (lambda x, p: torch.ones(2, requires_grad=True), "cannot be differentiated with respect to the picture"),
    (lambda x, p: x.round().mean((1, 2, 3)), "'s gradient is 0 at every pixel"),
    (lambda x, p: x.sqrt().mean((1, 2, 3)), "'s gradient must be finite.*small constant"),
    (lambda x, p: torch.tensor(x.numpy().mean((1, 2, 3))), r"failed on two random pictures .RuntimeError"),
    (lambda x: x.mean((1, 2, 3)), r"failed on two random pictures .TypeError.*and B prompts"),
])
def test_a_bad_reward_is_refused_with_a_remedy(reward, message):
    reward.__name__ = "mine"
    with pytest.raises(UsageError, match=message) as caught:
        checked_reward(reward, 16, PROMPTS)
    assert "\n" not in str(caught.value)
    assert "mine" in str(caught.value)


def test_a_judge_measures_but_is_never_trained_on():
    judge = PromptClassifier(tiny(name="my-judge"), judge=True)
    assert judge(torch.rand(2, 3, 32, 32), PROMPTS).shape == (2,)
    with pytest.raises(UsageError, match="my-judge judges runs trained on other rewards"):
        checked_reward(judge, 32, PROMPTS)
    with pytest.raises(UsageError, match="at least 1 prompt"):
        checked_reward(brightness, 32, [])


# PromptClassifier


def test_every_caption_names_its_class_and_only_that():
    reward = PromptClassifier(tiny())
    captions = fashion_captions()
    assert len(captions) == len(FASHION_CLASSES) == 10
    for k, own in enumerate(captions):
        assert reward.labels(own).tolist() == [k] * len(own)
        assert reward.labels([f"  {c.upper()}. " for c in own]).tolist() == [k] * len(own)
    assert len(reward.classes) == sum(map(len, captions))
    pictures = load_pictures("fashion-mnist", "test[:300]", 32)
    rows = torch.arange(300)
    prompts = pictures.prompts(rows, torch.rand(300, generator=seeded()))
    assert torch.equal(reward.labels(prompts), pictures.label(rows))


@pytest.mark.parametrize(("prompt", "near"), [("a phto of a coat", "a photo of a coat"), ("", "")])
def test_an_unknown_prompt_names_the_nearest_caption(prompt, near):
    reward = PromptClassifier(tiny())
    with pytest.raises(UsageError, match=f"no class for the prompt '{prompt}'.*such as '{near}"):
        reward(torch.rand(2, 3, 32, 32), ["a coat", prompt])


def test_prompts_and_captions_must_fit_in_number():
    with pytest.raises(UsageError, match="one prompt for each of 3 images, got 2"):
        PromptClassifier(tiny())(torch.rand(3, 3, 32, 32), PROMPTS)
    with pytest.raises(UsageError, match="captions of 2 classes, got 10"):
        PromptClassifier(tiny(classes=2))
    assert PromptClassifier(tiny(classes=2), CAPTIONS).labels(["Bright", "a dark picture"]).tolist() == [1, 0]


@pytest.mark.parametrize("trunk", ["convolutions", "mixer"])
def test_the_reward_is_the_prompts_log_probability(trunk):
    classifier = tiny(trunk)
    images = torch.rand(3, 3, 32, 32, generator=seeded())
    prompts, labels = ["a bag", "one boot", "bag"], [8, 9, 8]
    expected = classifier(2 * images - 1).softmax(1)[torch.arange(3), torch.tensor(labels)].log()
    reward = PromptClassifier(classifier)
    assert torch.allclose(reward(images, prompts), expected, atol=1e-6)
    assert torch.allclose(reward(images[1:2], prompts[1:2]), expected[1:2], atol=1e-6)  # each picture alone
    assert reward(images.bfloat16(), prompts).dtype == torch.float32


@pytest.mark.parametrize(("trunk", "side"), [("convolutions", 8), ("mixer", 32)])
def test_the_reward_passes_gradcheck(trunk, side):
    reward = PromptClassifier(tiny(trunk, classes=2).double(), CAPTIONS)
    images = torch.rand(2, 3, side, side, generator=seeded(), dtype=torch.float64).requires_grad_()
    fast = side > 8  # 6,144 pixels: along random directions
    assert torch.autograd.gradcheck(lambda x: reward(x, ["dark", "bright"]), images, fast_mode=fast)
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_mixer_survives_saving_and_refuses_bad_input(tmp_path):
    model = tiny("mixer", name="mixed")
    model.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert (loaded.config, loaded.fingerprint()) == (model.config, model.fingerprint())
    with pytest.raises(UsageError, match=r"32x32 for a mixer, got \[16, 16\]"):
        model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UsageError, match="widths of a mixer must be equal after the first"):
        Classifier(replace(model.config, widths=(4, 6, 8)))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("mixer", "forest"))
    with pytest.raises(UsageError, match="trunk: invalid enum value 'forest'"):
        Classifier.load(tmp_path)


# What ships


def accuracy(classifier: Classifier, expression: str = "test[:1000]") -> float:
    pictures = load_pictures("fashion-mnist", expression, 32)
    rows = torch.arange(len(pictures))
    labels = pictures.label(rows)
    assert labels is not None
    return prompt_agreement(classifier, pictures.batch(rows), labels)


def test_the_shipped_classifier_is_unchanged():
    assert Classifier.load(ASSETS / "nano-classifier").fingerprint() == "45a9efd8"


@pytest.mark.parametrize("name", ["nano-reward", "nano-judge"])
def test_the_reward_and_the_judge_know_clothes(name):
    reward = load_reward(name)
    assert isinstance(reward, PromptClassifier)
    assert accuracy(reward.classifier) >= 0.88  # over 10,000: 0.925 and 0.904
    pictures = load_pictures("fashion-mnist", "test[1000:1100]", 32)
    rows = torch.arange(100)
    prompts = pictures.prompts(rows, torch.rand(100, generator=seeded()))
    images = unit(from_bytes(pictures.batch(rows)))
    assert reward(images, prompts).mean() > reward(images, prompts[1:] + prompts[:1]).mean() + 1  # nats
    files = [f for f in (ASSETS / name).rglob("*") if f.is_file()]
    assert max(f.stat().st_size for f in files) <= 2_000_000


def test_reward_and_judge_share_no_training_pictures():
    """The two are different networks, too."""
    reward, judge = load_reward("nano-reward"), load_reward("nano-judge")
    assert isinstance(reward, PromptClassifier)
    assert isinstance(judge, PromptClassifier)
    assert (reward.classifier.config.trunk, judge.classifier.config.trunk) == ("convolutions", "mixer")
    assert (reward.judge, judge.judge) == (False, True)
    whole = replace(load_pictures("fashion-mnist", "test[:1]", 32), indices=torch.arange(55_000))
    seen = {}
    for name, made in (("nano-reward", reward), ("nano-judge", judge)):
        run, record = all_recipes()[name](), recorded(ASSETS / name / "training" / f"{name}.json")
        assert run.data.split == record.data.split  # the recipe is what made the asset
        assert run.method.config == record.method.config == made.classifier.config
        assert run.data.split.startswith("train[")
        assert run.data.validation == "validation"
        seen[name] = set(whole.part(run.data.split.removeprefix("train")).indices.tolist())
    assert seen["nano-reward"].isdisjoint(seen["nano-judge"])
    assert sum(map(len, seen.values())) == 55_000


def test_fooling_the_reward_does_not_fool_the_judge():
    reward, judge = load_reward("nano-reward"), load_reward("nano-judge")
    assert isinstance(reward, PromptClassifier)
    assert isinstance(judge, PromptClassifier)
    pictures = load_pictures("fashion-mnist", "test[:64]", 32)
    rows, bound = torch.arange(64), 32 / 255
    start = unit(from_bytes(pictures.batch(rows)))
    labels = pictures.label(rows)
    assert labels is not None
    wanted = (labels + torch.randint(1, 10, (64,), generator=seeded())) % 10
    prompts, images = [fashion_captions()[k][0] for k in wanted.tolist()], start
    for _ in range(12):
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        step = gradient.mean(1, keepdim=True).sign() * bound / 6
        images = (start + (images + step - start).clamp(-bound, bound)).clamp(0, 1).detach()
    fooled = [float((r.classifier(2 * images - 1).argmax(1) == wanted).float().mean()) for r in (reward, judge)]
    assert fooled[0] > 0.85
    assert fooled[1] < 0.2  # measured over 500: 0.97 and 0.04


def test_every_known_reward_has_a_place_that_exists():
    for spec in NAMED.values():
        module, _, name = spec.partition(":")
        file = Path(__file__).parents[2] / "src" / Path(*module.split(".")).with_suffix(".py")
        text = file.read_text(encoding="utf-8")
        assert f"class {name}(" in text or f"def {name}(" in text


def test_the_example_reward_can_be_trained_on():
    example = Path(__file__).parents[2] / "examples" / "my_rewards.py"
    reward = checked_reward(load_reward(f"{example}:brightness"), 32, ["a coat"])
    assert reward(torch.full((2, 3, 8, 8), 0.25), ["", ""]).tolist() == [0.25, 0.25]
