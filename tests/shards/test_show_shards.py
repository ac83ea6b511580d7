"""Statistics and the page of `prepare_data.py show`, also in a browser where there is one."""

import re
import shutil
import subprocess

import pytest

from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.shards.show import look, page
from examples.mimo.shards.write import Options, prepare
from tests.conftest import run_command

pytest.importorskip("megatron.energon")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

# Counts what a person would see and hear, once everything has loaded.
PROBE = """<script>
addEventListener("load", async () => {
  const sounds = [...document.querySelectorAll("audio")];
  await Promise.all(sounds.map(s => s.readyState > 0 || new Promise(done => {
    s.addEventListener("loadedmetadata", done); s.addEventListener("error", done); s.load();
  })));
  const pictures = [...document.images].filter(i => i.complete && i.naturalWidth === 32);
  const seconds = sounds.map(s => s.duration).filter(d => d > 0.3 && d < 2.5);
  document.title = `${pictures.length} pictures, ${seconds.length} sounds`;
});
</script></body>"""


@pytest.fixture(scope="module")
def shards(data_folder, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "out"
    splits = {"train": 0.9, "val": 0.1}
    prepare(Options(data_folder / "train.jsonl", data_folder, output, splits, 10**7, 99, 2), tiny)
    lines = ['{"place": "line 1", "key": "a", "reason": "x: <b>cut</b>"}', ""]
    (output / "rejected.jsonl").write_text("\n".join(lines))
    return output


@pytest.fixture(scope="module")
def found(shards, tiny, tokenizer):
    reader = SampleEncoder(tiny, tokenizer, 128)
    statistics, shown = look(shards, reader, limit=50, shown=20)
    return statistics, shown, page(shards, statistics, shown, reader)


def test_statistics_count_what_is_there(found):
    statistics, shown, _ = found
    assert sum(statistics.samples.values()) == len(statistics.tokens) > 100
    assert set(statistics.samples) == {"train", "val"}
    assert set(statistics.media["images"]) == {"64 x 64"}
    assert statistics.refused == {"<b>cut</b>": 1}
    assert len(shown) == 20
    text = "\n".join(statistics.lines())
    assert re.search(r"tokens    \d+ to \d+, half of them up to \d+", text)


def test_the_page_marks_what_is_learned_and_runs_nothing(found, tokenizer):
    _, shown, text = found
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert "<b>cut" not in text
    assert "&lt;b&gt;cut" in text
    sections = text.split("<section>")[1:]
    for one, section in zip(shown, sections, strict=True):
        row = one.sample.tokens
        learned = re.findall(r'class="learned" title="(\d+)"', section)
        pairs = zip(row.labels, row.loss_mask, strict=True)
        assert list(map(int, learned)) == [label for label, mask in pairs if mask]
        for name, items in one.previews.items():
            assert section.count(f"<figcaption>{name}") == len(items)
            runs = re.findall(rf"&lt;{name[:-1]}&gt; x (\d+)", section)
            assert len(runs) == len(one.sample.media[name])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_pictures_and_plays_the_sounds(found, tmp_path):
    _, shown, text = found
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE))
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path}/user", "--virtual-time-budget=20000", "--dump-dom"),
            f"file://{tmp_path}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    pictures, sounds = (
        sum(len(one.previews.get(name, [])) for one in shown) for name in ("images", "audios")
    )
    assert title == f"{pictures} pictures, {sounds} sounds"


def test_the_command(shards, data_folder, tmp_path):
    page_file = tmp_path / "page.html"
    named = ("--html", str(page_file), "--tokenizer", str(data_folder))
    done = run_command("prepare_data.py", "show", str(shards), *named)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("samples   200 (train ")
    assert "24 samples as the model sees them" in done.stderr
    assert page_file.read_text().count("<section>") == 24
