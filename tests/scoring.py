"""What the tests of scores share: tiny CLIPs, pictures and prompts for them, and the check of a reward's gradient."""

import torch
from torch import Tensor, nn
from transformers import CLIPConfig

from jdm.models import nano

SIDE, WIDTH = 28, 16
PROMPTS = ["a photo of a coat", "an ankle boot"]
LENGTH = 16
TOKENS = nano.tokenizer(PROMPTS, LENGTH)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, *(shape or (40, 40)), generator=seeded(seed))


def stirred(network: nn.Module) -> nn.Module:
    """Every weight moved off its start, where many are 0 or 1 and a mix-up would not show."""
    generator = seeded(1)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def clip_config() -> CLIPConfig:
    """Two layers of each tower, of different widths and heads."""
    ids = {name: getattr(TOKENS, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(TOKENS), "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": LENGTH, "hidden_act": "gelu", **ids}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": SIDE, "patch_size": 7, "hidden_act": "gelu", "projection_dim": WIDTH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


def gradient_is_right(reward, shape: tuple[int, int] = (SIDE, SIDE)) -> bool:
    """Against central differences along random directions, in float64, away from the clamp."""
    images = (0.2 + 0.6 * pictures(*shape, seed=3)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    for seed in range(3):
        step = 1e-5 * torch.randn(images.shape, generator=seeded(seed), dtype=torch.float64)
        with torch.no_grad():
            difference = (reward(images + step, PROMPTS) - reward(images - step, PROMPTS)).sum() / 2
        if not torch.allclose(difference, (gradient * step).sum(), rtol=1e-4, atol=1e-12):
            return False
    return bool(gradient.flatten(1).abs().sum(1).gt(0).all())
