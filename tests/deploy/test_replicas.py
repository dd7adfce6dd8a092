"""Three real servers behind a real nginx, seen by a real Prometheus and restarted under load."""

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.test_prometheus import DASHBOARD, MODEL, TOKEN, Prometheus, scraping
from tests.test_lifecycle import Load, until
from tests.test_proxy_server import free_port, program, replaced, running
from tests.test_server import ROOT, START_S, STORE, Server, serving
from tests.versions import add_version, move_threshold

pytestmark = pytest.mark.slow

REPLICAS: Final = 3
CLIENTS: Final = 2
EXAMPLES: Final = ROOT / "docs" / "examples"
IN_DISTRIBUTION: Final = ("ship", "automobile", "truck")
NOISE: Final = (EXAMPLES / "noise.jpg").read_bytes()
VARIABLES: Final = {
    "$__rate_interval": "1m",
    "$window": "1m",
    "$job": ".*",
    "$model": ".*",
    "$version": ".*",
}
MADE_OF_PARTS: Final = {
    "Ready instances": "sum",
    "Images per second": "sum",
    "OOD share": "ratio",
    "Versions with a drift alarm": "max",
    "Got no verdict": "ratio",
    "95th percentile of time": "quantile",
    "OOD rate, with its 95 % interval, rate": "ratio",
    "OOD rate, with its 95 % interval, lower": "wilson",
    "OOD rate, with its 95 % interval, upper": "wilson",
    "OOD rate, with its 95 % interval, alpha": "max",
    "Scores over their threshold": "sum",
    "p-values against uniform ones": "ratio",
    "Evidence against exchangeability": "max",
    "Distance to the calibration scores": "max",
    "Drift alarm": "max",
    "Drift alarm, {{instance}}": "each",
    "OOD rate of single instances": "each",
    "Shadow against active: OOD rate": "ratio",
    "Shadow against active: disagreement": "between",
    "Shadow against active: disagreement, dropped per second": "sum",
    "Loaded versions": "sum",
    "Time to load a version": "max",
    "Images per second, by verdict": "sum",
    "Time of a request": "quantile",
    "95th percentile, by stage": "quantile",
    "Images in a forward pass, mean": "between",
    "Images in a forward pass, 95 %": "quantile",
    "Queue": "sum",
    "Waiting time": "quantile",
    "Refusals per second, by reason": "sum",
    "Burn of the verdict budget": "ratio",
    "Share of time that devices compute": "each",
    "Processor": "each",
    "Memory": "each",
    "Open files": "each",
    "Images kept for review": "sum",
    "Labels given": "sum",
}
"""How a panel's value, or that of one of its queries, is made of the same of single instances."""

IMAGES: Final = (
    'sum by (model, version) (increase(normgate_images_total{instance=~"$instance"}[1m]))'
)
OOD: Final = IMAGES.replace("{instance", '{verdict="ood", instance')

Labels = frozenset[tuple[str, str]]
Values = Mapping[Labels, float]


@contextmanager
def balanced(ports: Sequence[int], folder: Path) -> Iterator[str]:
    """The URL of nginx with the shipped configuration for replicas, here on these ports."""
    port = free_port()
    changes = [
        ("/tmp/normgate-replicas-nginx.pid", str(folder / "pid")),
        ("listen 8080;", f"listen 127.0.0.1:{port};"),
        *(
            (f"server 127.0.0.1:800{i}", f"server 127.0.0.1:{one}")
            for i, one in enumerate(ports, 1)
        ),
    ]
    configuration = folder / "nginx.conf"
    configuration.write_text(replaced(ROOT / "deploy/nginx/replicas.conf", changes))
    command = [program("nginx"), "-p", str(folder), "-c", str(configuration), "-e", "stderr"]
    with running(command, until="start worker process"):
        yield f"http://127.0.0.1:{port}"


