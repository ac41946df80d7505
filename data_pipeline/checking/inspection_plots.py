"""The histograms of a shard folder as one PNG picture."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.checking.inspection import Statistics, shorten_name
from data_pipeline.errors import DataError
from data_pipeline.shards.format import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter
    from matplotlib.typing import HashableList

PICTURE_NAME = "inspection.png"  # if only a folder is given
SOURCES_IN_PICTURE, FEW_SOURCES = 25, 8
BLUE, ORANGE, GREY = "#3465a4", "#d9822b", "#666666"


def save_histograms(statistics: Statistics, path: str | os.PathLike) -> Path:
    """Draw histograms of lengths, fill and sources, and return the path of the picture.

    path: a file name that ends in .png, or a folder for `inspection.png`.
    Raises DataError if matplotlib is not installed, or if the picture cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise DataError(
            "histograms need matplotlib, which is not installed: pip install matplotlib, or leave out --png"
        ) from error
    path = Path(path)
    path = path if path.suffix.lower() == ".png" else path / PICTURE_NAME
    # A user's own matplotlib style, or a source name that looks like a formula, must not change the picture.
    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"text.parse_math": False, "font.size": 9}):
        panels, size, widths = _arrangement(len(statistics.source_names))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))  # inches
        FigureCanvasAgg(figure)
        axes = figure.subplot_mosaic(panels, width_ratios=widths)
        figure.suptitle(_title(statistics), fontsize=12)
        _draw_documents(axes["documents"], statistics)
        _draw_prompts_and_answers(axes["parts"], statistics)
        _draw_fill(axes["fill"], statistics)
        _draw_sources(axes["sources"], statistics)
        return _write(figure, path)


def _write(figure: "Figure", path: Path) -> Path:
    from io import BytesIO

    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [picture.getvalue()])
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}): name another path") from error
    return path


def _arrangement(sources: int) -> tuple["list[HashableList[str]]", tuple[float, float], tuple[float, float]]:
    """Return panels, size in inches and column widths; a long list of sources gets its own column."""
    if sources <= FEW_SOURCES:
        return [["documents", "parts"], ["fill", "sources"]], (14, 8.5), (1, 1)
    return [[panel, "sources"] for panel in ("documents", "parts", "fill")], (14, 11), (1.4, 1)


def _title(statistics: Statistics) -> str:
    return (
        f"{statistics.path.resolve().name}: {len(statistics.document_tokens):,} documents, "
        f"{int(statistics.row_tokens.sum()):,} tokens in {len(statistics.row_tokens):,} rows of "
        f"{statistics.index['seq_len']:,}"
    )


def _draw_documents(axes: "Axes", statistics: Statistics) -> None:
    lengths, seq_len = statistics.document_tokens, statistics.index["seq_len"]
    axes.hist(lengths, _length_bins(lengths), color=BLUE)
    median = int(np.median(lengths))
    axes.axvline(median, color=GREY, linestyle="--", label=f"median: {median:,}")
    if lengths.max() >= seq_len / 2:
        longer = int((lengths > seq_len).sum())
        axes.axvline(seq_len, color=ORANGE, label=f"row length: {seq_len:,}; longer: {longer:,}")
    _label(axes, "Length of documents", "tokens, with special tokens (log scale)", "documents")
    _length_axis(axes)
    _legend(axes)


def _draw_prompts_and_answers(axes: "Axes", statistics: Statistics) -> None:
    parts = (("prompts", statistics.prompt_tokens, BLUE), ("answers", statistics.answer_tokens, ORANGE))
    bins = _length_bins(np.concatenate([lengths for _, lengths, _ in parts]))
    for name, lengths, color in parts:
        label = f"{name}, median {int(np.median(lengths)):,}"
        # A log scale has no 0: the prompts of plain texts, which have no tokens, are shown at 1.
        axes.hist(np.maximum(lengths, 1), bins, color=color, alpha=0.25)
        axes.hist(np.maximum(lengths, 1), bins, color=color, histtype="step", linewidth=1.5, label=label)
    _label(axes, "Prompts and answers", "tokens, without special tokens (log scale)", "documents")
    _length_axis(axes)
    _legend(axes)


