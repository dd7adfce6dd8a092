"""The client: what it sends, what it makes of the answers, when it asks again."""

import asyncio
import io
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, assert_type

import httpx
import pytest

from app.client import (
    AsyncClient,
    Busy,
    Client,
    Clock,
    DeadlineExceeded,
    Forbidden,
    GateResult,
    ImageRejected,
    ImageResult,
    ImageUnreadable,
    NormGateClientError,
    NotFound,
    NoVerdict,
    OutOfDistribution,
    Prediction,
    ServerError,
    Unauthorized,
    Unreachable,
)
from tests.test_server import serving

ROOT: Final = Path(__file__).resolve().parents[1]
EXAMPLES: Final = ROOT / "docs" / "examples"
URL: Final = "http://service/prefix/"
DEADLINE_S: Final = 60

Handler = Callable[[httpx.Request], httpx.Response]
Ask = Callable[..., Any]


def score_answer(request: httpx.Request, *, verdict: str = "id") -> httpx.Response:
    """What the service says; the label is the image's own text."""
    return httpx.Response(
        200,
        headers={"X-Request-ID": "r-1"},
        json={
            "model": "tiny",
            "version": 3,
            "request_id": "r-1",
            "results": [
                {
                    "filename": None,
                    "verdict": verdict,
                    "feature_norm": 1.5,
                    "score": 2.5,
                    "threshold": 1.25,
                    "p_value": 0.5,
                    "predictions": [
                        {"label": request.read().decode(), "index": 4, "probability": 0.75}
                    ],
                    "error": None,
                }
            ],
        },
    )


def gate_answer(*, is_ood: bool) -> httpx.Response:
    """What the gate says."""
    return httpx.Response(
        403 if is_ood else 200,
        headers={
            "X-Request-ID": "r-2",
            "x-normgate-verdict": "ood" if is_ood else "id",
            "x-normgate-feature-norm": "0.5",
            "x-normgate-score": "0.75",
            "x-normgate-threshold": "1.25",
            "x-normgate-p-value": "0.01",
            "x-normgate-model": "tiny",
            "x-normgate-version": "3",
        },
    )


def problem(status: int, detail: str = "no", **headers: str) -> httpx.Response:
    """An error as the service words it."""
    return httpx.Response(
        status,
        headers={"X-Request-ID": "r-3", "Content-Type": "application/problem+json"}
        | {name.replace("_", "-"): value for name, value in headers.items()},
        json={"title": "No", "status": status, "detail": detail, "request_id": "r-3"},
    )


class Service:
    """Fails as it is told, in turn, and scores every later image; remembers the requests."""

    def __init__(self, *failures: httpx.Response | httpx.RequestError) -> None:
        self.requests: list[httpx.Request] = []
        self._failures = list(failures)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.requests.append(request)
        if not self._failures:
            return score_answer(request)
        failure = self._failures.pop(0)
        if isinstance(failure, httpx.RequestError):
            raise failure
        # A new one each time: a response belongs to the client that got it.
        return httpx.Response(failure.status_code, headers=failure.headers, content=failure.content)


class FakeClock(Clock):
    """Time that passes only in pauses, which are remembered."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def now(self) -> float:
        """The pauses so far."""
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        """Let the time pass at once."""
        self.pauses.append(seconds)

    async def sleep_async(self, seconds: float) -> None:
        """The same."""
        self.pauses.append(seconds)


def ask_plain(
    service: Handler, method: str, image: Any, options: dict[str, Any] | None = None, **more: Any
) -> Any:
    """What a method of ``Client`` returns."""
    with (
        httpx.Client(transport=httpx.MockTransport(service)) as http,
        Client(URL, http=http, **options or {}) as client,
    ):
        answer = getattr(client, method)(image, **more)
        return list(answer) if method == "score_many" else answer


def ask_asyncio(
    service: Handler, method: str, image: Any, options: dict[str, Any] | None = None, **more: Any
) -> Any:
    """What a method of ``AsyncClient`` returns."""

    async def scenario() -> Any:
        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(service)) as http,
            AsyncClient(URL, http=http, **options or {}) as client,
        ):
            answer = getattr(client, method)(image, **more)
            return [each async for each in answer] if method == "score_many" else await answer

    return asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


@pytest.fixture(params=[ask_plain, ask_asyncio], ids=["plain", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Either client, so that every behaviour is that of both."""
    chosen: Ask = request.param
    return chosen


