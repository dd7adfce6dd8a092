"""``X-Request-Deadline-Ms``: a request says how long its answer is worth waiting for."""

import pytest
from fastapi.testclient import TestClient

from tests.pictures import jpeg


def ask(client: TestClient, deadline: str) -> int:
    """The status of a request with a deadline of its own."""
    headers = {"X-Request-Deadline-Ms": deadline}
    return client.post("/v1/score", content=jpeg(1), headers=headers).status_code


@pytest.mark.parametrize("deadline", ["60000", "59999.5", "1e4"])
def test_a_deadline_up_to_the_bound(client: TestClient, deadline: str) -> None:
    """Any number of milliseconds up to the bound is taken, also above the default."""
    assert ask(client, deadline) == 200


@pytest.mark.parametrize("deadline", ["0", "-1", "soon", "nan", "inf", "60001", ""])
def test_a_deadline_out_of_bounds(client: TestClient, deadline: str) -> None:
    """Anything else is refused with the header's name and the bound."""
    assert ask(client, deadline) == 400


def test_a_deadline_that_cannot_be_kept(client: TestClient) -> None:
    """What would come too late is a 504, which says when to come back."""
    headers = {"X-Request-Deadline-Ms": "0.001"}

    response = client.post("/v1/score", content=jpeg(1), headers=headers)

    assert response.status_code == 504
    assert int(response.headers["retry-after"]) >= 1
