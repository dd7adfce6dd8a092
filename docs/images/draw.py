"""Draws the pictures of the live page: ``python docs/images/draw.py URL IMAGES``.

``URL`` is a server that has just been started, ``IMAGES`` a folder of ID images, which are sent
while the page looks on. Only the examples can be seen in the pictures.
"""

import io
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
WIDTHS = {"wide": 1280, "narrow": 390}
THEMES = ("light", "dark")
EXAMPLES = ("noise", "truck", "ship")
BEFORE = 600
"""Images sent before the page is opened, so that the histogram has its shape."""
BETWEEN = 150
"""Images sent between two pictures: the same noise four times in a row would be drift."""
TRAFFIC_S = 30
MARGIN = 8


def main(url: str, images: Path) -> None:
    """Send images, open the page in every width and theme, and keep what it shows."""
    files = sorted(images.rglob("*.jpg"))
    random.Random(0).shuffle(files)
    waiting = iter(files)
    with httpx.Client(base_url=url, timeout=60) as client, sync_playwright() as playwright:
        for _ in range(BEFORE):
            send(client, waiting, count=1)
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        pages = open_pages(browser, url)
        until = time.monotonic() + TRAFFIC_S
        while time.monotonic() < until:
            send(client, waiting, count=random.randint(1, 8))
            next(iter(pages.values())).wait_for_timeout(random.uniform(0, 500))
        for name, page in pages.items():
            for _ in range(BETWEEN):
                send(client, waiting, count=1)
            show(page)
            picture(page).save(HERE / f"page-{name}.png", optimize=True)
        browser.close()


def send(client: httpx.Client, files: Iterator[Path], *, count: int) -> None:
    """One request with the next images."""
    parts = [("file", (path.name, path.read_bytes())) for path in islice(files, count)]
    client.post("/v1/score", files=parts).raise_for_status()


def open_pages(browser: Browser, url: str) -> dict[str, Page]:
    """The page in every width and theme."""
    pages = {}
    for width, pixels in WIDTHS.items():
        for theme in THEMES:
            page = browser.new_page(
                viewport={"width": pixels, "height": 900},
                color_scheme=theme,
                reduced_motion="reduce",
            )
            page.goto(url)
            pages[f"{width}-{theme}"] = page
    return pages


def show(page: Page) -> None:
    """Press the examples, one after the other, and wait for the next look at the server."""
    for name in EXAMPLES:
        page.locator(f"[data-example={name}]").click()
        page.locator(f".card:not([data-verdict=waiting]) h3[title='{name}.jpg']").wait_for()
    page.locator("body").click(position={"x": 1, "y": 1})
    page.wait_for_timeout(3000)


def picture(page: Page) -> Image.Image:
    """The page down to the live histogram, in 256 colours."""
    box = page.locator(".scores").bounding_box()
    assert box is not None
    bottom = box["y"] + page.evaluate("scrollY") + box["height"] + MARGIN
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    whole = shot.convert("RGB").crop((0, 0, shot.width, round(bottom)))
    # A palette of its own colours: only the thumbnails need dithering.
    return whole.quantize(palette=whole.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
