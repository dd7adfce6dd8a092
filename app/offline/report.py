"""The reports of ``calibrate`` and ``evaluate``: what was chosen, why, and what it promises."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.core.images import decode
from app.core.threshold import Threshold
from app.errors import ImageError, NormGateError
from app.offline.document import (
    FIGURE_FOLDER,
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Part,
    Table,
)
from app.offline.evaluate import ORACLE_TOLERANCE, Evaluation, Scored, ScoredImages
from app.offline.tables import blocks_table, methods_table, oracle_sentence, rates
from app.store import Bundle, Fingerprint

Scores = NDArray[np.float64]

NO_MATPLOTLIB: Final = "no report is written without matplotlib: pip install 'normgate[report]'"

_EXAMPLES: Final = 8
_UNSAFE: Final = r"[^A-Za-z0-9._-]"
_ROC_METHODS: Final = ("feature_norm", "norm_logit", "selected_norm_energy", "energy", "msp")
_PROMISE: Final = (
    "Only the rate of false alarms on ID images is promised, and only while they stay "
    "exchangeable with the threshold images: the same cameras, formats, sizes and subjects.",
    "Nothing is promised about how many OOD images are caught. Images that resemble the "
    "classes, near OOD, are often let through.",
    "Another network, block, input size, preprocessing, decoder or data type voids the threshold.",
)


@dataclass(frozen=True)
class CalibrationScores:
    """What the calibration's report draws.

    Args:
        norms: FeatureNorm of the selection images at the selected block.
        puzzle_norms: of their jigsaw puzzles.
        calibration: the threshold images' scores.
    """

    norms: NDArray[np.float32]
    puzzle_norms: NDArray[np.float32]
    calibration: NDArray[np.float32]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def calibration_report(bundle: Bundle, scores: CalibrationScores) -> Document:
    """Why the block was chosen, where the threshold lies, and what it promises."""
    from app.offline import figures

    document = Document(f"Calibration of {bundle.name}/{bundle.version}")
    document.add(*_warnings(bundle.warnings))
    document.add(Heading("Which block was chosen"), *_selection(bundle))
    document.add(
        Figure(
            "norms",
            figures.histograms_figure(
                scores.norms.astype(np.float64),
                {"jigsaw puzzles": scores.puzzle_norms.astype(np.float64)},
                threshold=None,
                score=f"FeatureNorm of {bundle.block}",
                inside_name="training images",
            ),
            f"FeatureNorm of {bundle.block} on the selection images and on their puzzles.",
        ),
        Heading("Where the threshold lies"),
        Paragraph(_threshold_sentence(bundle.threshold)),
        Figure(
            "threshold",
            figures.histograms_figure(
                scores.calibration.astype(np.float64),
                {},
                threshold=bundle.threshold.value,
                score=bundle.score,
                inside_name="threshold images",
            ),
            "Scores of the threshold images; what lies left of the line would be a false alarm.",
        ),
        *_class_thresholds(bundle),
        *_ending(bundle),
    )
    return document


def evaluation_report(scored: ScoredImages, evaluation: Evaluation) -> Document:
    """The bundle's verdicts on each data set, the methods side by side, and every block."""
    bundle = scored.loaded.bundle
    document = Document(f"Evaluation of {evaluation.bundle}")
    document.add(
        *_warnings(bundle.warnings),
        Paragraph(
            f"OOD images are {_CODECS[evaluation.codec]}. "
            + ("Conventions of the paper's code. " if evaluation.is_paper else "")
            + f"Intervals: {evaluation.interval_level:.0%} over {evaluation.resamples} bootstrap "
            f"resamples, seed {evaluation.seed}."
        ),
        Heading("What the threshold does"),
        Bullets([line.removeprefix("- ") for line in rates(evaluation)]),
        *_histograms(scored, bundle),
        Heading("The methods side by side"),
        *_methods(evaluation),
        *_roc(scored, bundle),
        Heading("Every block"),
        *_blocks(evaluation),
        Heading("Which block was chosen"),
        *_selection(bundle),
        Heading("Examples at the tails"),
        *_examples(scored),
        *_ending(bundle),
    )
    return document


