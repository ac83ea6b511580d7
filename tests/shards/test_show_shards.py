"""Statistics and the page of `prepare_data.py show`, also in a browser where there is one."""

import re
import subprocess

import pytest

from examples.mimo.data.conversation import Sample, SampleEncoder, TokenSequence
from examples.mimo.shards.show import ShownSample, Statistics, inspect_shards, render_page
from examples.mimo.shards.write import WriteOptions, prepare_shards
from tests.helpers.chromium import find_chromium
from tests.helpers.commands import run_command

pytest.importorskip("megatron.energon")
BROWSER = find_chromium()

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
    options = WriteOptions(data_folder / "train.jsonl", data_folder, output, splits, 10**7, 99, 2)
    prepare_shards(options, tiny)
    lines = ['{"place": "line 1", "key": "a", "reason": "x: <b>cut</b>"}', ""]
    (output / "rejected.jsonl").write_text("\n".join(lines))
    return output


@pytest.fixture(scope="module")
def inspected(shards, tiny, tokenizer):
    reader = SampleEncoder(tiny, tokenizer, 128)
    statistics, shown = inspect_shards(shards, reader, limit=50, num_shown=20)
    return statistics, shown, render_page(shards, statistics, shown, reader)


def test_statistics_count_what_is_there(inspected):
    statistics, shown, _ = inspected
    assert sum(statistics.samples.values()) == len(statistics.tokens) > 100
    assert set(statistics.samples) == {"train", "val"}
    assert set(statistics.media["images"]) == {"64 x 64"}
    assert statistics.refused == {"<b>cut</b>": 1}
    assert len(shown) == 20
    text = "\n".join(statistics.lines())
    assert re.search(r"tokens    \d+ to \d+, median \d+", text)


def test_the_page_marks_target_tokens_and_runs_nothing(inspected):
    _, shown, text = inspected
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert "<b>cut" not in text
    assert "&lt;b&gt;cut" in text
    sections = text.split("<section>")[1:]
    for sample, section in zip(shown, sections, strict=True):
        tokens = sample.sample.tokens
        targets = re.findall(r'class="target" title="(\d+)"', section)
        pairs = zip(tokens.labels, tokens.loss_mask, strict=True)
        assert list(map(int, targets)) == [label for label, mask in pairs if mask]
        for name, items in sample.previews.items():
            assert section.count(f"<figcaption>{name}") == len(items)
            runs = re.findall(rf"&lt;{name[:-1]}&gt; x (\d+)", section)
            assert len(runs) == len(sample.sample.media[name])


def preview(content_type, content):
    """The page's part for a text-only sample with one preview of this type."""
    sample = Sample("a", TokenSequence([2, 3], [3, 0], [1, 0]), {}, {})
    return ShownSample(sample, "train", {"things": [(content_type, content)]})


@pytest.mark.parametrize(
    ("content_type", "element"),
    [
        ("image/svg+xml", '<img src="data:image/svg+xml;base64,PGI+" alt="things of a">'),
        ("audio/flac", '<audio controls src="data:audio/flac;base64,PGI+"'),
        ("video/mp4", '<video controls src="data:video/mp4;base64,PGI+"'),
        ("text/plain", "<pre>&lt;b&gt;</pre>"),
        ("application/x-npy", '<a download href="data:application/x-npy;base64,PGI+">'),
        ('image/"><script>', '<img src="data:image/&quot;&gt;&lt;script&gt;;base64,PGI+"'),
    ],
)
def test_the_content_type_decides_how_a_preview_is_shown(
    tiny, tokenizer, tmp_path, content_type, element
):
    reader = SampleEncoder(tiny, tokenizer, 128)
    page = render_page(tmp_path, Statistics(), [preview(content_type, b"<b>")], reader)
    assert element in page
    assert "<script" not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_pictures_and_plays_the_sounds(inspected, tmp_path):
    _, shown, text = inspected
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
        sum(len(sample.previews.get(name, [])) for sample in shown) for name in ("images", "audios")
    )
    assert title == f"{pictures} pictures, {sounds} sounds"


def test_the_command(shards, data_folder, tmp_path):
    page_file = tmp_path / "page.html"
    named = ("--html", str(page_file), "--tokenizer", str(data_folder))
    done = run_command("prepare_data.py", "show", str(shards), *named)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("samples   200 (train ")
    assert "24 samples as tiny_avlm sees them" in done.stderr
    assert page_file.read_text().count("<section>") == 24
