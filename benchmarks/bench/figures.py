"""Medians with their spread; ratios are taken within a turn, where both sides had the same luck."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Turn = dict[str, Any]
"""One turn of a case, as in its JSON: ``measurements``, and what else was measured."""
Direction = Literal["at least", "at most"]

_OPPOSITE: Final[dict[Direction, Callable[[float, float], bool]]] = {
    "at least": lambda value, goal: value >= goal,
    "at most": lambda value, goal: value <= goal,
}


@dataclass(frozen=True)
class Spread:
    """The median of some turns, the least and the largest of them."""

    median: float
    low: float
    high: float
    count: int

    def format(self, digits: int) -> str:
        """``median (low to high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Goal:
    """A figure, what it should be, and whether it is."""

    name: str
    value: Spread
    direction: Direction
    goal: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the median reaches the goal."""
        return _OPPOSITE[self.direction](self.value.median, self.goal)

    def as_json(self) -> dict[str, Any]:
        """As every part of the benchmark writes it and the table of goals reads it."""
        spread = {"low": self.value.low, "high": self.value.high, "turns": self.value.count}
        goal = f"{self.direction} {self.goal:g}{self.unit}"
        return {"name": self.name, "value": self.value.median, "goal": goal, "met": self.is_met} | (
            spread
        )


def spread(values: Iterable[float]) -> Spread | None:
    """The spread of some values; None where there are none."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.median(found), min(found), max(found), len(found))


def ratios(
    turns: Sequence[Turn],
    above: Callable[[Turn], float | None],
    below: Callable[[Turn], float | None],
) -> Spread | None:
    """``above / below`` turn by turn; a turn without either, or with nothing below, is left out."""
    pairs = [(above(turn), below(turn)) for turn in turns]
    return spread(top / bottom for top, bottom in pairs if top is not None and bottom)


def figure(turn: Turn, *, load: str, contestant: str, field: str = "images_per_s") -> float | None:
    """What one contestant did under one load in one turn; None where that was not measured."""
    for row in turn["measurements"]:
        if row["load"] == load and row["contestant"] == contestant:
            return float(row[field])
    return None


def best(turn: Turn, *, load: str, kind: str) -> float | None:
    """The most images a second of any contestant of a kind under one load in one turn."""
    found = [
        row["images_per_s"]
        for row in turn["measurements"]
        if row["load"] == load and row["kind"] == kind
    ]
    return max(found, default=None)


def loads(turns: Sequence[Turn], *, kind: str) -> list[str]:
    """The loads that contestants of a kind were measured under, in order."""
    rows = [row for turn in turns for row in turn["measurements"] if row["kind"] == kind]
    return list(dict.fromkeys(row["load"] for row in rows))


def failures(turns: Sequence[Turn]) -> dict[str, dict[str, int]]:
    """Answers other than those expected, by contestant and status."""
    found: dict[str, dict[str, int]] = {}
    for turn in turns:
        for row in turn["measurements"]:
            for status, count in row["failures"].items():
                of_contestant = found.setdefault(row["contestant"], {})
                of_contestant[str(status)] = of_contestant.get(str(status), 0) + count
    return found
