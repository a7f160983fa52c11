import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from analysis.decide.allocate import allocate
from analysis.decide.answer import answer
from analysis.decide.cluster import make_plan
from analysis.decide.forecast import make_forecast
from analysis.decide.limits import Limits
from analysis.decide.outcome import check
from analysis.inference import fit_law
from analysis.laws import PUBLISHED
from analysis.postmortem import refit
from analysis.runs import load_runs
from analysis.show import numbers
from analysis.show.report import write_report
from scaling.hardware import find_device
from scaling.layout import describe_layout

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
def refitted(demo):
    return refit(demo.flagship_dir, demo.forecast, demo.flagship, demo.path / "sweep")


@pytest.fixture(scope="module")
def report(demo, refitted, tmp_path_factory):
    before, runs, outcome = refitted
    checked = check(demo.forecast, demo.flagship, outcome.metrics)
    outcome = dataclasses.replace(outcome, summary={**outcome.summary, **checked.to_dict()})
    return write_report(tmp_path_factory.mktemp("report"), before, runs, demo.forecast, outcome)


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
        f"{demo.forecast.extrapolation_ratio:.3g}×",
        "within 0.1% of the least loss",
        demo.forecast.spec.run_id,
        "Every run, the best loss",
        "How far each run lies from the law",
        "with the flagship",
        "three approaches",
        "Backtest",
        demo.forecast.seal,
        "python -m scaling.sweep +grid=demo",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_published_law_says_its_answer_to_the_budget(report, demo):
    text, _ = read(report)
    table = text[text.index("What published laws say of this budget") : text.index("Backtest: ")]
    for law in PUBLISHED:
        n, d, loss = law.allocate(demo.forecast.target_flops)
        row = f"{law.name} {law.n_exponent:.3f} {numbers.si(n)} {numbers.si(d)} {numbers.si(d / n)} "
        assert row + ("–" if loss is None else f"{loss:.3f}") + " arXiv " in table


def test_limits_are_shown_with_their_values(demo, tmp_path):
    limits = Limits(max_params=6e4, max_params_source="--max-params", unique_tokens=1e6, max_epochs=8)
    forecast = make_forecast(demo.fit, demo.runs, demo.forecast.target_flops, limits=limits)
    text, _ = read(write_report(tmp_path, demo.fit, demo.runs, forecast))
    assert (
        text.count("--max-params (N at most 6e+04); --unique-tokens (1e+06); --max-epochs (8)") == 2
    )  # allocation, run
    assert "without them" in text
    assert f"{forecast.loss:.4f} nats per token" in text


def test_the_first_sentence_says_what_to_train_what_it_reaches_and_what_came(report, demo):
    text, _ = read(report)
    spec, error = demo.forecast.spec, abs(demo.forecast.loss / demo.flagship.loss - 1)
    first = (
        f"{numbers.si(spec.params.body_head)} parameters trained on {numbers.si(spec.tokens)} tokens, "
        f"{numbers.flops(spec.flops)} FLOPs, were forecast to reach a held-out loss of {demo.forecast.loss:.3f} nats per token"
    )
    side = "high" if demo.forecast.loss > demo.flagship.loss else "low"
    came = f"It came to {demo.flagship.loss:.3f}: the forecast was {error:.2%} too {side}"
    assert text.index(first) < text.index(came) < text.index("Extrapolation")


def test_curve_and_speed_of_the_flagship_stand_beside_what_was_expected(report, refitted, demo):
    text, _ = read(report)
    found = check(demo.forecast, demo.flagship, refitted[2].metrics)
    assert found.curve is not None
    assert f"{found.curve.points} evaluations, mean error {found.curve.mean_abs_error:.2%}" in text
    assert f"{found.spent.ratio:.2f}×" in text
    assert f"{numbers.percent(found.assumptions[0].deviation, 1)} against the forecast" in text


def test_the_valley_shows_what_is_not_known_of_the_size(report, refitted, demo):
    text, _ = read(report)
    best = allocate(refitted[0], demo.forecast.target_flops, demo.runs.plan.family)
    for low, high in (best.sureness.n_interval, best.sureness.flat, best.batch_tokens):
        assert f"{numbers.si(low, 2)} – {numbers.si(high, 2)}" in text


def test_a_plan_on_devices_comes_with_shape_layout_days_and_money(tmp_path):
    n = np.repeat(np.geomspace(1e8, 3e9, 5), 4)
    d = n * np.tile([5.0, 15, 40, 120], 5)
    loss = 1.7 + 400 / n**0.34 + 410 / d**0.28
    lines = [f"{a:.6e},{b:.6e},{c:.6f}" for a, b, c in zip(n, d, loss, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["n_params,n_tokens,loss", *lines]))
    runs = load_runs(tmp_path / "runs.csv")
    fit = fit_law(runs, "chinchilla", draws=20)
    device, limits = find_device("h100"), Limits(max_params=2e10)
    said = answer(fit, runs, [1e23], limits=limits)
    plan = make_plan(fit, runs, said.allocations[0], device, 512, limits)
    page = write_report(tmp_path / "out", fit, runs, said=dataclasses.replace(said, plan=plan, costs=(plan.cost,)))
    text, _ = read(page)
    shape, cost = plan.snapped.shape, plan.cost
    assert f"days of 512 × {device.name} and {numbers.si(cost.cost_usd, 2)} USD of rent." in text
    for part in (
        f"{shape.depth} layers × width {shape.width}",
        describe_layout(plan.layout.layout),
        f"GPU-hours {numbers.si(cost.gpu_hours)}",
        " – ".join(numbers.si(usd) for usd in cost.ranges["cost_usd"]),
        "energy (MWh)",
        plan.recipe.verified,
    ):
        assert part in text
    assert text.index("without them") < text.index("The shape for 512")


def test_every_run_is_in_the_folded_table(report, demo):
    text, _ = read(report)
    table = text[text.index("smallest budget first") :]
    assert all(run_id in table for run_id in demo.runs.table["run_id"])


def test_plots_lie_beside_the_page(report):
    names = sorted(p.name for p in (report.parent / "plots").iterdir())
    assert names == [
        "allocation.png",
        "forecast.png",
        "isoflop.png",
        "loss_against_compute.png",
        "residuals.png",
        "surface.png",
    ]
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
    assert f"will reach a held-out loss of {demo.forecast.loss:.3f}" in text
    assert "postmortem" not in text


def test_without_a_forecast_it_is_a_report_on_the_law(demo, tmp_path):
    runs = dataclasses.replace(demo.runs, plan=None)
    text, _ = read(write_report(tmp_path, demo.fit, runs))
    assert text.startswith("Scaling law of ")
    assert "Extrapolation 10×" in text
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
            capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "HOME": str(tmp_path)},
        ).stdout  # fmt: skip
        shown, needed, broken_images, headline = json.loads(re.search(r'id="said">(.*?)<', dom, re.S).group(1))
        assert width - 20 <= shown <= width
        assert needed == shown, (needed, shown)
        assert broken_images == 0
        assert f"{demo.forecast.loss:.3f}" in headline
        assert f"{demo.flagship.loss:.3f}" in headline
