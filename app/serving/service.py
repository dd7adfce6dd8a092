"""Scoring as one object: decoders, batcher, workers and models, started and drained."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Coroutine, Sequence
from contextvars import Context
from typing import Any, Final, NamedTuple

from torch import Tensor

from app.core.cores import MOST_PASSES
from app.core.images import Preprocessing
from app.errors import (
    ForwardError,
    ImageError,
    NotReadyError,
    ServingError,
    StoreUnavailableError,
)
from app.serving.batcher import Batcher, DropReason, Places
from app.serving.budget import MemoryBudget
from app.serving.deadlines import Deadlines
from app.serving.decoding import Decoders
from app.serving.drift import DriftMonitor
from app.serving.lag import LoopLag
from app.serving.metrics import Metrics, ScoreMetrics
from app.serving.pool import LoadedModel, ModelPool, Shadow, VersionState
from app.serving.review import ReviewQueue
from app.serving.stages import intervals
from app.serving.statistics import Step
from app.serving.worker import (
    Detection,
    ImageBatcher,
    SpareWorker,
    Work,
    Worker,
    batch_size_of,
    batches_of,
    compute_on,
    computes_in_turn,
    device_names,
    has_spare,
    splits,
)
from app.settings import Settings

logger = logging.getLogger(__name__)


_DECODES_A_THREAD: Final = 4
"""Images of one request that are being decoded, or wait for it, for each thread."""
_SHADOW_BATCHES: Final = 4
"""Batches of images that may be on their way to a shadow; more are not shown to it."""
_LONGEST_PAUSE_S: Final = 10
"""Between two searches of a store that cannot be reached."""
_MOST_DOUBLINGS: Final = 16
_CPU: Final = "cpu"
_LONGEST_IN_LOOP_S: Final = 0.002
"""A pass of one image that the event loop may run: nothing else happens in it meanwhile."""


class _Decoded(NamedTuple):
    """An image ready for a network, or why it is not."""

    data: bytes
    outcome: Tensor | ImageError


class ScoringService:
    """Everything between the bytes of an image and its detection.

    Args:
        settings: sizes, limits and devices.
        metrics: told of every image and stage.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        devices = device_names(settings.devices)
        self._settings = settings
        self._metrics = metrics
        self.models = ModelPool(settings, metrics, devices=devices)
        self._lag = LoopLag()
        self.deadlines = Deadlines()
        self._batcher: ImageBatcher = Batcher(
            max_batch_size=settings.max_batch_size,
            queue_size=settings.queue_size,
            max_wait_s=settings.max_wait_ms / 1000,
            batch_size_of=batch_size_of,
            batches_of=batches_of,
            computes_in_turn=computes_in_turn,
            splits=splits,
            on_drop=self._count_dropped,
            lag_s=lambda: self._lag.seconds,
            deadlines=self.deadlines,
        )
        self.budget = MemoryBudget(
            settings.max_inflight_bytes, retry_after_s=self._batcher.retry_after_s
        )
        self.review: ReviewQueue | None = None
        if settings.review_folder is not None:
            self.review = ReviewQueue(settings, metrics, self.budget)
        spares = {
            device: SpareWorker(device, self._batcher, metrics)
            for device in devices
            if has_spare(device)
        }
        self._workers = [
            Worker(device, self._batcher, metrics, number=number, spare=spares.get(device))
            for device in devices
            for number in range(MOST_PASSES)
        ]
        self._workers += spares.values()
        self._in_loop = Worker(_CPU, self._batcher, metrics)
        self._decoders = Decoders(settings, self.budget)
        self._background: set[asyncio.Task[None]] = set()
        self._is_loaded = False
        self._is_draining = False
        metrics.ready.set_function(self._is_ready)
        metrics.queue_depth.set_function(lambda: self._batcher.depth)
        metrics.inflight_bytes.set_function(lambda: self.budget.used)

    @property
    def is_draining(self) -> bool:
        """Whether the service is about to stop: it answers, and wants no more."""
        return self._is_draining

    def check_ready(self) -> None:
        """Return when the service wants requests.

        Raises:
            NotReadyError: the models are not loaded and warm, a worker makes no progress, or the
                service is draining.
        """
        self._check_loaded()
        if self._is_draining:
            raise NotReadyError("the service is shutting down")
        heartbeat_s = self._settings.heartbeat_s
        if not all(worker.makes_progress(heartbeat_s=heartbeat_s) for worker in self._workers):
            raise NotReadyError(f"a device has made no progress for {heartbeat_s:g} s")

    def _is_ready(self) -> bool:
        try:
            self.check_ready()
        except NotReadyError:
            return False
        return True

    def check_room(self, *, deadline: float) -> None:
        """Return when one more image would be let in now.

        Raises:
            QueueFullError: too many images wait, or too long for the deadline.
            NotReadyError: the service has stopped.
        """
        self._batcher.check_room(deadline=deadline)

    def retry_after_s(self) -> int:
        """When what waits now will have been worked off, in whole seconds; at least 1."""
        return self._batcher.retry_after_s()

    def start(self) -> None:
        """Load and warm up the models, then start the workers. Blocks.

        Raises:
            SettingsError: the review folder cannot be used.
            BundleError: a model cannot be loaded.
        """
        if self.review is not None:
            self.review.open()
        compute_on(self._settings.compute_threads)
        self.models.load()
        for worker in self._workers:
            worker.start()
        self._is_loaded = True

    def drain(self) -> None:
        """Be unready from now on, and answer as before."""
        self._is_draining = True

    def stop(self) -> None:
        """Answer what was accepted, then end the workers. Blocks."""
        was_loaded, self._is_loaded = self._is_loaded, False
        self._batcher.close()
        if was_loaded:
            for worker in self._workers:
                worker.join()
        self._decoders.shutdown()
        if self.review is not None:
            self.review.close()

    async def watch_loop(self) -> None:
        """Measure how late the event loop runs, for ever."""
        await self._lag.watch()

    async def watch_review(self) -> None:
        """Let images kept for review go when their time is over, for ever; if any are kept."""
        if self.review is not None:
            await self.review.watch()

    async def watch_store(self) -> None:
        """Refresh every ``watch_s``, for ever; never where that is 0.

        While the store cannot be reached it is asked less and less often, and told of once.
        """
        watch_s, failures = self._settings.watch_s, 0
        while watch_s:
            await asyncio.sleep(min(watch_s * 2**failures, max(watch_s, _LONGEST_PAUSE_S)))
            try:
                await self.refresh()
            except StoreUnavailableError as error:
                if failures == 0:
                    logger.warning("%s; what is loaded serves on", error)
                failures = min(failures + 1, _MOST_DOUBLINGS)
            except Exception:
                logger.exception("the store could not be searched for new versions")
            else:
                if failures:
                    logger.info("the store is reached again")
                failures = 0

    def model(self, name: str | None = None, version: int | None = None) -> LoadedModel:
        """The model that answers.

        Raises:
            NotReadyError: the models are still loading, or the service has stopped.
            BundleNotFoundError: no such model is loaded.
        """
        self._check_loaded()
        return self.models.resolve(name, version)

    async def activate(self, name: str, version: int | None = None) -> LoadedModel:
        """See :meth:`ModelPool.activate`."""
        self._check_loaded()
        return await asyncio.to_thread(self.models.activate, name, version)

    async def start_shadow(self, name: str, version: int, *, share: float) -> None:
        """See :meth:`ModelPool.start_shadow`."""
        self._check_loaded()
        await asyncio.to_thread(self.models.start_shadow, name, version, share=share)

    async def stop_shadow(self, name: str) -> None:
        """See :meth:`ModelPool.stop_shadow`."""
        self._check_loaded()
        await asyncio.to_thread(self.models.stop_shadow, name)

    async def unload(self, name: str) -> None:
        """See :meth:`ModelPool.unload`."""
        self._check_loaded()
        await asyncio.to_thread(self.models.unload, name)

    async def refresh(self) -> list[VersionState]:
        """See :meth:`ModelPool.refresh`."""
        self._check_loaded()
        return await asyncio.to_thread(self.models.refresh)

    async def score(
        self,
        model: LoadedModel,
        files: Sequence[bytes],
        *,
        deadline: float,
        gate: bool = False,
        must_be_finite: bool = True,
    ) -> list[Detection | ImageError]:
        """One detection an image, or why that image could not be decoded.

        Args:
            model: from :meth:`model`.
            files: at least one image file's bytes.
            deadline: on the clock of ``time.monotonic``.
            gate: verdicts alone, without logits; the network stops where they are known.
            must_be_finite: refuse a score or FeatureNorm that is no finite number, for JSON has
                none; else its image is OOD, as any that makes the network overflow.

        Raises:
            ServingError: the service is full, late or shutting down.
            ForwardError: the forward pass failed, or its score is not finite.
        """
        started = time.monotonic()
        step: Step = "fail"
        try:
            results = await self._score(
                model, files, deadline=deadline, gate=gate, must_be_finite=must_be_finite
            )
            if not any(isinstance(result, ImageError) for result in results):
                step = "success"
        finally:
            model.statistics.observe(step, time.monotonic() - started)
        return results

    async def _score(
        self,
        model: LoadedModel,
        files: Sequence[bytes],
        *,
        deadline: float,
        gate: bool,
        must_be_finite: bool,
    ) -> list[Detection | ImageError]:
        score = self._score_one if len(files) == 1 else self._score_many
        with self._batcher.places(len(files), deadline=deadline) as places:
            images, detections = await score(
                Work(model, is_gate=gate), files, deadline=deadline, places=places
            )
        if must_be_finite and not all(map(_is_finite, detections)):
            raise ForwardError("the network gave a score or a FeatureNorm that is not finite")
        for detection in detections:
            _count(detection, model.metrics, model.drift)
        self._offer_for_review(model, images, detections)
        self._show_to_shadow(model, images, detections)
        found = iter(detections)
        return [
            image.outcome if isinstance(image.outcome, ImageError) else next(found)
            for image in images
        ]

    async def _score_one(
        self, work: Work, files: Sequence[bytes], *, deadline: float, places: Places
    ) -> tuple[Sequence[_Decoded], Sequence[Detection]]:
        """One image, handed by the thread that decodes it to one that runs the network."""
        [data], model, kept = files, work.model, intervals()
        begun = iter([time.monotonic()])
        submission = self._batcher.begin(work, deadline=deadline, places=places)
        decoded: Tensor | None = None

        def observe() -> None:
            for started in begun:  # once, by whoever comes first
                seconds = time.monotonic() - started
                self._metrics.observe_stage("decode", seconds, kept=kept)
                model.statistics.observe("compute_input", seconds)

        def keep(image: Tensor) -> None:
            nonlocal decoded
            decoded = image
            observe()

        def then(image: Tensor) -> None:
            keep(image)
            submission.put(image)

        def then_here(image: Tensor) -> None:
            keep(image)
            if batch := submission.put_or_take(image, _CPU):
                # As in a worker's thread, which is in no request's context: the batch knows whose
                # stages these are.
                Context().run(self._in_loop.answer, batch)

        def otherwise(error: Exception) -> None:
            observe()
            submission.fail(error)

        decoding = self._decoders.start(
            data,
            model.bundle.preprocessing,
            deadline=deadline,
            then=then,
            otherwise=otherwise,
            then_here=then_here if _may_run_in_loop(model) else then,
        )
        try:
            detection = await submission.result()
        except ImageError as error:
            # The frames of its traceback lead back to it: the upload would stay for long.
            return [_Decoded(data, error.with_traceback(None))], []
        finally:
            decoding.cancel()
            observe()
        assert decoded is not None, "a result is of an image"
        return [_Decoded(data, decoded)], [detection]

    async def _score_many(
        self, work: Work, files: Sequence[bytes], *, deadline: float, places: Places
    ) -> tuple[Sequence[_Decoded], Sequence[Detection]]:
        model = work.model
        with model.statistics.timing("compute_input"):
            images = await self._decode_all(files, model.bundle.preprocessing, deadline=deadline)
        ready = [image.outcome for image in images if isinstance(image.outcome, Tensor)]
        if not ready:
            return images, []
        detections = await self._batcher.submit(work, ready, deadline=deadline, places=places)
        return images, detections

    def _check_loaded(self) -> None:
        if not self._is_loaded:
            raise NotReadyError("the models are not loaded yet, or the service is shutting down")

    async def _decode_all(
        self, files: Sequence[bytes], preprocessing: Preprocessing, *, deadline: float
    ) -> Sequence[_Decoded]:
        outcomes = await self._outcomes(files, preprocessing, deadline=deadline)
        for outcome in outcomes:
            if isinstance(outcome, ServingError):
                raise outcome
        return [
            _Decoded(data, outcome)
            for data, outcome in zip(files, outcomes, strict=True)
            if not isinstance(outcome, ServingError)
        ]

    async def _outcomes(
        self, files: Sequence[bytes], preprocessing: Preprocessing, *, deadline: float
    ) -> Sequence[Tensor | ImageError | ServingError]:
        found: dict[int, Tensor | ImageError | ServingError] = {}
        waiting = iter(enumerate(files))

        async def decode_next() -> None:
            for position, data in waiting:
                found[position] = await self._decode(data, preprocessing, deadline=deadline)
                await asyncio.sleep(0)  # tiny images never wait, and others have requests too

        # A few at a time: thousands at once would hold up the event loop, and every other request.
        at_once = min(len(files), _DECODES_A_THREAD * self._settings.decode_threads)
        await asyncio.gather(*[decode_next() for _ in range(at_once)])
        return [found[position] for position in range(len(files))]

    async def _decode(
        self, data: bytes, preprocessing: Preprocessing, *, deadline: float
    ) -> Tensor | ImageError | ServingError:
        started = time.monotonic()
        try:
            return await self._decoders.decode(data, preprocessing, deadline=deadline)
        except (ImageError, ServingError) as error:
            # Returned, so that the neighbours of a failed image come to their own end; without the
            # frames, which lead back to it.
            return error.with_traceback(None)
        finally:
            self._metrics.observe_stage("decode", time.monotonic() - started)

    def _offer_for_review(
        self, model: LoadedModel, images: Sequence[_Decoded], detections: Sequence[Detection]
    ) -> None:
        if self.review is not None:
            scored = [image.data for image in images if isinstance(image.outcome, Tensor)]
            for data, detection in zip(scored, detections, strict=True):
                # What is kept of an image is written as JSON.
                if math.isfinite(detection.score):
                    self.review.offer(model.bundle, data, detection)

    def _show_to_shadow(
        self, model: LoadedModel, images: Sequence[_Decoded], detections: Sequence[Detection]
    ) -> None:
        """Let the shadow of the active version score a share of its images, after the answer."""
        shadow = self.models.shadow_of(model)
        if shadow is None:
            return
        is_alike = shadow.model.bundle.preprocessing == model.bundle.preprocessing
        scored = [image for image in images if isinstance(image.outcome, Tensor)]
        for image, detection in zip(scored, detections, strict=True):
            if random.random() >= shadow.share:
                continue
            if len(self._background) >= _SHADOW_BATCHES * self._settings.max_batch_size:
                self._metrics.shadow_dropped.inc()
                continue
            source = image.outcome if is_alike else image.data
            assert not isinstance(source, ImageError)
            self._in_background(self._score_in_shadow(shadow, source, detection))

    async def _score_in_shadow(
        self, shadow: Shadow, source: Tensor | bytes, detection: Detection
    ) -> None:
        try:
            image = source if isinstance(source, Tensor) else await self._prepare(shadow, source)
            del source  # a whole upload, which no budget counts any more
            [found] = await self._batcher.submit(
                Work(shadow.model, is_gate=True), [image], is_background=True
            )
        except (ImageError, ServingError):
            self._metrics.shadow_dropped.inc()
            return
        _count(found, shadow.metrics, shadow.model.drift)
        if found.verdict != detection.verdict:
            shadow.metrics.disagree(found.verdict)

    async def _prepare(self, shadow: Shadow, data: bytes) -> Tensor:
        preprocessing = shadow.model.bundle.preprocessing
        deadline = time.monotonic() + self._settings.deadline_ms / 1000
        with self.budget.held(len(data)):
            return await self._decoders.decode(data, preprocessing, deadline=deadline)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop keeps only weak references to tasks.
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _count_dropped(self, reason: DropReason, count: int) -> None:
        self._metrics.reject("abandoned" if reason == "abandoned" else "deadline", count)


def _may_run_in_loop(model: LoadedModel) -> bool:
    return (
        model.has_tiny_images
        and list(model.detectors) == [_CPU]
        and model.lone_pass_s <= _LONGEST_IN_LOOP_S
    )


def _is_finite(detection: Detection) -> bool:
    return math.isfinite(detection.score) and math.isfinite(detection.feature_norm)


def _count(detection: Detection, metrics: ScoreMetrics, drift: DriftMonitor) -> None:
    metrics.observe(
        score=detection.score,
        threshold=detection.threshold,
        p_value=detection.p_value,
        verdict=detection.verdict,
    )
    drift.observe(score=detection.score, is_ood=detection.verdict == "ood")
