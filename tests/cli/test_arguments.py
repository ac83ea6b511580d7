import pytest

from benchmarks import ranks
from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config


@pytest.fixture
def parse(monkeypatch):
    def parse_on(processes, *flags):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return parse_arguments(flags)

    return parse_on


TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
OWN = ("--encoder-ranks",)
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


def test_longer_rows_need_no_second_flag(parse):
    args, config = parse(1, "--seq-length", "4096")
    assert config.language.seq_length == args.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (3, TP2, "3 processes cannot hold"),
        (8, ("--tensor-model-parallel-size", "8"), "--num-attention-heads 4 does not divide by"),
        (2, (*TP2, "--vocab-size", "511"), "--vocab-size 511 does not divide by"),
        (
            2,
            (*TP2, "--set", "audios.encoder.num_attention_heads=1"),
            "audios.encoder.num_attention_heads 1 does not divide by",
        ),
        (3, ("--pipeline-model-parallel-size", "3"), "--num-layers 4 does not divide by"),
        (2, (*TP2, "--sequence-parallel", "--seq-length", "127"), "--seq-length 127"),
        (1, ("--num-experts", "4"), "--num-experts would do nothing here: the language model"),
        (1, ("--mock-data",), "--mock-data would do nothing here: use --dataset-provider mock"),
        (1, ("--split=99,1,0",), "--split would do nothing here"),
        (1, ("--dataloader-type", "cyclic"), "--dataloader-type cyclic would do nothing here"),
        (1, ("--position-embedding-type", "none"), "the language model uses rotary positions"),
        (1, ("--audio-encoder-model", "openai/whisper-huge"), "there are openai/whisper-tiny"),
        (1, ("--hf-assign-unused-tokens", "<video>,7"), "a placeholder of <image>, <audio>"),
        (1, ("--hf-assign-unused-tokens", "<image>,5"), "images share token id 5"),
        (1, ("--total-seq-length", "64"), "would do nothing without --packing-buffer-size"),
        (
            2,
            (*PP2, "--num-layers-per-virtual-pipeline-stage=1", "--dataset-provider=energon"),
            "runs without virtual stages",
        ),
        (1, ("--packing-buffer-size", "8"), "packs what --dataset-provider energon reads"),
        (
            1,
            ("--packing-buffer-size=8", "--dataset-provider=energon", "--micro-batch-size=2"),
            "leave it at 1",
        ),
        (
            2,
            (*TP2, "--packing-buffer-size=8", "--dataset-provider=energon", "--total-seq-length=9"),
            "--total-seq-length 9 does not divide by 2",
        ),
        (2, (*TP2, *ENCODER_TP, "4"), "4 does not divide --tensor-model-parallel-size 2"),
        (2, (*TP2, *ENCODER_TP, "0"), "0 does not divide --tensor-model-parallel-size 2"),
        (
            4,
            (*TP2, *ENCODER_TP, "1", "--encoder-data-parallel-size", "2"),
            "4 processes hold 4 copies of the encoders",
        ),
        (2, (*TP2, *ENCODER_TP, "images=1"), "on shared ranks all encoders have one size"),
        (4, ("--encoder-ranks", "images=0"), "says nothing of audios"),
        (4, (*OWN, "images=0", "audios=0-1"), "images and audios both have rank 0"),
        (4, (*OWN, "images=0", "audios=4"), "audios=4: 4 processes have the ranks 0 to 3"),
        (4, (*OWN, "images=0", "audios=2-1"), "4 processes have the ranks 0 to 3"),
        (4, (*OWN, "images=0", "video=1"), "video=1: the model has the modalities images, audios"),
        (4, (*OWN, "images=0", "audios"), "write NAME=RANK or NAME=FIRST-LAST"),
        (4, (*OWN, "images=0", "images=1", "audios=2"), "images has ranks already"),
        (4, (*OWN, "images=0-1", "audios=2-3"), "takes all 4 processes"),
        (4, (*OWN, "images=0", "audios=2"), "the ranks 1, 3, which do not follow one another"),
        (4, (*OWN, "images=0", "audios=1", "--context-parallel-size", "4"), "model's 2 processes"),
        (
            6,
            (*OWN, "images=0-2", "audios=3", *ENCODER_TP, "images=2"),
            "images 3 ranks, not divisible by its",
        ),
        (
            6,
            (*OWN, "images=0-2", "audios=3"),
            "3 replicas of images's encoder for 2 of the language model",
        ),
        (
            5,
            (*OWN, "images=0-1", "audios=2", "--encoder-data-parallel-size", "2"),
            "the ranks of --encoder-ranks make 1 of audios",
        ),
        (
            4,
            (*OWN, "images=0", "audios=1", *PP2, "--num-layers-per-virtual-pipeline-stage", "1"),
            "MimoModel does not support virtual pipeline parallelism",
        ),
        (4, (*OWN, "images=0", "audios=1", "--use-tp-pp-dp-mapping"), "would do nothing with"),
        (
            4,
            (*OWN, "images=0", "audios=1", "--num-distributed-optimizer-instances", "2"),
            "does not yet support num_distributed_optimizer_instances > 1",
        ),
        (
            2,
            (*PP2, "--num-layers-per-virtual-pipeline-stage=1", *BATCHES_OF_2, "6"),
            "rounds of 2, and an iteration has 3; choose a --global-batch-size that is a multiple "
            "of 4",
        ),
        (2, (*TP2, "--tp-comm-overlap"), "--tp-comm-overlap needs Transformer Engine"),
        (3, ("--context-parallel-size", "2"), "x --context-parallel-size 2 = 2; start a multiple"),
        (1, ("--set", "images.encoder.depth=1"), "no field 'depth'; there are"),
        (1, ("--set", "video.encoder.num_layers=1"), "with a modality of images, audios"),
        (1, ("--set", "images.encoder.num_layers=two"), "'two' is not of type int"),
        (1, ("--set", "images.encoder=1"), "this field holds others"),
        (
            1,
            ("--model-provider", "tiny_avlm", "--global-batch-size", "3"),
            "(3) must be divisible by",
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
            "unknown --model-provider gpt; choose one of",
        ),
        ("train.py", TP2, "1 processes cannot hold"),
        ("avlm_inference.py", ("--ckpt", "/nonexistent"), "--ckpt /nonexistent: no such folder"),
        ("avlm_inference.py", ("--ckpt", "tests"), "mimo.json is missing"),
        ("evaluate.py", ("--ckpt", "tests", "--data", "tests"), "mimo.json is missing"),
    ],
)
def test_commands_end_with_one_line_and_status_2(script, flags, message):
    done = ranks.run(f"examples/mimo/{script}", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "script", ["train.py", "avlm_inference.py", "evaluate.py", "convert.py", "prepare_data.py"]
)
def test_help_imports_nothing_slow(script, tmp_path):
    import subprocess
    import sys

    from tests.conftest import ROOT

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
