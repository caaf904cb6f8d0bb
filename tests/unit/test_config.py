"""Study and search-space files: accepted and rejected content, and that only `UserError` is ever raised."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dse.config import DeprecatedNameWarning, LayerRange, load_search_space, load_study, parse_search_space, parse_study
from dse.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))

SPACE: dict[str, Any] = {"name": "s", "methods": ["svd"], "ranks": {"absolute": [1, 4]}}
FULL: dict[str, Any] = {
    "name": "full",
    "model": {"ref": "org/model", "revision": "main", "dtype": "bfloat16", "device": "cpu"},
    "space": {
        "name": "space",
        "kind": "levels",
        "methods": ["svd", "tucker"],
        "layers": {"skip_first": 1, "skip_last": 1},
        "roles": ["query", "up"],
        "groups": {"layers": 2, "roles": {"attention": ["query"], "mlp": ["up"]}},
        "ranks": {"kept_fractions": [0.5, 0.25], "multiple": 8},
        "limits": {"reduction": {"min": 0.1, "max": 0.4}},
        "role_names": {"mixer.in_proj": "query"},
    },
    "objectives": ["accuracy", {"name": "energy_per_token_j", "optional": True}],
    "tasks": ["arc_easy", {"task": "mine.yaml", "metric": "acc", "weight": 2, "limit": 10, "num_fewshot": 0}],
    "evaluation": {"limit": 100, "seed": 1, "batch_size": 4, "max_length": 512, "apply_chat_template": False},
    "measurement": {"prompt_tokens": 8, "new_tokens": 2, "batch_size": 1, "blocks": 2, "warmup_blocks": 0},
    "calibration": {
        "sources": [{"builtin": "general"}, {"file": "text.txt", "weight": 0.5}, {"dataset": "a/b", "split": "test"}],
        "tokens": 128,
        "window": 64,
        "seed": 3,
    },
    "sampler": {"name": "nsga2", "seed": 4},
    "budget": {"trials": 7},
    "enqueue": [{"method": "svd", "rank": 4, "layers": [1]}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with the key at `path`, such as `a.b.c`, set to `value`."""
    data = copy.deepcopy(FULL)
    *parents, last = path.split(".")
    section = data
    for key in parents:
        section = section[key]
    section[last] = value
    return data


