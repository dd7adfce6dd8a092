"""Progress bars and tables for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from app.core.threshold import Threshold
from app.offline.calibrate import Calibration
from app.offline.evaluate import ORACLE_TOLERANCE, Evaluation
from app.offline.score import ScoreSummary
from app.offline.tables import blocks_table, methods_table, oracle_sentence, rates
from app.store import Store

_PIPE_WIDTH: Final = 160


class TerminalProgress:
    """One bar a pass on standard error, with rate and time left."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, title: str, *, done: int, total: int) -> None:
        """Move the bar called ``title``."""
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total)
        self._bars.update(self._tasks[title], completed=done)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s")


def print_calibration(calibration: Calibration) -> None:
    """The NormRatio of every block, the threshold and its promise, the warnings, the path."""
    console, bundle = _console(), calibration.bundle
    table = Table(title="NormRatio by block")
    for heading in ("block", "NormRatio", "95 % interval", ""):
        table.add_column(heading)
    for block in bundle.norm_ratios.blocks:
        is_chosen = block.block == bundle.block
        table.add_row(
            block.block,
            f"{block.ratio:.4f}",
            f"{block.low:.4f} to {block.high:.4f}",
            "chosen" if is_chosen else "",
            style="bold green" if is_chosen else None,
        )
    console.print(table)
    console.print(
        f"score {bundle.score}, threshold {bundle.threshold.value:.6g}: "
        f"{_promise(bundle.threshold)}"
    )
    if bundle.abstain is not None:
        console.print(f"uncertain below {bundle.abstain.value:.6g}, alpha {bundle.abstain.alpha:g}")
    if bundle.class_thresholds is not None:
        _print_table(
            "thresholds of predicted classes",
            ["class", "threshold", "images", "k"],
            [
                [
                    row.label,
                    f"{row.threshold.value:.6g}",
                    *map(str, (row.threshold.n, row.threshold.k)),
                ]
                for row in bundle.class_thresholds
            ],
        )
    for warning in bundle.warnings:
        console.print(f"[yellow]warning[/]: {warning}", highlight=False, soft_wrap=True)
    for name in (*bundle.data.selection.unreadable, *bundle.data.threshold.unreadable):
        console.print(f"left out: {name}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"bundle written to {calibration.folder}", highlight=False, soft_wrap=True)


def print_evaluation(evaluation: Evaluation) -> None:
    """False alarms against their promise, then every method and block on every data set."""
    console = _console()
    for line in rates(evaluation):
        console.print(line, highlight=False, soft_wrap=True)
    title = f"{evaluation.bundle}, codec {evaluation.codec}: AUROC / FPR95"
    _print_table(title, *methods_table(evaluation))
    _print_table("FeatureNorm at every block", *blocks_table(evaluation))
    console.print(
        oracle_sentence(evaluation, tolerance=ORACLE_TOLERANCE), highlight=False, soft_wrap=True
    )
    for method, reason in evaluation.left_out.items():
        console.print(f"{method} is left out: {reason}", highlight=False, soft_wrap=True)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_score_summary(summary: ScoreSummary, out: Path) -> None:
    """How many images got which verdict, and where the table lies."""
    console = _console()
    if summary.resumed:
        console.print(f"{summary.resumed} rows were there already")
    for verdict, count in sorted(summary.verdicts.items()):
        console.print(f"{verdict}: {count}")
    if summary.unreadable:
        console.print(f"[yellow]without a verdict[/]: {summary.unreadable}, see column error")
    console.print(f"table written to {out}", highlight=False, markup=False, soft_wrap=True)


def print_models(store: Store) -> None:
    """Every bundle of the store with its block, threshold and alpha; which one is pointed to."""
    table = Table(title=store.title)
    headings = ("model", "version", "architecture", "block", "threshold", "alpha", "created", "")
    for heading in headings:
        table.add_column(heading)
    for name, versions in store.index().items():
        pointer = store.pointer(name)
        for version in versions:
            bundle = store.read(name, version)
            table.add_row(
                name,
                str(version),
                bundle.architecture.id,
                bundle.block,
                f"{bundle.threshold.value:.6g}",
                f"{bundle.threshold.alpha:g}",
                f"{bundle.created:%Y-%m-%d}",
                "active" if pointer is not None and version == pointer.version else "",
            )
    _console().print(table)


def _console() -> Console:
    """Standard output; wide enough for every table where it is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _promise(threshold: Threshold) -> str:
    if threshold.guarantee == "pac":
        promise = (
            f"with {100 * (1 - (threshold.delta or 0)):g}% confidence at most "
            f"{threshold.alpha:.2%} of ID images are false alarms"
        )
    else:
        promise = f"an ID image is a false alarm with probability at most {threshold.alpha:.2%}"
    interval = threshold.false_alarm_rate
    return (
        f"{promise}, as long as ID images stay like the {threshold.n} threshold images; the rate "
        f"realised lies in {interval.low:.2%} to {interval.high:.2%} in {interval.level:.0%} of "
        "calibrations"
    )
