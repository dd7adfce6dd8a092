"""Requests and tensors of the Open Inference Protocol V2."""

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.tensors import (
    DATATYPES,
    MAX_IMAGES,
    OUTPUTS,
    InferRequest,
    OutputName,
    OutputTensor,
    output_tensors,
    read_elements,
    read_request,
    write_elements,
    write_response,
)
from app.errors import MalformedRequestError
from app.serving.worker import Detection

ABSENT: Any = object()

images = st.lists(st.binary(max_size=50), min_size=1, max_size=5)


def one_input(**changes: Any) -> dict[str, Any]:
    """A JSON request for an image of the bytes ``image``, with members of its tensor changed."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aW1hZ2U="]} | changes
    return {"inputs": [{key: value for key, value in tensor.items() if value is not ABSENT}]}


def binary(
    elements: bytes, *, count: int = 1, size: int | None = None, **members: Any
) -> tuple[bytes, str]:
    """A binary request's body and header length."""
    size = len(elements) if size is None else size
    body = one_input(data=ABSENT, shape=[count], parameters={"binary_data_size": size}) | members
    head = json.dumps(body).encode()
    return head + elements, str(len(head))


def packed(*elements: bytes) -> bytes:
    """Elements behind their lengths, made with ``struct`` alone."""
    return b"".join(struct.pack(f"<I{len(one)}s", len(one), one) for one in elements)


@given(elements=images)
def test_elements(elements: list[bytes]) -> None:
    """Binary elements are what ``struct`` makes of them, and are read back."""
    written = write_elements(elements)

    assert written == packed(*elements)
    assert read_elements(memoryview(written), count=len(elements)) == elements


@given(elements=images)
def test_requests_round_trip(elements: list[bytes]) -> None:
    """Binary, base64 and nested base64 carry the same images."""
    body, header_length = binary(packed(*elements), count=len(elements))
    assert read_request(body, header_length=header_length).images == elements

    data = [base64.b64encode(one).decode() for one in elements]
    flat = one_input(shape=[len(elements)], data=data)
    column = one_input(shape=[len(elements), 1], data=[[one] for one in data])
    for request in (flat, column):
        text = json.dumps(request).encode()
        assert read_request(text, header_length=None).images == elements
        assert read_request(text, header_length=str(len(text))).images == elements


def test_defaults() -> None:
    """Without more said, all outputs are wanted as JSON, with the best label alone."""
    request = read_request(json.dumps(one_input()).encode(), header_length=None)

    assert request == InferRequest([b"image"], dict.fromkeys(OUTPUTS, False), top_k=1)


def test_null_is_absent() -> None:
    """Clients that send every optional member send ``null`` in those they do not use."""
    body = one_input(parameters=None) | {"id": None, "outputs": None, "parameters": None}

    assert read_request(json.dumps(body).encode(), header_length=None).images == [b"image"]


def test_everything_said() -> None:
    """Id, outputs in their order, binary or not, and the parameters."""
    body = one_input() | {
        "id": "request-7",
        "outputs": [
            {"name": "score"},
            {"name": "verdict", "parameters": {"binary_data": False}},
            {"name": "label", "parameters": {"binary_data": None}},
        ],
        "parameters": {"binary_data_output": True, "top_k": 3, "timeout": 2_500_000},
        "model_name": "a member that is not ours",
    }

    assert read_request(json.dumps(body).encode(), header_length=None) == InferRequest(
        [b"image"],
        {"score": True, "verdict": False, "label": True},
        id="request-7",
        top_k=3,
        timeout_s=2.5,
    )


def test_raw_binary_request() -> None:
    """With a header length of 0 the body is one image, and all outputs are binary."""
    request = read_request(b"the image", header_length="0")

    assert request == InferRequest([b"the image"], dict.fromkeys(OUTPUTS, True))