def error_of(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_study(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_shipped_spaces_load(path: Path) -> None:
    assert load_search_space(path).name == path.stem


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert parse_study(yaml.safe_load(study.to_yaml())) == study


def test_all_shipped_files_are_checked() -> None:
    assert {path.stem for path in SPACES} == {
        "all_forms",
        "depth_profile",
        "layer_rank",
        "layer_role_fisher",
        "layer_role_rank",
        "moar2024",
    }
    encoders = {"bert_base_sst2", "bert_base_squad", "minilm_embedding"}
    assert {path.stem for path in STUDIES} == {"quickstart", "moar2024_llama2_7b", "llama3_8b", "qwen3_0_6b"} | encoders


def test_every_key_is_read() -> None:
    study = parse_study(FULL)
    assert study.model.dtype == "bfloat16"
    assert study.space.layers == LayerRange(skip_first=1, skip_last=1)
    assert study.space.groups.roles == {"attention": ["query"], "mlp": ["up"]}
    assert [entry.optional for entry in study.objectives] == [False, True]
    assert study.tasks[1].weight == 2
    assert study.calibration.sources[2].split == "test"
    assert study.sampler.name == "nsga2"
    assert study.budget.trials == 7
    assert study.enqueue == FULL["enqueue"]


def test_short_forms_are_expanded() -> None:
    study = parse_study({"name": "s", "model": "org/model", "space": SPACE, "objectives": ["parameters"]})
    assert study.model.ref == "org/model"
    assert study.tasks == []
    assert study.budget.trials == 40
    assert study.sampler.name == "tpe"


@pytest.mark.parametrize(
    ("path", "misspelt", "nearest"),
    [
        ("", "modell", "model"),
        ("", "objectivs", "objectives"),
        ("model", "dtyp", "dtype"),
        ("space", "method", "methods"),
        ("space.layers", "skip_frist", "skip_first"),
        ("space.groups", "layer", "layers"),
        ("space.ranks", "kept_fraction", "kept_fractions"),
        ("space.limits", "reductions", "reduction"),
        ("space.limits.reduction", "maximum", "max"),
        ("evaluation", "batchsize", "batch_size"),
        ("calibration", "windows", "window"),
        ("sampler", "sed", "seed"),
        ("budget", "trial", "trials"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_closest_key(path: str, misspelt: str, nearest: str) -> None:
    where = f"{path}.{misspelt}" if path else misspelt
    message = error_of(changed(where, 1))
    assert misspelt in message
    assert f"did you mean '{nearest}'?" in message or f"known keys: {nearest}" in message


def test_an_unknown_key_without_a_close_match_lists_the_known_keys() -> None:
    assert "known keys: trials" in error_of(changed("budget.xyzzy", 1))


def test_unknown_keys_in_lists() -> None:
    assert "did you mean 'metric'?" in error_of(changed("tasks", [{"task": "a", "metrik": "acc"}]))
    assert "did you mean 'builtin'?" in error_of(changed("calibration.sources", [{"buildin": "general"}]))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("name", "a b", "name"),
        ("name", "", "name"),
        ("model", {"dtype": "float32"}, "`model.ref` is missing"),
        ("model.dtype", "int8", "dtype"),
        ("objectives", [], "objectives"),
        ("objectives", ["accuracy", "accuracy"], "an objective may be named once"),
        ("tasks", ["a", "a"], "a task may be named once"),
        ("tasks", [], "`tasks` must name at least one task"),
        ("space.kind", "grid", "space.kind"),
        ("space.methods", ["svdd"], "did you mean 'svd'?"),
        ("space.methods", ["svd", "svd"], "a method may be named once"),
        ("space.methods", [], "space.methods"),
        ("space.layers", [True], "layers must be integers"),
        ("space.ranks", {}, "exactly one of `absolute` and `kept_fractions`"),
        ("space.ranks", {"absolute": [1], "kept_fractions": [0.5]}, "exactly one"),
        ("space.ranks", {"absolute": []}, "at least one level"),
        ("space.ranks", {"absolute": [0]}, "greater than or equal to 1, but got 0"),
        ("space.ranks", {"absolute": [-3]}, "greater than or equal to 1, but got -3"),
        ("space.ranks", {"absolute": [4, 4]}, "a rank level may be listed once"),
        ("space.ranks", {"kept_fractions": [1.5]}, "less than or equal to 1"),
        ("space.ranks", {"kept_fractions": [0]}, "greater than 0"),
        ("space.ranks.multiple", 0, "multiple"),
        ("space.limits.reduction", {"min": 0.5, "max": 0.1}, "`min <= max` must hold"),
        ("space.limits.reduction.min", float("nan"), "finite number"),
        (
            "calibration.sources",
            [{"builtin": "general", "file": "x"}],
            "exactly one of `builtin`, `file` and `dataset`",
        ),
        ("calibration.sources", [{}], "exactly one of"),
        ("measurement.blocks", 1, "blocks"),
        ("budget.trials", 0, "budget.trials"),
        ("sampler.name", "grid", "sampler.name"),
        ("enqueue", [{"rank": {1, 2}}], "JSON values"),
    ],
)
def test_invalid_values_are_rejected(path: str, value: Any, words: str) -> None:
    assert words in error_of(changed(path, value))


def test_a_subset_space_takes_no_groups() -> None:
    with pytest.raises(ConfigError, match="`groups` is for `kind: levels`"):
        parse_search_space({**SPACE, "kind": "subset", "groups": {"layers": 2}})


def test_at_most_five_problems_are_listed() -> None:
    message = error_of({**FULL, **{f"key{i}": i for i in range(9)}})
    assert message.count("unknown key") == 5
    assert "and 4 more" in message


def test_the_error_of_a_union_is_that_of_the_best_matching_form() -> None:
    assert error_of(changed("space.layers", {"skip_first": -1})).startswith("study: `space.layers.skip_first`: ")
    assert error_of(changed("space.layers", ["x"])).startswith("study: `space.layers.0`: ")
    assert error_of(changed("space.layers", "most")) == (
        "study: `space.layers`: must be all, a list of layer indices, or {skip_first: 1, skip_last: 1}"
    )
    assert "must be all, or a list of roles" in error_of(changed("space.roles", "query"))
    assert "must be together, separate, or named groups" in error_of(changed("space.groups.roles", "apart"))
    assert error_of(changed("space.groups.roles", {"a": "query"})).startswith("study: `space.groups.roles.a`: ")


def test_unknown_keys_that_look_like_type_names() -> None:
    for key in ("Model", "list[int]"):
        assert f"unknown key '{key}'" in error_of({**FULL, key: 3})


def test_shipped_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study(Path("quickstart")) == load_study(ROOT / "studies" / "quickstart.yaml")
    assert load_search_space(Path("layer_rank")) == load_search_space(ROOT / "search_spaces" / "layer_rank.yaml")
    assert parse_study({**FULL, "space": "layer_rank"}, base=tmp_path).space.name == "layer_rank"
    (tmp_path / "layer_rank").write_text(yaml.safe_dump(SPACE))  # an existing file takes precedence
    assert parse_study({**FULL, "space": "layer_rank"}, base=tmp_path).space.name == SPACE["name"]
    with pytest.raises(ConfigError, match=r"one of the shipped studies \(bert.*did you mean 'quickstart'"):
        load_study(Path("quickstrat"))


def test_old_names_are_accepted_with_a_warning() -> None:
    rungs = {"shares": [0.5], "min_gain": 0.01, "resume_stopped": None}
    old = {"shares": [0.5], "least_gain": 0.01, "second_look": None, "tell": "estimate"}
    expected = parse_study({**FULL, "objectives": ["target_log_likelihood"], "fidelity": rungs})
    with pytest.warns(DeprecatedNameWarning) as caught:
        found = parse_study({**FULL, "objectives": ["gold_log_likelihood"], "fidelity": old})
    assert found == expected
    assert found.to_yaml() == expected.to_yaml()
    messages = " ".join(sorted({str(warning.message) for warning in caught}))
    for words in (
        "`fidelity.least_gain` is now `fidelity.min_gain`",
        "`fidelity.second_look` is now `fidelity.resume_stopped`",
        "`fidelity.tell` was removed",
        "objective `gold_log_likelihood` is now `target_log_likelihood`",
    ):
        assert words in messages
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_study(yaml.safe_load(found.to_yaml()))


@pytest.mark.parametrize(
    ("fidelity", "words"),
    [
        ({"tell": "bound"}, "`tell` was removed: the sampler always gets a stopped trial's estimates; remove it"),
        ({"least_gain": 0.1, "min_gain": 0.1}, "`least_gain` is the old name of `min_gain`; remove `least_gain`"),
    ],
)
def test_old_names_that_have_no_new_meaning_are_rejected(fidelity: dict[str, Any], words: str) -> None:
    assert words in error_of({**FULL, "fidelity": fidelity})


@pytest.mark.parametrize("data", [None, [], "text", 3, [FULL]])
def test_a_study_must_be_a_mapping(data: Any) -> None:
    assert "must be a mapping" in error_of(data)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder, elsewhere = tmp_path / "home", tmp_path / "studies", tmp_path / "elsewhere"
    for path in (home, folder / "models" / "mine", elsewhere / "here"):
        path.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    study = {**FULL, "space": "../space.yaml", "tasks": ["tasks/mine.yml", "arc_easy", "~/other.yaml"]}
    expected = {
        "./model": folder / "model",
        "~/model": home / "model",
        "/models/x": Path("/models/x"),
        "model.gguf": folder / "model.gguf",
        "models/mine": folder / "models" / "mine",  # a folder next to the study file
        "here": elsewhere / "here",  # a folder in the current directory
    }
    for ref, path in expected.items():
        (folder / "study.yaml").write_text(yaml.safe_dump({**study, "model": ref}))
        loaded = load_study(Path("../studies/study.yaml"))
        assert loaded.model.ref == str(path), ref
        # The resolved study does not depend on the folder from which it is read.
        assert parse_study(yaml.safe_load(loaded.to_yaml()), base=home) == loaded
    assert loaded.space.name == SPACE["name"]
    assert [task.task for task in loaded.tasks] == [
        str(folder / "tasks/mine.yml"),
        "arc_easy",
        str(home / "other.yaml"),
    ]
    assert [source.file for source in loaded.calibration.sources] == [None, str(folder / "text.txt"), None]
    for ref in ("org/model", "gpt2", "demo:smollm2-135m-instruct"):
        assert parse_study({**FULL, "model": ref}, base=folder).model.ref == ref


@pytest.mark.parametrize(
    "changes",
    [{"model": "~no-such-user-here/x"}, {"tasks": ["~no-such-user-here/t.yaml"]}, {"space": "~no-such-user-here"}],
)
def test_the_home_folder_of_an_unknown_user(changes: dict[str, Any]) -> None:
    assert "no-such-user-here" in error_of({**FULL, **changes})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a: [1",
        b"a: b: c",
        b"\tname: x",
        b"\xff\xfe\x00",
        b"a: \x00",
        b"- 1\n- 2",
        b"when: 2024-99-99",
        b'a: !!int ""',
        b"a: !!float x",
        b"a: !!bool maybe",
        b"a: !!timestamp soon",
        b"? [a, b]\n: c",
        b"a: !!python/object/apply:os.system [ls]",
        b"a: *nowhere",
        b"a: &a [*a]",
        b"enqueue: &a [{tensors: *a}]",
        b"name: 0x" + b"f" * 5000,
        b"budget: {trials: 0x" + b"f" * 5000 + b"}",
        b"[" * 3000,
        b"a: " + b"{b: " * 600 + b"1" + b"}" * 600,
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(ord("a"), ord("a") + 9)
        )
        + b"name: *j",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_malformed_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    for load in (load_study, load_search_space):
        with pytest.raises(ConfigError) as caught:
            load(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < len(str(path)) + 2000


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / ("x" * 300 + ".yaml"), Path("a\0b")):
        with pytest.raises(ConfigError, match="must be a readable YAML file"):
            load_study(path)
    with pytest.raises(ConfigError, match=r"none\.yaml must be a readable YAML file"):
        parse_study({**FULL, "space": "none.yaml"}, base=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------

# PyYAML writes these three line separators, but does not read them back.
TEXTS = st.text(st.characters(codec=None, exclude_categories=[], exclude_characters="\x85\u2028\u2029"), max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -3, 10**30, float("inf"), float("-inf"), float("nan")]),
    st.floats(),
    TEXTS,
    st.sampled_from(["all", "svd", "a\0b", "~x/y.yaml", "\ud800", "../x.yaml", "./", ".gguf", "x" * 5000]),
    st.dates(),
    st.binary(max_size=4),
)
KEYS = st.one_of(TEXTS, st.sampled_from(["name", "ref", "absolute", "min"]), st.integers(), st.none())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


PLACES = list(places(FULL))


def mutated(data: Any, path: tuple[Any, ...], value: Any, key: Any, action: str) -> Any:
    """Replace or remove the value at `path`, or add a key to it. A path that does not exist changes nothing."""
    data = copy.deepcopy(data)
    section, parent = data, None
    for step in path:
        try:
            parent, section = section, section[step]
        except (LookupError, TypeError):
            return data
    if action == "add" and isinstance(section, dict):
        section[key] = value
    elif parent is None:
        return value
    elif action == "remove" and isinstance(parent, (dict, list)):
        del parent[path[-1]]
    elif isinstance(parent, (dict, list)):
        parent[path[-1]] = value
    return data


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(PLACES), VALUES, KEYS, st.sampled_from(["replace", "replace", "add", "remove"])),
    min_size=1,
    max_size=3,
)


