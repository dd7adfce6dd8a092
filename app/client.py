"""A typed client of the service, for plain and for asyncio programs.

Results are frozen dataclasses. What can go wrong is one tree, beside which ``OutOfDistribution``
stands alone, since a verdict is not a failure::

    NormGateClientError
    ├── ImageUnreadable     the file could not be read; nothing was sent
    ├── ImageRejected       400, 413, 415, 422: the service does not take this image or request
    ├── Unauthorized        401: no API key, or an unknown one
    ├── Forbidden           403: the key does not open this route
    ├── NotFound            404: no such model, version or route
    ├── Busy                429, 503: still no room, or not ready, after the retries
    ├── DeadlineExceeded    504, or no answer within ``deadline_s``
    ├── NoVerdict           the gate is set to let pass what it cannot judge, and could not
    ├── ServerError         the server failed, or what answered is not NormGate
    └── Unreachable         no connection, a broken one, or no answer within ``timeout_s``

Nothing is imported beside httpx, of NormGate neither: a project that does not want the service's
dependencies may copy this file.
"""

import asyncio
import functools
import math
import random
import re
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import (
    Any,
    Concatenate,
    Final,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    overload,
)

import httpx

_BUSY: Final = (429, 503)
_RETRIED: Final = (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError)
"""A server that is silent for ``timeout_s`` is not among them: it has enough to do."""
_FIRST_BACKOFF_S: Final = 0.1
_LONGEST_BACKOFF_S: Final = 5.0
_DEADLINE_GRACE_S: Final = 1.0
"""How much longer than a deadline to listen, for the server's own 504."""


class BinaryFile(Protocol):
    """A file opened for reading bytes."""

    def read(self) -> bytes:
        """All that is left of it."""


Image = bytes | Path | BinaryFile
"""An encoded image, or where it is."""

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Result = TypeVar("Result")
Answer = TypeVar("Answer")
Fallback = TypeVar("Fallback")
GatedImage = TypeVar("GatedImage", bound=bytes | Path)
Rest = ParamSpec("Rest")


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The verdict on one image; true where the image may pass.

    Args:
        verdict: ``id``, ``ood``, or ``uncertain`` where the model knows that; it may pass.
        feature_norm: FeatureNorm of the selected block.
        score: compared with the threshold; high means in-distribution.
        threshold: of the model that answered.
        p_value: share of calibration images at least as odd as this one.
        model: the model that answered.
        version: of that model.
        request_id: names the request in the service's logs.
        filename: of the image that was sent; ``None`` for bytes.
    """

    verdict: Literal["id", "uncertain", "ood"]
    feature_norm: float
    score: float
    threshold: float
    p_value: float
    model: str
    version: int
    request_id: str | None
    filename: str | None

    @property
    def is_ood(self) -> bool:
        """Whether the classifier was not trained for images like this one."""
        return self.verdict == "ood"

    def __bool__(self) -> bool:
        # ``if client.gate(image):`` must not let everything pass.
        return not self.is_ood


@dataclass(frozen=True)
class Prediction:
    """One label the classifier considers."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class ImageResult(GateResult):
    """The verdict on one image, and the classifier's predictions, most probable first."""

    predictions: tuple[Prediction, ...]


