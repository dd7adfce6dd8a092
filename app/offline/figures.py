"""The figures of the reports, drawn by matplotlib as PNG files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from app.core.norm_ratio import BlockSelection
from app.offline.evaluate import Evaluation

Scores = NDArray[np.float64]

_WIDTH: Final = 8.0
_DPI: Final = 130
_ID: Final = "#3b6ea8"
_OOD: Final = "#d1602b"
_PUZZLE: Final = "#7a5195"
_MUTED: Final = "#8a94a3"
_LINES: Final = ("#1c2430", _ID, _OOD, "#3f8f5f", _PUZZLE, "#b58900")
_BINS: Final = 60
_TAIL: Final = 0.002
_THUMBNAIL: Final = 88
_STYLE: Final[Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def norm_ratio_figure(selection: BlockSelection) -> bytes:
    """NormRatio of every block with its interval; the selected one stands out."""
    rows = selection.blocks
    selected = selection.selected.name
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            colour = _OOD if row.block == selected else _ID
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            axes.plot(row.ratio, place, "o", color=colour, markersize=6)
        axes.axvline(1, color=_MUTED, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [row.block for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.block == selected else "normal")
        axes.invert_yaxis()
        axes.grid(axis="x", color="#e4e8ee")
        axes.set_axisbelow(True)
        axes.set_xlabel("NormRatio: norm of the image over norm of its jigsaw puzzle, mean")
        return _png(figure)


def histograms_figure(
    inside: Scores,
    others: Mapping[str, Scores],
    *,
    threshold: float | None,
    score: str,
    inside_name: str = "ID",
) -> bytes:
    """The ID scores behind those of each other set, one panel a set, with the threshold."""
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(max(1, len(others)), height=1.9)
        tails = [np.quantile(each, [_TAIL, 1 - _TAIL]) for each in (inside, *others.values())]
        low, high = min(tail[0] for tail in tails), max(tail[1] for tail in tails)
        bins = np.linspace(low, high if high > low else low + 1, _BINS)
        for axes, (name, scores) in zip(panels, (others or {"": inside}).items(), strict=False):
            _histogram(axes, inside, bins, label=inside_name, colour=_ID, is_filled=True)
            if name:
                colour = _PUZZLE if name == "jigsaw puzzles" else _OOD
                _histogram(axes, scores, bins, label=name, colour=colour, is_filled=False)
            if threshold is not None:
                axes.axvline(threshold, color="#1c2430", linewidth=1.2, label="threshold")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.legend(loc="upper right", fontsize=8)
        figure.supxlabel(f"{score} (the outermost {2 * _TAIL:.1%} not drawn)", fontsize=9)
        return _png(figure)


def roc_figure(
    inside: Mapping[str, Scores],
    outside: Mapping[str, Mapping[str, Scores]],
    methods: Sequence[str],
) -> bytes:
    """Share of ID kept over share of OOD accepted, one panel a data set, one line a method."""
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(outside), height=3.2)
        for axes, (name, scores) in zip(panels, outside.items(), strict=False):
            for colour, method in zip(_LINES, methods, strict=False):
                accepted, kept = _roc(inside[method], scores[method])
                axes.plot(accepted, kept, color=colour, linewidth=1.4, label=method)
            axes.axhline(0.95, color=_MUTED, linewidth=0.8, linestyle=":")
            axes.set(title=name, xlim=(0, 1), ylim=(0, 1.01))
            axes.grid(color="#eef1f5")
        panels[0].legend(loc="lower right", fontsize=8)
        figure.supxlabel("share of OOD accepted", fontsize=9)
        figure.supylabel("share of ID kept", fontsize=9)
        return _png(figure)


def blocks_figure(evaluation: Evaluation) -> bytes:
    """AUROC of FeatureNorm at every block; the selected and the oracle block are marked."""
    names = list(evaluation.blocks)
    places = range(len(names))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for colour, data_set in zip(_LINES[1:], evaluation.ood_images, strict=False):
            line = [evaluation.blocks[name][data_set].auroc for name in names]
            axes.plot(places, line, color=colour, linewidth=1, alpha=0.6, label=data_set)
        mean = [evaluation.blocks[name]["all"].auroc for name in names]
        axes.plot(places, mean, color="#1c2430", linewidth=2, marker="o", label="mean")
        for block, marker, label in (
            (evaluation.block, "s", "selected by NormRatio"),
            (evaluation.oracle_block, "*", "best in hindsight"),
        ):
            place = names.index(block)
            axes.plot(
                place,
                mean[place],
                marker,
                color=_OOD,
                markersize=14 if marker == "*" else 11,
                fillstyle="full" if marker == "*" else "none",
                markeredgewidth=2 if marker == "s" else 1,
                linestyle="none",
                label=label,
            )
        axes.axhline(0.5, color=_MUTED, linewidth=0.8, linestyle=":")
        axes.set_xticks(places, names, rotation=45, ha="right")
        axes.set_ylabel("AUROC")
        figure.legend(loc="outside lower center", fontsize=8, ncols=4)
        return _png(figure)


def contact_sheet(pictures: Sequence[Image.Image]) -> bytes:
    """The pictures side by side, each in a square, eight a row."""
    columns = min(8, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    step = _THUMBNAIL + 6
    sheet = Image.new("RGB", (columns * step - 6, max(1, rows) * step - 6), "white")
    for place, picture in enumerate(pictures):
        # Small images grow, so that 32 pixels can be seen.
        scale = _THUMBNAIL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.resize(size), (place % columns * step, place // columns * step))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, two a row; an unused one is left blank."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, 0.3 + height * rows), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.axis("off")
    return figure, panels


def _histogram(
    axes: Axes,
    scores: Scores,
    bins: Scores,
    *,
    label: str,
    colour: str,
    is_filled: bool,
) -> None:
    axes.hist(
        scores,
        bins=bins.tolist(),
        density=True,
        color=colour,
        label=label,
        histtype="stepfilled" if is_filled else "step",
        alpha=0.35 if is_filled else 1,
        linewidth=1.5,
    )


def _roc(inside: Scores, outside: Scores) -> tuple[Scores, Scores]:
    scores = np.concatenate([inside, outside])
    is_inside = np.repeat([True, False], [inside.size, outside.size])[np.argsort(-scores)]
    falling = np.sort(scores)[::-1]
    ends = np.append(np.flatnonzero(falling[1:] != falling[:-1]), scores.size - 1)
    kept = np.cumsum(is_inside)[ends] / inside.size
    accepted = np.cumsum(~is_inside)[ends] / outside.size
    return np.append(0, accepted), np.append(0, kept)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    # Without the date and version the same figure is the same bytes.
    figure.savefig(file, dpi=_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()
