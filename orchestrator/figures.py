"""Figures of an answer: panels of lines with intervals, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from dt.files import write_atomically
from orchestrator.answers import Answer, Cell
from orchestrator.experiment import Figure, Label, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
MARKERS = ("o", "s", "^", "D", "v", "P")
KIND_COLOURS = {"attention": COLOURS[0], "mlp": COLOURS[1], "layernorm": "#555555"}
AXES: dict[Measure, str] = {
    "retention": "retention (score / score before)",
    "score": "D4RL-normalised score",
    "return": "return",
    "of_data": "return / mean return of the data",
}


def spell(name: str, value: Label | None) -> str:
    """A label for a reader; nothing where there is none.

    >>> spell("alpha", 0.5), spell("alpha", "mean"), spell("target", "hopper")
    ('α = 0.5', 'α = mean', 'hopper')
    """
    if value is None:
        return ""
    return f"α = {plain(value)}" if name == "alpha" else plain(value)


def plain(value: Label) -> str:
    """A label's value as one would type it.

    >>> plain(0.5), plain(1.0), plain("mean")
    ('0.5', '1', 'mean')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinct(cells: tuple[Cell, ...], name: str | None) -> list[Label | None]:
    """The values of a label in order of appearance; one None where there is no such label."""
    return [None] if name is None else list(dict.fromkeys(cell.labels[name] for cell in cells))


def draw(answer: Answer, show: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = answer.cells
    panels, xs = distinct(cells, show.panel), distinct(cells, show.x)
    width = max(4.2 * len(panels), 0.42 * len(xs) * len(panels), 6.4)
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(width, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    try:
        for axes, panel in zip(row[0], panels, strict=True):
            mine = tuple(cell for cell in cells if show.panel is None or cell.labels[show.panel] == panel)
            _draw_panel(axes, mine, show, distinct(cells, show.series))
            if show.panel is not None:
                axes.set_title(spell(show.panel, panel), fontsize=10)
        row[0][0].set_ylabel(AXES[show.value])
        row[0][0].set_ylim(bottom=min(0.0, row[0][0].get_ylim()[0]))  # all panels share it
        reference = f" ({answer.experiment.paper})" if answer.experiment.paper else ""
        figure.suptitle(f"{answer.experiment.title}{reference}", fontsize=12)
        figure.savefig(content := BytesIO(), format="png", dpi=120, metadata={"Software": "mergedt"})
    finally:
        pyplot.close(figure)
    write_atomically(path, content.getvalue())


_LEGENDS: Mapping[str, str | None] = {"alpha": None, "distance": "λ3"}  # where it is not the label's name


def _draw_panel(axes: Axes, cells: tuple[Cell, ...], show: Figure, colours: list[Label | None]) -> None:
    """colours: the series of all panels, so that each keeps its colour."""
    xs = distinct(cells, show.x)
    numeric = all(isinstance(x, int | float) for x in xs)
    position = {x: float(x) if numeric and isinstance(x, int | float) else float(i) for i, x in enumerate(xs)}
    series = distinct(cells, show.series)
    step = min((b - a for a, b in pairwise(sorted(position.values()))), default=1.0)
    for i, name in enumerate(series):
        drawn = [cell for cell in cells if cell.labels[show.series] == name and show.value in cell.estimates]
        shift = (i - (len(series) - 1) / 2) * 0.12 * step  # so that intervals do not hide each other
        places = [position[cell.labels[show.x]] + shift for cell in drawn]
        values = [cell.estimates[show.value].value for cell in drawn]
        intervals = [cell.estimates[show.value].interval for cell in drawn]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
        ]
        look = colours.index(name)
        axes.errorbar(
            places,
            values,
            yerr=errors,
            label=spell(show.series, name),
            capsize=2,
            markersize=4,
            linewidth=1.2,
            color=COLOURS[look % len(COLOURS)],
            marker=MARKERS[look % len(MARKERS)],
        )
    if show.value in ("retention", "of_data"):
        axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    axes.grid(axis="y", linewidth=0.3)
    _label_x(axes, cells, show, {x: position[x] for x in xs if x is not None}, numeric)
    axes.legend(title=_LEGENDS.get(show.series, show.series), fontsize=8, title_fontsize=8)


def _label_x(axes: Axes, cells: tuple[Cell, ...], show: Figure, position: dict[Label, float], numeric: bool) -> None:
    if numeric and show.ticks is None:
        axes.set_xlabel("α" if show.x == "alpha" else show.x)
        return
    by_x = {cell.labels[show.x]: cell.labels for cell in cells}
    texts = [str(by_x[x][show.ticks or show.x]) for x in position]
    axes.set_xticks(list(position.values()), texts, rotation=70, ha="right", rotation_mode="anchor", fontsize=7)
    if show.kind is not None:
        for x, text in zip(position, axes.get_xticklabels(), strict=True):
            text.set_color(KIND_COLOURS.get(str(by_x[x][show.kind]), "black"))
    axes.set_xlabel(show.x if show.ticks is None else f"{show.x}: 0 … {len(position) - 1}, each adds the unit under it")
