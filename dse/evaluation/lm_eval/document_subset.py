"""Some of a task's documents, as a task: for the lower rungs of a fidelity ladder, and for answers known already."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from dse.errors import ConfigError
from dse.evaluation.answers import Answers
from dse.evaluation.lm_eval.task_loading import LeafTask

__all__ = ["documents_of_share", "keep_answers", "requests_to_ask", "share_of_leaves"]


def share_of_leaves(leaves: Sequence[LeafTask], share: float) -> list[LeafTask]:
    """The first documents drawn of a task: a smaller share is part of every larger one, for a group over all members.

    Args:
        leaves: The members of one task.
        share: Of its documents, above 0 and at most 1; at least one document is kept.

    Raises:
        ConfigError: The share lies outside its interval.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"`0 < share <= 1` must hold for a share of the documents, but got {share!r}")
    drawn = sorted(place for leaf in leaves for place in leaf.places)
    limit = drawn[documents_of_share(len(drawn), share) - 1]
    return [leaf for leaf in (_up_to(leaf, limit) for leaf in leaves) if leaf.documents]


def documents_of_share(documents: int, share: float) -> int:
    """How many documents a share comes to, at least one."""
    return min(documents, max(1, math.ceil(share * documents - 1e-9)))


def requests_to_ask(leaves: Sequence[LeafTask], answers: Answers) -> list[Any]:
    """Empty the requests, fill in the answers that are known, and return the requests that are left to ask."""
    asked: list[Any] = []
    answers.reused = answers.scored = 0
    for leaf in leaves:
        for digest, requests in _documents(leaf):
            known = answers.by_document.get(digest)
            is_known = known is not None and [len(k) for k in known] == [request.repeats for request in requests]
            for index, request in enumerate(requests):
                request.filtered_resps = {}
                request.resps = list(known[index]) if known is not None and is_known else []
            answers.reused += is_known
            answers.scored += not is_known
            asked += [] if is_known else requests
    return asked


def keep_answers(leaves: Sequence[LeafTask], answers: Answers) -> None:
    """Add the answers in the requests to those that are known."""
    for leaf in leaves:
        for digest, requests in _documents(leaf):
            answers.by_document[digest] = [list(request.resps) for request in requests]


def _documents(leaf: LeafTask) -> Iterator[tuple[str, list[Any]]]:
    """Digest and requests of every document, in order."""
    by_document: dict[int, list[Any]] = {}
    for request in leaf.task.instances:
        by_document.setdefault(request.doc_id, []).append(request)
    for document, digest in zip(leaf.documents, leaf.digests, strict=True):
        yield digest, sorted(by_document.get(document, ()), key=lambda request: request.idx)


def _up_to(leaf: LeafTask, limit: int) -> LeafTask:
    kept = [index for index, place in enumerate(leaf.places) if place <= limit]
    if len(kept) == len(leaf.places):
        return leaf
    documents = {leaf.documents[index] for index in kept}
    task = copy.copy(leaf.task)  # the same requests and metrics, fewer of the requests
    task._instances = [request for request in leaf.task.instances if request.doc_id in documents]
    return dataclasses.replace(
        leaf,
        task=task,
        documents=[leaf.documents[index] for index in kept],
        rows=[leaf.rows[index] for index in kept],
        places=[leaf.places[index] for index in kept],
        digests=[leaf.digests[index] for index in kept],
    )
