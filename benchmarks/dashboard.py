"""The live page in a real browser: time to the first picture, and from a finished trial to the page that shows it.

    python benchmarks/dashboard.py [--trials 1000] [--folder DIR]

Writes a study of four objectives through the study's own storage (minutes for 1,000 trials; `--folder` keeps it for
the next call), serves it as `dse watch` does, and drives headless Chromium. Needs Chromium, chromedriver and selenium.
The update is timed from the moment the trial is stored; it includes up to two seconds until the page asks again, which
are reported separately.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from browser import Browser, browser_problem
from synthetic_study import SyntheticStudy
from werkzeug.serving import make_server

from dse.report.dashboard.page_server import make_app
from dse.study.live_study import LiveStudy

UPDATES = 5
DRAWN = "return document.querySelectorAll('#front-plot .scatterlayer .point').length"
HAS_TRIAL = """const plot = document.querySelector('#front-plot .js-plotly-plot');
return plot.data.some((trace) => (trace.customdata || []).includes(arguments[0]))"""
# Marks when the page asks whether anything changed, and when the figure of the answer is drawn.
WATCH = """const plot = document.querySelector('#front-plot .js-plotly-plot');
window.drawn_ms = 0; window.asked_ms = [];
plot.on('plotly_afterplot', () => { window.drawn_ms = Date.now(); });
const send = window.fetch;
window.fetch = function (address, options) {
  const body = options && options.body ? String(options.body) : '';
  if (body.includes('poll.n_intervals')) { window.asked_ms.push(Date.now()); }
  return send.apply(this, arguments);
};"""


def main() -> int:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if (problem := browser_problem()) is not None:
        print(problem)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "run"
        if not (folder / "study.db").exists():
            study = SyntheticStudy(folder, budget=options.trials + UPDATES)
            study.fill(options.trials).close()
        copy = Path(scratch) / "copy"
        shutil.copytree(folder, copy)
        result = _measured(copy, options.trials)
    for name, value in result.items():
        print(f"{name:<34} {value:>10}")
    print(json.dumps(result))
    return 0


def _measured(folder: Path, trials: int) -> dict[str, float]:
    begun = time.perf_counter()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    live = LiveStudy(folder)
    snapshot = live.snapshot()
    opened_s = time.perf_counter() - begun
    server = make_server("127.0.0.1", 0, make_app(live).server, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    study = SyntheticStudy.reopened(folder, list(snapshot.records.values()))
    browser = Browser()
    try:
        browser.open("about:blank")
        begun = time.perf_counter()
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.wait("the first picture", f"const n = (() => {{{DRAWN}}})(); return n > 0")
        first_s = time.perf_counter() - begun
        time.sleep(3)
        browser.run(WATCH)
        reads, updates, waits = [], [], []
        for _ in range(UPDATES):
            record = study.finish()
            stored_ms = time.time() * 1000
            begun = time.perf_counter()
            live.snapshot()
            reads.append(time.perf_counter() - begun)
            browser.wait("the new trial", lambda number=record.trial: browser.run(HAS_TRIAL, number))
            drawn_ms, asked_ms = browser.run("return [window.drawn_ms, window.asked_ms]")
            first_asked = min((at for at in asked_ms if stored_ms <= at <= drawn_ms), default=stored_ms)
            waits.append((first_asked - stored_ms) / 1000)
            updates.append((drawn_ms - first_asked) / 1000)
    finally:
        browser.close()
        server.shutdown()
        server.server_close()
        study.close()
    return {
        "trials": trials,
        "study_opened_s": round(opened_s, 3),
        "first_picture_s": round(first_s, 3),
        "snapshot_of_a_new_trial_s": round(statistics.median(reads), 3),
        "update_s": round(statistics.median(updates), 3),
        "update_max_s": round(max(updates), 3),
        "wait_for_the_next_poll_s": round(statistics.median(waits), 3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
