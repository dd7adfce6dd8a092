"""The live page in a real browser, before the real server."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from tests.browser.conftest import Open
from tests.pictures import jpeg
from tests.test_server import ROOT, START_S, Server, serving

pytestmark = pytest.mark.browser

EXAMPLES = ROOT / "docs" / "examples"
WIDTHS = {"narrow": 360, "wide": 1280}
THEMES = ("light", "dark")
AA_TEXT = 4.5
AA_SHAPE = 3.0
"""WCAG 2.2 AA: text (1.4.3), and what tells controls from their ground (1.4.11)."""

DROP_OR_PASTE = """([kind, name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
  const event = kind === "drop"
    ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
  document.body.dispatchEvent(event);
}"""
COLOURS = """(elements) => elements
  .filter((element) => element.checkVisibility() && element.textContent.trim())
  .map((element) => {
    const behind = [];
    for (let one = element; one; one = one.parentElement) {
      behind.push(getComputedStyle(one).backgroundColor);
    }
    const ground = behind.find((colour) => colour !== "rgba(0, 0, 0, 0)");
    return [element.textContent, getComputedStyle(element).color, ground];
  })"""
"""The text, its colour and its ground's, of all elements at one moment: the page is alive."""
TEXTS = (
    "h1, h2, h3, h4, p, dt, dd, label, li > button, .button, .verdict, .word, .links a, "
    ".legend li, .interval span, .predictions span, figcaption"
)


def card(page: Page, name: str) -> Locator:
    """The card of an image."""
    return page.locator(".card").filter(has=page.get_by_role("heading", name=name, exact=True))


def judge(page: Page, *files: Path | FilePayload) -> None:
    """Pick files as the file picker would hand them over."""
    page.locator("#files").set_input_files(
        [payload(one.name, one.read_bytes()) if isinstance(one, Path) else one for one in files]
    )


def payload(name: str, content: bytes, media_type: str = "image/jpeg") -> FilePayload:
    """A file that exists in the test only."""
    return {"name": name, "mimeType": media_type, "buffer": content}


def fact(shown: Locator, term: str) -> str:
    """The value that a card gives for a term."""
    return shown.locator(".facts > div").filter(has_text=term).locator("dd").inner_text()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    channels = [int(digits) / 255 for digits in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("name", ["ship", "noise"])
def test_an_upload_gets_the_verdict_of_the_api(open_page: Open, server: Server, name: str) -> None:
    """A picked file becomes a card with the API's verdict, score, p-value and predictions."""
    file = EXAMPLES / f"{name}.jpg"
    answer = httpx.post(
        f"{server.url}/v1/score?top_k=3", content=file.read_bytes(), timeout=START_S
    ).json()
    [result] = answer["results"]
    page = open_page(server.url).page

    judge(page, file)

    shown = card(page, file.name)
    word = {"id": "In-distribution", "ood": "Out-of-distribution"}[result["verdict"]]
    expect(shown.locator(".verdict")).to_have_text(word)
    expect(shown.locator(".histogram .bar-calibration")).to_have_count(40)
    assert float(fact(shown, "score")) == pytest.approx(result["score"], rel=1e-3)
    assert float(fact(shown, "threshold")) == pytest.approx(result["threshold"], rel=1e-3)
    assert float(fact(shown, "p-value")) == pytest.approx(result["p_value"], rel=1e-3)
    assert re.fullmatch(r"[\d.]+ m?s", fact(shown, "round trip"))
    labels = shown.locator(".predictions .label").all_inner_texts()
    assert labels == [one["label"] for one in result["predictions"]]
    expect(page.locator("#announce")).to_contain_text(f"{file.name}: {word}")
    expect(page.locator("#recent li")).to_have_count(int(result["verdict"] == "ood"))


def test_the_mark_stands_where_the_score_is(open_page: Open, server: Server) -> None:
    """On the histogram's scale, threshold and score are drawn at their values."""
    page = open_page(server.url).page
    drift = httpx.get(f"{server.url}/v1/models/cifar10-resnet18/drift", timeout=START_S).json()
    low, high = drift["histogram"]["edges"][0], drift["histogram"]["edges"][-1]

    page.get_by_role("button", name="ship").click()

    plot = card(page, "ship.jpg").locator(".histogram")
    for part, value in ((".line-threshold", drift["threshold"]), (".line-mark", 0.8373)):
        path = plot.locator(part).get_attribute("d")
        assert path is not None
        place = float(path.removeprefix("M").split()[0])
        assert place == pytest.approx(100 * (value - low) / (high - low), abs=0.02)


def test_examples_and_several_files(open_page: Open, server: Server) -> None:
    """Every example and every one of twelve files gets its card; the tally counts them."""
    page = open_page(server.url).page
    for button in page.locator("#examples button").all():
        button.click()

    judge(page, *(payload(f"{seed}.jpg", jpeg(seed)) for seed in range(12)))

    expect(page.locator(".card:not([data-verdict=waiting])")).to_have_count(18)
    verdicts = page.locator(".card .verdict").all_inner_texts()
    tally = page.locator("#tally").inner_text()
    assert f"{verdicts.count('Out-of-distribution')} out-of-distribution" in tally
    assert f"{verdicts.count('In-distribution')} in-distribution" in tally
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".card")).to_have_count(0)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste(open_page: Open, server: Server, kind: str) -> None:
    """An image that is dropped anywhere, or pasted, is judged."""
    page = open_page(server.url).page

    page.evaluate(DROP_OR_PASTE, [kind, "given.jpg", list((EXAMPLES / "ship.jpg").read_bytes())])

    expect(card(page, "given.jpg").locator(".verdict")).to_have_text("In-distribution")


