"""The scores: by hand, and the selected norm against its definition."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from app.cli import _SCORES
from app.core.scores import (
    SCORES,
    SCORES_WITH_HEAD,
    SCORES_WITHOUT_LOGITS,
    Evidence,
    ScoreName,
    energy,
    msp,
    selected_norm_logits,
)
from app.errors import NetworkError

LOGITS = torch.tensor([[0.0, math.log(3.0)], [-2.0, -2.0]])


def test_classic_scores_by_hand() -> None:
    """log(1 + 3) and 3 / 4; log(2 e^-2) and 1 / 2."""
    assert energy(LOGITS).tolist() == pytest.approx([math.log(4), math.log(2) - 2])
    assert msp(LOGITS).tolist() == pytest.approx([0.75, 0.5])


def test_every_score_by_hand() -> None:
    """Norms 2 and 5; the selected-norm logits are twice the logits."""
    evidence = Evidence(torch.tensor([2.0, 5.0]), LOGITS, 2 * LOGITS)
    expected = {
        "feature_norm": [2.0, 5.0],
        # An energy below zero says nothing for the image: the product is zero, not negative.
        "norm_logit": [2 * math.log(4), 0.0],
        "selected_norm_energy": [math.log(10), math.log(2) - 4],
        "selected_norm_msp": [0.9, 0.5],
        "energy": [math.log(4), math.log(2) - 2],
        "msp": [0.75, 0.5],
    }

    assert SCORES.keys() == expected.keys() == set(get_args(ScoreName)) == set(_SCORES)
    for name, values in expected.items():
        assert SCORES[name](evidence).tolist() == pytest.approx(values, abs=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("has_bias", [True, False])
def test_selected_norm(has_bias: bool) -> None:
    """They are the layer's output for the unit feature vector times the norm."""
    torch.manual_seed(0)
    head = nn.Linear(6, 3, bias=has_bias)
    features, norms = torch.randn(4, 6), torch.rand(4)

    with torch.no_grad():
        rescaled = selected_norm_logits(
            head(features), features=features, bias=head.bias, feature_norms=norms
        )
        expected = head(features / features.norm(dim=1, keepdim=True) * norms[:, None])

    torch.testing.assert_close(rescaled, expected)


def test_selected_norm_of_a_zero_vector() -> None:
    """A zero vector has no direction: what is left is the bias."""
    bias = torch.tensor([1.0, -1.0])

    rescaled = selected_norm_logits(
        bias[None], features=torch.zeros(1, 4), bias=bias, feature_norms=torch.tensor([9.0])
    )

    assert rescaled.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("name", sorted(SCORES_WITH_HEAD))
def test_scores_that_need_a_head(name: ScoreName) -> None:
    """Without selected-norm logits the score is refused with the reason."""
    with pytest.raises(NetworkError, match="no last linear layer"):
        SCORES[name](Evidence(torch.ones(1), torch.ones(1, 2)))


@pytest.mark.parametrize("name", sorted(SCORES_WITHOUT_LOGITS))
def test_scores_without_logits(name: ScoreName) -> None:
    """These need the norm alone."""
    assert SCORES[name](Evidence(torch.tensor([3.0]))).tolist() == [3.0]
