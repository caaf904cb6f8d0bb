"""Texts for pseudo-log-likelihoods: which tokens are scored, and which tokens are masked together with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["MaskedScoring", "MaskedText", "encode_masked", "masked_positions", "windows_of"]

MaskedScoring = Literal["within_word", "original"]


@dataclass(frozen=True)
class MaskedText:
    """One text with the special tokens around it ([CLS] and [SEP] of BERT, <s> and </s> of RoBERTa).

    Attributes:
        token_ids: Token ids of the whole text, including special tokens.
        words: Word number of each token, by the tokenizer's pre-tokenizer; None for special tokens, which are never
            masked or scored.
        targets: Positions of the scored tokens, ascending.
    """

    token_ids: tuple[int, ...]
    words: tuple[int | None, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def frame(self) -> tuple[int, int]:
        """Number of special tokens before and after the text."""
        inside = [position for position, word in enumerate(self.words) if word is not None]
        return (inside[0], len(self) - inside[-1] - 1) if inside else (len(self), 0)

    def cut_to(self, most_tokens: int) -> MaskedText:
        """The text without its beginning, at most `most_tokens` tokens long; the special tokens stay."""
        excess = len(self) - most_tokens
        if excess <= 0:
            return self
        before, after = self.frame
        return self.part(before + excess, len(self) - after)

    def part(self, start: int, end: int) -> MaskedText:
        """Tokens [start, end) of the text between the special tokens, with the targets among them."""
        before, after = self.frame
        kept = [*range(before), *range(start, end), *range(len(self) - after, len(self))]
        place = {old: new for new, old in enumerate(kept)}
        return MaskedText(
            tuple(self.token_ids[position] for position in kept),
            tuple(self.words[position] for position in kept),
            tuple(place[target] for target in self.targets if target in place),
        )


def encode_masked(tokenizer: Any, context: str, continuation: str) -> MaskedText:
    """Tokenise context and continuation as one text whose targets are the tokens of the continuation.

    The text is tokenised as a whole, as in training. A token belongs to the continuation if it has at least one of its
    characters, so a token across the boundary belongs to it. Without a context, leading spaces of the continuation are
    removed.

    Args:
        tokenizer: A fast tokenizer, which provides character offsets.
        context: Given, never scored.
        continuation: Scored.
    """
    text, boundary = (context + continuation, len(context)) if context else (continuation.lstrip(), 0)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False)
    special, spans = encoded["special_tokens_mask"], encoded["offset_mapping"]
    words = tuple(None if is_special else word for word, is_special in zip(encoded.word_ids(0), special, strict=True))
    targets = tuple(
        position
        for position, ((start, end), word) in enumerate(zip(spans, words, strict=True))
        if word is not None and (end > boundary or start == end >= boundary)
    )
    return MaskedText(tuple(encoded["input_ids"]), words, targets)


def windows_of(text: MaskedText, most_tokens: int) -> Iterator[MaskedText]:
    """Split a text into windows of at most `most_tokens` tokens, including special tokens; each token is in one window.

    A window ends at the end of a word, unless one word is longer than a window.
    """
    before, after = text.frame
    start, last, room = before, len(text) - after, most_tokens - before - after
    while start < last:
        end = min(start + room, last)
        if end < last:
            at_word = end
            while at_word > start and text.words[at_word] == text.words[at_word - 1]:
                at_word -= 1
            end = at_word if at_word > start else end
        yield text.part(start, end)
        start = end


def masked_positions(text: MaskedText, target: int, scoring: MaskedScoring) -> tuple[int, ...]:
    """Positions that are masked while `target` is scored.

    `original` masks only the target (Salazar et al. 2020). This overestimates words of several tokens, since each token
    reveals the others. `within_word` therefore masks the target and the tokens of the same word to its right (Kauf and
    Ivanova 2023, PLL-word-l2r).
    """
    if scoring == "original":
        return (target,)
    end = target + 1
    while end < len(text) and text.words[end] is not None and text.words[end] == text.words[target]:
        end += 1
    return tuple(range(target, end))
