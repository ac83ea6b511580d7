"""The server's page in a real browser; needs the package playwright and an installed Chromium."""

import base64
import io
import shutil

import pytest
import soundfile
from PIL import Image

from tests.generation.served import KEY, QUESTION, answer_of, user

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


@pytest.fixture
def page(served):
    with sync_api.sync_playwright() as playwright:
        sound = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *sound]
        )
        tab = browser.new_page(viewport={"width": 800, "height": 640})
        wrong = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(f"http://127.0.0.1:{served.port}/")
        tab.fill("#key", KEY)
        yield tab
        assert not wrong
        browser.close()


def ask(page, text, number):
    page.fill("#prompt", text)
    page.click("#send")
    answer = page.locator(".answer.done").nth(number - 1)
    answer.wait_for()
    return answer.inner_text()


def test_a_picture_and_a_recording_are_answered(page, served, media, tmp_path):
    page.set_input_files("#files", [media / "white.png", media / "second.wav"])
    page.wait_for_selector("#items audio")
    assert page.locator("#items img").evaluate("image => image.naturalWidth") == 40
    first = ask(page, "What is it?", 1)
    asked = user("What is it?", media)
    assert first == answer_of(served.ask({"messages": [asked]})[1]).strip()
    second = ask(page, QUESTION, 2)
    said = {"role": "assistant", "content": first}
    wanted = served.ask({"messages": [asked, said, user(QUESTION)]})[1]
    assert second == answer_of(wanted).strip()
    page.click("#reset")
    assert page.locator(".turn").count() == 0
    assert ask(page, QUESTION, 1) == answer_of(served.ask({"messages": [user(QUESTION)]})[1])


def test_a_file_is_dropped_and_sound_is_recorded(page, served):
    page.evaluate(
        """() => {
          const carried = new DataTransfer();
          const canvas = new OffscreenCanvas(32, 32);
          canvas.getContext("2d").fillRect(8, 8, 16, 16);
          return canvas.convertToBlob().then(blob => {
            carried.items.add(new File([blob], "drawn.png", {type: "image/png"}));
            document.getElementById("drop").dispatchEvent(
              new DragEvent("drop", {dataTransfer: carried}));
          });
        }"""
    )
    page.wait_for_selector("#items img")
    page.click("#record")
    page.get_by_text("Stop recording").wait_for()
    page.wait_for_timeout(1_000)
    page.click("#record")
    page.wait_for_selector("#items audio")
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = ask(page, "What is it?", 1)
    (message,) = sent.value.post_data_json["messages"]
    picture, recording, text = message["content"]
    assert text == {"type": "text", "text": "What is it?"}
    drawn = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    assert Image.open(io.BytesIO(drawn)).size == (32, 32)
    heard = base64.b64decode(recording["input_audio"]["data"])
    samples, rate_hz = soundfile.read(io.BytesIO(heard))
    assert 0.5 < len(samples) / rate_hz < 2.4
    assert abs(samples).max() > 0.01
    assert answer == answer_of(served.ask({"messages": [message]})[1]).strip()


def test_an_error_is_shown(page):
    page.fill("#key", "wrong")
    page.fill("#prompt", "hi")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "API key is missing or wrong" in page.inner_text(".error")