def test_what_score_sends_and_returns(ask: Ask) -> None:
    """The image is the body; options travel as the query and the key header."""
    service = Service()

    result = ask(
        service, "score", b"cat", {"api_key": "s3cret", "model": "tiny", "version": 3}, top_k=2
    )

    [request] = service.requests
    assert request.method == "POST"
    assert request.url.path == "/prefix/v1/score"
    assert dict(request.url.params) == {"model": "tiny", "version": "3", "top_k": "2"}
    assert request.headers["X-API-Key"] == "s3cret"
    assert "X-Request-Deadline-Ms" not in request.headers
    assert request.content == b"cat"
    assert result == ImageResult(
        verdict="id",
        feature_norm=1.5,
        score=2.5,
        threshold=1.25,
        p_value=0.5,
        predictions=(Prediction("cat", 4, 0.75),),
        model="tiny",
        version=3,
        request_id="r-1",
        filename=None,
    )


@pytest.mark.parametrize("is_ood", [False, True])
def test_what_gate_returns(ask: Ask, is_ood: bool) -> None:
    """Both verdicts of the gate are results, and only ``id`` is true."""
    result = ask(Service(gate_answer(is_ood=is_ood)), "gate", b"cat")

    assert result == GateResult(
        verdict="ood" if is_ood else "id",
        feature_norm=0.5,
        score=0.75,
        threshold=1.25,
        p_value=0.01,
        model="tiny",
        version=3,
        request_id="r-2",
        filename=None,
    )
    assert result.is_ood is is_ood
    assert bool(result) is not is_ood


def test_a_gate_that_is_set_open(ask: Ask) -> None:
    """An image that the gate lets pass without having judged it is not taken for ``id``."""
    passed = {"x-normgate-verdict": "unknown", "x-normgate-error": "the queue is full"}

    with pytest.raises(NoVerdict, match="the queue is full"):
        ask(Service(httpx.Response(200, headers=passed)), "gate", b"cat")


def test_files(ask: Ask, tmp_path: Path) -> None:
    """A path or an open file is sent whole and names the result."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"cat")

    with path.open("rb") as file:
        results = [ask(Service(), "score", image) for image in (path, file, io.BytesIO(b"cat"))]

    assert [result.predictions[0].label for result in results] == ["cat"] * 3
    assert [result.filename for result in results] == ["cat.jpg", "cat.jpg", None]


def test_a_file_that_cannot_be_read(ask: Ask, tmp_path: Path) -> None:
    """A missing file is an error of the client's, and nothing is sent."""
    service = Service()

    with pytest.raises(ImageUnreadable, match="No such file") as caught:
        ask(service, "score", tmp_path / "none.jpg")

    assert caught.value.filename == "none.jpg"
    assert not service.requests


@pytest.mark.parametrize("image", ["cat.jpg", io.StringIO("cat")])
def test_what_is_no_image(ask: Ask, image: object) -> None:
    """A name or a file of text is the caller's mistake."""
    with pytest.raises(TypeError, match=r"not .*str"):
        ask(Service(), "score", image)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ImageRejected),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (413, ImageRejected),
        (415, ImageRejected),
        (422, ImageRejected),
        (429, Busy),
        (500, ServerError),
        (503, Busy),
        (504, DeadlineExceeded),
    ],
)
@pytest.mark.parametrize("method", ["score", "gate"])
def test_problems(
    ask: Ask, tmp_path: Path, method: str, status: int, kind: type[NormGateClientError]
) -> None:
    """A problem becomes an error that tells the detail, the status, the request and the file."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"cat")
    service = Service(problem(status, "the image is not one"))

    with pytest.raises(NormGateClientError) as caught:
        ask(service, method, path, {"retries": 0})

    assert type(caught.value) is kind
    assert caught.value.detail == "the image is not one"
    assert caught.value.status == status
    assert caught.value.request_id == "r-3"
    assert str(caught.value) == (
        f"the image is not one (file cat.jpg, status {status}, request r-3)"
    )
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(502, html="<h1>Bad Gateway</h1>"),
        httpx.Response(302, headers={"Location": "/login"}),
        httpx.Response(405, json=["not", "a", "problem"]),
        httpx.Response(200, html="<h1>Log in</h1>"),
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, json={"results": [{"verdict": "perhaps"}]}),
        httpx.Response(200, json=[1]),
    ],
    ids=lambda answer: f"{answer.status_code} {answer.text}",
)
def test_answers_of_something_else(ask: Ask, answer: httpx.Response) -> None:
    """What is neither a result nor a problem is a server's error, with its status."""
    with pytest.raises(ServerError) as caught:
        ask(Service(answer), "score", b"cat")

    assert caught.value.status == answer.status_code


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after(ask: Ask, status: int) -> None:
    """A busy service is asked again no earlier than it said, and little later."""
    service, clock = Service(problem(status, Retry_After="7")), FakeClock()

    result = ask(service, "score", b"cat", {"clock": clock})

    assert result.predictions[0].label == "cat"
    assert [request.content for request in service.requests] == [b"cat", b"cat"]
    [pause] = clock.pauses
    assert 7 <= pause <= 7.1


