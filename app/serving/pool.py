"""The models that are loaded: which there are, which answers, and a detector on every device."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from app.core.detector import Detector
from app.errors import BundleError, BundleNotFoundError
from app.serving.metrics import Metrics, ModelMetrics
from app.settings import Settings
from app.store import Bundle, Store


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One model version, ready on every device."""

    bundle: Bundle
    detectors: Mapping[str, Detector]
    metrics: ModelMetrics


class ModelPool:
    """Loaded models by name; the newest version of each is active.

    Args:
        settings: which store, which default model.
        metrics: told of every model loaded.
        devices: the device names of the workers.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, devices: Sequence[str]) -> None:
        self._settings = settings
        self._store = Store(settings.model_store)
        self._metrics = metrics
        self._devices = devices
        self._active: dict[str, LoadedModel] = {}

    def load(self) -> None:
        """Load and warm up the newest version of every model in the store.

        Raises:
            BundleError: a bundle is damaged, or there is none at all, or not the default one.
        """
        names = self._store.names()
        if not names:
            raise BundleError(f"no bundle in model store {self._settings.model_store}")
        if self._settings.model is not None and self._settings.model not in names:
            raise BundleNotFoundError(
                f"no model {self._settings.model!r} in {self._settings.model_store}; "
                f"there are: {', '.join(names)}"
            )
        for name in names:
            self._active[name] = self._load(name)

    def resolve(self, name: str | None = None, version: int | None = None) -> LoadedModel:
        """The model that answers.

        Args:
            name: the default model when None.
            version: the active one when None.

        Raises:
            BundleNotFoundError: it is not loaded.
        """
        name = name or self._settings.model or next(iter(self._active))
        model = self._active.get(name)
        if model is None:
            raise BundleNotFoundError(
                f"no model {name!r} is loaded; there are: {', '.join(self._active)}"
            )
        if version not in (None, model.bundle.version):
            raise BundleNotFoundError(
                f"model {name!r} has no version {version} loaded; it has: {model.bundle.version}"
            )
        return model

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._active.values())

    def __bool__(self) -> bool:
        return bool(self._active)

    def _load(self, name: str) -> LoadedModel:
        started = time.monotonic()
        loaded = self._store.load(name, allowed_factories=self._settings.allowed_factories)
        bundle = loaded.bundle
        detectors = {device: loaded.detector(device=device) for device in self._devices}
        for detector in detectors.values():
            self._warm_up(detector, side=bundle.preprocessing.crop)
        labels = (name, str(bundle.version))
        self._metrics.model_info.labels(*labels, bundle.architecture.id, bundle.block).set(1)
        self._metrics.model_load_seconds.labels(*labels).set(time.monotonic() - started)
        return LoadedModel(
            bundle=bundle,
            detectors=detectors,
            metrics=ModelMetrics(
                self._metrics,
                model=name,
                version=bundle.version,
                threshold=bundle.threshold.value,
            ),
        )

    def _warm_up(self, detector: Detector, *, side: int) -> None:
        """One pass at both ends of the batch sizes, so that no request pays for set-up."""
        for batch_size in (1, self._settings.max_batch_size):
            detector.detect(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))
