import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest

from analysis.inference import fit_law
from analysis.postmortem import refit
from analysis.show.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
MEASURE = """<script>addEventListener("load", () => {
  const page = document.documentElement;
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  parent.postMessage(JSON.stringify([page.clientWidth, page.scrollWidth, broken, document.querySelector(".cards").innerText]), "*");
});</script>"""
VOID = {"meta", "img", "source", "br"}


class Checker(html.parser.HTMLParser):
    """Collects text and every address a page would load; asserts that elements nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.loads = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return " ".join(" ".join(checker.text).split()), checker.loads


@pytest.fixture(scope="module")
def report(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    before, runs, outcome = refit(demo.flagship_dir, demo.forecast, demo.flagship, demo.path / "sweep")
    return write_report(out, before, runs, demo.forecast, outcome)


def test_the_page_is_one_file_that_loads_nothing(report):
    _, loads = read(report)
    assert loads
    assert all(address.startswith("data:image/png;base64,") for address in loads)
    css = re.search(r"<style>(.*)</style>", report.read_text(encoding="utf-8"), re.S).group(1)
    assert "url(" not in css
    assert "@import" not in css
    assert report.stat().st_size <= 3e6


def test_it_opens_with_forecast_actual_error_and_verdict(report, demo):
    text, _ = read(report)
    actual = demo.flagship.loss
    inside_50 = demo.forecast.interval_50[0] <= actual <= demo.forecast.interval_50[1]
    order = [
        f"{demo.forecast.loss:.3f}",
        f"{actual:.3f}",
        f"inside the {50 if inside_50 else 90}% interval",
        f"{100 * (demo.forecast.loss / actual - 1):+.2f}%",
        "10.0×",
        demo.forecast.spec.run_id,
        "Every run, the best loss",
        "with the flagship",
        "three approaches",
        "Backtest",
        demo.forecast.seal,
        "python -m scaling.sweep +grid=demo",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_run_is_in_the_folded_table(report, demo):
    text, _ = read(report)
    table = text[text.index("smallest budget first") :]
    assert all(run_id in table for run_id in demo.runs.table["run_id"])


def test_plots_lie_beside_the_page(report):
    names = sorted(p.name for p in (report.parent / "plots").iterdir())
    assert names == ["forecast.png", "isoflop.png", "loss_against_compute.png", "residuals.png", "surface.png"]
    assert sorted(p.name for p in report.parent.iterdir()) == ["plots", "report.html"]


def test_values_are_escaped(demo, tmp_path):
    evil = "<script>alert(1)</script> & co"
    runs = dataclasses.replace(demo.runs, source=evil, notes=(evil,))
    page = write_report(tmp_path, demo.fit, runs, demo.forecast).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page


def test_before_the_flagship_ran_the_page_says_so(demo, tmp_path):
    text, _ = read(write_report(tmp_path, demo.fit, demo.runs, demo.forecast))
    assert "the flagship has not run" in text
    assert "postmortem" not in text


def test_without_a_forecast_it_is_a_report_on_the_law(demo, tmp_path):
    runs = dataclasses.replace(demo.runs, plan=None)
    text, _ = read(write_report(tmp_path, demo.fit, runs))
    assert text.startswith("Scaling law of ")
    assert "10× the largest run" in text
    assert not (tmp_path / "plots" / "forecast.png").exists()


def test_a_law_of_compute_alone_has_no_plots_of_size(demo, tmp_path):
    fit = fit_law(demo.runs, law="frontier_no_floor", draws=20)
    read(write_report(tmp_path, fit, demo.runs))
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["loss_against_compute.png", "residuals.png"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not looked at in a browser")
def test_a_browser_shows_it_without_sideways_scrolling_at_phone_and_desk_widths(report, demo, tmp_path):
    page = report.read_text(encoding="utf-8").replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    for width in (390, 1280):
        # a headless window has a least width, a frame has not
        (tmp_path / "frame.html").write_text(
            f'<p id="said">nothing</p><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
            '<script>addEventListener("message", e => { document.getElementById("said").textContent = e.data; });</script>'
        )
        dom = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / f'profile{width}'}", "--window-size=1400,1000",
             "--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(tmp_path)},
        ).stdout  # fmt: skip
        shown, needed, broken_images, headline = json.loads(re.search(r'id="said">(.*?)<', dom, re.S).group(1))
        assert width - 20 <= shown <= width
        assert needed == shown, (needed, shown)
        assert broken_images == 0
        assert f"{demo.forecast.loss:.3f}" in headline
        assert f"{demo.flagship.loss:.3f}" in headline
