"""Tensors of the Open Inference Protocol V2: requests read and responses written.

With the binary tensor data extension the values of a tensor may stand behind the JSON object, in
the order of the tensors: little-endian numbers, or for ``BYTES`` each element behind its length in
4 bytes. The header ``Inference-Header-Content-Length`` then tells where the JSON object ends.
"""

import base64
import json
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import MalformedRequestError
from app.serving.worker import Detection

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
INPUT: Final = "image"
MAX_IMAGES: Final = 10_000
MAX_TOP_K: Final = 1000

OutputName = Literal[
    "verdict",
    "score",
    "feature_norm",
    "threshold",
    "p_value",
    "label",
    "probability",
    "index",
    "logits",
]
Datatype = Literal["BYTES", "FP32", "FP64", "INT64"]

OUTPUTS: Final[Sequence[OutputName]] = get_args(OutputName)
OF_THE_LOGITS: Final = frozenset[OutputName]({"label", "probability", "index", "logits"})
"""Outputs that need the whole network; for the others it may stop at the selected block."""
DATATYPES: Final[Mapping[OutputName, Datatype]] = {
    "verdict": "BYTES",
    "score": "FP32",
    "feature_norm": "FP32",
    "threshold": "FP32",
    "p_value": "FP64",
    "label": "BYTES",
    "probability": "FP32",
    "index": "INT64",
    "logits": "FP32",
}

_LITTLE_ENDIAN: Final[Mapping[Datatype, str]] = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8"}
_LENGTH: Final = struct.Struct("<I")
_MAX_VALUES: Final = 2 * MAX_IMAGES

Model = TypeVar("Model", bound=BaseModel)


class Body(BaseModel):
    """A JSON object of the protocol; members that are not the protocol's own are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class Parameters(BaseModel):
    """Parameters of a request or tensor; one the service does not know is refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class InputParameters(Parameters):
    """``binary_data_size``: the tensor stands behind the JSON, in so many bytes."""

    binary_data_size: int | None = Field(None, ge=0)


class InputTensor(Body):
    """The encoded images, JPEG, PNG, WebP, GIF or BMP files."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[int], Field(min_length=1, max_length=2, examples=[[1]])] = Field(
        description="`[N]` or `[N, 1]`."
    )
    parameters: InputParameters | None = None
    data: list[str] | list[Annotated[list[str], Field(min_length=1, max_length=1)]] | None = Field(
        None, description="Files in base64, unless they follow in binary."
    )


class OutputParameters(Parameters):
    """``binary_data``: whether the values follow the JSON; overrides the request's setting."""

    binary_data: bool | None = None


class RequestedOutput(Body):
    """One output that is wanted."""

    name: OutputName
    parameters: OutputParameters | None = None


class RequestParameters(Parameters):
    """Parameters of the whole request."""

    binary_data_output: bool | None = Field(
        None, description="Whether the outputs' values follow the JSON in binary."
    )
    top_k: int = Field(1, ge=1, le=MAX_TOP_K, description="Columns of label, probability, index.")
    timeout: int | None = Field(
        None, ge=0, description="Microseconds; shortens the deadline. 0: the server's own."
    )


class InferBody(Body):
    """The JSON object of an inference request."""

    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[RequestedOutput] | None = Field(None, description="Default: all of them.")
    parameters: RequestParameters | None = None


@dataclass(frozen=True)
class InferRequest:
    """What an inference request asks for."""

    images: Sequence[bytes]
    is_binary: Mapping[OutputName, bool]
    """The wanted outputs, in order, and whether each is to be binary."""
    id: str | None = None
    top_k: int = 1
    timeout_s: float | None = None


@dataclass(frozen=True)
class OutputTensor:
    """A named tensor ``[N]`` or ``[N, columns]``: text for ``BYTES``, numbers otherwise."""

    name: OutputName
    values: NDArray[Any]

    @property
    def datatype(self) -> Datatype:
        """As the protocol calls it."""
        return DATATYPES[self.name]

    def __bytes__(self) -> bytes:
        if self.datatype == "BYTES":
            return write_elements(text.encode() for text in self.values.flat)
        return self.values.astype(_LITTLE_ENDIAN[self.datatype]).tobytes()


def read_request(body: bytes, *, header_length: str | None) -> InferRequest:
    """The inference request in a body.

    Args:
        body: JSON, or JSON and binary tensors. With a header length of 0 the whole body is one
            image and every output is wanted in binary: Triton's raw binary request.
        header_length: the value of ``Inference-Header-Content-Length``, None without the header.

    Raises:
        MalformedRequestError: the body is not a request for this service.
    """
    head, tail = _split(body, header_length)
    if header_length is not None and not head:
        return InferRequest(images=[body], is_binary=dict.fromkeys(OUTPUTS, True))
    parsed = read_json(InferBody, bytes(head))
    parameters = parsed.parameters or RequestParameters()
    return InferRequest(
        images=_images(parsed.inputs[0], tail),
        is_binary=_wanted(parsed.outputs, is_binary=bool(parameters.binary_data_output)),
        id=parsed.id,
        top_k=parameters.top_k,
        timeout_s=parameters.timeout / 1e6 if parameters.timeout else None,
    )


def read_json(model: type[Model], text: bytes) -> Model:
    """A JSON object of the protocol.

    Raises:
        MalformedRequestError: it is no JSON, or not what ``model`` describes.
    """
    # Each value but the first of its list follows a comma: this bounds what parsing may build.
    if text.count(b",") > _MAX_VALUES:
        raise MalformedRequestError(f"the JSON has more than {_MAX_VALUES} values, the limit")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = " ".join(map(str, first["loc"]))
        value = "" if first["type"] == "json_invalid" else f" is {reprlib.repr(first['input'])}"
        raise MalformedRequestError(f"{where or 'the body'}{value}: {first['msg']}") from error


