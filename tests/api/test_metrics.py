"""``/metrics`` over HTTP: no client makes a series."""

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import jpeg

Series = set[tuple[str, frozenset[tuple[str, str]]]]


def series(client: TestClient) -> Series:
    """The name and labels of every series."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families
        for sample in family.samples
    }


def test_no_request_makes_a_series(client: TestClient) -> None:
    """Names, versions, paths, methods and bodies that clients make up become no labels."""
    client.post("/v1/score", content=jpeg(1))
    before = series(client)

    for index in range(20):
        client.post(f"/v1/score?model=made-up-{index}", content=jpeg(1))
        client.post(f"/v1/score?version={index + 100}", content=jpeg(1))
        client.post(f"/v1/gate/path-{index}", content=jpeg(index))
        client.get(f"/v1/models/made-up-{index}/drift?version={index + 1}")
        client.post(f"/v2/models/made-up-{index}/infer", content=b"{}")
        client.request(f"VERB{index}", f"/nowhere-{index}", headers={"X-Request-ID": str(index)})
        client.post("/v1/score", content=bytes([index]) * 100)

    assert series(client) == before


def test_families_say_what_they_are(client: TestClient) -> None:
    """Every family of ours has a help text that is a sentence, and series with known labels."""
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    known = {"model", "version", "verdict", "stage", "reason", "role", "window", "le"}
    known |= {"architecture", "block", "engine", "label"}

    for family in families:
        if family.name.startswith("normgate_"):
            assert family.documentation.endswith("."), family.name
            assert all(set(sample.labels) <= known for sample in family.samples), family.name
