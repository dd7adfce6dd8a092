"""The real server process under load: stopped, changed and damaged without losing a request."""

import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from app.store import Store
from tests.pictures import jpeg
from tests.test_server import START_S, Server, serving, serving_together
from tests.versions import DAMAGES, add_version, move_threshold

TOKEN = "a-token-for-tests"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
CLIENTS = 8


@pytest.fixture
def model(tiny_store: Store, tmp_path: Path) -> Path:
    """The folder of ``tiny``, with version 1, in a store of its own."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return tmp_path / "store" / "tiny"


class Load:
    """Clients that keep their connections and ask again as soon as they are answered."""

    def __init__(self, server: Server, *, clients: int = CLIENTS) -> None:
        self.outcomes: Counter[object] = Counter()
        self._server = server
        self._is_over = threading.Event()
        self._counting = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed,)) for seed in range(clients)
        ]

    def stop(self) -> None:
        """Send nothing new; what was sent is waited for when the context ends."""
        self._is_over.set()

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """The clients ask inside the context; outside it every request has its outcome."""
        for thread in self._threads:
            thread.start()
        try:
            until(lambda: sum(self.outcomes.values()) > 2 * len(self._threads))
            yield self
        finally:
            self.stop()
            for thread in self._threads:
                thread.join(START_S)
            assert not any(thread.is_alive() for thread in self._threads)

    def _ask(self, seed: int) -> None:
        data = jpeg(seed)
        with httpx.Client(base_url=self._server.url, timeout=START_S) as client:
            while not self._is_over.is_set():
                outcome = _outcome(client, data)
                with self._counting:
                    self.outcomes[outcome] += 1


def _outcome(client: httpx.Client, data: bytes) -> object:
    try:
        return client.post("/v1/score", content=data).status_code
    except httpx.HTTPError as error:
        return repr(error)


def until(condition: Callable[[], bool], *, within_s: float = START_S) -> None:
    """Return once the condition holds; fail when it takes too long."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        threading.Event().wait(0.01)


def is_ready(server: Server) -> bool:
    """What a load balancer asks, on a connection of its own."""
    try:
        return httpx.get(f"{server.url}/readyz", timeout=START_S).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("run", range(10))
def test_sigterm_under_load(run: int) -> None:
    """Clients that are sent away by the readiness probe lose no request; the exit status is 0.

    Twenty servers, two of which start at a time.
    """
    flags = ["--shutdown-grace-s", "0.5"]
    with serving_together(flags, flags) as servers:
        for server in servers:
            end_under_load(server)


def end_under_load(server: Server) -> None:
    """Ask a server to end while clients ask it for scores."""
    with Load(server).running() as load:
        server.terminate()
        until(lambda: not is_ready(server))
        load.stop()
        assert server.process.wait(START_S) == 0

    assert set(load.outcomes) == {200}


def test_grace() -> None:
    """After SIGTERM the server is unready and answers on; a second one ends it at once."""
    with (
        serving(["--shutdown-grace-s", "3000"]) as server,
        httpx.Client(base_url=server.url, timeout=START_S) as client,
    ):
        server.terminate()
        until(lambda: not is_ready(server))
        response = client.post("/v1/score", content=jpeg(1))
        assert response.status_code == 200
        # The client is told to come back on another connection, to another server.
        assert response.headers["connection"] == "close"
        assert client.get("/livez").status_code == 200

        server.terminate()
        assert server.process.wait(START_S) == 0


def test_an_interrupt_ends_it_without_grace() -> None:
    """Ctrl-C waits for no load balancer."""
    with serving(["--shutdown-grace-s", "3000"]) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(START_S) == 0


def admin_flags(model: Path, *flags: str) -> list[str]:
    """A server on a store of its own, with administration."""
    return ["--model-store", str(model.parent), "--admin-token", TOKEN, *flags]


@pytest.mark.slow
def test_fifty_activations_under_load(model: Path) -> None:
    """Each switch takes effect, no request notices, and the memory comes back."""
    add_version(model, 2)
    with (
        serving(admin_flags(model)) as server,
        Load(server).running() as load,
        httpx.Client(base_url=server.url, headers=ADMIN, timeout=START_S) as client,
    ):
        process = psutil.Process(server.process.pid)

        def activate(times: int) -> None:
            for i in range(times):
                version = 1 + i % 2
                url = f"/v1/models/tiny/versions/{version}/activate"
                assert client.post(url).json()["active_version"] == version
                answer = client.post("/v1/score", content=jpeg(1)).json()
                assert answer["version"] == version

        activate(10)  # until here the allocator may still grow
        before = process.memory_info().rss
        activate(50)
        after = process.memory_info().rss

    assert set(load.outcomes) == {200}
    assert after - before < 30 * 2**20


@pytest.mark.slow
def test_fifty_failed_activations_under_load(model: Path) -> None:
    """Damaged versions of every kind are refused with the reason; the old one never stops."""
    with (
        serving(admin_flags(model)) as server,
        Load(server).running() as load,
        httpx.Client(base_url=server.url, headers=ADMIN, timeout=START_S) as client,
    ):
        for i in range(50):
            spoil, word = list(DAMAGES.values())[i % len(DAMAGES)]
            spoil(add_version(model, 2 + i))
            response = client.post(f"/v1/models/tiny/versions/{2 + i}/activate")
            assert response.status_code == 409
            assert word in response.json()["detail"]
            assert client.post("/v1/score", content=jpeg(1)).json()["version"] == 1

    assert set(load.outcomes) == {200}


def test_the_watcher(model: Path) -> None:
    """A version that is put into the store answers without anybody asking for it."""
    with serving(admin_flags(model, "--watch-s", "0.05")) as server:
        url = f"{server.url}/v1/models/tiny"
        assert httpx.get(url).json()["active_version"] == 1

        add_version(model, 2)

        until(lambda: httpx.get(url).json()["active_version"] == 2)


def test_a_shadow_is_seen_in_the_metrics_alone(model: Path) -> None:
    """A stricter shadow scores what the active version answers, and its verdicts are counted."""
    move_threshold(model / "1", rank=1)
    with (
        serving(admin_flags(model)) as server,
        httpx.Client(base_url=server.url, headers=ADMIN, timeout=START_S) as client,
    ):
        move_threshold(add_version(model, 2), rank=24)
        started = client.post("/v1/models/tiny/versions/2/shadow?share=1").json()
        assert started["shadow"] == {"version": 2, "share": 1.0}
        answers = [client.post("/v1/score", content=jpeg(seed)).json() for seed in range(10)]

        def counted(family: str, verdict: str, version: int) -> float:
            labels = f'{{model="tiny",verdict="{verdict}",version="{version}"}}'
            lines = client.get("/metrics").text.splitlines()
            return sum(
                float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith(f"normgate_{family}_total{labels}")
            )

        def shown() -> float:
            return counted("shadow_images", "id", 2) + counted("shadow_images", "ood", 2)

        until(lambda: shown() == 10)
        assert {answer["version"] for answer in answers} == {1}
        strict = counted("shadow_images", "ood", 2)
        lax = counted("images", "ood", 1)
        assert strict > lax
        assert counted("shadow_disagreements", "ood", 2) == strict - lax
        assert counted("images", "id", 2) + counted("images", "ood", 2) == 0

        ended = client.delete("/v1/models/tiny/shadow").json()
        assert ended["shadow"] is None
        client.post("/v1/score", content=jpeg(1))
        assert shown() == 10
