"""Bulk scoring: the verdict on every file of a folder, a glob or a list, into one table.

Rows go to a journal beside the output, a JSON line each, batch by batch. Once every file has its
row the journal becomes the table. An interrupted run leaves the journal; the same command reads it
and goes on behind its last whole row.
"""

import csv
import glob
import importlib
import itertools
import json
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from app.core.detector import Detector
from app.core.images import DEFAULT_MAX_PIXELS
from app.errors import CalibrationError, NormGateError
from app.offline.progress import Progress
from app.offline.reading import SUFFIXES, LoadedFile, load_file
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

FORMATS: Final = (".parquet", ".csv", ".jsonl")
_BATCHES_AHEAD: Final = 3
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
        raise CalibrationError(
            f"{source} names no image: it must be a folder with images, a file, a glob that "
            "matches, or - with one name a line on standard input"
        )
    return files


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not be written, before any image is scored.

    Raises:
        NormGateError: its suffix is unknown, pyarrow is missing, its folder is not there, or it
            exists already.
    """
    if out.suffix not in FORMATS:
        raise NormGateError(f"{out} must end in one of {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        _pyarrow()
    if not out.parent.is_dir():
        raise NormGateError(f"{out.parent} is not a folder")
    if out.exists() and not overwrite:
        raise NormGateError(f"{out} exists; --overwrite replaces it")


def score_files(
    loaded: LoadedBundle,
    files: Sequence[Path],
    out: Path,
    *,
    progress: Progress,
    overwrite: bool = False,
    batch_size: int = 64,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    device: str = "cpu",
) -> ScoreSummary:
    """Score the files and write one row each, in their order.

    Memory is bounded by a few batches of decoded images, beside the names.

    Args:
        loaded: the bundle.
        files: from :func:`find_files`.
        out: ``.parquet``, ``.csv`` or ``.jsonl``; it appears when it is complete.
        progress: told how far it is.
        overwrite: replace ``out``, and begin anew where a run was interrupted.
        batch_size: images in one forward pass.
        max_pixels: larger images get an error instead of a verdict.
        device: where the network runs.

    Raises:
        NormGateError: the output cannot be written, or the interrupted run was another one.
        BundleError: the network cannot be built.
    """
    check_output(out, overwrite=overwrite)
    journal = out.with_name(f"{out.name}.partial")
    detector = loaded.detector(device=device)
    try:
        if overwrite:
            journal.unlink(missing_ok=True)
        done = _resume(journal, loaded.bundle, files)
        with journal.open("a", encoding="utf-8") as opened:
            count = done
            progress("scoring", done=count, total=len(files))
            for rows in _batches(detector, loaded.bundle, files[done:], batch_size, max_pixels):
                opened.writelines(json.dumps(row) + "\n" for row in rows)
                opened.flush()
                count += len(rows)
                progress("scoring", done=count, total=len(files))
        summary = _summary(journal, resumed=done)
        _write_table(journal, out)
        journal.unlink()
    except OSError as error:
        raise NormGateError(f"{out} cannot be written: {error}") from error
    return summary


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


def _text(file: Path) -> str:
    """The name as text that every format can hold, whatever bytes the file system has."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _header(bundle: Bundle) -> Row:
    return {
        "bundle": f"{bundle.name}/{bundle.version}",
        "weights_sha256": bundle.weights_sha256,
        "threshold": bundle.threshold.value,
    }


def _resume(journal: Path, bundle: Bundle, files: Sequence[Path]) -> int:
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
                place > len(files) or json.loads(line)["file"] != _text(files[place - 1])
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


def _batches(
    detector: Detector,
    bundle: Bundle,
    files: Sequence[Path],
    batch_size: int,
    max_pixels: int,
) -> Iterator[list[Row]]:
    """The rows of each batch, with a few batches decoded ahead."""
    chunks = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
    try:
        pending: deque[tuple[Sequence[Path], list[Future[LoadedFile]]]] = deque()
        for chunk in chunks:
            jobs = [
                pool.submit(load_file, file, bundle.preprocessing, max_pixels) for file in chunk
            ]
            pending.append((chunk, jobs))
            if len(pending) > _BATCHES_AHEAD:
                yield _rows(detector, bundle, *pending.popleft())
        while pending:
            yield _rows(detector, bundle, *pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _rows(
    detector: Detector,
    bundle: Bundle,
    files: Sequence[Path],
    jobs: Sequence[Future[LoadedFile]],
) -> list[Row]:
    images = [job.result().image for job in jobs]
    readable = [image for image in images if isinstance(image, Tensor)]
    scored = iter(_scored(detector, bundle, torch.stack(readable)) if readable else [])
    return [
        dict.fromkeys(COLUMNS)
        | {"file": _text(file)}
        | (next(scored) if isinstance(image, Tensor) else {"error": image})
        for file, image in zip(files, images, strict=True)
    ]


def _scored(detector: Detector, bundle: Bundle, images: Tensor) -> Iterator[dict[str, Any]]:
    detections = detector.detect(images)
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
            "label": bundle.labels[index],
            "probability": probability,
        }


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
    if out.suffix == ".parquet":
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
    arrow, parquet = _pyarrow()
    schema = arrow.schema([(name, kind) for name, kind in COLUMNS.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise NormGateError(
            "a .parquet output needs pyarrow: pip install 'normgate[parquet]'"
        ) from error
