"""The server's page in a real browser; needs the package playwright and a Chromium."""

import base64
import io

import pytest
import soundfile
from PIL import Image

from tests.helpers.chromium import find_chromium
from tests.helpers.commands import QUESTION
from tests.helpers.served import KEY, answer_of, user

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page's test needs playwright: pip install playwright"
)
CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="the page's test needs a Chromium: apt install chromium"
)


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
        tab.wait_for_selector("#examples button")
        tab.click("summary")
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
    expected = served.ask({"messages": [asked, said, user(QUESTION)]})[1]
    assert second == answer_of(expected).strip()
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
            document.body.dispatchEvent(
              new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));
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
    assert (picture["type"], picture["modality"]) == ("input_file", "images")
    drawn = base64.b64decode(picture["data"].partition("base64,")[2])
    assert Image.open(io.BytesIO(drawn)).size == (32, 32)
    assert (recording["type"], recording["modality"]) == ("input_file", "audios")
    heard = base64.b64decode(recording["data"].partition("base64,")[2])
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


def test_a_file_of_no_modality_is_refused_and_a_file_can_be_taken_back(page, media, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#files", [tmp_path / "notes.txt", media / "white.png"])
    page.wait_for_selector("#items img")
    assert "notes.txt: this model takes files that end in ." in page.inner_text(".error")
    page.get_by_label("Remove white.png").click()
    assert page.locator("#items .item").count() == 0


def test_it_is_used_by_keyboard_alone(page, served):
    page.click("#reset")
    with page.expect_request("**/v1/chat/completions") as sent:
        # From the message back past files and the conversation to the examples.
        page.focus("#examples button")
        page.keyboard.press("Enter")
        page.wait_for_selector("#items img")
        page.wait_for_function("document.activeElement.id == 'prompt'")
        page.keyboard.type("Which digit is this?")
        page.keyboard.press("Enter")
    page.locator(".answer.done").wait_for()
    (message,) = sent.value.post_data_json["messages"]
    digit = base64.b64decode(message["content"][0]["data"].partition("base64,")[2])
    assert Image.open(io.BytesIO(digit)).size == (256, 256)
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.get_attribute("#log", "aria-live") == "polite"
    names = "e => e.ariaLabel || e.innerText || e.labels?.[0]?.innerText || e.placeholder"
    for control in page.locator("button:visible, input:visible, textarea:visible").all():
        assert control.evaluate(names)
    for picture in page.locator("img").all():
        assert picture.get_attribute("alt")


def test_the_recorded_example_is_sound(page, served):
    page.locator("#examples button").nth(1).click()
    page.wait_for_selector("#items audio")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is it?", 1)
    (message,) = sent.value.post_data_json["messages"]
    notes = base64.b64decode(message["content"][0]["data"].partition("base64,")[2])
    samples, rate_hz = soundfile.read(io.BytesIO(notes))
    assert (len(samples), rate_hz) == (24_000, 16_000)
    assert abs(samples).max() > 0.3


def test_files_of_any_modality_are_sent(page, tmp_path):
    known = {"name": "sensors", "singular": "sensor", "suffixes": [".csv"], "media_types": []}
    listed = {"model": "m", "prompt": "What is it?", "modalities": [known]}
    page.route("**/modalities", lambda route: route.fulfill(json=listed))
    page.reload()
    page.get_by_text("takes text and sensors").wait_for()
    assert page.locator("#examples button").count() == 0
    assert page.locator("#record").is_hidden()
    (tmp_path / "room.CSV").write_text("1,2,3")
    page.set_input_files("#files", tmp_path / "room.CSV")
    page.get_by_text("room.CSV, 1 KB").wait_for()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("#send")
    (message,) = sent.value.post_data_json["messages"]
    part, text = message["content"]
    assert (part["type"], part["modality"]) == ("input_file", "sensors")
    assert base64.b64decode(part["data"].partition("base64,")[2]) == b"1,2,3"
    assert text["text"] == "What is it?"


def test_an_answer_is_played_as_it_comes_and_kept_in_a_player(page, speaking):
    page.goto(f"http://127.0.0.1:{speaking.port}/")
    page.get_by_text("answers with text and speech").wait_for()
    page.evaluate(
        """() => {
          window.scheduled = 0;
          const start = AudioBufferSourceNode.prototype.start;
          AudioBufferSourceNode.prototype.start = function (at) {
            window.scheduled += this.buffer.length; start.call(this, at);
          };
        }"""
    )
    page.check("#aloud")
    first = ask(page, QUESTION, 1)
    page.locator(".turn.model audio").wait_for()
    sound = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    body = {"messages": [user(QUESTION)], "max_tokens": 1024, **sound}
    expected = speaking.ask(body)["choices"][0]["message"]["audio"]
    assert first == expected["transcript"]
    num_samples = len(base64.b64decode(expected["data"])) // 2
    assert page.evaluate("() => window.scheduled") == num_samples
    page.wait_for_function("() => document.querySelector('.turn.model audio').duration > 0")
    duration = page.evaluate("() => document.querySelector('.turn.model audio').duration")
    assert abs(duration - num_samples / 24_000) < 0.001
    # The next turn names it, and an answer without sound has no player.
    page.uncheck("#aloud")
    with page.expect_request("**/v1/chat/completions") as sent:
        second = ask(page, "And now?", 2)
    asked = sent.value.post_data_json
    assert "modalities" not in asked
    assert asked["messages"][1]["audio"]["id"].startswith("audio_")
    assert (
        second
        == speaking.ask(asked | {"stream": False, "stream_options": None})["choices"][0]["message"][
            "content"
        ].strip()
    )
    assert page.locator(".turn.model audio").count() == 1


def test_a_model_without_sound_has_no_control_for_it(page):
    assert page.locator("#aloud-control").is_hidden()
    assert "answers" not in page.inner_text("#takes")
