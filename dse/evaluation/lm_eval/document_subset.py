"""A part of a task's documents: the share that a multi-fidelity rung needs, or those without a known answer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from dse.evaluation.answers import Answers
from dse.evaluation.evaluator_settings import last_place
from dse.evaluation.lm_eval.task_loading import LeafTask

__all__ = ["requests_to_ask", "share_of_leaves", "store_answers"]


def share_of_leaves(leaves: Sequence[LeafTask], share: float) -> list[LeafTask]:
    """The members of one task, reduced to the share of its documents that was drawn first.

    Raises:
        ConfigError: `0 < share <= 1` does not hold.
    """
    last = last_place([place for leaf in leaves for place in leaf.places], share)
    return [leaf for leaf in (_up_to(leaf, last) for leaf in leaves) if leaf.documents]


def requests_to_ask(leaves: Sequence[LeafTask], answers: Answers) -> list[Any]:
    """Clear the requests, fill in the known answers, and return the requests that have none."""
    asked: list[Any] = []
    answers.reused = answers.scored = 0
    for leaf in leaves:
        for digest, requests in zip(leaf.digests, leaf.requests(), strict=True):
            known = answers.by_document.get(digest)
            is_known = known is not None and [len(k) for k in known] == [request.repeats for request in requests]
            for index, request in enumerate(requests):
                request.filtered_resps = {}
                request.resps = list(known[index]) if known is not None and is_known else []
            answers.reused += is_known
            answers.scored += not is_known
            asked += [] if is_known else requests
    return asked


def store_answers(leaves: Sequence[LeafTask], answers: Answers) -> None:
    """Add the answers in the requests to the known ones."""
    for leaf in leaves:
        for digest, requests in zip(leaf.digests, leaf.requests(), strict=True):
            answers.by_document[digest] = [list(request.resps) for request in requests]


def _up_to(leaf: LeafTask, last: int) -> LeafTask:
    """The task with the documents drawn up to the place `last`."""
    kept = [index for index, place in enumerate(leaf.places) if place <= last]
    if len(kept) == len(leaf.places):
        return leaf
    documents = {leaf.documents[index] for index in kept}
    task = copy.copy(leaf.task)  # shares everything except the list of requests
    task._instances = [request for request in leaf.task.instances if request.doc_id in documents]
    columns = {
        name: [getattr(leaf, name)[index] for index in kept] for name in ("documents", "rows", "places", "digests")
    }
    return dataclasses.replace(leaf, task=task, **columns)