@pytest.mark.parametrize(
    ("elements", "count", "words"),
    [
        pytest.param(b"", 1, "element 0 of 'image' has no length", id="nothing"),
        pytest.param(b"\1\0\0", 1, "3 of 4 bytes are left", id="half a length"),
        pytest.param(b"\5\0\0\0abc", 1, "has 5 bytes; 3 are left", id="half an element"),
        pytest.param(b"\xff\xff\xff\xff", 1, "has 4294967295 bytes", id="a length of 4 GB"),
        pytest.param(packed(b"a"), 2, "element 1", id="too few elements"),
        pytest.param(packed(b"a", b"b"), 1, "5 bytes follow", id="too many elements"),
        pytest.param(packed(b"a") + b"\0", 1, "1 bytes follow", id="a byte too many"),
        pytest.param(b"\0\0\0\1a", 1, "has 16777216 bytes", id="big-endian"),
    ],
)
def test_broken_elements(elements: bytes, count: int, words: str) -> None:
    """Elements that do not fill their tensor exactly are malformed; the message says where."""
    body, header_length = binary(elements, count=count)

    with pytest.raises(MalformedRequestError, match=words):
        read_request(body, header_length=header_length)


@pytest.mark.parametrize(
    "header_length", ["", "-1", "+5", "5.0", "1e3", "five", "٣", "0x5", "1_0", "9" * 30, "10, 10"]
)
def test_header_lengths_that_are_no_numbers(header_length: str) -> None:
    """Only ASCII digits are a length."""
    with pytest.raises(MalformedRequestError, match="must be a number of bytes"):
        read_request(b"{}", header_length=header_length)


def test_header_length_beyond_the_body() -> None:
    """The JSON cannot be longer than the body."""
    with pytest.raises(MalformedRequestError, match="is 3; the body has 2 bytes"):
        read_request(b"{}", header_length="3")


@pytest.mark.parametrize("change", [-1, 1])
def test_header_length_off_by_one(change: int) -> None:
    """A JSON object cut short, or with a byte of the tensor, is no JSON."""
    body, header_length = binary(packed(b"a"))

    with pytest.raises(MalformedRequestError):
        read_request(body, header_length=str(int(header_length) + change))


@pytest.mark.parametrize("size", [0, 4, 6, 10**18])
def test_wrong_binary_data_size(size: int) -> None:
    """The size must be that of what follows the JSON."""
    body, header_length = binary(packed(b"a"), size=size)

    with pytest.raises(MalformedRequestError, match="5 bytes follow the JSON"):
        read_request(body, header_length=header_length)


