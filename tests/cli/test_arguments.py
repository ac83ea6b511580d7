import argparse
import subprocess
import sys

import pytest

from examples.mimo.cli.arguments import balance_stages, parse_arguments
from examples.mimo.cli.flags import DATASET_PROVIDERS, NEEDS, SHARDED, help_parser
from examples.mimo.cli.overrides import whisper_assignments, with_fields
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.training import inputs
from examples.mimo.training.layout import padding_multiple
from tests.helpers import outputs, ranks
from tests.helpers.commands import PP2, ROOT, TP2

COMMANDS = sorted(
    path.name
    for path in (ROOT / "examples/mimo").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.fixture
def parse(monkeypatch):
    def parse_on(processes, *flags):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return parse_arguments(flags)

    return parse_on


ENCODER_RANKS = ("--encoder-ranks",)
BATCHES_OF_2 = ("--micro-batch-size", "2", "--global-batch-size")
ENCODER_TP = ("--encoder-tensor-model-parallel-size",)


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_a_presets_sizes_are_the_defaults(parse, name):
    args, config = parse(1, "--model-provider", name)
    assert config == get_model_config(name)
    assert args.hidden_size == config.language.hidden_size
    assert args.calculate_per_token_loss


def test_the_command_line_overrides_the_preset(parse):
    args, config = parse(1, "--num-layers", "6", "--set", "images.encoder.num_layers=1")
    assert config.language.num_layers == args.num_layers == 6
    assert config.modalities["images"].encoder.num_layers == 1


def test_a_released_whispers_sizes_and_other_token_ids(parse):
    named = ("--audio-encoder-model", "openai/whisper-small", "--hf-assign-unused-tokens")
    _, config = parse(1, "--model-provider", "llava_avlm", *named, "<audio>,32003")
    audios = config.modalities["audios"]
    assert audios.token_id == 32003
    assert (audios.encoder.num_layers, audios.encoder.hidden_size) == (12, 768)
    assert audios.encoder.ffn_hidden_size == 3072
    _, over = parse(
        1, "--model-provider=llava_avlm", *named[:2], "--set=audios.encoder.num_layers=1"
    )
    assert over.modalities["audios"].encoder.num_layers == 1


@pytest.mark.parametrize(
    ("name", "released"),
    [("llava_avlm", "base"), ("qwen3_avlm", "large-v3"), ("smollm2_avlm", "tiny.en")],
)
def test_configs_have_the_sizes_of_released_whispers(name, released):
    config = get_model_config(name)
    sizes = whisper_assignments(config, f"openai/whisper-{released}")
    assert with_fields(config, sizes) == config


def test_megatron_counts_the_rows_of_codes(parse):
    args, config = parse(1, "--model-provider", outputs.SPEECH)
    assert (args.vocab_size, args.padded_vocab_size) == (512, 640)
    assert (config.language.vocab_size, config.vocab_size) == (512, 640)
    _, larger = parse(1, "--model-provider", outputs.SPEECH, "--vocab-size", "600")
    assert larger.outputs["speech"].begin_id == 600


def test_training_has_every_provider_that_the_flag_offers():
    assert set(inputs.DATASETS) == set(DATASET_PROVIDERS)
    sharded = {name for name, build in inputs.DATASETS.items() if build == inputs.SHARDS}
    assert sharded == set(SHARDED)


def test_longer_sequences_need_no_second_flag(parse):
    args, config = parse(1, "--seq-length", "4096")
    assert config.language.seq_length == args.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (3, TP2, "3 processes cannot hold"),
        (8, ("--tensor-model-parallel-size", "8"), "--num-attention-heads 4 is not divisible by"),
        (2, (*TP2, "--vocab-size", "511"), "--vocab-size 511 is not divisible by"),
        (
            2,
            (*TP2, "--set", "audios.projector.ffn_hidden_size=255"),
            "audios.projector.ffn_hidden_size 255 is not divisible by",
        ),
        (3, ("--pipeline-model-parallel-size", "3"), "--num-layers 4 is not divisible by"),
        (
            2,
            (*TP2, "--sequence-parallel", "--seq-length", "127"),
            "--seq-length 127 is not divisible by --tensor-model-parallel-size 2",
        ),
        (1, ("--num-experts", "4"), "--num-experts would do nothing here: the language model"),
        (1, ("--mock-data",), "--mock-data would do nothing here: use --dataset-provider mock"),
        (1, ("--split=99,1,0",), "--split would do nothing here"),
        (1, ("--dataloader-type", "cyclic"), "--dataloader-type cyclic would do nothing here"),
        (1, ("--position-embedding-type", "none"), "the language model uses rotary positions"),
        (1, ("--audio-encoder-model", "openai/whisper-huge"), "choose one of openai/whisper-tiny"),
        (1, ("--hf-assign-unused-tokens", "<video>,7"), "a placeholder of <image>, <audio>"),
        (1, ("--hf-assign-unused-tokens", "<image>,5"), "images share token id 5"),
        (
            1,
            ("--total-seq-length", "64"),
            "--total-seq-length would do nothing here: it is the length of packed",
        ),
        (
            1,
            ("--packing-buffer-size", "8"),
            "--packing-buffer-size would do nothing here: only --dataset-provider energon",
        ),
        (
            1,
            ("--packing-buffer-size=8", "--dataset-provider=energon", "--micro-batch-size=2"),
            "leave it at 1",
        ),
        (
            2,
            (*TP2, "--packing-buffer-size=8", "--dataset-provider=energon", "--total-seq-length=9"),
            "--total-seq-length 9 is not divisible by 2",
        ),
        (
            2,
            (*TP2, *ENCODER_TP, "4"),
            "size 2 is not divisible by --encoder-tensor-model-parallel-size 4",
        ),
        (
            2,
            (*TP2, *ENCODER_TP, "0"),
            "size 2 is not divisible by --encoder-tensor-model-parallel-size 0",
        ),
        (
            4,
            (*TP2, *ENCODER_TP, "1", "--encoder-data-parallel-size", "2"),
            "4 processes hold 4 replicas of the encoders",
        ),
        (2, (*TP2, *ENCODER_TP, "images=1"), "colocated encoders all have one size"),
        (4, ("--encoder-ranks", "images=0"), "says nothing of audios"),
        (4, (*ENCODER_RANKS, "images=0", "audios=0-1"), "images and audios both have rank 0"),
        (
            4,
            (*ENCODER_RANKS, "images=0", "audios=4"),
            "audios=4: 4 processes have the ranks 0 to 3",
        ),
        (4, (*ENCODER_RANKS, "images=0", "audios=2-1"), "4 processes have the ranks 0 to 3"),
        (
            4,
            (*ENCODER_RANKS, "images=0", "video=1"),
            "video=1: the model has the modalities images, audios",
        ),
        (4, (*ENCODER_RANKS, "images=0", "audios"), "write NAME=RANK or NAME=FIRST-LAST"),
        (4, (*ENCODER_RANKS, "images=0", "images=1", "audios=2"), "images has ranks already"),
        (4, (*ENCODER_RANKS, "images=0-1", "audios=2-3"), "takes all 4 processes"),
        (
            4,
            (*ENCODER_RANKS, "images=0", "audios=2"),
            "the ranks 1, 3, which do not follow one another",
        ),
        (
            4,
            (*ENCODER_RANKS, "images=0", "audios=1", "--context-parallel-size", "4"),
            "model's 2 processes",
        ),
        (
            6,
            (*ENCODER_RANKS, "images=0-2", "audios=3", *ENCODER_TP, "images=2"),
            "images 3 ranks, not divisible by its",
        ),
        (
            6,
            (*ENCODER_RANKS, "images=0-2", "audios=3"),
            "3 replicas of images's encoder for 2 of the language model",
        ),
        (
            5,
            (*ENCODER_RANKS, "images=0-1", "audios=2", "--encoder-data-parallel-size", "2"),
            "--encoder-ranks has room for 1 replicas of audios's encoder",
        ),
        (
            4,
            (
                *ENCODER_RANKS,
                "images=0",
                "audios=1",
                *PP2,
                "--num-layers-per-virtual-pipeline-stage",
                "1",
            ),
            "MimoModel does not support virtual pipeline parallelism",
        ),
        (
            4,
            (*ENCODER_RANKS, "images=0", "audios=1", "--use-tp-pp-dp-mapping"),
            "would do nothing with",
        ),
        (
            4,
            (*ENCODER_RANKS, "images=0", "audios=1", "--num-distributed-optimizer-instances", "2"),
            "does not yet support num_distributed_optimizer_instances > 1",
        ),
        (
            2,
            (*PP2, "--num-layers-per-virtual-pipeline-stage=1", *BATCHES_OF_2, "6"),
            "rounds of 2, and an iteration has 3; choose a --global-batch-size that is a multiple "
            "of 4",
        ),
        (2, (*TP2, "--tp-comm-overlap"), "--tp-comm-overlap needs Transformer Engine"),
        (1, ("--fp8-format", "hybrid"), "--fp8-format needs Transformer Engine's layers"),
        (1, ("--fp4-format=e2m1",), "--fp4-format needs Transformer Engine's layers"),
        (1, ("--cuda-graph-impl", "local"), "--cuda-graph-impl does not work here: a graph needs"),
        (1, ("--cuda-graph-impl=full_iteration",), "--cuda-graph-impl does not work here"),
        (1, ("--enable-cuda-graph",), "--enable-cuda-graph does not work here"),
        (1, ("--external-cuda-graph",), "--external-cuda-graph does not work here"),
        (1, ("--transformer-impl", "transformer_engine"), "drop the flag to use local layers"),
        (1, ("--transformer-impl=inference_optimized",), "is of Megatron's own inference"),
        (3, ("--context-parallel-size", "2"), "x --context-parallel-size 2 = 2; start a multiple"),
        (1, ("--set", "images.encoder.depth=1"), "no field 'depth'; choose one of"),
        (1, ("--set", "video.encoder.num_layers=1"), "with a modality of images, audios"),
        (1, ("--set", "images.encoder.num_layers=two"), "'two' is not of type int"),
        (1, ("--set", "images.encoder=1"), "encoder holds fields; set one of encoder.("),
        (
            1,
            ("--global-batch-size", "3"),
            "--global-batch-size 3 is not divisible by --micro-batch-size 4 x 1 data-parallel",
        ),
    ],
)
def test_wrong_flags_are_named(parse, processes, flags, message):
    with pytest.raises(ValueError, match=r".") as error:
        parse(processes, *flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train.py", ("--freeze", "images"), "has the parts images.encoder, images.projector"),
        ("train.py", ("--load", "/nonexistent"), "--load /nonexistent: no checkpoint"),
        ("train.py", ("--dataset-provider", "spoken_questions"), "needs --data-path"),
        (
            "train.py",
            ("--dataset-provider", "spoken_questions", "--data-path", "tests"),
            "no tokenizer.model in it",
        ),
        ("train.py", ("--train-iter", "5"), "did you mean --train-iters?"),
        (
            "train.py",
            ("--model-provider", "gpt"),
            "unknown --model-provider gpt; choose one of tiny_avlm, ",
        ),
        ("train.py", TP2, "1 processes cannot hold"),
        ("avlm_inference.py", ("--ckpt", "/nonexistent"), "--ckpt /nonexistent: no such folder"),
        ("avlm_inference.py", ("--ckpt", "tests"), "mimo.json is missing"),
        ("evaluate.py", ("--ckpt", "tests", "--data", "tests"), "mimo.json is missing"),
        ("train.py", ("--model-provider", "tiny_avlm", "--set", "images.x=1"), "no field 'x'"),
    ],
)
def test_commands_end_with_one_line_and_status_2(script, flags, message):
    done = ranks.run(f"examples/mimo/{script}", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", COMMANDS)
def test_help_imports_nothing_slow(script):
    path = ROOT / "examples/mimo" / script
    slow = ("torch", "megatron", "transformers", "torchaudio")
    code = (
        f"import sys, runpy; sys.argv = [{str(path)!r}, '--help']\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({slow!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "usage" in done.stdout
    assert done.stderr.strip() == "[]"


FILES = ("--dataset-provider", "conversations", "--data-path", "tests")
SHARDS = ("--dataset-provider", "energon", "--data-path", "tests")
MOCK = "would do nothing here: --dataset-provider mock draws random data"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data-path", "tests"), f"--data-path {MOCK}"),
        (("--data-path=tests",), f"--data-path {MOCK}"),
        (("--train-split", "train"), f"--train-split {MOCK}"),
        (("--valid-split=heldout", "--eval-iters=1"), f"--valid-split {MOCK}"),
        (("--augment",), f"--augment {MOCK}"),
        (("--max-bad-samples", "100"), f"--max-bad-samples {MOCK}"),
        (("--shuffle-buffer-size", "100"), "only --dataset-provider energon fills a buffer"),
        ((*FILES, "--shuffle-buffer-size", "100"), "only --dataset-provider energon fills"),
        ((*FILES, "--packing-buffer-size", "8"), "only --dataset-provider energon fills"),
        ((*FILES, "--valid-split", "heldout"), "nothing is evaluated; add --eval-iters N"),
        ((*SHARDS, "--total-seq-length", "128"), "add --packing-buffer-size N"),
        (("--tokenizer-model", "tests"), "--tokenizer-model would do nothing here: random data"),
        ((*FILES, "--tokenizer-model", "nowhere"), "--tokenizer-model nowhere: no such file"),
        ((*FILES, "benchmarks"), "--data-path tests benchmarks: one folder, or one mixture"),
        (("--balance-stages",), "--balance-stages would do nothing here: there is one stage"),
    ],
)
def test_flags_that_do_nothing_are_refused(parse, flags, message):
    with pytest.raises(ValueError, match=r"^--") as error:
        parse(1, *flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        (*FILES, "--augment", "--train-split", "a", "--valid-split", "b", "--eval-iters", "1"),
        (*FILES, "--max-bad-samples", "3", "--tokenizer-model", "tests"),
        (*SHARDS, "--shuffle-buffer-size", "7", "--max-bad-samples", "3", "--augment"),
        (*SHARDS, "--packing-buffer-size", "8", "--total-seq-length", "128"),
        ("--tokenizer-model", "tests", "--save", "nowhere"),
    ],
)
def test_flags_that_do_something_are_taken(parse, flags):
    args, _ = parse(1, *flags)
    assert args.train_split == ("a" if "a" in flags else "train")


