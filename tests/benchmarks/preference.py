"""TRL's trainers on a compressed model: whether the frozen reference adapter that they make is the policy, and stays so.

    python tests/benchmarks/preference.py [DPO KTO GRPO RLOO]

Needs TRL 1.16 and datasets. Each trainer trains the adapter of a tiny calibrated model for two steps on a CPU. Printed are the
largest difference of logits of the policy from its reference before, which has to be 0, and after, which has not; what changed
of the reference meanwhile, which has to be 0; and the first loss, which for DPO has to be ln 2.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reparam_peft import ReparamConfig, compress

PAIRS = [{"prompt": "5 6 7 ", "chosen": "8 9 10", "rejected": "11 12"}] * 8
LABELLED = [{"prompt": "5 6 7 ", "completion": f"8 9 {10 + n}", "label": n % 2 == 0} for n in range(8)]
PROMPTS = [{"prompt": f"5 6 {n}"} for n in range(8)]
SHORT = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}


def numbers(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs from one completion to the next: the mean of its tokens."""
    return [sum(map(int, completion.split())) / 100 for completion in completions]


TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "DPO": (PAIRS, {}, {}),
    "KTO": (LABELLED, {}, {}),
    "GRPO": (PROMPTS, SHORT, {"reward_funcs": numbers}),
    "RLOO": (PROMPTS, SHORT, {"reward_funcs": numbers}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="3")


def small() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    batches = [{"input_ids": torch.randint(100, (4, 32))} for _ in range(4)]
    return compress(base, ReparamConfig(target_modules="all-linear", keep=0.6), batches, progress=False)


def main(names: list[str]) -> None:
    """Train with each, and print a row."""
    print(f"{'trainer':8}{'before':>12}{'after':>12}{'reference':>12}{'first loss':>12}")
    inputs = torch.arange(24).view(2, 12)
    for name in names or TRAINERS:
        rows, options, arguments = TRAINERS[name]
        model = small()

        def logits(adapter: str, model: PeftModel = model) -> torch.Tensor:
            model.set_adapter(adapter)
            training = model.training
            with torch.no_grad():
                result = model.eval()(input_ids=inputs).logits
            model.set_adapter("default")
            model.train(training)
            return result

        make: Callable[..., Any] = getattr(trl, f"{name}Trainer")
        with tempfile.TemporaryDirectory() as folder:
            config = getattr(trl, f"{name}Config")(
                folder,
                max_steps=2,
                learning_rate=1e-2,
                per_device_train_batch_size=4,
                report_to="none",
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                **options,
            )
            trainer = make(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **arguments)
            reference = logits("ref")
            before = (logits("default") - reference).abs().max().item()
            trainer.train()
            after = (logits("default") - reference).abs().max().item()
            moved = (logits("ref") - reference).abs().max().item()
            loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        print(f"{name:8}{before:12.3g}{after:12.3g}{moved:12.3g}{loss:12.6f}")


if __name__ == "__main__":
    main(sys.argv[1:])
