"""A real Prometheus scrapes the real server; every expression that we ship is asked of it."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.test_proxy_server import free_port, port_of, program, replaced, running
from tests.test_server import ROOT, START_S, STORE, Server, serving
from tests.versions import add_version, move_threshold

pytestmark = pytest.mark.prometheus

DEPLOY: Final = ROOT / "deploy" / "prometheus"
DASHBOARD: Final = json.loads((ROOT / "deploy/grafana/dashboards/normgate.json").read_text())
EXAMPLES: Final = ROOT / "docs" / "examples"
TOKEN: Final = "a token of this test"
MODEL: Final = "cifar10-resnet18"
PICTURES: Final = ("ship", "automobile", "truck", "noise", "gradient", "text")
WAIT_S: Final = 180
RANGE_S: Final = 60
PAUSE_S: Final = 0.5
IMAGES: Final = "job_model_version:normgate_images:increase1h"
ENOUGH_IMAGES: Final = 250

VARIABLES: Final = {
    "$__rate_interval": "1m",
    "$window": "5m",
    "$job": ".*",
    "$instance": ".*",
    "$model": ".*",
    "$version": ".*",
}
MAY_BE_EMPTY: Final = {
    "Labels given": "nobody labels images here: the review queue is off",
}
"""Panels of the dashboard that need not show anything, and why."""
SILENT: Final = {
    "NormGateOodRateAboveAlpha": "needs 400 images of a day",
    "NormGateNoTraffic": "there is traffic",
    "NormGateBudgetBurnsFast": "nothing is refused but a file that is no image",
    "NormGateBudgetBurnsSlowly": "the same",
    "NormGateInstanceNotReady": "the instance is ready",
    "NormGateNoneReady": "the same",
}
"""Alerts whose expressions are empty here, and why; those of the others hold."""

QUEUE_WAIT: Final = "NormGateQueueWait"
"""An alert that holds only where the first image of a cold machine waits a second."""


class Prometheus:
    """A running Prometheus, asked through its HTTP API."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The data of an answer, which must be a success."""
        response = self._client.get(f"/api/v1/{path}", params=dict(parameters or {}))
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        assert not answer.get("warnings"), (parameters, answer)
        return answer["data"]

    def now(self, expression: str) -> Sequence[Any]:
        """The series of an expression at this moment."""
        data = self.get("query", {"query": expression})
        assert data["resultType"] == "vector"
        result: Sequence[Any] = data["result"]
        return result

    def lately(self, expression: str) -> Sequence[Any]:
        """The series of an expression over the last seconds, as a panel asks for them."""
        until = time.time()
        data = self.get(
            "query_range",
            {"query": expression, "start": until - RANGE_S, "end": until, "step": "1s"},
        )
        assert data["resultType"] == "matrix"
        result: Sequence[Any] = data["result"]
        return result


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an active version and a shadow whose threshold is higher."""
    store = tmp_path_factory.mktemp("store")
    shutil.copytree(STORE / MODEL, store / MODEL)
    with serving(["--model-store", str(store), "--admin-token", TOKEN]) as started:
        move_threshold(add_version(store / MODEL, 2), rank=4_000)
        url = f"{started.url}/v1/models/{MODEL}/versions/2/shadow?share=1"
        answer = httpx.post(url, headers={"X-API-Key": TOKEN}, timeout=START_S)
        assert answer.status_code == 200, answer.text
        yield started


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped rules, once it has seen mixed traffic."""
    folder, port = tmp_path_factory.mktemp("prometheus"), port_of(server.url)
    # The same server twice: queries must not mistake two instances for one.
    instances = [f"127.0.0.1:{port}", f"localhost:{port}"]
    with (
        scraping(instances, folder) as asked,
        httpx.Client(base_url=server.url, timeout=START_S) as client,
    ):
        _send_until_seen(client, asked)
        yield asked


@contextmanager
def scraping(instances: Sequence[str], folder: Path) -> Iterator[Prometheus]:
    """Prometheus as it is shipped, in ``folder``, which scrapes the instances every second."""
    listed = ", ".join(f'"{instance}"' for instance in instances)
    with shipped([('"normgate:8000"', listed)], folder) as prometheus:
        yield prometheus


@contextmanager
def shipped(changes: Sequence[tuple[str, str]], folder: Path) -> Iterator[Prometheus]:
    """Prometheus as it is shipped but for these changes; it scrapes and evaluates every second."""
    changes = [
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ("rules/*.yml", f"{DEPLOY}/rules/*.yml"),
        *changes,
    ]
    (folder / "prometheus.yml").write_text(replaced(DEPLOY / "prometheus.yml", changes))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        running(command, until="Server is ready to receive web requests"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as client,
    ):
        yield Prometheus(client)


