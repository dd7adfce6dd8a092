"""The tables of an evaluation: what JSON, CSV and Markdown hold."""

import csv
import json
from pathlib import Path

import pytest

from app.errors import NormGateError
from app.offline.calibrate import CalibrationOptions
from app.offline.evaluate import Evaluation, evaluate
from app.offline.tables import as_csv, as_markdown, oracle_sentence, write_tables
from app.store import Store
from tests.conftest import silent


@pytest.fixture(scope="module")
def evaluation(tiny_store: Store, tiny_options: CalibrationOptions) -> Evaluation:
    """Of the tiny bundle, on two data sets, one of them near."""
    return evaluate(
        tiny_store.load("tiny"),
        id_images=Path(tiny_options.threshold_images),
        ood_images={
            "drawn": Path(tiny_options.selection_images),
            "same": Path(tiny_options.threshold_images),
        },
        groups={"drawn": "near"},
        progress=silent,
        with_odin=False,
        resamples=10,
    )


def test_files(evaluation: Evaluation, tmp_path: Path) -> None:
    """The JSON reads ``results[method][data set] = {auroc, fpr95, ...}``."""
    write_tables(evaluation, tmp_path / "new" / "folder")

    document = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    result = document["results"]["feature_norm"]["same"]
    assert result["auroc"] == pytest.approx(0.5)
    assert result.keys() >= {"auroc", "fpr95", "aupr_in", "aupr_out", "fpr95_ood_positive"}
    assert result["intervals"].keys() == result.keys() - {"intervals"}
    assert Evaluation.model_validate(document) == evaluation


def test_csv(evaluation: Evaluation) -> None:
    """A line for every method and data set, mean, and block, numbers as in the evaluation."""
    rows = list(csv.DictReader(as_csv(evaluation).splitlines()))

    methods, blocks = len(evaluation.results), len(evaluation.blocks)
    # Two data sets; means over all and near; blocks with their mean.
    assert len(rows) == 2 * methods + 2 * methods + 3 * blocks
    row = next(row for row in rows if (row["name"], row["data_set"]) == ("energy", "drawn"))
    result = evaluation.results["energy"]["drawn"]
    assert float(row["fpr95"]) == pytest.approx(result.fpr95, abs=1e-6)
    assert float(row["auroc_high"]) == pytest.approx(result.intervals["auroc"][1], abs=1e-6)


def test_markdown(evaluation: Evaluation) -> None:
    """The best mean AUROC comes first; the selected block is marked."""
    lines = as_markdown(evaluation).splitlines()

    start = next(i for i, line in enumerate(lines) if line.startswith("| method |"))
    assert lines[start] == "| method | drawn | same | mean | mean, near |"
    best = max(evaluation.averages, key=lambda name: evaluation.averages[name]["all"].auroc)
    assert lines[start + 2].startswith(f"| {best} |")
    assert any(line.startswith(f"| {evaluation.block} (selected") for line in lines)


def test_the_oracle_is_named(evaluation: Evaluation) -> None:
    """Whether the selected block keeps up with the best one is said plainly."""
    others = [name for name in evaluation.blocks if name != evaluation.block]
    results = {
        name: {
            data_set: result.model_copy(update={"auroc": 0.9 if name == others[0] else 0.88})
            for data_set, result in row.items()
        }
        for name, row in evaluation.blocks.items()
    }
    behind = evaluation.model_copy(update={"blocks": results, "oracle_block": others[0]})

    assert "2.0 points below" in oracle_sentence(behind, tolerance=0.01)
    assert "NOT within 1 point" in oracle_sentence(behind, tolerance=0.01)
    assert ": within 3 point" in oracle_sentence(behind, tolerance=0.03)
    same = evaluation.model_copy(update={"oracle_block": evaluation.block})
    assert "best in hindsight" in oracle_sentence(same, tolerance=0.01)


def test_a_folder_that_cannot_be_written(evaluation: Evaluation, tmp_path: Path) -> None:
    """The folder is named."""
    (tmp_path / "file").touch()

    with pytest.raises(NormGateError, match="file cannot be written"):
        write_tables(evaluation, tmp_path / "file")