def _draw_fill(axes: "Axes", statistics: Statistics) -> None:
    from matplotlib.ticker import NullFormatter

    seq_len = statistics.index["seq_len"]
    padding = seq_len - statistics.row_tokens
    # Most rows are nearly full: bins for 0, 1, 2, up to 4, up to 8, … tokens of padding separate them.
    limits = np.array([0, *(2 ** np.arange(int(padding.max()).bit_length() + 1))])
    limits = limits[: np.searchsorted(limits, padding.max()) + 1]
    rows = np.bincount(np.searchsorted(limits, padding), minlength=len(limits))
    bars = axes.bar(range(len(limits)), rows, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in rows], padding=2, fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.7, 4 * rows.max())
    least = [_percent(max(0, seq_len - limit) / seq_len) for limit in limits]
    names = [f"{limit // 1024}k" if limit >= 1024 else str(limit) for limit in limits]
    ticks = [f"{name}\n{fill}" for name, fill in zip(names, least, strict=True)]
    axes.set_xticks(range(len(limits)), ticks, fontsize=8 if len(ticks) < 14 else 7)
    mean = statistics.row_tokens.mean() / seq_len
    _label(
        axes,
        f"Row fill, {mean:.2%} on average",
        "tokens of padding, up to; row fill, at least (%)",
        "rows (log scale)",
    )
    axes.yaxis.set_major_formatter(_thousands())


def _percent(share: float) -> str:
    hundredths = int(share * 10_000)  # rounded down, so that only a full row shows 100
    return f"{hundredths / 100:.2f}" if 9900 <= hundredths < 10_000 else f"{hundredths / 100:.0f}"


def _draw_sources(axes: "Axes", statistics: Statistics) -> None:
    tokens = statistics.source_tokens
    order = np.argsort(-tokens, kind="stable")
    named = order if len(order) <= SOURCES_IN_PICTURE + 1 else order[:SOURCES_IN_PICTURE]
    names = [shorten_name(statistics.source_names[source]) for source in named]
    values, colors = list(tokens[named]), [BLUE] * len(named)
    if len(named) < len(order):
        names.append(f"{len(order) - len(named)} smaller sources")
        values.append(tokens[order[len(named) :]].sum())
        colors.append(GREY)
    places = range(len(names))
    bars = axes.barh(places, values, color=colors)
    axes.bar_label(bars, [f"{value / tokens.sum():.1%}" for value in values], padding=3)
    axes.set_yticks(places, names)
    axes.set_ylim(max(len(names), FEW_SOURCES // 2) - 0.4, -0.6)
    axes.margins(x=0.12)
    _label(axes, "Tokens by source", "tokens", "")
    axes.xaxis.set_major_formatter(_thousands())


def _length_bins(lengths: np.ndarray) -> list[float]:
    """Return bin edges in geometric steps, placed between whole numbers so that every bin can hold lengths."""
    edges = np.unique(np.round(np.geomspace(max(1, lengths.min()), lengths.max() + 1, 50))) - 0.5
    return edges.tolist()


def _length_axis(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_thousands())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(_thousands())


def _thousands() -> "Formatter":
    from matplotlib.ticker import FuncFormatter

    def as_text(value: float, _: int) -> str:
        for unit, name in ((1e9, "B"), (1e6, "M")):
            if value >= unit:
                return f"{value / unit:g}{name}"
        return f"{value:,.0f}" if value >= 1 or value == 0 else ""  # lengths are at least 1

    return FuncFormatter(as_text)


def _legend(axes: "Axes") -> None:
    # Above the panel, beside its title, the legend hides nothing.
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        borderaxespad=0,
        handlelength=1.3,
        columnspacing=1,
    )


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
