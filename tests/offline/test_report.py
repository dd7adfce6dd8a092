"""The reports: everything in one file, the same in Markdown, nothing that needs a network."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli import main
from app.errors import NormGateError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.offline.document import Bullets, Document, Figure, Heading, Paragraph, Table
from app.offline.evaluate import Evaluation, ScoredImages, score_images, summarise
from app.offline.figures import contact_sheet, histograms_figure
from app.offline.report import evaluation_report, write_report
from app.store import Store
from tests.conftest import silent

PNG = b"\x89PNG\r\n\x1a\n"


class Outline(HTMLParser):
    """Tags still open, the addresses that the page names, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember what a browser would load."""
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses.extend(value or "" for name, value in attrs if name in ("src", "href"))

    def handle_endtag(self, tag: str) -> None:
        """Tags are closed in the order in which they were opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect."""
        self.text += data


@pytest.fixture(scope="module")
def scored(tiny_store: Store, tiny_options: CalibrationOptions) -> ScoredImages:
    """Two data sets, one with a name that no file could have."""
    return score_images(
        tiny_store.load("tiny"),
        id_images=Path(tiny_options.threshold_images),
        ood_images={
            "drawn": Path(tiny_options.selection_images),
            "a/b <c>": Path(tiny_options.selection_images),
        },
        progress=silent,
        with_odin=False,
    )


@pytest.fixture(scope="module")
def evaluation(scored: ScoredImages) -> Evaluation:
    """Its metrics."""
    return summarise(scored, groups={"drawn": "far"}, resamples=20)


def test_every_part_as_html_and_markdown() -> None:
    """Text is escaped, figures are inside the page, and files beside the Markdown."""
    document = Document("A < B")
    document.add(
        Heading("Part"),
        Paragraph("x < y"),
        Paragraph("careful", is_warning=True),
        Bullets(["one", "two"]),
        Table(["k", "v"], [["<a>", "1"], ["b", "2"]], marked=frozenset({1})),
        Figure("picture", PNG, "what it shows"),
    )

    page, text = Outline(document.as_html()), document.as_markdown()

    assert page.open == []
    assert "x < y" in page.text
    assert page.addresses == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert document.files().keys() == {"report.html", "report.md", "figures/picture.png"}
    assert document.files()["figures/picture.png"] == PNG
    assert text.splitlines()[0] == "# A < B"
    assert "> **Warning:** careful" in text
    assert "| **b** | **2** |" in text
    assert "![what it shows](figures/picture.png)" in text


def test_the_evaluations_report(
    scored: ScoredImages, evaluation: Evaluation, tmp_path: Path
) -> None:
    """It loads nothing, names every method, block and data set, and its figures are PNG files."""
    write_report(evaluation_report(scored, evaluation), tmp_path)

    page = Outline((tmp_path / "report.html").read_text())
    text = (tmp_path / "report.md").read_text()
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    bundle = scored.loaded.bundle
    for wanted in (
        *evaluation.results,
        *evaluation.blocks,
        *evaluation.ood_images,
        bundle.data.selection.sha256,
        bundle.data.threshold.sha256,
        f"seed {bundle.jigsaw.seed}",
        "the weights are random",
        "Nothing is promised about how many OOD images are caught",
    ):
        assert wanted in page.text
        assert wanted in text
    figures = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(figures) == len(page.addresses)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in figures)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "figures"}


def test_the_calibrations_report(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """It lies beside the bundle, which loads as it does without."""
    store = Store(tmp_path)
    options = replace(
        tiny_options, has_report=True, abstain_alpha=0.6, has_class_thresholds=True, alpha=0.4
    )
    folder = Path(calibrate(options, store, progress=silent).folder)

    page = Outline((folder / "report.html").read_text())
    bundle = store.load("tiny").bundle
    assert page.open == []
    assert f"{bundle.block} has the largest NormRatio" in page.text
    assert f"number {bundle.threshold.k} of the {bundle.threshold.n} sorted" in page.text
    assert "called uncertain" in page.text
    assert (folder / "figures" / "norm_ratio.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("flags", [[], ["--no-report"]])
def test_the_command_writes_reports(
    tiny_options: CalibrationOptions, tmp_path: Path, flags: list[str]
) -> None:
    """``calibrate`` writes one unless told not to; ``evaluate`` does into ``--out``."""
    status = main(
        [
            *("calibrate", "--architecture", "cifar/resnet18", "--arguments", '{"width": 4}'),
            *("--weights", "random", "--alpha", "0.2", "--name", "tiny"),
            *("--selection-images", str(tiny_options.selection_images)),
            *("--threshold-images", str(tiny_options.threshold_images)),
            *("--model-store", str(tmp_path / "store"), *flags),
        ]
    )

    assert status == 0
    assert (tmp_path / "store" / "tiny" / "1" / "report.html").exists() != bool(flags)
    if flags:
        return
    status = main(
        [
            *("evaluate", "--bundle", "tiny", "--id", str(tiny_options.threshold_images)),
            *("--ood", f"drawn={tiny_options.selection_images}", "--no-odin"),
            *("--model-store", str(tmp_path / "store"), "--out", str(tmp_path / "out")),
        ]
    )
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.html", "report.md", "figures"),
        *("evaluation.json", "evaluation.csv", "evaluation.md"),
    }


def test_scores_that_are_all_equal() -> None:
    """A histogram of one value, and of nothing beside it, is still a picture."""
    same = np.ones(30)

    assert histograms_figure(same, {}, threshold=1.0, score="s").startswith(PNG)
    assert histograms_figure(same, {"x": same}, threshold=None, score="s").startswith(PNG)


@pytest.mark.parametrize(("count", "size"), [(1, (88, 88)), (3, (276, 88)), (9, (746, 182))])
def test_contact_sheet(count: int, size: tuple[int, int], tmp_path: Path) -> None:
    """Eight squares a row, small pictures grown, whatever the pictures' proportions."""
    pictures = [Image.new("RGB", (4 + i, 9)) for i in range(count)]
    (tmp_path / "sheet.png").write_bytes(contact_sheet(pictures))

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == size


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The folder is named."""
    (tmp_path / "file").touch()

    with pytest.raises(NormGateError, match="file cannot be written"):
        write_report(Document("x"), tmp_path / "file")
