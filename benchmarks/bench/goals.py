"""The goals that the turns of a case are held against."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from benchmarks.bench.cases import ALONE, FULL
from benchmarks.bench.contestants import UNSCORED
from benchmarks.bench.figures import Goal, Spread, Turn, best, figure, loads, ratios, spread

NORMGATE: Final = "normgate"
_OF_LIMIT: Final = {True: 0.90, False: 0.60}
_OF_PEER: Final = {"cifar": 2.0, "mobilenet": 2.5}
_NEVER_BELOW: Final = 1.2
_OURS_NEVER_BELOW: Final = 1.0
_ALONE: Final = 1.15
_TAIL: Final = 3.0
_SCORE: Final = 0.98


def case_goals(result: dict[str, Any]) -> list[Goal]:
    """The goals of a case, of those figures that were measured."""
    turns: Sequence[Turn] = result["turns"]
    return [goal for goal in _goals(result, turns) if goal is not None]


def _goals(result: dict[str, Any], turns: Sequence[Turn]) -> Iterator[Goal | None]:
    name = result["case"]
    is_photographs = result["is_photographs"]
    full, alone = str(FULL), str(ALONE)
    yield _goal(
        f"{name}: throughput over HTTP / the limit, {full}",
        ratios(turns, lambda turn: _ours(turn, full), lambda turn: turn.get("limit")),
        at_least=_OF_LIMIT[is_photographs],
    )
    if name in _OF_PEER:
        yield _goal(
            f"{name}: throughput / best peer as documented, {full}",
            _against(turns, load=full, kind="documented"),
            at_least=_OF_PEER[name],
        )
    yield _lowest(name, turns, kind="documented", at_least=_NEVER_BELOW)
    yield _lowest(name, turns, kind="ours", at_least=_OURS_NEVER_BELOW)
    if is_photographs:
        yield _goal(
            f"{name}: p50 at {alone} / one offline image",
            ratios(
                turns,
                lambda turn: figure(turn, load=alone, contestant=NORMGATE, field="p50_ms"),
                lambda turn: turn.get("alone_ms"),
            ),
            at_most=_ALONE,
        )
    yield _goal(
        f"{name}: p99 / p50 at 70 % of capacity, open loop",
        spread(
            turn["open_loop"]["p99_ms"] / turn["open_loop"]["p50_ms"]
            for turn in turns
            if turn.get("open_loop")
        ),
        at_most=_TAIL,
    )
    yield _goal(
        f"{name}: full answer / same server, classifier only, {full}",
        ratios(
            turns,
            lambda turn: _ours(turn, full),
            lambda turn: figure(turn, load=full, contestant=UNSCORED.name),
        ),
        at_least=_SCORE,
    )


def _ours(turn: Turn, load: str) -> float | None:
    return figure(turn, load=load, contestant=NORMGATE)


def _against(turns: Sequence[Turn], *, load: str, kind: str) -> Spread | None:
    return ratios(
        turns,
        lambda turn: _ours(turn, load),
        lambda turn: best(turn, load=load, kind=kind),
    )


def _lowest(name: str, turns: Sequence[Turn], *, kind: str, at_least: float) -> Goal | None:
    """The load under which the best peer of a kind comes closest."""
    found = {load: _against(turns, load=load, kind=kind) for load in loads(turns, kind=kind)}
    measured = {load: value for load, value in found.items() if value is not None}
    if not measured:
        return None
    load = min(measured, key=lambda load: measured[load].median)
    how = "as documented" if kind == "documented" else "with our decoder and detector"
    return _goal(
        f"{name}: throughput / best peer {how}, lowest of all loads: {load}",
        measured[load],
        at_least=at_least,
    )


def _goal(
    name: str,
    value: Spread | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Goal | None:
    if value is None:
        return None
    if at_least is not None:
        return Goal(name, value, "at least", at_least)
    assert at_most is not None
    return Goal(name, value, "at most", at_most)
