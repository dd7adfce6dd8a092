"""MLServer: a custom runtime with adaptive batching, over JSON of the V2 protocol.

After MLServer's pages "Custom Inference Runtimes", "Adaptive Batching" and "Parallel Inference"
(docs.seldon.ai/mlserver/user-guide): the ``MLModel`` runs in worker processes, and requests of one
or more base64 images are grouped along their first dimension. ``ours`` differs in the decoder and
the detector alone.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.classifier import MAX_BATCH_SIZE, Options, classifier

MAX_BATCH_TIME_S: Final = 0.01
_NUMBERS: Final = ("feature_norm", "score", "threshold", "p_value", "index", "probability")


class ImageClassifier(MLModel):  # type: ignore[misc]
    """Images in, one output a field of the answer."""

    async def load(self) -> bool:
        """Load the network."""
        self._model = classifier(Options.read())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One row an image in every output."""
        images = Base64Codec.decode_input(payload.inputs[0])
        answers = self._model.answer([self._model.prepare(image) for image in images])
        rows = [answer | answer["predictions"][0] for answer in answers]
        return InferenceResponse(
            model_name=self.name,
            outputs=[
                *(StringCodec.encode_output(name, _column(rows, name)) for name in _TEXTS),
                *(_numbers(rows, name) for name in _NUMBERS),
            ],
        )


_TEXTS: Final = ("verdict", "label")


def _column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _numbers(rows: list[dict[str, Any]], name: str) -> Any:
    import numpy as np

    return NumpyCodec.encode_output(name, np.array(_column(rows, name)).reshape(-1, 1))


def write_settings(folder: Path, options: Options) -> None:
    """The two files that ``mlserver start`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    server = {
        "host": "127.0.0.1",
        "http_port": options.port,
        "grpc_port": options.port + 1,
        "metrics_port": options.port + 2,
        "parallel_workers": options.workers,
        "metrics_dir": str(folder / "metrics"),
        "debug": False,
    }
    model = {
        "name": "classifier",
        "implementation": "benchmarks.peers.mlserver_runtime.ImageClassifier",
        "max_batch_size": MAX_BATCH_SIZE,
        "max_batch_time": MAX_BATCH_TIME_S,
    }
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))


if __name__ == "__main__":
    settings = Path(os.environ["PEER_FOLDER"])
    write_settings(settings, Options.read())
    command = Path(sys.executable).with_name("mlserver")
    os.execv(command, [str(command), "start", str(settings)])
