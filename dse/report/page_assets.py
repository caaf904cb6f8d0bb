"""Style sheet and scripts of the report page."""

from __future__ import annotations

__all__ = ["DRAW_SCRIPT", "SORT_SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light; --text: #1f2933; --muted: #52606d; --line: #e4e7eb; --soft: #f5f7f9; --dense: #b84f00; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--text); background: #fff; font: 16px/1.5 Inter, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 32px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 0 0 12px; max-width: 92ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 14px; margin-top: 8px; }
.scroll { overflow-x: auto; }
#plot { min-width: 640px; }
#plot.wide { min-width: 960px; }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 2px solid #cbd2d9; font-weight: 600; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: var(--soft); }
tr.dense td { font-weight: 600; }
tr.dense td:nth-child(2) { color: var(--dense); }
td small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; }
th button { all: unset; cursor: pointer; }
th button:hover { text-decoration: underline; }
th button:focus-visible { outline: 2px solid #2a788e; outline-offset: 3px; }
th button::after { content: "\\2195"; color: #9aa5b1; font-weight: 400; padding-left: 5px; }
th[aria-sort="ascending"] button::after { content: "\\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193"; color: inherit; }
code, pre { font-family: "SFMono-Regular", Consolas, "DejaVu Sans Mono", monospace; font-size: 14px; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 12px 16px; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; font-size: 15px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 28px 32px;
  margin-top: 18px; }
.maps.wide { grid-template-columns: 1fr; }
figure { margin: 0; padding: 10px 12px; border: 1px solid var(--line); border-radius: 6px; scroll-margin-top: 12px;
  min-width: 0; }
figure:target, figure:focus { outline: 2px solid #2a788e; outline-offset: 1px; }
figure h3 { font-size: 15.5px; margin: 0 0 6px; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-size: 10.5px; fill: var(--muted); }
figcaption { font-size: 13.5px; color: var(--muted); margin-top: 6px; }
figcaption p { margin: 0 0 2px; overflow-wrap: anywhere; }
figcaption p:first-child { color: var(--text); }
details { font-size: 13.5px; margin-top: 6px; }
summary { cursor: pointer; }
details pre { font-size: 11.5px; white-space: pre; overflow-x: auto; margin-top: 6px; }
.swatches { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin: 0; }
.swatches i { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px;
  font-style: normal; text-align: center; line-height: 14px; }
.swatches .gone { color: #fff; }
td a { color: inherit; }
@media print { #plot, #plot.wide { min-width: 0; } th button::after { content: ""; }
  figure { break-inside: avoid; } }
"""

# The figure is read from a JSON block, so that no data of the study is ever executed. The buttons are listed because
# Plotly's default set includes one that uploads the plot.
DRAW_SCRIPT = """
"use strict";
(function () {
  const figure = JSON.parse(document.getElementById("figure").textContent);
  const buttons = [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]];
  Plotly.newPlot("plot", figure.data, figure.layout, {responsive: true, displaylogo: false, modeBarButtons: buttons,
    toImageButtonOptions: {filename: "front", scale: 2}});
  document.getElementById("plot").on("plotly_click", (event) => {
    const map = document.getElementById("map-" + event.points[0].customdata);
    if (map) { map.scrollIntoView({behavior: "smooth", block: "center"}); map.focus({preventScroll: true}); }
  });
})();
"""

SORT_SCRIPT = """
"use strict";
(function () {
  const table = document.getElementById("front");
  const heads = Array.from(table.tHead.rows[0].cells);
  const value = (row, column) => row.cells[column].dataset.value;
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column === 1 ? x.localeCompare(y) : Number(x) - Number(y);
      return down ? -order : order;
    });
    rows.forEach((row) => table.tBodies[0].appendChild(row));
  }));
})();
"""