@pytest.mark.parametrize(
    ("flags", "multiple"),
    [
        ({}, 8),
        ({"fp8": "hybrid"}, 64),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 128),
        ({"fp4": "e2m1"}, 128),
        ({"fp8": "hybrid", "context_parallel_size": 1}, 32),
        ({"tensor_model_parallel_size": 3, "fp8": "hybrid"}, 96),
        ({"pad_to_multiple_of": 12}, 24),
        ({"fp8": "hybrid", "pad_to_multiple_of": 128}, 128),
    ],
)
def test_every_rank_has_whole_blocks_of_numbers_in_fp8(flags, multiple):
    """TP 2 and CP 2 cut a sequence in four; blocks are of 16 numbers, or 32."""
    layout = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    formats = {"fp8": None, "fp8_recipe": "delayed", "fp4": None, "fp4_recipe": "nvfp4"}
    others = {**formats, "pad_to_multiple_of": 1}
    assert padding_multiple(argparse.Namespace(**{**layout, **others, **flags})) == multiple


def test_every_flag_with_a_need_is_a_flag():
    known = {option for action in help_parser()._actions for option in action.option_strings}
    megatrons = {"--data-path", "--tokenizer-model", "--fp8-format", "--fp4-format"}
    megatrons |= {"--tp-comm-overlap", "--cuda-graph-impl"}
    megatrons |= {"--enable-cuda-graph", "--external-cuda-graph"}
    assert {flag for need in NEEDS for flag in need.flags} <= known | megatrons


def test_balanced_stages_read_data_after_parsing(parse, monkeypatch):
    """Flags alone split evenly, in whatever chunks; the samples then move layers."""
    flags = (*PP2, "--balance-stages", "--num-layers", "5", *FILES)
    args, config = parse(2, *flags)
    assert args.pipeline_model_parallel_layout == "Ett|tttL"
    with pytest.raises(ValueError, match="no tokenizer"):
        balance_stages(args, config)
    heavy = ("--set", "images.encoder.num_layers=16", "--num-layers=8", "--global-batch-size=64")
    args, config = parse(2, *PP2, "--balance-stages", *heavy)
    balance_stages(args, config)
    layers = [stage.count("t") for stage in args.pipeline_model_parallel_layout.split("|")]
    assert layers == [2, 6]
    virtual = ("--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "8")
    args, config = parse(2, *PP2, "--balance-stages", *virtual)
    balance_stages(args, config)
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.pipeline_model_parallel_layout.count("|") == 3


def test_a_model_of_ones_own_needs_no_entry(parse):
    _, config = parse(1, "--model-provider", "examples.mimo.configs.tiny_avlm:tiny_avlm")
    assert config.modalities == get_model_config("tiny_avlm").modalities
