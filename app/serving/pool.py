"""The models that are loaded: which there are, which answer, which look on as shadows.

Changes are made aside and take effect in one assignment, so that a request sees the models as
they were before a change or as they are after it. A change that fails changes nothing.
"""

import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import structlog
import torch

from app.core.allocator import return_memory
from app.core.cores import (
    are_tiny,
    images_a_pass,
    passes_at_once,
    threads_a_pass,
    usable_cores,
)
from app.core.detector import Detector
from app.core.engines import EngineName
from app.errors import (
    ActivationError,
    BundleError,
    BundleNotFoundError,
    EngineError,
    NoEngineError,
    NoGraphsError,
    StoreUnavailableError,
    UnfitEngineError,
)
from app.serving.drift import DriftMonitor
from app.serving.metrics import Metrics, ScoreMetrics, ShadowMetrics
from app.serving.statistics import ModelStatistics
from app.settings import Settings
from app.store import Bundle, LoadedBundle, Pointer, Store

logger: Final = structlog.get_logger(__name__)

_TIMED_PASSES: Final = 5
"""Of a tiny image; the shortest counts, for the others something else may have held up."""

State = Literal["active", "loaded", "shadow", "stored", "failed"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One model version, ready on every device."""

    bundle: Bundle
    detectors: Mapping[str, Detector]
    metrics: ScoreMetrics
    drift: DriftMonitor
    batch_size: int
    """Most images in one forward pass."""
    has_tiny_images: bool = False
    """So small that threads do not share a pass."""
    lone_pass_s: float = math.inf
    """How long a pass of one image takes; the longest of all devices."""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)


@dataclass(frozen=True)
class Shadow:
    """A version that scores a share of the live images and never answers."""

    model: LoadedModel
    share: float
    metrics: ShadowMetrics


@dataclass(frozen=True)
class _Model:
    """The loaded versions of one model."""

    active: int
    versions: Mapping[int, LoadedModel]
    shadow: Shadow | None = None

    def loaded(self) -> dict[int, LoadedModel]:
        """All of them, the shadow too."""
        shadow = {} if self.shadow is None else {_version(self.shadow.model): self.shadow.model}
        return {**self.versions, **shadow}


@dataclass(frozen=True)
class VersionState:
    """A version in the store or in memory."""

    name: str
    version: int
    state: State
    reason: str = ""
    """Why it could not be loaded."""


@dataclass(frozen=True)
class _Failure:
    """Why a version could not be loaded, and the files it had then."""

    reason: str
    signature: object


@dataclass
class _Search:
    """What earlier searches of the store saw."""

    newest: dict[str, int] = field(default_factory=dict)
    pointers: dict[str, Pointer] = field(default_factory=dict)
    damage: dict[str, str] = field(default_factory=dict)
    """What is wrong with a model's pointer."""
    failures: dict[tuple[str, int], _Failure] = field(default_factory=dict)


class ModelPool:
    """Loaded models by name. Safe in any thread; changes block, and exclude each other.

    Args:
        settings: which store, which default model, how many versions.
        metrics: told of every model loaded and let go.
        devices: the device names of the workers.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, devices: Sequence[str]) -> None:
        self._settings = settings
        self._store = Store(settings.model_store, cache=settings.model_cache)
        self._metrics = metrics
        self._devices = devices
        self._models: Mapping[str, _Model] = {}
        self._search = _Search()
        self._changing = threading.Lock()

    def load(self) -> None:
        """Load and warm up the version in force and the newest others of every model.

        In force is what the store's pointer says, or the newest where it says nothing. A store
        that cannot be reached is replaced by the verified copies on this machine.

        Raises:
            BundleError: a bundle in force is damaged, or there is none at all, or not the default.
            StoreUnavailableError: the store cannot be reached, and there are no copies.
        """
        try:
            self._load_all(self._store)
        except StoreUnavailableError as outage:
            copies = Store(self._store.root)
            if not copies.names():
                raise
            logger.warning("the store cannot be reached, the cache serves", reason=str(outage))
            self._load_all(copies)

    def _load_all(self, store: Store) -> None:
        index = store.index()
        if not index:
            raise BundleError(f"no bundle in model store {store.title}")
        if self._settings.model is not None and self._settings.model not in index:
            raise BundleNotFoundError(
                f"no model {self._settings.model!r} in {store.title}; there are: {', '.join(index)}"
            )
        with self._changing:
            for name, stored in index.items():
                pointer = store.pointer(name)
                active = stored[-1] if pointer is None else pointer.version
                versions = {active: self._load(name, active, store)}
                others = [version for version in stored[::-1] if version != active]
                for version in others[: self._settings.kept_versions - 1]:
                    try:
                        versions[version] = self._load(name, version, store)
                    except StoreUnavailableError:
                        raise
                    except BundleError as error:
                        self._note_failure(name, version, str(error))
                self._search.newest[name] = stored[-1]
                self._note_pointer(name, pointer)
                self._put(name, _Model(active=active, versions=versions))

    def resolve(self, name: str | None = None, version: int | None = None) -> LoadedModel:
        """The model that answers.

        Args:
            name: the default model when None.
            version: the active one when None.

        Raises:
            BundleNotFoundError: it is not loaded.
        """
        models = self._models
        name = name or self.default
        model = models.get(name)
        if model is None:
            known = ", ".join(models) or "none"
            raise BundleNotFoundError(f"no model {name!r} is loaded; there are: {known}")
        version = model.active if version is None else version
        if version not in model.versions:
            known = ", ".join(map(str, sorted(model.versions)))
            raise BundleNotFoundError(
                f"model {name!r} has no version {version} loaded; it has: {known}"
            )
        return model.versions[version]

    def resolve_loaded(self, name: str, version: int | None = None) -> LoadedModel:
        """Like :meth:`resolve`; the shadow may be named too.

        Raises:
            BundleNotFoundError: it is not loaded.
        """
        shadow = self.shadow(name)
        if shadow is not None and _version(shadow.model) == version:
            return shadow.model
        return self.resolve(name, version)

    @property
    def default(self) -> str:
        """The model that answers when a request names none."""
        return self._settings.model or next(iter(self._models), "")

    def names(self) -> list[str]:
        """The loaded models."""
        return list(self._models)

    def loaded_versions(self, name: str) -> list[int]:
        """The versions a request may name, ascending."""
        model = self._models.get(name)
        return [] if model is None else sorted(model.versions)

    def shadow(self, name: str) -> Shadow | None:
        """The version that looks on, if there is one."""
        model = self._models.get(name)
        return None if model is None else model.shadow

    def shadow_of(self, model: LoadedModel) -> Shadow | None:
        """The version that looks on while ``model`` answers, if there is one and it does."""
        now = self._models.get(model.bundle.name)
        return None if now is None or now.versions.get(now.active) is not model else now.shadow

    def state(self, name: str, version: int) -> VersionState:
        """What a version does now; ``stored`` when it is only known to the store, if that."""
        model = self._models.get(name)
        if model is not None:
            if version == model.active:
                return VersionState(name, version, "active")
            if version in model.versions:
                return VersionState(name, version, "loaded")
            if version in model.loaded():
                return VersionState(name, version, "shadow")
        if failure := self._search.failures.get((name, version)):
            return VersionState(name, version, "failed", failure.reason)
        return VersionState(name, version, "stored")

    def index(self) -> list[VersionState]:
        """Every version in the store or in memory, by name and version. Reads the store."""
        stored = {name: set(versions) for name, versions in self._store.index().items()}
        for name, model in self._models.items():
            stored.setdefault(name, set()).update(model.loaded())
        return [
            self.state(name, version) for name in sorted(stored) for version in sorted(stored[name])
        ]

    def engines(self, name: str, version: int) -> list[EngineName]:
        """What runs a version on the devices; nothing while it is not loaded."""
        model = self._models.get(name)
        loaded = {} if model is None else model.loaded()
        if version not in loaded:
            return []
        return sorted({detector.engine for detector in loaded[version].detectors.values()})

    def describe(self, name: str, version: int) -> Bundle:
        """The bundle of a version, from memory or from the store.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: the stored description is damaged.
        """
        model = self._models.get(name)
        loaded = {} if model is None else model.loaded()
        return loaded[version].bundle if version in loaded else self._store.read(name, version)

    def activate(self, name: str, version: int | None = None) -> LoadedModel:
        """Let a version answer from now on; the one before finishes its requests.

        Args:
            name: a model in the store, loaded or not.
            version: the one in force in the store when None.

        Raises:
            BundleNotFoundError: there is no such bundle.
            ActivationError: the bundle cannot serve; what answered before still does.
            StoreUnavailableError: the store cannot be reached, and there is no copy.
        """
        with self._changing:
            version = self._store.current(name) if version is None else version
            loaded = self._loaded_or_new(name, version)
            before = self._models.get(name)
            kept = {} if before is None else dict(before.versions)
            kept[version] = loaded
            shadow = None if before is None else before.shadow
            if shadow is not None and _version(shadow.model) == version:
                shadow = None
            self._put(name, _Model(version, self._newest_of(kept, version), shadow))
        logger.info("model activated", model=name, version=version)
        return loaded

    def start_shadow(self, name: str, version: int, *, share: float) -> None:
        """Let a version score a share of the live images beside the active one.

        Raises:
            BundleNotFoundError: there is no such bundle, or the model is not loaded.
            ActivationError: the bundle cannot serve, or it is the one that answers.
        """
        with self._changing:
            self.resolve(name)
            model = self._models[name]
            if version == model.active:
                raise ActivationError(f"{name}/{version} is active; it cannot be its own shadow")
            loaded = self._loaded_or_new(name, version)
            metrics = ShadowMetrics(
                self._metrics,
                model=name,
                version=version,
            )
            self._put(name, replace(model, shadow=Shadow(loaded, share, metrics)))
        logger.info("shadow started", model=name, version=version, share=share)

    def stop_shadow(self, name: str) -> None:
        """Let the shadow go, if there is one.

        Raises:
            BundleNotFoundError: no such model is loaded.
        """
        with self._changing:
            self.resolve(name)
            self._put(name, replace(self._models[name], shadow=None))

    def unload(self, name: str) -> None:
        """Let every version of a model go, once it has finished its requests.

        Raises:
            BundleNotFoundError: no such model is loaded.
        """
        with self._changing:
            self.resolve(name)
            self._put(name, None)
        logger.info("model unloaded", model=name)

    def refresh(self) -> list[VersionState]:
        """Follow the store's pointers, and do with new versions as the settings say.

        A pointer is followed when it has changed; what an operator activates here holds until
        then. Where there is one, a new version is not activated by itself.

        Returns:
            The new versions and what they are now; one that cannot serve is ``failed``, is told
            why, and is tried again when its files have changed.

        Raises:
            StoreUnavailableError: the store cannot be reached; all goes on as it was.
        """
        found: list[VersionState] = []
        for name, versions in self._store.index().items():
            pointer = self._pointer(name)
            new = [versions[-1]] if self._is_new(name, versions[-1]) else []
            if pointer is not None and self._is_to_follow(name, pointer):
                # A failure is noted where it happened, and told by the state.
                with suppress(ActivationError):
                    self._follow(name, pointer)
                self._note_pointer(name, pointer)
                found.append(self.state(name, pointer.version))
                new = [version for version in new if version != pointer.version]
            for version in new:
                # A version that vanished meanwhile is no version.
                with suppress(ActivationError, BundleNotFoundError):
                    self._welcome(name, version, has_pointer=pointer is not None)
                found.append(self.state(name, version))
            self._search.newest[name] = max(versions[-1], self._search.newest.get(name, 0))
            if pointer is None and name not in self._search.damage:
                self._note_pointer(name, None)
        return found

    def _pointer(self, name: str) -> Pointer | None:
        """The pointer in the store; the one seen last where it is damaged, which is told once."""
        try:
            pointer = self._store.pointer(name)
        except StoreUnavailableError:
            raise
        except BundleError as error:
            if self._search.damage.get(name) != str(error):
                logger.warning("a pointer is not followed", model=name, reason=str(error))
            self._search.damage[name] = str(error)
            return self._search.pointers.get(name)
        self._search.damage.pop(name, None)
        return pointer

    def _is_to_follow(self, name: str, pointer: Pointer) -> bool:
        return pointer != self._search.pointers.get(name) or self._is_mended(name, pointer.version)

    def _follow(self, name: str, pointer: Pointer) -> None:
        try:
            self.activate(name, pointer.version)
        except BundleNotFoundError as error:
            self._note_failure(name, pointer.version, str(error))

    def _note_pointer(self, name: str, pointer: Pointer | None) -> None:
        self._search.pointers.pop(name, None)
        if pointer is not None:
            self._search.pointers[name] = pointer

    def _is_new(self, name: str, version: int) -> bool:
        if (name, version) in self._search.failures:
            return self._is_mended(name, version)
        return version > self._search.newest.get(name, 0)

    def _is_mended(self, name: str, version: int) -> bool:
        failure = self._search.failures.get((name, version))
        return failure is not None and failure.signature != self._store.signature(name, version)

    def _welcome(self, name: str, version: int, *, has_pointer: bool) -> None:
        policy = self._settings.on_new_version
        if policy == "shadow" and name in self._models:
            self.start_shadow(name, version, share=self._settings.shadow_share)
        elif policy == "report" or has_pointer:
            logger.info("new version found", model=name, version=version)
        else:
            self.activate(name, version)

    def _note_failure(self, name: str, version: int, reason: str) -> None:
        signature = None
        with suppress(StoreUnavailableError):
            signature = self._store.signature(name, version)
        self._search.failures[name, version] = _Failure(reason, signature)
        logger.warning("version cannot serve", model=name, version=version, reason=reason)

    def _loaded_or_new(self, name: str, version: int) -> LoadedModel:
        model = self._models.get(name)
        loaded = {} if model is None else model.loaded()
        if version in loaded:
            return loaded[version]
        try:
            return self._load(name, version, self._store)
        except (BundleNotFoundError, StoreUnavailableError):
            raise
        except BundleError as error:
            reason = str(error)
        except Exception as error:  # whatever a bundle does, the service goes on without it
            logger.exception("version failed to load", model=name, version=version)
            reason = f"bundle {name}/{version} failed to load: {type(error).__name__}"
        self._note_failure(name, version, reason)
        answering = "" if model is None else f"; version {model.active} answers as before"
        raise ActivationError(reason + answering)

    def _newest_of(
        self, versions: Mapping[int, LoadedModel], active: int
    ) -> Mapping[int, LoadedModel]:
        others = sorted((version for version in versions if version != active), reverse=True)
        kept = {active, *others[: self._settings.kept_versions - 1]}
        return {version: versions[version] for version in sorted(kept)}

    def _put(self, name: str, model: _Model | None) -> None:
        """Replace what is loaded of one model; all readers see it at once."""
        before = self._models.get(name)
        changed = {**self._models, name: model}
        self._models = {key: value for key, value in changed.items() if value is not None}
        now = {} if model is None else model.loaded()
        for version, loaded in ({} if before is None else before.loaded()).items():
            if version not in now:
                self._let_go(loaded)
        self._tell_metrics(name)

    def _tell_metrics(self, name: str) -> None:
        model = self._models.get(name)
        loaded = () if model is None else model.loaded()
        self._metrics.set_roles(
            name, {version: self.state(name, version).state for version in loaded}
        )

    def _let_go(self, model: LoadedModel) -> None:
        bundle = model.bundle
        self._metrics.forget(bundle)
        self._metrics.drift.remove(model.drift)
        # The last request that holds it lets it go; only then is there memory to return.
        weakref.finalize(model, _return_memory_soon, bundle.name, bundle.version)

    def _load(self, name: str, version: int, store: Store) -> LoadedModel:
        started = time.monotonic()
        stored = self._read(name, version, store)
        bundle = stored.bundle
        batch_size, side = self._settings.max_batch_size, bundle.preprocessing.crop
        if "cpu" in self._devices:
            batch_size = min(batch_size, images_a_pass(side))
        detectors = {
            device: self._detector(stored, device, batch_size=batch_size)
            for device in self._devices
        }
        lone_pass_s = max(
            _warm_up(detector, batch_size=batch_size, side=side) for detector in detectors.values()
        )
        drift = DriftMonitor(
            stored.calibration_scores,
            threshold=bundle.threshold,
            model=name,
            version=version,
            bound=self._settings.drift_false_alarm_bound,
        )
        self._metrics.drift.add(drift)
        self._metrics.remember(
            bundle,
            load_seconds=time.monotonic() - started,
            engines={detector.engine for detector in detectors.values()},
        )
        self._search.failures.pop((name, version), None)
        return LoadedModel(
            bundle=bundle,
            detectors=detectors,
            metrics=ScoreMetrics(
                self._metrics.scores,
                model=name,
                version=version,
            ),
            drift=drift,
            batch_size=batch_size,
            has_tiny_images=are_tiny(side),
            lone_pass_s=lone_pass_s,
        )

    def _read(self, name: str, version: int, store: Store) -> LoadedBundle:
        allowed = self._settings.allowed_factories
        try:
            return store.load(name, version, allowed_factories=allowed)
        except StoreUnavailableError as outage:
            try:
                copy = Store(store.root).load(name, version, allowed_factories=allowed)
            except BundleNotFoundError:
                raise outage from None
            logger.warning("version loaded from the cache", model=name, reason=str(outage))
            return copy

    def _detector(self, stored: LoadedBundle, device: str, *, batch_size: int) -> Detector:
        """A detector on the engine that the settings want; torch where another cannot run it."""
        detector = stored.detector(device=device)
        wanted = self._settings.engine
        if wanted == "torch":
            return detector
        if wanted == "onnxruntime" and device != "cpu":
            raise EngineError(f"onnxruntime runs networks on the CPU, not on {device}")
        try:
            if device != "cpu":
                return stored.on_cuda_graphs(detector, device=device, batch_size=batch_size)
            cores = self._settings.compute_threads or usable_cores()
            is_shared = threads_a_pass(stored.bundle.preprocessing.crop) > 1
            threads, passes = cores if is_shared else 1, passes_at_once(cores)
            return stored.on_onnxruntime(detector, threads=threads, passes=passes)
        except EngineError as error:
            if wanted == "onnxruntime":
                raise
            is_expected = isinstance(error, NoEngineError | NoGraphsError | UnfitEngineError)
            log = logger.info if is_expected else logger.warning
            log("torch runs the network", device=device, reason=str(error))
            return detector


def _warm_up(detector: Detector, *, batch_size: int, side: int) -> float:
    """Passes at both ends of the batch sizes, so that no request pays for set-up.

    Returns:
        The seconds that one image takes after that, when nothing else disturbs it.
    """
    for size in (batch_size, 1):
        images = torch.zeros(size, 3, side, side, dtype=torch.uint8)
        detector.detect(images)
        detector.judge(images)
    # Once for large images: that they take long is what matters.
    return min(_seconds(detector, images) for _ in range(_TIMED_PASSES if are_tiny(side) else 1))


def _seconds(detector: Detector, images: torch.Tensor) -> float:
    started = time.monotonic()
    detector.detect(images)
    return time.monotonic() - started


def _version(model: LoadedModel) -> int:
    return model.bundle.version


def _return_memory_soon(name: str, version: int) -> None:
    # In a thread of its own: this runs wherever the last reference went away.
    threading.Thread(target=_return_memory, args=(name, version), daemon=True).start()


def _return_memory(name: str, version: int) -> None:
    return_memory()
    logger.info("version let go", model=name, version=version)
