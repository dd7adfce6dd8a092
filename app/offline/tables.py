"""An evaluation as JSON, CSV and Markdown."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from app.errors import NormGateError
from app.offline.evaluate import DataSetResult, Evaluation
from app.offline.metrics import METRICS

_GROUP_TITLES: Final = {"all": "mean", "near": "mean, near", "far": "mean, far"}
_CAPTION: Final = "AUROC / FPR95; FPR95 is the share of OOD accepted when 95 % of ID are kept."


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write ``evaluation.json``, ``evaluation.csv`` and ``evaluation.md``.

    Raises:
        NormGateError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("evaluation.json", evaluation.model_dump_json(indent=2) + "\n"),
            ("evaluation.csv", as_csv(evaluation)),
            ("evaluation.md", as_markdown(evaluation)),
        ):
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise NormGateError(f"{folder} cannot be written: {error}") from error


def as_csv(evaluation: Evaluation) -> str:
    """One line a method and data set, or block and data set; means are data sets too."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    bounds = [f"{metric}_{bound}" for metric in METRICS for bound in ("low", "high")]
    writer.writerow(["kind", "name", "data_set", *METRICS, *bounds])
    for kind, rows in (
        ("method", evaluation.results),
        ("method_mean", evaluation.averages),
        ("block", evaluation.blocks),
    ):
        for name, results in rows.items():
            for data_set, result in results.items():
                writer.writerow([kind, name, data_set, *_numbers(result)])
    return file.getvalue()


def as_markdown(evaluation: Evaluation) -> str:
    """The methods and the blocks as tables, with the false alarms and detection rates."""
    return "\n".join(
        [
            f"# {evaluation.bundle}, codec {evaluation.codec}",
            "",
            *rates(evaluation),
            "",
            _CAPTION,
            "",
            *markdown_table(*methods_table(evaluation)),
            "",
            f"FeatureNorm at every block; NormRatio selects {evaluation.block}, the best in "
            f"hindsight is {evaluation.oracle_block}.",
            "",
            *markdown_table(*blocks_table(evaluation)),
            "",
            *(f"{method} is left out: {why}" for method, why in evaluation.left_out.items()),
        ]
    )


def rates(evaluation: Evaluation) -> list[str]:
    """What the threshold does, a sentence a data set."""
    low, high = evaluation.false_alarm_interval
    promised = evaluation.false_alarms_promised
    lines = [
        f"- false alarms: {evaluation.false_alarm_rate:.2%} ({low:.2%} to {high:.2%}) of "
        f"{evaluation.id_images} ID images; the bundle says {promised[0]:.2%} to {promised[1]:.2%}"
    ]
    if evaluation.accuracy is not None:
        lines.append(f"- accuracy of the classifier: {evaluation.accuracy:.2%}")
    for data_set, rate in evaluation.detection_rate.items():
        low, high = evaluation.detection_intervals[data_set]
        lines.append(
            f"- {data_set}: {rate:.2%} ({low:.2%} to {high:.2%}) of "
            f"{evaluation.ood_images[data_set]} images are caught at the threshold"
        )
    return lines


def methods_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a method a row, a data set or mean a column; the best mean first."""
    groups = list(next(iter(evaluation.averages.values())))
    headings = ["method", *evaluation.ood_images, *(_GROUP_TITLES[group] for group in groups)]
    ranked = sorted(
        evaluation.results, key=lambda name: evaluation.averages[name]["all"].auroc, reverse=True
    )
    return headings, [
        [
            method,
            *(cell(evaluation.results[method][name]) for name in evaluation.ood_images),
            *(cell(evaluation.averages[method][group]) for group in groups),
        ]
        for method in ranked
    ]


def blocks_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a block a row, in execution order."""
    headings = ["block", *evaluation.ood_images, "mean"]
    return headings, [
        [
            block + _mark(block, evaluation),
            *(cell(results[name]) for name in (*evaluation.ood_images, "all")),
        ]
        for block, results in evaluation.blocks.items()
    ]


def oracle_sentence(evaluation: Evaluation, *, tolerance: float) -> str:
    """Whether the selected block's AUROC is within ``tolerance`` of the oracle block's."""
    selected = evaluation.blocks[evaluation.block]["all"].auroc
    oracle = evaluation.blocks[evaluation.oracle_block]["all"].auroc
    gap = f"{100 * (oracle - selected):.1f} points"
    if evaluation.block == evaluation.oracle_block:
        return f"NormRatio selected the block that is best in hindsight, {evaluation.block}."
    verdict = "within" if oracle - selected <= tolerance else "NOT within"
    return (
        f"The selected block {evaluation.block} has a mean AUROC of {selected:.4f}, {gap} below "
        f"{evaluation.oracle_block}, the best in hindsight ({oracle:.4f}): {verdict} "
        f"{100 * tolerance:g} point."
    )


def cell(result: DataSetResult) -> str:
    """AUROC / FPR95."""
    return f"{result.auroc:.3f} / {result.fpr95:.3f}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _mark(block: str, evaluation: Evaluation) -> str:
    marks = [
        name
        for name, marked in (("selected", evaluation.block), ("oracle", evaluation.oracle_block))
        if block == marked
    ]
    return f" ({', '.join(marks)})" if marks else ""


def _numbers(result: DataSetResult) -> list[str]:
    values = [getattr(result, metric) for metric in METRICS]
    bounds = [bound for metric in METRICS for bound in result.intervals[metric]]
    return [f"{value:.6f}" for value in (*values, *bounds)]
