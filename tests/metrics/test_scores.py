"""Scores of pictures for their prompts: CLIP's, by style, of a text-to-image model; and FID where it cannot be had."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

import scoring
from jdm.cli.parser import main
from jdm.errors import UsageError
from jdm.evaluation.evaluate import evaluate_prompts, extractors
from jdm.evaluation.sampling import Sampler
from jdm.generator import starting_noise
from jdm.library import load_model
from jdm.metrics.fid import Inception
from jdm.metrics.scores import chosen, read_prompts, scores
from jdm.metrics.spread import bootstrap
from jdm.rewards import checked_reward, load_reward
from jdm.rewards.networks import clip_pixels
from jdm.space import from_bytes, unit

PROMPTS = ["a photo of a coat", "an ankle boot", "a bag", "a photo of a dress"]
BRIGHT = """def brightness(images, prompts):
    return images.mean((1, 2, 3)) + 0.01 * images.new_tensor([float(len(p)) for p in prompts])
"""


def pictures(n: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def brightness(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(BRIGHT)
    return f"{tmp_path / 'mine.py'}:brightness"


def bright(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return unit(from_bytes(images)).mean((1, 2, 3)) + 0.01 * torch.tensor([float(len(p)) for p in prompts])


# CLIP


def test_clip_score_is_the_cosine_of_transformers(clip):
    reward = load_reward(f"clip:{clip}")
    images = unit(from_bytes(pictures(2)))
    network = CLIPModel.from_pretrained(clip)
    tokens = scoring.TOKENS(PROMPTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = network(**tokens, pixel_values=clip_pixels(images, scoring.SIDE))
    cosine = out.logits_per_image.diagonal() / network.logit_scale.exp()
    assert torch.allclose(reward(images, PROMPTS[:2]), cosine, atol=1e-6)
    assert checked_reward(reward, 32, PROMPTS) is reward


def test_tables_print_a_hundred_clip_scores(clip):
    row = scores([f"clip:{clip}"], pictures(), PROMPTS)
    own = load_reward(f"clip:{clip}")(unit(from_bytes(pictures())), PROMPTS).detach()
    assert row["clip"] == pytest.approx(100 * float(own.mean()), rel=1e-5)
    assert row["clip_spread"] == pytest.approx(bootstrap(100 * own)[1], rel=1e-4)
    assert row["clip_network"] == clip.name


def test_a_score_never_replaces_one_of_its_name(brightness):
    row = scores([brightness, brightness], pictures(), PROMPTS, taken={"brightness": 0.0, "fd": 0.0})
    one = scores([brightness], pictures(), PROMPTS)
    assert row == {f"brightness_{k}{part}": one[f"brightness{part}"] for k in (2, 3) for part in ("", "_spread")}


# Styles


def test_a_score_over_styles_averages_their_means(brightness):
    row = scores([brightness], pictures(), PROMPTS, styles=["photo", "anime", "photo", "photo"])
    values = bright(pictures(), PROMPTS)
    photo, anime = float(values[[0, 2, 3]].mean()), float(values[1])
    assert row["brightness_photo"] == pytest.approx(photo)
    assert row["brightness_anime"] == pytest.approx(anime)
    assert row["brightness"] == pytest.approx((photo + anime) / 2)
    assert "brightness_photo" not in scores([brightness], pictures(), PROMPTS)


def test_the_first_prompts_of_every_style_are_asked(tmp_path):
    (tmp_path / "anime.json").write_text(json.dumps(PROMPTS[:2]))
    (tmp_path / "photo.json").write_text(json.dumps(PROMPTS[2:]))
    assert read_prompts(tmp_path) == {"anime": PROMPTS[:2], "photo": PROMPTS[2:]}
    assert chosen(read_prompts(tmp_path), 1) == ([PROMPTS[0], PROMPTS[2]], ["anime", "photo"])
    (tmp_path / "lines.txt").write_text("a coat\n\n a bag \n")
    assert chosen(read_prompts(tmp_path / "lines.txt"), 9) == (["a coat", "a bag"], [])


@pytest.mark.parametrize(("name", "text", "said"), [
    ("none", None, "holds no prompts; give a folder with one JSON list per style"),
    ("broken.json", "[", "broken.json is not JSON .*give a list of strings"),
    ("other.json", '{"a": 1}', "expected `array`, got `object`; give a list of strings"),
    ("empty.txt", "\n", "holds no prompt"),
])
@pytest.mark.hostile("data")
def test_what_holds_no_prompts_is_refused(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        read_prompts(tmp_path / name)


# A model


def test_a_text_model_is_scored_on_its_prompts(teacher, brightness, tmp_path, capsys):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    model = load_model(str(teacher))
    made = Sampler(model, 2, 1.5)(starting_noise(model.latent_shape(3, model.size), 7), PROMPTS[:3])
    file = tmp_path / "row.json"
    assert main(["evaluate", str(teacher), "--prompts", str(tmp_path / "prompts.json"), "--scores", brightness, "--n",
                 "3", "--seed", "7", "--steps", "2", "--guidance", "1.5", "--json", str(file)]) == 0
    row = json.loads(file.read_text())
    assert row["brightness"] == pytest.approx(float(bright(made, PROMPTS[:3]).mean()))
    assert (row["n"], row["nfe"], row["guidance"]) == (3, 4, 1.5)
    assert "brightness spread" in capsys.readouterr().out


def test_prompts_alone_need_scores_and_no_control(teacher, student, brightness):
    with pytest.raises(UsageError, match="--scores clip,hpsv2,aesthetic"):
        evaluate_prompts(str(teacher), {"": PROMPTS}, [])
    with pytest.raises(UsageError, match="prompts alone give it no control"):
        evaluate_prompts(str(student), {"": PROMPTS}, [brightness])


# FID


def test_fid_says_what_it_needs(tmp_path):
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(UsageError, match=r"FID needs torch-fidelity .*pip install 'jdm\[fid\]'"):
            Inception()
        return
    with pytest.raises(UsageError, match="no such file of Inception's weights"):
        Inception(str(tmp_path / "none.pth"))


class TorchFidelity:
    """What torch-fidelity's Inception takes and gives: (features,) of uint8 pictures, on their device."""

    def __init__(self, name, features, feature_extractor_weights_path=None):
        self.given, self.batches = (name, features, feature_extractor_weights_path), []

    def to(self, device):
        self.device = device
        return self

    def eval(self):
        return self

    def __call__(self, images):
        assert images.dtype == torch.uint8
        self.batches.append(len(images))
        return (images.double().flatten(1)[:, :5],)