class OutOfDistribution(Exception):
    """A gated function was not called: the image is out of distribution."""

    def __init__(self, result: GateResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        result = self.result
        return f"score {result.score:.4g} is below the threshold {result.threshold:.4g}"


class NormGateClientError(Exception):
    """There is no verdict on an image.

    Args:
        detail: one line, the service's own where it gave one.
        status: of the response; ``None`` where there was none.
        request_id: names the request in the service's logs.
        filename: of the image; ``None`` for bytes.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        filename: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.request_id = request_id
        self.filename = filename

    def __str__(self) -> str:
        facts = {"file": self.filename, "status": self.status, "request": self.request_id}
        known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        return f"{self.detail} ({known})" if known else self.detail


class ImageUnreadable(NormGateClientError):
    """The file could not be read; nothing was sent."""


class ImageRejected(NormGateClientError):
    """The service does not take this image or request."""


class Unauthorized(NormGateClientError):
    """No API key, or an unknown one."""


class Forbidden(NormGateClientError):
    """The key does not open this route."""


class NotFound(NormGateClientError):
    """No such model, version or route."""


class Busy(NormGateClientError):
    """Still no room, or not ready, after the retries."""

    retry_after_s: float | None = None
    """When the service expects to have room, where it says so."""


class DeadlineExceeded(NormGateClientError):
    """The deadline passed before the answer."""


class NoVerdict(NormGateClientError):
    """The gate is set to let pass what it cannot judge, and could not judge this image."""


class ServerError(NormGateClientError):
    """The server failed, or what answered is not NormGate."""


class Unreachable(NormGateClientError):
    """No connection, a broken one, or no answer in time."""


_ERRORS: Final[Mapping[int, type[NormGateClientError]]] = {
    400: ImageRejected,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: ImageRejected,
    415: ImageRejected,
    422: ImageRejected,
    429: Busy,
    503: Busy,
    504: DeadlineExceeded,
}


class Clock:
    """The machine's time; a test passes its own."""

    def now(self) -> float:
        """Seconds since any fixed moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the thread."""
        time.sleep(seconds)

    async def sleep_async(self, seconds: float) -> None:
        """Let other tasks run meanwhile."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class _File:
    """An image as it is sent."""

    data: bytes
    filename: str | None


@dataclass(frozen=True)
class _Route(Generic[Result]):
    """A route, and how its answer reads."""

    path: str
    parse: Callable[[httpx.Response, str | None], Result]


@dataclass(frozen=True)
class _Policy:
    """How long and how often to try."""

    timeout_s: float
    retries: int
    retry_budget_s: float
    clock: Clock


@dataclass(frozen=True)
class _Call(Generic[Result]):
    """All that stays the same from one attempt to the next."""

    route: _Route[Result]
    url: str
    params: Mapping[str, str | int]
    headers: Mapping[str, str]
    file: _File
    deadline_s: float | None


class _Exchange(Generic[Result]):
    """One image's way to its result: the attempts, the pauses between them, and the end."""

    def __init__(self, call: _Call[Result], policy: _Policy) -> None:
        self._call, self._policy = call, policy
        self._started = policy.clock.now()
        self._attempts = 0

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The next attempt; a deadline says how much of it is left."""
        self._attempts += 1
        call, timeout_s, headers = self._call, self._policy.timeout_s, dict(self._call.headers)
        if call.deadline_s is not None:
            left_s = max(call.deadline_s - self._elapsed_s(), 0.001)
            timeout_s = left_s + _DEADLINE_GRACE_S
            headers["X-Request-Deadline-Ms"] = str(math.ceil(left_s * 1000))
        return http.build_request(
            "POST",
            call.url + call.route.path,
            params=call.params,
            headers=headers,
            content=call.file.data,
            timeout=timeout_s,
        )

    def pause_s(self, answer: httpx.Response | httpx.RequestError) -> float | None:
        """How long to wait before the next attempt; ``None``: this answer is the last."""
        pause_s = _wanted_pause_s(answer, attempts=self._attempts)
        if pause_s is None or self._attempts > self._policy.retries:
            return None
        budget_s = min(self._policy.retry_budget_s, self._call.deadline_s or math.inf)
        return pause_s if self._elapsed_s() + pause_s <= budget_s else None

    def result(self, answer: httpx.Response | httpx.RequestError) -> Result:
        """What the last answer says.

        Raises:
            NormGateClientError: it is no result.
        """
        filename = self._call.file.filename
        if isinstance(answer, httpx.RequestError):
            raise self._unanswered(answer) from answer
        if not _is_verdict(answer):
            raise _error(answer, filename)
        try:
            return self._call.route.parse(answer, filename)
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"the answer cannot be read: {error!r}",
                status=answer.status_code,
                request_id=_request_id(answer),
                filename=filename,
            ) from error

    def _unanswered(self, error: httpx.RequestError) -> NormGateClientError:
        call, reason = self._call, str(error) or type(error).__name__
        if call.deadline_s is not None and isinstance(error, httpx.TimeoutException):
            detail = f"no answer within the deadline of {call.deadline_s:g} s"
            return DeadlineExceeded(detail, filename=call.file.filename)
        tried = "" if self._attempts == 1 else f" after {self._attempts} attempts"
        # The address alone: a URL may hold a password.
        address = httpx.URL(call.url).netloc.decode()
        return Unreachable(
            f"no answer from {address}{tried}: {reason}", filename=call.file.filename
        )

    def _elapsed_s(self) -> float:
        return self._policy.clock.now() - self._started


def _wanted_pause_s(answer: httpx.Response | httpx.RequestError, *, attempts: int) -> float | None:
    """The pause that the answer calls for; ``None`` where another attempt would not help."""
    backoff_s = min(_FIRST_BACKOFF_S * 2 ** (attempts - 1), _LONGEST_BACKOFF_S)
    # Clients that failed together must not come back together.
    backoff_s *= random.uniform(0.5, 1)
    if isinstance(answer, httpx.RequestError):
        return backoff_s if isinstance(answer, _RETRIED) else None
    if answer.status_code not in _BUSY:
        return None
    told_s = _retry_after_s(answer)
    return backoff_s if told_s is None else told_s + random.uniform(0, _FIRST_BACKOFF_S)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds; a date, which only a proxy would send, counts as nothing said."""
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}", value) else None


