"""The benchmark's arithmetic, its bodies, and a short run of the real thing."""

import base64
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import brentq

from benchmarks import soak, stages
from benchmarks.bench import (
    agreement,
    bodies,
    contestants,
    figures,
    goals,
    ideal_queue,
    table,
    turns,
    wrk,
)
from benchmarks.bench.cases import Load
from benchmarks.peers import framing
from tests.conftest import draw_images
from tests.test_proxy_server import program

ROOT = Path(__file__).resolve().parents[2]


def row(contestant: str, load: str, images_per_s: float, *, kind: str = "normgate") -> Any:
    """One measurement, as a case's JSON has it."""
    latencies = {"p50_ms": 1000 / images_per_s, "p99_ms": 2000 / images_per_s}
    named = {"contestant": contestant, "kind": kind, "load": load, "images_per_s": images_per_s}
    return named | latencies | {"answers": 9, "failures": {}}


def turn(*rows: Any, **others: Any) -> figures.Turn:
    """One turn of a case."""
    return {"measurements": list(rows), **others}


def result(turns: Sequence[figures.Turn], *, name: str = "mobilenet") -> dict[str, Any]:
    """A case's result."""
    is_photographs = name != "cifar"
    return {"case": name, "title": name, "is_photographs": is_photographs, "turns": turns}


def test_spread() -> None:
    """The median, the least and the largest; None of nothing."""
    assert figures.spread([3.0, 1.0, 2.0]) == figures.Spread(2.0, 1.0, 3.0, 3)
    assert figures.spread([]) is None


def test_ratios_are_taken_within_a_turn() -> None:
    """A machine that is slower in one turn is so for both sides: the ratio does not move."""
    turns = [
        turn(
            row("normgate", "c=32", speed * 30), row("mosec", "c=32", speed * 10, kind="documented")
        )
        for speed in (1.0, 7.0, 0.1)
    ]

    found = figures.ratios(
        turns,
        lambda one: figures.figure(one, load="c=32", contestant="normgate"),
        lambda one: figures.best(one, load="c=32", kind="documented"),
    )

    assert found is not None
    assert [found.low, found.high] == pytest.approx([3, 3])
    assert found.count == 3


def test_ratios_leave_out_what_was_not_measured() -> None:
    """A turn without one side tells nothing, nor does one where nothing was answered."""
    turns = [turn(limit=0.0), turn(), turn(limit=4.0)]

    found = figures.ratios(turns, lambda one: 2.0, lambda one: one.get("limit"))

    assert found == figures.Spread(0.5, 0.5, 0.5, 1)


def test_best_peer_is_chosen_in_each_turn() -> None:
    """The best of a kind is the fastest one of that turn, whichever it is."""
    one = turn(
        row("a", "c=8", 10, kind="documented"),
        row("b", "c=8", 20, kind="documented"),
        row("c", "c=8", 99, kind="ours"),
    )

    assert figures.best(one, load="c=8", kind="documented") == 20
    assert figures.best(one, load="c=1", kind="documented") is None


def test_failures_add_up() -> None:
    """Statuses other than those expected are counted over the turns, by contestant."""
    failed = row("mosec", "c=8", 1) | {"failures": {"429": 2}}

    assert figures.failures([turn(failed), turn(failed, row("a", "c=8", 1))]) == {
        "mosec": {"429": 4}
    }


@pytest.mark.parametrize(
    ("direction", "goal", "is_met"),
    [("at least", 2.0, True), ("at least", 2.1, False), ("at most", 2.0, True)],
)
def test_goal(direction: figures.Direction, goal: float, is_met: bool) -> None:
    """The median decides, and a goal that is just reached is met."""
    found = figures.Goal("speed", figures.Spread(2.0, 1.0, 9.0, 5), direction, goal)

    assert found.is_met is is_met
    assert found.as_json()["goal"] == f"{direction} {goal:g}"


def test_case_goals() -> None:
    """Goals are for the limit, the best peer, the offline image, the tail and the price."""
    one = turn(
        row("normgate", "c=1", 50),
        row("normgate", "c=32", 95),
        row("normgate, classifier only", "c=32", 95),
        row("mosec, as documented", "c=1", 40, kind="documented"),
        row("mosec, as documented", "c=32", 19, kind="documented"),
        limit=100.0,
        alone_ms=20.0,
        open_loop={"p50_ms": 10.0, "p99_ms": 35.0, "failures": 0},
    )

    found = {goal.name: goal for goal in goals.case_goals(result([one]))}

    assert [(round(goal.value.median, 3), goal.is_met) for goal in found.values()] == [
        (0.95, True),  # over HTTP against the limit
        (5.0, True),  # the best peer at c=32
        (1.25, True),  # the load where a peer comes closest: c=1
        (1.0, True),  # p50 at c=1 against one offline image
        (3.5, False),  # the tail
        (1.0, True),  # the price of the score
    ]
    assert any("lowest of all loads: c=1" in name for name in found)


