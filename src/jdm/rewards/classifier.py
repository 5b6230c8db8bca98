"""A classifier as a reward: the log-probability of the class named by the prompt."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from jdm.data.sources import load_pictures
from jdm.errors import UsageError
from jdm.files import ASSETS
from jdm.models.classifier import Classifier
from jdm.rewards.networks import paired


class PromptClassifier(nn.Module):
    """r(images, prompts) = log p(class named by the prompt | image), in nats, at most 0.

    Images are not clamped: on a black background a clamp would leave no gradient.

    Args:
        classifier: frozen here and put in eval mode.
        captions: for each class, the captions of its training pictures; by default the packaged Fashion-MNIST's.
        judge: True if it only measures; `checked_reward` then refuses to train on it.
    """

    def __init__(self, classifier: Classifier, captions: Sequence[Sequence[str]] | None = None, judge: bool = False):
        super().__init__()
        self.classifier, self.judge = classifier.eval().requires_grad_(False), judge
        self.name = classifier.config.name
        captions = fashion_captions() if captions is None else captions
        if len(captions) != classifier.config.classes:
            raise UsageError(f"{self.name} needs captions of {classifier.config.classes} classes, got "
                             f"{len(captions)}; give one tuple of captions for each class")
        self.classes = {_plain(caption): k for k, own in enumerate(captions) for caption in own}

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> class of each, [B]. Raises UsageError, with the nearest caption, if a prompt names no class."""
        keys = [_plain(prompt) for prompt in prompts]
        for prompt, key in zip(prompts, keys, strict=True):
            if key not in self.classes:
                near = difflib.get_close_matches(key, self.classes, n=1, cutoff=0)
                raise UsageError(f"{self.name} knows no class for the prompt {prompt!r}; it knows captions of its "
                                 f"training pictures, such as {near[0]!r}")
        return torch.tensor([self.classes[key] for key in keys], dtype=torch.long)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B prompts -> [B], nats; differentiable in images."""
        paired(images, prompts)
        parameter = next(self.classifier.parameters())
        log_prob = self.classifier(2 * images.to(parameter.dtype) - 1).log_softmax(1)
        return log_prob.gather(1, self.labels(prompts).to(images.device)[:, None])[:, 0]


def nano_reward(folder: str | Path = ASSETS / "nano-reward") -> PromptClassifier:
    """The shipped reward of nano-sd, or a classifier saved in another folder."""
    return PromptClassifier(Classifier.load(folder))


def nano_judge(folder: str | Path = ASSETS / "nano-judge") -> PromptClassifier:
    """The shipped judge: a different network, trained on other pictures than nano-reward; it only measures."""
    return PromptClassifier(Classifier.load(folder), judge=True)


@cache
def fashion_captions() -> tuple[tuple[str, ...], ...]:
    """The captions of the packaged Fashion-MNIST, by class."""
    return load_pictures("fashion-mnist", "test[:1]", 32).captions


def _plain(prompt: str) -> str:
    return " ".join(prompt.lower().split()).rstrip(".")
