"""Write the generated tables of the reference pages: options of each command, keys of study and search-space files.

`python docs/generate_reference.py` rewrites them, `--check` exits with 1 if one is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dse import config
from dse.cli.main import build_parser

DOCS = Path(__file__).parent
ANCHORS = {
    "BudgetConfig": "budget",
    "CalibrationConfig": "calibration",
    "CalibrationSource": "calibrationsources",
    "ConstraintsConfig": "constraints",
    "DatasetTaskConfig": "tasks-with-a-dataset",
    "EvaluationConfig": "evaluation",
    "FidelityConfig": "fidelity",
    "GroupConfig": "groups",
    "LayerRange": "layers",
    "LimitsConfig": "limits",
    "MeasurementConfig": "measurement",
    "ModelConfig": "model",
    "ObjectiveConfig": "objectives",
    "RankConfig": "ranks",
    "SamplerConfig": "sampler",
    "SearchConfig": "search",
    "SearchSpaceConfig": "space",
    "TaskConfig": "tasks",
    "WorkersConfig": "workers",
}
"""Class in `dse.config` to the heading that describes it."""

GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Rewrite the pages, or check them."""
    check = "--check" in sys.argv[1:]
    stale = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = GENERATED.sub(lambda found: f"{found[1]}{section(found[2])}\n{found[3]}", text)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run `python docs/generate_reference.py`\n")
        return 1
    return 0


def section(name: str) -> str:
    """The Markdown of one generated section: `commands`, or the name of a class in `dse.config`."""
    if name == "commands":
        return "\n\n".join(commands())
    return table(("key", "type", "default", "meaning"), keys(getattr(config, name)))


def commands() -> Iterator[str]:
    """One section per command."""
    parser = build_parser()
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in found.choices.items():
        parts = [f"## dse {name}", words(command.description)]
        examples, _, details = str(command.epilog or "").partition("\n\n")
        lines = [line.strip() for line in examples.splitlines()[1:]]
        parts += ["```\n" + "\n".join(lines) + "\n```"] if lines else []
        parts += [words(details)] if details else []
        options = [action for action in command._actions if action.dest not in ("help", "json")]
        parts.append(table(("argument", "meaning"), [(argument(a), words(a.help)) for a in options]))
        yield "\n\n".join(parts)


def argument(action: argparse.Action) -> str:
    """An argument as it is typed."""
    shown = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if isinstance(shown, tuple):
        shown = " ".join(shown)
    if action.choices is not None:
        shown = "{" + ",".join(map(str, action.choices)) + "}"
    return f"`{' '.join(filter(None, (', '.join(action.option_strings), shown)))}`"


def keys(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """The keys of a section: name, type, default, meaning."""
    schema = model.model_json_schema()
    rows = []
    for name, entry in schema["properties"].items():
        shown = "required" if name in schema.get("required", ()) else default(model, name)
        rows.append((f"`{name}`", kind(entry), shown, words(entry.get("description"))))
    return rows


def default(model: type[BaseModel], name: str) -> str:
    """The default of a key; that of a whole section is not repeated."""
    text = json.dumps(plain(model.model_fields[name].get_default(call_default_factory=True)))
    return "see below" if len(text) > 40 else f"`{text}`"


def plain(value: Any) -> Any:
    """A default as JSON values."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def kind(entry: Mapping[str, Any]) -> str:
    """The type of a key in words."""
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        anchor = ANCHORS.get(name)
        return "`{min: …, max: …}`" if anchor is None else f"[mapping](#{anchor})"
    for several in ("anyOf", "oneOf"):
        if several in entry:
            return " or ".join(dict.fromkeys(map(kind, entry[several])))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if entry.get("type") == "array":
        return f"list of {kind(entry.get('items', {}))}"
    known = {"string": "text", "object": "mapping"}
    return known.get(entry.get("type", ""), str(entry.get("type", "any"))) + bounds(entry)


def bounds(entry: Mapping[str, Any]) -> str:
    """The interval of a number."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry]
    return f" {', '.join(found)}" if found else ""


def words(text: str | None) -> str:
    """A help text as Markdown; `%%` is how argparse spells a percent sign."""
    return (text or "").replace("%%", "%").replace("<", "&lt;")


def table(header: tuple[str, ...], rows: list[Any]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
