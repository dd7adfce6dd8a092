"""``/v1/review`` and its page: who may see what, on the real server and in a real browser."""

import csv
import io
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import simplejpeg
from fastapi.testclient import TestClient
from PIL import Image

from app.errors import SettingsError
from app.main import create_app
from app.serving.review import LABELS_HEADER, THUMBNAIL_SIDE, _as_csv
from app.settings import Settings
from app.store import Store
from tests.api.conftest import STORE, wait_until_ready
from tests.api.test_gate import ID_IMAGE, OOD_IMAGE
from tests.api.test_v2 import INFER, binary_request_for
from tests.pictures import encoded, jpeg
from tests.serving.test_review import Clock, record
from tests.test_proxy_server import program
from tests.test_server import START_S, serving
from tests.versions import add_version, move_threshold

TOKEN: Final = "the-token"
KEY: Final = "a-key"
ADMIN: Final = {"Authorization": f"Bearer {TOKEN}"}
ROUTES: Final = [
    ("GET", "/v1/review"),
    ("GET", "/v1/review/labels.csv"),
    ("GET", f"/v1/review/{0:032x}/thumbnail"),
    ("PUT", f"/v1/review/{0:032x}/label"),
    ("DELETE", f"/v1/review/{0:032x}"),
]
CLIENTS: Final = 8