def _ending(bundle: Bundle) -> Iterator[Part]:
    yield Heading("What is promised, and what is not")
    yield Bullets(_PROMISE)
    yield Heading("Made from")
    yield _facts(bundle)


def write_report(document: Document, folder: Path) -> None:
    """Write ``report.html``, ``report.md`` and the figures.

    Raises:
        NormGateError: the folder cannot be written.
    """
    try:
        (folder / FIGURE_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, content in document.files().items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise NormGateError(f"{folder} cannot be written: {error}") from error


_CODECS: Final = {
    "raw": "scored as their files are",
    "jpeg75": "resized, then re-encoded as JPEG of quality 75 like the ID images",
}


def _warnings(warnings: Sequence[str]) -> Iterator[Part]:
    for warning in warnings:
        yield Paragraph(warning, is_warning=True)


def _selection(bundle: Bundle) -> Iterator[Part]:
    from app.offline import figures

    selection = bundle.norm_ratios
    margin = "" if selection.margin is None else f", {selection.margin:.4f} above the runner-up"
    best = next(row for row in selection.blocks if row.block == bundle.block)
    yield Paragraph(
        f"{bundle.block} has the largest NormRatio of {len(selection.blocks)} blocks, "
        f"{best.ratio:.4f}{margin}: of all blocks it tells the {selection.images} selection "
        "images best from their jigsaw puzzles."
    )
    yield Figure(
        "norm_ratio",
        figures.norm_ratio_figure(selection),
        f"NormRatio of every block in execution order, with its {selection.confidence_level:.0%} "
        "bootstrap interval.",
    )
    yield Table(
        ["block", "NormRatio", "low", "high"],
        [
            [row.block, *(f"{value:.4f}" for value in (row.ratio, row.low, row.high))]
            for row in selection.blocks
        ],
        marked=frozenset(
            index for index, row in enumerate(selection.blocks) if row.block == bundle.block
        ),
    )


def _threshold_sentence(threshold: Threshold) -> str:
    interval = threshold.false_alarm_rate
    promise = (
        f"with {100 * (1 - (threshold.delta or 0)):g}% confidence at most {threshold.alpha:.2%} "
        "of ID images score below it"
        if threshold.guarantee == "pac"
        else f"an ID image scores below it with probability at most {threshold.alpha:.2%}"
    )
    return (
        f"The threshold is {threshold.value:.6g}, number {threshold.k} of the {threshold.n} sorted "
        f"scores: {promise}. In {interval.level:.0%} of calibrations of this size the realised "
        f"rate lies in {interval.low:.2%} to {interval.high:.2%}."
    )


def _class_thresholds(bundle: Bundle) -> Iterator[Part]:
    if bundle.abstain is not None:
        yield Paragraph(
            f"Scores from there up to {bundle.abstain.value:.6g} are called uncertain: at most "
            f"{bundle.abstain.alpha:.2%} of ID images are called uncertain or OOD, with the same "
            "guarantee."
        )
    if bundle.class_thresholds is not None:
        yield Table(
            ["predicted class", "threshold", "images", "k"],
            [
                [
                    row.label,
                    f"{row.threshold.value:.6g}",
                    str(row.threshold.n),
                    str(row.threshold.k),
                ]
                for row in bundle.class_thresholds
            ],
        )


def _histograms(scored: ScoredImages, bundle: Bundle) -> Iterator[Part]:
    from app.offline import figures

    yield Figure(
        "scores",
        figures.histograms_figure(
            scored.inside.detections.scores.astype(np.float64),
            {
                "jigsaw puzzles": scored.puzzles.detections.scores.astype(np.float64),
                **{
                    name: outside.detections.scores.astype(np.float64)
                    for name, outside in scored.outside.items()
                },
            },
            threshold=bundle.threshold.value,
            score=bundle.score,
        ),
        "Scores of the ID images (filled) and of jigsaw puzzles of them and each OOD data set.",
    )


def _methods(evaluation: Evaluation) -> Iterator[Part]:
    headings, rows = methods_table(evaluation)
    yield Paragraph(
        "AUROC / FPR95, the method with the largest mean AUROC first. FPR95 is the share of OOD "
        "images accepted when 95 % of ID images are kept; evaluation.json has the other metrics "
        "and every interval."
    )
    yield Table(
        headings,
        rows,
        marked=frozenset(index for index, row in enumerate(rows) if row[0] == evaluation.score),
    )
    for method, reason in evaluation.left_out.items():
        yield Paragraph(f"{method} is left out: {reason}.")


def _roc(scored: ScoredImages, bundle: Bundle) -> Iterator[Part]:
    from app.offline import figures

    wanted = dict.fromkeys((bundle.score, *_ROC_METHODS))
    methods = [name for name in wanted if name in scored.inside.methods]
    yield Figure(
        "roc",
        figures.roc_figure(
            scored.inside.methods,
            {name: outside.methods for name, outside in scored.outside.items()},
            methods,
        ),
        "ROC curves; on the dotted line 95 % of the ID images are kept, and FPR95 is read there.",
    )


def _blocks(evaluation: Evaluation) -> Iterator[Part]:
    from app.offline import figures

    headings, rows = blocks_table(evaluation)
    yield Paragraph(oracle_sentence(evaluation, tolerance=ORACLE_TOLERANCE))
    yield Figure(
        "blocks",
        figures.blocks_figure(evaluation),
        "AUROC of FeatureNorm at every block, in execution order.",
    )
    yield Table(
        headings,
        rows,
        marked=frozenset(
            index for index, name in enumerate(evaluation.blocks) if name == evaluation.block
        ),
    )


def _examples(scored: ScoredImages) -> Iterator[Part]:
    from app.offline import figures

    sheets = [("ID", scored.inside, "with the lowest scores", 1)] + [
        (name, outside, "with the highest scores", -1) for name, outside in scored.outside.items()
    ]
    for name, folder, which, sign in sheets:
        order = np.argsort(sign * folder.detections.scores, kind="stable")[:_EXAMPLES]
        shown = ", ".join(f"{score:.3g}" for score in folder.detections.scores[order])
        yield Figure(
            "tail_" + re.sub(_UNSAFE, "_", name),
            figures.contact_sheet([_picture(folder, index) for index in order.tolist()]),
            f"{name}: the {len(order)} images {which} ({shown}).",
            has_text=False,
        )


def _picture(folder: Scored, index: int) -> Image.Image:
    try:
        return Image.fromarray(decode(folder.files[index].read_bytes()))
    except (OSError, ImageError):
        # It was readable a moment ago; a gray square says it no longer is.
        return Image.new("RGB", (8, 8), "lightgray")


def _facts(bundle: Bundle) -> Table:
    preprocessing, threshold = bundle.preprocessing, bundle.threshold
    facts: Mapping[str, str] = {
        "architecture": ", ".join(
            [
                bundle.architecture.id,
                *(f"{name} {value}" for name, value in bundle.architecture.arguments.items()),
            ]
        ),
        "weights, sha256": bundle.weights_sha256,
        "computes in": bundle.dtype,
        "created": f"{bundle.created:%Y-%m-%d %H:%M} UTC",
        "input": f"{preprocessing.crop} pixels of {preprocessing.resize}, "
        f"{preprocessing.interpolation}; decoded by {preprocessing.decoder.jpeg}"
        + (", large JPEGs at a scale" if preprocessing.scaled_decode else ""),
        "selection images": _fingerprint(bundle.data.selection),
        "threshold images": _fingerprint(bundle.data.threshold),
        "jigsaw": f"{bundle.jigsaw.tiles} x {bundle.jigsaw.tiles}, edge {bundle.jigsaw.edge}, "
        f"seed {bundle.jigsaw.seed}",
        "score": bundle.score,
        "guarantee": f"{threshold.guarantee}, alpha {threshold.alpha:g}, n {threshold.n}, "
        f"k {threshold.k}",
        "libraries": ", ".join(f"{name} {version}" for name, version in bundle.libraries.items()),
    }
    return Table(["what", "value"], [[name, value] for name, value in facts.items()], is_facts=True)


def _fingerprint(fingerprint: Fingerprint) -> str:
    unreadable = f", {len(fingerprint.unreadable)} unreadable" if fingerprint.unreadable else ""
    return f"{fingerprint.count}{unreadable}, sha256 {fingerprint.sha256}"
