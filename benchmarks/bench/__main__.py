"""The benchmark: ``python -m benchmarks.bench``, or ``make bench``.

Servers run as real processes on all cores of this machine, and so does the load generator: what it
takes is missing to every server alike. Results go to ``build/bench`` as JSON; the table of goals
reads what lies there, so that the parts may be measured one by one::

    python -m benchmarks.bench --part cases --case cifar
    python -m benchmarks.bench --part cases --case resnet50 --turns 2
    python -m benchmarks.bench --part cases --case resnet50 --turns 3 --append
    python -m benchmarks.bench --part table
"""

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.bench import early_exit, startup, table, wrk
from benchmarks.bench.cases import NAMES, OUTPUT, make_case
from benchmarks.bench.contestants import CORES
from benchmarks.bench.goals import case_goals
from benchmarks.bench.turns import Options, measure_case
from benchmarks.peers import environments
from benchmarks.server import ROOT

PARTS: Final = ("cases", "gate", "startup", "engines", "calibrate", "soak", "table")
_OUTSIDE: Final = {"engines": "engines", "calibrate": "calibrate_speed", "soak": "soak"}
_BY_DEFAULT: Final = tuple(part for part in PARTS if part != "soak")
"""An hour's soak is asked for by name, or by ``make soak``."""
_TURNS: Final = 5


def main() -> int:
    """Measure what is asked for, then print the goals; 1 where something cannot be measured."""
    arguments = _parse()
    # Otherwise its servers would outlive it, and those that rest for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    console = Console(width=160)
    if arguments.device != "cpu" and not _has_cuda():
        print(f"no CUDA device here: nothing is measured on {arguments.device}")
        return 0
    problem = _problem(arguments)
    if problem:
        print(f"benchmark: {problem}", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], None]] = {
        "cases": lambda: _cases(arguments, console),
        "gate": lambda: _gate(arguments, console),
        "startup": lambda: _startup(arguments, console),
        "table": lambda: _table(arguments.output, console),
    }
    for part in arguments.part or _BY_DEFAULT:
        parts.get(part, lambda part=part: _outside(part, arguments, console))()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all but soak")
    parser.add_argument("--case", action="append", choices=NAMES, help="all by default")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="contestants whose name holds NAME: normgate, limit, mosec, 'documented', 'our' ...",
    )
    parser.add_argument("--turns", type=int, help=f"of every measurement; default {_TURNS}")
    parser.add_argument("--seconds", type=float, help="of a measurement; default: the case's")
    parser.add_argument("--append", action="store_true", help="add turns to those of the last run")
    parser.add_argument("--quick", action="store_true", help="one turn of 1 s, two loads")
    parser.add_argument("--device", default="cpu", help="of the cases and the gate, such as cuda:0")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="of the JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs instead of the data set")
    return parser.parse_args()


def _has_cuda() -> bool:
    # Not at the top: importing torch takes longer than a quick run.
    import torch

    return torch.cuda.is_available()


def _problem(arguments: argparse.Namespace) -> str | None:
    if not wrk.is_installed():
        return "wrk is not installed; on Debian: apt install wrk"
    missing = [name for name in environments.NAMES if not environments.is_made(name)]
    wanted = [name for name in missing if not arguments.only or name in arguments.only]
    if wanted and "cases" in (arguments.part or _BY_DEFAULT):
        return f"no environment for {', '.join(wanted)}; make peers"
    return None


def _cases(arguments: argparse.Namespace, console: Console) -> None:
    options = Options(
        turns=arguments.turns or (1 if arguments.quick else _TURNS),
        seconds=arguments.seconds or (1 if arguments.quick else None),
        only=arguments.only,
        is_quick=arguments.quick,
    )
    for name in arguments.case or NAMES:
        case = replace(make_case(name, images=arguments.images), device=arguments.device)
        file = _on_device(name, arguments)
        before = _turns_before(file, arguments)
        # What was measured stays, whatever ends the next turn.
        for found in measure_case(case, options, report=_report):
            result = _write(file, found, arguments, before=before)
        table.print_case(result, console)
        table.print_goals(table.as_json(case_goals(result)), console)


def _gate(arguments: argparse.Namespace, console: Console) -> None:
    turns = arguments.turns or (1 if arguments.quick else _TURNS)
    result = early_exit.measure_early_exit(
        turns=turns,
        seconds=1 if arguments.quick else arguments.seconds,
        device=arguments.device,
        report=_report,
    )
    file = _on_device("gate", arguments)
    result = _write(file, result, arguments, before=_turns_before(file, arguments))
    table.print_goals(table.as_json(early_exit.early_exit_goals(result)), console)


def _startup(arguments: argparse.Namespace, console: Console) -> None:
    turns = arguments.turns or (1 if arguments.quick else _TURNS)
    result = startup.measure_startup(turns=turns, report=_report)
    result = _write("startup", result, arguments, before=_turns_before("startup", arguments))
    table.print_goals(table.as_json(startup.startup_goals(result)), console)


def _outside(part: str, arguments: argparse.Namespace, console: Console) -> None:
    """Run a benchmark that writes its own goals to ``build/bench``."""
    module = _OUTSIDE[part]
    if not (ROOT / "benchmarks" / f"{module}.py").is_file():
        console.print(f"{part}: there is no benchmarks/{module}.py")
        return
    quick = ["--quick"] if arguments.quick else []
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *quick], cwd=ROOT)
    if done.returncode:
        console.print(f"[red]{part} failed with {done.returncode}[/red]")


def _on_device(name: str, arguments: argparse.Namespace) -> str:
    """The name of a result: the table of goals is for the CPU."""
    device: str = arguments.device
    return name if device == "cpu" else f"{name}-{device.replace(':', '')}"


def _table(folder: Path, console: Console) -> None:
    goals: list[dict[str, Any]] = []
    missing = []
    readers: dict[str, Callable[[dict[str, Any]], Any]] = dict.fromkeys(NAMES, case_goals)
    readers |= {"gate": early_exit.early_exit_goals, "startup": startup.startup_goals}
    for name, read in readers.items():
        file = folder / f"{name}.json"
        if file.is_file():
            goals += table.as_json(read(json.loads(file.read_text(encoding="utf-8"))))
        else:
            missing.append(name)
    others, not_there = table.outside_goals(folder)
    table.print_goals(goals + others, console)
    if missing + not_there:
        console.print(f"not measured: {', '.join(missing + not_there)}")
    written = json.dumps({"goals": goals + others}, indent=2)
    (folder / "goals.json").write_text(written + "\n", encoding="utf-8")


def _turns_before(name: str, arguments: argparse.Namespace) -> list[Any]:
    """Those of the last run, where its own are to follow them."""
    file = arguments.output / f"{name}.json"
    if not (arguments.append and file.is_file()):
        return []
    turns: list[Any] = json.loads(file.read_text(encoding="utf-8"))["turns"]
    return turns


def _write(
    name: str, result: dict[str, Any], arguments: argparse.Namespace, *, before: list[Any]
) -> dict[str, Any]:
    """The result as it is written, after the turns from before."""
    file = arguments.output / f"{name}.json"
    result = result | {"turns": [*before, *result["turns"]]}
    machine = {"processor": _processor(), "cores": len(CORES)}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    result = result | {"machine": machine, "peers": _versions(), "commit": _commit(), "ended": when}
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _processor() -> str:
    """Its name as Linux has it, or else its kind."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
            return found[1]
    return platform.machine()


def _commit() -> str | None:
    """What is checked out, with a mark where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    with suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def _versions() -> dict[str, str]:
    return {name: environments.versions(name)[name] for name in environments.NAMES}


def _report(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
