"""The published rewards on tiny networks of their classes: names of weights, pictures as published, gradients."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # below 5.4 the one class resizes by Pillow
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from jdm.errors import UsageError
from jdm.rewards import checked_reward, load_reward
from jdm.rewards.aesthetic import Aesthetic
from jdm.rewards.hpsv2 import HPSv2, vit_h_14
from jdm.rewards.hpsv2 import renamed as from_open_clip
from jdm.rewards.image_reward import ImageReward
from jdm.rewards.networks import clip_pixels, score_head
from jdm.rewards.pick_score import PickScore
from scoring import LENGTH, PROMPTS, SIDE, TOKENS, WIDTH, clip_config, gradient_is_right, pictures, seeded, stirred

# Pictures


def smooth(height: int, width: int) -> np.ndarray:
    """Blurred noise in 0..255, [height, width, 3]: no jump of the kind whose overshoot 8 bits clip half-way."""
    noise = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=seeded())
    large = nn.functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
    return (large[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("shape", [(64, 64), (20, 20), (28, 28), (61, 90), (90, 41)])
def test_clip_sees_what_its_processor_makes(shape):
    picture = smooth(*shape)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = torch.from_numpy(np.array(processor(picture, return_tensors="np")["pixel_values"]))
    made = clip_pixels(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, SIDE)
    assert made.shape == expected.shape == (1, 3, SIDE, SIDE)
    # The processor rounds to 8 bits after each of the two passes of its resize: 1.25 levels, over the deviation.
    assert (made - expected).abs().max() < 1.25 / 255 / 0.26


def test_clip_sees_photographs_as_its_processor_does():
    data = pytest.importorskip("skimage.data")
    for picture in (data.astronaut(), data.chelsea(), data.coffee()):
        expected = torch.from_numpy(np.array(CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"]))
        made = clip_pixels(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, 224)
        difference = (made - expected).abs() * 0.26 * 255
        assert difference.mean() < 0.4  # in levels of 8 bits: the processor rounds after each of two passes
        assert difference.max() < 1.5


def test_a_whole_picture_is_fitted_between_black_bars():
    images = torch.ones(1, 3, 40, 20)
    made = clip_pixels(images, SIDE, whole=True)
    black, white = clip_pixels(torch.zeros(1, 3, 5, 5), SIDE), clip_pixels(torch.ones(1, 3, 5, 5), SIDE)
    assert torch.allclose(made[..., 7:21], white[..., 7:21], atol=1e-5)  # float32 after the resize
    assert torch.equal(made[..., :7], black[..., :7])
    assert torch.equal(made[..., 21:], black[..., 21:])
    assert torch.equal(clip_pixels(pictures(40, 40), SIDE, whole=True), clip_pixels(pictures(40, 40), SIDE))
    assert clip_pixels(torch.ones(1, 3, 33, 90), SIDE, whole=True).shape == (1, 3, SIDE, SIDE)


def test_gradients_pass_the_resize_but_not_the_clamp():
    images = (0.2 + 0.6 * pictures(9, 12)[:1]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, 6, torch.float64), images)
    beyond = torch.full((1, 3, 8, 8), 1.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_pixels(beyond, 8).sum(), beyond)
    assert not gradient.any()


# PickScore


def test_pick_score_is_the_logit_that_transformers_gives(clip):
    reward = PickScore(str(clip), dtype=torch.float64)
    images = pictures().double()
    network = CLIPModel.from_pretrained(clip, dtype=torch.float64)
    tokens = TOKENS(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**tokens, pixel_values=clip_pixels(images, SIDE, torch.float64)).logits_per_image
    assert torch.allclose(reward(images, PROMPTS), logits.diagonal())
    assert gradient_is_right(reward)
    assert not any(p.requires_grad for p in reward.parameters())


def test_half_precision_scores_are_near_full_ones(clip):
    full, half = PickScore(str(clip)), PickScore(str(clip), dtype=torch.bfloat16)
    images = pictures()
    assert half(images, PROMPTS).dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, over two layers, of a cosine times exp(2.66).
    assert torch.allclose(half(images, PROMPTS), full(images, PROMPTS), atol=0.5)
    assert checked_reward(full, 32, PROMPTS) is full


# HPSv2


class OpenClipTower(nn.Module):
    """open_clip's residual blocks by their published names, written from the equations of a transformer."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(
            nn.ModuleDict({
                "ln_1": nn.LayerNorm(width), "attn": nn.MultiheadAttention(width, heads, batch_first=True),
                "ln_2": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}),
            }) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block["mlp"]["c_proj"](nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return x


class OpenClip(nn.Module):
    """A CLIP whose state dict has open_clip's names."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        text, vision = config.text_config, config.vision_config
        wide, patch = vision.hidden_size, vision.patch_size
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, wide, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(wide))
        self.visual.positional_embedding = nn.Parameter(torch.zeros((vision.image_size // patch) ** 2 + 1, wide))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.visual.transformer = OpenClipTower(wide, vision.num_attention_heads, vision.num_hidden_layers)
        self.visual.proj = nn.Parameter(torch.zeros(wide, config.projection_dim))
        self.transformer = OpenClipTower(text.hidden_size, text.num_attention_heads, text.num_hidden_layers)
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(text.max_position_embeddings, text.hidden_size))
        self.ln_final = nn.LayerNorm(text.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(text.hidden_size, config.projection_dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def image(self, pixels: Tensor) -> Tensor:
        see = self.visual
        x = see.conv1(pixels).flatten(2).mT
        x = torch.cat([see.class_embedding.expand(len(x), 1, -1), x], 1) + see.positional_embedding
        return see.ln_post(see.transformer(see.ln_pre(x))[:, 0]) @ see.proj

    def text(self, ids: Tensor, end: int) -> Tensor:
        n = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:n]
        x = self.ln_final(self.transformer(x, torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)))
        return x[torch.arange(len(x)), (ids == end).int().argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def open_clip() -> OpenClip:
    return stirred(OpenClip(clip_config()).double())  # type: ignore[return-value]


def test_hpsv2_reads_open_clip_weights(open_clip, clip, tmp_path):
    torch.save({"state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    images = pictures(40, 22).double()
    ids = TOKENS(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        seen = open_clip.image(clip_pixels(images, SIDE, torch.float64, whole=True))
        expected = nn.functional.cosine_similarity(seen, open_clip.text(ids, TOKENS.eos_token_id))
    for place in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        reward = HPSv2(str(place), tokenizer=str(clip), dtype=torch.float64, config=clip_config())
        assert torch.allclose(reward(images, PROMPTS), expected)
    assert expected.diff().abs() > 0.01
    assert gradient_is_right(reward)


def test_every_open_clip_weight_has_its_place():
    with torch.device("meta"):
        published, network = OpenClip(vit_h_14()).state_dict(), CLIPModel(vit_h_14())
    found = {key: value.shape for key, value in from_open_clip(published).items()}
    assert found == {key: value.shape for key, value in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == 986_109_441  # open_clip lists 986.11 million


def test_hpsv2_takes_a_transformers_folder_too(clip):
    reward, other = HPSv2(str(clip)), PickScore(str(clip))
    images = pictures(40, 40)
    scale = other.clip.logit_scale.exp()
    assert torch.allclose(scale * reward(images, PROMPTS), other(images, PROMPTS), atol=1e-5)  # float32
    assert checked_reward(reward, 32, PROMPTS) is reward


# Aesthetic


def test_the_aesthetic_score_reads_the_unit_embedding(clip, tmp_path):
    head = stirred(score_head(WIDTH))
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "any.pth")
    reward = Aesthetic(str(tmp_path / "any.pth"), str(clip), dtype=torch.float64)
    images = pictures().double()
    network = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=torch.float64)
    with torch.no_grad():
        embedding = network(clip_pixels(images, SIDE, torch.float64)).image_embeds
        expected = head.double()(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]
    assert torch.allclose(reward(images, PROMPTS), expected)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))
    assert gradient_is_right(reward)


def test_the_head_has_the_published_names_and_shapes():
    shapes = {key: list(value.shape) for key, value in score_head().state_dict().items()}
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    assert shapes == {f"{k}.{part}": shape for k, (n, m) in sizes.items()
                      for part, shape in (("weight", [m, n]), ("bias", [m]))}


# What is missing is said in one line


def refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "message"), [
    ("pick-score", "pick-score needs yuvalkirstain/PickScore_v1.*hf download yuvalkirstain/PickScore_v1.*FOLDER"),
    ("hpsv2", "hpsv2 needs HPS_v2.1_compressed.pt of xswu/HPSv2.*hf download xswu/HPSv2 HPS_v2.1_comp"),
    ("aesthetic", "aesthetic needs aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor.*hf download"),
    ("image-reward", "image-reward needs ImageReward.pt of THUDM/ImageReward.*hf download"),
    ("pick-score:./nowhere", "pick-score needs ./nowhere.*pick-score:FOLDER"),
])
def test_missing_weights_name_their_download_command(spec, message):
    refused(lambda: load_reward(spec), message)


def test_broken_and_foreign_weights_are_refused(clip, open_clip, tmp_path):
    refused(lambda: HPSv2(str(tmp_path)), "holds none of HPS_v2.1_compressed.pt")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    refused(lambda: HPSv2(str(tmp_path / "bad.pt")), "bad.pt is not a weights file")
    weights = open_clip.state_dict()
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "less.pt")
    refused(lambda: HPSv2(str(tmp_path / "less.pt"), str(clip), config=clip_config()), "lacks 1 weight of CLIPModel")
    torch.save(score_head(5).state_dict(), tmp_path / "head.pth")
    refused(lambda: Aesthetic(str(tmp_path / "head.pth"), str(clip)), "has misshapen 0.weight")
    refused(lambda: ImageReward(str(tmp_path / "bad.pt")), "bad.pt is not a weights file")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused(lambda: PickScore(str(tmp_path)), "pick-score needs")
    refused(lambda: PickScore(str(clip))(pictures(), PROMPTS[:1]), "one prompt for each of 2 images, got 1")
