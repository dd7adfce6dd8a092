"""Ray Serve on one machine: a real cluster, two replicas, lost and changed under load."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil
import pytest
import torch
import yaml
from prometheus_client import generate_latest

from app.client import Client, NormGateClientError
from app.core.images import load
from app.serving.metrics import Metrics
from app.store import Store
from tests.deploy.test_prometheus import Prometheus, shipped
from tests.pictures import jpeg
from tests.test_proxy_server import free_port
from tests.test_server import ROOT
from tests.versions import add_version, edit

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow

MODEL: Final = "tiny"
OTHER: Final = "other"
IMAGES: Final = 2_000
FORM_SIZE: Final = 10
CONNECTIONS: Final = 6
QUEUE: Final = CONNECTIONS * FORM_SIZE
FORMS: Final = 24
WITHIN_S: Final = 120
POLL_S: Final = 0.2
"""What is asked again and again takes the cores from what is waited for."""
BIN: Final = Path(sys.executable).parent
STATIC: Final = 'static_configs:\n      - targets: ["normgate:8000"]'
AUTOSCALING: Final = {
    "max_replicas": 2,
    "target_ongoing_requests": 1,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
}
"""Serve's usual delays are 30 s and 600 s."""
SETTINGS: Final = {
    "model": MODEL,
    "engine": "torch",
    "max_batch_size": 1,  # an image's last bits depend on its company in a batch
    "queue_size": QUEUE,
    "deadline_ms": 60_000,
    "shutdown_grace_s": 0,
    "access_log_sample": 0,
}


@dataclass(frozen=True)
class Cluster:
    """A running Ray, on this machine alone."""

    address: str
    process: "subprocess.Popen[bytes]"
    environment: Mapping[str, str]

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        """What a command of this installation prints, with the cluster's address."""
        return subprocess.run(
            [str(BIN / command[0]), *map(str, command[1:])],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )

    def replicas(self) -> list[psutil.Process]:
        """The processes of NormGate's replicas."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in workers if "ServeReplica:NormGate" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with room for three replicas, whose proxies answer in NormGate's words."""
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "RAY_ADDRESS": address,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.distributed.proxy.middlewares",
        "PYTHONPATH": str(ROOT),
        # Processes that nobody asks for would take the cores from those that are.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    # Its sockets' paths would be too long in pytest's own folder.
    folder = tempfile.mkdtemp(prefix="ray")
    command = [
        *(
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=3",
            "--include-dashboard=false",
        ),
        *("--include-log-monitor=false", "--no-monitor", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"),
        *("--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    without_address = {name: environment[name] for name in environment.keys() - {"RAY_ADDRESS"}}
    process = subprocess.Popen(
        command, env=without_address, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _accepts(address))
        yield Cluster(address, process, environment)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail when it takes too long."""
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        threading.Event().wait(POLL_S)


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=WITHIN_S)


@dataclass(frozen=True)
class Fleet:
    """Two replicas of NormGate, started from a configuration file of Serve's."""

    cluster: Cluster
    store: Path
    port: int

    @property
    def url(self) -> str:
        """Of Serve's proxy."""
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, *, versions: Mapping[str, int], fewest: int = 2) -> None:
        """Give Serve the configuration of two replicas or fewer; it takes in what has changed."""
        options = {"model_store": str(self.store), "min_replicas": 2, "max_replicas": 2}
        application = {
            "name": "NormGate",
            "import_path": "app.distributed.serving:application",
            "args": options | SETTINGS,
            "deployments": [
                {
                    "name": "NormGate",
                    "user_config": {"versions": dict(versions)},
                    "autoscaling_config": AUTOSCALING | {"min_replicas": fewest},
                }
            ],
        }
        file = self.store / "serve.yaml"
        http = {"host": "127.0.0.1", "port": self.port}
        file.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
        done = self.cluster.run("serve", "run", "--non-blocking", file)
        assert done.returncode == 0, done.stderr

    def listeners(self) -> list[str]:
        """Where the replicas' metrics are, as Prometheus is told."""
        try:
            answer = httpx.get(f"{self.url}/metrics/replicas", timeout=WITHIN_S)
        except httpx.TransportError:
            return []
        if answer.status_code != 200:
            return []
        return [address for each in answer.json() for address in each["targets"]]

    def active(self) -> set[int]:
        """The versions of the model that answer, of all replicas."""
        role = re.compile(
            rf'normgate_model_role\{{model="{MODEL}",role="active",version="(\d+)"\}} 1.0'
        )
        pages = map(_metrics, self.listeners())
        return {int(version) for page in pages for version in role.findall(page)}


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Two replicas that answer with two models, from a store of their own."""
    store = tmp_path_factory.mktemp("serve")
    for name in (MODEL, OTHER):
        shutil.copytree(tiny_store.root / MODEL, store / name)
    edit(store / OTHER / "1", lambda document: document.update(name=OTHER))
    fleet = Fleet(cluster, store, free_port())
    fleet.deploy(versions={})
    until(lambda: len(fleet.listeners()) == 2)
    return fleet


@pytest.fixture(scope="module")
def prometheus(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real one with the shipped rules, which is told by the fleet where its replicas are."""
    told = (
        f"http_sd_configs:\n      - {{url: '{fleet.url}/metrics/replicas', refresh_interval: 1s}}"
    )
    with shipped([(STATIC, told)], tmp_path_factory.mktemp("prometheus")) as started:
        yield started


@pytest.fixture(scope="module")
def offline(tiny_store: Store) -> Sequence[float]:
    """The score of every image, computed without a server, on one thread as a replica does."""
    loaded = tiny_store.load(MODEL)
    detector, preprocessing = loaded.detector(), loaded.bundle.preprocessing
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = (load(jpeg(seed), preprocessing)[None] for seed in range(IMAGES))
        return [float(detector.detect(image).scores[0]) for image in images]
    finally:
        torch.set_num_threads(threads)


class Load:
    """Clients that ask again and again, and once more where they are told to come back."""

    def __init__(self, url: str, *, clients: int = 4) -> None:
        self.outcomes: Counter[object] = Counter()
        self._url = url
        self._is_over = threading.Event()
        self._counting = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed,)) for seed in range(clients)
        ]

    @contextmanager
    def running(self, *, retries: int) -> Iterator["Load"]:
        """The clients ask inside the context; outside it every request has its outcome."""
        self._retries = retries
        for thread in self._threads:
            thread.start()
        try:
            self.go_on(100)
            yield self
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join(WITHIN_S)

    def go_on(self, count: int) -> None:
        """Return when so many more requests have their outcome."""
        wanted = self.outcomes.total() + count
        until(lambda: self.outcomes.total() >= wanted)

    def _ask(self, seed: int) -> None:
        data = jpeg(seed)
        with Client(self._url, retries=self._retries, timeout_s=WITHIN_S) as client:
            while not self._is_over.is_set():
                outcome: object
                try:
                    client.score(data)
                    outcome = "answered"
                except NormGateClientError as error:
                    outcome = repr(error)
                with self._counting:
                    self.outcomes[outcome] += 1


