"""How long Envoy would wait for the gate: ``python -m benchmarks.gate``.

Starts the server as an operator does and asks it as Envoy does, over kept connections, with the
32 x 32 JPEGs of ``docs/examples``: one request at a time, then eight at once. Server and clients
share this machine's cores.
"""

import argparse
import http.client
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.server import ROOT, serving

ENVOY_TIMEOUT_MS: Final = 200
"""Of ``ext_authz``, where its configuration names none."""
_WARM_UP: Final = 20
_ANSWERS: Final = (200, 403)


def ask(address: str, images: Sequence[bytes], *, requests: int) -> list[float]:
    """Milliseconds of each of ``requests`` requests, one after the other on one connection."""
    connection = http.client.HTTPConnection(address, timeout=60)
    found = []
    for image in itertools.islice(itertools.cycle(images), requests):
        started = time.perf_counter()
        connection.request("POST", "/v1/gate/classify", image, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        response.read()
        found.append(1000 * (time.perf_counter() - started))
        assert response.status in _ANSWERS, f"the gate answered {response.status}"
    connection.close()
    return found


def measure(
    address: str, images: Sequence[bytes], *, requests: int, concurrency: int
) -> tuple[list[float], float]:
    """Milliseconds of every request, and requests a second, of so many connections at once."""
    share = requests // concurrency
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        asked = [pool.submit(ask, address, images, requests=share) for _ in range(concurrency)]
        times_ms = [ms for one in asked for ms in one.result()]
    return times_ms, len(times_ms) / (time.perf_counter() - started)


def main() -> None:
    """Print the percentiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="at each concurrency")
    arguments = parser.parse_args()
    images = [path.read_bytes() for path in sorted((ROOT / "docs" / "examples").glob("*.jpg"))]
    table = Table(title=f"POST /v1/gate, 32 px JPEG, against Envoy's {ENVOY_TIMEOUT_MS} ms")
    for heading in ("at once", "requests", "p50 ms", "p99 ms", "max ms", "p99 of limit", "per s"):
        table.add_column(heading, justify="right")
    with serving() as server:
        address = server.url.removeprefix("http://")
        ask(address, images, requests=_WARM_UP)
        for concurrency in (1, 8):
            times_ms, rate = measure(
                address, images, requests=arguments.requests, concurrency=concurrency
            )
            p50, p99, most = np.percentile(times_ms, (50, 99, 100))
            table.add_row(
                str(concurrency),
                str(len(times_ms)),
                *(f"{value:.1f}" for value in (p50, p99, most)),
                f"{p99 / ENVOY_TIMEOUT_MS:.0%}",
                f"{rate:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
