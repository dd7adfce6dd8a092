"""LitServe: requests are decoded and batched in worker processes.

``documented`` follows LitServe's pages "Speed up serving by 200x" and "Batching" (lightning.ai/
docs/litserve/speed-up-serving-by-200x, .../features/batching): JSON with base64 in, dynamic
batching, ``workers_per_device``. ``ours`` differs in the decoder and the detector alone: LitServe
reads JSON and forms, no raw bodies.
"""

import base64
from typing import Any, Final

import litserve as ls
from torch import Tensor

from benchmarks.peers.classifier import MAX_BATCH_SIZE, Answer, Options, classifier

OPTIONS = Options.read()
BATCH_TIMEOUT_S: Final = 0.01


class ImageClassifier(ls.LitAPI):  # type: ignore[misc]
    """One request holds one or more images."""

    def setup(self, device: str) -> None:
        """Load the network, once a process."""
        self._model = classifier(OPTIONS)

    def decode_request(self, request: dict[str, Any]) -> list[Tensor]:
        """The images of one request."""
        return [self._model.prepare(base64.b64decode(image)) for image in request["images"]]

    def batch(self, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        """Requests as they are: they may hold several images."""
        return inputs

    def predict(self, inputs: list[list[Tensor]]) -> list[list[Answer]]:
        """The answers to a batch of requests."""
        answers = iter(self._model.answer([image for request in inputs for image in request]))
        return [[next(answers) for _ in request] for request in inputs]

    def unbatch(self, output: list[list[Answer]]) -> list[list[Answer]]:
        """One list of answers a request."""
        return output

    def encode_response(self, output: list[Answer]) -> dict[str, Any]:
        """The body of one response."""
        return {"results": output}


if __name__ == "__main__":
    api = ImageClassifier(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
    server = ls.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=OPTIONS.workers,
        timeout=60,
    )
    server.run(
        host="127.0.0.1",
        port=OPTIONS.port,
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
