"""The live page in a real browser, on a study that grows. Skipped without Chromium; times decide nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, browser_problem
from synthetic_study import SyntheticStudy

from dse.study.live_study import LiveStudy

pytest.importorskip("dash", reason="the live page needs Plotly Dash")
pytestmark = pytest.mark.skipif(browser_problem() is not None, reason=str(browser_problem()))

# selenium leaves the end of its sockets to the garbage collector
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore::ResourceWarning")]

EVIL = "<img src=x onerror=window.hacked=1>"
POINTS = "return document.querySelectorAll('#front-plot .scatterlayer .point').length"
FIGURE = "return document.querySelector('#front-plot .js-plotly-plot')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyntheticStudy]:
    path = tmp_path_factory.mktemp("page") / "run"
    found = SyntheticStudy(path, budget=30, model=f"models/{EVIL}", origins=("sampler", "refined", EVIL))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(study: SyntheticStudy, browser: Browser) -> Iterator[Browser]:
    """The page, opened before the study has started."""
    from werkzeug.serving import make_server

    from dse.report.dashboard.page_server import make_app

    server = make_server("127.0.0.1", 0, make_app(LiveStudy(study.path)).server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    browser.open(f"http://127.0.0.1:{server.server_port}/")
    yield browser
    server.shutdown()
    thread.join()
    server.server_close()


def _trace(page: Browser, name: str) -> dict[str, Any]:
    script = (
        "const plot = document.querySelector('#front-plot .js-plotly-plot');"
        "const found = (plot?.data || []).find((trace) => trace.name === arguments[0]);"  # none while it is drawn anew
        "return found ? {trials: found.customdata, x: found.x} : {trials: [], x: []}"
    )
    found: dict[str, Any] = page.run(script, name)
    return found


def _drawn(page: Browser) -> set[int]:
    plot = "document.querySelector('#front-plot .js-plotly-plot')"
    return set(page.run(f"return [...new Set(({plot}?.data || []).flatMap((trace) => trace.customdata || []))]"))


# The tests below are one visit: each continues where the one before it ends.


def test_a_study_without_a_trial_says_so(page: Browser) -> None:
    page.wait("the empty table", "return document.body.innerText.includes('No trial is finished yet')")
    page.wait("the empty plot", "return document.body.innerText.includes('No trial has a value on these axes')")
    assert page.text("#status") == "not started"


def test_trials_appear_without_a_reload(page: Browser, study: SyntheticStudy) -> None:
    page.run("window.untouched = true")
    study.fill(16)
    page.wait("16 trials", lambda: len(_drawn(page) - {-1}) >= 15)
    study.finish()
    study.start_trial(queue=1)
    page.wait("trial 16", lambda: 16 in _drawn(page))
    page.wait("the trial in flight", lambda: len(_trace(page, "In flight or queued")["trials"]) == 2)
    assert page.run("return window.untouched === true")
    assert page.text("#status") == "running"
    assert "evaluate" in page.text("#lanes")
    volume = LiveStudy(study.path).snapshot().steps[-1].volume
    assert f"{volume:.4f}" in page.text("#tiles")


def test_the_front_is_the_study_front(page: Browser, study: SyntheticStudy) -> None:
    table = LiveStudy(study.path).snapshot().trials
    front = set(table.loc[table["on_front"].astype(bool) & (table["decomposed_tensors"] > 0), "trial"])
    assert set(_trace(page, "Pareto front")["trials"]) == front
    for state in ("failed", "infeasible", "stopped"):
        assert set(table.loc[table["state"] == state, "trial"]) <= _drawn(page)


def test_text_of_the_study_is_never_markup(page: Browser) -> None:
    assert EVIL in page.text("header")
    assert EVIL in page.text("#proposers")
    assert page.run("return document.querySelectorAll('#main img[src=x], header img').length") == 0
    assert page.run("return window.hacked === undefined")


def test_axes_are_chosen_with_the_keyboard(page: Browser) -> None:
    from selenium.webdriver import ActionChains, Keys

    title = "return document.querySelector('#front-plot .xtitle').textContent"

    def choose_the_next_axis() -> bool:
        """Keys that a busy machine drops are pressed again."""
        page.run("document.querySelector('#x').focus()")
        keys = ActionChains(page.driver).send_keys(Keys.ENTER).pause(1.0).send_keys(Keys.ARROW_DOWN, Keys.ENTER)
        keys.pause(2.0).perform()
        return not page.run(title).startswith("Decode latency")

    page.wait("another axis", choose_the_next_axis)


def test_tab_reaches_every_kind_of_control_in_order(page: Browser) -> None:
    from selenium.webdriver import ActionChains, Keys

    page.run("document.activeElement.blur(); window.scrollTo(0, 0); document.body.focus()")
    page.run("document.querySelector('.skip').focus()")
    order = []
    for _ in range(30):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        order.append(page.run("const e = document.activeElement; return e.id || e.className"))
    places = [order.index(name) for name in ("theme-button", "x", "y", "colour", "reset-ranges")]
    assert places == sorted(places)


def test_relative_values(page: Browser) -> None:
    page.run("document.querySelectorAll('#relative input')[1].click()")
    title = "return document.querySelector('#front-plot .ytitle').textContent"
    page.wait("points from dense", lambda: "points from dense" in page.run(title))
    page.run("document.querySelectorAll('#relative input')[0].click()")
    page.wait("absolute", lambda: "points from dense" not in page.run(title))


def test_a_range_fades_trials(page: Browser, study: SyntheticStudy) -> None:
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    slider = next(e for e in page.driver.find_elements(By.CSS_SELECTOR, ".slider") if "Reduction" in e.text)
    low = slider.find_elements(By.CSS_SELECTOR, "input")[0]
    low.send_keys(Keys.CONTROL, "a")
    low.send_keys("10", Keys.TAB)
    page.wait("pale trials", lambda: _trace(page, "Outside the ranges")["trials"])
    table = LiveStudy(study.path).snapshot().trials.set_index("trial")
    small = {t for t in _trace(page, "Outside the ranges")["trials"] if t in table.index}
    assert small
    assert all(table.loc[trial, "reduction"] < 0.1001 for trial in small)
    page.run("document.querySelector('#reset-ranges').click()")
    page.wait("all trials again", lambda: not _trace(page, "Outside the ranges")["trials"])


def test_two_trials_are_compared(page: Browser, study: SyntheticStudy) -> None:
    page.wait("a comparison", lambda: "arc_easy: acc" in page.text("#differences"))
    assert "95 % interval" in page.text("#differences")
    assert f"dse compare {study.path} --trials 0 " in page.text("#commands")
    assert "dse export" in page.text("#commands")
    assert page.run("return document.querySelectorAll('#difference-plot .heatmaplayer image').length") == 1


def test_a_click_chooses_a_trial(page: Browser) -> None:
    script = (
        "const plot = document.querySelector('#front-plot .js-plotly-plot');"
        "const trace = plot.data.findIndex((t) => t.name === 'Dominated');"
        "const trial = plot.data[trace].customdata[0];"
        "const point = {curveNumber: trace, pointNumber: 0, pointIndex: 0, data: plot.data[trace], x: 0, y: 0};"
        "plot.emit('plotly_click', {points: [{...point, customdata: trial}]}); return trial"
    )
    trial = page.run(script)
    page.wait("the chosen trial", lambda: f"--trials 0 {trial}" in page.text("#commands"))


def test_dark_theme(page: Browser) -> None:
    from selenium.webdriver.common.by import By

    before = page.run("return getComputedStyle(document.body).backgroundColor")
    page.run("window.scrollTo(0, 0)")
    page.driver.find_element(By.ID, "theme-button").click()
    page.wait("a dark page", lambda: page.run("return getComputedStyle(document.body).backgroundColor") != before)
    colour = "return document.querySelector('#front-plot .js-plotly-plot').layout.font.color"
    page.wait("a dark figure", lambda: page.run(colour) == "#e6eaee")


def test_every_control_has_a_name(page: Browser) -> None:
    script = """return [...document.querySelectorAll('button, input, a, [role=img], [role=region]')]
      .filter((e) => e.offsetParent !== null && !e.closest('.js-plotly-plot'))
      .filter((e) => e.getAttribute('aria-hidden') !== 'true')
      .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.innerText || e.title
        || (e.labels && e.labels.length) || e.closest('label, [role=group], fieldset')))
      .map((e) => e.outerHTML.slice(0, 120))"""
    assert page.run(script) == []


def test_no_request_left_the_host_and_nothing_went_wrong(page: Browser) -> None:
    assert {host.partition(":")[0] for host in page.hosts()} == {"127.0.0.1"}
    assert page.messages() == []