def _is_verdict(response: httpx.Response) -> bool:
    """Whether the image was judged; a 403 of the gate is told from a refused key by its header."""
    return response.status_code == 200 or (
        response.status_code == 403 and "X-NormGate-Verdict" in response.headers
    )


def _error(response: httpx.Response, filename: str | None) -> NormGateClientError:
    """The error that a response stands for, a problem of NormGate's or a proxy's page."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    detail = problem.get("detail") if isinstance(problem, dict) else None
    error = _ERRORS.get(response.status_code, ServerError)(
        str(detail or f"answered {response.status_code} {response.reason_phrase}"),
        status=response.status_code,
        request_id=_request_id(response),
        filename=filename,
    )
    if isinstance(error, Busy):
        error.retry_after_s = _retry_after_s(response)
    return error


def _request_id(response: httpx.Response) -> str | None:
    request_id: str | None = response.headers.get("X-Request-ID")
    return request_id


def _parse_score(response: httpx.Response, filename: str | None) -> ImageResult:
    body = response.json()
    [found] = body["results"]
    return ImageResult(
        **_judged(found, response, filename),
        model=str(body["model"]),
        version=int(body["version"]),
        predictions=tuple(
            Prediction(str(each["label"]), int(each["index"]), float(each["probability"]))
            for each in found["predictions"]
        ),
    )


def _parse_gate(response: httpx.Response, filename: str | None) -> GateResult:
    prefix = "x-normgate-"
    found = {
        name.removeprefix(prefix).replace("-", "_"): value
        for name, value in response.headers.items()
        if name.startswith(prefix)
    }
    if found.get("verdict") == "unknown":
        raise NoVerdict(
            found.get("error", "the gate could not judge the image"),
            status=response.status_code,
            request_id=_request_id(response),
            filename=filename,
        )
    return GateResult(
        **_judged(found, response, filename),
        model=found["model"],
        version=int(found["version"]),
    )


_VERDICTS: Final = ("id", "uncertain", "ood")


def _judged(
    found: Mapping[str, Any], response: httpx.Response, filename: str | None
) -> dict[str, Any]:
    if found["verdict"] not in _VERDICTS:
        raise ValueError(f"verdict is {found['verdict']!r}; it must be one of {_VERDICTS}")
    numbers = ("feature_norm", "score", "threshold", "p_value")
    return {
        "verdict": found["verdict"],
        "request_id": _request_id(response),
        "filename": filename,
    } | {name: float(found[name]) for name in numbers}


_SCORE: Final = _Route("/v1/score", _parse_score)
_GATE: Final = _Route("/v1/gate", _parse_gate)


def _read(image: Image) -> _File:
    """The bytes of an image.

    Raises:
        ImageUnreadable: the file could not be read.
        TypeError: not an image, or a file that holds text.
    """
    if isinstance(image, bytes):
        return _File(image, None)
    if not isinstance(image, Path) and not hasattr(image, "read"):
        raise TypeError(f"an image is bytes, a Path or a file, not {type(image).__name__}")
    name = image if isinstance(image, Path) else getattr(image, "name", None)
    filename = Path(name).name if isinstance(name, str | Path) else None
    try:
        data = image.read_bytes() if isinstance(image, Path) else image.read()
    except OSError as error:
        raise ImageUnreadable(f"cannot read the image: {error}", filename=filename) from error
    if not isinstance(data, bytes):
        raise TypeError(f"an image file is opened for bytes, not for {type(data).__name__}")
    return _File(data, filename)


def _read_or_error(image: Image) -> _File | ImageUnreadable:
    try:
        return _read(image)
    except ImageUnreadable as error:
        return error


async def _each(
    images: Iterable[Image] | AsyncIterable[Image],
) -> AsyncGenerator[_File | ImageUnreadable, None]:
    """Every image, read in a thread of its own, one at a time."""
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield await asyncio.to_thread(_read_or_error, image)
    else:
        for image in images:
            yield await asyncio.to_thread(_read_or_error, image)


def _rereadable(image: bytes | Path) -> bytes | Path:
    """The image, if the gated function can still read it after the gate.

    Raises:
        TypeError: it is a file.
    """
    if not isinstance(image, bytes | Path):
        raise TypeError(f"a gated function takes bytes or a Path, not {type(image).__name__}")
    return image


def _refuse(image: bytes | Path, result: GateResult) -> NoReturn:
    raise OutOfDistribution(result)


class _Base(Generic[Http]):
    """What both clients share: the options, and how a call is put together."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        version: int | None = None,
        timeout_s: float = 15.0,
        retries: int = 5,
        retry_budget_s: float = 30.0,
        max_concurrency: int = 8,
        http: Http | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError("url must start with http:// or https://")
        if api_key is not None and re.fullmatch(r"[\x21-\x7e]+", api_key) is None:
            raise ValueError("api_key must be printable ASCII without spaces")
        if timeout_s <= 0 or retries < 0 or retry_budget_s < 0 or max_concurrency < 1:
            raise ValueError(
                f"{timeout_s=} must be above 0, {retries=} and {retry_budget_s=} at least 0, "
                f"{max_concurrency=} at least 1"
            )
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/octet-stream"}
        if api_key is not None:
            self._headers["X-API-Key"] = api_key
        chosen = {"model": model, "version": version}
        self._params = {name: value for name, value in chosen.items() if value is not None}
        self._policy = _Policy(timeout_s, retries, retry_budget_s, clock or Clock())
        self._max_concurrency = max_concurrency
        self._is_owner = http is None
        self._http: Http = self._open() if http is None else http

    def _open(self) -> Http:
        raise NotImplementedError

    def _exchange(
        self,
        route: _Route[Result],
        file: _File,
        *,
        deadline_s: float | None,
        **params: int,
    ) -> _Exchange[Result]:
        if deadline_s is not None and deadline_s <= 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be above 0")
        params_of_all = {**self._params, **params}
        call = _Call(route, self._url, params_of_all, self._headers, file, deadline_s)
        return _Exchange(call, self._policy)

    @property
    def _limits(self) -> httpx.Limits:
        # No bound on connections: a call must not fail for want of one.
        return httpx.Limits(max_connections=None, max_keepalive_connections=self._max_concurrency)


