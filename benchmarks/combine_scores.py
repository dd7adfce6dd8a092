"""Which score combines the norm with the logits best, on data sets it was not chosen on.

For every bundle named, FeatureNorm, Energy and the candidates that combine them are measured on the
OOD sets in ``build/data``. Each data set is then left out in turn: the candidate with the largest
mean AUROC on the other sets, over all bundles, is measured on the one left out::

    python -m benchmarks.combine_scores cifar10-resnet18 --model-store model_store

``jigsaw_choice`` takes for each bundle the score that tells ID images from their own jigsaw
puzzles best. Fisher's and Cauchy's combination are of the conformal p-values of FeatureNorm and
Energy, from the first half of the ID images; all scores are measured on the second half.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from app.core.threshold import p_values
from app.offline.evaluate import Scored, ScoredImages, score_images
from app.offline.metrics import auroc, fpr95
from app.offline.tables import markdown_table
from app.offline.terminal import TerminalProgress
from app.store import Store
from benchmarks.datasets import cifar10_split, unpack

Scores = NDArray[np.float64]
OOD_SETS: Final = ("svhn", "textures", "mnist", "tiny_imagenet32")
SINGLE: Final = ("feature_norm", "energy", "max_logit", "msp")


class Candidates:
    """The combined scores of one bundle; the conformal ones know half of its ID images."""

    def __init__(self, scored: ScoredImages) -> None:
        inside = scored.inside.methods
        half = len(scored.inside.files) // 2
        # Files are sorted by class: every other image, not the first ones.
        order = np.random.default_rng(0).permutation(len(scored.inside.files))
        self._known = {
            name: np.sort(inside[name][order[:half]]).astype(np.float32)
            for name in ("feature_norm", "energy")
        }
        self.measured = order[half:]
        self._chosen = self._choose(scored)

    def scores(self, folder: Scored) -> Mapping[str, Scores]:
        """Every candidate's score of the images of a folder."""
        found = self._combined(folder.methods)
        return {**found, "jigsaw_choice": found[self._chosen]}

    def _combined(self, methods: Mapping[str, Scores]) -> dict[str, Scores]:
        norm = methods["feature_norm"]
        p_norm, p_energy = (
            p_values(methods[name], self._known[name]) for name in ("feature_norm", "energy")
        )
        return {
            **{name: methods[name] for name in SINGLE},
            "feature_norm x max_logit": norm * np.maximum(methods["max_logit"], 0),
            "feature_norm x energy": norm * np.maximum(methods["energy"], 0),
            "selected_norm_energy": methods["selected_norm_energy"],
            "selected_norm_msp": methods["selected_norm_msp"],
            "fisher": np.log(p_norm) + np.log(p_energy),
            "cauchy": np.tan(np.pi * (p_norm - 0.5)) + np.tan(np.pi * (p_energy - 0.5)),
        }

    def _choose(self, scored: ScoredImages) -> str:
        inside = self._combined(scored.inside.methods)
        puzzles = self._combined(scored.puzzles.methods)
        return max(inside, key=lambda name: auroc(inside[name], puzzles[name]))


def main() -> None:
    """Score the images with each bundle, print the tables and the leave-one-out result."""
    options = _parse_arguments()
    results = {name: _measure(Store(options.model_store), name) for name in options.bundles}
    for name, table in results.items():
        _print(name, table)
    means = {
        candidate: {
            data_set: tuple(
                np.mean([table[candidate][data_set] for table in results.values()], axis=0).tolist()
            )
            for data_set in OOD_SETS
        }
        for candidate in next(iter(results.values()))
    }
    if len(results) > 1:
        _print("mean over the bundles", means)
    _print_left_out(means)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", metavar="NAME")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    return parser.parse_args()


Table = Mapping[str, Mapping[str, tuple[float, ...]]]


def _measure(store: Store, name: str) -> Table:
    """AUROC and FPR95 by candidate and data set."""
    with TerminalProgress() as progress:
        scored = score_images(
            store.load(name),
            id_images=cifar10_split()[2],
            ood_images={data_set: unpack(data_set) for data_set in OOD_SETS},
            codec="jpeg75",
            with_odin=False,
            progress=progress,
        )
    candidates = Candidates(scored)
    inside = {
        candidate: scores[candidates.measured]
        for candidate, scores in candidates.scores(scored.inside).items()
    }
    outside = {data_set: candidates.scores(folder) for data_set, folder in scored.outside.items()}
    return {
        candidate: {
            data_set: tuple(
                metric(inside[candidate], outside[data_set][candidate]) for metric in (auroc, fpr95)
            )
            for data_set in OOD_SETS
        }
        for candidate in inside
    }


def _print(title: str, table: Table) -> None:
    print(f"\n{title}: AUROC / FPR95\n")
    ranked = sorted(table, key=lambda candidate: -_mean(table[candidate], OOD_SETS)[0])
    rows = [
        [
            candidate,
            *(_cell(table[candidate][data_set]) for data_set in OOD_SETS),
            _cell(_mean(table[candidate], OOD_SETS)),
        ]
        for candidate in ranked
    ]
    print("\n".join(markdown_table(["score", *OOD_SETS, "mean"], rows)))


def _print_left_out(table: Table) -> None:
    print("\nChosen on the other data sets, measured on the one left out\n")
    rows = []
    for left_out in OOD_SETS:
        best = _best_without(table, left_out)
        rows.append([left_out, best, _cell(table[best][left_out])])
    print("\n".join(markdown_table(["left out", "chosen", "AUROC / FPR95"], rows)))


def _best_without(table: Table, left_out: str) -> str:
    others = [data_set for data_set in OOD_SETS if data_set != left_out]
    return max(table, key=lambda candidate: _mean(table[candidate], others)[0])


def _mean(row: Mapping[str, tuple[float, ...]], data_sets: Sequence[str]) -> tuple[float, ...]:
    return tuple(np.mean([row[data_set] for data_set in data_sets], axis=0).tolist())


def _cell(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