def test_an_undecodable_file(open_page: Open, server: Server) -> None:
    """A file without a verdict shows the server's reason as text; others are judged."""
    broken = (EXAMPLES / "ship.jpg").read_bytes()[:400]
    name = "<img src=x onerror=alert(1)>.jpg"
    expected = [
        httpx.post(f"{server.url}/v1/score", content=content, timeout=START_S).json()["detail"]
        for content in (b"hello", broken)
    ]
    watched = open_page(server.url)
    page = watched.page

    judge(
        page,
        payload("notes.txt", b"hello", "text/plain"),
        payload(name, broken),
        EXAMPLES / "ship.jpg",
    )

    for shown, detail in ((card(page, "notes.txt"), expected[0]), (card(page, name), expected[1])):
        expect(shown.locator(".verdict")).to_have_text("No verdict")
        expect(shown.locator(".error")).to_have_text(detail)
    expect(card(page, "ship.jpg").locator(".verdict")).to_have_text("In-distribution")
    watched.forgive("415 (Unsupported Media Type)")
    watched.forgive("422 (Unprocessable")


def test_live_numbers_follow_the_traffic(open_page: Open, server: Server) -> None:
    """What others send appears: images, rate with its interval, latency, histogram, drift."""
    page = open_page(server.url).page
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#throughput-text")).to_contain_text("since the server began")
    before = page.locator("#throughput-text").inner_text()
    parts = [("file", (f"{seed}.jpg", jpeg(seed))) for seed in range(50)]
    assert httpx.post(f"{server.url}/v1/score", files=parts, timeout=START_S).status_code == 200

    expect(page.locator("#throughput-text")).not_to_have_text(before)

    drift = httpx.get(f"{server.url}/v1/models/cifar10-resnet18/drift", timeout=START_S).json()
    window = drift["windows"][0]
    expect(page.locator("#rate")).to_have_text(f"{100 * window['rate']:.1f}%")
    expect(page.locator("#rate-text")).to_contain_text(f"of {window['images']} images")
    expect(page.locator("#rate-text")).to_contain_text(
        f"{100 * window['lower']:.1f}% to {100 * window['upper']:.1f}%"
    )
    expect(page.locator(".interval .dot")).to_have_count(3)
    expect(page.locator("#latency")).to_have_text(re.compile(r"[\d.]+ m?s"))
    expect(page.locator("#latency-text")).to_contain_text("99% within")
    expect(page.locator("#scores .legend")).to_contain_text(
        f"live, {sum(drift['histogram']['live'])} images"
    )
    expect(page.locator("#drift")).to_contain_text(
        "Drifted" if drift["martingale"]["alarm"] else re.compile("No sign|Evidence")
    )
    expect(page.locator("#queue")).to_have_text("0")