class Fleet:
    """Three servers on ports of their own, with nginx before them."""

    def __init__(self, store: Path, folder: Path, stack: ExitStack) -> None:
        self._store = store
        self._each = [stack.enter_context(ExitStack()) for _ in range(REPLICAS)]
        self.ports = [free_port() for _ in range(REPLICAS)]
        with ThreadPoolExecutor(REPLICAS) as pool:
            self.servers = list(pool.map(self._start, range(REPLICAS)))
        self.url = stack.enter_context(balanced(self.ports, folder))

    def restart(self, number: int) -> None:
        """Ask one to end, wait until it has, and start it again on its port."""
        self.servers[number].terminate()
        assert self.servers[number].process.wait(START_S) == 0
        self._each[number].close()
        self.servers[number] = self._start(number)

    def _start(self, number: int) -> Server:
        flags = ["--port", str(self.ports[number]), "--shutdown-grace-s", "1"]
        flags += ["--model-store", str(self._store), "--admin-token", TOKEN]
        flags += ["--compute-threads", "1"]
        return self._each[number].enter_context(serving(flags))

    def instances(self) -> Sequence[str]:
        """What Prometheus calls them."""
        return [f"127.0.0.1:{port}" for port in self.ports]


class Watched:
    """A Prometheus asked about one moment at which the traffic has ended."""

    def __init__(self, prometheus: Prometheus, fleet: Fleet, at: float) -> None:
        self._prometheus = prometheus
        self._at = at
        self.instances = fleet.instances()

    def ask(self, expression: str, *, instance: str = ".*") -> Values:
        """The values of an expression over all instances, or of one."""
        for name, value in (VARIABLES | {"$instance": instance}).items():
            expression = expression.replace(name, value)
        data = self._prometheus.get("query", {"query": expression, "time": self._at})
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in data["result"]}

    def of_each(self, expression: str) -> Sequence[Values]:
        """The values of an expression over each single instance."""
        return [self.ask(expression, instance=one) for one in self.instances]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three servers, each with a shadow that finds more images OOD."""
    store = tmp_path_factory.mktemp("store")
    shutil.copytree(STORE / MODEL, store / MODEL)
    with ExitStack() as stack:
        made = Fleet(store, tmp_path_factory.mktemp("nginx"), stack)
        move_threshold(add_version(store / MODEL, 2), rank=4_000)
        for server in made.servers:
            url = f"{server.url}/v1/models/{MODEL}/versions/2/shadow?share=1"
            answer = httpx.post(url, headers={"X-API-Key": TOKEN}, timeout=START_S)
            assert answer.status_code == 200, answer.text
        # It is loaded; a server that starts again is to begin with version 1.
        shutil.rmtree(store / MODEL / "2")
        yield made


@pytest.fixture(scope="module")
def watched(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prometheus, once it has seen traffic that is not the same on each instance."""
    with scraping(fleet.instances(), tmp_path_factory.mktemp("prometheus")) as prometheus:
        # Counters have to be seen before they rise.
        before = "count(count_over_time(normgate_ready[1m]) > 1) == 3"
        until(lambda: bool(prometheus.now(before)))
        _send(fleet)
        images = sum(sum(counters(server).values()) for server in fleet.servers)
        seen = f"sum(normgate_images_total) == {images}"
        until(lambda: bool(prometheus.now(seen)))
        yield Watched(prometheus, fleet, time.time())


def _send(fleet: Fleet) -> None:
    """Images through nginx to all, and something of its own to each."""
    usual = [(EXAMPLES / f"{name}.jpg").read_bytes() for name in IN_DISTRIBUTION]
    with httpx.Client(base_url=fleet.url, timeout=START_S) as client:
        for picture in [NOISE, *usual, *usual, *usual] * REPLICAS:
            assert client.post("/v1/score", content=picture).status_code == 200
    first, _, third = (f"{server.url}/v1/score" for server in fleet.servers)
    for _ in range(60):
        assert httpx.post(first, content=NOISE, timeout=START_S).status_code == 200
    many = [("file", (f"{i}.jpg", usual[i % 3])) for i in range(24)]
    assert httpx.post(first, files=many, timeout=START_S).status_code == 200
    hurried = {"X-Request-Deadline-Ms": "0.001"}
    for _ in range(5):
        refused = httpx.post(third, content=NOISE, headers=hurried, timeout=START_S)
        assert refused.status_code in (429, 504)


