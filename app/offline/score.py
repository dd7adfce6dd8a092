"""Bulk scoring: the verdict on every image of a folder, a glob, a list or shards, into one table.

Rows go to a journal beside the output, a JSON line each, batch by batch. Once every file has its
row the journal becomes the table. An interrupted run leaves the journal; the same command reads it
and goes on behind its last whole row.
"""

import csv
import glob
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.special import softmax
from torch import Tensor

from app.core.detector import Detector
from app.core.images import DEFAULT_MAX_PIXELS
from app.errors import CalibrationError, NormGateError
from app.offline.progress import Progress
from app.offline.reading import Batch, Place, Reading, ThisMachine
from app.offline.sources import (
    PARQUET_SUFFIX,
    SHARD_SUFFIX,
    SUFFIXES,
    Files,
    ImageSource,
    Names,
    Spread,
    find_images,
    parquet_files_of,
    pyarrow,
    shards_of,
)
from app.store import Bundle, LoadedBundle

Row = Mapping[str, Any]

COLUMNS: Final = {
    "file": "string",
    "verdict": "string",
    "score": "float64",
    "threshold": "float64",
    "p_value": "float64",
    "feature_norm": "float64",
    "label": "string",
    "probability": "float64",
    "error": "string",
}
"""The table's columns and their Arrow types; ``error`` says why the others are empty."""

FORMATS: Final = (PARQUET_SUFFIX, ".csv", ".jsonl")
_ROWS_AT_ONCE: Final = 10_000


@dataclass(frozen=True)
class ScoreSummary:
    """How many files got which verdict, and how many were done before."""

    verdicts: Mapping[str, int]
    unreadable: int
    resumed: int


def find_files(source: str, *, lines: Iterable[str] = ()) -> list[Path]:
    """The files a source names, in an order that is always the same.

    Args:
        source: a folder, whose images are found recursively; a file; a glob, where ``**`` crosses
            folders; or ``-`` for one name a line in ``lines``.
        lines: standard input, for ``-``.

    Raises:
        CalibrationError: nothing is found.
    """
    files = list(_named(source, lines))
    if not files:
        raise _nothing_found(source)
    return files


def find_source(location: str, *, lines: Iterable[str] = (), spread: Spread = map) -> ImageSource:
    """The images that a location names: as :func:`find_files`, or in shards, or at a URL.

    Args:
        location: what :func:`find_files` takes, where tar shards or Parquet files are the images
            in them; or what :func:`app.offline.sources.find_images` takes.
        lines: standard input, for ``-``.
        spread: looks into the shards.

    Raises:
        CalibrationError: nothing is found.
        NormGateError: what is found cannot be read.
    """
    if "://" in location:
        return find_images(location, spread=spread)
    names = Names(str(file) for file in _named(location, lines))
    if not names:
        if Path(location).is_dir():
            return find_images(Path(location), spread=spread)
        raise _nothing_found(location)
    for suffix, make in ((SHARD_SUFFIX, shards_of), (PARQUET_SUFFIX, parquet_files_of)):
        if all(name.lower().endswith(suffix) for name in names):
            source: ImageSource = make("", list(names), spread=spread)
            if not source:
                raise _nothing_found(location)
            return source
    return Files("", names)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not be written, before any image is scored.

    Raises:
        NormGateError: its suffix is unknown, pyarrow is missing, its folder is not there, or it
            exists already.
    """
    if out.suffix not in FORMATS:
        raise NormGateError(f"{out} must end in one of {', '.join(FORMATS)}")
    if out.suffix == PARQUET_SUFFIX:
        pyarrow()
    if not out.parent.is_dir():
        raise NormGateError(f"{out.parent} is not a folder")
    if out.exists() and not overwrite:
        raise NormGateError(f"{out} exists; --overwrite replaces it")


def score_files(
    loaded: LoadedBundle,
    files: Sequence[Path] | ImageSource,
    out: Path,
    *,
    progress: Progress,
    overwrite: bool = False,
    batch_size: int = 64,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    device: str = "cpu",
    place: Place | None = None,
) -> ScoreSummary:
    """Score the images and write one row each, in their order.

    Memory is bounded by a few batches of decoded images, beside the names.

    Args:
        loaded: the bundle.
        files: from :func:`find_files` or :func:`find_source`.
        out: ``.parquet``, ``.csv`` or ``.jsonl``; it appears when it is complete.
        progress: told how far it is.
        overwrite: replace ``out``, and begin anew where a run was interrupted.
        batch_size: images in one forward pass.
        max_pixels: larger images get an error instead of a verdict.
        device: where the network runs.
        place: does the work; this machine by default. It changes no row.

    Raises:
        NormGateError: the output cannot be written, or the interrupted run was another one.
        BundleError: the network cannot be built.
    """
    check_output(out, overwrite=overwrite)
    source = files
    if not isinstance(source, ImageSource):
        source = Files("", Names(str(file) for file in source))
    reading = Reading(source, loaded.bundle.preprocessing, batch_size, max_pixels)
    work = RowWork(loaded, source, device)
    journal = out.with_name(f"{out.name}.partial")
    try:
        if overwrite:
            journal.unlink(missing_ok=True)
        done = _resume(journal, loaded.bundle, source)
        with journal.open("a", encoding="utf-8") as opened:
            count = done
            progress("scoring", done=count, total=len(source))
            positions = range(done, len(source))
            for rows in (place or ThisMachine()).run(reading, work, positions):
                opened.writelines(rows)
                opened.flush()
                count += len(rows)
                progress("scoring", done=count, total=len(source))
        summary = _summary(journal, resumed=done)
        _write_table(journal, out)
        journal.unlink()
    except OSError as error:
        raise NormGateError(f"{out} cannot be written: {error}") from error
    return summary


@dataclass(frozen=True)
class RowWork:
    """What scoring does with a batch.

    Args:
        loaded: the bundle.
        source: names the images.
        device: where the network runs.
    """

    loaded: LoadedBundle
    source: ImageSource
    device: str

    def __call__(self, batch: Batch) -> list[str]:
        """A line of the journal for each image."""
        scored = iter(self._scored(batch.images) if batch.indices else [])
        reasons = batch.findings.reasons
        return [
            json.dumps(
                dict.fromkeys(COLUMNS)
                | {"file": _text(self.source.where(position))}
                | ({"error": reasons[position]} if position in reasons else next(scored))
            )
            + "\n"
            for position in batch.positions
        ]

    @cached_property
    def _detector(self) -> Detector:
        return self.loaded.detector(device=self.device)

    def _scored(self, images: Tensor) -> Iterator[dict[str, Any]]:
        detections = self._detector.detect(images)
        probabilities = softmax(detections.logits.astype(np.float64), axis=1)
        columns = zip(
            detections.verdicts,
            detections.scores.tolist(),
            detections.thresholds.tolist(),
            detections.p_values.tolist(),
            detections.feature_norms.tolist(),
            probabilities.argmax(axis=1).tolist(),
            probabilities.max(axis=1).tolist(),
            strict=True,
        )
        for verdict, score, threshold, p_value, norm, index, probability in columns:
            if not math.isfinite(score):
                yield {"error": f"the score is {score}"}
                continue
            yield {
                "verdict": verdict,
                "score": score,
                "threshold": threshold,
                "p_value": p_value,
                "feature_norm": norm,
                "label": self.loaded.bundle.labels[index],
                "probability": probability,
            }


def _nothing_found(location: str) -> CalibrationError:
    return CalibrationError(
        f"{location} names no image: it must be a folder with images, a file, a glob that "
        "matches, or - with one name a line on standard input"
    )


def _named(source: str, lines: Iterable[str]) -> Iterator[Path]:
    if source == "-":
        yield from (Path(line.rstrip("\r\n")) for line in lines if line.strip())
    elif Path(source).is_dir():
        for parent, folders, names in os.walk(source, followlinks=True):
            folders.sort()
            yield from (
                Path(parent, name)
                for name in sorted(names)
                if Path(name).suffix.lower() in SUFFIXES
            )
    elif Path(source).is_file():
        yield Path(source)
    else:
        found = sorted(glob.glob(source, recursive=True))
        yield from (path for path in map(Path, found) if path.is_file())


def _text(file: str) -> str:
    """The name as text that every format can hold, whatever bytes the file system has."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _header(bundle: Bundle) -> Row:
    return {
        "bundle": f"{bundle.name}/{bundle.version}",
        "weights_sha256": bundle.weights_sha256,
        "threshold": bundle.threshold.value,
    }


