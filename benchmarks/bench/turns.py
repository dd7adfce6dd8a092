"""One case measured in turns: A B C, A B C ..., so that all share what the machine goes through."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.bench.agreement import IMAGES, compare
from benchmarks.bench.bodies import write_bodies
from benchmarks.bench.cases import ALONE, FULL, MANY, OUTPUT, Case, Load
from benchmarks.bench.contestants import (
    CORES,
    UNSCORED,
    Contestant,
    Running,
    normgate,
    peers,
    running,
)
from benchmarks.bench.figures import Turn, figure
from benchmarks.bench.goals import NORMGATE
from benchmarks.bench.ideal_queue import tail
from benchmarks.bench.limit import LimitProcess, limit
from benchmarks.bench.wrk import measure
from benchmarks.load import Answer, open_loop, percentile_ms, post

LIMIT: Final = "limit"
OPEN_LOOP_SHARE: Final = 0.7
_OPEN_LOOP_TIMES: Final = 5
"""How much longer the open loop runs than one measurement: a p99 needs answers."""
_QUICK_TIMES: Final = 2
_PLAN_SHARE: Final = 0.5
_MOST_TOGETHER: Final = 6
"""Servers of a network of photographs that are loaded at the same time."""


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Args:
        turns: of every contestant.
        seconds: of a measurement; the case's own where None.
        only: parts of the names of those that take part; all where empty.
        is_quick: the fewest loads, to see that everything works.
    """

    turns: int
    seconds: float | None = None
    only: Sequence[str] = ()
    is_quick: bool = False

    def wants(self, name: str) -> bool:
        """Whether a contestant takes part: one of that very name, or else any that holds it."""
        return (
            not self.only
            or name in self.only
            or any(part in name for part in self.only if part != NORMGATE)
        )


Report = Callable[[str], None]


def measure_case(case: Case, options: Options, *, report: Report) -> Iterator[dict[str, Any]]:
    """The turns of a case so far, ready for JSON, after each of them.

    Raises:
        RuntimeError: a server does not start, or does not answer as NormGate does.
    """
    chosen = [one for one in [normgate(), UNSCORED, *peers()] if options.wants(one.name)]
    images = [file.read_bytes() for file in case.images]
    seconds = options.seconds or case.seconds
    turns: list[Turn] = []
    agreements: dict[str, Any] = {}
    with ExitStack() as stack:
        offline = None
        if options.wants(LIMIT):
            report(f"{case.name}: the offline loop's plans")
            offline = stack.enter_context(limit(case))
        plans = {} if offline is None else offline.ask("plan", seconds=_PLAN_SHARE * seconds)
        ideal = tail(cores=len(CORES), load=OPEN_LOOP_SHARE) if case.device == "cpu" else None
        for company in companies(chosen, are_all=not case.is_photographs):
            measured = _company_turns(
                case, company, offline, options, images=images, first=len(turns), report=report
            )
            for turn, agreement in measured:
                turns.append(turn)
                agreements |= agreement
                yield {
                    "case": case.name,
                    "title": case.title,
                    "is_photographs": case.is_photographs,
                    "seconds": seconds,
                    "plans": plans,
                    "agreement": agreements,
                    "ideal_tail": ideal,
                    "turns": turns,
                }


def companies(chosen: Sequence[Contestant], *, are_all: bool) -> Sequence[Sequence[Contestant]]:
    """Those whose servers are loaded at the same time; NormGate is among all of them.

    Args:
        chosen: that take part.
        are_all: whether the memory holds all of them. The ten servers of a network of photographs
            filled 24 GB; half of them do not.
    """
    ourselves = [one for one in chosen if one.name == NORMGATE]
    documented = [one for one in chosen if one.kind == "documented"]
    others = [one for one in chosen if one not in ourselves + documented]
    if are_all or len(chosen) <= _MOST_TOGETHER:
        return [chosen]
    return [ourselves + documented, ourselves + others]


def _company_turns(
    case: Case,
    company: Sequence[Contestant],
    offline: LimitProcess | None,
    options: Options,
    *,
    images: Sequence[bytes],
    first: int,
    report: Report,
) -> Iterator[tuple[Turn, dict[str, Any]]]:
    with ExitStack() as stack:
        servers = []
        for contestant in company:
            report(f"{case.name}: {contestant.name} starts")
            server = stack.enter_context(running(contestant, case))
            servers.append(server)
            server.rest()
        agreement = _agreement(servers, images)
        for number in range(first, first + options.turns):
            turn = _turn(
                case, servers, offline, options, images=images, number=number, report=report
            )
            yield turn, agreement


