"""One style for every figure: a 6-inch canvas with 12-point type (legible when a phone shows it 370 pixels wide), model
size on viridis, and for the rest the colours of Okabe & Ito (2008), which differ for every kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from analysis.show.numbers import flops, si
from scaling.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

PNG_DPI = 160
_BLENDS = 17
"""Shares of one colour over another that are told apart."""
PARAMS_LABEL = {"total": "", "non_embedding": ", without embeddings", "body_head": ", body and head"}


def params_label(convention: Mapping[str, str]) -> str:
    """The axis of model size, with how it is counted."""
    return f"N, parameters{PARAMS_LABEL.get(convention.get('params', ''), '')}"


def loss_label(convention: Mapping[str, str]) -> str:
    """The axis of loss, with its unit where the data say it."""
    return (
        "held-out loss (nats per token)"
        if convention.get("loss") == "nats_per_token"
        else "loss (in the data's unit)"
    )


@dataclass(frozen=True)
class Theme:
    """Colours that depend on the page behind the figure."""

    background: str
    ink: str
    """Text, axes and the fitted lines."""
    faint: str
    """Grid lines."""
    band: str
    """Forecast intervals and the forecast itself."""
    actual: str
    """What came."""
    scale: tuple[float, float]
    """The part of viridis that stands out from the background."""

    @property
    def colours(self) -> Colormap:
        """Viridis, cut to `scale`."""
        return ListedColormap(colormaps["viridis"](np.linspace(*self.scale, 256)))

    @property
    def shades(self) -> Colormap:
        """Viridis reversed and thinned over the background, for areas that text and points lie on."""
        return ListedColormap(
            0.4 * colormaps["viridis_r"](np.linspace(0, 1, 256)) + 0.6 * np.array(to_rgba(self.background))
        )


LIGHT = Theme(
    background="#ffffff", ink="#1c2430", faint="#e3e7ec", band="#0072b2", actual="#d55e00", scale=(0.0, 0.92)
)
DARK = Theme(background="#171c24", ink="#e4e8ee", faint="#2c3542", band="#56b4e9", actual="#ff8a3d", scale=(0.3, 1.0))


def drawn(figure: Figure) -> Image.Image:
    """The figure in 256 colours: a third of a true-colour PNG's bytes, and no difference that an eye finds."""
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.set_dpi(PNG_DPI)
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    return image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def png(image: Image.Image) -> bytes:
    """The content of its PNG file."""
    content = BytesIO()
    image.save(content, "png")
    return content.getvalue()


def darkened(image: Image.Image, has_areas: bool = False) -> Image.Image:
    """A figure that was drawn in LIGHT as DARK has it: each colour of the palette by the nearest blend of two of LIGHT's.

    Args:
        has_areas: viridis is that of `Theme.shades`, not of `Theme.colours`.
    """
    light, dark = _blends(has_areas)
    palette = np.array(image.getpalette(), float).reshape(-1, 3)
    distance = (light**2).sum(1) - 2 * palette @ light.T
    out = image.copy()
    out.putpalette(dark[distance.argmin(1)].round().astype(np.uint8).tobytes())
    return out


@cache
def _blends(has_areas: bool) -> tuple[Floats, Floats]:
    """What a figure's pixels may be in LIGHT and in DARK: each colour over those that lie under others; (B, 3), 0 to 255."""
    share = np.linspace(0, 1, _BLENDS)[:, None, None, None]
    out = []
    for theme in (LIGHT, DARK):
        named = [theme.background, theme.ink, theme.faint, theme.band, theme.actual]
        scale = (theme.shades if has_areas else theme.colours)(np.linspace(0, 1, 4 * _BLENDS))
        colours = 255 * np.vstack([[to_rgba(colour) for colour in named], scale])[:, :3]
        out.append((share * colours[:, None] + (1 - share) * colours[:4]).reshape(-1, 3))
    return out[0], out[1]


def save(content: bytes, path: Path) -> Path:
    """Write a figure's PNG, atomically; returns `path`."""
    write_atomic(path, lambda file: file.write(content))
    return path


def canvas(theme: Theme, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with labelled, styled axes."""
    figure = Figure(figsize=(6.0, 4.6), facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot(facecolor=theme.background)
    ax.set_xlabel(x, fontsize=12, color=theme.ink)
    ax.set_ylabel(y, fontsize=12, color=theme.ink)
    ax.tick_params(which="both", labelsize=11, color=theme.ink, labelcolor=theme.ink)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.ink)
    ax.grid(color=theme.faint, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def legend(ax: Axes, theme: Theme, **options: Any) -> None:
    ax.legend(
        fontsize=10,
        labelcolor=theme.ink,
        facecolor=theme.background,
        edgecolor=theme.faint,
        framealpha=0.85,
        **options,
    )


def si_log_axis(ax: Axes, axis: str) -> None:
    """A logarithmic axis of counts: 100k, 1M, 10M."""
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    this = getattr(ax, f"{axis}axis")
    decades = np.log10(high / low)
    this.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)))
    this.set_major_formatter(FuncFormatter(lambda value, _: si(value, 1)))
    this.set_minor_formatter(NullFormatter())


def flops_axis(ax: Axes) -> None:
    """A logarithmic x axis of FLOPs, labelled at powers of ten, and between them where it spans less than two."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high < 100 * low:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 12 * low else (1, 3)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops(value, 0)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def loss_log_axis(ax: Axes) -> None:
    """A logarithmic y axis of losses with round labels: power laws are straight, numbers are readable."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def size_scale(n_params: Floats, theme: Theme) -> ScalarMappable:
    low, high = float(n_params.min()), float(n_params.max())
    norm = LogNorm(low, high if high > low else 1.01 * low)
    return ScalarMappable(norm, theme.colours)


def size_bar(figure: Figure, ax: Axes, sizes: ScalarMappable, label: str, theme: Theme) -> None:
    bar = figure.colorbar(sizes, ax=ax, pad=0.02, aspect=28)
    bar.set_label(label, fontsize=11, color=theme.ink)
    low, high = sizes.get_clim()
    assert low is not None
    assert high is not None
    bar.set_ticks(list(np.geomspace(low, high, 4)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, 2)))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=10, color=theme.ink, labelcolor=theme.ink)
    bar.outline.set_visible(False)