def test_the_switch(open_page: Open, server: Server) -> None:
    """The named model and version answers and is watched, and the card says which it was."""
    page = open_page(server.url).page
    expect(page.locator("#version option")).to_have_text(["2 (active)", "1"])
    page.get_by_role("button", name="ship").click()
    expect(card(page, "ship.jpg").locator(".source")).to_have_text("cifar10-resnet18, version 2")

    page.get_by_label("Version").select_option("1")
    page.get_by_role("button", name="ship").click()

    newest = page.locator(".card").first
    expect(newest.locator(".source")).to_have_text("cifar10-resnet18, version 1")
    expect(newest.locator(".verdict")).to_have_text("Out-of-distribution")
    expect(page.locator("#live-text")).to_contain_text("cifar10-resnet18, version 1")

    page.get_by_label("Model").select_option("tiny")
    page.get_by_role("button", name="ship").click()

    expect(page.locator(".card").first.locator(".source")).to_have_text("tiny, version 1")
    expect(page.locator("#rate-text")).to_contain_text("calibrated to 20.0%")


def test_the_keyboard_alone(open_page: Open, server: Server) -> None:
    """Tab and Enter reach the file picker, an example and the theme; the focus can be seen."""
    page = open_page(server.url).page
    # From now on: a key could otherwise be faster than the order to hold choosers back.
    page.on("filechooser", lambda chooser: None)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip")).to_be_focused()
    expect(page.get_by_role("link", name="Skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#pick")).to_be_focused()
    outline = page.locator("#pick").evaluate("(button) => getComputedStyle(button).outlineStyle")
    assert outline == "solid"

    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(EXAMPLES / "truck.jpg")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="ship")).to_be_focused()
    page.keyboard.press("Enter")

    expect(card(page, "truck.jpg").locator(".verdict")).to_have_text("In-distribution")
    expect(card(page, "ship.jpg").locator(".verdict")).to_have_text("In-distribution")
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_looks(open_page: Open, server: Server, width: int, theme: Any) -> None:
    """Nothing is wider than the window, and all text stands out from its ground (WCAG AA)."""
    watched = open_page(
        server.url,
        viewport={"width": width, "height": 800},
        color_scheme=theme,
        reduced_motion="reduce",
    )
    page = watched.page
    judge(
        page,
        EXAMPLES / "ship.jpg",
        EXAMPLES / "noise.jpg",
        payload(f"{'long' * 30}.txt", b"hello", "text/plain"),
    )
    expect(page.locator(".card:not([data-verdict=waiting])")).to_have_count(3)
    expect(page.locator("#rate")).to_contain_text("%")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    [(_, _, ground)] = page.locator("body").evaluate_all(COLOURS)
    assert (luminance(ground) < 0.2) is (theme == "dark")
    texts = page.locator(TEXTS).evaluate_all(COLOURS)
    assert len(texts) > 60
    assert [text for text, colour, behind in texts if contrast(colour, behind) < AA_TEXT] == []
    border = page.locator("#drop").evaluate("(zone) => getComputedStyle(zone).borderTopColor")
    [(_, _, surface)] = page.locator("#drop").evaluate_all(COLOURS)
    assert contrast(border, surface) >= AA_SHAPE
    animation = page.locator(".card").first.evaluate("(card) => getComputedStyle(card).animation")
    assert "appear" not in animation
    watched.forgive("415 (Unsupported Media Type)")