def test_binary_without_the_header() -> None:
    """Without the header the whole body is JSON, and a binary tensor has nowhere to be."""
    body, header_length = binary(packed(b"a"))

    for end in (len(body), int(header_length)):
        with pytest.raises(MalformedRequestError):
            read_request(body[:end], header_length=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "img"}, "inputs 0 name is 'img'"),
        ({"name": ABSENT}, "inputs 0 name"),
        ({"datatype": "UINT8"}, "inputs 0 datatype is 'UINT8'"),
        ({"shape": ABSENT}, "inputs 0 shape"),
        ({"shape": []}, "inputs 0 shape"),
        ({"shape": [0]}, "must be 1 to"),
        ({"shape": [-1]}, "must be 1 to"),
        ({"shape": [MAX_IMAGES + 1]}, "must be 1 to"),
        ({"shape": [1, 2]}, r"must be \[N\] or \[N, 1\]"),
        ({"shape": [1, 1, 1]}, "inputs 0 shape"),
        ({"shape": [1.0]}, "inputs 0 shape"),
        ({"shape": ["1"]}, "inputs 0 shape"),
        ({"shape": [True]}, "inputs 0 shape"),
        ({"shape": [10**30]}, "must be 1 to"),
        ({"shape": [2]}, "has 1 elements"),
        ({"data": ABSENT}, "neither data nor binary_data_size"),
        ({"data": []}, "has 0 elements"),
        ({"data": [5]}, "inputs 0 data"),
        ({"data": [["YQ==", "YQ=="]]}, "inputs 0 data"),
        ({"data": "YQ=="}, "inputs 0 data"),
        ({"data": ["no base64!"]}, "element 0 of 'image' is no base64"),
        ({"data": ["YQ"]}, "element 0 of 'image' is no base64"),
        ({"data": ["é"]}, "element 0 of 'image' is no base64"),
        ({"parameters": {"binary_data_size": 8}}, "both data and binary_data_size"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size is -1"),
        ({"parameters": {"binary_data_size": "8"}}, "binary_data_size is '8'"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared_memory_region"),
        ({"parameters": []}, "inputs 0 parameters"),
    ],
)
def test_broken_inputs(change: Mapping[str, Any], words: str) -> None:
    """An input that is not one ``image`` tensor of files is malformed; the message says why."""
    with pytest.raises(MalformedRequestError, match=words):
        read_request(json.dumps(one_input(**change)).encode(), header_length=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": one_input()["inputs"] * 2}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"id": 7}, "id is 7"),
        ({"outputs": [{"name": "colour"}]}, "outputs 0 name is 'colour'"),
        ({"outputs": [{}]}, "outputs 0 name"),
        ({"outputs": [{"name": "score"}] * 2}, "'score' is asked for twice"),
        (
            {"outputs": [{"name": "label", "parameters": {"classification": 3}}]},
            "classification is 3",
        ),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}, "binary_data is 1"),
        ({"parameters": {"top_k": 0}}, "top_k is 0"),
        ({"parameters": {"top_k": 1001}}, "top_k is 1001"),
        ({"parameters": {"top_k": True}}, "top_k is True"),
        ({"parameters": {"timeout": -1}}, "timeout is -1"),
        ({"parameters": {"sequence_id": 1}}, "sequence_id is 1"),
        ({"parameters": {"priority": 1}}, "priority is 1"),
    ],
)
def test_broken_requests(change: Mapping[str, Any], words: str) -> None:
    """What the service does not know is refused by name, never ignored."""
    with pytest.raises(MalformedRequestError, match=words):
        read_request(json.dumps(one_input() | dict(change)).encode(), header_length=None)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="an array"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"id": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"id": "\xed\xa0\x80"}', id="a surrogate in UTF-8"),
        pytest.param(b'{"inputs":' * 100_000, id="deep"),
        pytest.param(b"[" * 1_000_000, id="deeper"),
        pytest.param(b'{"inputs": [' + b"1" * 100_000 + b"]}", id="a long number"),
        pytest.param(b'{"inputs": [' + b"{}," * 1_000_000 + b"{}]}", id="a million values"),
        pytest.param(b"{} {}", id="two objects"),
        pytest.param(b'{"inputs": NaN}', id="NaN"),
    ],
)
def test_broken_json(text: bytes) -> None:
    """Bytes that are not a JSON object are malformed, however they try."""
    with pytest.raises(MalformedRequestError) as raised:
        read_request(text, header_length=None)

    assert len(str(raised.value)) < 300


@given(body=st.binary(min_size=1, max_size=60), header_length=st.none() | st.integers(0, 80))
def test_any_bytes(body: bytes, header_length: int | None) -> None:
    """Whatever the bytes, they are a request or malformed, and nothing else."""
    try:
        request = read_request(
            body, header_length=None if header_length is None else str(header_length)
        )
    except MalformedRequestError:
        return
    assert request.images == [body]


@given(
    elements=images,
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    is_insertion=st.booleans(),
)
def test_one_byte_wrong(
    elements: list[bytes], position: int, value: int, is_insertion: bool
) -> None:
    """A request with any byte changed is malformed, or still holds as many images."""
    body, header_length = binary(packed(*elements), count=len(elements))
    at = position % len(body)
    changed = body[:at] + bytes([value]) + body[at + (not is_insertion) :]

    try:
        request = read_request(changed, header_length=header_length)
    except MalformedRequestError:
        return
    assert len(request.images) == len(elements)


