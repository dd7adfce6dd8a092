"""The Open Inference Protocol, as the official client speaks it to a real server."""

import base64
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.http import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.utils import InferenceServerException

from tests.pictures import encoded, jpeg
from tests.test_server import ROOT, STORE, Server, serving
from tests.versions import add_version

NAME = "cifar10-resnet18"
TOKEN = {"Authorization": "Bearer open sesame"}
IMAGES = [jpeg(1), encoded(2, "PNG"), jpeg(3, height=60, width=40)]
OUTPUTS = [
    *("verdict", "score", "feature_norm", "threshold", "p_value"),
    *("label", "probability", "index", "logits"),
]


def bytes_tensor(elements: Sequence[bytes | str]) -> NDArray[np.object_]:
    """A ``BYTES`` tensor ``[N]``."""
    return np.array(elements, dtype=np.object_)


def image_input(
    images: Sequence[bytes], *, is_binary: bool = True, is_column: bool = False
) -> list[InferInput]:
    """The input tensor, ``[N]`` or ``[N, 1]``, in binary or in base64."""
    elements: Sequence[bytes | str] = images
    if not is_binary:
        elements = [base64.b64encode(image).decode() for image in images]
    values = bytes_tensor(elements)
    values = values.reshape(-1, 1) if is_column else values
    tensor = InferInput("image", list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values, binary_data=is_binary)
    return [tensor]


def address(server: Server) -> str:
    """Host and port, as the client wants them."""
    return server.url.removeprefix("http://")


def texts(values: NDArray[Any]) -> list[Any]:
    """The strings of a ``BYTES`` output: the client gives bytes of binary ones, text of JSON."""
    as_text = np.vectorize(lambda one: one.decode() if isinstance(one, bytes) else one, [object])
    listed: list[Any] = as_text(values).tolist()
    return listed


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with an admin token, for the tests that change nothing."""
    with serving(["--admin-token", "open sesame"]) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[InferenceServerClient]:
    """The official client, connected."""
    with InferenceServerClient(address(server)) as client:
        yield client


@pytest.fixture(scope="module")
def expected(server: Server) -> list[dict[str, Any]]:
    """What ``/v1/score`` says about ``IMAGES``."""
    parts = [("file", (f"{index}", image)) for index, image in enumerate(IMAGES)]
    response = httpx.post(f"{server.url}/v1/score?top_k=3", files=parts, timeout=60)
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def assert_as_expected(result: InferResult, expected: Sequence[dict[str, Any]]) -> None:
    """Every output agrees with ``/v1/score``, whose ``top_k`` is 3 and whose floats are longer."""
    assert texts(result.as_numpy("verdict")) == [one["verdict"] for one in expected]
    assert result.as_numpy("p_value").tolist() == [one["p_value"] for one in expected]
    for name in ("score", "feature_norm", "threshold"):
        values = result.as_numpy(name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, [one[name] for one in expected], rtol=1e-5)
    columns = result.as_numpy("label").shape[1]
    best = [one["predictions"][:columns] for one in expected]
    assert texts(result.as_numpy("label")) == [[one["label"] for one in row] for row in best]
    assert result.as_numpy("index").tolist() == [[one["index"] for one in row] for row in best]
    np.testing.assert_allclose(
        result.as_numpy("probability"),
        [[one["probability"] for one in row] for row in best],
        rtol=1e-5,
    )
    logits = result.as_numpy("logits")
    assert logits.shape == (len(expected), 10)
    assert logits.argmax(axis=1).tolist() == [row[0]["index"] for row in best]


def test_health(client: InferenceServerClient) -> None:
    """The server is live and ready, and the model with it, whichever way it is named."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready(NAME, "77")
    assert not client.is_model_ready("unknown")


