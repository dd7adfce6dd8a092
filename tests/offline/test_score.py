"""Bulk scoring: a row a file, in order, whatever happens on the way."""

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pyarrow import parquet

from app.cli import main
from app.core.images import load
from app.errors import CalibrationError, NormGateError
from app.offline.score import COLUMNS, check_output, find_files, score_files
from app.store import Store
from tests.conftest import draw_images, silent
from tests.pictures import encoded

GOOD = 11


class Interrupted(Exception):
    """The power went."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven drawings in two folders, a text that calls itself JPEG, and a file that is none."""
    root = tmp_path / "images"
    draw_images(root / "b", range(6))
    draw_images(root / "a", range(6, GOOD))
    (root / "b" / "0002x.jpg").write_text("not an image")
    (root / "notes.txt").write_text("no image either")
    return root


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The table of a ``.jsonl``, ``.csv`` or ``.parquet`` file, nothing as None."""
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if file.suffix == ".parquet":
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        return rows
    with file.open(newline="") as opened:
        return [
            {
                name: (float(value) if COLUMNS[name] == "float64" else value) if value else None
                for name, value in row.items()
            }
            for row in csv.DictReader(opened)
        ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows(tiny_store: Store, folder: Path, tmp_path: Path, suffix: str) -> None:
    """Each image has the detector's verdict; the unreadable one has the reason alone."""
    loaded = tiny_store.load("tiny")
    files = find_files(str(folder))
    out = tmp_path / f"results{suffix}"

    summary = score_files(loaded, files, out, progress=silent, batch_size=4)

    rows = rows_of(out)
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(row.keys() == COLUMNS.keys() for row in rows)
    detector = loaded.detector()
    for row in rows:
        if row["file"].endswith("0002x.jpg"):
            assert "are not an image" in row["error"]
            assert {row[name] for name in COLUMNS if name not in ("file", "error")} == {None}
            continue
        image = load(Path(row["file"]).read_bytes(), loaded.bundle.preprocessing)
        detection = detector.detect(image[None])
        assert row["score"] == pytest.approx(float(detection.scores[0]), rel=1e-4)
        assert row["feature_norm"] == row["score"]
        assert row["threshold"] == pytest.approx(loaded.bundle.threshold.value)
        assert row["p_value"] == pytest.approx(float(detection.p_values[0]), abs=0.05)
        assert row["label"] == loaded.bundle.labels[int(detection.logits[0].argmax())]
        probabilities = torch.from_numpy(detection.logits[0]).softmax(0)
        assert row["probability"] == pytest.approx(float(probabilities.max()), rel=1e-3)
        assert row["verdict"] in ("id", "ood")
        assert row["error"] is None
    assert sum(summary.verdicts.values()) == GOOD
    assert (summary.unreadable, summary.resumed) == (1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", out.name]


@pytest.mark.parametrize("torn", [b"", b'{"file": "half a ro'])
def test_an_interrupted_run_goes_on(
    tiny_store: Store, folder: Path, tmp_path: Path, torn: bytes
) -> None:
    """Nothing is scored twice, a torn line is done again, and the table is that of one run."""
    loaded, files = tiny_store.load("tiny"), find_files(str(folder))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    score_files(loaded, files, whole, progress=silent, batch_size=4)

    def stop(title: str, *, done: int, total: int) -> None:
        if done == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        score_files(loaded, files, out, progress=stop, batch_size=4)
    assert not out.exists()
    journal = tmp_path / "out.jsonl.partial"
    journal.write_bytes(journal.read_bytes() + torn)
    seen: list[int] = []

    def watch(title: str, *, done: int, total: int) -> None:
        seen.append(done)

    summary = score_files(loaded, files, out, progress=watch, batch_size=4)

    assert seen == [8, 12]
    assert summary.resumed == 8
    assert sum(summary.verdicts.values()) == GOOD
    assert out.read_text() == whole.read_text()
    assert not journal.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("tiny/1", "tiny/2"), "was begun with another bundle"),
        (lambda text: text.replace("0006.jpg", "9999.jpg"), "its row 1 is not the file"),
    ],
)
def test_another_run_s_journal(
    tiny_store: Store, folder: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    """What is left of a run with another bundle or other files is not gone on with."""
    loaded, files, out = tiny_store.load("tiny"), find_files(str(folder)), tmp_path / "out.csv"
    journal = tmp_path / "out.csv.partial"

    def stop(title: str, *, done: int, total: int) -> None:
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        score_files(loaded, files, out, progress=stop, batch_size=4)
    journal.write_text(spoil(journal.read_text()))

    with pytest.raises(NormGateError, match=message):
        score_files(loaded, files, out, progress=silent)

    score_files(loaded, files, out, progress=silent, overwrite=True)
    assert len(rows_of(out)) == GOOD + 1


def test_sources(folder: Path, tmp_path: Path) -> None:
    """A folder, a glob, a file, and names on standard input, in an order of their own."""
    by_folder = find_files(str(folder))
    names = [path.relative_to(folder).as_posix() for path in by_folder]
    # Folders and names sorted; by its suffix the text file is no image.
    assert names[:2] == ["a/0006.jpg", "a/0007.jpg"]
    assert len(names) == GOOD + 1
    assert find_files(str(folder / "**" / "000[01].jpg")) == [
        folder / "b" / "0000.jpg",
        folder / "b" / "0001.jpg",
    ]
    assert find_files(str(folder / "notes.txt")) == [folder / "notes.txt"]
    lines = [f"{path}\n" for path in reversed(by_folder)]
    assert find_files("-", lines=[*lines, "\n"]) == by_folder[::-1]
    with pytest.raises(CalibrationError, match="absent names no image"):
        find_files(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", "out.txt must end in one of .parquet, .csv, .jsonl"),
        ("absent/out.csv", "absent is not a folder"),
        ("there.csv", "there.csv exists; --overwrite replaces it"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    """What is wrong with the output is said before anything is scored."""
    (tmp_path / "there.csv").touch()

    with pytest.raises(NormGateError, match=message):
        check_output(tmp_path / name, overwrite=False)
    check_output(tmp_path / "there.csv", overwrite=True)


def test_the_command(
    tiny_store: Store, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the counts and the table's path; a second run will not overwrite."""
    out = tmp_path / "out.parquet"
    command = [
        *("score", str(folder), "--bundle", "tiny", "--out", str(out)),
        *("--model-store", str(tiny_store.root), "--batch-size", "5"),
    ]

    assert main(command) == 0
    report = capsys.readouterr().out
    verdicts = [row["verdict"] for row in rows_of(out)]
    for verdict in ("id", "ood"):
        if verdict in verdicts:
            assert f"{verdict}: {verdicts.count(verdict)}" in report
    assert "without a verdict: 1" in report
    assert f"table written to {out}" in report

    assert main(command) == 1
    assert "exists; --overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray"], "--ray needs Ray Data: pip install 'normgate[ray]'"),
        (["--workers", "2"], "--workers and --worker-cpus need --ray"),
        (["--worker-cpus", "2"], "--workers and --worker-cpus need --ray"),
    ],
)
def test_many_machines_are_an_extra(
    tiny_store: Store,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """Without Ray one line names what to install; its options say whose they are."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "app.distributed.offline", raising=False)
    command = ["score", str(folder), "--bundle", "tiny", "--model-store", str(tiny_store.root)]

    assert main([*command, "--out", str(tmp_path / "out.csv"), *flags]) == 1

    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tiny_store: Store, tmp_path: Path) -> None:
    """Four times as many images of 1 megapixel take no more than a few batches' memory."""
    image = encoded(0, "PNG", height=1000, width=1000)
    for index in range(160):
        (tmp_path / f"{index:04}.png").write_bytes(image)
    loaded, files = tiny_store.load("tiny"), find_files(str(tmp_path))
    process = psutil.Process()

    def peak(some: Iterable[Path], name: str) -> int:
        seen: list[int] = []

        def watch(title: str, *, done: int, total: int) -> None:
            seen.append(process.memory_info().rss)

        score_files(loaded, list(some), tmp_path / name, progress=watch, batch_size=8)
        return max(seen)

    small = peak(files[:40], "small.jsonl")
    large = peak(files, "large.jsonl")

    # 120 more images are 0.36 GB decoded, 0.4 MB at the network's 32 pixels.
    assert large - small < 100e6
