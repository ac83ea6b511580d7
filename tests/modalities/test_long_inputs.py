"""Items that are several of the encoder's inputs: windows, tiles, frames."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from examples.mimo.configs import get_model_config
from examples.mimo.data.batch import collate
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.modalities.files import fit_picture, grid_of_tiles
from examples.mimo.modalities.video import read_frames
from examples.mimo.planner.pipeline import num_inputs
from tests.helpers.videos import write_video

RATE = 16_000
av = pytest.importorskip("av")


@pytest.fixture
def whisper(tiny):
    return dataclasses.replace(tiny.modalities["audios"].encoder, max_windows=4)


@pytest.fixture
def vit(tiny):
    return tiny.modalities["images"].encoder


def test_windows_follow_one_another(whisper):
    sound = np.random.default_rng(0).uniform(-1, 1, 2 * whisper.window_samples + 960)
    inputs = whisper.preprocess(sound.astype(np.float32))
    assert inputs["input_features"].shape == (3, 40, 2 * whisper.window_frames)
    assert inputs["num_frames"].tolist() == [60, 60, 2]
    assert whisper.num_tokens(inputs) == 20 + 20 + 1
    one = dataclasses.replace(whisper, max_windows=1)
    for number in range(2):
        window = sound[number * whisper.window_samples :][: whisper.window_samples]
        alone = one.preprocess(window.astype(np.float32))
        assert torch.equal(alone["input_features"][0], inputs["input_features"][number])


def test_more_than_all_windows_is_refused_or_cut(whisper, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(5 * whisper.window_samples), RATE)
    with pytest.raises(ValueError, match=r"12\.00 seconds of sound, but 9\.6 fit"):
        whisper.read(tmp_path / "a.wav")
    cut = dataclasses.replace(whisper, overflow="truncate").read(tmp_path / "a.wav")
    assert len(cut) == 4 * whisper.window_samples


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((32, 32), 4, (0, 0)),
        ((64, 64), 0, (0, 0)),
        ((64, 64), 4, (2, 2)),
        ((96, 32), 4, (3, 1)),
        ((32, 200), 4, (1, 4)),
        ((64, 64), 3, (1, 1)),
        ((33, 33), 9, (2, 2)),
    ],
)
def test_the_grid_keeps_the_most_pixels(size, max_tiles, grid):
    assert grid_of_tiles(size, 32, max_tiles) == grid


def test_tiles_follow_the_whole_picture_row_by_row(vit):
    tiled = dataclasses.replace(vit, max_tiles=6)
    values = np.zeros((64, 96, 3), np.uint8)
    for row in range(2):
        for column in range(3):
            values[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 40 * (
                3 * row + column
            )
    inputs = tiled.preprocess(Image.fromarray(values))
    pixels = inputs["pixel_values"]
    assert pixels.shape == (7, 3, 32, 32)
    assert tiled.num_tokens(inputs) == 7 * 16
    mean, std = 0.48145466, 0.26862954
    shades = (pixels[1:, 0] * std + mean) * 255
    assert [round(float(shade.mean())) for shade in shades] == [0, 40, 80, 120, 160, 200]
    assert torch.equal(pixels[:1], vit.preprocess(Image.fromarray(values))["pixel_values"])


def test_a_picture_of_another_shape_becomes_square():
    picture = Image.new("RGB", (40, 20), (200, 0, 0))
    picture.paste((0, 0, 200), (0, 0, 10, 20))
    cropped, stretched, padded = (
        np.asarray(fit_picture(picture, (20, 20), fit, (9, 9, 9)))
        for fit in ("crop", "stretch", "pad")
    )
    assert (cropped == (200, 0, 0)).all()
    assert tuple(stretched[10, 1]) == (0, 0, 200)
    assert tuple(stretched[10, 18]) == (200, 0, 0)
    assert (padded[:5] == 9).all()
    assert (padded[-5:] == 9).all()
    assert tuple(padded[10, 1]) == (0, 0, 200)


def test_padding_is_what_the_llava_processor_does(vit):
    """Its expand2square, then the same resampling."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    padded = fit_picture(picture, (32, 32), "pad", (122, 116, 104))
    expected = Image.new("RGB", (32, 32), (122, 116, 104))
    expected.paste(picture, (6, 0))
    assert padded.tobytes() == expected.tobytes()


