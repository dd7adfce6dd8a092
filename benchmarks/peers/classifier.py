"""The classifier that every peer serves, as a user of that peer would write it, and as ours.

``documented`` decodes with Pillow, prepares with torchvision's transforms and reads FeatureNorm
with a forward hook. ``ours`` decodes and scores with NormGate's own code, so that what is left to
compare is the server. Both answer alike.
"""

import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from app.core.images import load
from app.core.networks import build, load_weights
from app.store import Bundle, LoadedBundle, Store
from benchmarks.bench.detectors import served

MAX_BATCH_SIZE: Final = 32
"""Images in one forward pass, the same for every server."""
Answer = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a peer's process is told in its environment."""

    store: Path
    model: str
    variant: str
    port: int
    workers: int
    threads: int
    device: str

    @classmethod
    def read(cls) -> "Options":
        """The options of this process."""
        read = os.environ
        return cls(
            store=Path(read["PEER_STORE"]),
            model=read["PEER_MODEL"],
            variant=read["PEER_VARIANT"],
            port=int(read["PEER_PORT"]),
            workers=int(read["PEER_WORKERS"]),
            threads=int(read["PEER_THREADS"]),
            device=read["PEER_DEVICE"],
        )


class Classifier(Protocol):
    """Bytes to tensors, and tensors to answers; safe in any thread."""

    def prepare(self, data: bytes) -> Tensor:
        """An image ready for :meth:`answer`."""

    def answer(self, images: Sequence[Tensor]) -> list[Answer]:
        """One answer an image, in order."""


def classifier(options: Options) -> Classifier:
    """The classifier of the variant that is asked for."""
    torch.set_num_threads(options.threads)
    loaded = Store(options.store).load(options.model)
    kind = Ours if options.variant == "ours" else Documented
    return kind(loaded, device=options.device)


class Documented:
    """Pillow, torchvision's transforms, an eager network and a hook."""

    def __init__(self, loaded: LoadedBundle, *, device: str) -> None:
        bundle = loaded.bundle
        self._bundle = bundle
        self._calibration_scores = loaded.calibration_scores
        self._transform = _transform(bundle)
        self._network = build(bundle.architecture)
        load_weights(self._network, loaded.weights)
        self._network.eval().to(device)
        self._device = device
        self._of_thread = threading.local()
        self._network.get_submodule(bundle.block).register_forward_hook(self._read)

    def prepare(self, data: bytes) -> Tensor:
        """``[3, crop, crop]`` float32, normalised."""
        prepared: Tensor = self._transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return prepared

    def answer(self, images: Sequence[Tensor]) -> list[Answer]:
        """Passes of at most ``MAX_BATCH_SIZE`` images."""
        return [
            answer
            for start in range(0, len(images), MAX_BATCH_SIZE)
            for answer in self._pass(images[start : start + MAX_BATCH_SIZE])
        ]

    def _read(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._of_thread.norms = torch.linalg.vector_norm(output.relu(), dim=(2, 3)).mean(dim=1)

    def _batch(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(self._device)

    def _pass(self, images: Sequence[Tensor]) -> list[Answer]:
        with torch.inference_mode():
            probabilities = self._network(self._batch(images)).softmax(dim=1)
            best, indices = probabilities.max(dim=1)
        scores = self._of_thread.norms.cpu().numpy()
        ranks = np.searchsorted(self._calibration_scores, scores, side="right")
        p_values = (1 + ranks) / (len(self._calibration_scores) + 1)
        rows = zip(scores.tolist(), p_values.tolist(), indices.tolist(), best.tolist(), strict=True)
        return [_answer(self._bundle, *row) for row in rows]


class Ours:
    """NormGate's decoder and detector."""

    def __init__(self, loaded: LoadedBundle, *, device: str) -> None:
        self._bundle = loaded.bundle
        self._detector = served(loaded, device=device)
        self._passes = threading.Semaphore(self._detector.passes)

    def prepare(self, data: bytes) -> Tensor:
        """``[3, crop, crop]`` uint8."""
        return load(data, self._bundle.preprocessing)

    def answer(self, images: Sequence[Tensor]) -> list[Answer]:
        """Passes of at most ``MAX_BATCH_SIZE`` images."""
        return [
            answer
            for start in range(0, len(images), MAX_BATCH_SIZE)
            for answer in self._pass(images[start : start + MAX_BATCH_SIZE])
        ]

    def _pass(self, images: Sequence[Tensor]) -> list[Answer]:
        with self._passes:
            found = self._detector.detect(torch.stack(list(images)))
        exponentials = np.exp(found.logits - found.logits.max(axis=1, keepdims=True))
        best = exponentials.max(axis=1) / exponentials.sum(axis=1)
        indices = found.logits.argmax(axis=1)
        rows = zip(
            found.scores.tolist(),
            found.p_values.tolist(),
            indices.tolist(),
            best.tolist(),
            strict=True,
        )
        return [_answer(self._bundle, *row) for row in rows]


def _transform(bundle: Bundle) -> Any:
    """As torchvision's documentation prepares images for its networks, with the bundle's sizes."""
    preprocessing = bundle.preprocessing
    return transforms.Compose(
        [
            transforms.Resize(preprocessing.resize),
            transforms.CenterCrop(preprocessing.crop),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )


def _answer(bundle: Bundle, score: float, p_value: float, index: int, probability: float) -> Answer:
    threshold = bundle.threshold.value
    return {
        "verdict": "ood" if score < threshold else "id",
        "feature_norm": score,
        "score": score,
        "threshold": threshold,
        "p_value": p_value,
        "predictions": [
            {"label": bundle.labels[index], "index": index, "probability": probability}
        ],
    }
