"""How often each stretch was begun: Ray does not tell whose work it was that killed its workers.

Noted in the cluster's own key-value store, by the workers, and read when a job has failed. They
are for a message alone: where the store does not answer, the work goes on without.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

_NAMESPACE: Final = b"normgate_attempts"


@dataclass(frozen=True)
class Attempts:
    """The notes of one job.

    Args:
        job: tells them from all others' in the cluster.
    """

    job: str

    def begin(self, stretch: range) -> None:
        """Note that a stretch is under way, once more."""
        key = self._key(stretch)
        with suppress(RayError):
            before = _internal_kv_get(key, namespace=_NAMESPACE) or b"0"
            _internal_kv_put(key, str(int(before) + 1), namespace=_NAMESPACE)

    def end(self, stretch: range) -> None:
        """Strike a stretch out: no worker died of it."""
        with suppress(RayError):
            _internal_kv_del(self._key(stretch), namespace=_NAMESPACE)

    def most(self) -> tuple[range, int] | None:
        """The stretch that was begun most often and not ended, and how often; None without one."""
        counts: dict[bytes, int] = {}
        with suppress(RayError):
            for key in _internal_kv_list(f"{self.job}/", namespace=_NAMESPACE):
                counts[key] = int(_internal_kv_get(key, namespace=_NAMESPACE) or 0)
        if not counts:
            return None
        key = max(counts, key=lambda key: counts[key])
        start, stop = map(int, key.split(b"/")[1:])
        return range(start, stop), counts[key]

    def forget(self) -> None:
        """Leave no note."""
        with suppress(RayError):
            _internal_kv_del(f"{self.job}/", del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, stretch: range) -> str:
        return f"{self.job}/{stretch.start}/{stretch.stop}"
