import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis.inference import fit_law
from analysis.show import numbers, plots
from analysis.show.style import DARK, LIGHT, save


def figures(demo, theme=LIGHT):
    metrics = [{"tokens": p.tokens, "val_loss": p.loss * 1.002, "train_loss": 0.0} for p in demo.forecast.curve]
    return {
        "loss": plots.loss_against_compute(demo.fit, demo.runs, demo.forecast, demo.flagship.loss, theme),
        "isoflop": plots.isoflop_curves(demo.fit, demo.runs, theme),
        "surface": plots.surface(demo.fit, demo.runs, demo.forecast, theme),
        "forecast": plots.forecast_curve(demo.forecast, metrics, theme),
        "residuals": plots.residuals(demo.fit, demo.runs, demo.forecast, demo.flagship.loss, theme),
    }


@pytest.fixture(scope="module")
def drawn(demo):
    return figures(demo)


def test_every_axis_says_what_it_is_and_in_what_unit(drawn):
    units = ("FLOPs", "parameters", "tokens", "nats per token", "%")
    for figure in drawn.values():
        for ax in figure.axes:
            labels = [label for label in (ax.get_xlabel(), ax.get_ylabel()) if label]
            assert labels
            assert all(any(unit in label for unit in units) for label in labels)


def test_labels_neither_overlap_nor_leave_the_figure(drawn):
    for name, figure in drawn.items():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        for ax in figure.axes:
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
                boxes = [t.label1.get_window_extent(renderer) for t in shown if t.label1.get_visible()]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), (name, axis.axis_name)
                for box in [*boxes, axis.label.get_window_extent(renderer)]:
                    if box.width:
                        assert box.x0 >= -1
                        assert box.y0 >= -1
                        assert box.x1 <= figure.bbox.x1 + 1
                        assert box.y1 <= figure.bbox.y1 + 1
            legend = ax.get_legend()
            if legend is not None:
                box = legend.get_window_extent(renderer)
                assert box.x0 >= -1
                assert box.x1 <= figure.bbox.x1 + 1


def test_the_frontier_is_the_lowest_loss_that_a_budget_buys(demo):
    budgets = np.array([2e11, 1e13])
    n, d = plots.frontier(demo.fit, demo.runs.table, budgets)
    spent = n * d * plots.flops_per_param_token(demo.runs.table, n)
    assert spent == pytest.approx(budgets)
    for factor in (0.8, 1.25):
        other_d = budgets / (factor * n * plots.flops_per_param_token(demo.runs.table, factor * n))
        assert (demo.fit.predict(factor * n, other_d) > demo.fit.predict(n, d)).all()


def test_flops_per_parameter_and_token_follow_the_runs_and_are_six_for_6nd(demo):
    table = demo.runs.table
    n = table["n_params"].to_numpy(float)
    ratio = (table["flops"] / table["n_params"] / table["n_tokens"]).to_numpy()
    assert plots.flops_per_param_token(table, n) == pytest.approx(ratio, rel=0.03)
    as_6nd = table.assign(flops=6 * table["n_params"] * table["n_tokens"])
    assert plots.flops_per_param_token(as_6nd, np.array([1e3, 1e9])) == pytest.approx([6, 6])


def test_isoflop_groups_are_the_sweeps_budgets(demo):
    budgets = [budget for budget, _ in plots.isoflop_groups(demo.runs)]
    assert budgets == pytest.approx([1e11, 2e11, 4e11, 1e12], rel=0.05)


def test_runs_off_any_budget_still_have_curves(demo):
    table = demo.runs.table.drop_duplicates("n_params").iloc[:6]
    scattered = table.assign(n_tokens=1e6 * 3.0 ** np.arange(len(table)))
    scattered["flops"] = 6 * scattered["n_params"] * scattered["n_tokens"]
    runs = dataclasses.replace(demo.runs, table=scattered)
    assert plots.isoflop_groups(runs) == []
    assert len(plots.isoflop_curves(demo.fit, runs).axes[0].lines) >= 5


def test_a_law_of_compute_alone_has_a_frontier(demo):
    fit = fit_law(demo.runs, law="frontier_no_floor", draws=20)
    assert isinstance(plots.loss_against_compute(fit, demo.runs), Figure)
    n, d = plots.frontier(fit, demo.runs.table, np.array([1e12]))
    assert 6 * fit.flops_ratio * n * d == pytest.approx(1e12)


def test_a_forecast_without_a_curve_shows_its_end(demo):
    bare = dataclasses.replace(demo.forecast, curve=[])
    assert isinstance(plots.forecast_curve(bare), Figure)
    seen = plots.forecast_curve(bare, [{"tokens": demo.forecast.spec.tokens, "val_loss": 3.0}, {"tokens": 5}])
    assert "actual" in seen.axes[0].get_legend_handles_labels()[1]


def test_saved_figures_are_png_in_the_themes_colours(demo, drawn, tmp_path):
    light = Image.open(save(drawn["loss"], tmp_path / "plots" / "light.png"))
    dark = Image.open(save(figures(demo, DARK)["loss"], tmp_path / "plots" / "dark.png"))
    assert light.size == (1200, 920)
    assert light.getpixel((2, 2))[:3] == (255, 255, 255)
    assert dark.getpixel((2, 2))[:3] == (0x17, 0x1C, 0x24)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["dark.png", "light.png"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0, 3, "0"), (950, 3, "950"), (999_999, 3, "1M"), (45_320_000, 3, "45.3M"), (1e9, 1, "1B"), (1.5e21, 3, "1500E"), (0.25, 2, "0.25")],
)  # fmt: skip
def test_counts_are_written_with_the_fields_letters(value, digits, text):
    assert numbers.si(value, digits) == text


def test_numbers_in_tables():
    assert numbers.flops(3.02e12) == "3.02e12"
    assert numbers.percent(0.00427) == "+0.43%"
    cells = [None, float("nan"), True, 1234567, 10**13, 0.123456, 1e-7, "a"]
    assert [numbers.number(c) for c in cells] == ["–", "–", "yes", "1,234,567", "1e13", "0.12346", "1e-07", "a"]