def test_broken_connections(ask: Ask) -> None:
    """After a broken connection the pauses double, each less up to a half by chance."""
    clock = FakeClock()
    service = Service(
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("dropped"),
        httpx.ReadError("reset"),
        httpx.ConnectTimeout("lost"),
        problem(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
    )

    result = ask(service, "score", b"cat", {"clock": clock})

    assert result.predictions[0].label == "cat"
    assert len(clock.pauses) == 5
    for pause, longest in zip(clock.pauses, [0.1, 0.2, 0.4, 0.8, 1.6], strict=True):
        assert longest / 2 <= pause <= longest


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (problem(429, Retry_After="1"), Busy),
        (httpx.ConnectError("refused"), Unreachable),
    ],
)
def test_retries_are_counted(
    ask: Ask, failure: httpx.Response | httpx.RequestError, kind: type[NormGateClientError]
) -> None:
    """Two retries are three attempts, and then the last failure comes out."""
    service, clock = Service(*[failure] * 9), FakeClock()

    with pytest.raises(kind):
        ask(service, "score", b"cat", {"clock": clock, "retries": 2})

    assert len(service.requests) == 3
    assert len(clock.pauses) == 2


def test_the_budget(ask: Ask) -> None:
    """No pause is begun that would end beyond the budget; the error tells when to come back."""
    service, clock = Service(*[problem(429, Retry_After="8")] * 9), FakeClock()

    with pytest.raises(Busy) as caught:
        ask(service, "score", b"cat", {"clock": clock, "retries": 9, "retry_budget_s": 20})

    assert len(service.requests) == 3
    assert caught.value.retry_after_s == 8


@pytest.mark.parametrize(
    "failure",
    [problem(status) for status in (400, 401, 403, 404, 413, 415, 422, 500, 504)]
    + [httpx.Response(502), httpx.ReadTimeout("silent"), httpx.UnsupportedProtocol("x")],
    ids=str,
)
def test_what_is_not_retried(ask: Ask, failure: httpx.Response | httpx.RequestError) -> None:
    """An image that was refused, a deadline or a failure is final."""
    service, clock = Service(failure), FakeClock()

    with pytest.raises(NormGateClientError):
        ask(service, "score", b"cat", {"clock": clock})

    assert len(service.requests) == 1
    assert not clock.pauses


def test_the_deadline_shrinks(ask: Ask) -> None:
    """Each attempt tells the service what is left of the deadline, and waits little longer."""
    service, clock = Service(problem(503, Retry_After="2")), FakeClock()

    ask(service, "score", b"cat", {"clock": clock}, deadline_s=5)

    first, second = service.requests
    assert first.headers["X-Request-Deadline-Ms"] == "5000"
    assert 2900 <= int(second.headers["X-Request-Deadline-Ms"]) <= 3000
    assert first.extensions["timeout"]["read"] == 6


def test_no_retry_beyond_the_deadline(ask: Ask) -> None:
    """A pause longer than the deadline is not begun."""
    service, clock = Service(problem(503, Retry_After="2")), FakeClock()

    with pytest.raises(Busy):
        ask(service, "gate", b"cat", {"clock": clock}, deadline_s=1.5)

    assert not clock.pauses


@pytest.mark.parametrize(("deadline_s", "kind"), [(0.5, DeadlineExceeded), (None, Unreachable)])
def test_silence(ask: Ask, deadline_s: float | None, kind: type[NormGateClientError]) -> None:
    """No answer in time is the deadline's error where there is one."""
    with pytest.raises(kind, match="no answer"):
        ask(Service(httpx.ReadTimeout("")), "score", b"cat", deadline_s=deadline_s)


