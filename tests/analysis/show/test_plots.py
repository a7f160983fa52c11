import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis.decide.allocate import allocate, flops_per_token_of
from analysis.decide.limits import NONE, Limits
from analysis.decide.optimum import Search
from analysis.inference import fit_law
from analysis.show import numbers, plots, style
from analysis.show.style import DARK, LIGHT, PNG_DPI, png, save

BUDGET = 1e13


def valley(demo, limits=NONE):
    """The arguments of plots.allocation for the demo's budget."""
    family = demo.runs.plan.family
    search = Search(demo.fit, flops_per_token_of(demo.fit, family), limits)
    return search, allocate(demo.fit, BUDGET, family, limits), demo.runs.convention


def figures(demo, theme=LIGHT):
    metrics = [{"tokens": p.tokens, "val_loss": p.loss * 1.002, "train_loss": 0.0} for p in demo.forecast.curve]
    return {
        "loss": plots.loss_against_compute(demo.fit, demo.runs, demo.forecast, demo.flagship.loss, theme),
        "isoflop": plots.isoflop_curves(demo.fit, demo.runs, theme),
        "surface": plots.surface(demo.fit, demo.runs, demo.forecast, theme),
        "forecast": plots.forecast_curve(demo.forecast, metrics, theme),
        "allocation": plots.allocation(*valley(demo), (demo.forecast.n_params, demo.forecast.loss), theme),
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


def test_the_valley_is_lowest_at_n_star_and_within_a_thousandth_over_its_shaded_part(demo):
    search, best, convention = valley(demo)
    ax = plots.allocation(search, best, convention).axes[0]
    n, loss = ax.lines[0].get_data()
    assert n[np.argmin(loss)] == pytest.approx(best.n_params, rel=0.03)
    flat = (n >= best.sureness.flat[0]) & (n <= best.sureness.flat[1])
    assert flat.sum() > 3
    assert loss[flat].max() == pytest.approx(best.loss * 1.001, rel=2e-4)
    assert loss[~flat].min() >= best.loss * 1.0009
    assert loss.max() <= best.loss * (1 + plots.VALLEY) or best.sureness.n_interval[1] in (None, n[-1])


def test_the_valley_ends_where_a_limit_leaves_nothing(demo):
    free = valley(demo)[1]
    capped = valley(demo, Limits(served_tokens=20 * free.n_tokens))
    n, loss = plots.allocation(*capped).axes[0].lines[0].get_data()
    assert np.isfinite(loss).all()
    assert (capped[0].tokens(n, BUDGET) > 0).all()
    assert capped[1].n_params < free.n_params


def test_a_forecast_without_a_curve_shows_its_end(demo):
    bare = dataclasses.replace(demo.forecast, curve=[])
    assert isinstance(plots.forecast_curve(bare), Figure)
    seen = plots.forecast_curve(bare, [{"tokens": demo.forecast.spec.tokens, "val_loss": 3.0}, {"tokens": 5}])
    assert "actual" in seen.axes[0].get_legend_handles_labels()[1]


def test_saved_figures_are_png_in_the_themes_colours(demo, drawn, tmp_path):
    paths = [tmp_path / "plots" / name for name in ("light.png", "dark.png")]
    for path, figure in zip(paths, (drawn["loss"], figures(demo, DARK)["loss"]), strict=True):
        assert save(png(style.drawn(figure)), path).stat().st_size < 1e5
    light, dark = (Image.open(path).convert("RGB") for path in paths)
    assert light.size == (6 * PNG_DPI, round(4.6 * PNG_DPI))
    assert light.getpixel((2, 2)) == (255, 255, 255)
    assert dark.getpixel((2, 2)) == (0x17, 0x1C, 0x24)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["dark.png", "light.png"]


def test_the_dark_palette_gives_what_drawing_in_the_dark_theme_gives(demo, drawn):
    for name, figure in figures(demo, DARK).items():
        derived = style.darkened(style.drawn(drawn[name]), has_areas=name == "surface")
        pixels = [np.asarray(image.convert("RGB"), float) for image in (derived, style.drawn(figure))]
        off = np.abs(pixels[0] - pixels[1]).max(-1)
        assert off.mean() < 3, name
        assert (off > 48).mean() < 0.006, name


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
