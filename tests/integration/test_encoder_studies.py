"""Studies of BERT, RoBERTa and DistilBERT with each head: search, front, export, and evaluation of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import ENCODER_FAMILIES, ENCODER_WORDS, save_encoder
from tiny_study import save_choice_task

from dse.config import HEAD_COLUMNS, DatasetTaskConfig, EvaluationConfig, load_study, parse_study
from dse.errors import ConfigError, ModelError
from dse.evaluation import evaluator_for
from dse.export import ExportRequest, export_points
from dse.models import head_of, load_model, load_topology
from dse.models.transformers_patches import quiet_transformers
from dse.search.spaces.base import SearchSpace
from dse.study import Study, StudyListener, load_study_model, run_study, study_bank
from dse.trial.objectives import check_tasks, resolve_objectives

ROOT = Path(__file__).resolve().parents[2]
HEADS = ("classification", "question_answering", "embedding", "masked_lm")
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
}


def words(seed: int, length: int) -> str:
    return " ".join(ENCODER_WORDS[(seed * 5 + i * (seed % 3 + 1)) % len(ENCODER_WORDS)] for i in range(length))


def rows_for(head: str) -> list[dict[str, Any]]:
    if head == "classification":
        return [{"text": words(i, 3 + i % 4), "label": i % 3} for i in range(24)]
    if head == "question_answering":
        return [{"question": words(i, 2), "context": words(i, 9), "answers": words(i, 2)} for i in range(12)]
    return [{"sentence1": words(i, 4), "sentence2": words(3 * i + 1, 4)} for i in range(16)]


def tasks_for(head: str, folder: Path) -> list[Any]:
    if head == "masked_lm":
        return [str(save_choice_task(folder, documents=6))]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_for(head)))
    return [{"dataset": str(data), "head": head}]


def study_of(model: Path, tasks: list[Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "encoder",
        "model": {"ref": str(model), "device": "cpu"},
        "space": {
            "name": "tiny",
            "methods": ["svd"],
            "groups": {"layers": 1, "roles": {"attention": ["query", "key"], "mlp": ["intermediate", "output"]}},
            "ranks": {"absolute": [2, 6]},
        },
        "objectives": ["accuracy", "prefill_latency_s", "parameters"],
        "tasks": tasks,
        "measurement": {"prompt_tokens": 8, "blocks": 2, "warmup_blocks": 0, "max_warmup_blocks": 0, "precision": None},
        "sampler": {"name": "random", "seed": 1},
        "budget": {"trials": 3},
        **changes,
    }


def export_last_trial(study: Study, folder: Path) -> tuple[int, Path]:
    """Export the last complete trial, without verification in a fresh process, which has its own tests."""
    trial = int(study.trials().query("state == 'complete'")["trial"].iloc[-1])
    loaded = load_study_model(study.config)
    bank, _ = study_bank(
        study.config, loaded, SearchSpace.from_config(study.config.space, loaded.topology), StudyListener()
    )
    export_points(loaded, [ExportRequest(study.record(trial).point, folder)], bank, verify=False)
    return trial, folder


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_study_front_and_export(tmp_path: Path, family: str, head: str) -> None:
    model = save_encoder(tmp_path / "model", family, head)
    config = parse_study(study_of(model, tasks_for(head, tmp_path)))
    study = run_study(config, out=tmp_path / "run")
    table = study.trials()
    assert (table["state"] == "complete").sum() == 3
    for column in ("accuracy", "prefill_latency_s", "parameters"):
        assert table[column].notna().all()
    assert len(study.front()) >= 1
    assert study.recommend(max_accuracy_drop=1.0).trial is not None
    trial, folder = export_last_trial(study, tmp_path / "export")
    with quiet_transformers():
        reloaded = getattr(transformers, AUTO_CLASSES[head]).from_pretrained(folder, trust_remote_code=True)
    row = table.set_index("trial").loc[trial]
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == row["parameters"]
    loaded = load_model(str(folder), trust_remote_code=True, head=config.head)
    assert head_of(type(loaded.model)) == head
    if head == "embedding":  # accuracy is agreement with the loaded model, here the export itself
        assert evaluator_for(loaded, config.tasks, EvaluationConfig()).evaluate().accuracy == pytest.approx(1.0)
    else:
        found = evaluator_for(loaded, config.tasks, EvaluationConfig()).evaluate().accuracy
        assert found == pytest.approx(row["accuracy"])


@pytest.mark.usefixtures("own_cache")
def test_export_includes_the_sentence_transformers_files(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", "embedding")
    pooling = json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(pooling)
    study = run_study(
        parse_study(study_of(model, tasks_for("embedding", tmp_path), budget={"trials": 2})), out=tmp_path / "run"
    )
    _, folder = export_last_trial(study, tmp_path / "export")
    assert (folder / "1_Pooling" / "config.json").read_text() == pooling
    assert load_model(str(folder), trust_remote_code=True).sentence_files == {"1_Pooling/config.json": pooling}


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_the_body_of_a_model_with_another_head_can_be_exported(tmp_path: Path, family: str) -> None:
    """A masked language model has no pooler; the plain body of BERT and RoBERTa would initialise one at random."""
    model = save_encoder(tmp_path / "model", family, "masked_lm")
    config = parse_study(study_of(model, tasks_for("embedding", tmp_path), budget={"trials": 2}))
    study = run_study(config, out=tmp_path / "run")
    trial, folder = export_last_trial(study, tmp_path / "export")
    with quiet_transformers():
        reloaded = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    parameters = study.trials().set_index("trial").loc[trial, "parameters"]
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == parameters


def test_a_checkpoint_without_the_required_head_is_refused(tmp_path: Path) -> None:
    body = save_encoder(tmp_path / "model", "bert", "masked_lm")
    for head, shown in (("classification", "classification"), ("question_answering", "question-answering")):
        with pytest.raises(
            ModelError, match=f"needs a model with a {shown} head, but .* is saved as BertForMaskedLM"
        ) as caught:
            load_model(str(body), head=head)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    headless = save_encoder(tmp_path / "body", "roberta", "embedding")
    with pytest.raises(ModelError, match="is saved as RobertaModel and has none"):
        load_model(str(headless), head="classification")


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_every_checkpoint_loads_as_an_embedding_model(tmp_path: Path, family: str, head: str) -> None:
    saved = save_encoder(tmp_path / "model", family, head)
    as_saved, body = load_model(str(saved)), load_model(str(saved), head="embedding")
    assert head_of(type(as_saved.model)) == head
    assert head_of(type(body.model)) == "embedding"
    assert [t.name for t in body.topology.tensors] == [t.name for t in as_saved.topology.tensors]
    state, whole = body.model.state_dict(), as_saved.model.base_model.state_dict()
    assert all(bool((state[name] == whole[name]).all()) for name in state)


def test_tasks_with_different_heads_are_refused(tmp_path: Path) -> None:
    tasks = [*tasks_for("classification", tmp_path), "arc_easy"]
    with pytest.raises(
        ConfigError, match="all tasks must use the same model head, but they use classification, language model"
    ):
        parse_study(study_of(tmp_path, tasks))


@pytest.mark.usefixtures("own_cache")
def test_objectives_and_settings_that_encoders_cannot_serve_are_refused(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "distilbert", "classification")
    tasks = tasks_for("classification", tmp_path)
    chat = {"apply_chat_template": True}
    for study, message in (
        (study_of(model, tasks, objectives=["accuracy", "decode_latency_s"]), "needs a model that generates"),
        (study_of(model, tasks, evaluation=chat), "`apply_chat_template` is for lm-eval tasks"),
        (study_of(model, tasks, objectives=["perplexity"]), "'perplexity' needs a task whose metric is of that kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_study(parse_study(study), out=tmp_path / "run")
    with pytest.raises(ModelError, match="needs a model with a question-answering head"):
        run_study(parse_study(study_of(model, tasks_for("question_answering", tmp_path))), out=tmp_path / "run")


@pytest.mark.usefixtures("own_cache")
def test_a_task_in_its_own_file(tmp_path: Path) -> None:
    tasks_for("classification", tmp_path)
    (tmp_path / "mine.yaml").write_text("{dataset: rows.jsonl, head: classification, limit: 5}")
    study = parse_study(study_of(tmp_path / "model", ["mine.yaml"]), base=tmp_path)
    entry = study.tasks[0]
    assert (entry.task_name, entry.limit, entry.dataset) == ("mine", 5, str(tmp_path / "rows.jsonl"))  # type: ignore[union-attr]
    study = parse_study(study_of(tmp_path / "model", [{"task": "mine.yaml", "limit": 7}]), base=tmp_path)
    assert study.tasks[0].limit == 7


@pytest.mark.parametrize(
    ("name", "model_class", "columns"),
    [
        ("bert_base_sst2", "BertForSequenceClassification", {"text", "label"}),
        ("bert_base_squad", "BertForQuestionAnswering", {"question", "context", "answers"}),
    ],
)
def test_shipped_bert_studies_match_its_config(tmp_path: Path, name: str, model_class: str, columns: set[str]) -> None:
    """Offline: the study's space on a folder that holds only the config of BERT base."""
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    transformers.BertConfig(architectures=[model_class]).save_pretrained(tmp_path / "bert")
    topology = load_topology(str(tmp_path / "bert"))
    assert topology.architecture == model_class
    assert len(topology.tensors) == 12 * 6
    space = SearchSpace.from_config(study.space, topology)
    assert int(space.number_of_points()) > 10_000
    task = study.tasks[0]
    assert isinstance(task, DatasetTaskConfig)
    assert study.head == task.head
    assert task.is_hub
    assert {role for role, is_required in HEAD_COLUMNS[task.head].items() if is_required} == columns
    objectives, dropped = resolve_objectives(study, meter_problem="there is no meter")
    assert {entry.name for entry in objectives} == {"accuracy", "prefill_latency_s", "parameters"}
    assert set(dropped) == {"prefill_energy_j"}
    check_tasks(objectives, {task.task_name: task.chosen_metric}, {task.task_name: ()})
    # The columns of the dataset, in a local file, on a tiny model of the same class.
    rows = rows_for(task.head)
    data = tmp_path / "rows.jsonl"
    named = [{task.column(role): value for role, value in row.items()} for row in rows]
    halved = [{**row, "label": row["label"] % 2} if "label" in row else row for row in named]
    data.write_text("".join(json.dumps(row) + "\n" for row in halved))
    local = task.model_copy(update={"dataset": str(data), "config": None, "split": None})
    small = save_encoder(tmp_path / "small", "bert", task.head, context=400, labels=2)
    loaded = load_model(str(small), head=task.head)
    assert evaluator_for(loaded, [local], study.evaluation).evaluate().accuracy is not None


@pytest.mark.usefixtures("own_cache", "own_process")
def test_dse_evaluate_accepts_a_task_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dse.cli.main import main

    model = save_encoder(tmp_path / "model", "roberta", "classification")
    tasks_for("classification", tmp_path)
    (tmp_path / "mine.yaml").write_text("{dataset: rows.jsonl, head: classification}")
    point = '{"method": "svd", "rank": 2, "roles": ["query"]}'
    arguments = ["evaluate", "--model", str(model), "--task", str(tmp_path / "mine.yaml"), "--point", point]
    capsys.readouterr()
    assert main([*arguments, "--limit", "10", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["tasks"][0]["task"], document["tasks"][0]["documents"]) == ("mine", 10)
    assert document["accuracy"] == document["tasks"][0]["value"]
    assert document["accuracy_drop"]["documents"] == 10
    assert main(arguments) == 0
    assert "mine" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("{dataset: rows.jsonl, head: classification, colums: {}}")
    assert main(arguments) == 2
    assert "unknown key 'colums'; did you mean 'columns'?" in capsys.readouterr().err