def read_elements(buffer: memoryview, *, count: int) -> list[bytes]:
    """The ``count`` elements of a binary ``BYTES`` tensor.

    Raises:
        MalformedRequestError: ``buffer`` does not hold so many elements, or holds more.
    """
    elements, offset = [], 0
    for index in range(count):
        start = offset + _LENGTH.size
        if start > len(buffer):
            raise MalformedRequestError(
                f"element {index} of {INPUT!r} has no length: {len(buffer) - offset} of "
                f"{_LENGTH.size} bytes are left"
            )
        offset = start + _LENGTH.unpack_from(buffer, offset)[0]
        if offset > len(buffer):
            raise MalformedRequestError(
                f"element {index} of {INPUT!r} has {offset - start} bytes; "
                f"{len(buffer) - start} are left"
            )
        elements.append(bytes(buffer[start:offset]))
    if offset < len(buffer):
        raise MalformedRequestError(
            f"{len(buffer) - offset} bytes follow the {count} elements of {INPUT!r}"
        )
    return elements


def write_elements(elements: Iterable[bytes]) -> bytes:
    """A binary ``BYTES`` tensor."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def output_tensors(
    detections: Sequence[Detection],
    names: Iterable[OutputName],
    *,
    labels: Sequence[str],
    top_k: int,
) -> list[OutputTensor]:
    """The tensors ``names``, in that order.

    Args:
        detections: of ``N`` images, with logits where ``names`` has any of ``OF_THE_LOGITS``.
        names: the outputs that are wanted.
        labels: one a class.
        top_k: columns of label, probability and index; at most one a class.
    """
    wanted = list(names)
    columns: dict[OutputName, NDArray[Any]] = {
        "verdict": np.array([one.verdict for one in detections]),
        "score": np.array([one.score for one in detections], np.float32),
        "feature_norm": np.array([one.feature_norm for one in detections], np.float32),
        "threshold": np.array([one.threshold for one in detections], np.float32),
        "p_value": np.array([one.p_value for one in detections], np.float64),
    }
    if OF_THE_LOGITS.intersection(wanted):
        logits = np.stack([one.logits for one in detections if one.logits is not None])
        columns |= _predictions(logits, labels, top_k=top_k)
    return [OutputTensor(name, columns[name]) for name in wanted]


def write_response(
    tensors: Iterable[OutputTensor],
    request: InferRequest,
    *,
    model_name: str,
    model_version: int,
) -> tuple[bytes, int | None]:
    """The body of an inference response, and the length of its JSON if binary tensors follow."""
    outputs: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for tensor in tensors:
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.values.shape),
        }
        if request.is_binary[tensor.name]:
            tails.append(bytes(tensor))
            output["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            output["data"] = tensor.values.flatten().tolist()
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": str(model_version)}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = outputs
    head = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([head, *tails]), len(head) if tails else None


def _split(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[len(body) :]
    # The count of digits keeps int() quick.
    if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 20):
        raise MalformedRequestError(
            f"{HEADER_LENGTH} is {header_length[:50]!r}; it must be a number of bytes"
        )
    length = int(header_length)
    if length > len(body):
        raise MalformedRequestError(f"{HEADER_LENGTH} is {length}; the body has {len(body)} bytes")
    return view[:length], view[length:]


def _images(tensor: InputTensor, tail: memoryview) -> list[bytes]:
    count = _count(tensor.shape)
    size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
    if size is not None and tensor.data is not None:
        raise MalformedRequestError(f"{INPUT!r} has both data and binary_data_size")
    if len(tail) != (size or 0):
        raise MalformedRequestError(
            f"{len(tail)} bytes follow the JSON; binary_data_size of {INPUT!r} is {size or 0}"
        )
    if size is not None:
        return read_elements(tail, count=count)
    if tensor.data is None:
        raise MalformedRequestError(f"{INPUT!r} has neither data nor binary_data_size")
    elements: Sequence[str | list[str]] = tensor.data
    if len(elements) != count:
        raise MalformedRequestError(
            f"{INPUT!r} has {len(elements)} elements; its shape is {tensor.shape}"
        )
    return [_from_base64(element, index) for index, element in enumerate(elements)]


def _count(shape: Sequence[int]) -> int:
    if shape[1:] not in ([], [1]):
        raise MalformedRequestError(f"shape of {INPUT!r} is {shape}; it must be [N] or [N, 1]")
    if not 1 <= shape[0] <= MAX_IMAGES:
        raise MalformedRequestError(
            f"shape of {INPUT!r} is {shape}; the first must be 1 to {MAX_IMAGES}"
        )
    return shape[0]


def _from_base64(element: str | list[str], index: int) -> bytes:
    text = element if isinstance(element, str) else element[0]
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MalformedRequestError(
            f"element {index} of {INPUT!r} is no base64: {error}"
        ) from error


def _wanted(
    outputs: Sequence[RequestedOutput] | None, *, is_binary: bool
) -> Mapping[OutputName, bool]:
    if not outputs:
        return dict.fromkeys(OUTPUTS, is_binary)
    wanted: dict[OutputName, bool] = {}
    for output in outputs:
        if output.name in wanted:
            raise MalformedRequestError(f"output {output.name!r} is asked for twice")
        own = output.parameters.binary_data if output.parameters is not None else None
        wanted[output.name] = is_binary if own is None else own
    return wanted


def _predictions(
    logits: NDArray[np.float32], labels: Sequence[str], *, top_k: int
) -> dict[OutputName, NDArray[Any]]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return {
        "label": np.array(labels)[best],
        "probability": np.take_along_axis(probabilities, best, axis=1).astype(np.float32),
        "index": best.astype(np.int64),
        "logits": logits,
    }