def test_placeholders_of_long_inputs_are_counted(tiny, tokenizer, whisper, vit, tmp_path):
    audios = dataclasses.replace(tiny.modalities["audios"], encoder=whisper)
    images = dataclasses.replace(
        tiny.modalities["images"], encoder=dataclasses.replace(vit, max_tiles=4)
    )
    config = dataclasses.replace(tiny, modalities={"images": images, "audios": audios})
    soundfile.write(tmp_path / "a.wav", np.full(3 * RATE, 0.1), RATE)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": "<image><audio>?"},
        {"role": "assistant", "content": "yes"},
    ]
    files = {"images": [tmp_path / "a.png"], "audios": [tmp_path / "a.wav"]}
    sample = SampleEncoder(config, tokenizer, 256).encode({"conversations": turns, **files}, None)
    assert sample.tokens.ids.count(4) == 5 * 16
    assert sample.tokens.ids.count(5) == 20 + 5
    batch = collate([sample, sample])
    assert [num_inputs(batch, name) for name in ("images", "audios")] == [10, 4]
    assert len(batch.items["images"]) == 2


def brightness(frames):
    return [float(np.asarray(frame).mean()) / 255 for frame in frames]


def test_frames_are_taken_at_the_stated_rate(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=41, rate=10)
    frames = read_frames(path, frames_per_second=1.0, max_frames=8)
    assert brightness(frames) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=0.03)
    assert {frame.size for frame in frames} == {(48, 32)}
    assert len(read_frames(path, frames_per_second=2.0, max_frames=20)) == 9


def test_a_longer_video_is_spread_over_its_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=200, rate=10)
    frames = read_frames(path, frames_per_second=1.0, max_frames=4)
    assert brightness(frames) == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.03)


def test_a_frame_that_stays_is_taken_as_often(tmp_path):
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number, tick in enumerate((0, 50, 100)):
            grey = np.full((32, 48, 3), 100 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "a.mkv", frames_per_second=0.5, max_frames=8)
    assert brightness(frames) == pytest.approx([0, 0, 0, 0.39, 0.39, 0.78], abs=0.03)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such video file"),
        (b"", "is empty"),
        (b"hello" * 100, "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_frames(tmp_path / "a.mp4", 1.0, 8)


def test_damaged_and_huge_videos_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=50, rate=10)
    with pytest.raises(ValueError, match=r"48 x 32, 1,536 pixels; from 1 to 1,000 can be read"):
        read_frames(path, 1.0, 8, max_pixels=1_000)
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(ValueError, match="no pictures in this file"):
        read_frames(path, 1.0, 8)
    path = write_video(tmp_path / "a.mkv", frames=50, rate=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged video, 3 of 5 frames"):
        read_frames(path, 1.0, 8)
    soundfile.write(tmp_path / "sound.wav", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="not a video"):
        read_frames(tmp_path / "sound.wav", 1.0, 8)


def test_transparent_frames_show_the_background(tmp_path):
    with av.open(tmp_path / "a.mov", "w") as container:
        stream = container.add_stream("png", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgba"
        pixels = np.full((32, 48, 4), 10, np.uint8)
        pixels[:, :24, 3], pixels[:, 24:, 3] = 255, 0
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    encoder = get_model_config("video_llava_vlm").modalities["videos"].encoder
    for background, colour in (("white", 255), ("black", 0)):
        (frame,) = dataclasses.replace(encoder, background=background).read(tmp_path / "a.mov")
        seen = np.asarray(frame)
        assert (seen[:, :24] == 10).all()
        assert (seen[:, 24:] == colour).all()


def test_frames_that_are_a_line_are_refused(tmp_path):
    """Scaled to an encoder's side they would take gigabytes."""
    path = write_video(tmp_path / "a.mkv", frames=2, rate=10, shape=(2, 2000))
    with pytest.raises(ValueError, match="2000 x 2 is more than 200 times as long as wide"):
        read_frames(path, 1.0, 8)


def test_a_video_is_one_item_of_many_frames(tmp_path):
    encoder = get_model_config("video_llava_vlm").modalities["videos"].encoder
    small = dataclasses.replace(encoder, image_size=56)
    raw = small.read(write_video(tmp_path / "a.mp4", frames=25, rate=10))
    inputs = small.preprocess(raw)
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    assert small.num_tokens(inputs) == 3 * 4
    assert encoder.max_inputs * encoder.max_tokens == 8 * 144