@contextmanager
def reviewing(folder: Path, **settings: Any) -> Iterator[TestClient]:
    """The application with a review queue in ``folder``; its client shows the admin token."""
    values = {"model_store": STORE, "review_folder": folder, "admin_token": TOKEN, **settings}
    app = create_app(Settings.read(values))
    with TestClient(app, raise_server_exceptions=False, headers=ADMIN) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the images are kept."""
    return tmp_path_factory.mktemp("review")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[TestClient]:
    """The application, for all tests of this file."""
    settings = {"upstream_url": "http://127.0.0.1:1", "api_keys": f'["{KEY}"]'}
    with reviewing(folder, **settings) as client:
        yield client


@pytest.fixture
def client(running: TestClient) -> TestClient:
    """The application with nothing kept."""
    for image in kept(running):
        assert running.delete(f"/v1/review/{image['id']}").status_code == 204
    return running


def kept(client: TestClient | httpx.Client, **query: Any) -> list[dict[str, Any]]:
    """What the list says; it waits its turn behind what is still to be written."""
    answer = client.get("/v1/review", params=query)
    assert answer.status_code == 200
    images: list[dict[str, Any]] = answer.json()["images"]
    return images


def keep(client: TestClient, *files: bytes) -> list[str]:
    """The ids under which OOD images were kept, oldest first."""
    for data in files:
        assert client.post("/v1/score", content=data).json()["results"][0]["verdict"] == "ood"
    return [image["id"] for image in kept(client)][::-1]


def value(client: TestClient | httpx.Client, series: str) -> float:
    """One series of ``/metrics``."""
    lines = client.get("/metrics").text.splitlines()
    found = [line.rpartition(" ")[2] for line in lines if line.startswith(series + " ")]
    return float(found[0]) if found else 0.0


def _score(client: TestClient, data: bytes) -> None:
    client.post("/v1/score", content=data)


def _score_form(client: TestClient, data: bytes) -> None:
    files = [("file", ("../../a.jpg", data)), ("file", ("broken", b"broken"))]
    client.post("/v1/score", files=files)


def _gate(client: TestClient, data: bytes) -> None:
    client.post("/v1/gate", content=data)


def _proxy(client: TestClient, data: bytes) -> None:
    client.post("/v1/proxy/classify", content=data)


def _infer(client: TestClient, data: bytes) -> None:
    content, headers = binary_request_for(data)
    client.post(INFER, content=content, headers=headers)


@pytest.mark.parametrize("ask", [_score, _score_form, _gate, _proxy, _infer])
def test_every_way_in(
    client: TestClient, folder: Path, ask: Callable[[TestClient, bytes], None]
) -> None:
    """By whichever route an OOD image comes, it is kept as it was sent; an ID image is not."""
    ask(client, ID_IMAGE)
    assert kept(client) == []
    ask(client, OOD_IMAGE)

    [image] = kept(client)
    assert (folder / f"{image['id']}.jpg").read_bytes() == OOD_IMAGE
    assert (image["model"], image["version"], image["verdict"]) == ("cifar10-resnet18", 1, "ood")
    assert image["score"] < image["threshold"]
    assert image["label"] is None
    assert len(list(folder.iterdir())) == 3


def test_evidence(client: TestClient) -> None:
    """The record says what the answer said."""
    result = client.post("/v1/score", content=OOD_IMAGE).json()["results"][0]

    [image] = kept(client)
    for name in ("score", "threshold", "p_value", "verdict"):
        assert image[name] == result[name]
    assert image["prediction"] == result["predictions"][0]["label"]


@pytest.mark.parametrize(("method", "url"), ROUTES)
def test_only_the_admin_token_opens_it(running: TestClient, method: str, url: str) -> None:
    """An API key lets images in, and does not let their kept copies be seen."""
    plain = TestClient(running.app)

    assert plain.request(method, url).status_code == 401
    assert plain.request(method, url, headers={"X-API-Key": KEY}).status_code == 403


def test_it_is_off_by_default() -> None:
    """Without a folder there are no routes and no page, whatever is shown."""
    app = create_app(Settings.read({"model_store": STORE, "admin_token": TOKEN}))
    client = TestClient(app, headers=ADMIN)

    for method, url in (*ROUTES, ("GET", "/review")):
        assert client.request(method, url).status_code == 404
    assert not [path for path in client.get("/openapi.json").json()["paths"] if "review" in path]


def test_a_folder_needs_a_token() -> None:
    """A queue that nobody could look at is refused in one line that names both settings."""
    with pytest.raises(SettingsError, match="review_folder is 'kept' and admin_token is not set"):
        Settings.read({"review_folder": "kept"})


@pytest.mark.parametrize(
    "name",
    ["x", "0" * 31, "0" * 33, "G" * 32, "..%2f..%2fetc%2fpasswd", "%2e%2e", "0" * 31 + "%0a"],
)
def test_names_that_are_no_ids(running: TestClient, name: str) -> None:
    """What is not 32 hexadecimal digits reaches no file: there is no such route."""
    for method, url in (("GET", "thumbnail"), ("PUT", "label"), ("DELETE", "")):
        path = f"/v1/review/{name}/{url}".rstrip("/")
        answer = running.request(method, path, json={"label": None})
        assert answer.status_code in (404, 405), path


@pytest.mark.parametrize(("method", "url"), ROUTES[2:])
def test_unknown_ids(running: TestClient, method: str, url: str) -> None:
    """An id of the right form that is not kept is a 404."""
    assert running.request(method, url, json={"label": None}).status_code == 404


def test_labels(client: TestClient) -> None:
    """A label is stored and counted; the same again changes and counts nothing; null ends it."""
    [image_id] = keep(client, OOD_IMAGE)
    url = f"/v1/review/{image_id}/label"
    series = 'normgate_review_labels_total{label="was_fine",model="cifar10-resnet18",version="1"}'
    before = value(client, series)

    first = client.put(url, json={"label": "was_fine"})
    again = client.put(url, json={"label": "was_fine"})

    assert first.json() == again.json() == kept(client)[0]
    assert (first.json()["label"], first.headers["cache-control"]) == ("was_fine", "no-store")
    assert value(client, series) == before + 1
    ended = client.put(url, json={"label": None}).json()
    assert (ended["label"], ended["labelled_at"]) == (None, None)
    assert value(client, series) == before + 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 400),
        (b"[]", 400),
        (b'{"label": "cat"}', 400),
        (b'{"label": "was_fine", "more": 1}', 400),
        (b'{"label": "' + b"x" * 1024 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_label(client: TestClient, body: bytes, status: int) -> None:
    """The image's label stays what it was."""
    [image_id] = keep(client, OOD_IMAGE)

    assert client.put(f"/v1/review/{image_id}/label", content=body).status_code == status
    assert kept(client)[0]["label"] is None


def test_removal(client: TestClient, folder: Path) -> None:
    """A removed image leaves no file, and the next removal finds none."""
    [image_id] = keep(client, OOD_IMAGE)

    assert client.delete(f"/v1/review/{image_id}").status_code == 204
    assert client.delete(f"/v1/review/{image_id}").status_code == 404
    assert [file.name for file in folder.iterdir()] == ["review.lock"]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_thumbnails(client: TestClient, name: str) -> None:
    """Of every format a JPEG that no side of is longer than 256 pixels, and nobody may store."""
    height, width = 300, 700
    [image_id] = keep(client, encoded(3, name, height=height, width=width))

    answer = client.get(f"/v1/review/{image_id}/thumbnail")

    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    pixels = simplejpeg.decode_jpeg(answer.content)
    assert pixels.shape[1] == THUMBNAIL_SIDE
    assert pixels.shape[0] == pytest.approx(THUMBNAIL_SIDE * height / width, abs=1)
    original = Image.open(io.BytesIO(encoded(3, name, height=height, width=width))).convert("RGB")
    expected = np.asarray(original.resize((pixels.shape[1], pixels.shape[0])), dtype=float)
    assert np.abs(pixels - expected).mean() < 6


