"""Every server answers alike, or nothing is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench.contestants import Kind

IMAGES: Final = 20
TOLERANCE: Final[dict[Kind, float]] = {"normgate": 1e-3, "ours": 1e-3, "documented": 0.10}
"""Largest relative difference of one image's score from NormGate's.

Pillow's resize and torchvision's on tensors give other pixels, and with them other scores.
"""


@dataclass(frozen=True)
class Agreement:
    """How far a server's answers are from NormGate's.

    ``labels`` is the share of images with the same label.
    """

    images: int
    largest_difference: float
    labels: float


def compare(
    answers: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], *, kind: Kind
) -> Agreement:
    """The agreement of answers about the same images.

    Raises:
        RuntimeError: a field is missing, a score differs by more than the tolerance, or a verdict
            is not what its own score and threshold make it.
    """
    if len(answers) != len(expected):
        raise RuntimeError(f"{len(answers)} answers to {len(expected)} images")
    for answer in answers:
        _check_content(answer)
    differences = [
        abs(answer["score"] / right["score"] - 1)
        for answer, right in zip(answers, expected, strict=True)
    ]
    if max(differences) > TOLERANCE[kind]:
        raise RuntimeError(
            f"a score differs by {max(differences):.2%} from NormGate's; the limit is "
            f"{TOLERANCE[kind]:.1%}"
        )
    same = [
        answer["predictions"][0]["label"] == right["predictions"][0]["label"]
        for answer, right in zip(answers, expected, strict=True)
    ]
    return Agreement(len(answers), max(differences), sum(same) / len(same))


def _check_content(answer: Mapping[str, Any]) -> None:
    missing = {"verdict", "score", "threshold", "p_value", "feature_norm"} - answer.keys()
    missing |= {"label", "index", "probability"} - answer["predictions"][0].keys()
    if missing:
        raise RuntimeError(f"the answer has no {', '.join(sorted(missing))}")
    verdict = "ood" if answer["score"] < answer["threshold"] else "id"
    if answer["verdict"] != verdict:
        raise RuntimeError(
            f"the verdict is {answer['verdict']} for score {answer['score']} against threshold "
            f"{answer['threshold']}"
        )
