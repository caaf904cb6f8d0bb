from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from dse.pareto import Objective
from dse.report.front_page import front_html
from dse.report.point_maps import MapCell, PointMap
from dse.report.trials_table import front_table

EVIL = "</script><script>alert('x')</script>"


@pytest.fixture(scope="module")
def evil_trials(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> pd.DataFrame:
    trials = study_trials.copy()
    number = front_table(trials, three)["trial"].iloc[2]
    trials.loc[trials["trial"] == number, "point_id"] = EVIL
    trials.loc[trials["state"] == "failed", "reason"] = f"task {EVIL} ran out of memory"
    return trials


def maps_of(trials: pd.DataFrame, objectives: tuple[Objective, ...]) -> list[PointMap]:
    """A map of every front point except the dense model, with hostile text everywhere."""
    numbers = [int(trial) for trial in front_table(trials, objectives)["trial"] if trial]
    cells = ((MapCell("svd", 8, 0.4), MapCell()), (MapCell("removed", 0, 0.0), MapCell("svd", 2, 0.1, EVIL)))
    return [PointMap(n, f"Trial {n}", (EVIL,), ("0", "1"), ("query", EVIL), cells, (EVIL,)) for n in numbers]


@pytest.fixture(scope="module")
def page(evil_trials: pd.DataFrame, three: tuple[Objective, ...]) -> str:
    return front_html(
        evil_trials,
        three,
        title=f"study {EVIL}",
        study_facts={"Hypervolume": "0.1490", f"Task {EVIL}": EVIL, "Reference": "accuracy 0, parameters 148.0 M"},
        next_commands=["dse recommend runs/x --max-accuracy-drop 0.02", f"dse export '{EVIL}' --trial 1"],
        point_maps=maps_of(evil_trials, three),
    )


class _Reader(HTMLParser):
    """Collects scripts, text, tags, link targets and event handlers of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "script":
            self.scripts.append("")
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_all_text_from_outside_is_escaped(read: _Reader) -> None:
    assert len(read.scripts) == 4, "plotly.js, the figure as JSON, and the page's two scripts"
    assert not any("alert('x')" in script for script in read.scripts[:1] + read.scripts[2:])
    maps = read.tags.count("figure")
    assert maps == 14
    # Title twice, point, reason, label and text of a fact, command; per map: role, two cells, stack, note, ranks.
    assert "".join(read.text).count(EVIL) == 7 + 6 * maps
    assert read.handlers == []


def test_page_is_self_contained(page: str, read: _Reader) -> None:
    assert all(address.startswith("#map-") for address in read.addresses), "links stay on the page"
    assert len(read.addresses) == 14
    assert all(f'id="{address[1:]}"' in page for address in read.addresses)
    assert "link" not in read.tags
    assert "iframe" not in read.tags


def test_content_security_policy_allows_exactly_the_scripts_of_the_page(read: _Reader) -> None:
    directives = dict(part.strip().split(" ", 1) for part in read.policy.split(";"))
    assert directives["default-src"] == "'none'"
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in read.scripts
        if not script.lstrip().startswith("{")  # the figure is data and never runs
    }
    assert len(hashes) == 3
    assert set(directives["script-src"].split()) == hashes


def test_table_contains_the_front_and_the_dense_model(
    page: str, read: _Reader, evil_trials: pd.DataFrame, three: tuple[Objective, ...]
) -> None:
    front = front_table(evil_trials, three)
    body = re.search(r'<table id="front">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr.*?</tr>", body.group(1), re.DOTALL)
    assert [int(re.findall(r'data-value="([^"]*)"', row)[0]) for row in rows] == front["trial"].tolist()
    assert [float(re.findall(r'data-value="([^"]*)"', row)[3]) for row in rows] == front["accuracy"].tolist()
    assert rows[0].startswith("<tr class=dense>")
    text = " ".join(read.text)
    for part in ("24 trials: 21 complete, 1 duplicate, 1 infeasible, 1 failed.", "0.712 ±0.031", "41.2 ms", "0.1490"):
        assert part in text


def test_page_of_a_study_without_trials(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    page = front_html(study_trials[:0], three, title="empty", study_facts={}, next_commands=[])
    assert "0 trials" in page
    assert "<h2>Next steps</h2>" not in page


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on PATH")


def _open(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and the browser's console messages."""
    assert BROWSER is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    command = [BROWSER, *quiet, "--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_browser_renders_the_page_without_errors(page: str, tmp_path: Path) -> None:
    path = tmp_path / "front.html"
    path.write_text(page, encoding="utf-8")
    document, console = _open(path, tmp_path / "profile")
    assert console == []
    assert document.count('class="main-svg"') >= 1
    assert "Decode latency (ms), lower is better" in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert document.count('class="point ') >= 2 * 20  # every complete trial in both panels
    assert len(re.findall(r'<td data-value="[^"]*"><code>', document)) == page.count("<td data-value=") / 6


@needs_browser
def test_clicking_a_column_title_sorts_the_table(
    page: str, tmp_path: Path, evil_trials: pd.DataFrame, three: tuple[Objective, ...]
) -> None:
    # The policy would block the test's own script, so it is removed here.
    clicks = "<script>for (const _ of [0, 1]) document.querySelectorAll('#front th button')[3].click();</script>"
    path = tmp_path / "front.html"
    lifted = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    path.write_text(lifted.replace("</body>", f"{clicks}</body>"), encoding="utf-8")
    document, console = _open(path, tmp_path / "profile")
    assert console == []
    shown = [int(trial) for trial in re.findall(r'<tr[^>]*><td data-value="(\d+)">', document)]
    front = front_table(evil_trials, three)
    assert shown == front.sort_values("accuracy", ascending=False)["trial"].tolist()
    assert 'aria-sort="descending"' in document


def _scripted(page: str, script: str, folder: Path) -> tuple[str, list[str]]:
    """Open the page with a script of the test's own, and without the policy that would block it."""
    path = folder / "front.html"
    lifted = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    path.write_text(lifted.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return _open(path, folder / "profile")


@needs_browser
def test_clicking_a_point_focuses_its_map(
    page: str, tmp_path: Path, evil_trials: pd.DataFrame, three: tuple[Objective, ...]
) -> None:
    """Every point carries its trial number, which the page's script reads from the click event."""
    script = """
      const plot = document.getElementById("plot"), seen = [];
      for (const trace of plot.data) for (const trial of trace.customdata || []) {
        document.activeElement.blur();
        plot.emit("plotly_click", {points: [{customdata: trial}]});
        seen.push(trace.name + " " + trial + " " + document.activeElement.id);
      }
      document.body.dataset.seen = seen.join(";");
    """
    document, console = _scripted(page, script, tmp_path)
    assert console == []
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found is not None
    seen = [entry.rsplit(" ", 2) for entry in found[1].split(";")]
    front = {str(trial) for trial in front_table(evil_trials, three)["trial"]} - {"0"}
    assert {trial for name, trial, _ in seen if name == "Pareto front"} == front
    for name, trial, focused in seen:
        assert focused == (f"map-{trial}" if trial in front else ""), name


@needs_browser
def test_maps_are_accessible_by_keyboard(page: str, tmp_path: Path) -> None:
    script = """
      const link = document.querySelector("#front tbody a"), figure = document.querySelector("figure");
      link.focus();
      document.body.dataset.focused = document.activeElement === link;
      link.click();  // as Enter does
      document.body.dataset.target = location.hash === "#" + figure.id && document.querySelector("figure:target").id;
      figure.querySelector("summary").click();
      document.body.dataset.open = figure.querySelector("details").open;
      const box = figure.querySelector("svg").getBoundingClientRect();
      document.body.dataset.drawn = box.width > 100 && box.height > 30 &&
        document.documentElement.scrollWidth <= window.innerWidth;
    """
    document, console = _scripted(page, script, tmp_path)
    assert console == []
    for fact in ('data-focused="true"', 'data-target="map-', 'data-open="true"', 'data-drawn="true"'):
        assert fact in document
