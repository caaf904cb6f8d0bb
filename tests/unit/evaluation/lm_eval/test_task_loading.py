"""Tasks from lm-eval's registry, from the package, from the shared folder, and malformed ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import lm_eval.tasks
import pytest
import yaml
from evaluation_support import KINDS, TaskWriter, sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from dse.errors import TaskError
from dse.evaluation import Evaluator, TaskSource, TaskSpec, builtin_tasks, resolve_task
from dse.evaluation.lm_eval import task_loading as lm_eval_tasks
from dse.models import LoadedModel

SHARED = Path(os.environ.get("DSE_SHARED", Path(__file__).resolve().parents[5] / "shared")) / "eval"


@pytest.mark.usefixtures("no_hub")
def test_unreachable_hub_dataset_is_reported_in_one_line(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice", dataset_path="allenai/ai2_arc", dataset_name="ARC-Easy", dataset_kwargs=None)
    with pytest.raises(TaskError, match="needs the dataset 'allenai/ai2_arc' from the Hugging Face hub") as error:
        Evaluator(loaded, [TaskSpec(str(path))])
    assert "\n" not in str(error.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_hub")
def test_registry_names_are_found_or_corrected(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the whole registry takes seconds; one of its folders suffices.
    registry = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / "arc"))
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda: registry)
    with pytest.raises(TaskError, match="needs its dataset from the Hugging Face hub") as error:
        Evaluator(loaded, [TaskSpec("arc_easy")])
    assert "\n" not in str(error.value)
    with pytest.raises(TaskError, match="but got 'arc_eazy'; did you mean 'arc_easy'"):
        Evaluator(loaded, [TaskSpec("arc_eazy")])


def test_group_is_one_task_over_all_its_documents(
    loaded: LoadedModel, write_task: TaskWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_task("choice", rows=rows, name=f"member_{rows}") for rows in (6, 14)]
    for path in paths:
        config = yaml.safe_load(path.read_text())
        config["dataset_kwargs"]["data_files"] = {"test": str(path.with_suffix(".jsonl"))}
        path.write_text(yaml.safe_dump(config))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["member_6", "member_14"]}))
    registry = TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda: registry)

    evaluator = Evaluator(loaded, [TaskSpec("both")])
    (result,) = evaluator.evaluate().tasks
    alone = [Evaluator(loaded, [TaskSpec(str(path))]).evaluate().tasks[0] for path in paths]
    assert (result.task, result.documents) == ("both", 20)
    assert result.value == pytest.approx((6 * alone[0].value + 14 * alone[1].value) / 20)
    assert result.outcomes.tolist() == [*alone[0].outcomes, *alone[1].outcomes]

    drawn = Evaluator(loaded, [TaskSpec("both", limit=5)]).documents
    assert sum(map(len, drawn.values())) == 5
    one = Evaluator(loaded, [TaskSpec("both", limit=1)])
    assert len(one.documents) == 1
    assert one.evaluate().tasks[0].documents == 1


@pytest.mark.parametrize("name", sorted(builtin_tasks()))
def test_built_in_task_runs(loaded: LoadedModel, name: str) -> None:
    evaluator = Evaluator(loaded, [TaskSpec(name)], limit=3, max_length=1024)
    (result,) = evaluator.evaluate().tasks
    assert (result.task, result.documents) == (name, 3)
    assert result.kind in ("accuracy", "perplexity")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared evaluation data are not at {SHARED} (set DSE_SHARED)")
@pytest.mark.parametrize(
    ("name", "metric", "size"),
    [("arc_easy", "acc", 2376), ("openbook_qa", "acc", 500), ("lambada_openai", "acc", 5153)],
)
def test_shared_task_runs(loaded: LoadedModel, name: str, metric: str, size: int) -> None:
    evaluator = Evaluator(loaded, [TaskSpec(str(SHARED / f"{name}.yaml"))], limit=3, max_length=1024)
    (result,) = evaluator.evaluate().tasks
    assert (result.task, result.metric, result.documents, result.kind) == (f"{name}_local", metric, 3, "accuracy")
    assert max(evaluator.documents[f"{name}_local"]) < size


TEMPLATES = st.one_of(
    st.sampled_from(
        ["question", "{{question}}", "{{gold}}", "{{choices[gold]}}", "{{", "{{x}}", "{% for i in choices %}", ""]
    ),
    st.text(alphabet="{}%|[]. a0'\"", max_size=12),
    st.integers(-2, 9),
    st.none(),
    st.lists(st.text(max_size=3), max_size=3),
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "output_type": st.sampled_from([*("loglikelihood", "multiple_choice", "loglikelihood_rolling"), "", 7, None]),
        "doc_to_text": TEMPLATES,
        "doc_to_target": TEMPLATES,
        "doc_to_choice": TEMPLATES,
        "test_split": st.sampled_from(["test", "train", None, 3]),
        "fewshot_split": st.sampled_from(["test", "train", None]),
        "num_fewshot": st.sampled_from([0, 1, 3, -1, 99, "two"]),
        "metric_list": st.sampled_from(
            [None, [], [{}], "acc", [{"metric": "acc"}], [{"metric": "f1"}], [{"metric": []}]]
        ),
        "filter_list": st.sampled_from([None, [], [{}], [{"name": "x", "filter": [{"function": "regex"}]}]]),
        "dataset_kwargs": st.sampled_from([{}, {"data_files": "rows.jsonl"}, {"data_files": "*.jsonl", "split": "x"}]),
        "repeats": st.sampled_from([1, 2, 0, -1, "x"]),
        "description": TEMPLATES,
        "target_delimiter": st.sampled_from([" ", "", None, 4]),
        "metadata": st.sampled_from([None, 3, {"version": "x"}]),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, st.sampled_from(["choice", "cloze", "rolling"]))
def test_arbitrary_task_file_raises_only_task_errors(
    loaded: LoadedModel, tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    rows = "".join(
        f'{{"question": "{sentence(i, 4)}", "choices": ["a", "b"], "gold": {i % 2}, "text": "x y"}}\n' for i in range(4)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    base = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**base, **KINDS[kind], **changes}))
    try:
        evaluator = Evaluator(loaded, [TaskSpec(str(tmp_path / "t.yaml"))], limit=3)
    except TaskError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert evaluator.evaluate().tasks[0].documents <= 4


@pytest.mark.parametrize(
    ("suffix", "content", "changes"),
    [
        ("jsonl", "", {}),
        ("csv", "question,choices,gold\n", {"dataset_path": "csv"}),
        ("jsonl", '{"rows": []}', {"dataset_kwargs": {"field": "rows"}}),
    ],
)
def test_task_without_a_document_is_reported(
    loaded: LoadedModel, write_task: TaskWriter, suffix: str, content: str, changes: dict[str, Any]
) -> None:
    kwargs = {"data_files": {"test": f"local_choice.{suffix}"}, **changes.get("dataset_kwargs", {})}
    path = write_task("choice", **{**changes, "dataset_kwargs": kwargs})
    path.with_suffix(f".{suffix}").write_text(content)
    with pytest.raises(TaskError, match=r"must have at least one document, but .* has none") as error:
        Evaluator(loaded, [TaskSpec(str(path))])
    assert "\n" not in str(error.value)


def test_filter_that_removes_all_documents_is_reported(write_task: TaskWriter) -> None:
    spec = TaskSpec(str(write_task("choice")))
    source = resolve_task(spec)
    assert source.config is not None

    def build(process: Any) -> list[lm_eval_tasks.LeafTask]:
        config = {**(source.config or {}), "process_docs": process}
        filtered = TaskSource(source.name, config, source.path)
        return lm_eval_tasks.build_leaves(spec, filtered, limit=None, seed=0, chat_template=None)

    assert len(build(lambda rows: rows.filter(lambda row: row["gold"] == 0))[0].rows) == 3
    with pytest.raises(TaskError, match=r"must have at least one document, but .* or its filter removes all"):
        build(lambda rows: rows.filter(lambda row: row["gold"] == 7))
