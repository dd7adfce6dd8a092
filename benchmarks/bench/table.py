"""What was measured, as tables for a terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.bench.figures import Goal, Turn, failures, figure, loads, spread

OUTSIDE: Final = ("engines", "calibrate", "soak")
"""Parts that other benchmarks measure, and leave as ``{"goals": [...]}``."""


def print_case(result: Mapping[str, Any], console: Console) -> None:
    """Images a second and latency of every contestant under every load."""
    turns: Sequence[Turn] = result["turns"]
    contestants = list(
        dict.fromkeys(row["contestant"] for turn in turns for row in turn["measurements"])
    )
    kinds = ("normgate", "documented", "ours")
    columns = list(dict.fromkeys(load for kind in kinds for load in loads(turns, kind=kind)))
    for field, title in (("images_per_s", "images/s"), ("p50_ms", "p50, ms")):
        table = Table(title=f"{result['title']}: {title}, median (least to most)")
        table.add_column("server")
        for column in columns:
            table.add_column(column, justify="right")
        for contestant in contestants:
            cells = [_cell(turns, contestant, load, field) for load in columns]
            table.add_row(contestant, *cells)
        console.print(table)
    _print_offline(turns, console)
    if result.get("ideal_tail"):
        console.print(f"p99 / p50 of an ideal queue at that load: {result['ideal_tail']:.2f}")
    for contestant, statuses in failures(turns).items():
        told = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        console.print(f"[bold]{contestant}[/bold] failed: {told}")
    if turns and not failures(turns):
        console.print("no answer but 200")


def print_goals(goals: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Every goal, met or missed."""
    table = Table(title="Goals")
    for heading in ("figure", "measured", "goal", ""):
        table.add_column(heading)
    for goal in goals:
        measured = f"{goal['value']:.3g}"
        if "low" in goal:
            measured += f" ({goal['low']:.3g} to {goal['high']:.3g}, {goal['turns']} turns)"
        verdict = "[green]met[/green]" if goal["met"] else "[red]missed[/red]"
        table.add_row(goal["name"], measured, str(goal["goal"]), verdict)
    console.print(table)
    met = sum(bool(goal["met"]) for goal in goals)
    console.print(f"{met} of {len(goals)} goals met")


def outside_goals(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The goals that other benchmarks wrote, and the names of those that wrote none."""
    found: list[dict[str, Any]] = []
    missing = []
    for name in OUTSIDE:
        file = folder / f"{name}.json"
        if file.is_file():
            found += json.loads(file.read_text(encoding="utf-8"))["goals"]
        else:
            missing.append(name)
    return found, missing


def as_json(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """The goals as every part writes them."""
    return [goal.as_json() for goal in goals]


def _cell(turns: Sequence[Turn], contestant: str, load: str, field: str) -> str:
    values = [figure(turn, load=load, contestant=contestant, field=field) for turn in turns]
    found = spread(value for value in values if value is not None)
    if found is None:
        return ""
    return found.format(digits=0 if found.median >= 20 else 1)


def _print_offline(turns: Sequence[Turn], console: Console) -> None:
    limit = spread(turn["limit"] for turn in turns if "limit" in turn)
    alone = spread(turn["alone_ms"] for turn in turns if "alone_ms" in turn)
    if limit is not None and alone is not None:
        console.print(f"limit, offline: {limit.format(0)} images/s; one image {alone.format(1)} ms")
    tails = [turn["open_loop"] for turn in turns if turn.get("open_loop")]
    p50, p99 = (spread(tail[name] for tail in tails) for name in ("p50_ms", "p99_ms"))
    if p50 is not None and p99 is not None:
        failed = sum(tail["failures"] for tail in tails)
        console.print(
            f"open loop at 70 % of capacity: p50 {p50.format(1)} ms, p99 {p99.format(1)} ms, "
            f"{failed} failed"
        )