def test_small_images_stay_small(client: TestClient) -> None:
    """A thumbnail is never larger than the image."""
    [image_id] = keep(client, OOD_IMAGE)
    thumbnail = client.get(f"/v1/review/{image_id}/thumbnail").content
    assert simplejpeg.decode_jpeg(thumbnail).shape == (32, 32, 3)


def test_pages(client: TestClient) -> None:
    """The time of a page's last image asks for the next; together they are all, newest first."""
    ids = keep(client, *(jpeg(seed) for seed in range(7)))
    found: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while page := kept(client, **query):
        found += [image["id"] for image in page]
        query["before"] = page[-1]["time"]

    assert found == ids[::-1]
    assert client.get("/v1/review?limit=2").json()["total"] == 7
    assert client.get("/v1/review?limit=0").status_code == 400
    for before in ("yesterday", "0.5", "2026-01-01"):
        assert client.get(f"/v1/review?before={before}").status_code == 400


def test_labels_as_csv(client: TestClient) -> None:
    """One row a labelled image, with the numbers as they were answered."""
    ids = keep(client, jpeg(1), jpeg(2), jpeg(3))
    client.put(f"/v1/review/{ids[0]}/label", json={"label": "was_fine"})
    client.put(f"/v1/review/{ids[2]}/label", json={"label": "really_ood"})

    answer = client.get("/v1/review/labels.csv")

    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    images = {image["id"]: image for image in kept(client)}
    assert [row["id"] for row in rows] == [ids[2], ids[0]]
    for row in rows:
        assert row == {name: str(images[row["id"]][name]) for name in LABELS_HEADER}


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r"])
def test_no_formula_in_the_csv(first: str) -> None:
    """Text that a spreadsheet would run is marked as text; a number below zero stays one."""
    image = record(1, Clock(), model=f'{first}1+cmd|"x"!A1', label="was_fine", score=-1.5)

    [row] = csv.DictReader(io.StringIO(_as_csv([image]), newline=""))

    assert row["model"] == f'\'{first}1+cmd|"x"!A1'
    assert row["score"] == "-1.5"


def test_a_shadow_keeps_nothing(tiny_store: Store, tmp_path: Path) -> None:
    """What only a shadow finds OOD is not kept: the verdict that was answered counts."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    model = tmp_path / "store" / "tiny"
    move_threshold(add_version(model, 2), rank=24)
    move_threshold(model / "1", rank=1)
    settings = {"model_store": model.parent, "model": "tiny", "shadow_share": 1}
    with reviewing(tmp_path / "review", **settings) as client:
        client.post("/v1/models/tiny/versions/1/activate")
        assert client.post("/v1/models/tiny/versions/2/shadow").status_code == 200
        verdicts = [
            client.post("/v1/score", content=jpeg(seed)).json()["results"][0]["verdict"]
            for seed in range(24, 34)
        ]
        series = 'normgate_shadow_images_total{model="tiny",verdict="ood",version="2"}'
        wait(lambda: value(client, series) > 0)

        assert "id" in verdicts
        assert len(kept(client)) == verdicts.count("ood")


def wait(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail when it takes too long."""
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, "waited too long"


def test_time_is_over(tmp_path: Path) -> None:
    """An image goes when its time is over, though nobody asks and nothing new comes."""
    with reviewing(tmp_path / "review", review_retention_s=0.2) as client:
        client.post("/v1/score", content=OOD_IMAGE)
        wait(lambda: value(client, "normgate_review_queue_images") > 0)
        wait(lambda: [file.name for file in (tmp_path / "review").iterdir()] == ["review.lock"])


