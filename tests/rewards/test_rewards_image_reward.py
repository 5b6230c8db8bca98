"""ImageReward on a tiny BLIP of its classes: names of weights, the score, its gradient."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from jdm.cost import known_configs
from jdm.errors import UsageError
from jdm.rewards import checked_reward
from jdm.rewards.image_reward import MEAN, STD, ImageReward
from jdm.rewards.networks import clip_pixels, score_head
from scoring import PROMPTS, SIDE, WIDTH, gradient_is_right, pictures, stirred

BLIP_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": SIDE, "patch_size": 7, "layer_norm_eps": 1e-6}
BLIP_TEXT = {"hidden_size": WIDTH, "encoder_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 40}
PUBLISHED = {  # transformers' beginnings and parts of names -> the checkpoint's, in this order
    "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision.post_layernorm": "blip.visual_encoder.norm", "vision.encoder.layers": "blip.visual_encoder.blocks",
    ".layer_norm1": ".norm1", ".layer_norm2": ".norm2", ".self_attn.projection": ".attn.proj", ".self_attn": ".attn",
    "text.": "blip.text_encoder.", "head.": "mlp.layers.",
}


class TimmVision(nn.Module):
    """BLIP's picture encoder by its published names, written from the equations of a transformer."""

    def __init__(self, width: int, heads: int, layers: int, tokens: int, patch: int):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width, eps=1e-6), "norm2": nn.LayerNorm(width, eps=1e-6),
                "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)}),
            }) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                       for part in block["attn"]["qkv"](block["norm1"](x)).chunk(3, 2))
            seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["attn"]["proj"](seen)
            x = x + block["mlp"]["fc2"](nn.functional.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for p in PROMPTS for w in p.split()})]
    BertTokenizer(vocab={word: k for k, word in enumerate(words)}).save_pretrained(folder)
    return folder


def published_name(key: str) -> str:
    for ours, theirs in PUBLISHED.items():
        key = key.replace(ours, theirs, 1) if ours.startswith(".") or key.startswith(ours) else key
    return key


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory, bert) -> tuple[ImageReward, Path]:
    """An untrained ImageReward as it loads from a file of published names, and that file."""
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = BlipVisionConfig(**BLIP_VISION), BlipTextConfig(**BLIP_TEXT)
    parts = nn.ModuleDict({"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False),
                           "head": score_head(WIDTH)})
    published = {published_name(key): value for key, value in stirred(parts).state_dict().items()}
    published |= {"blip.vision_proj.weight": torch.zeros(4, 32), "blip.text_proj.bias": torch.zeros(4),
                  "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    file = tmp_path_factory.mktemp("image-reward") / "ImageReward.pt"
    torch.save(published, file)
    return ImageReward(str(file.parent), str(bert), torch.float64, vision, text), file


def test_image_reward_reads_the_published_names(image_reward):
    reward, file = image_reward
    published = torch.load(file, weights_only=True)
    for key, value in reward.state_dict().items():
        assert torch.equal(value, published[published_name(key)].double()), key
    vision = TimmVision(32, 4, 2, 17, 7).double()
    prefix = "blip.visual_encoder."
    vision.load_state_dict({k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)})
    pixels = clip_pixels(pictures().double(), SIDE, torch.float64)
    assert torch.allclose(reward.vision(pixels).last_hidden_state, vision(pixels))


def test_image_reward_is_the_standardised_score(image_reward):
    reward, _ = image_reward
    images = pictures().double()
    tokens = reward.tokenizer(PROMPTS, padding=True, return_tensors="pt")  # padding must not move the score
    assert tokens.input_ids[0, 0] == 2  # [CLS]
    for mask in (tokens.attention_mask, None):
        one = slice(0, 1)  # the longer prompt has no padding here
        seen = reward.vision(clip_pixels(images[one], SIDE, torch.float64)).last_hidden_state
        read = reward.text(tokens.input_ids[one], None if mask is None else mask[one], encoder_hidden_states=seen)
        score = reward.head(read.last_hidden_state[:, 0])[:, 0]
        assert torch.allclose(reward(images, PROMPTS)[one], (score - MEAN) / STD)
    assert gradient_is_right(reward)
    other = reward(images, PROMPTS[::-1])
    assert (reward(images, PROMPTS) - other).abs().min() > 1e-6


def test_image_reward_has_the_published_sizes(tmp_path, monkeypatch):
    import jdm.rewards.image_reward as module

    made = []

    def stop(name, network, weights, file):
        made.append(network)
        raise UsageError("enough")

    monkeypatch.setattr(module, "fill", stop)
    torch.save({}, tmp_path / "ImageReward.pt")
    with torch.device("meta"), pytest.raises(UsageError, match="enough"):
        ImageReward(str(tmp_path))
    vision, text = made[0].vision.config, made[0].text.config
    assert (vision.num_attention_heads, vision.layer_norm_eps) == (16, 1e-6)
    assert (text.num_attention_heads, text.layer_norm_eps, text.encoder_hidden_size) == (12, 1e-12, 1024)
    with torch.device("meta"):
        estimated = known_configs.image_reward()
    assert estimated.vision.config.to_dict() == vision.to_dict()
    assert estimated.text.config.to_dict() == text.to_dict()
    assert len(made[0].state_dict()) == 24 * 12 + 6 + 12 * 26 + 4 + 10


def test_weights_of_another_network_are_refused(image_reward, bert, tmp_path):
    vision, text = BlipVisionConfig(**BLIP_VISION), BlipTextConfig(**BLIP_TEXT)
    torch.save(score_head(WIDTH).state_dict(), tmp_path / "head.pth")
    with pytest.raises(UsageError, match=r"head.pth lacks head\.0\.bias and"):
        ImageReward(str(tmp_path / "head.pth"), str(bert), vision=vision, text=text)
    reward = ImageReward(str(image_reward[1]), str(bert), vision=vision, text=text)
    assert checked_reward(reward, 32, PROMPTS) is reward
