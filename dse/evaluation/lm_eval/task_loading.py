"""Load lm-eval tasks: their documents, requests and metrics, with every defect found before the first trial."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets.config
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager

from dse.errors import TaskError, UserError, did_you_mean
from dse.evaluation.hub_access import hub_dataset
from dse.evaluation.task_spec import LOCAL_DATASETS, TaskSource, TaskSpec, builtin_tasks
from dse.files import disk_errors

__all__ = ["LeafTask", "answer_with_dummies", "as_task_error", "build_leaves", "collect_outcomes", "declared_metrics"]

_DUMMY_ANSWERS: Mapping[str, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
# From the messages of `datasets` about an empty file, an empty split, and a split that a filter has emptied.
_EMPTY_MESSAGES = ("corresponds to no data", "size 0")
_FIELDS = {f.name for f in fields(TaskConfig)}


@dataclass(eq=False)
class LeafTask:
    """One lm-eval task and the documents drawn from it; a group has several.

    Attributes:
        task: The lm-eval task with its requests.
        documents: Indices of the drawn documents, ascending.
        rows: The documents, in the same order.
        places: Place of each document in the order of drawing of the whole task; a limit of n draws the places below n.
        digests: Digest of each document: its task's definition and version, its row, and all its requests.
    """

    task: Any
    documents: list[int]
    rows: list[Any] = field(repr=False)
    places: list[int] = field(default_factory=list, repr=False)
    digests: list[str] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """Name of the lm-eval task."""
        return str(self.task.config.task)

    def definition(self) -> dict[str, Any]:
        """The task's configuration without paths, so that it does not depend on where the data is stored."""
        left_out = ("dataset_kwargs", "metadata", "fewshot_config")  # few-shot settings show in the requests
        return {key: value for key, value in self.task.dump_config().items() if key not in left_out}

    def with_digests(self) -> LeafTask:
        """This task with the digests of its documents."""
        head = _stable([self.name, self.task.VERSION, self.definition()])
        digests = []
        for row, requests in zip(self.rows, self.requests(), strict=True):
            asked = [[request.idx, request.request_type, request.args, request.repeats] for request in requests]
            digests.append(hashlib.sha256(head + _stable(row) + _stable(asked)).hexdigest()[:32])
        return replace(self, digests=digests)

    def requests(self) -> list[list[Any]]:
        """The requests of each document, in their order within it."""
        by_document: dict[int, list[Any]] = {document: [] for document in self.documents}
        for request in self.task.instances:
            by_document[request.doc_id].append(request)
        return [sorted(requests, key=lambda request: request.idx) for requests in by_document.values()]

    def fingerprint_parts(self) -> Iterator[bytes]:
        """Everything that scores depend on besides the model: definition, documents and requests."""
        yield _stable([self.name, self.task.VERSION, self.definition(), self.documents])
        for instance in self.task.instances:
            yield _stable([instance.request_type, instance.args, instance.repeats])
        for row in self.rows:
            yield _stable(row)


