"""The real server under many requests at once: every answer is the one of its own image."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import pytest
import torch

from app.core.images import load
from app.store import Store
from tests.pictures import jpeg
from tests.test_server import STORE, serving

CONNECTIONS: Final = 64
IMAGES: Final = 2_000
FORM_SIZE: Final = 20
WITHIN_S: Final = 60
POISON: Final = (b"", b"no image", jpeg(0)[:300], b"\x89PNG\r\n\x1a\n" + bytes(100))
"""What cannot be decoded: nothing, text, half an image, and a beginning alone."""


def is_poison(seed: int) -> bool:
    """Whether the image of this number cannot be decoded; one in ten."""
    return seed % 10 == 3


def file_of(seed: int) -> bytes:
    """The image of this number, or what stands in its place."""
    return POISON[seed // 10 % len(POISON)] if is_poison(seed) else jpeg(seed)


@pytest.fixture(scope="module")
def offline() -> Sequence[float]:
    """The score of every image, computed without a server."""
    loaded = Store(STORE).load("cifar10-resnet18")
    detector, preprocessing = loaded.detector(), loaded.bundle.preprocessing
    scores: list[float] = []
    for start in range(0, IMAGES, 100):
        images = [load(jpeg(seed), preprocessing) for seed in range(start, start + 100)]
        scores += detector.detect(torch.stack(images)).scores.tolist()
    assert len(set(scores)) > 0.99 * IMAGES, "equal scores could not tell a mix-up"
    return scores


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Keeps up to ``CONNECTIONS`` connections to a server with room for all of them."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    with (
        serving(["--queue-size", str(IMAGES), "--deadline-ms", "60000"]) as server,
        httpx.Client(base_url=server.url, timeout=WITHIN_S, limits=limits) as client,
    ):
        yield client


def at_once(ask: Any, numbers: Iterable[int]) -> list[Any]:
    """The answers to all questions, in order, ``CONNECTIONS`` of them in flight."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(ask, numbers))


@pytest.mark.slow
def test_every_image_gets_its_own_score(client: httpx.Client, offline: Sequence[float]) -> None:
    """2,000 distinct images, 64 in flight, in batches as they fall: the offline scores, in order.

    Each answer carries its request's id and its file's name.
    """

    def ask(seed: int) -> float:
        response = client.post(
            "/v1/score",
            files={"file": (f"{seed}.jpg", jpeg(seed))},
            headers={"X-Request-ID": f"request-{seed}"},
        )
        assert response.status_code == 200
        body = response.json()
        [result] = body["results"]
        assert (body["request_id"], result["filename"]) == (f"request-{seed}", f"{seed}.jpg")
        return float(result["score"])

    online = at_once(ask, range(IMAGES))

    assert online == pytest.approx(offline, rel=1e-5)


@pytest.mark.slow
def test_poison_among_requests(client: httpx.Client, offline: Sequence[float]) -> None:
    """One request in ten is undecodable and fails alone; the other nine have their scores."""

    def ask(seed: int) -> httpx.Response:
        return client.post("/v1/score", content=file_of(seed))

    responses = at_once(ask, range(500))

    for seed, response in enumerate(responses):
        if is_poison(seed):
            assert response.status_code in (400, 415, 422)
        else:
            [result] = response.json()["results"]
            assert result["score"] == pytest.approx(offline[seed], rel=1e-5)


@pytest.mark.slow
def test_poison_among_the_files_of_a_form(client: httpx.Client, offline: Sequence[float]) -> None:
    """In a form the undecodable image carries its error; its neighbours have their scores."""

    def ask(first: int) -> list[Any]:
        parts = [
            ("file", (f"{seed}.jpg", file_of(seed))) for seed in range(first, first + FORM_SIZE)
        ]
        response = client.post("/v1/score", files=parts)
        assert response.status_code == 200
        return list(response.json()["results"])

    forms = at_once(ask, range(0, IMAGES, FORM_SIZE))

    results = [result for form in forms for result in form]
    assert [one["filename"] for one in results] == [f"{seed}.jpg" for seed in range(IMAGES)]
    for seed, result in enumerate(results):
        if is_poison(seed):
            assert (result["score"], result["verdict"]) == (None, None)
            assert result["error"]
        else:
            assert result["error"] is None
            assert result["score"] == pytest.approx(offline[seed], rel=1e-5)