def test_a_busy_server_is_asked_again(open_page: Open, server: Server) -> None:
    """429 is no verdict yet: the page waits as long as Retry-After says, then asks again."""
    refused: list[str] = []

    def refuse_twice(route: Route) -> None:
        if len(refused) == 2:
            route.continue_()
            return
        refused.append(route.request.url)
        problem = json.dumps({"detail": "the queue is full"})
        route.fulfill(status=429, headers={"Retry-After": "0"}, body=problem)

    watched = open_page(server.url)
    watched.page.route("**/v1/score?*", refuse_twice)

    watched.page.get_by_role("button", name="ship").click()

    expect(card(watched.page, "ship.jpg").locator(".verdict")).to_have_text("In-distribution")
    assert len(refused) == 2
    watched.forgive("429 (Too Many Requests)")


def test_an_answer_that_cannot_be_read(open_page: Open, server: Server) -> None:
    """A page of a proxy's in place of an answer is told as any silence, and asked again after."""
    watched = open_page("about:blank")
    page = watched.page
    page.route("**/v1/models", lambda route: route.fulfill(body="<html>Log in</html>"))
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("Away")

    page.unroute("**/v1/models")

    expect(page.locator("#state")).to_have_text("Ready")


def test_nobody_looks(open_page: Open, server: Server) -> None:
    """While the tab is hidden nothing is asked; when it is seen again, at once."""
    page = open_page("about:blank").page
    page.clock.install()
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("Ready")
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with page.expect_response("**/metrics"):
        page.clock.run_for(5_000)
    asked: list[str] = []

    page.evaluate(hide, True)
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request("**/metrics"):
        page.evaluate(hide, False)


def test_a_key_and_a_restart(open_page: Open, store: Path) -> None:
    """A key is asked for and kept in memory alone; a server that goes is found when it is back."""
    flags = ["--model-store", str(store), "--model", "tiny", "--api-keys", '["right"]']
    with serving(flags) as first:
        watched = open_page(first.url)
        page = watched.page
        expect(page.get_by_label("This server asks for an API key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_label("The server does not accept this key").fill("right")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#key-form")).to_be_hidden()
        stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
        assert "right" not in stored
        assert page.context.cookies() == []

    expect(page.locator("#state")).to_have_text("Away")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer. Asking again in")
    judge(page, EXAMPLES / "ship.jpg")
    expect(card(page, "ship.jpg").locator(".error")).to_have_text("The server does not answer.")

    with serving([*flags, "--port", str(httpx.URL(first.url).port)]):
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#away")).to_be_hidden()
        card(page, "ship.jpg").get_by_role("button", name="Try again").click()
        expect(card(page, "ship.jpg").locator(".source")).to_have_text("tiny, version 1")
    watched.forgive("401 (Unauthorized)")
    watched.forgive("net::ERR_")
    watched.forgive("503 (Service Unavailable)", least=0)  # it may be asked while it loads


def test_the_metrics_reader(open_page: Open, server: Server) -> None:
    """Labels with any content, and quantiles between two scrapes, are read right."""
    text = "\n".join(
        [
            "# HELP a_total Some.",
            r'a_total{model="a\"b\\n}",version="1"} 3.0',
            r'a_total{model="c",version="1"} 4e1',
            'b_bucket{le="0.1"} 5',
            'b_bucket{le="0.2"} 10',
            'b_bucket{le="+Inf"} 10',
        ]
    )
    page = open_page(server.url).page

    found = page.evaluate(
        r"""async (text) => {
          const { Samples, quantile } = await import("/static/prometheus.js");
          const samples = new Samples(text);
          const buckets = samples.buckets("b");
          return [
            samples.sum("a_total"), samples.sum("a_total", { model: 'a"b\\n}' }),
            samples.has("missing"), quantile(0.75, [], buckets), quantile(0.5, buckets, buckets),
          ];
        }""",
        text,
    )

    assert found == [43, 3, False, pytest.approx(0.15), None]


def test_without_scripts(open_page: Open, server: Server) -> None:
    """Without JavaScript the page says what it needs, and what does the same."""
    page = open_page(server.url, java_script_enabled=False).page

    expect(page.locator("noscript p")).to_be_visible()
    assert "This page needs JavaScript" in page.locator("noscript").inner_html()