def counters(server: Server) -> Mapping[tuple[str, str, str], float]:
    """Scored images of a server, by model, version and verdict, in its own words."""
    text = httpx.get(f"{server.url}/metrics", timeout=START_S).text
    return {
        (one.labels["model"], one.labels["version"], one.labels["verdict"]): one.value
        for family in text_string_to_metric_families(text)
        if family.name == "normgate_images"
        for one in family.samples
        if one.name == "normgate_images_total"
    }


def queries() -> Sequence[Any]:
    """The relation of each query of the dashboard to those of single instances, and the query."""
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            title = str(panel["title"])
            legend = re.sub(r"^{{model}}/{{version}} ?", "", target["legendFormat"])
            relation = MADE_OF_PARTS.get(f"{title}, {legend}") or MADE_OF_PARTS[title]
            found.append(pytest.param(relation, target["expr"], id=f"{title} {legend}"))
    return found


def quantile(share: float, buckets: Mapping[float, float]) -> float:
    """The quantile of a histogram of cumulative counts by upper bound, linear within a bucket."""
    bounds = sorted(buckets)
    counts = [buckets[bound] for bound in bounds]
    rank = share * counts[-1]
    index = next(i for i, count in enumerate(counts) if count >= rank)
    if bounds[index] == np.inf:
        return bounds[index - 1]
    below, lower = (counts[index - 1], bounds[index - 1]) if index else (0.0, 0.0)
    return lower + (bounds[index] - lower) * (rank - below) / (counts[index] - below)


def summed(parts: Sequence[Values]) -> Values:
    """The values of single instances, added up by their labels."""
    total: Counter[Labels] = Counter()
    for part in parts:
        total.update(dict(part))
    return total


def wilson(ood: float, images: float, sign: int) -> float:
    """One end of Wilson's 95 % interval of a share."""
    z = 1.96
    spread = z * np.sqrt(ood * (images - ood) / images + z**2 / 4)
    return float((ood + z**2 / 2 + sign * spread) / (images + z**2))


@pytest.mark.prometheus
@pytest.mark.parametrize(("relation", "query"), queries())
def test_panels(watched: Watched, relation: str, query: str) -> None:
    """What a query shows of three instances is made of what it shows of each, as it should be."""
    whole = watched.ask(query)
    parts = watched.of_each(query)

    if relation == "sum":
        # Some are 0 at this moment, whichever way they are put together.
        assert query.startswith(("sum", "count"))
        assert whole == pytest.approx(dict(summed(parts)))
    elif relation == "max":
        assert whole.keys() == set().union(*parts)
        for labels, value in whole.items():
            assert value == max(part.get(labels, -np.inf) for part in parts)
    elif relation == "each":
        assert whole == pytest.approx({key: part[key] for part in parts for key in part})
        assert {dict(labels)["instance"] for labels in whole} == set(watched.instances)
    elif relation == "between":
        assert whole.keys() == set().union(*parts)
        for labels, value in whole.items():
            some = [part[labels] for part in parts if labels in part]
            assert min(some) - 1e-9 <= value <= max(some) + 1e-9
    elif relation == "ratio":
        found = re.fullmatch(r"(.+?) / \((.+) > 0\)(?: / ([\d.]+))?", query)
        assert found is not None
        shares, images = summed(watched.of_each(found[1])), summed(watched.of_each(found[2]))
        assert whole == {
            labels: pytest.approx(shares[labels] / count / float(found[3] or 1))
            for labels, count in images.items()
            if count > 0
        }
    elif relation == "quantile":
        found = re.fullmatch(r"histogram_quantile\((\S+), (.*)\)", query)
        assert found is not None
        buckets = summed(watched.of_each(found[2]))
        by_bound = {float(dict(labels)["le"]): count for labels, count in buckets.items()}
        assert whole == {frozenset(): pytest.approx(quantile(float(found[1]), by_bound))}
    else:
        images = summed(watched.of_each(IMAGES))
        ood = summed(watched.of_each(OOD))
        sign = 1 if "1.92 + 1.96 * sqrt" in query else -1
        assert whole == {
            labels: pytest.approx(wilson(ood[labels], count, sign), rel=1e-3)
            for labels, count in images.items()
            if count > 0
        }


