"""A whole tiny LLaVA: the same logits and the same greedy tokens as transformers."""

import dataclasses
import json

import pytest
import torch
import transformers as hf

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.configs import get_model_config
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.generation.engine import Engine, SequenceRequest
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from examples.mimo.hf.to_hf import to_hf
from tests.hf.cases import CASES, HEADS, INNER, LAYERS, PATCH, SIDE, WIDTH, randomise

IMAGE = 110


@pytest.fixture(scope="module")
def llava(tmp_path_factory, build_model):
    """Their model, and ours with its weights."""
    folder = tmp_path_factory.mktemp("llava")
    vision = hf.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = hf.LlamaConfig(
        vocab_size=120,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=None,
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    theirs = randomise(hf.LlavaForConditionalGeneration(config))
    theirs.save_pretrained(folder / "theirs")
    ours = from_cases()
    whole = Folder(folder / "theirs")
    parts = ("language", "images.encoder", "images.projector")
    from_hf(ours, dict.fromkeys(parts, whole), folder / "ours", lambda text: None)
    return theirs, load_model(open_checkpoint(folder / "ours")), folder


def from_cases():
    base = get_model_config("llava_vlm")
    images = dataclasses.replace(
        base.modalities["images"],
        token_id=IMAGE,
        encoder=CASES["clip"].config.modalities["images"].encoder,
        projector=dataclasses.replace(base.modalities["images"].projector, ffn_hidden_size=WIDTH),
    )
    return dataclasses.replace(
        base, language=CASES["llama"].config.language, modalities={"images": images}
    )


def prompt():
    generator = torch.Generator().manual_seed(4)
    patches = (SIDE // PATCH) ** 2
    words = torch.randint(6, 100, (1, 12), generator=generator)
    media = torch.full((1, patches), IMAGE)
    ids = torch.cat([words[:, :4], media, words[:, 4:]], dim=1)
    return ids, torch.randn(1, 3, SIDE, SIDE, generator=generator)


def test_logits_for_a_picture_and_text(llava):
    theirs, ours, _ = llava
    ids, pixels = prompt()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        result = ours(ids, modality_inputs={"images": {"pixel_values": pixels}})[..., :120]
        blank = ours(ids, modality_inputs={"images": {"pixel_values": 0 * pixels}})[..., :120]
    assert (result - expected).abs().max() <= 1e-5
    assert (blank - expected).abs().max() > 1e-2


def test_twenty_greedy_tokens(llava):
    theirs, ours, folder = llava
    ids, pixels = prompt()
    expected = theirs.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=20, do_sample=False, eos_token_id=None
    )[0, ids.shape[1] :]
    tokens = TokenSequence(ids[0].tolist(), [], [])
    sample = Sample("llava", tokens, {"images": [{"pixel_values": pixels}]}, {"images": ["drawn"]})
    config = open_checkpoint(folder / "ours").config
    engine = Engine(ours, config, end_ids=(), forbidden=range(120, 128))
    outputs = engine.start([SequenceRequest(0, sample, max_new_tokens=20)])
    while engine.sequences:
        outputs += engine.step()
    assert [output.token for output in outputs] == expected.tolist()


def test_it_comes_back_as_folders_that_transformers_loads(llava, tmp_path):
    theirs, _, folder = llava
    to_hf(open_checkpoint(folder / "ours"), tmp_path, lambda text: None)
    language = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    ids = prompt()[0][:, :4]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert (language(input_ids=ids).logits - expected).abs().max() <= 1e-6
    vision_encoder = hf.CLIPVisionModel.from_pretrained(tmp_path / "images.encoder")
    pixels = prompt()[1]
    with torch.no_grad():
        expected = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        result = vision_encoder(pixels, output_hidden_states=True).hidden_states[-1]
    assert (result - expected).abs().max() == 0
    described = json.loads((tmp_path / "images.projector/config.json").read_text())
    assert described["projector_hidden_act"] == "gelu"
