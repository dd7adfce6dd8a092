"""What a server counts and the processor time it takes, between two looks."""

import urllib.request
from collections.abc import Iterator
from typing import Final

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

CPU: Final = "cpu"
LOOP: Final = "cpu of the event loop"


def fetch(url: str) -> bytes:
    """``/metrics`` of the server at a URL without a path."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return bytes(answer.read())


def samples(text: bytes) -> Iterator[Sample]:
    """Those in a server's ``/metrics``."""
    for family in text_string_to_metric_families(text.decode()):
        yield from family.samples


class Metrics:
    """Sums and counts of a server's ``/metrics`` and its processor time, since the last look.

    Args:
        url: of the server, without a path.
        pid: of its process.
    """

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._process = psutil.Process(pid)
        self._last = self._now()

    def since(self) -> dict[str, float]:
        """What each has grown by; a sample's name is followed by the values of its labels."""
        now = self._now()
        grown = {name: value - self._last.get(name, 0.0) for name, value in now.items()}
        self._last = now
        return grown

    def _now(self) -> dict[str, float]:
        found = {
            sample.name + "".join(sample.labels.values()): sample.value
            for sample in samples(fetch(self._url))
            if sample.name.endswith(("_sum", "_count"))
        }
        times = self._process.cpu_times()
        [loop] = [one for one in self._process.threads() if one.id == self._process.pid]
        return found | {
            CPU: times.user + times.system,
            LOOP: loop.user_time + loop.system_time,
        }