def test_many(ask: Ask, tmp_path: Path) -> None:
    """Results come in the order of the images; a failure takes its image's place."""

    def service(request: httpx.Request) -> httpx.Response:
        return problem(415) if request.read() == b"noise" else score_answer(request)

    images: list[Any] = [str(number).encode() for number in range(50)]
    images[20], images[30] = b"noise", tmp_path / "none.jpg"

    results = ask(service, "score_many", iter(images), {"max_concurrency": 4})

    assert len(results) == 50
    assert isinstance(results.pop(30), ImageUnreadable)
    assert isinstance(results.pop(20), ImageRejected)
    labels = [result.predictions[0].label for result in results]
    assert labels == [str(number) for number in range(50) if number not in (20, 30)]


def test_many_of_a_source_that_fails(ask: Ask) -> None:
    """What the iterator itself raises comes out."""

    def images() -> Iterator[bytes]:
        yield b"cat"
        raise EOFError("the archive is cut short")

    with pytest.raises(EOFError, match="cut short"):
        ask(Service(), "score_many", images())


def counted(pulled: list[int]) -> Iterator[bytes]:
    """Images without end, counted as they are taken."""
    while True:
        pulled.append(1)
        yield b"cat"


def test_many_are_read_as_they_are_needed() -> None:
    """Never are more than ``max_concurrency`` images beyond the results taken, in threads."""
    pulled: list[int] = []
    with (
        httpx.Client(transport=httpx.MockTransport(Service())) as http,
        Client(URL, http=http, max_concurrency=3) as client,
    ):
        results = client.score_many(counted(pulled))
        for taken in range(1, 20):
            next(results)
            assert len(pulled) - taken < 3
        results.close()


def test_many_are_read_as_they_are_needed_by_tasks() -> None:
    """Never are more than ``max_concurrency`` images beyond the results taken, in tasks."""
    pulled: list[int] = []

    async def images() -> AsyncIterator[bytes]:
        for image in counted(pulled):
            yield image

    async def scenario() -> None:
        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(Service())) as http,
            AsyncClient(URL, http=http, max_concurrency=3) as client,
        ):
            results = client.score_many(images())
            for taken in range(1, 20):
                await anext(results)
                assert len(pulled) - taken < 3
            await results.aclose()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_many_at_once_in_threads() -> None:
    """Exactly ``max_concurrency`` requests are under way together."""
    together = threading.Barrier(3)

    def service(request: httpx.Request) -> httpx.Response:
        together.wait(DEADLINE_S)  # broken, and the test failed, unless three come
        return score_answer(request)

    assert len(ask_plain(service, "score_many", [b"cat"] * 6, {"max_concurrency": 3})) == 6


def test_many_at_once_in_tasks() -> None:
    """Exactly ``max_concurrency`` requests are under way together; leaving cancels the others."""
    under_way = 0
    three = asyncio.Event()

    async def service(request: httpx.Request) -> httpx.Response:
        nonlocal under_way
        if request.content == b"first":
            await three.wait()
            return score_answer(request)
        under_way += 1
        if under_way == 2:
            three.set()
        try:
            await asyncio.Event().wait()
        finally:
            under_way -= 1
        raise AssertionError("nothing ends this wait but being cancelled")

    async def scenario() -> None:
        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(service)) as http,
            AsyncClient(URL, http=http, max_concurrency=3) as client,
        ):
            results = client.score_many([b"first", *[b"held"] * 9])
            first = await anext(results)
            assert isinstance(first, ImageResult)
            assert under_way == 2
            await results.aclose()
            assert under_way == 0

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_gated() -> None:
    """The function is called for ``id`` with all its arguments, and not called for ``ood``."""
    service = Service(gate_answer(is_ood=False), gate_answer(is_ood=True))
    with (
        httpx.Client(transport=httpx.MockTransport(service)) as http,
        Client(URL, http=http) as client,
    ):

        @client.gated
        def predict(image: bytes, times: int, *, end: str = "") -> str:
            """Its own words."""
            return image.decode() * times + end

        assert assert_type(predict(b"cat", 2, end="!"), str) == "catcat!"
        with pytest.raises(
            OutOfDistribution, match=r"0\.75 is below the threshold 1\.25"
        ) as caught:
            predict(b"cat", 2)

    assert caught.value.result.is_ood
    assert predict.__doc__ == "Its own words."


def test_gated_with_an_answer_for_ood(tmp_path: Path) -> None:
    """``on_ood`` answers instead, from the image and the verdict."""
    service = Service(gate_answer(is_ood=True), gate_answer(is_ood=False))
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"cat")

    def refuse(image: Path, result: GateResult) -> str:
        return f"{image.name} {result.p_value}"

    with (
        httpx.Client(transport=httpx.MockTransport(service)) as http,
        Client(URL, http=http) as client,
    ):

        @client.gated(on_ood=refuse)
        def predict(image: Path) -> int:
            return image.stat().st_size

        assert assert_type(predict(path), int | str) == "cat.jpg 0.01"
        assert predict(path) == 3