def build_leaves(
    spec: TaskSpec,
    source: TaskSource,
    *,
    limit: int | None,
    seed: int,
    chat_template: Callable[..., str] | None,
    fresh: int = 0,
) -> list[LeafTask]:
    """Load a task or the members of a group, draw the documents by seed, and build the requests.

    Args:
        spec: The task and its settings.
        source: The resolved task.
        limit: Number of documents; None means all.
        seed: Seed of the documents and few-shot examples.
        chat_template: Applied to each prompt; None for none.
        fresh: As in `evaluator_for`.

    Raises:
        TaskError: The task is unknown, malformed, needs an unreachable hub, or has too few documents.
    """
    with as_task_error(spec.task), disk_errors(Path(datasets.config.HF_DATASETS_CACHE)):
        with _empty_data_as_task_error(spec.task):
            tasks = _load(source)
        for task in tasks:
            _check_supported(spec.task, task)
            shots = spec.num_fewshot if spec.num_fewshot is not None else task.get_config("num_fewshot") or 0
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(seed)
        rows = [task.eval_docs for task in tasks]
        chosen = _draw(source.name, [len(row) for row in rows], limit, seed, fresh)
        if fresh and sum(map(len, chosen)) < fresh:
            raise TaskError(
                f"task '{spec.task}' must have {fresh} documents beyond its limit ({limit or 'all'}), but has"
                f" {sum(map(len, chosen))}; lower `fidelity.final_documents` or the task's `limit`"
            )
        leaves = [
            LeafTask(task, list(drawn), [row[index] for index in drawn], list(drawn.values()))
            for task, row, drawn in zip(tasks, rows, chosen, strict=True)
            if drawn
        ]
        if not leaves:
            raise _no_document(spec.task)
        for leaf in leaves:
            leaf.task.build_all_requests(
                samples=leaf.documents if len(leaf.documents) < len(leaf.task.eval_docs) else None,
                apply_chat_template=chat_template is not None,
                fewshot_as_multiturn=chat_template is not None,
                chat_template=chat_template,
            )
            for instance in leaf.task.instances:  # lm-eval numbers the drawn documents from 0
                instance.doc_id = leaf.documents[instance.doc_id]
        return [leaf.with_digests() for leaf in leaves]


def answer_with_dummies(leaf: LeafTask) -> bool:
    """Put dummy answers into the requests for a dry run; False if the task needs generated text."""
    task = leaf.task
    is_scorable = isinstance(task, ConfigurableTask) and not callable(task.config.process_results)
    if not is_scorable or any(instance.request_type not in _DUMMY_ANSWERS for instance in task.instances):
        return False
    for instance in task.instances:
        instance.resps = [_DUMMY_ANSWERS[instance.request_type]] * instance.repeats
    return True


def declared_metrics(leaf: LeafTask) -> list[str]:
    """Names of the metrics that the task declares; its documents may yield fewer."""
    filters = [ensemble.name for ensemble in leaf.task._filters]
    return [_metric_key(name, ensemble, filters) for ensemble in filters for name in leaf.task.aggregation()]


def collect_outcomes(leaf: LeafTask) -> dict[str, dict[int, Any]]:
    """Turn the answers in the task's requests into metric -> {position of the document: outcome}.

    Source: the second half of `lm_eval.evaluator.evaluate`, for one process and without sample logging.
    """
    task = leaf.task
    task.apply_filters()
    filters = list(task.instances[0].filtered_resps)
    outcomes: dict[str, dict[int, Any]] = {}
    for position, (row, instances) in enumerate(zip(leaf.rows, leaf.requests(), strict=True)):
        for ensemble in filters:
            metrics = task.process_results(row, [instance.filtered_resps[ensemble] for instance in instances])
            for name, outcome in metrics.items():
                outcomes.setdefault(_metric_key(name, ensemble, filters), {})[position] = outcome
    return outcomes


def _metric_key(name: str, ensemble: str, filters: Sequence[str]) -> str:
    return name if len(filters) == 1 else f"{name},{ensemble}"


def _load(source: TaskSource) -> list[Any]:
    if source.config is None:
        manager = _task_manager()
        if source.name not in manager.task_index:
            known = [*builtin_tasks(), *manager.all_tasks]
            raise TaskError(
                f"a task must be a YAML file, a built-in task ({', '.join(builtin_tasks())}) or one of lm-eval's "
                f"{len(manager.all_tasks)} tasks, but got '{source.name}'{did_you_mean(source.name, known)}"
            )
        with hub_dataset(source.name, "its dataset"):
            return list(manager.load([source.name])["tasks"].values())
    _check_config(source.config, source.path or Path(source.name))
    config = copy.deepcopy(source.config)  # lm-eval changes its argument
    for key in ("tag", "task_alias"):
        config.pop(key, None)
    dataset = config["dataset_path"]
    if dataset in LOCAL_DATASETS or Path(dataset).is_dir():
        return [ConfigurableTask(config=config)]
    with hub_dataset(source.name, f"the dataset '{dataset}'"):
        return [ConfigurableTask(config=config)]