class Client(_Base[httpx.Client]):
    """Asks a NormGate service; may be shared by threads.

    A busy service (429, 503) is asked again when its ``Retry-After`` says, a broken connection
    after a pause that doubles; scoring changes nothing, so asking twice is safe. Nothing else is
    asked again.

    Args:
        url: of the service, such as ``http://127.0.0.1:8000``.
        api_key: where the service asks for one.
        model: default: the service's default model.
        version: default: the active one.
        timeout_s: longest silence of the service; replaced by a call's ``deadline_s``.
        retries: attempts after the first.
        retry_budget_s: no retry begins later than this after the first attempt.
        max_concurrency: most requests of one ``score_many`` at once.
        http: sends the requests, for TLS or proxies of your own, and is yours to close.
        clock: the time that pauses and deadlines are measured by.
    """

    def _open(self) -> httpx.Client:
        return httpx.Client(limits=self._limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._is_owner:
            self._http.close()

    def score(
        self, image: Image, *, top_k: int = 1, deadline_s: float | None = None
    ) -> ImageResult:
        """The verdict on an image and its ``top_k`` predictions.

        Args:
            image: encoded, in any format the service accepts.
            top_k: predictions wanted.
            deadline_s: longest time to the answer, retries included; the service gives up by
                then too, and refuses a deadline above its own bound.

        Raises:
            NormGateClientError: there is none.
        """
        return self._score(_read(image), top_k=top_k, deadline_s=deadline_s)

    def gate(self, image: Image, *, deadline_s: float | None = None) -> GateResult:
        """The verdict on an image, for less work than ``score``.

        Raises:
            NormGateClientError: there is none.
        """
        return self._ask(self._exchange(_GATE, _read(image), deadline_s=deadline_s))

    def score_many(
        self, images: Iterable[Image], *, top_k: int = 1, deadline_s: float | None = None
    ) -> Generator[ImageResult | NormGateClientError, None, None]:
        """The result of each image, in order, or its own error.

        ``images`` is read as results are taken: at most ``max_concurrency`` images are held at
        once. An image that fails yields its error, with its ``filename``, and the others go on;
        what ``images`` itself raises ends it. Leaving early waits for the requests under way.

        Args:
            images: as ``score`` takes them; any iterator.
            top_k: predictions wanted for each.
            deadline_s: longest time to each answer.
        """

        def outcome(file: _File | ImageUnreadable) -> ImageResult | NormGateClientError:
            if isinstance(file, ImageUnreadable):
                return file
            try:
                return self._score(file, top_k=top_k, deadline_s=deadline_s)
            except NormGateClientError as error:
                return error

        waiting: deque[Future[ImageResult | NormGateClientError]] = deque()
        with ThreadPoolExecutor(self._max_concurrency) as pool:
            try:
                for image in images:
                    # Read here, one by one: members of one archive share its position.
                    waiting.append(pool.submit(outcome, _read_or_error(image)))
                    if len(waiting) == self._max_concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @overload
    def gated(
        self, predict: Callable[Concatenate[GatedImage, Rest], Answer], /
    ) -> Callable[Concatenate[GatedImage, Rest], Answer]: ...

    @overload
    def gated(
        self, predict: None = None, /, *, on_ood: Callable[[GatedImage, GateResult], Fallback]
    ) -> Callable[
        [Callable[Concatenate[GatedImage, Rest], Answer]],
        Callable[Concatenate[GatedImage, Rest], Answer | Fallback],
    ]: ...

    def gated(
        self,
        predict: Callable[..., Any] | None = None,
        /,
        *,
        on_ood: Callable[[Any, GateResult], Any] = _refuse,
    ) -> Callable[..., Any]:
        """A function that calls ``predict`` only for images that are in distribution.

        A decorator, with ``on_ood`` or without. The image, bytes or a ``Path``, is the first
        positional argument. Where there is no verdict the error comes out and ``predict`` is not
        called.

        Args:
            predict: any function of an image, and maybe of more.
            on_ood: answers in its place for an image that is out of distribution, from the image
                and the verdict.

        Raises:
            OutOfDistribution: when called with such an image and without ``on_ood``.
        """
        if predict is None:
            return functools.partial(self._gated, on_ood=on_ood)
        return self._gated(predict, on_ood=on_ood)

    def _gated(
        self, predict: Callable[..., Any], *, on_ood: Callable[[Any, GateResult], Any]
    ) -> Callable[..., Any]:
        @functools.wraps(predict)
        def gated_predict(image: bytes | Path, /, *args: Any, **kwargs: Any) -> Any:
            result = self.gate(_rereadable(image))
            return on_ood(image, result) if result.is_ood else predict(image, *args, **kwargs)

        return gated_predict

    def _score(self, file: _File, *, top_k: int, deadline_s: float | None) -> ImageResult:
        return self._ask(self._exchange(_SCORE, file, deadline_s=deadline_s, top_k=top_k))

    def _ask(self, exchange: _Exchange[Result]) -> Result:
        while True:
            answer: httpx.Response | httpx.RequestError
            try:
                answer = self._http.send(exchange.request(self._http))
            except httpx.RequestError as error:
                answer = error
            pause_s = exchange.pause_s(answer)
            if pause_s is None:
                return exchange.result(answer)
            self._policy.clock.sleep(pause_s)


class AsyncClient(_Base[httpx.AsyncClient]):
    """``Client`` for asyncio programs: the same options, methods and errors."""

    def _open(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(limits=self._limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        if self._is_owner:
            await self._http.aclose()

    async def score(
        self, image: Image, *, top_k: int = 1, deadline_s: float | None = None
    ) -> ImageResult:
        """As ``Client.score``; files are read in a thread."""
        file = await asyncio.to_thread(_read, image)
        return await self._score(file, top_k=top_k, deadline_s=deadline_s)

    async def gate(self, image: Image, *, deadline_s: float | None = None) -> GateResult:
        """As ``Client.gate``."""
        file = await asyncio.to_thread(_read, image)
        return await self._ask(self._exchange(_GATE, file, deadline_s=deadline_s))

    async def score_many(
        self,
        images: Iterable[Image] | AsyncIterable[Image],
        *,
        top_k: int = 1,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[ImageResult | NormGateClientError, None]:
        """As ``Client.score_many``; ``images`` may be an asynchronous iterator too.

        Leaving early cancels the requests under way.
        """

        async def outcome(file: _File | ImageUnreadable) -> ImageResult | NormGateClientError:
            if isinstance(file, ImageUnreadable):
                return file
            try:
                return await self._score(file, top_k=top_k, deadline_s=deadline_s)
            except NormGateClientError as error:
                return error

        waiting: deque[asyncio.Task[ImageResult | NormGateClientError]] = deque()
        try:
            async for file in _each(images):
                waiting.append(asyncio.create_task(outcome(file)))
                if len(waiting) == self._max_concurrency:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    @overload
    def gated(
        self, predict: Callable[Concatenate[GatedImage, Rest], Awaitable[Answer]], /
    ) -> Callable[Concatenate[GatedImage, Rest], Coroutine[Any, Any, Answer]]: ...

    @overload
    def gated(
        self, predict: None = None, /, *, on_ood: Callable[[GatedImage, GateResult], Fallback]
    ) -> Callable[
        [Callable[Concatenate[GatedImage, Rest], Awaitable[Answer]]],
        Callable[Concatenate[GatedImage, Rest], Coroutine[Any, Any, Answer | Fallback]],
    ]: ...

    def gated(
        self,
        predict: Callable[..., Awaitable[Any]] | None = None,
        /,
        *,
        on_ood: Callable[[Any, GateResult], Any] = _refuse,
    ) -> Callable[..., Any]:
        """As ``Client.gated``, for a coroutine function; ``on_ood`` is a plain one."""
        if predict is None:
            return functools.partial(self._gated, on_ood=on_ood)
        return self._gated(predict, on_ood=on_ood)

    def _gated(
        self, predict: Callable[..., Awaitable[Any]], *, on_ood: Callable[[Any, GateResult], Any]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        @functools.wraps(predict)
        async def gated_predict(image: bytes | Path, /, *args: Any, **kwargs: Any) -> Any:
            result = await self.gate(_rereadable(image))
            return on_ood(image, result) if result.is_ood else await predict(image, *args, **kwargs)

        return gated_predict

    async def _score(self, file: _File, *, top_k: int, deadline_s: float | None) -> ImageResult:
        return await self._ask(self._exchange(_SCORE, file, deadline_s=deadline_s, top_k=top_k))

    async def _ask(self, exchange: _Exchange[Result]) -> Result:
        while True:
            answer: httpx.Response | httpx.RequestError
            try:
                answer = await self._http.send(exchange.request(self._http))
            except httpx.RequestError as error:
                answer = error
            pause_s = exchange.pause_s(answer)
            if pause_s is None:
                return exchange.result(answer)
            await self._policy.clock.sleep_async(pause_s)
