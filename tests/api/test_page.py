"""The pages' files: headers, caching, and what they refer to."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.api.routes.page import FOLDER, MEDIA_TYPES
from app.main import create_app
from app.settings import Settings
from tests.api.conftest import ROOT, STORE

FILES = sorted(FOLDER.iterdir())
PAGES = [file for file in FILES if file.suffix == ".html"]
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
NAMESPACE = "http://www.w3.org/2000/svg"
NEED_NO_LABEL = {"hidden", "submit", "button"}


class Outline(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self._is_in_label = False
        self.fields: list[dict[str, str | None]] = []
        self.references: set[str] = set()
        self.inline: list[str] = []
        self.without_alternative: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take one element in."""
        attributes = dict(attrs)
        self.ids += filter(None, [attributes.get("id")])
        self.references |= set(filter(None, [attributes.get("src")]))
        if tag == "link":
            self.references |= set(filter(None, [attributes.get("href")]))
        if tag == "label":
            self._is_in_label = True
            self.labelled |= set(filter(None, [attributes.get("for")]))
        if tag in ("input", "select", "textarea") and not self._is_in_label:
            self.fields.append(attributes)
        if tag == "img" and "alt" not in attributes:
            self.without_alternative.append(str(attributes.get("src")))
        if (
            tag == "style"
            or (tag == "script" and "src" not in attributes)
            or any(name == "style" or name.startswith("on") for name in attributes)
        ):
            self.inline.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Note the end of an element."""
        if tag == "label":
            self._is_in_label = False


def app_with(*, page: bool = True, docs: bool = True) -> TestClient:
    """An application that loads no model."""
    return TestClient(create_app(Settings(model_store=STORE, page=page, docs=docs)))


def test_the_page(client: TestClient) -> None:
    """``GET /`` is HTML that nobody may frame, sniff, or add a script or style to."""
    answer = client.get("/")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file(client: TestClient, file: Path) -> None:
    """Each file is served with its media type and the page's headers; the second time as 304."""
    first = client.get(f"/static/{file.name}")
    second = client.get(
        f"/static/{file.name}", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'}
    )

    assert first.status_code == 200
    assert first.headers["content-type"] == MEDIA_TYPES[file.suffix]
    assert first.headers["cache-control"] == "no-cache"
    assert "default-src 'none'" in first.headers["content-security-policy"]
    if file.suffix != ".html":  # its links are filled in
        assert first.content == file.read_bytes()
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("path", ["/", "/static/base.css"])
def test_head(client: TestClient, path: str) -> None:
    """HEAD has the headers of GET and no body."""
    head, get = client.head(path), client.get(path)

    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-length", "content-type", "etag"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize(
    "path", ["nothing.js", "..%2Fpage.py", "%2e%2e/routes/page.py", "..%5c..%5cmain.py", "", "a/b"]
)
def test_no_other_file(client: TestClient, path: str) -> None:
    """What is none of the page's files is 404, whatever the path looks like."""
    answer = client.get(f"/static/{path}")

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_off() -> None:
    """``NORMGATE_PAGE=false``: there is no page and no file of it."""
    without = app_with(page=False)

    assert without.get("/").status_code == without.get("/static/base.css").status_code == 404


def test_without_a_review_folder(client: TestClient) -> None:
    """The review page is only there where images are kept for review."""
    assert client.get("/review").status_code == 404
    assert ">Review</a>" not in client.get("/").text


@pytest.mark.parametrize("docs", [True, False])
def test_the_link_to_the_docs(docs: bool) -> None:
    """The page links to ``/docs`` where it exists."""
    text = app_with(docs=docs).get("/").text

    assert ('<a href="docs">' in text) is docs
    assert "<!--" not in text


def test_no_route_is_described(client: TestClient) -> None:
    """The pages are for people: OpenAPI does not know them."""
    paths = client.get("/openapi.json").json()["paths"]

    assert not {"/", "/review", "/static/{name}"} & set(paths)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_markup(file: Path) -> None:
    """Ids are unique, fields have labels, pictures alternatives; nothing is inline."""
    page = Outline(file)

    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    assert page.without_alternative == []
    assert page.inline == []
    for field in page.fields:
        is_labelled = field.get("id") in page.labelled or "aria-label" in field
        assert is_labelled or field.get("type") in NEED_NO_LABEL, field
    assert page.labelled <= set(page.ids)


def test_references_exist() -> None:
    """Every file that a page, a script or a style sheet names is there."""
    named = {name for file in PAGES for name in Outline(file).references}
    imports = {
        f"static/{name}"
        for file in SCRIPTS
        for name in re.findall(r'from "\./([^"]+)"', file.read_text())
    }
    examples = {
        f"static/example-{name}.jpg"
        for name in re.findall(r'data-example="(\w+)"', (FOLDER / "index.html").read_text())
    }

    assert len(imports) > 5
    assert len(examples) == 6
    assert named | imports | examples <= {f"static/{file.name}" for file in FILES}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_ids_that_scripts_ask_for(file: Path) -> None:
    """Every id that a script looks for stands in a page."""
    ids = {name for page in PAGES for name in Outline(page).ids}

    asked = re.findall(r'(?:byId|setText|getElementById)\("([^"]+)"', file.read_text())

    assert set(asked) <= ids


def test_modules_are_preloaded() -> None:
    """The live page asks for all its modules at once, not one after the other."""
    reached, waiting = set[str](), ["main.js"]
    while waiting:
        script = (FOLDER / waiting.pop()).read_text()
        found = set(re.findall(r'from "\./([^"]+)"', script)) - reached
        reached |= found
        waiting += found

    assert {f"static/{name}" for name in reached} <= Outline(FOLDER / "index.html").references


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_from_elsewhere(file: Path) -> None:
    """No file names an address of another host: the pages work offline."""
    if file.suffix == ".jpg":
        return
    text = file.read_text().replace(NAMESPACE, "")

    assert re.findall(r"""https?://|@import|["'(]//[a-z]""", text) == []


def test_examples_are_those_of_the_docs() -> None:
    """The examples on the page are the pictures of ``docs/examples``."""
    for file in sorted((ROOT / "docs" / "examples").glob("*.jpg")):
        assert (FOLDER / f"example-{file.name}").read_bytes() == file.read_bytes()
