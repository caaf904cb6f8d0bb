from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_support import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dse.errors import TaskError
from dse.evaluation import TaskSpec, builtin_tasks, resolve_task
from dse.evaluation.task_spec import read_task_file

FILE: dict[str, Any] = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": "rows.jsonl"}}


def resolve(path: Path | str) -> dict[str, Any]:
    config = resolve_task(TaskSpec(str(path))).config
    assert config is not None
    return config


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_data_files_are_relative_to_the_task_file_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tasks" / "rows.jsonl", "{}")
    write(tmp_path / "data" / "more.jsonl", "{}")
    monkeypatch.chdir(tmp_path)
    near, far = str(tmp_path / "tasks" / "rows.jsonl"), str(tmp_path / "data" / "more.jsonl")
    formats: list[tuple[object, object]] = [
        ("rows.jsonl", near),
        (near, near),
        (["rows.jsonl", "../data/more.jsonl"], [near, far]),
        ({"test": "rows.jsonl", "train": ["../data/more.jsonl"]}, {"test": near, "train": [far]}),
        ({"test": "https://example.org/rows.jsonl"}, {"test": "https://example.org/rows.jsonl"}),
        ("*.jsonl", str(tmp_path / "tasks" / "*.jsonl")),
    ]
    for written, expected in formats:
        path = write(tmp_path / "tasks" / "t.yaml", {**FILE, "dataset_kwargs": {"data_files": written}})
        assert resolve("tasks/t.yaml")["dataset_kwargs"]["data_files"] == expected
        assert resolve(path)["dataset_kwargs"]["data_files"] == expected


def test_folders_are_relative_to_the_task_file(tmp_path: Path) -> None:
    (tmp_path / "sets" / "one").mkdir(parents=True)
    content = {**FILE, "dataset_path": "sets/one", "dataset_kwargs": {"data_dir": "sets"}}
    config = resolve(write(tmp_path / "t.yml", content))
    assert config["dataset_path"] == str(tmp_path / "sets" / "one")
    assert config["dataset_kwargs"]["data_dir"] == str(tmp_path / "sets")
    assert resolve(write(tmp_path / "u.yml", {**content, "dataset_path": "org/name"}))["dataset_path"] == "org/name"


def test_includes_are_merged_with_paths_relative_to_their_own_file(tmp_path: Path) -> None:
    write(tmp_path / "base" / "rows.jsonl", "{}")
    write(tmp_path / "base" / "base.yaml", {**FILE, "doc_to_text": "base", "task_list": ["x"]})
    write(tmp_path / "other.yaml", {"doc_to_text": "other", "test_split": "test"})
    path = write(tmp_path / "t.yaml", {"include": ["base/base.yaml", "other.yaml"], "task": "top"})
    config = resolve(path)
    assert config == {
        "task": "top",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "base" / "rows.jsonl")},
        "doc_to_text": "other",
        "test_split": "test",
    }
    assert resolve(write(path, {"include": "base/base.yaml"}))["task"] == "mine"


