"""The page in a real browser: whole flows as a person does them, by mouse, keyboard and camera.

Needs Debian's Chromium, playwright and axe-core (`make test-page` gets them). Screenshots go to
$PAGE_SHOTS, where it is set.
"""

import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.server.app import Served

from ..demo import IMAGES, VISUAL, known
from .conftest import running

playwright = pytest.importorskip("playwright.sync_api", reason="make test-page installs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parents[2] / ".venv" / "node" / "node_modules" / "axe-core" / "axe.min.js"
if CHROMIUM is None:
    pytest.skip("make test-page installs Chromium", allow_module_level=True)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--no-first-run", "--disable-component-update", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]  # fmt: skip
SIZES = {
    "desk": ({"width": 1280, "height": 800}, "light"),
    "phone": ({"width": 390, "height": 844}, "dark"),
}
DESK = pytest.mark.parametrize("page", ["desk"], indirect=True)  # nothing to do with its width
DESCRIBE = known("shapes.png", "Describe the image.")
READ = known("text.png", "What does it say?")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request, browser, address):
    """The page, ready; at its end nothing may have gone wrong or been fetched from elsewhere."""
    viewport, scheme = SIZES[request.param]
    context = browser.new_context(
        viewport=viewport,
        color_scheme=scheme,
        permissions=["camera", "clipboard-read", "clipboard-write"],
    )
    page, wrong, elsewhere = context.new_page(), [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda r: (
            elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
        ),
    )
    page.goto(address)
    page.get_by_role("status").get_by_text("demo", exact=True).wait_for()
    page.kind = request.param
    yield page
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []
    assert elsewhere == []
    context.close()


def shot(page, name):
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(path=f"{folder}/{name}-{page.kind}.png")


def check_accessible(page):
    """axe finds nothing serious."""
    if not AXE.is_file():
        pytest.skip("make test-page installs axe-core")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")["violations"]
    assert [
        (v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")
    ] == []


def ask(page, text, *pictures):
    if pictures:
        page.set_input_files("#file", [str(IMAGES / name) for name in pictures])
        page.locator("#pictures img").nth(len(pictures) - 1).wait_for()
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def answers(page):
    return page.get_by_role("article", name="Answer")


def endless(page, served, monkeypatch, text, *pictures):
    """Ask what is answered until it is stopped, and wait for the first words."""
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.processor, "eos_ids", frozenset())
        page.evaluate("document.getElementById('max_tokens').value = 1900")
        ask(page, text, *pictures)
        page.locator(".busy .text").get_by_text(re.compile("....")).wait_for()


def wait_until_stored(page, *talks):
    """Until the browser keeps these conversations, each a list of its turns' texts or failures."""
    for _ in range(600):
        kept = page.evaluate("""() => new Promise((resolve) => {
          const opening = indexedDB.open("mlx-vlm-edge", 1);
          opening.onsuccess = () => {
            const kept = opening.result.transaction("conversations").objectStore("conversations");
            const all = kept.getAll();
            all.onsuccess = () => resolve(all.result.sort((one, other) => one.when - other.when)
              .map(({ turns }) => turns.map((turn) => turn.failed ?? turn.text)));
          };
        })""")
        if kept == list(talks):
            return
        page.wait_for_timeout(100)
    assert kept == list(talks)


def wait_until_it_goes_on(page):
    """Until the answer under way is longer than now."""
    growing = page.locator(".busy")
    playwright.expect(growing).not_to_have_text(growing.inner_text(), timeout=30_000)


def asked(page, action):
    """The texts of the messages that an action sends."""
    with page.expect_request("**/v1/chat/completions") as request:
        action()
    messages = request.value.post_data_json["messages"]
    return [message["content"] if message["role"] == "assistant" else message["content"][-1]["text"]
            for message in messages]  # fmt: skip


def test_a_question_about_a_picture_and_another(page):
    shot(page, "empty")
    ask(page, DESCRIBE.question, DESCRIBE.picture)
    page.get_by_role("button", name="Retry").wait_for()
    assert answers(page).first.locator(".text").inner_text() == DESCRIBE.answer
    facts = answers(page).first.locator(".facts").inner_text()
    assert f"{VISUAL} visual tokens" in facts
    assert "first token after" in facts
    assert "Vision" in answers(page).first.locator(".legend").inner_text() or "known" in facts
    ask(page, "What color is it?")
    answers(page).nth(1).locator(".facts").wait_for()
    assert "Vision" not in answers(page).nth(1).locator(".legend").inner_text()
    shot(page, "answered")
    check_accessible(page)