@pytest.mark.alone
def test_load_and_restart(tmp_path: Path) -> None:
    """Under load no request fails, the bounds hold at all times, and a restart finds the queue."""
    folder = tmp_path / "review"
    flags = [
        *("--review-folder", str(folder), "--admin-token", TOKEN, "--review-images", "20"),
        *("--review-sample-share", "0.5", "--review-max-bytes", str(2**20)),
    ]
    with serving(flags) as server:

        def ask(seed: int) -> set[int]:
            with httpx.Client(base_url=server.url, timeout=START_S, headers=ADMIN) as client:
                statuses = set()
                for number in range(15):
                    content = jpeg(seed * 100 + number, height=200, width=200)
                    statuses.add(client.post("/v1/score", content=content).status_code)
                    if number % 7 == 0:
                        answer = client.get("/v1/review").json()
                        assert answer["total"] <= 2 * 20
                        # One of them may be gone already.
                        url = f"/v1/review/{answer['images'][-1]['id']}/label"
                        label = client.put(url, json={"label": "really_ood"})
                        assert label.status_code in (200, 404)
                return statuses

        with ThreadPoolExecutor(CLIENTS) as pool:
            assert set().union(*pool.map(ask, range(CLIENTS))) == {200}
        with httpx.Client(base_url=server.url, timeout=START_S, headers=ADMIN) as client:
            before = kept(client)
            assert len(before) == value(client, "normgate_review_queue_images")
            size = value(client, "normgate_review_queue_bytes")
        server.terminate()
        assert server.process.wait(START_S) == 0

    assert sum(file.stat().st_size for file in folder.iterdir()) == size <= 2**20
    with reviewing(folder, review_images=20) as again:
        assert kept(again) == before


def test_an_unusable_folder_stops_the_start(tmp_path: Path) -> None:
    """Whoever started the application is told the setting and the reason, in one line."""
    (tmp_path / "file").write_bytes(b"")
    told: list[Exception | None] = []
    settings = Settings.read(
        {"model_store": STORE, "review_folder": tmp_path / "file", "admin_token": TOKEN}
    )

    with TestClient(create_app(settings, on_started=told.append)) as client:
        wait(lambda: bool(told))
        assert client.get("/readyz").status_code == 503

    assert isinstance(told[0], SettingsError)
    assert str(told[0]) == f"NORMGATE_REVIEW_FOLDER is '{tmp_path}/file': File exists"


@pytest.mark.browser
def test_labelling_by_keyboard(tmp_path: Path) -> None:
    """In Chromium: a wrong token is told, keys label and undo, and the page breaks no policy."""
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--review-folder", str(tmp_path / "review"), "--admin-token", TOKEN]
    with (
        serving(flags) as server,
        httpx.Client(base_url=server.url, timeout=START_S, headers=ADMIN) as client,
        playwright.sync_playwright() as driver,
    ):
        for seed in range(6):
            client.post("/v1/score", content=jpeg(seed))
        images = kept(client)
        browser = driver.chromium.launch(executable_path=program("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * START_S)
        playwright.expect.set_options(timeout=1000 * START_S)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))

        def labels() -> list[str | None]:
            return [image["label"] for image in kept(client)]

        def press(keys: str, expected: list[str | None]) -> None:
            for key in keys:
                page.keyboard.press(key)
            wait(lambda: labels() == expected)

        page.goto(f"{server.url}/review")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("not the admin token").wait_for()
        assert len(complaints) == 1  # the browser's line on the 403
        complaints.clear()
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        playwright.expect(page.locator(".card img[src^=blob]")).to_have_count(6)
        shown = page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.id)")
        assert shown == [image["id"] for image in images]

        none = [None] * 6
        press("o", ["really_ood", *none[1:]])
        press("f", ["really_ood", "was_fine", *none[2:]])
        press("u", ["really_ood", *none[1:]])
        # Undone, the second is in focus; from there one on, and one more.
        press("jjo", ["really_ood", None, None, "really_ood", None, None])
        page.get_by_text("6 images, 4 without a label").wait_for()
        page.get_by_role("status").get_by_text("really ood; 4 left").wait_for()
        page.get_by_role("button", name="Reload").click()
        playwright.expect(page.locator(".card")).to_have_count(4)

        with page.expect_download() as download:
            page.get_by_role("button", name="Labels as CSV").click()
        assert download.value.path().read_text().count("really_ood") == 2
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Remove").first.click()
        wait(lambda: len(kept(client)) == 5)
        assert TOKEN not in page.content()
        assert (
            page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"
        )
        assert all(url.startswith((server.url, f"blob:{server.url}")) for url in asked)
        assert complaints == []
        browser.close()
