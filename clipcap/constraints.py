"""Constraints on the tokens of a caption that go by those before: transformers' logits processors, where asked for."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Constraints:
    """transformers' logits processors over captions of several images.

    Args:
        processors: a `transformers.LogitsProcessorList`.
        prompt: tokens that the captions of each image begin with, which processors see too.
    """

    def __init__(self, processors: list, prompt: Int[Tensor, "b p"]) -> None:
        self.processors, self.prompt = processors, prompt

    def __call__(self, tokens: Int[Tensor, "b w t"], scores: Float[Tensor, "b w v"]) -> Float[Tensor, "b w v"]:
        """Scores of the next token of each caption, those that it may not have at minus infinity."""
        prompt = self.prompt[:, None].expand(-1, tokens.shape[1], -1)
        written = torch.cat([prompt, tokens], -1).flatten(0, 1)
        return self.processors(written, scores.flatten(0, 1)).view(scores.shape)  # type: ignore[operator]

    def keep(self, order: Int[Tensor, " a"]) -> None:
        """Go on with these images only."""
        self.prompt = self.prompt[order]


def constraints(
    prompt: Int[Tensor, "b p"],
    stops: Int[Tensor, " s"],
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    min_new_tokens: int,
) -> Constraints | None:
    """What these options of transformers' `generate` ask for; None where they ask for nothing."""
    from transformers.generation import logits_process as library

    processors = library.LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(library.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if no_repeat_ngram_size:
        processors.append(library.NoRepeatNGramLogitsProcessor(no_repeat_ngram_size))
    if min_new_tokens and len(stops):
        device = str(stops.device)
        processors.append(
            library.MinNewTokensLengthLogitsProcessor(prompt.shape[1], min_new_tokens, stops, device=device)
        )
    return Constraints(processors, prompt) if processors else None