@given(MUTATIONS)
@settings(max_examples=400, deadline=None)
def test_a_mutated_study_is_read_or_rejected(mutations: list[tuple[Any, Any, Any, str]]) -> None:
    data: Any = FULL
    for path, value, key, action in mutations:
        data = mutated(data, path, value, key, action)
    study, message = None, ""
    try:
        study = parse_study(data)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    if study is not None:
        assert parse_study(yaml.safe_load(study.to_yaml())) == study


# YAML tokens, one per line, and pieces of the schema.
YAML_TOKENS = """\
-
{
}
[
]
:
?
&a
*a
!!int
!!set
!!timestamp
!!binary
!!omap
'
#
<<:
|
>
0x
1e9
1:30
.nan
2024-01-01
%YAML 1.1
---
..."""
YAML_PIECES = st.sampled_from(
    [
        *(f"{token} " for token in YAML_TOKENS.splitlines()),
        *("\n", "  ", "\t", '"', "\\ud800", "\ufeff", "name: x\n", "model: a/b\n"),
        *("space:\n", "  ranks: {absolute: [1]}\n", "objectives: [parameters]\n"),
    ]
)


@given(st.one_of(st.lists(st.one_of(YAML_PIECES, TEXTS), max_size=25).map("".join), st.binary(max_size=60)))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_or_rejected(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    messages = []
    for load in (load_study, load_search_space):
        try:
            load(path)
        except UserError as error:
            messages.append(str(error))
    assert "\n" not in "".join(messages)