def test_retry_copy_and_new(page):
    ask(page, READ.question, READ.picture)
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == READ.answer
    page.get_by_role("button", name="New", exact=True).click()
    assert answers(page).count() == 0
    assert page.get_by_text("Drop a picture here").is_visible()


def test_pictures_are_added_removed_dropped_and_pasted(page):
    page.set_input_files("#file", [str(IMAGES / "text.png"), str(IMAGES / "shapes.png")])
    page.locator("#pictures img").nth(1).wait_for()
    page.get_by_role("button", name="Remove picture 2").click()
    assert page.locator("#pictures img").count() == 1
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
              const field = kind === "drop" ? "dataTransfer" : "clipboardData";
              const event = kind === "drop" ? new DragEvent(kind, { bubbles: true, [field]: data })
                : new ClipboardEvent(kind, { bubbles: true, [field]: data });
              document.body.dispatchEvent(event);
            }""",
            [kind, list((IMAGES / "hello.png").read_bytes())],
        )
    page.locator("#pictures img").nth(2).wait_for()
    shot(page, "pictures")
    check_accessible(page)


def test_a_file_that_is_no_picture_and_an_empty_question_are_told(page):
    page.set_input_files("#file", {"name": "x.txt", "mimeType": "text/plain", "buffer": b"x"})
    assert page.get_by_role("alert").inner_text() == "That is not a picture."
    page.get_by_role("button", name="Ask", exact=True).click()
    assert page.get_by_role("alert").inner_text() == "Type a question first."
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"x"})
    ask(page, "What is it?")
    page.locator(".failed").wait_for()
    assert "not an image" in page.locator(".failed").inner_text()
    shot(page, "failed")


def test_stop_keeps_what_was_said(page, served, monkeypatch):
    monkeypatch.setattr(served.engine.processor, "eos_ids", frozenset())
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tokens of an answer, at most").fill("1900")  # it must not end by itself
    page.get_by_role("button", name="Done").click()
    ask(page, DESCRIBE.question, DESCRIBE.picture)
    page.locator(".answer.busy .text").get_by_text(DESCRIBE.answer[:5]).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert answers(page).first.locator(".text").first.inner_text().startswith(DESCRIBE.answer[:3])


def test_settings_are_kept_and_obeyed(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tokens of an answer, at most").fill("2")
    check_accessible(page)
    shot(page, "settings")
    page.get_by_role("button", name="Done").click()
    page.reload()
    ask(page, DESCRIBE.question, DESCRIBE.picture)
    answers(page).first.locator(".facts").wait_for()
    assert "cut at the token limit" in answers(page).first.locator(".facts").inner_text()


def test_the_history_has_earlier_conversations(page):
    ask(page, READ.question, READ.picture)
    page.get_by_role("button", name="Retry").wait_for()
    page.reload()
    page.get_by_role("button", name="History").click()
    check_accessible(page)
    page.get_by_role("dialog").get_by_text(READ.question).click()
    assert answers(page).first.locator(".text").inner_text() == READ.answer
    assert page.get_by_role("img", name="Picture 1 of the question").is_visible()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Forget all").click()
    page.get_by_role("dialog").get_by_text(READ.question).wait_for(state="detached")


def test_the_live_camera_asks_again_and_again(page):
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("button", name="Ask again and again").click()
    page.get_by_text("frames/s").wait_for()
    assert page.locator("#live-answer").inner_text()
    shot(page, "camera")
    check_accessible(page)
    page.get_by_role("button", name="Stop asking").click()
    page.get_by_role("button", name="Take picture").click()
    page.locator("#pictures img").first.wait_for()
    page.get_by_role("button", name="Close camera").click()
    assert not page.locator("#camera").is_visible()


def test_everything_is_reached_by_keyboard(page):
    reached = set()
    page.keyboard.press("Tab")
    for _ in range(12):
        reached.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {
        "history-open",
        "settings-open",
        "new",
        "question",
        "pick",
        "camera-open",
        "send",
    } <= reached


def test_without_javascript_it_says_so(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.get_by_text("needs JavaScript").is_visible()
    context.close()


def test_an_adapter_is_chosen_in_the_settings(browser, demo):
    """And remembered, as the other settings are."""
    engine = Engine(*demo, adapters={"receipts": demo[0]})
    served = Served("demo", engine=engine, adapters=("receipts",))
    with running(served) as address, closing(browser.new_page()) as page:
        page.goto(address)
        page.get_by_role("status").get_by_text("demo", exact=True).wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Model").select_option("demo:receipts")
        page.get_by_role("button", name="Done").click()
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "What are you?")
        assert asked.value.post_data_json["model"] == "demo:receipts"
        page.get_by_role("button", name="Retry").wait_for()
        page.reload()
        page.get_by_role("status").get_by_text("demo:receipts", exact=True).wait_for()
    engine.close()


def test_without_adapters_there_is_no_choice(page):
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Model").is_hidden()


@DESK
def test_an_answer_stays_in_the_conversation_that_was_asked(page, served, monkeypatch):
    """Whatever is shown when it is over; the one that is left is stored as far as it came."""
    endless(page, served, monkeypatch, DESCRIBE.question, DESCRIBE.picture)
    page.get_by_role("button", name="New", exact=True).click()
    assert asked(page, lambda: ask(page, READ.question, READ.picture)) == [READ.question]
    page.get_by_role("button", name="Retry").wait_for()
    assert answers(page).all_inner_texts()[0].startswith(READ.answer)
    left = [DESCRIBE.question, "Stopped."]
    wait_until_stored(page, left, [READ.question, READ.answer])
    endless(page, served, monkeypatch, "And?")
    page.get_by_role("button", name="History").click()
    page.get_by_role("dialog").get_by_text(DESCRIBE.question).click()
    page.get_by_text("Stopped.").wait_for()
    assert answers(page).count() == 1
    assert page.get_by_role("button", name="Ask", exact=True).is_visible()
    wait_until_stored(page, left, [READ.question, READ.answer, "And?", "Stopped."])


@DESK
def test_a_question_that_fails_does_not_fail_the_next_ones(page):
    page.set_input_files("#file", {"name": "x.svg", "mimeType": "image/svg+xml", "buffer": b"x"})
    page.get_by_role("alert").get_by_text("SVG drawings cannot be read").wait_for()
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"x"})
    page.locator("#pictures img").wait_for()
    ask(page, "What is it?")
    page.locator(".failed").wait_for()
    retry = page.get_by_role("button", name="Retry")
    assert asked(page, retry.click) == ["What is it?"]
    page.locator(".failed").wait_for()
    assert asked(page, lambda: ask(page, READ.question, READ.picture)) == [READ.question]
    answers(page).nth(1).get_by_text(READ.answer).wait_for()
    retry.wait_for()
    page.route("**/v1/chat/completions", lambda route: None)  # which nothing is said to
    ask(page, "And?")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped before the first word.").wait_for()
    page.unroute("**/v1/chat/completions")
    said = [READ.question, READ.answer, "What color is it?"]
    assert asked(page, lambda: ask(page, said[-1])) == said
    retry.wait_for()


@DESK
def test_the_camera_and_an_answer_are_stopped_each_for_itself(page, served, monkeypatch):
    page.get_by_role("button", name="Camera", exact=True).click()
    loop = page.get_by_role("button", name="Ask again and again")
    loop.click()
    page.get_by_text("frames/s").wait_for()
    endless(page, served, monkeypatch, DESCRIBE.question, DESCRIBE.picture)  # in the loop's place
    loop.click()
    page.get_by_role("alert").get_by_text("An answer is under way").wait_for()
    page.get_by_role("button", name="Close camera").click()
    wait_until_it_goes_on(page)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped.").wait_for()


@DESK
def test_escape_stops_an_answer_but_not_from_a_dialog_or_an_input_method(page, served, monkeypatch):
    endless(page, served, monkeypatch, DESCRIBE.question, DESCRIBE.picture)
    page.get_by_role("button", name="Settings").click()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    page.evaluate("""document.dispatchEvent(
      new KeyboardEvent("keydown", { key: "Escape", isComposing: true, bubbles: true }))""")
    wait_until_it_goes_on(page)
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()


@DESK
def test_copy_without_https(page):
    """A page of another machine has no navigator.clipboard."""
    page.add_init_script(
        "Object.defineProperty(Navigator.prototype, 'clipboard', { value: undefined })"
    )
    page.reload()
    ask(page, READ.question, READ.picture)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    page.get_by_label("Your question").focus()
    page.keyboard.press("Control+V")
    assert page.get_by_label("Your question").input_value() == READ.answer
    page.evaluate("document.execCommand = () => false")
    page.get_by_role("button", name="Copied").click()
    page.get_by_role("alert").get_by_text("select the text").wait_for()


@DESK
def test_a_browser_that_keeps_nothing_can_ask(page):
    page.add_init_script("""
      const denied = { get() { throw new DOMException("denied", "SecurityError"); } };
      Object.defineProperty(window, "localStorage", denied);
      Object.defineProperty(window, "indexedDB", denied);""")
    page.reload()
    page.get_by_role("status").get_by_text("demo", exact=True).wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Done").click()
    ask(page, READ.question, READ.picture)
    page.get_by_role("button", name="Retry").wait_for()
    page.get_by_role("alert").get_by_text("keeps no history").wait_for()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Forget all").click()
    assert page.locator("#past li").count() == 0
