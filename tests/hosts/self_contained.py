"""Self-contained checkpoints in another environment: written by the package here, read there by transformers alone.

python tests/hosts/self_contained.py PYTHON

PYTHON is the interpreter of an environment that has torch and some version of transformers, and need not have this package. It
loads each checkpoint, computes, saves it again, and loads and computes that; this process compares it with what the model
computed here, and loads here what was saved there. Prints a line for each model. Exits with 1 where one differs, or cannot be
loaded by a version that has its layers under the same names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST = 1e-4  # of outputs, relative to the largest of them: versions add numbers up in other orders
OUTPUTS, INPUTS, AGAIN = "outputs.safetensors", "inputs.safetensors", "again"
OTHER_NAMES = (
    "may have this architecture under other names of layers"  # what the reader says of an architecture that was rewritten
)


def load(folder: Path) -> Any:
    """A checkpoint, by the Auto class that its config names."""
    import transformers

    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    auto = next(name for name in sorted(auto_map, key=lambda name: name == "AutoModel"))
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()


def compute(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model(**inputs).logits.contiguous()


def read(folder: Path) -> None:
    """In the other environment: what the models in the folder compute."""
    import transformers
    from safetensors.torch import load_file, save_file

    for case in sorted(folder.iterdir()):
        inputs = load_file(case / INPUTS)
        try:
            model = load(case)
            logits = compute(model, inputs)
            model.save_pretrained(case / AGAIN)
            again = compute(load(case / AGAIN), inputs)
        except Exception as error:  # the other models are of interest, too
            (case / "error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            continue
        save_file({"logits": logits, "again": again}, case / OUTPUTS)
    (folder / "version.txt").write_text(transformers.__version__, encoding="utf-8")


def write(folder: Path) -> dict[str, Any]:
    """The checkpoints, with the logits that the models compute here."""
    import torch
    from safetensors.torch import save_file
    from support.models import bert, gpt2, llama, t5, token_inputs, vit, xlnet
    from support.narrow import narrowed

    from reparam_peft import ReparamConfig
    from reparam_peft.standalone.self_contained import save_self_contained

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = {**llama3, "original_max_position_embeddings": 32, "rope_theta": 500000.0}
    cases = {
        "bert_pivot": (bert, "pivot"),
        "gpt2_factors": (gpt2, "factors"),
        "gpt2_pivot": (gpt2, "pivot"),
        "llama_factors": (llama, "factors"),
        "llama_pivot": (llama, "pivot"),
        "llama_narrow": (llama, "narrow"),
        "llama_pivot_rope_100000": (lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e5}), "pivot"),
        "llama_pivot_rope_llama3": (lambda: llama(rope_parameters=scaled), "pivot"),
        "llama_tied_pivot": (lambda: llama(tie_word_embeddings=True), "pivot"),
        "t5_pivot": (t5, "pivot"),
        "vit_pivot": (vit, "pivot"),
        "xlnet_factors": (xlnet, "factors"),
    }
    expected = {}
    for name, (make, form) in cases.items():
        inputs = (
            token_inputs() if make is not vit else {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
        )
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if make is t5:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
        if form == "narrow":
            model = narrowed(make()).to_standalone()
        else:
            targets = ["projection", "query", "up_proj"] if make is vit else "all-linear"
            model = compressed(make(), ReparamConfig(target_modules=targets, keep=0.6, form=form))
        case = folder / name
        save_self_contained(model.eval(), case)
        save_file({key: value.contiguous() for key, value in inputs.items()}, case / INPUTS)
        expected[name] = compute(model, inputs)
    return expected


def compressed(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config).to_standalone()


def main(python: str) -> int:
    """Write here, read there, compare; the number of models that are wrong."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from safetensors.torch import load_file

    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_MODULES_CACHE"] = str(Path(temporary) / "modules")
        os.environ["HF_HUB_OFFLINE"] = "1"
        folder = Path(temporary) / "checkpoints"
        folder.mkdir()
        expected = write(folder)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, str(Path(__file__).resolve()), "--read", str(folder)], check=True, env=environment)
        version = (folder / "version.txt").read_text(encoding="utf-8")
        for name, logits in expected.items():
            case = folder / name
            if (case / "error.txt").exists():
                said = (case / "error.txt").read_text(encoding="utf-8")
                wrong += OTHER_NAMES not in said
            else:
                computed = load_file(case / OUTPUTS)
                computed["saved there, loaded here"] = compute(load(case / AGAIN), load_file(case / INPUTS))
                difference = float(max((one - logits).abs().max() for one in computed.values()) / logits.abs().max())
                said = f"largest difference {difference:.1e} of the largest logit"
                if not difference <= MOST:
                    wrong += 1
                    said += ": IT DIFFERS"
            print(f"transformers {version}: {name}: {said}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        read(Path(sys.argv[2]))
    else:
        sys.exit(min(1, main(sys.argv[1])))
