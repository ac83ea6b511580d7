import struct

import numpy as np
import pytest
import torch
import transformers as hf

from demos.animals.weights import package_file
from demos.animals.weights.ctranslate2 import load_whisper, read_variables, write_whisper
from demos.animals.weights.onnx_vit import resize_positions
from examples.mimo.hf.io import Folder
from tests.helpers.commands import run_command

WIDTH, INNER, MELS, FRAMES = 16, 32, 8, 12


def ctranslate2_file(path, variables, version=6):
    def name(text):
        data = text.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    body = struct.pack("<I", version) + name("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for key, values in variables.items():
        kind = {"float16": 4, "int8": 1}[values.dtype.name]
        body += name(key) + struct.pack("<B", values.ndim)
        body += struct.pack(f"<{values.ndim}I", *values.shape)
        body += struct.pack("<BI", kind, values.nbytes) + values.tobytes()
    path.write_bytes(body)
    return path


@pytest.fixture
def variables():
    numbers = np.random.default_rng(0)

    def some(*shape):
        return numbers.normal(size=shape).astype(np.float16)

    result = {
        "decoder/embeddings/weight": some(5, WIDTH),
        "encoder/num_heads": np.array(2, np.int8),
        "encoder/conv1/weight": some(WIDTH, MELS, 3),
        "encoder/conv1/bias": some(WIDTH),
        "encoder/conv2/weight": some(WIDTH, WIDTH, 3),
        "encoder/conv2/bias": some(WIDTH),
        "encoder/position_encodings/encodings": some(FRAMES, WIDTH),
        "encoder/layer_norm/gamma": some(WIDTH),
        "encoder/layer_norm/beta": some(WIDTH),
    }
    for layer in range(2):
        root = f"encoder/layer_{layer}/"
        for norm in ("self_attention/layer_norm", "ffn/layer_norm"):
            result |= {f"{root}{norm}/gamma": some(WIDTH), f"{root}{norm}/beta": some(WIDTH)}
        sizes = {
            "self_attention/linear_0": (3 * WIDTH, WIDTH),
            "self_attention/linear_1": (WIDTH, WIDTH),
            "ffn/linear_0": (INNER, WIDTH),
            "ffn/linear_1": (WIDTH, INNER),
        }
        for linear, shape in sizes.items():
            result |= {
                f"{root}{linear}/weight": some(*shape),
                f"{root}{linear}/bias": some(shape[0]),
            }
    return result


def test_a_whisper_that_transformers_loads_whole(tmp_path, variables):
    file = ctranslate2_file(tmp_path / "model.bin", variables)
    write_whisper(file, tmp_path / "whisper")
    config = hf.WhisperConfig.from_pretrained(tmp_path / "whisper")
    assert (config.d_model, config.encoder_layers, config.num_mel_bins) == (WIDTH, 2, MELS)
    assert (config.encoder_ffn_dim, config.encoder_attention_heads) == (INNER, 2)
    assert config.max_source_positions == FRAMES
    folder = Folder(tmp_path / "whisper")
    encoder = hf.WhisperModel(config).encoder
    result = {n: folder.tensor(f"model.encoder.{n}") for n in encoder.state_dict()}
    encoder.load_state_dict(result, strict=True)
    value = torch.from_numpy(variables["encoder/layer_1/self_attention/linear_0/weight"]).float()
    assert torch.equal(encoder.layers[1].self_attn.v_proj.weight, value[2 * WIDTH :])


def ctranslate2_variables(model):
    """The variables of a file with the weights of a whole Whisper, of names as CTranslate2's."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    result = {}

    def put(name, *sources):
        names = ("gamma", "beta") if name.endswith("layer_norm") else ("weight", "bias")
        for theirs, ours in zip(names, ("weight", "bias"), strict=True):
            keys = [f"model.{source}.{ours}" for source in sources]
            if keys[-1] in weights:  # keys of attention have no bias
                parts = [weights.get(key, np.zeros(WIDTH, np.float32)) for key in keys]
                result[f"{name}/{theirs}"] = np.concatenate(parts).astype(np.float16)

    for side in ("encoder", "decoder"):
        result[f"{side}/num_heads"] = np.array(2, np.int8)
        positions = weights[f"model.{side}.embed_positions.weight"]
        result[f"{side}/position_encodings/encodings"] = positions.astype(np.float16)
        put(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(2):
            root, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            put(f"{root}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            attention = [f"{ours}.self_attn.{role}_proj" for role in "qkv"]
            put(f"{root}/self_attention/linear_0", *attention)
            put(f"{root}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put(f"{root}/ffn/layer_norm", f"{ours}.final_layer_norm")
            put(f"{root}/ffn/linear_0", f"{ours}.fc1")
            put(f"{root}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                put(f"{root}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                put(f"{root}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                keys = [f"{ours}.encoder_attn.{role}_proj" for role in "kv"]
                put(f"{root}/attention/linear_1", *keys)
                put(f"{root}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    put("decoder/embeddings", "decoder.embed_tokens")
    return result


def test_the_whole_recogniser_computes_as_the_model_that_was_written(tmp_path):
    config = hf.WhisperConfig(
        vocab_size=40, d_model=WIDTH, num_mel_bins=MELS, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_source_positions=FRAMES, max_target_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if "encoder.embed_positions" not in name:
            weight.data = torch.randn_like(weight).mul(0.3).half().float()
    file = ctranslate2_file(tmp_path / "model.bin", ctranslate2_variables(model))
    loaded = load_whisper(file)
    features, tokens = torch.randn(1, MELS, 2 * FRAMES), torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        expected, result = (m(features, decoder_input_ids=tokens).logits for m in (model, loaded))
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
    file = ctranslate2_file(
        tmp_path / "half.bin",
        {k: v for k, v in ctranslate2_variables(model).items() if "attention/linear_2" not in k},
    )
    with pytest.raises(ValueError, match="no Whisper; it lacks"):
        load_whisper(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: b"", "ends too soon"),
        (lambda data: struct.pack("<I", 99) + data[4:], "format 99; 6 is read"),
        (lambda data: data[:4] + b"\xff\xff" + data[6:], "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, variables, damage, message):
    file = ctranslate2_file(tmp_path / "model.bin", variables)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_variables(file, "encoder/")


def test_positions_are_resized_as_transformers_resizes_them():
    config = hf.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14
    )
    embeddings = hf.Dinov2Model(config).embeddings
    table = torch.randn(1, 26, 16)
    embeddings.position_embeddings.data = table
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 10, 16), 42, 42)
    assert (resize_positions(table, 3) - expected).abs().max() < 1e-6
    assert torch.equal(resize_positions(table, 5)[:, :1], table[:, :1])


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(ValueError, match="not_a_package is not installed; make weights"):
        package_file("not_a_package", "model.bin")


def test_the_command_does_not_overwrite(tmp_path):
    (tmp_path / "mine").touch()
    done = run_command("prepare_data.py", "real-weights", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "not empty" in done.stderr
