"""The threshold on a score and what it promises: conformal and PAC bounds on false alarms.

Only the false-alarm rate on ID images is bounded, and only while live ID images are
exchangeable with the calibration images. Nothing is promised about OOD images.
"""

import math
from fractions import Fraction
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import betainc, betaincinv

from app.errors import CalibrationError

Guarantee = Literal["conformal", "pac"]

DEFAULT_ALPHA: Final = 0.05
DEFAULT_DELTA: Final = 0.05
INTERVAL_LEVEL: Final = 0.95
MIN_CLASS_RANK: Final = 5
"""A class's threshold is its fifth smallest score or a later one: fewer images say too little."""


class RateInterval(BaseModel):
    """Where the realised false-alarm rate lies, with probability ``level`` over calibrations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    level: float = INTERVAL_LEVEL


class Threshold(BaseModel):
    """A score below ``value`` is OOD; the rest says what that promises about ID images.

    ``conformal``: an exchangeable ID image is a false alarm with probability at most ``alpha``,
    on average over calibration sets. ``pac``: with confidence ``1 - delta`` over calibration
    sets, the false-alarm rate of this very threshold is at most ``alpha``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(description="The k-th smallest of the n calibration scores.")
    alpha: float = Field(gt=0, lt=1)
    guarantee: Guarantee
    delta: float | None = Field(gt=0, lt=1, description="Only for the PAC guarantee.")
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    false_alarm_rate: RateInterval


def fit_threshold(
    scores: ArrayLike,
    *,
    alpha: float = DEFAULT_ALPHA,
    guarantee: Guarantee = "conformal",
    delta: float = DEFAULT_DELTA,
) -> Threshold:
    """The threshold that keeps false alarms at or below ``alpha``.

    Args:
        scores: ``[N]`` scores of held-out ID images, higher meaning more in-distribution.
        alpha: largest accepted false-alarm rate, in (0, 1).
        guarantee: see :class:`Threshold`.
        delta: the chance, over calibration sets, that the PAC bound fails, in (0, 1).

    Raises:
        CalibrationError: a rate out of bounds, a score that is not finite, or too few scores.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float32))
    if not np.isfinite(ordered).all():
        raise CalibrationError(
            f"{np.count_nonzero(~np.isfinite(ordered))} of {ordered.size} scores are not finite"
        )
    k = threshold_rank(ordered.size, alpha=alpha, guarantee=guarantee, delta=delta)
    return Threshold(
        value=float(ordered[k - 1]),
        alpha=alpha,
        guarantee=guarantee,
        delta=delta if guarantee == "pac" else None,
        n=ordered.size,
        k=k,
        false_alarm_rate=realised_rate(ordered.size, k=k),
    )


def fit_class_thresholds(
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    *,
    alpha: float = DEFAULT_ALPHA,
    guarantee: Guarantee = "conformal",
    delta: float = DEFAULT_DELTA,
) -> dict[int, Threshold]:
    """A threshold for each predicted class with enough images (Mondrian conformal prediction).

    Among the images predicted to be of such a class the promise of :class:`Threshold` holds.

    Args:
        scores: ``[N]`` scores of held-out ID images.
        classes: ``[N]``, the classes the network predicts for them.
        alpha: largest accepted false-alarm rate, in (0, 1).
        guarantee: see :class:`Threshold`.
        delta: the chance that the PAC bound fails, in (0, 1).

    Returns:
        By class index. Enough means that the threshold is at least number
        ``MIN_CLASS_RANK`` of the class's sorted scores.
    """
    found = {}
    for label in np.unique(classes).tolist():
        own = scores[classes == label]
        try:
            threshold = fit_threshold(own, alpha=alpha, guarantee=guarantee, delta=delta)
        except CalibrationError:
            continue
        if threshold.k >= MIN_CLASS_RANK:
            found[label] = threshold
    return found


def threshold_rank(n: int, *, alpha: float, guarantee: Guarantee, delta: float) -> int:
    """Which of ``n`` sorted scores, counted from 1, becomes the threshold.

    Raises:
        CalibrationError: a rate is out of bounds, or ``n`` is too small for them.
    """
    if guarantee == "pac":
        return pac_rank(n, alpha=alpha, delta=delta)
    return conformal_rank(n, alpha=alpha)


def conformal_rank(n: int, *, alpha: float) -> int:
    """``k = floor(alpha (n + 1))``: the threshold is the k-th smallest of ``n`` scores.

    Raises:
        CalibrationError: ``alpha`` is not in (0, 1), or ``k`` would be 0.
    """
    _check_rate("alpha", alpha)
    # Exact arithmetic on the decimal the user wrote: 0.29 * 100 is 28.999999999999996.
    rate = Fraction(repr(float(alpha)))
    k = math.floor(rate * (n + 1))
    if k < 1:
        needed = math.ceil(1 / rate) - 1
        raise CalibrationError(
            f"{n} threshold images are too few for alpha {alpha}: at least {needed} are needed"
        )
    return k


def pac_rank(n: int, *, alpha: float, delta: float) -> int:
    """The largest ``k`` with ``BetaCDF(alpha; k, n + 1 - k) >= 1 - delta``.

    Raises:
        CalibrationError: a rate is not in (0, 1), or no ``k`` of at least 1 qualifies.
    """
    _check_rate("alpha", alpha)
    _check_rate("delta", delta)
    ranks = np.arange(1, n + 1)
    # The CDF falls as k grows, so the qualifying ranks are the first ones.
    k = int(np.count_nonzero(betainc(ranks, n + 1 - ranks, alpha) >= 1 - delta))
    if k < 1:
        needed = math.ceil(math.log(delta) / math.log1p(-alpha))
        raise CalibrationError(
            f"{n} threshold images are too few for alpha {alpha} with confidence {1 - delta:g}: "
            f"at least {needed} are needed"
        )
    return k


def realised_rate(n: int, *, k: int, level: float = INTERVAL_LEVEL) -> RateInterval:
    """The central interval of the false-alarm rate's distribution, ``Beta(k, n + 1 - k)``.

    The rate that one calibration set realises is random in that set; with continuous scores
    this is its exact distribution (Vovk 2012, "Conditional validity of inductive conformal
    predictors").
    """
    low, high = betaincinv(k, n + 1 - k, ((1 - level) / 2, (1 + level) / 2))
    return RateInterval(low=float(low), high=float(high), level=level)


def p_values(scores: ArrayLike, calibration_scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(1 + #{calibration score <= s}) / (n + 1)`` for each score ``s``.

    Under a conformal threshold an image is OOD exactly when its p-value is at most ``alpha``.

    Args:
        scores: ``[B]`` float32.
        calibration_scores: ``[N]`` float32, sorted, ascending.

    Returns:
        ``[B]`` float64 in (0, 1].
    """
    ranks = np.searchsorted(calibration_scores, np.asarray(scores, dtype=np.float32), side="right")
    values: NDArray[np.float64] = (1 + ranks) / (calibration_scores.size + 1)
    return values


def _check_rate(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise CalibrationError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
