"""`dse measure`: measure latency, energy and memory of a point, compared with the dense model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dse.cli.options import (
    add_command,
    add_model_at_point,
    calibration_text,
    engine_option,
    model_request,
    positive,
    positive_list,
)
from dse.cli.printing import quantity_text

if TYPE_CHECKING:
    from dse.standalone import EngineRequest


def add_parser(commands: Any) -> None:
    """Add `dse measure`."""
    parser = add_command(
        commands,
        "measure",
        run,
        summary="measure latency, energy and memory of a point, compared with the dense model",
        example="dse measure --model demo:smollm2-135m-instruct --point"
        """ '{"method": "svd", "rank": 64, "layers": [20, 21]}' --batch 1,8""",
    )
    add_model_at_point(parser, several_devices=True, required=False)
    parser.add_argument(
        "--study", metavar="DIR", help="measure the front of this study, and the trials tied with it, in `--engine`"
    )
    parser.add_argument("--batch", type=positive_list, default=(1,), metavar="N,...", help="batch sizes (1)")
    parser.add_argument(
        "--prompt", type=positive_list, default=(128,), metavar="N,...", help="prompt lengths in tokens (128)"
    )
    parser.add_argument("--new", type=positive_list, default=(16,), metavar="N,...", help="tokens to decode (16)")
    parser.add_argument("--mode", default="eager", help="execution mode: eager, compile or cuda_graph (eager)")
    parser.add_argument(
        "--meter",
        default="auto",
        metavar="METER",
        help="auto, rapl, nvml, nvml:<index or UUID>,..., replay:<trace.csv>, or none (auto)",
    )
    parser.add_argument("--blocks", type=positive, default=4, metavar="N", help="minimum number of ABBA blocks (4)")
    parser.add_argument(
        "--precision", type=float, default=0.02, metavar="P", help="target half-width of a ratio's interval (0.02)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, metavar="S", help="time limit per combination of sizes (60)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompt (0)")
    engine = parser.add_argument_group("serving engine")
    engine.add_argument(
        "--engine", metavar="NAME", help="vllm, onnxruntime, openvino, or transformers in a process of its own"
    )
    engine.add_argument("--python", metavar="PATH", help="the engine's Python interpreter (DSE_<ENGINE>_PYTHON)")
    engine.add_argument(
        "--engine-option",
        type=engine_option,
        action="append",
        metavar="KEY=VALUE",
        help="option of the engine, such as max_model_len=512; may be repeated",
    )
    engine.add_argument("--requests", type=positive, metavar="N", help="requests of one turn (the batch size)")
    engine.add_argument(
        "--engine-time-limit",
        type=float,
        default=600.0,
        metavar="S",
        help="an engine that takes longer to start or to answer is killed (600)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure and print the table."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.errors import ConfigError
    from dse.measurement import LatencySpec
    from dse.standalone import MeasurementRequest, measure_model

    if options.study is not None:
        return _measure_study(options)
    if options.model is None:
        raise ConfigError("a measurement needs a model, but got none; name one with --model, or a study with --study")

    spec = LatencySpec(
        mode=options.mode,
        blocks=options.blocks,
        precision=options.precision,
        max_duration_s=options.max_seconds,
        seed=options.seed,
    )
    engine = None if options.engine is None else _engine_request(options)
    request = MeasurementRequest(spec, options.batch, options.prompt, options.new, options.meter, engine)
    with TerminalListener() as listener:
        document = measure_model(
            model_request(options), options.point, request, calibration=calibration_text(options), listener=listener
        )
    return print_result(options, document, _print_measurement if engine is None else _print_serving)


def _engine_request(options: argparse.Namespace) -> EngineRequest:
    from dse.standalone import EngineRequest

    return EngineRequest(
        options.engine, options.python, dict(options.engine_option or []), options.requests, options.engine_time_limit
    )


def _measure_study(options: argparse.Namespace) -> int:
    """Measure the front of a study in an engine and print it."""
    from dse.cli.printing import print_result
    from dse.cli.serving_tables import print_engine_front
    from dse.cli.terminal_listener import TerminalListener
    from dse.errors import ConfigError
    from dse.report.text_tables import to_records
    from dse.standalone import measure_study

    if options.engine is None:
        raise ConfigError("`--study` measures a front in an engine, but got none; name one with --engine")
    with TerminalListener() as listener:
        study = measure_study(options.study, _engine_request(options), listener=listener)
    table = study.trials()
    chosen = table[table[f"{options.engine}.ttft_s"].notna()] if f"{options.engine}.ttft_s" in table else table[:0]
    document = {"study": study.config.name, "engine": options.engine, "trials": to_records(chosen)}
    return print_result(options, document, print_engine_front)


def _print_serving(document: Mapping[str, Any]) -> None:
    from rich.markup import escape

    from dse.cli.printing import wide_console
    from dse.cli.serving_tables import serving_table

    out = wide_console()
    table, notes = serving_table(document)
    out.print(table)
    for line in [*dict.fromkeys(notes), *_footer(document)]:
        out.print(escape(line), soft_wrap=True)


def _print_measurement(document: Mapping[str, Any]) -> None:
    from rich.markup import escape

    from dse.cli.printing import plain_table, wide_console

    out = wide_console()
    candidate = "dense again" if document["is_dense"] else "point"
    columns = ["batch", "prompt", "new", "quantity", "dense", candidate, "ratio", "95 % interval"]
    table = plain_table(columns, left=("quantity",))
    for column in table.columns:
        column.no_wrap = True
    notes: list[str] = []
    for cell in document["cells"]:
        sizes = [str(cell[name]) for name in ("batch_size", "prompt_tokens", "new_tokens")]
        for index, row in enumerate(_rows(cell, notes)):
            table.add_row(*(sizes if index == 0 else ["", "", ""]), *row)
    out.print(table)
    for line in [*dict.fromkeys(notes), *_footer(document)]:
        out.print(escape(line), soft_wrap=True)


def _rows(cell: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    """The rows of one combination of sizes; appends its remarks to `notes`."""
    latency = cell["latency"]
    measured = latency["latency"]
    sizes = f"batch {cell['batch_size']}, prompt {cell['prompt_tokens']}"
    if measured is None:
        yield ["not measured", "-", "-", "-", "-"]
        notes.append(f"{sizes}: {latency['reason']}")
        return
    if not latency["is_valid"]:
        notes.append(f"invalid: {latency['reason']}")
    if not measured["is_warm"]:
        notes.append(f"{sizes}: successive blocks differ, so the warm-up may have been too short")
    for phase, name in (("prefill", "time to first token"), ("decode", "time per output token")):
        times = measured[phase]
        if times is not None:
            for quantile, label in (("median_s", name), ("p90_s", "  90th percentile")):
                sides = [quantity_text(times[side][quantile], "s") for side in ("baseline", "candidate")]
                interval = f"{times['ratio_low']:.3f} to {times['ratio_high']:.3f}"
                ratio = [f"{times['ratio']:.3f}", interval] if quantile == "median_s" else ["", ""]
                yield [label, *sides, *ratio]
    yield from _energy_rows(cell["energy"], notes)
    yield from _memory_rows(cell["memory"], notes)


def _energy_rows(energy: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    if energy["dense"] is None:
        return
    for phase, token in (("prefill", "prompt token"), ("decode", "output token")):
        for kind, label in (("per_token", f"energy per {token}"), ("net_per_token", "  net of idle power")):
            values = [((energy[side].get(phase) or {}).get(kind) or {}).get("mean_j") for side in ("dense", "point")]
            if any(value is not None for value in values):
                yield [label, *(quantity_text(value, "J") for value in values), _ratio(*values), ""]
    notes += [f"energy of {side}: {energy[side]['reason']}" for side in energy if energy[side]["reason"]]


def _memory_rows(memory: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    labels = {
        "weight_bytes": "weights",
        "prefill_rise_bytes": "peak rise in prefill",
        "decode_rise_bytes": "peak rise in decode",
        "kv_cache_bytes": "KV cache (computed)",
    }
    for key, label in labels.items():
        values = [memory[side].get(key) for side in ("dense", "point")]
        if any(value is not None for value in values):
            yield [label, *("-" if v is None else f"{v / 1e6:,.1f} MB" for v in values), _ratio(*values), ""]
    notes += [f"memory of {side}: {memory[side]['reason']}" for side in memory if memory[side]["reason"]]


def _footer(document: Mapping[str, Any]) -> Iterator[str]:
    if "latency" in document["cells"][0]:
        first = document["cells"][0]["latency"]["latency"]
        clock = "" if first is None else f", clock {first['clock']}"
        yield f"{document['model']} on {document['device']}, {document['dtype']}, mode {document['mode']}{clock}"
    else:
        versions = ", ".join(f"{name} {version}" for name, version in document["cells"][0]["versions"].items())
        start_up_s = document["cells"][0]["start_up_s"]
        yield f"{document['model']} on {document['device']}, {document['dtype']}, in {document['engine']} ({versions})"
        yield f"the engine started in {start_up_s:.1f} s"
    if not document["is_dense"]:
        yield f"point {document['point_id']} removes {100 * document['reduction']:.1f} % of the parameters"
    meter, idle = document["meter"], document["idle_power"]
    if meter is None:
        yield f"energy: not measured ({document['no_meter']})"
        return
    yield f"energy: {'REPLAYED, not measured: ' if meter['is_replay'] else ''}{meter['source']}"
    power = idle["power_w"]
    yield f"idle power: {idle['reason'] if power is None else quantity_text(power, 'W')}"


def _ratio(dense: float | None, point: float | None) -> str:
    return "" if not dense or point is None else f"{point / dense:.3f}"
