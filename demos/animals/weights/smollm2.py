"""A Llama from a GGUF file, through the reader that transformers has."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file


def write_llama(file: Path, folder: Path) -> None:
    """Weights dequantised to float32, tokenizer and chat template, as a Hugging Face folder."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        from demos.animals.weights import INSTALL

        raise ValueError(f"the package gguf is not installed; {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **where)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    folder.mkdir(parents=True)
    # transformers will not save what it calls quantised, though the weights are whole by now.
    tensors = {name: t.float().contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    type(model.config).from_dict(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