def test_case_goals_of_little() -> None:
    """What was not measured has no goal, neither met nor missed."""
    assert goals.case_goals(result([turn(row("normgate", "c=32", 95))], name="cifar")) == []


def test_companies() -> None:
    """Where memory is short documented servers and ours are measured apart, beside NormGate."""
    chosen = [contestants.normgate(), contestants.UNSCORED, *contestants.peers()]

    [everybody] = turns.companies(chosen, are_all=True)
    documented, others = turns.companies(chosen, are_all=False)
    [alone] = turns.companies(chosen[:1], are_all=False)
    [few] = turns.companies([chosen[0], chosen[2], chosen[-1]], are_all=False)

    assert everybody == chosen
    assert documented[0] == others[0] == alone[0] == chosen[0]
    assert len(few) == 3
    assert {one.kind for one in documented[1:]} == {"documented"}
    assert len(documented) + len(others) == len(chosen) + 1
    assert not {one.name for one in documented[1:]} & {one.name for one in others}


def test_profile() -> None:
    """The rest is what the stages leave of the total."""
    stages_ms = {"read": 1.0, "decode": 2.0, "queue": 3.0, "forward": 4.0, "total": 12.5}

    found = stages.Profile("c=1", 80, 13, stages_ms, loop_ms=1, threads_ms=9, batch_size=1)

    assert found.rest_ms == 2.5


def test_table_of_goals_says_met_and_missed() -> None:
    """Each goal is called met or missed, and so many of so many are counted."""
    console = Console(width=120)
    rows = [
        {"name": "fast", "value": 1.0, "goal": "at least 0.9", "met": True},
        {"name": "small", "value": 9.0, "goal": "at most 3", "met": False},
    ]

    with console.capture() as captured:
        table.print_goals(rows, console)

    assert "met" in captured.get()
    assert "missed" in captured.get()
    assert "1 of 2 goals met" in captured.get()


def test_goals_of_other_benchmarks(tmp_path: Path) -> None:
    """Goals that other parts left as JSON are read; parts that left none are named."""
    goal = {"name": "engine", "value": 1.0, "goal": "at least 0.95", "met": True}
    (tmp_path / "engines.json").write_text(json.dumps({"goals": [goal]}))

    assert table.outside_goals(tmp_path) == ([goal], ["calibrate", "soak"])


def waits_at_most(services: float) -> float:
    """The probability of so long a wait at one core that is busy half of the time: Erlang's sum."""
    return 0.5 * sum(
        (0.5 * (k - services)) ** k / math.factorial(k) * math.exp(0.5 * (services - k))
        for k in range(math.floor(services) + 1)
    )


def test_tail_of_an_ideal_queue() -> None:
    """At a half load half of all wait not at all; two cores wait less, and at no load nobody."""
    p99 = 1 + brentq(lambda services: waits_at_most(services) - 0.99, 0, 20)

    assert ideal_queue.tail(cores=1, load=0.5) == pytest.approx(p99, rel=0.01)
    assert 1 < ideal_queue.tail(cores=2, load=0.5) < p99
    assert ideal_queue.tail(cores=2, load=1e-4) == pytest.approx(1)


@pytest.mark.parametrize("burst", [1, 8, 32])
def test_rate_of_bursts(burst: int) -> None:
    """Answers that come in bursts are counted as if they came evenly."""
    times = np.repeat(np.arange(1, 11) * burst / 100, burst)

    assert wrk.rate(times.tolist()) == pytest.approx(100, rel=0.02)


def test_rate_of_two_bursts() -> None:
    """A burst that follows another after a second is one burst a second."""
    burst = np.linspace(0, 0.01, 32)

    assert wrk.rate([*burst, *(1 + burst)]) == pytest.approx(32, rel=0.1)


def test_rate_of_nothing() -> None:
    """One answer, or several at one moment, give no rate."""
    assert wrk.rate([1.0]) == 0
    assert wrk.rate([1.0, 1.0]) == 0


def test_parse() -> None:
    """Failures are counted by status, and do not count as images."""
    lines = ["1.5 9.0", "3", *(f"{second}.0 200" for second in range(11)), "11.0 503"]

    found = wrk.parse("\n".join(lines), images=16)

    assert found.images_per_s == pytest.approx(16)
    assert (found.p50_ms, found.p99_ms, found.answers) == (1.5, 9.0, 12)
    assert found.failures == {503: 1, 0: 3}


def test_parse_without_answers() -> None:
    """A measurement too short for two answers is an error, no zero."""
    with pytest.raises(RuntimeError, match="1 answers in all"):
        wrk.parse("1 1\n0\n0.0 200", images=1)


