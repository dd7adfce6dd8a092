"""The gate stops at the selected block: the time it saves against the FLOPs it saves."""

from collections.abc import Callable
from typing import Any, Final

from benchmarks.bench.bodies import write_bodies
from benchmarks.bench.cases import ALONE, FULL, OUTPUT, Case, make_case, photographs_store
from benchmarks.bench.contestants import normgate, running
from benchmarks.bench.figures import Goal, Turn, figure, spread
from benchmarks.bench.turns import Report
from benchmarks.bench.wrk import measure

NETWORK: Final = "resnet50"
BLOCK: Final = "layer3.0"
"""About half of ResNet50's FLOPs lie before its end."""
_GOAL: Final = 0.90
_STATUSES: Final = {"full": (200,), "gate": (200, 403)}
_PATHS: Final = {"full": "/v1/score", "gate": "/v1/gate"}


def measure_early_exit(
    *, turns: int, seconds: float | None, device: str = "cpu", report: Report
) -> dict[str, Any]:
    """Gate and full answer of one server, in turns, and the FLOPs of both."""
    photographs = make_case(NETWORK)
    store = photographs_store(NETWORK, blocks=BLOCK)
    case = Case(**vars(photographs) | {"store": store, "name": "early-exit", "device": device})
    images = [file.read_bytes() for file in case.images]
    found: list[Turn] = []
    with running(normgate(), case) as server:
        base = server.url.removesuffix(server.contestant.path)
        for number in range(turns):
            report(f"early exit, turn {number + 1} of {turns}")
            turn: Turn = {"measurements": []}
            for load in (ALONE, FULL):
                bodies, content_type = write_bodies(
                    OUTPUT / "bodies" / case.name, images, load=load, encoding="raw"
                )
                for name, path in _PATHS.items():
                    measured = measure(
                        base + path,
                        bodies,
                        content_type=content_type,
                        load=load,
                        seconds=seconds or case.seconds,
                        expected=_STATUSES[name],
                    )
                    turn["measurements"].append(
                        {"contestant": name, "kind": "normgate", "load": str(load)} | vars(measured)
                    )
            found.append(turn)
    return {"block": BLOCK, "saved_flops": saved_flops(case), "turns": found}


def early_exit_goals(result: dict[str, Any]) -> list[Goal]:
    """The share of the time that the gate saves, of the share of FLOPs that it saves.

    Above one, it saves more time than FLOPs.
    """
    saved = []
    for turn in result["turns"]:
        full = figure(turn, load=str(FULL), contestant="full")
        gate = figure(turn, load=str(FULL), contestant="gate")
        if full and gate:
            saved.append((1 - full / gate) / result["saved_flops"])
    value = spread(saved)
    name = f"gate, {NETWORK} to {result['block']}: time saved / FLOPs saved, {FULL}"
    return [] if value is None else [Goal(name, value, "at least", _GOAL)]


def saved_flops(case: Case) -> float:
    """The share of a forward pass's FLOPs that lies behind the selected block."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from app.core.blocks import BlockNorms
    from app.store import Store

    loaded = Store(case.store).load(case.model)
    side = loaded.bundle.preprocessing.crop
    inputs = torch.zeros(1, 3, side, side)
    norms = BlockNorms(loaded.detector().network, [loaded.bundle.norm_ratios.selected])

    def flops(run: Callable[[torch.Tensor], object]) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            run(inputs)
        return int(counter.get_total_flops())

    return 1 - flops(norms.run_to_last_block) / flops(norms.run)
