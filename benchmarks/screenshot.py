r"""Pictures of the server's page with an answer: desktop, dark and narrow.

    python -m benchmarks.screenshot --ckpt demo/checkpoint --files digit.png question.wav \
        --prompt "" --output docs/page

writes docs/page-desktop.png, -dark.png and -narrow.png, and prints the answer. Needs the package
playwright and a Chromium (tests/helpers/chromium.py says where it is looked for).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.helpers import ranks
from tests.helpers.chromium import find_chromium

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS, ANSWER_MILLISECONDS = 300, 120_000
SCREENS = {
    "desktop": {"viewport": {"width": 900, "height": 760}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 900, "height": 760}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 760}, "color_scheme": "light"},
}


def serve(ckpt: Path) -> tuple[subprocess.Popen, str]:
    """A server of a checkpoint, once it answers, and its address."""
    port = ranks.free_port()
    command = [sys.executable, str(ROOT / "examples/mimo/serve.py"), "--ckpt", str(ckpt)]
    process = subprocess.Popen([*command, "--port", str(port)], env=dict(os.environ))
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health")
            return process, address
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server does not answer")


def main() -> None:
    """Ask on the page and save what it shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    parser.add_argument("--prompt", default="", help="default: the model's own prompt")
    parser.add_argument("--output", type=Path, required=True, help="beginning of the files' names")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    process, address = serve(args.ckpt)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, screen in SCREENS.items():
                page = browser.new_page(**screen)
                page.goto(address)
                page.wait_for_selector("#examples button")
                if not args.files:
                    page.screenshot(path=f"{args.output}-{name}-start.png")
                page.set_input_files("#files", args.files)
                page.wait_for_function(
                    "count => document.querySelectorAll('#items .item').length == count",
                    arg=len(args.files),
                )
                page.fill("#prompt", args.prompt)
                if args.files or args.prompt:
                    page.click("#send")
                    page.locator(".answer.done").wait_for(timeout=ANSWER_MILLISECONDS)
                    page.locator(".meta").wait_for()
                    print(page.inner_text(".answer.done"))
                    # Players and pictures are drawn a moment after they are there.
                    page.wait_for_timeout(500)
                    page.screenshot(path=f"{args.output}-{name}.png")
                page.close()
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    main()