def test_yaml_path_is_a_file_and_other_names_are_left_to_lm_eval(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", "{}")
    source = resolve_task(TaskSpec(str(write(tmp_path / "T.YAML", FILE))))
    assert (source.name, source.path) == ("mine", tmp_path / "T.YAML")
    source = resolve_task(TaskSpec("arc_easy"))
    assert (source.name, source.config, source.path) == ("arc_easy", None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must exist, but"),
        ("task: [1", "must be YAML"),
        ("a: b: c", r"mapping values are not allowed here \(line 1\)"),
        ("- task", "must be a mapping with string keys, but .* holds a list"),
        ("", "holds a NoneType"),
        ("1: 2", "must be a mapping with string keys"),
        ("task: !function utils.run", "`!function utils.run` would run code"),
        ("task: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &a [*a]", "must be YAML"),
        ('a: "\\ud800"', "must be YAML"),
        ("a: " + "[" * 1500, "must be YAML"),
        ("a: 2001-13-45", "must be YAML"),
        ("? [1]\n: 2", "must be YAML"),
        ({"dataset_path": "json"}, "must set `task` to a string"),
        ({"task": "t"}, "must set `dataset_path` to a string"),
        ({"task": 3, "dataset_path": "json"}, "task=3"),
        ({"task": "t", "dataset_path": "json"}, "`dataset_kwargs.data_files` must name the data"),
        ({"task": "t", "dataset_path": "json", "dataset_kwargs": [1]}, "`dataset_kwargs` must be a mapping"),
        (
            {**FILE, "dataset_kwargs": {"data_files": "gone.jsonl"}},
            "gone.jsonl' does not; paths in 't.yaml' are relative",
        ),
        ({**FILE, "dataset_kwargs": {"data_files": {"test": ["gone.jsonl"]}}}, "gone.jsonl' does not"),
        ({**FILE, "dataset_kwargs": {"data_files": {"test": 5}}}, "must be a string or a list of strings"),
        ({**FILE, "dataset_kwargs": {"data_files": "x" * 5000}}, "must exist"),
        ({**FILE, "dataset_kwargs": {"data_files": "~nobody_at_all/x"}}, "must exist"),
        ({**FILE, "dataset_kwargs": {"data_dir": "gone"}}, "gone' does not"),
        ({**FILE, "dataset_path": "pandas", "dataset_kwargs": {}}, "which can run code"),
        ({**FILE, "dataset_kwargs": {"data_files": "t.yaml"}, "class": "X"}, "names a Python class"),
        ({"group": "g", "task": ["a", "b"]}, "describes a group"),
        ({"include": "t.yaml"}, "includes itself"),
        ({"include": "gone.yaml"}, "gone.yaml' does not"),
        ({"include": 3}, "`include` must be a string"),
    ],
)
def test_invalid_task_file_is_refused_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "t.yaml"
    if content is not None:
        write(path, content)
    with pytest.raises(TaskError, match=message) as error:
        resolve_task(TaskSpec(str(path)))
    assert "\n" not in str(error.value)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TaskError, match="readable UTF-8"):
        resolve_task(TaskSpec(str(tmp_path / "t.yaml")))
    with pytest.raises(TaskError, match="readable UTF-8"):
        read_task_file(tmp_path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"task": " "}, "empty string"),
        ({"task": "a\0.yaml"}, "printable"),
        ({"task": "t", "weight": 0.0}, "`weight > 0`"),
        ({"task": "t", "weight": float("nan")}, "`weight > 0`"),
        ({"task": "t", "limit": 0}, "`limit >= 1`"),
        ({"task": "t", "num_fewshot": -1}, "`num_fewshot >= 0`"),
    ],
)
def test_invalid_spec_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskSpec(**keywords)


def test_unknown_built_in_name_is_refused() -> None:
    with pytest.raises(TaskError, match=r"a built-in task must be one of .*'dse_gramar'"):
        resolve_task(TaskSpec("dse_gramar"))


def test_built_in_tasks_are_found_by_name() -> None:
    for name, path in builtin_tasks().items():
        assert path.is_file()
        source = resolve_task(TaskSpec(name))
        assert (source.name, source.path) == (name, path)


KEYS = st.sampled_from(
    ["task", "dataset_path", "dataset_kwargs", "data_files", "include", "group", "class", "doc_to_text"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["json", "t.yaml", ".", "*"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="{}[]&*!|>-:?,'\"#%@ \n\tabc01" + string.punctuation, max_size=60),
        st.dictionaries(KEYS, VALUES, max_size=6).map(lambda value: yaml.dump(value, allow_unicode=True)),
        st.dictionaries(KEYS, VALUES, max_size=4).map(
            lambda value: yaml.safe_dump({**KINDS["choice"], **FILE, **value})
        ),
    )
)
def test_arbitrary_text_raises_only_task_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        source = resolve_task(TaskSpec(str(path)))
    except TaskError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(source.config, dict)
        assert source.name == source.config["task"]
