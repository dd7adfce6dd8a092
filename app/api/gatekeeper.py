"""The verdict on a whole request, as the gate and the proxy pass it on."""

import math
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from fastapi import Request

from app.api.access_log import describe_results
from app.api.deadline import in_time
from app.api.dependencies import metrics_of, service_of, settings_of
from app.api.disconnect import unless_disconnected
from app.api.problems import REASONS
from app.api.upload import files_in, read_bytes
from app.errors import (
    BusyError,
    DeadlineExceededError,
    ForwardError,
    ImageError,
    MalformedRequestError,
    NormGateError,
    NotReadyError,
)
from app.serving.metrics import Metrics
from app.serving.pool import LoadedModel
from app.serving.service import ScoringService
from app.serving.worker import Detection
from app.settings import Settings

HEADER_PREFIX: Final = "x-normgate-"
_NO_VERDICT: Final = (ImageError, BusyError, NotReadyError, DeadlineExceededError, ForwardError)
"""What keeps an image from being judged; other errors are the client's, and never let it pass."""
_ODDEST_FIRST: Final = ("ood", "uncertain", "id")
_LONGEST_LINE: Final = 200


@dataclass(frozen=True)
class Verdict:
    """What is known of a request's images: of the oddest one, if there are several.

    ``uncertain`` images pass, and say so. ``none``: there are no images. ``unknown``: they could
    not be judged.
    """

    name: Literal["id", "uncertain", "ood", "none", "unknown"]
    details: Mapping[str, str]

    @property
    def headers(self) -> dict[str, str]:
        """All of it as ``x-normgate-*`` headers."""
        fields = {"verdict": self.name, **self.details}
        return {HEADER_PREFIX + name: value for name, value in fields.items()}

    @property
    def reason(self) -> str:
        """One line for the client whose image is ``ood``."""
        score, threshold = self.details["score"], self.details["threshold"]
        found = f"{score} is below the threshold {threshold}"
        if not math.isfinite(float(score)):
            found = f"is {score}"
        return f"an image is not one the classifier was trained for: its score {found}"


NO_IMAGES: Final = Verdict("none", {})


class Gatekeeper:
    """Reads requests and judges their images.

    Args:
        service: scores the images.
        settings: limits, and what becomes of images without a verdict.
        metrics: told of every request.
    """

    def __init__(self, service: ScoringService, settings: Settings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics

    async def read(self, request: Request, *, deadline: float) -> bytes:
        """The request's body.

        Raises:
            RequestTooLargeError: it has more bytes than the limit.
            DeadlineExceededError: it had not arrived by then.
        """
        started = time.monotonic()
        async with in_time(request, deadline):
            body = await read_bytes(request, max_bytes=self._settings.max_upload_bytes)
        self._metrics.observe_stage("read", time.monotonic() - started)
        return body

    async def judge(
        self,
        request: Request,
        body: bytes | None = None,
        *,
        deadline: float,
        model: str | None = None,
        version: int | None = None,
    ) -> Verdict:
        """The verdict on the images in ``body``; ``ood`` if one of them is.

        Args:
            request: whose headers say what the body is, and whose client may go away.
            body: from :meth:`read`; None reads it.
            deadline: on the clock of ``time.monotonic``.
            model: the default model when None.
            version: the active one when None.

        Raises:
            BundleNotFoundError: no such model is loaded.
            MalformedRequestError: the body is empty, or not the form it says it is.
            RequestTooLargeError: it has more bytes than the limit.
            NormGateError: an image could not be judged, and the settings say ``closed``.
        """
        started = time.monotonic()
        with self._metrics.in_flight.track_inprogress():
            verdict = await self._or_unknown(
                self._judge(request, body, deadline=deadline, model=model, version=version)
            )
        self._metrics.observe_stage("total", time.monotonic() - started)
        return verdict

    async def _or_unknown(self, judging: Coroutine[Any, Any, Verdict]) -> Verdict:
        try:
            return await judging
        except _NO_VERDICT as error:
            if self._settings.gate_on_failure == "closed":
                raise
            self._metrics.reject(REASONS.get(type(error), "failed"))
            return Verdict("unknown", {"error": _safe_line(error)})

    async def _judge(
        self,
        request: Request,
        body: bytes | None,
        *,
        deadline: float,
        model: str | None,
        version: int | None,
    ) -> Verdict:
        loaded = self._service.model(model, version)
        if body is None:
            body = await self.read(request, deadline=deadline)
        if not body:
            raise MalformedRequestError("the body is empty; send an image")
        files = await files_in(request.headers, body)
        results = await unless_disconnected(
            request,
            self._service.score(loaded, files, deadline=deadline, gate=True, must_be_finite=False),
        )
        describe_results(request, loaded, results)
        detections = [result for result in results if isinstance(result, Detection)]
        lowest = min(detections, key=_rank, default=None)
        if lowest is None or not lowest.is_ood:
            for result in results:
                if isinstance(result, ImageError):
                    raise result
        assert lowest is not None, "without detections there are errors"
        return _verdict(lowest, loaded)


def gatekeeper_of(request: Request) -> Gatekeeper:
    """What judges a request."""
    return Gatekeeper(service_of(request), settings_of(request), metrics_of(request))


def _rank(detection: Detection) -> tuple[int, float]:
    """The oddest image first: by verdict, then by score."""
    return _ODDEST_FIRST.index(detection.verdict), detection.score


def _verdict(detection: Detection, model: LoadedModel) -> Verdict:
    bundle = model.bundle
    return Verdict(
        detection.verdict,
        {
            "score": str(detection.score),
            "threshold": str(detection.threshold),
            "p-value": str(detection.p_value),
            "feature-norm": str(detection.feature_norm),
            "model": bundle.name,
            "version": str(bundle.version),
        },
    )


def _safe_line(error: NormGateError) -> str:
    """The error's message as printable ASCII: a client's text may be quoted in it."""
    line = "".join(char if " " <= char <= "~" else "?" for char in str(error))
    return line[:_LONGEST_LINE].strip()