def _send_until_seen(client: httpx.Client, asked: Prometheus) -> None:
    """Send images, odd ones and a broken one, until Prometheus knows of enough of them."""
    pictures = [(EXAMPLES / f"{name}.jpg").read_bytes() for name in PICTURES]
    # The rate of a counter needs samples from before and after it has risen.
    seen = (
        "sum(increase(normgate_shadow_disagreements_total[1m])) > 0"
        ' and sum(increase(normgate_rejected_total{reason="unsupported"}[20s])) > 0'
        f" and sum({IMAGES}) > 150"
        ' and sum(ALERTS{alertname="NormGateDrift"}) > 0'
        ' and sum(ALERTS{alertname="NormGateOodRateFarAboveAlpha"}) > 0'
    )
    until = time.monotonic() + WAIT_S
    while not asked.now(seen):
        assert time.monotonic() < until, "Prometheus has not seen the traffic"
        # A fast server would else have seen enough images for the alert that needs many.
        if not asked.now(f"sum({IMAGES}) > {ENOUGH_IMAGES}"):
            for picture in pictures:
                assert client.post("/v1/score", content=picture).status_code == 200
        assert client.post("/v1/score", content=b"no image").status_code == 415
        time.sleep(PAUSE_S)


def _panels() -> Sequence[Mapping[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def _filled_in(expression: str) -> str:
    """The expression with a value for each of the dashboard's variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


@pytest.mark.parametrize("panel", _panels(), ids=lambda panel: str(panel["title"]))
def test_panels(prometheus: Prometheus, panel: Mapping[str, Any]) -> None:
    """Every query of a panel finds series, with numbers and the labels that name them."""
    for target in panel["targets"]:
        ask = prometheus.now if target.get("instant") else prometheus.lately
        series = ask(_filled_in(target["expr"]))
        if panel["title"] in MAY_BE_EMPTY:
            continue

        assert series, target["expr"]
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for one in series:
            assert named <= one["metric"].keys()
            samples = one.get("values") or [one["value"]]
            assert any(value != "NaN" for _, value in samples), one


def test_version_markers(prometheus: Prometheus) -> None:
    """The version that has begun to answer is marked; the shadow is not."""
    [markers] = DASHBOARD["annotations"]["list"]
    [series] = prometheus.lately(_filled_in(markers["expr"]))

    assert series["metric"] == {"model": MODEL, "version": "1"}


def test_variables(prometheus: Prometheus) -> None:
    """Each variable offers what is there."""
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            selector, label = _filled_in(found[1]), found[2]
            offered[variable["name"]] = prometheus.get(
                f"label/{label}/values", {"match[]": selector}
            )

    assert offered["job"] == ["normgate"]
    assert len(offered["instance"]) == 2
    assert offered["model"] == [MODEL]
    assert offered["version"] == ["1", "2"]


def test_rules(prometheus: Prometheus) -> None:
    """Every recording rule gives numbers; an alert's condition holds exactly where it should."""
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    alerts = [rule["name"] for rule in rules if rule["type"] == "alerting"]

    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        series = prometheus.now(rule["query"])
        if rule["name"] in SILENT:
            assert not series, (rule["name"], series)
        elif series or rule["name"] != QUEUE_WAIT:
            assert series, rule["name"]
            assert all(one["value"][1] != "NaN" for one in series), rule["name"]
            assert all(one["metric"]["job"] == "normgate" for one in series), rule["name"]
    assert {*SILENT, QUEUE_WAIT} < set(alerts)


def test_alerts(prometheus: Prometheus) -> None:
    """Half of the images OOD: the drift alert fires; the OOD rate has to last before it pages."""
    page = "NormGateOodRateFarAboveAlpha"
    others = prometheus.now(f'ALERTS{{alertname!~"{page}|{QUEUE_WAIT}"}}')
    # On a slow machine it may fire by now; it was pending before.
    paging = prometheus.now(
        f'max_over_time(ALERTS{{alertname="{page}", alertstate="pending"}}[1h])'
    )

    assert [one["metric"]["version"] for one in paging] == ["1"]
    assert [
        (one["metric"]["alertname"], one["metric"]["version"], one["metric"]["alertstate"])
        for one in others
    ] == [("NormGateDrift", "1", "firing")]


def test_several_instances(prometheus: Prometheus) -> None:
    """Two instances are twice the images, and the same OOD rate with a narrower interval."""
    expressions = {
        target["legendFormat"]: _filled_in(target["expr"])
        for panel in _panels()
        for target in panel["targets"]
    }
    single = {
        name: expression.replace('instance=~".*"', 'instance=~"localhost.*"')
        for name, expression in expressions.items()
    }

    def value(expression: str) -> float:
        [series] = [
            one for one in prometheus.now(expression) if one["metric"].get("version", "1") == "1"
        ]
        return float(series["value"][1])

    rate, lower, upper = (
        f"{{{{model}}}}/{{{{version}}}} {end}" for end in ("rate", "lower", "upper")
    )
    assert value(expressions["Ready instances"]) == 2 * value(single["Ready instances"]) == 2
    assert value(expressions[rate]) == pytest.approx(value(single[rate]), abs=0.1)
    assert (
        value(single[lower])
        < value(expressions[lower])
        < value(expressions[rate])
        < value(expressions[upper])
        < value(single[upper])
    )


@pytest.mark.usefixtures("prometheus")
def test_names_and_helps(server: Server) -> None:
    """The linter of metrics has nothing to say about a server that has been used."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=START_S).text
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=metrics,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