@pytest.fixture
def torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = TorchFidelity  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_fids_features_are_those_of_torch_fidelity(torch_fidelity, tmp_path):
    file = tmp_path / "inception.pth"
    torch.save({"weight": torch.ones(2)}, file)
    images = pictures(5)
    one = Inception(str(file), "cpu", batch=2)
    found = one.features(images)
    assert torch.equal(found, images.flatten(1)[:, :5].float())
    assert found.dtype == torch.float32
    assert one._net.batches == [2, 2, 1]
    assert one._net.given == ("inception-v3-compat", ["2048"], str(file))
    torch.save({"weight": torch.zeros(2)}, file)
    assert len({Inception().name, one.name, Inception(str(file)).name}) == 3
    assert Inception().name == "inception-2048"
    assert Inception()._net.given[2] is None
    with pytest.raises(UsageError, match="images must be uint8"):
        one.features(images.float())


@pytest.mark.hostile("pickle")
def test_a_pickle_is_no_file_of_inceptions_weights(torch_fidelity, tmp_path):
    file = tmp_path / "inception.pth"
    torch.save({"weight": Path("anything")}, file)
    with pytest.raises(UsageError, match=r"FID: .*inception\.pth is not a weights file"):
        Inception(str(file))


def test_the_extractors_have_a_fixed_order(torch_fidelity, monkeypatch):
    """The packaged pictures' own classifier comes first, then FID's network, then EffLite0."""
    def names(*asked, **named):
        return [extractor.name.split("-")[0] for extractor in extractors(*asked, **named)]

    assert names("my_pictures", also=["inception"]) == ["inception", "efflite0"]
    assert names("my_pictures", quick=True, also=["inception"]) == ["inception"]
    assert names("my_pictures", quick=True) == ["efflite0"]
    assert names("fashion-mnist", also=["inception"]) == ["nano", "inception", "efflite0"]
    assert names("fashion-mnist", quick=True, also=["inception"]) == ["nano", "inception"]
    assert names("fashion-mnist", quick=True) == ["nano"]
    (fid,) = extractors("my_pictures", True, ["inception"], "cpu:0")
    assert fid._net.device == torch.device("cpu:0")  # type: ignore[attr-defined]


def test_an_extractor_nobody_knows_is_refused():
    with pytest.raises(UsageError, match="no extractor 'resnet'; the known ones are inception"):
        extractors("my_pictures", also=["resnet"])