LABELS = ["cat", "dog", "été"]
DETECTIONS = [
    Detection(
        logits=np.log(np.array([1, 2, 5], np.float32)),
        feature_norm=1.5,
        score=2.5,
        p_value=1 / 3,
        verdict="id",
        threshold=0.75,
    ),
    Detection(
        logits=np.log(np.array([6, 1, 1], np.float32)),
        feature_norm=0.25,
        score=0.5,
        p_value=0.125,
        verdict="ood",
        threshold=0.5,
    ),
]
VALUES: Mapping[OutputName, list[Any]] = {
    "verdict": ["id", "ood"],
    "score": [2.5, 0.5],
    "feature_norm": [1.5, 0.25],
    "threshold": [0.75, 0.5],
    "p_value": [1 / 3, 0.125],
    "label": [["été", "dog"], ["cat", "dog"]],
    "probability": [[0.625, 0.25], [0.75, 0.125]],
    "index": [[2, 1], [0, 1]],
    "logits": np.log([[1, 2, 5], [6, 1, 1]]).tolist(),
}


def tensors(*names: OutputName, top_k: int = 2) -> list[OutputTensor]:
    """The tensors of ``DETECTIONS``."""
    return output_tensors(DETECTIONS, names, labels=LABELS, top_k=top_k)


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_values(name: OutputName) -> None:
    """Each output has the value that its name promises; labels go from the most probable down."""
    [tensor] = tensors(name)

    assert tensor.name == name
    if tensor.datatype == "BYTES":
        assert tensor.values.tolist() == VALUES[name]
    else:
        np.testing.assert_allclose(tensor.values, VALUES[name], rtol=1e-6)


def test_outputs_in_the_order_asked_for() -> None:
    """The order is the request's, not the service's."""
    assert [one.name for one in tensors("logits", "verdict")] == ["logits", "verdict"]


def test_top_k_beyond_the_classes() -> None:
    """There are no more columns than classes."""
    assert tensors("label", top_k=1000)[0].values.shape == (2, 3)


def test_verdicts_need_no_logits() -> None:
    """A detection of the network's first blocks has the outputs that need no class."""
    gated = [
        Detection(
            logits=None, feature_norm=1, score=1, p_value=0.5, verdict="uncertain", threshold=1
        )
    ]
    [tensor] = output_tensors(gated, ["verdict"], labels=LABELS, top_k=1)

    assert tensor.values.tolist() == ["uncertain"]


def test_json_response() -> None:
    """JSON values stand in the tensor, row by row, and nothing follows the JSON."""
    request = InferRequest([b"", b""], {"score": False, "label": False}, id="seven")
    body, header_length = write_response(
        tensors("score", "label"), request, model_name="m", model_version=3
    )

    assert header_length is None
    assert json.loads(body) == {
        "model_name": "m",
        "model_version": "3",
        "id": "seven",
        "outputs": [
            {"name": "score", "datatype": "FP32", "shape": [2], "data": [2.5, 0.5]},
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [2, 2],
                "data": ["été", "dog", "cat", "dog"],
            },
        ],
    }


def test_binary_response() -> None:
    """Binary values follow the JSON in the order of the tensors, little-endian."""
    request = InferRequest([b"", b""], {"verdict": True, "index": False, "p_value": True})
    body, header_length = write_response(
        tensors("verdict", "index", "p_value"), request, model_name="m", model_version=1
    )

    assert header_length is not None
    verdict, index, p_value = json.loads(body[:header_length])["outputs"]
    assert verdict["parameters"] == {"binary_data_size": 4 + 2 + 4 + 3}
    assert index["data"] == [2, 1, 0, 1]
    assert p_value["parameters"] == {"binary_data_size": 16}
    assert "data" not in verdict
    assert body[header_length:] == packed(b"id", b"ood") + struct.pack("<2d", 1 / 3, 0.125)


@pytest.mark.parametrize("name", OUTPUTS)
def test_binary_sizes(name: OutputName) -> None:
    """A binary tensor has as many bytes as its datatype and shape say."""
    [tensor] = tensors(name)
    item = {"FP32": 4, "FP64": 8, "INT64": 8}.get(DATATYPES[name])

    if item is not None:
        assert len(bytes(tensor)) == item * tensor.values.size
