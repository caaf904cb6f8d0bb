"""Tables of what a serving engine measured, for `dse measure --engine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from dse.cli.printing import console, plain_table, quantity_text

__all__ = ["print_engine_front", "serving_table"]

_TIMES = (("ttft", "time to first token"), ("tpot", "time per output token"), ("window", "time of all requests"))
_COLUMNS = (("ttft_s", "TTFT", "s"), ("tpot_s", "TPOT", "s"), ("throughput_tokens_s", "throughput", "tokens/s"))


def serving_table(document: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """One row for each quantity of each cell, and remarks below the table."""
    candidate = "dense again" if document["is_dense"] else "point"
    header = ["concurrency", "prompt", "new", "quantity", "dense", candidate, "ratio", "95 % interval"]
    table = plain_table(header, left=("quantity",))
    for column in table.columns:
        column.no_wrap = True
    notes: list[str] = []
    for cell in document["cells"]:
        work = cell["work"]
        sizes = [str(work[name]) for name in ("concurrency", "prompt_tokens", "new_tokens")]
        for index, row in enumerate(_rows(cell)):
            table.add_row(*(sizes if index == 0 else ["", "", ""]), *row)
        if not cell["is_valid"]:
            notes.append(f"invalid: {cell['reason']}")
        energy = cell["energy"]
        if energy is not None and not energy["is_valid"]:
            notes.append(f"energy: {energy['reason']}")
    return table, notes


def _rows(cell: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, label in _TIMES:
        times = cell[name]
        if times is None:
            continue
        for quantile, shown in (("median_s", label), ("p90_s", "  90th percentile")):
            sides = [quantity_text(times[side][quantile], "s") for side in ("baseline", "candidate")]
            yield [shown, *sides, *(_ratio(times) if quantile == "median_s" else ["", ""])]
    tokens, window = cell["work"]["requests"] * cell["work"]["new_tokens"], cell["window"]
    rates = [f"{tokens / window[side]['median_s']:.4g} tokens/s" for side in ("baseline", "candidate")]
    inverse = {name: 1 / window[other] for name, other in _INVERSE.items()}
    yield ["throughput", *rates, *_ratio(inverse)]
    energy = cell["energy"]
    if energy is not None and energy["ratio"] is not None:
        sides = [quantity_text(energy[f"{side}_request"]["mean_j"], "J") for side in ("baseline", "candidate")]
        yield ["energy per request", *sides, *_ratio({f"ratio{k}": v for k, v in _energy_ends(energy["ratio"])})]


_INVERSE = {"ratio": "ratio", "ratio_low": "ratio_high", "ratio_high": "ratio_low"}


def _energy_ends(ratio: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    yield from (("", ratio["ratio"]), ("_low", ratio["low"]), ("_high", ratio["high"]))


def _ratio(times: Mapping[str, float]) -> list[str]:
    return [f"{times['ratio']:.3f}", f"{times['ratio_low']:.3f} to {times['ratio_high']:.3f}"]


def print_engine_front(document: Mapping[str, Any]) -> None:
    """The trials of a study that an engine measured."""
    engine = document["engine"]
    header = ["trial", "on front", "reduction", *(label for _, label, _ in _COLUMNS)]
    table = plain_table([*header[:3], *(part for label in header[3:] for part in (label, "ratio"))], left=())
    for row in document["trials"]:
        values = []
        for name, _, unit in _COLUMNS:
            ratio = row.get(f"{engine}.{name}_ratio")
            values += [quantity_text(row.get(f"{engine}.{name}"), unit), "-" if ratio is None else f"{ratio:.3f}"]
        mark = "yes" if row.get(f"{engine}.on_front") else ""
        table.add_row(str(row["trial"]), mark, f"{100 * row['reduction']:.1f} %", *values)
    console().print(table)