@contextmanager
def _empty_data_as_task_error(name: str) -> Iterator[None]:
    """Turn lm-eval's unspecific errors about a task without documents into a `TaskError` that says so."""
    try:
        yield
    except StopIteration:
        raise _no_document(name) from None
    except (IndexError, ValueError) as error:
        if any(message in str(error) for message in _EMPTY_MESSAGES):
            raise _no_document(name) from error
        raise


def _no_document(name: str) -> TaskError:
    return TaskError(
        f"a task must have at least one document, but '{name}' has none, or its filter removes all; check its data,"
        " `test_split` and `process_docs`"
    )


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse unknown keys and metrics; lm-eval would download an unknown metric from the hub and execute it."""
    for key in config:
        if key not in _FIELDS:
            raise TaskError(
                f"a task file may only have lm-eval's keys, but '{path}' has '{key}'{did_you_mean(key, _FIELDS)}"
            )
    metrics = config.get("metric_list")
    if metrics is None:
        return
    if not isinstance(metrics, list) or not all(
        isinstance(m, dict) and isinstance(m.get("metric"), str) for m in metrics
    ):
        raise TaskError(f"`metric_list` must be a list of mappings with a `metric`, but '{path}' has {metrics!r:.80}")
    for entry in metrics:
        if entry["metric"] not in METRIC_REGISTRY or entry.get("hf_evaluate"):
            raise TaskError(
                f"a metric must be one of lm-eval's own, but '{path}' has '{entry['metric']}'"
                f"{did_you_mean(entry['metric'], METRIC_REGISTRY)}"
            )
        aggregation = entry.get("aggregation", "mean")
        if not isinstance(aggregation, str) or aggregation not in AGGREGATION_REGISTRY:
            raise TaskError(f"an aggregation must be one of lm-eval's own, but '{path}' has {aggregation!r:.80}")


def _check_supported(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskError(f"a task must not run code that a model writes, but '{name}' does; remove it")
    repeats = task.get_config("repeats")
    if not isinstance(repeats, int) or repeats < 1:
        raise TaskError(f"`repeats >= 1` must hold for task '{name}', but got repeats={repeats!r}")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"a task must be text only, but '{name}' has images or sound; remove it")


def _draw(name: str, sizes: Sequence[int], limit: int | None, seed: int, fresh: int) -> list[dict[int, int]]:
    """Indices drawn from each member, ascending, with their places in the order of drawing.

    A limit draws the places below it, so a smaller limit draws a subset of a larger one.
    """
    order = [(member, index) for member, size in enumerate(sizes) for index in range(size)]
    random.Random(f"{seed}:{name}").shuffle(order)
    drawn = order[:limit] if not fresh else order[limit:][:fresh] if limit is not None else []
    chosen: list[dict[int, int]] = [{} for _ in sizes]
    for place, (member, index) in sorted(enumerate(drawn), key=lambda placed: placed[1]):
        chosen[member][index] = place
    return chosen


@functools.lru_cache(maxsize=1)
def _task_manager() -> TaskManager:
    """lm-eval's registry, built once and only if a task needs it, since that reads thousands of files."""
    return TaskManager()


@contextmanager
def as_task_error(name: str) -> Iterator[None]:
    """Turn any error that lm-eval, datasets or Jinja raise about a task's definition or data into a `TaskError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise TaskError(
            f"lm-eval must be able to load and score task '{name}', but raised {type(error).__name__}: {reason:.300}"
        ) from error


def _stable(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_stable_text).encode()).digest()


def _stable_text(value: object) -> str:
    return str(getattr(value, "__qualname__", None) or value)
