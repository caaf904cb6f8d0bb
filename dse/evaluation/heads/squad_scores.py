"""Exact match and F1 of answers, normalised as in SQuAD's evaluation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["exact_match", "normalised", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without punctuation and articles, blanks made single."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer equals an accepted one after normalisation, else 0; "" stands for no answer."""
    return float(normalised(answer) in {normalised(gold) for gold in accepted or ("",)})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, against the accepted answer it fits best.

    Source: Rajpurkar et al. (2016), arXiv 1606.05250; no-answer questions as in Rajpurkar et al. (2018).
    """
    return max(_f1(normalised(answer).split(), normalised(gold).split()) for gold in accepted or ("",))


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))
