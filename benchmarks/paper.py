"""Run the paper's suites end to end, or say which folder is missing and where it is described.

``paper.toml`` holds the suites::

    python -m benchmarks.paper cifar10 --model-store model_store
    python -m benchmarks.paper local --networks cifar10-vgg11 --model-store build/store
    python -m benchmarks.paper imagenet --data /data/ood --conventions paper

A network whose bundle is missing is calibrated first, into the model store, where its weights and
images exist. The paper's networks of CIFAR-10 are wider than the ones named here.
"""

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from app.core.networks import Architecture, Arguments
from app.errors import BundleNotFoundError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.offline.evaluate import (
    ORACLE_TOLERANCE,
    Codec,
    Evaluation,
    Group,
    score_images,
    summarise,
)
from app.offline.report import evaluation_report, write_report
from app.offline.tables import markdown_table, methods_table, oracle_sentence, write_tables
from app.offline.terminal import TerminalProgress
from app.store import LoadedBundle, Store
from benchmarks.datasets import UNPACKED, archive_folder, unpack

CONFIGURATION: Final = Path(__file__).with_name("paper.toml")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OodSet(_Part):
    """A folder of OOD images."""

    folder: str
    described: str
    group: Group | None = None


class Figures(_Part):
    """What the paper reports for FeatureNorm, as means over the suite."""

    block: str
    fpr95: float | None = None
    auroc: float | None = None


class Network(_Part):
    """A network by its architecture and weights file."""

    architecture: str
    arguments: Arguments = {}
    weights: str
    paper: Figures | None = None


class Suite(_Part):
    """ID images, OOD sets and networks."""

    title: str
    id_images: str
    selection_images: str
    threshold_images: str
    described: str
    codec: Codec
    ood: dict[str, OodSet]
    networks: dict[str, Network]


class Data:
    """The folders of a suite below the data folder; known archives are unpacked when asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, name: str) -> Path | None:
        """The folder, or None where it is missing."""
        folder, archive = self._root / name, name.partition("/")[0]
        if not folder.exists() and (archive_folder() / f"{archive}.zip").exists():
            unpack(archive, under=self._root)
        return folder if folder.is_dir() else None

    def file(self, name: str) -> Path:
        """A file below the data folder, there or not."""
        return self._root / name


def main() -> None:
    """Run one suite and print our table beside the paper's."""
    options = _parse_arguments()
    suites = {
        name: Suite.model_validate(suite)
        for name, suite in tomllib.loads(CONFIGURATION.read_text()).items()
    }
    suite, data = suites[options.suite], Data(options.data)
    print(f"# {suite.title}\n")
    ood = _present(suite, data)
    id_images = data.folder(suite.id_images)
    if id_images is None or not ood:
        print(f"missing: {options.data / suite.id_images}: {suite.described}")
        raise SystemExit(1)
    evaluations = {}
    for name, network in suite.networks.items():
        if options.networks and name not in options.networks:
            continue
        loaded = _bundle(name, network, suite, data, Store(options.model_store))
        if loaded is not None:
            evaluations[name] = _evaluate(loaded, suite, data, ood, id_images, options)
    _print_beside_the_paper(suite, evaluations)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=list(tomllib.loads(CONFIGURATION.read_text())))
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="of the suite; default: all")
    parser.add_argument("--data", type=Path, default=UNPACKED, metavar="DIR")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), metavar="DIR")
    parser.add_argument(
        "--conventions",
        choices=["normgate", "paper"],
        default="normgate",
        help="paper: zero edge and the nearest recall, as in the authors' code",
    )
    parser.add_argument("--no-fit", action="store_true", help="leave out the fitted methods")
    parser.add_argument("--no-odin", action="store_true", help="leave out ODIN")
    parser.add_argument("--out", type=Path, metavar="DIR", help="tables and reports go here")
    return parser.parse_args()


def _present(suite: Suite, data: Data) -> dict[str, Path]:
    """The OOD folders that exist; of the others it is said what they are."""
    present = {}
    for name, ood in suite.ood.items():
        folder = data.folder(ood.folder)
        if folder is None:
            print(f"missing: {data.file(ood.folder)}: {ood.described}")
        else:
            present[name] = folder
    return present


def _bundle(
    name: str, network: Network, suite: Suite, data: Data, store: Store
) -> LoadedBundle | None:
    """The bundle, calibrated now if it can be; None where something is missing."""
    try:
        return store.load(name)
    except BundleNotFoundError:
        weights = data.file(network.weights)
    folders = [data.folder(suite.selection_images), data.folder(suite.threshold_images)]
    if not weights.exists() or None in folders:
        print(f"missing: bundle {name} in {store.root}, and to calibrate it: {weights}")
        return None
    selection, threshold = folders
    assert selection is not None
    assert threshold is not None
    with TerminalProgress() as progress:
        calibrate(
            CalibrationOptions(
                name=name,
                architecture=Architecture(id=network.architecture, arguments=network.arguments),
                selection_images=selection,
                threshold_images=threshold,
                weights=str(weights),
            ),
            store,
            progress=progress,
        )
    return store.load(name)


def _evaluate(
    loaded: LoadedBundle,
    suite: Suite,
    data: Data,
    ood: Mapping[str, Path],
    id_images: Path,
    options: argparse.Namespace,
) -> Evaluation:
    """One network on all sets; its methods are printed, and written where asked for."""
    name = loaded.bundle.name
    with TerminalProgress() as progress:
        scored = score_images(
            loaded,
            id_images=id_images,
            ood_images=ood,
            training_images=None if options.no_fit else data.folder(suite.selection_images),
            codec=suite.codec,
            is_paper=options.conventions == "paper",
            with_odin=not options.no_odin,
            progress=progress,
        )
    groups: dict[str, Group] = {
        key: suite.ood[key].group  # type: ignore[misc]
        for key in ood
        if suite.ood[key].group is not None
    }
    evaluation = summarise(scored, groups=groups)
    if evaluation.accuracy is not None:
        print(f"\n## {name}: accuracy {evaluation.accuracy:.4f}\n")
    print("\n".join(markdown_table(*methods_table(evaluation))))
    print(f"\n{oracle_sentence(evaluation, tolerance=ORACLE_TOLERANCE)}")
    if options.out is not None:
        write_tables(evaluation, options.out / name)
        write_report(evaluation_report(scored, evaluation), options.out / name)
    return evaluation


def _print_beside_the_paper(suite: Suite, evaluations: Mapping[str, Evaluation]) -> None:
    print("\n## FeatureNorm, FPR95 / AUROC in percent, mean over the sets\n")
    headings = ["network", "block", "paper's block", "sets", "here", "paper, all sets"]
    rows = []
    for name, evaluation in evaluations.items():
        paper = suite.networks[name].paper
        results = evaluation.results["feature_norm"].values()
        here = [float(np.mean([getattr(row, key) for row in results])) for key in _COLUMNS]
        there = [None if paper is None else getattr(paper, key) for key in _COLUMNS]
        rows.append(
            [
                name,
                evaluation.block,
                "-" if paper is None else paper.block,
                f"{len(results)} of {len(suite.ood)}",
                _percent(here),
                _percent(there),
            ]
        )
    print("\n".join(markdown_table(headings, rows)))


_COLUMNS: Final = ("fpr95", "auroc")


def _percent(values: list[float | None] | list[float]) -> str:
    return " / ".join("-" if value is None else f"{100 * value:.2f}" for value in values)


if __name__ == "__main__":
    main()
