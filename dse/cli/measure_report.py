"""Prints what `dse measure` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_measurement"]

_UNITS = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def print_measurement(document: Mapping[str, Any]) -> None:
    """A table of dense, point and their ratio, and what the figures rest on."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=130)
    is_dense = document["is_dense"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["batch", "prompt", "new", "what", "dense"]
    columns += ["dense again", "ratio", "95 % interval"] if is_dense else ["point", "ratio", "95 % interval"]
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    notes: list[str] = []
    for cell in document["cells"]:
        sizes = [str(cell[name]) for name in ("batch_size", "prompt_tokens", "new_tokens")]
        for index, row in enumerate(_rows(cell, notes)):
            table.add_row(*(sizes if index == 0 else ["", "", ""]), *row)
    console.print(table)
    for line in [*dict.fromkeys(notes), *_footer(document)]:
        console.print(escape(line), soft_wrap=True)


def _rows(cell: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    latency = cell["latency"]
    measured = latency["latency"]
    if measured is None:
        yield ["not measured", "-", "-", "-", "-"]
        notes.append(f"batch {cell['batch_size']}, prompt {cell['prompt_tokens']}: {latency['reason']}")
        return
    if not latency["is_valid"]:
        notes.append(f"invalid: {latency['reason']}")
    if not measured["is_warm"]:
        notes.append(f"batch {cell['batch_size']}, prompt {cell['prompt_tokens']}: successive blocks did not agree")
    for phase, name in (("prefill", "time to first token"), ("decode", "time per token")):
        figures = measured[phase]
        if figures is not None:
            for quantile, label in (("median_s", name), ("p90_s", "  90th percentile")):
                sides = [_quantity(figures[side][quantile], "s") for side in ("dense", "subject")]
                interval = f"{figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}"
                ratio = [f"{figures['ratio']:.3f}", interval] if quantile == "median_s" else ["", ""]
                yield [label, *sides, *ratio]
    yield from _energy_rows(cell["energy"], notes)
    yield from _memory_rows(cell["memory"], notes)


def _energy_rows(energy: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    if energy["dense"] is None:
        return
    for phase, name in (("prefill", "prompt token"), ("decode", "token")):
        for kind, label in (("per_token", f"energy per {name}"), ("net_per_token", "  without idle")):
            values = [((energy[side].get(phase) or {}).get(kind) or {}).get("mean_j") for side in ("dense", "point")]
            if any(value is not None for value in values):
                yield [label, *(_quantity(value, "J") for value in values), _ratio(*values), ""]
    notes += [f"energy of the {side}: {energy[side]['reason']}" for side in energy if energy[side]["reason"]]


def _memory_rows(memory: Mapping[str, Any], notes: list[str]) -> Iterator[list[str]]:
    keys = {
        "weight_bytes": "weights",
        "prefill_rise_bytes": "rise in prefill",
        "decode_rise_bytes": "rise in decode",
        "kv_cache_bytes": "KV cache (arithmetic)",
    }
    for key, label in keys.items():
        values = [memory[side].get(key) for side in ("dense", "point")]
        if any(value is not None for value in values):
            yield [label, *("-" if v is None else f"{v / 1e6:,.1f} MB" for v in values), _ratio(*values), ""]
    notes += [f"memory of the {side}: {memory[side]['reason']}" for side in memory if memory[side]["reason"]]


def _footer(document: Mapping[str, Any]) -> Iterator[str]:
    first = document["cells"][0]["latency"]["latency"]
    clock = "" if first is None else f", clock {first['clock']}"
    yield f"{document['model']} on {document['device']}, {document['dtype']}, mode {document['mode']}{clock}"
    if not document["is_dense"]:
        yield f"point {document['point_id']} removes {100 * document['reduction']:.1f} % of the parameters"
    meter, idle = document["meter"], document["idle_power"]
    if meter is None:
        yield f"energy: not measured ({document['no_meter']})"
        return
    yield f"energy: {'REPLAYED, not measured: ' if meter['is_replay'] else ''}{meter['source']}"
    power = idle["power_w"]
    yield f"power at rest: {idle['reason'] if power is None else _quantity(power, 'W')}"


def _ratio(dense: float | None, point: float | None) -> str:
    return "" if not dense or point is None else f"{point / dense:.3f}"


def _quantity(value: float | None, unit: str) -> str:
    """Three significant figures with a prefix: `12.3 ms`."""
    if value is None:
        return "-"
    scale, prefix = next(((s, p) for s, p in _UNITS if abs(value) >= s), _UNITS[-1])
    return f"{value / scale:.3g} {prefix}{unit}"