def test_gated_coroutines() -> None:
    """Coroutine functions are gated alike."""
    service = Service(*[gate_answer(is_ood=is_ood) for is_ood in (False, True, True)])

    async def scenario() -> None:
        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(service)) as http,
            AsyncClient(URL, http=http) as client,
        ):

            async def predict(image: bytes, times: int) -> str:
                return image.decode() * times

            assert await client.gated(predict)(b"cat", times=2) == "catcat"
            with pytest.raises(OutOfDistribution):
                await client.gated(predict)(b"cat", 2)
            assert await client.gated(on_ood=lambda image, _: image)(predict)(b"cat", 2) == b"cat"

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_gated_files() -> None:
    """A file is refused before the gate has used it up."""
    service = Service()
    with (
        httpx.Client(transport=httpx.MockTransport(service)) as http,
        Client(URL, http=http) as client,
    ):
        predict: Callable[[Any], object] = client.gated(lambda image: image)
        with pytest.raises(TypeError, match="bytes or a Path, not BytesIO"):
            predict(io.BytesIO(b"cat"))

    assert not service.requests


def test_gated_without_a_verdict() -> None:
    """Where the gate fails the function is not called."""
    with (
        httpx.Client(transport=httpx.MockTransport(Service(problem(500)))) as http,
        Client(URL, http=http) as client,
    ):

        @client.gated(on_ood=lambda image, result: "ood")
        def predict(image: bytes) -> str:
            raise AssertionError("called")

        with pytest.raises(ServerError):
            predict(b"cat")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000"}, "http://"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"retries": -1}, "retries=-1"),
        ({"retry_budget_s": -1}, "retry_budget_s=-1"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"api_key": "s3cret\n"}, "api_key"),
    ],
)
def test_options_out_of_bounds(options: dict[str, Any], words: str) -> None:
    """A wrong option is refused by name, and a key is not repeated."""
    with pytest.raises(ValueError, match=words) as caught:
        Client(**{"url": URL} | options)

    assert "s3cret" not in str(caught.value)


def test_a_deadline_out_of_bounds(ask: Ask) -> None:
    """A deadline that has passed already is the caller's mistake."""
    with pytest.raises(ValueError, match="deadline_s is 0"):
        ask(Service(), "score", b"cat", deadline_s=0)


def test_who_closes_the_connections() -> None:
    """The client closes its own httpx client and leaves alone the one it was given."""
    with httpx.Client() as http:
        with Client(URL, http=http):
            pass
        assert not http.is_closed
    with Client(URL) as client:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        client.score(b"cat")


def answer_each(listener: socket.socket, answers: Sequence[bytes]) -> None:
    """Take one connection for each answer, read what comes first, answer, close."""
    for answer in answers:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            connection.recv(65536)
            connection.sendall(answer)


def test_a_connection_that_is_dropped() -> None:
    """A real connection that ends without an answer is made again."""
    refusal = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        server = threading.Thread(target=answer_each, args=(listener, [b"", refusal]))
        server.start()
        clock = FakeClock()
        with (
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", clock=clock) as client,
            pytest.raises(NotFound, match="answered 404 Not Found"),
        ):
            client.score(b"cat")
        server.join(DEADLINE_S)

    assert len(clock.pauses) == 1


def test_nobody_listens() -> None:
    """The error tells the address and how often it was tried, and no password."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

    with (
        Client(f"http://me:s3cret@{address}", clock=FakeClock(), retries=3) as client,
        pytest.raises(Unreachable, match=f"no answer from {address} after 4 attempts") as caught,
    ):
        client.score(b"cat")

    assert "s3cret" not in str(caught.value)


def test_importing_is_cheap() -> None:
    """The client needs none of the service's libraries."""
    program = """
import sys, app.client
print({"torch", "numpy", "fastapi", "pydantic", "PIL"} & set(sys.modules))
"""
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert said.stdout.strip() == "set()"


def test_the_documented_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every program in ``docs/client.md`` runs against a real server and prints what it says."""
    text = (ROOT / "docs" / "client.md").read_text()
    programs = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    monkeypatch.chdir(ROOT)
    with serving() as server:
        for program, output in programs:
            exec(program.replace("http://127.0.0.1:8000", server.url), {"__name__": "__main__"})
            assert capsys.readouterr().out == output

    assert len(programs) == 4