def _resume(journal: Path, bundle: Bundle, source: ImageSource) -> int:
    """How many files have a row; a torn last line is cut off, a new journal begun."""
    header = json.dumps(_header(bundle)) + "\n"
    if not journal.exists():
        journal.write_text(header, encoding="utf-8")
        return 0
    whole, done = 0, -1
    with journal.open("rb") as opened:
        for place, line in enumerate(opened):
            if not line.endswith(b"\n"):
                break
            if place == 0 and line.decode() != header:
                raise NormGateError(
                    f"{journal} was begun with another bundle; --overwrite begins anew"
                )
            if place > 0 and (
                place > len(source) or json.loads(line)["file"] != _text(source.where(place - 1))
            ):
                raise NormGateError(
                    f"{journal} was begun with other files: its row {place} is not the file "
                    "found there now; --overwrite begins anew"
                )
            whole, done = whole + len(line), place
    with journal.open("rb+") as opened:
        opened.truncate(whole)
        if whole == 0:
            opened.write(header.encode())
    return max(done, 0)


def _journalled(journal: Path) -> Iterator[dict[str, Any]]:
    with journal.open(encoding="utf-8") as opened:
        next(opened)
        yield from map(json.loads, opened)


def _summary(journal: Path, *, resumed: int) -> ScoreSummary:
    counts = Counter(row["verdict"] or "unreadable" for row in _journalled(journal))
    unreadable = counts.pop("unreadable", 0)
    return ScoreSummary(verdicts=dict(counts), unreadable=unreadable, resumed=resumed)


def _write_table(journal: Path, out: Path) -> None:
    """The journal's rows in the output's format, whole or not at all."""
    unfinished = out.with_name(f"{out.name}.unfinished")
    rows = _journalled(journal)
    if out.suffix == PARQUET_SUFFIX:
        _write_parquet(rows, unfinished)
    else:
        with unfinished.open("w", encoding="utf-8", newline="") as opened:
            if out.suffix == ".csv":
                writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            else:
                opened.writelines(json.dumps(row) + "\n" for row in rows)
    unfinished.replace(out)


def _write_parquet(rows: Iterator[dict[str, Any]], file: Path) -> None:
    arrow = pyarrow()
    schema = arrow.schema([(name, kind) for name, kind in COLUMNS.items()])
    with arrow.parquet.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))
