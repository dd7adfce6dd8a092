"""mosec: decoding processes, then batching ones.

``documented`` follows the PyTorch vision example of mosec's documentation (mosecorg.github.io/
mosec/examples/pytorch.html): JSON with base64 in, a ``Preprocess`` stage, an ``Inference`` stage
with dynamic batching. Its decoder there is OpenCV's with a resize of its own; here it is Pillow's
with torchvision's transforms, so that every peer sees the same pixels. ``ours`` reads the raw body
through ``deserialize``, which mosec documents for that.
"""

import base64
import os
import sys
from typing import Any

from mosec import Server, Worker
from torch import Tensor

from benchmarks.peers.classifier import MAX_BATCH_SIZE, Answer, Options, classifier
from benchmarks.peers.framing import unpack

OPTIONS = Options.read()


class Preprocess(Worker):  # type: ignore[misc]
    """Images to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._model = classifier(OPTIONS)

    def deserialize(self, data: bytes) -> Any:
        """The body, or the object it holds."""
        return data if OPTIONS.variant == "ours" else super().deserialize(data)

    def forward(self, data: Any) -> list[Any]:
        """The images of one request, as arrays."""
        if OPTIONS.variant == "ours":
            images = unpack(data)
        else:
            images = [base64.b64decode(image) for image in data["images"]]
        return [self._model.prepare(image).numpy() for image in images]


class Inference(Worker):  # type: ignore[misc]
    """Arrays to answers, a batch of requests at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._model = classifier(OPTIONS)

    def forward(self, data: list[list[Any]]) -> list[dict[str, list[Answer]]]:
        """One answer a request."""
        import torch

        images: list[Tensor] = [torch.from_numpy(image) for request in data for image in request]
        answers = iter(self._model.answer(images))
        return [{"results": [next(answers) for _ in request]} for request in data]


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(OPTIONS.port), "--timeout", "60000"]
    sys.argv += ["--capacity", "4096", "--log-level", "error"]
    # A stage's processes find this module where the parent did.
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    server = Server()
    server.append_worker(Preprocess, num=2, env=[environment] * 2)
    server.append_worker(
        Inference,
        num=OPTIONS.workers,
        max_batch_size=MAX_BATCH_SIZE,
        env=[environment] * OPTIONS.workers,
    )
    server.run()
