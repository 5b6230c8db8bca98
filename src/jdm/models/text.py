"""Encodes prompts as hidden states of text models: one of CLIP's, or SDXL's two. Other families bring their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from jdm.errors import UsageError, in_short
from jdm.score import Prompts, Text

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
SPARE = 128  # rows that a text encoder may have beyond its tokenizer's words, for a width that divides evenly
REMEMBERED = 512 * 2**20  # bytes of cached states, on the encoder's device


class TextEncoder:
    """Prompts -> hidden states [B, L, D] of a frozen CLIP text model; each prompt is encoded once and cached.

    Args:
        capacity: bytes of cached states; the oldest are dropped first.
        one_by_one: encode each prompt alone, so that the last bits of its states do not depend on the other prompts
            of its first batch; a resumed run must compute the same bits.

    Attributes:
        stored: prompt -> states on disk (data/cache.py), which are read instead of encoding the prompt.
        device: device that states are moved to; None for the text model's.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, capacity: int = REMEMBERED, one_by_one: bool = False):
        self.model, self.tokenizer, self.capacity, self.one_by_one = model, tokenizer, capacity, one_by_one
        self.stored: Mapping[str, Any] = {}
        self.device: torch.device | str | None = None
        self._memory: OrderedDict[str, Any] = OrderedDict()
        self._held = 0  # bytes

    @property
    def networks(self) -> list[tuple[nn.Module, Any]]:
        """The (text model, tokenizer) pairs."""
        return [(self.model, self.tokenizer)]

    @property
    def each(self) -> float:
        """Bytes of the states of one prompt, on average over those that are remembered."""
        return self._held / max(1, len(self._memory))

    def ids(self, prompts: Prompts) -> list[Tensor]:
        """Token ids [B, L] by each tokenizer, padded to its length, on the text models' device."""
        device = next(self.model.parameters()).device
        return [own(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                    max_length=own.model_max_length).input_ids.to(device) for _, own in self.networks]

    def states(self, ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The text models' outputs [B, ...] for what `ids` returns."""
        return (self.model(ids[0])[0],)

    def encode(self, prompts: Prompts) -> Any:
        """The states of each prompt, without the cache; differentiable if the text model trains."""
        return self.states(self.ids(prompts))[0]

    def batch(self, prompts: Prompts) -> Text:
        """The states of a batch without the cache; differentiable if the text models train."""
        found: Any = self.encode(prompts)
        return found if isinstance(found, Tensor) else self.stacked(found)

    @torch.no_grad()
    def __call__(self, prompts: Prompts) -> Text:
        for prompt, row in self._rows([p for p in dict.fromkeys(prompts) if p not in self._memory]):
            self._memory[prompt] = row
            self._held += _bytes_of(row)
        rows = [self._memory[p] for p in prompts]
        while self._held > self.capacity:
            self._held -= _bytes_of(self._memory.popitem(last=False)[1])
        return self.stacked(rows)

    def _rows(self, prompts: list[str]) -> Iterator[tuple[str, Any]]:
        """Yields each prompt and its states, read from `stored` if they are there, else encoded."""
        device = self.device or next(self.model.parameters()).device
        for prompt in [p for p in prompts if p in self.stored]:
            yield prompt, self.read(tuple(part.to(device) for part in tensors_of(self.stored[prompt])))
        new = [p for p in prompts if p not in self.stored]
        for group in [[p] for p in new] if self.one_by_one else [new] if new else []:
            for prompt, row in zip(group, self.encode(group), strict=True):
                moved = tuple(part.to(device) for part in tensors_of(row))
                yield prompt, moved if isinstance(row, tuple) else moved[0]

    def kept(self, row: Any) -> tuple[Tensor, ...]:
        """A prompt's states as they are stored on disk: tensors of one shape for all prompts."""
        return tensors_of(row)

    def read(self, parts: tuple[Tensor, ...]) -> Any:
        """The inverse of `kept`."""
        return parts[0] if len(parts) == 1 else parts

    def overlong(self, prompts: Prompts) -> dict[str, str]:
        """Prompt -> its end that no text model reads, of those longer than the tokenizers' limits."""
        found: dict[str, str] = {}
        for _, tokenizer in self.networks if prompts else ():  # tokenizers fail on no prompt
            longest = tokenizer.model_max_length
            for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
                if len(ids) > longest:
                    found[prompt] = tokenizer.decode(ids[longest - 1 : -1]).strip()
        return found

    def stacked(self, rows: list[Any]) -> Text:
        """Stacks the states of single prompts to a batch."""
        return self.joined(*map(torch.stack, zip(*map(tensors_of, rows), strict=True)))

    def joined(self, *states: Tensor) -> Text:
        """The input of the network for a batch of these `states`."""
        return states[0]

    def forget(self) -> None:
        """Clears the cache, for example before timing the whole path from prompt to picture."""
        self._memory.clear()
        self._held = 0


class TwoTextEncoders(TextEncoder):
    """Prompts -> SDXL's (hidden states [B, L, D1 + D2], {text_embeds [B, P]}); its denoiser adds the sizes.

    Args:
        second: a CLIP text model with projection; its pooled output is text_embeds.
        zeros: encode the empty prompt as zeros, as in the training of the base model. Stock pipelines do so for the
            negative prompt, but encode an empty prompt.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, second: nn.Module, tokenizer_2: Any,
                 zeros: bool = True, capacity: int = REMEMBERED, one_by_one: bool = False):
        super().__init__(model, tokenizer, capacity, one_by_one)
        self.second, self.tokenizer_2, self.zeros = second, tokenizer_2, zeros

    @property
    def networks(self) -> list[tuple[nn.Module, Any]]:
        return [*super().networks, (self.second, self.tokenizer_2)]

    def states(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(hidden states [B, L, D1 + D2], pooled [B, P])."""
        outputs: list[Any] = [model(own, output_hidden_states=True)
                              for (model, _), own in zip(self.networks, ids, strict=True)]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]

    def encode(self, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
        """(hidden states [L, D1 + D2], pooled [P]) for each prompt."""
        rows = zip(prompts, *self.states(self.ids(prompts)), strict=True)
        return [(h * 0, p * 0) if self.zeros and not prompt else (h, p) for prompt, h, p in rows]

    def joined(self, *states: Tensor) -> Text:
        hidden, pooled = states
        return hidden, {"text_embeds": pooled}


def tensors_of(row: Any) -> tuple[Tensor, ...]:
    """A prompt's states as a tuple: one tensor, or SDXL's two."""
    return row if isinstance(row, tuple) else (row,)


def _bytes_of(row: Any) -> int:
    return sum(part.numel() * part.element_size() for part in tensors_of(row))


# Tokenizers


def whole_tokenizer(path: str, part: str = "", kind: Any = CLIPTokenizer, **options: Any) -> Any:
    """The tokenizer of a part of a folder or hub id, or of the folder itself.

    Args:
        kind: its class, one of transformers' tokenizers.

    Raises:
        UsageError: a file of it is missing or cannot be read.
    """
    folder = Path(path, part)
    # Without these files transformers would silently make a tokenizer of two words.
    if Path(path).is_dir() and not (folder / "tokenizer.json").is_file() and not all(
            (folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise UsageError(f"{folder} holds no tokenizer: it lacks vocab.json and merges.txt, or tokenizer.json")
    try:
        where = (folder,) if Path(path).is_dir() else (path,)
        extra = {"subfolder": part} if part and not Path(path).is_dir() else {}
        return kind.from_pretrained(*where, **extra, **options)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UsageError(f"{folder} holds no tokenizer that can be read ({in_short(error)}); copy it again") from None


def refuse_foreign_tokenizer(tokenizer: CLIPTokenizer, config: Any, path: str) -> None:
    """UsageError where a tokenizer is not the text encoder's; its longest prompt becomes the encoder's at most.

    Args:
        config: the text encoder's.
    """
    words, rows = len(tokenizer), config.vocab_size
    if not rows - SPARE <= words <= rows:
        raise UsageError(f"{path}: the tokenizer knows {words} words, its text encoder {rows}; put back the tokenizer "
                         "it was trained with")
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise UsageError(f"{path}: the tokenizer encodes different prompts alike, so that every prompt would give the "
                         "same picture; put back the tokenizer it was trained with")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
