"""A headless Chromium, and pages of it that remember what went wrong in them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.store import Store
from tests.test_proxy_server import program
from tests.test_server import STORE, Server, serving
from tests.versions import add_version, move_threshold

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
MODEL: Final = "cifar10-resnet18"
WITHIN_MS: Final = 60_000

Open = Callable[..., "Watched"]


@dataclass
class Watched:
    """A page, and the errors that its scripts and the browser reported."""

    page: Page
    problems: list[str] = field(default_factory=list)

    def forgive(self, words: str, *, least: int = 1) -> None:
        """Forget the problems that a test provoked; there must be ``least`` of them."""
        others = [problem for problem in self.problems if words not in problem]
        assert len(self.problems) - len(others) >= least, f"no problem has {words!r} in it"
        self.problems = others


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium; nothing is downloaded."""
    executable = CHROMIUM or program("chromium")
    # Root, as in a container, has no sandbox.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=flags)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Watched]:
    """A page of its own context; at the end nothing may have gone wrong in it."""
    context = browser.new_context(**options)
    context.set_default_timeout(WITHIN_MS)
    watched = Watched(context.new_page())
    watched.page.on(
        "console",
        lambda message: (
            watched.problems.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    watched.page.on("pageerror", lambda error: watched.problems.append(str(error)))
    watched.page.goto(url)
    yield watched
    context.close()
    assert watched.problems == []


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens pages that are closed, and checked, at the end of the test."""
    expect.set_options(timeout=WITHIN_MS)
    with ExitStack() as stack:

        def open_one(url: str, **options: Any) -> Watched:
            return stack.enter_context(opened(browser, url, **options))

        yield open_one


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store) -> Path:
    """The bundled model as version 1, which calls nearly all OOD, and 2, as it is; ``tiny``."""
    root = tmp_path_factory.mktemp("page") / "store"
    shutil.copytree(STORE / MODEL, root / MODEL)
    add_version(root / MODEL, 2)
    move_threshold(root / MODEL / "1", rank=4990)
    shutil.copytree(tiny_store.root / "tiny", root / "tiny")
    return root


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """The real server with three versions of two models."""
    flags = ["--model-store", str(store), "--model", MODEL, "--kept-versions", "2"]
    with serving(flags) as running:
        yield running