def test_two_replicas_give_the_offline_scores(fleet: Fleet, offline: Sequence[float]) -> None:
    """2,000 distinct images have the scores of one process, bit for bit, and both replicas work."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    with (
        httpx.Client(base_url=fleet.url, timeout=WITHIN_S, limits=limits) as client,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):

        def ask(first: int) -> list[float]:
            seeds = range(first, first + FORM_SIZE)
            parts = [("file", (f"{seed}.jpg", jpeg(seed))) for seed in seeds]
            response = client.post("/v1/score", files=parts)
            assert response.status_code == 200
            return [float(result["score"]) for result in response.json()["results"]]

        forms = list(pool.map(ask, range(0, IMAGES, FORM_SIZE)))

    online = [score for form in forms for score in form]
    assert online == list(offline)
    assert len(set(online)) > 0.99 * IMAGES, "equal scores could not tell a mix-up"
    counted = [_images(address) for address in fleet.listeners()]
    assert len(counted) == 2
    assert min(counted) > 0
    assert sum(counted) == IMAGES


@pytest.mark.prometheus
def test_metrics(prometheus: Prometheus, fleet: Fleet) -> None:
    """Prometheus finds both replicas by itself, and in each the names of a single process."""
    addresses = fleet.listeners()
    until(lambda: _up(prometheus) == set(addresses))
    scored = sum(map(_images, addresses))
    assert scored > 0
    until(lambda: _value(prometheus, "sum(normgate_images_total)") == scored)

    assert _value(prometheus, "count(count by (replica) (normgate_ready))") == 2
    until(lambda: _value(prometheus, "count(job_model_version:normgate_images:increase1h)") >= 1)
    one, two = (_families(_metrics(address)) for address in addresses)
    assert one == two == _families(generate_latest(Metrics().registry).decode())


def _up(prometheus: Prometheus) -> set[str]:
    """The replicas that Prometheus scrapes with success, of those that it was told of."""
    return {one["metric"]["instance"] for one in prometheus.now("up == 1")}


def _value(prometheus: Prometheus, expression: str) -> float:
    """The value of an expression without labels; NaN where there is none."""
    return next((float(one["value"][1]) for one in prometheus.now(expression)), math.nan)


def _families(page: str) -> set[str]:
    """What a page of metrics tells of; when something was first counted is told from then on."""
    names = re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE)
    return {name for name in names if not name.endswith("_created")}


def _images(address: str) -> float:
    """The images that a replica has scored, by its own metrics."""
    counters = re.findall(r"^normgate_images_total\{.*\} (.*)$", _metrics(address), re.MULTILINE)
    return sum(map(float, counters))


def _metrics(address: str) -> str:
    """What a replica tells Prometheus; nothing while it cannot."""
    try:
        return httpx.get(f"http://{address}/metrics", timeout=WITHIN_S).text
    except httpx.TransportError:
        return ""


def test_several_models(fleet: Fleet) -> None:
    """A request names its model; here they differ in nothing but the name."""
    with httpx.Client(base_url=fleet.url, timeout=WITHIN_S) as client:
        answers = [
            client.post("/v1/score", params=query, content=jpeg(1)).json()
            for query in ({}, {"model": OTHER})
        ]

    assert [answer["model"] for answer in answers] == [MODEL, OTHER]
    assert answers[0]["results"][0]["score"] == answers[1]["results"][0]["score"]


def test_errors_are_those_of_one_process(fleet: Fleet) -> None:
    """A problem document comes with its status and with one request id."""
    response = httpx.post(
        f"{fleet.url}/v1/score",
        content=b"no image",
        headers={"X-Request-ID": "one"},
        timeout=WITHIN_S,
    )

    assert response.status_code == 415
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers.get_list("x-request-id") == ["one"]
    assert response.json()["request_id"] == "one"


def test_overload(fleet: Fleet) -> None:
    """The replicas' own queues are full first: an answer or 429, which says when to come back."""
    with (
        httpx.Client(base_url=fleet.url, timeout=WITHIN_S) as client,
        ThreadPoolExecutor(FORMS) as pool,
    ):
        parts = [("file", (f"{seed}.jpg", jpeg(seed))) for seed in range(QUEUE)]
        answers = list(pool.map(lambda _: client.post("/v1/score", files=parts), range(FORMS)))
        refused = [answer for answer in answers if answer.status_code == 429]

        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["request_id"] for answer in refused)
        assert client.post("/v1/score", content=jpeg(1)).status_code == 200