def test_metadata(client: InferenceServerClient) -> None:
    """Metadata and configuration name the same tensors."""
    assert client.get_server_metadata()["name"] == "normgate"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]

    metadata = client.get_model_metadata(NAME, "1")
    assert "1" in metadata["versions"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [one["name"] for one in metadata["outputs"]] == OUTPUTS

    config = client.get_model_config(NAME)
    assert config == client.get_model_config(NAME, "1")
    assert [one["dims"] for one in config["output"]] == [
        one["shape"] for one in metadata["outputs"]
    ]
    assert config["parameters"]["block"] == {"string_value": "layer4.0"}


@pytest.mark.parametrize("is_column", [False, True])
@pytest.mark.parametrize("is_binary_input", [False, True])
@pytest.mark.parametrize("is_binary_output", [False, True])
def test_infer(
    client: InferenceServerClient,
    expected: Sequence[dict[str, Any]],
    is_column: bool,
    is_binary_input: bool,
    is_binary_output: bool,
) -> None:
    """A batch is scored as by ``/v1/score``, in binary and in JSON, in and out."""
    result = client.infer(
        NAME,
        image_input(IMAGES, is_binary=is_binary_input, is_column=is_column),
        outputs=[InferRequestedOutput(name, is_binary_output) for name in OUTPUTS],
        parameters={"top_k": 3},
    )

    assert [one["name"] for one in result.get_response()["outputs"]] == OUTPUTS
    assert result.as_numpy("label").shape == (3, 3)
    assert_as_expected(result, expected)


def test_infer_without_outputs(
    client: InferenceServerClient, expected: Sequence[dict[str, Any]]
) -> None:
    """A request that names no outputs gets all of them, in binary."""
    result = client.infer(NAME, image_input(IMAGES), model_version="1", request_id="seven")

    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == (NAME, "1")
    assert response["id"] == "seven"
    assert all("binary_data_size" in one["parameters"] for one in response["outputs"])
    assert_as_expected(result, expected)


def test_infer_verdicts_alone(
    client: InferenceServerClient, expected: Sequence[dict[str, Any]]
) -> None:
    """Outputs that need no logits are the same when the network stops early; one may be JSON."""
    outputs = [InferRequestedOutput("score", False), InferRequestedOutput("verdict", True)]
    result = client.infer(NAME, image_input(IMAGES), outputs=outputs)

    assert [one["name"] for one in result.get_response()["outputs"]] == ["score", "verdict"]
    assert texts(result.as_numpy("verdict")) == [one["verdict"] for one in expected]
    np.testing.assert_allclose(
        result.as_numpy("score"), [one["score"] for one in expected], rtol=1e-5
    )
    assert result.as_numpy("label") is None


@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("received", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [False, True])
def test_compression(
    client: InferenceServerClient,
    expected: Sequence[dict[str, Any]],
    sent: str | None,
    received: str | None,
    is_binary: bool,
) -> None:
    """Request and response may each be compressed, with binary tensors and without."""
    result = client.infer(
        NAME,
        image_input(IMAGES, is_binary=is_binary),
        outputs=[InferRequestedOutput(name, is_binary) for name in OUTPUTS],
        request_compression_algorithm=sent,
        response_compression_algorithm=received,
    )

    assert_as_expected(result, expected)


def test_concurrent_requests(server: Server, expected: Sequence[dict[str, Any]]) -> None:
    """Requests on several connections each get their own answer."""
    with InferenceServerClient(address(server), concurrency=4) as client:
        pending = [
            client.async_infer(NAME, image_input([IMAGES[index % 3]]), request_id=f"{index}")
            for index in range(12)
        ]
        for index, request in enumerate(pending):
            result = request.get_result(timeout=30)
            assert result.get_response()["id"] == str(index)
            assert_as_expected(result, [expected[index % 3]])


@pytest.mark.parametrize(
    ("images", "options", "status", "words"),
    [
        ([IMAGES[0], b"no image"], {}, "415", "element 1 of 'image': "),
        ([IMAGES[0][:300]], {}, "422", "element 0 of 'image': "),
        (IMAGES, {"model_version": "77"}, "404", "no version 77"),
        (IMAGES, {"model_version": "latest"}, "400", "'latest'"),
        (IMAGES, {"outputs": [InferRequestedOutput("colour")]}, "400", "'colour'"),
        (IMAGES, {"outputs": [InferRequestedOutput("label", class_count=3)]}, "400", "classific"),
        (IMAGES, {"parameters": {"temperature": 1}}, "400", "temperature"),
        (IMAGES, {"sequence_id": 5}, "400", "sequence_id"),
        (IMAGES, {"timeout": 1}, "504", "deadline"),
        ([], {}, "400", "must be 1 to"),
    ],
)
def test_infer_errors(
    client: InferenceServerClient,
    images: Sequence[bytes],
    options: dict[str, Any],
    status: str,
    words: str,
) -> None:
    """What cannot be answered is told with its status and a message the client can read."""
    with pytest.raises(InferenceServerException) as raised:
        client.infer(NAME, image_input(images), **options)

    assert raised.value.status() == status
    assert words in raised.value.message()


def test_other_inputs(client: InferenceServerClient) -> None:
    """Other tensors, and shared memory, are refused."""
    pixels = InferInput("image", [1], "UINT8")
    pixels.set_data_from_numpy(np.zeros(1, np.uint8))
    shared = InferInput("image", [1], "BYTES")
    shared.set_shared_memory("region", 10)
    for tensors in ([pixels], [shared], image_input(IMAGES) * 2):
        with pytest.raises(InferenceServerException) as raised:
            client.infer(NAME, tensors)
        assert raised.value.status() == "400"


def test_unknown_models(client: InferenceServerClient) -> None:
    """An unknown model is a 404 that says so."""
    calls: list[Callable[[], Any]] = [
        lambda: client.infer("unknown", image_input(IMAGES)),
        lambda: client.get_model_metadata("unknown"),
        lambda: client.get_model_config("unknown"),
        lambda: client.get_inference_statistics("unknown"),
        lambda: client.load_model("unknown", headers=dict(TOKEN)),
        lambda: client.unload_model("unknown", headers=dict(TOKEN)),
    ]
    for call in calls:
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert raised.value.status() == "404"
        assert "'unknown'" in raised.value.message()


def test_extensions_that_are_not_there(client: InferenceServerClient) -> None:
    """The client can read the refusal of what the server does not have."""
    calls: list[Callable[[], Any]] = [
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
    ]
    for call in calls:
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert raised.value.status() == "404"


def test_statistics(client: InferenceServerClient) -> None:
    """Images, requests and forward passes are counted, and each takes its time."""

    def totals() -> dict[str, Any]:
        [found] = client.get_inference_statistics(NAME, "1")["model_stats"]
        assert client.get_inference_statistics(NAME)["model_stats"][0]["name"] == NAME
        assert found in client.get_inference_statistics()["model_stats"]
        steps = {step: total["count"] for step, total in found["inference_stats"].items()}
        assert all(
            (total["count"] == 0) == (total["ns"] == 0)
            for total in found["inference_stats"].values()
        )
        return {"images": found["inference_count"], "batches": found["execution_count"], **steps}

    before = totals()
    client.infer(NAME, image_input(IMAGES), model_version="1")
    with pytest.raises(InferenceServerException):
        client.infer(NAME, image_input([b"no image"]), model_version="1")
    after = totals()

    moved = {name: after[name] - before[name] for name in after}
    assert 1 <= moved.pop("batches") <= 3
    assert moved == {
        "images": 3,
        "success": 1,
        "fail": 1,
        "queue": 3,
        "compute_input": 2,
        "compute_infer": 3,
        "compute_output": 1,
    }


def states(client: InferenceServerClient) -> dict[str, str]:
    """The state of each version in the repository."""
    return {one["version"]: one["state"] for one in client.get_model_repository_index()}


def test_repository(tmp_path: Path) -> None:
    """Load lets the newest version answer; unload ends them all."""
    shutil.copytree(STORE / NAME / "1", tmp_path / NAME / "1")
    flags = ["--model-store", str(tmp_path), "--kept-versions", "2"]
    with (
        serving([*flags, "--admin-token", "open sesame"]) as server,
        InferenceServerClient(address(server)) as client,
    ):
        add_version(tmp_path / NAME, 2)
        assert states(client) == {"1": "READY", "2": "UNAVAILABLE"}

        client.load_model(NAME, headers=dict(TOKEN))
        assert states(client) == {"1": "READY", "2": "READY"}
        for named, answering in (("", "2"), ("1", "1"), ("2", "2")):
            result = client.infer(NAME, image_input(IMAGES), model_version=named)
            assert result.get_response()["model_version"] == answering

        client.unload_model(NAME, headers=dict(TOKEN), unload_dependents=True)
        assert not client.is_model_ready(NAME)
        assert set(states(client).values()) == {"UNAVAILABLE"}

        client.load_model(NAME, headers=dict(TOKEN))
        assert client.get_model_metadata(NAME)["versions"] == ["2"]


@pytest.mark.parametrize(
    ("headers", "status"), [(None, "401"), ({"Authorization": "Bearer guess"}, "403")]
)
def test_only_an_admin_loads(
    client: InferenceServerClient, headers: dict[str, str] | None, status: str
) -> None:
    """Load and unload ask for the admin token."""
    for call in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException) as raised:
            call(NAME, headers=headers)
        assert raised.value.status() == status


def test_load_with_a_configuration(client: InferenceServerClient) -> None:
    """What is served is what is stored: a configuration or files in the request are refused."""
    with pytest.raises(InferenceServerException) as raised:
        client.load_model(NAME, headers=dict(TOKEN), config="{}")
    assert raised.value.status() == "400"


def test_the_documented_program(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in ``docs/v2.md`` runs and prints what it says."""
    text = (ROOT / "docs" / "v2.md").read_text()
    [(program, output)] = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ROOT)

    exec(program.replace("127.0.0.1:8000", address(server)), {"__name__": "__main__"})

    assert capsys.readouterr().out == output
