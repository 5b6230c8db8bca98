"""Your own reward: jdm train nano-text-reward --method.reward examples/my_rewards.py:brightness --model nano-sd"""

from collections.abc import Sequence

from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> mean brightness [B], for any prompts; higher is better."""
    return images.mean((1, 2, 3))
