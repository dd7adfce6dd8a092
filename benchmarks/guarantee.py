"""How the number of threshold images narrows the realised false-alarm rate.

The table of ``docs/method.md``::

    python -m benchmarks.guarantee
"""

from typing import Final

from app.core.threshold import conformal_rank, pac_rank, realised_rate
from app.errors import CalibrationError
from app.offline.tables import markdown_table

ALPHAS: Final = (0.01, 0.05, 0.1)
IMAGES: Final = (59, 100, 200, 500, 1_000, 5_000, 10_000)
DELTA: Final = 0.05


def main() -> None:
    """For each alpha and n: k and the rate that 95 % of calibrations realise."""
    headings = ["n", *(f"conformal, alpha {alpha:g}" for alpha in ALPHAS), "PAC, alpha 0.05"]
    rows = [
        [
            str(n),
            *(_cell(n, alpha=alpha, guarantee="conformal") for alpha in ALPHAS),
            _cell(n, alpha=0.05, guarantee="pac"),
        ]
        for n in IMAGES
    ]
    print("\n".join(markdown_table(headings, rows)))


def _cell(n: int, *, alpha: float, guarantee: str) -> str:
    try:
        k = (
            pac_rank(n, alpha=alpha, delta=DELTA)
            if guarantee == "pac"
            else conformal_rank(n, alpha=alpha)
        )
    except CalibrationError:
        return "too few"
    interval = realised_rate(n, k=k)
    return f"{interval.low:.2%} to {interval.high:.2%}"


if __name__ == "__main__":
    main()