def _agreement(servers: Sequence[Running], images: Sequence[bytes]) -> dict[str, Any]:
    """How each server's answers compare with NormGate's, one image and several a request."""
    checked = images[:IMAGES]
    many = images[:MANY]
    found: dict[str, Any] = {}
    expected = None
    for server in servers:
        with awake(server):
            alone = [answer for image in checked for answer in server.ask([image])]
            together = server.ask(many)
        if server.contestant.name == UNSCORED.name:
            continue
        expected = expected or alone
        try:
            found[server.contestant.name] = asdict(
                compare(alone, expected, kind=server.contestant.kind)
            )
            compare(together, expected[: len(many)], kind=server.contestant.kind)
        except (RuntimeError, KeyError) as error:
            raise RuntimeError(f"{server.contestant.name}: {error}") from error
    return found


def _turn(
    case: Case,
    servers: Sequence[Running],
    offline: LimitProcess | None,
    options: Options,
    *,
    images: Sequence[bytes],
    number: int,
    report: Report,
) -> Turn:
    seconds = options.seconds or case.seconds
    turn: Turn = {"measurements": []}
    if offline is not None:
        report(f"{case.name}, turn {number + 1}: offline")
        turn["limit"] = offline.ask("throughput", seconds=seconds)
        turn["alone_ms"] = offline.ask("alone", seconds=seconds)
    # Another one begins in each turn.
    start = number % max(1, len(servers))
    order = [*servers[start:], *servers[:start]]
    for load in case.loads:
        for server in order:
            if load not in loads_of(server.contestant, case, is_quick=options.is_quick):
                continue
            report(f"{case.name}, turn {number + 1}: {server.contestant.name}, {load}")
            turn["measurements"].append(_row(case, server, load, images, seconds=seconds))
    times = _QUICK_TIMES if options.is_quick else _OPEN_LOOP_TIMES
    turn["open_loop"] = _open_loop(turn, servers, images, seconds=times * seconds, seed=number)
    return turn


def loads_of(contestant: Contestant, case: Case, *, is_quick: bool) -> Sequence[Load]:
    """The loads that a contestant is measured under."""
    if contestant.name == UNSCORED.name:
        found: Sequence[Load] = (ALONE, FULL)
    else:
        found = case.our_loads if contestant.kind == "ours" else case.loads
    return [load for load in found if load in (ALONE, FULL)] if is_quick else found


def _row(
    case: Case, server: Running, load: Load, images: Sequence[bytes], *, seconds: float
) -> dict[str, Any]:
    contestant = server.contestant
    bodies, content_type = write_bodies(
        _body_folder(case), images, load=load, encoding=contestant.encoding
    )
    with awake(server):
        found = measure(server.url, bodies, content_type=content_type, load=load, seconds=seconds)
        resident = server.resident_bytes()
    return {
        "contestant": contestant.name,
        "kind": contestant.kind,
        "load": str(load),
        "resident_mib": round(resident / 2**20),
    } | asdict(found)


def _open_loop(
    turn: Turn,
    servers: Sequence[Running],
    images: Sequence[bytes],
    *,
    seconds: float,
    seed: int,
) -> dict[str, Any] | None:
    """Requests at 70 % of what this turn's NormGate could do."""
    capacity = figure(turn, load=str(FULL), contestant=NORMGATE)
    server = next((one for one in servers if one.contestant.name == NORMGATE), None)
    if not capacity or server is None:
        return None
    requests = [post(server.url, image) for image in images]
    rate = OPEN_LOOP_SHARE * capacity
    with awake(server):
        answers: list[Answer] = uvloop.run(
            open_loop(server.url, requests, rate=rate, seconds=seconds, seed=seed)
        )
    good = [answer for answer in answers if answer.status == 200]
    if not good:
        return None
    return {
        "offered_per_s": rate,
        "answers": len(answers),
        "failures": len(answers) - len(good),
        "p50_ms": percentile_ms(good, 50),
        "p99_ms": percentile_ms(good, 99),
    }


@contextmanager
def awake(server: Running) -> Iterator[None]:
    """The server runs inside the context, and rests after it."""
    server.wake()
    try:
        yield
    finally:
        server.rest()


def _body_folder(case: Case) -> Path:
    return OUTPUT / "bodies" / case.name