@pytest.mark.prometheus
def test_traffic(watched: Watched, fleet: Fleet) -> None:
    """Prometheus has what the three servers count themselves, and nginx used all of them."""
    of_servers: Counter[tuple[str, str, str]] = Counter()
    for server in fleet.servers:
        counted = counters(server)
        assert sum(counted.values()) >= 10
        of_servers.update(dict(counted))
    total = watched.ask("sum by (model, version, verdict) (normgate_images_total)")

    assert {
        (dict(labels)["model"], dict(labels)["version"], dict(labels)["verdict"]): value
        for labels, value in total.items()
    } == of_servers
    # Ten images for each through nginx, then 60 and 24 to one of them.
    assert sum(of_servers.values()) == 30 + 60 + 24


@pytest.mark.prometheus
def test_drift_of_one_instance(watched: Watched) -> None:
    """Noise that one instance alone was sent raises the alarm of that one, and of the whole."""
    whole, of_each = (
        watched.ask(target["expr"])
        for panel in DASHBOARD["panels"]
        if panel["title"] == "Drift alarm"
        for target in panel["targets"]
    )
    version = {"model": MODEL, "version": "1"}

    assert whole[frozenset(version.items())] == 1
    assert {
        dict(labels)["instance"]: alarm
        for labels, alarm in of_each.items()
        if version.items() <= dict(labels).items()
    } == dict(zip(watched.instances, (1, 0, 0), strict=True))


@pytest.mark.prometheus
def test_variables(watched: Watched) -> None:
    """The choice of instances offers all three, and that of versions the active and the shadow."""
    ready = watched.ask("normgate_ready")
    known = watched.ask("normgate_model_info")

    assert {dict(labels)["instance"] for labels in ready} == set(watched.instances)
    assert {dict(labels)["version"] for labels in known} == {"1", "2"}


@pytest.mark.prometheus
@pytest.mark.parametrize("number", [0, 1], ids=["queue-wait", "busy-devices"])
def test_autoscaler(watched: Watched, number: int) -> None:
    """What the autoscaler asks is one number for all instances, and 0 where there is none."""
    path = ROOT / "deploy/kubernetes/components/autoscaling/scaledobject.yaml"
    query = yaml.safe_load(path.read_text())["spec"]["triggers"][number]["metadata"]["query"]
    of_each = watched.of_each(query.replace('job="normgate"', 'instance=~"$instance"'))
    [value] = watched.ask(query).values()

    if number == 0:
        assert min(min(one.values()) for one in of_each) <= value
        assert 0 < value <= max(max(one.values()) for one in of_each)
    else:
        assert value == pytest.approx(sum(sum(one.values()) for one in of_each))
    assert watched.ask(query.replace('"normgate"', '"absent"')) == {frozenset(): 0}


def wait_for_answers(load: Load, *, more: int) -> None:
    """Return once so many more requests have been answered."""
    least = sum(load.outcomes.values()) + more
    until(lambda: sum(load.outcomes.values()) >= least)


def test_rolling_restart(fleet: Fleet) -> None:
    """All three end and start again, one after the other, under load: every answer is 200."""
    before = [server.process.pid for server in fleet.servers]
    through_nginx = Server(fleet.servers[0].process, fleet.url)
    with Load(through_nginx, clients=CLIENTS).running() as load:
        for number in range(REPLICAS):
            fleet.restart(number)
            wait_for_answers(load, more=30)

    assert set(load.outcomes) == {200}
    assert not {server.process.pid for server in fleet.servers} & set(before)
    assert all(sum(counters(server).values()) > 0 for server in fleet.servers)
