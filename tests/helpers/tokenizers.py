"""Small Hugging Face tokenizers of the kinds that models have, with their models' chat templates.

The templates are those of the models for plain turns: without tools and reasoning.
"""

import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "You are a helpful assistant. What is in the picture, and what do you hear?",
    "A chat between a curious human and an artificial intelligence assistant.",
    "it is a cat. I hear a dog! seven, nine; user system assistant think im_start im_end",
    "Größe 漢字 😀 it  it   it\n\nit",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% else %}{{ 'A chat between a curious "
    "human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human\\'s questions. ' }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_level(
    folder: Path, template: str, think: bool = True, normalise: bool = False, **tokens: str
) -> Path:
    """As of Qwen, Llama 3 and SmolLM2: bytes, and `<think>` as an added token that is not special.

    With `normalise` text is normalised before a further control token is looked for in it.
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Id 0 is the exclamation mark, as in those.
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS * 3, trainer)
    model.add_special_tokens(CHATML)
    if think:
        model.add_tokens(["<think>", "</think>", "<tool_call>"])
    if normalise:
        model.normalizer = normalizers.NFKC()
        model.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=True, special=True)])
    names = {"eos_token": "<|im_end|>"} | tokens
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def metaspace(folder: Path, template: str, scheme: str) -> Path:
    """As of Llama 2: a space before the text ("first"), or behind control tokens too ("always")."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "first":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        model.normalizer = normalizers.Sequence(steps)
    model.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(content=" ", left=1),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *CHATML]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials + pieces)
    model.train_from_iterator(TEXTS * 3, trainer)
    # The trainer takes bytes only as special tokens, which they are not.
    trained = json.loads(model.to_str())
    trained["added_tokens"] = [t for t in trained["added_tokens"] if t["content"] in specials]
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(trained)),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def without_bytes(folder: Path, kind: str) -> Path:
    """As of T5 ("unigram") or BERT ("wordpiece"): other than ASCII is unknown, <unk> or [UNK]."""
    if kind == "wordpiece":
        model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        model.decoder = decoders.WordPiece(cleanup=False)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*names.values()])
    else:
        model = tokenizers.Tokenizer(models.Unigram())
        model.pre_tokenizer = pre_tokenizers.Metaspace()
        model.decoder = decoders.Metaspace()
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
        special = [*names.values(), *CHATML]
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    model.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXTS], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(folder)
    return folder
