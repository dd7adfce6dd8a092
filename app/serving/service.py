"""Scoring as one object: decode threads, batcher, workers and models, started and drained."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from app.core.images import load
from app.errors import ImageError, NotReadyError
from app.serving.batcher import Batcher, DropReason
from app.serving.metrics import Metrics
from app.serving.pool import LoadedModel, ModelPool
from app.serving.worker import Detection, ImageBatcher, Worker, device_names
from app.settings import Settings


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
        self._batcher: ImageBatcher = Batcher(
            max_batch_size=settings.max_batch_size,
            queue_size=settings.queue_size,
            max_wait_s=settings.max_wait_ms / 1000,
            on_drop=self._count_dropped,
        )
        self._workers = [Worker(device, self._batcher, metrics) for device in devices]
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._is_ready = False
        metrics.queue_depth.set_function(lambda: self._batcher.depth)

    @property
    def is_ready(self) -> bool:
        """Whether the models are loaded and warm, and the service is not draining."""
        return self._is_ready

    def start(self) -> None:
        """Load and warm up the models, then start the workers. Blocks.

        Raises:
            BundleError: a model cannot be loaded.
        """
        self.models.load()
        for worker in self._workers:
            worker.start()
        self._is_ready = True

    def stop(self) -> None:
        """Answer what was accepted, then end the workers. Blocks."""
        was_ready, self._is_ready = self._is_ready, False
        self._batcher.close()
        if was_ready:
            for worker in self._workers:
                worker.join()
        self._decoders.shutdown()

    def model(self, name: str | None = None, version: int | None = None) -> LoadedModel:
        """The model that answers.

        Raises:
            NotReadyError: the models are still loading, or the service is shutting down.
            BundleNotFoundError: no such model is loaded.
        """
        if not self._is_ready:
            raise NotReadyError("the models are not loaded yet, or the service is shutting down")
        return self.models.resolve(name, version)

    async def score(
        self, model: LoadedModel, files: Sequence[bytes], *, deadline: float
    ) -> list[Detection | ImageError]:
        """One detection an image, or why that image could not be decoded.

        Args:
            model: from :meth:`model`.
            files: at least one image file's bytes.
            deadline: on the clock of ``time.monotonic``.

        Raises:
            ServingError: the service is full, late or shutting down.
        """
        images = await asyncio.gather(*(self._decode(data, model) for data in files))
        decoded = [image for image in images if isinstance(image, Tensor)]
        detections = iter(
            await self._batcher.submit(model, decoded, deadline=deadline) if decoded else []
        )
        results = [image if isinstance(image, ImageError) else next(detections) for image in images]
        for result in results:
            if isinstance(result, Detection):
                model.metrics.observe(
                    score=result.score, p_value=result.p_value, is_ood=result.is_ood
                )
        return results

    async def _decode(self, data: bytes, model: LoadedModel) -> Tensor | ImageError:
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        try:
            return await loop.run_in_executor(self._decoders, self._load, data, model)
        except ImageError as error:
            return error
        finally:
            self._metrics.observe_stage("decode", time.monotonic() - started)

    def _load(self, data: bytes, model: LoadedModel) -> Tensor:
        return load(data, model.bundle.preprocessing, max_pixels=self._settings.max_pixels)

    def _count_dropped(self, reason: DropReason, count: int) -> None:
        self._metrics.reject("abandoned" if reason == "abandoned" else "deadline", count)