def test_frames() -> None:
    """What is packed in frames is unpacked again; no image may hold the next one's length."""
    images = [b"", b"\x00\x00\x00\x01", b"abc"]

    assert framing.unpack(framing.pack(images)) == images


@pytest.mark.parametrize("encoding", ["json", "v2"])
def test_bodies_in_json(encoding: bodies.Encoding) -> None:
    """Images travel as base64, all of them, in order."""
    body = json.loads(bodies.encode([b"one", b"two"], encoding).data)

    texts = body["images"] if encoding == "json" else body["inputs"][0]["data"]

    assert [base64.b64decode(text) for text in texts] == [b"one", b"two"]


def test_written_bodies_rotate(tmp_path: Path) -> None:
    """Requests of several images begin with another image each."""
    images = [bytes([number]) for number in range(5)]

    folder, content_type = bodies.write_bodies(tmp_path, images, load=Load(1, 2), encoding="frames")

    assert content_type == "application/octet-stream"
    found = [framing.unpack((folder / str(number)).read_bytes()) for number in range(5)]
    assert found == [[images[n], images[(n + 1) % 5]] for n in range(5)]


def answer(score: float, **changed: Any) -> dict[str, Any]:
    """A server's answer about one image."""
    verdict = "ood" if score < 1 else "id"
    numbers = {"feature_norm": score, "score": score, "threshold": 1.0, "p_value": 0.5}
    predictions = [{"label": "cat", "index": 3, "probability": 0.9}]
    return {"verdict": verdict, **numbers, "predictions": predictions} | changed


def test_agreement() -> None:
    """The largest difference of a score is told, and the share of equal labels."""
    found = agreement.compare(
        [answer(2.1), answer(4.0)], [answer(2.0), answer(4.0)], kind="documented"
    )

    assert found.largest_difference == pytest.approx(0.05)
    assert found.labels == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (answer(3.0), "differs by 50.00%"),
        (answer(2.0, verdict="ood"), "the verdict is ood for score 2.0"),
        ({"predictions": [{}]}, "the answer has no"),
    ],
)
def test_disagreement(wrong: dict[str, Any], message: str) -> None:
    """A server that scores otherwise, or leaves something out, is not measured."""
    with pytest.raises(RuntimeError, match=message):
        agreement.compare([wrong], [answer(2.0)], kind="ours")


def samples(mib_per_hour: float, *, seconds: float) -> soak.Trend:
    """The trend of memory that grows evenly from 500 MiB, under a little noise."""
    times = np.linspace(0, seconds, 400)
    noise = np.random.default_rng(0).normal(0, 0.1, times.size)
    return soak.trend(times.tolist(), (500 + mib_per_hour * times / 3600 + noise).tolist())


def test_memory_that_stays_is_flat() -> None:
    """No growth in an hour is flat, and the interval holds zero."""
    found = samples(0.0, seconds=3600)

    assert found.low < 0 < found.high
    assert found.is_flat


def test_memory_that_grows_is_not_flat() -> None:
    """Five MiB an hour are 120 a day: more than a tenth of 500."""
    found = samples(5.0, seconds=3600)

    assert found.low < 5 < found.high
    assert not found.is_flat


def test_short_run_is_judged_by_what_it_saw() -> None:
    """Half a minute says nothing of a day: a tenth more within it is too much, less is not."""
    assert samples(500.0, seconds=30).is_flat
    assert not samples(20_000.0, seconds=30).is_flat


@pytest.mark.alone
@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """The benchmark starts a server, loads it with wrk, and writes what it measured."""
    program("wrk")
    draw_images(tmp_path, range(20))
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--part", "cases"]
    command += ["--case", "cifar", "--only", "normgate", "--images", str(tmp_path)]
    command += ["--output", str(tmp_path / "out")]

    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    [one] = json.loads((tmp_path / "out" / "cifar.json").read_text())["turns"]
    assert [row["load"] for row in one["measurements"]] == ["c=1", "c=32"]
    assert all(row["images_per_s"] > 0 and not row["failures"] for row in one["measurements"])


@pytest.mark.alone
@pytest.mark.slow
def test_short_soak(tmp_path: Path) -> None:
    """Under twenty seconds of full load every answer is 200, and memory grows by a quarter at most.

    An hour tells whether it is flat; this finds a leak of every request.
    """
    draw_images(tmp_path, range(20))
    command = [sys.executable, "-m", "benchmarks.soak", "--quick", "--images", str(tmp_path)]

    subprocess.run(
        [*command, "--output", str(tmp_path / "soak.json")],
        cwd=ROOT,
        check=False,  # it fails where a run so short is not flat
        capture_output=True,
        timeout=300,
    )

    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["answers"] > 0
    assert found["failures"] == 0
    assert found["trend"]["growth_mib"] < 0.25 * found["trend"]["median_mib"]
