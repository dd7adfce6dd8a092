"""The HorizontalPodAutoscaler that KEDA makes of ``deploy/kubernetes``, as rules on numbers.

Each trigger asks for a number of replicas and the largest wins. Up: at most ``up_share`` of the
replicas of a minute ago are added, at once. Down: to the largest wish of the last five minutes, one
replica a minute. A test holds the defaults against the shipped manifest.
"""

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What the manifest says, and the autoscaler's own tolerance."""

    every_s: float = 15.0
    fewest: int = 2
    most: int = 10
    wait_s: float = 0.25
    busy_devices: float = 0.7
    cores: float = 0.7
    up_share: float = 1.0
    up_period_s: float = 60.0
    down_pods: int = 1
    down_period_s: float = 60.0
    down_window_s: float = 300.0
    tolerance: float = 0.1


@dataclass(frozen=True)
class Load:
    """What the triggers see of the fleet.

    Args:
        wait_s: that one image in twenty waits longer than.
        busy_devices: that compute, of all replicas together.
        cores: in use, of all replicas together, in those of one replica.
        ready: replicas.
    """

    wait_s: float
    busy_devices: float
    cores: float
    ready: int


class Autoscaler:
    """The number of replicas wanted, from look to look."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._wishes: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def look(self, now_s: float, load: Load, *, replicas: int) -> int:
        """How many there should be from now on, where ``replicas`` are or are starting."""
        policy = self._policy
        wish = min(max(self._wish(load, replicas), policy.fewest), policy.most)
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - policy.down_window_s:
            self._wishes.popleft()
        if wish > replicas:
            wish = max(replicas, min(wish, self._most_up(now_s, replicas)))
        else:
            steady = max(value for _, value in self._wishes)
            wish = max(min(steady, replicas), min(replicas, self._least_down(now_s, replicas)))
        if wish != replicas:
            self._changes.append((now_s, wish - replicas))
        return wish

    def _wish(self, load: Load, replicas: int) -> int:
        policy = self._policy
        return max(
            # A value has no sum to divide: replicas that are ready, times how far it is off.
            self._unless_near(load.wait_s / policy.wait_s, load.ready, replicas),
            self._unless_near(
                load.busy_devices / (policy.busy_devices * replicas), replicas, replicas
            ),
            # Those that start count as idle.
            self._unless_near(load.cores / (policy.cores * replicas), replicas, replicas),
        )

    def _unless_near(self, ratio: float, count: int, replicas: int) -> int:
        if abs(ratio - 1) <= self._policy.tolerance:
            return replicas
        return math.ceil(ratio * count - 1e-9)

    def _most_up(self, now_s: float, replicas: int) -> int:
        added = self._changed(now_s, self._policy.up_period_s, is_up=True)
        return math.ceil((replicas - added) * (1 + self._policy.up_share))

    def _least_down(self, now_s: float, replicas: int) -> int:
        removed = self._changed(now_s, self._policy.down_period_s, is_up=False)
        return replicas + removed - self._policy.down_pods

    def _changed(self, now_s: float, period_s: float, *, is_up: bool) -> int:
        recent = [change for when, change in self._changes if when > now_s - period_s]
        return sum(abs(change) for change in recent if (change > 0) == is_up)