@pytest.mark.prometheus
def test_a_replica_killed_under_load(fleet: Fleet, prometheus: Prometheus) -> None:
    """A client that retries once as told loses nothing; Prometheus forgets the replica."""
    before = set(fleet.listeners())
    until(lambda: _up(prometheus) == before)
    with Load(fleet.url).running(retries=1) as load:
        fleet.cluster.replicas()[0].send_signal(signal.SIGKILL)
        load.go_on(200)
    until(lambda: len(before & set(fleet.listeners())) == 1)
    left = before & set(fleet.listeners())
    until(lambda: before & _listed(prometheus) == left)

    assert set(load.outcomes) == {"answered"}


def _listed(prometheus: Prometheus) -> set[str]:
    """Where Prometheus looks for replicas, found or not."""
    targets = prometheus.get("targets", {"state": "active"})["activeTargets"]
    return {target["labels"]["instance"] for target in targets}


def test_a_changed_configuration_swaps_the_version_under_load(fleet: Fleet) -> None:
    """Every replica answers with the version that user_config names, and no request notices.

    So does one that has just replaced another; those that were there were not started anew.
    """
    add_version(fleet.store / MODEL, 2)
    replicas = {one.pid for one in fleet.cluster.replicas()}
    assert replicas
    with Load(fleet.url).running(retries=0) as load:
        fleet.deploy(versions={MODEL: 2})
        until(lambda: fleet.active() == {2})
        load.go_on(100)
    until(lambda: len(fleet.listeners()) == 2)

    assert set(load.outcomes) == {"answered"}
    assert replicas <= {one.pid for one in fleet.cluster.replicas()}
    assert fleet.active() == {2}


def test_replicas_come_and_go_with_the_load(fleet: Fleet) -> None:
    """One replica alone, two under load, and one after it: no request is lost on the way."""
    fleet.deploy(versions={}, fewest=1)
    until(lambda: len(fleet.listeners()) == 1)
    with Load(fleet.url, clients=3).running(retries=1) as busy:
        until(lambda: len(fleet.listeners()) == 2)
        busy.go_on(100)
    # One request at a time is work for one.
    with Load(fleet.url, clients=1).running(retries=1) as quiet:
        until(lambda: len(fleet.listeners()) == 1)
        quiet.go_on(10)

    assert set(busy.outcomes | quiet.outcomes) == {"answered"}


def test_the_command(fleet: Fleet) -> None:
    """``normgate serve --ray`` takes over on the cluster, answers, and SIGTERM ends it."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [str(BIN / "normgate"), "serve", "--ray", f"--port={fleet.port}", *flags]
    with subprocess.Popen(
        [*command, f"--model-store={fleet.store}"],
        env=fleet.cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        hung = threading.Timer(WITHIN_S, process.kill)
        hung.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"NormGate listens on {fleet.url}\n"
            assert (
                httpx.post(f"{fleet.url}/v1/score", content=jpeg(1), timeout=WITHIN_S).status_code
                == 200
            )
            process.terminate()
            assert process.wait(WITHIN_S) == 0
        finally:
            hung.cancel()
            process.kill()
    assert httpx.get(f"{fleet.url}/readyz", timeout=WITHIN_S).status_code == 404
