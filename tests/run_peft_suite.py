"""Run PEFT's own test suite against `ReparamConfig`: custom models, decoders, encoders, classifiers, parameters as targets.

    python tests/run_peft_suite.py [pytest arguments]

Downloads the source distribution of the installed PEFT (its tests are not in the wheel), puts our cases and tiny models built
from configs in the place of its own, and runs them. What contradicts dropping the weight, or what our design decides
otherwise, is marked as an expected failure with its reason; anything else that fails is a defect. Exits with pytest's code.
Needs a package index, diffusers and parameterized.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CASES = """
import reparam_peft
from reparam_peft import ReparamConfig

# At full rank with the base kept, PEFT's tests find the identity at the start that those of disabling and unloading assume.
KEPT = {"r": "full", "keep_base": True}
CUSTOM = [
    ("MLP", {"target_modules": ["lin0"]}), ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": r".*lin0"}),
    ("EmbConv1D", {"target_modules": ["emb"]}), ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv2d", {"target_modules": ["conv2d"]}), ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d2", {"target_modules": ["conv2d"]}),
    ("MlpUsingParameters", {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    ("MlpUsingParameters", {"target_modules": [], "target_parameters": {"lin0.weight": "(d) -> (m)"}}),
]
TEST_CASES = [
    (f"{model} {number} {name}", model, ReparamConfig, {**targets, **options})
    for number, (model, targets) in enumerate(CUSTOM)
    for name, options in (("kept", KEPT), ("dropped", {"r": 1}))
]
SAME = {"target_modules": ["lin0"], "init_weights": False, **KEPT}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("Reparam Same", "reparam", ReparamConfig, SAME, SAME),
    ("Reparam Different", "reparam", ReparamConfig, SAME, {**SAME, "target_modules": ["lin1"]}),
]

# As LoRA's cases: one parameter of the experts, one in each layer, both with modules left open, and one beside modules.
EXPERTS = [
    ([], ["{mlp}.experts.down_proj"]),
    ([], ["0.{mlp}.experts.gate_up_proj", "1.{mlp}.experts.down_proj"]),
    (None, ["{mlp}.experts.down_proj", "{mlp}.experts.gate_up_proj"]),
    (["q_proj", "v_proj"], ["{mlp}.experts.down_proj"]),
]
PARAMETERS = [
    (f"models/tiny-{model}ForCausalLM", ReparamConfig, {
        "task_type": "CAUSAL_LM", "target_modules": modules,
        "target_parameters": [name.format(mlp=mlp) for name in parameters], **options,
    })
    for model, mlp in (("Llama4", "feed_forward"), ("GptOss", "mlp"))
    for modules, parameters in EXPERTS
    for options in (KEPT, {"r": 4})
]

def in_place_of_lora(target_parameters=None, target_modules=None, **_):
    return ReparamConfig(target_modules=target_modules, target_parameters=target_parameters, r=4)

def configs(task_type):
    kwargs = {"task_type": task_type, "target_modules": None}
    return [(ReparamConfig, {**kwargs, "r": 4, "keep_base": True}), (ReparamConfig, {**kwargs, "r": 4})]
"""
MODELS = """
import sys
from pathlib import Path
from transformers import (
    BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification, BertModel, GPT2Config,
    GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM,
    OPTConfig, OPTForCausalLM, RobertaConfig, RobertaModel, T5Config, T5ForConditionalGeneration,
)
folder = Path(sys.argv[1])
encoder = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, initializer_range=0.2
)
llama = dict(encoder, num_key_value_heads=2)
mixture = dict(llama, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
llama4 = dict(mixture, intermediate_size_mlp=64, interleave_moe_layer_step=1)
opt = dict(encoder, ffn_dim=64, word_embed_proj_dim=32)
bart = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
    decoder_attention_heads=4, vocab_size=100, init_std=0.2,
)
t5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
gpt2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
for name, model in {
    "tiny-LlamaForCausalLM": LlamaForCausalLM(LlamaConfig(**llama)),
    "tiny-Llama4ForCausalLM": Llama4ForCausalLM(Llama4TextConfig(**llama4)),
    "tiny-GptOssForCausalLM": GptOssForCausalLM(GptOssConfig(**mixture)),
    "tiny-gpt2": GPT2LMHeadModel(GPT2Config(**gpt2)),
    "tiny-OPTForCausalLM": OPTForCausalLM(OPTConfig(**opt)),
    "tiny-t5": T5ForConditionalGeneration(T5Config(**t5)),
    "tiny-bart": BartForConditionalGeneration(BartConfig(**bart)),
    "tiny-BertModel": BertModel(BertConfig(**encoder)),
    "tiny-RobertaModel": RobertaModel(RobertaConfig(**encoder)),
    "tiny-BertForSequenceClassification": BertForSequenceClassification(BertConfig(**encoder)),
}.items():
    model.save_pretrained(folder / name)
"""
CONFTEST = """
import pytest
W = "needs the original weight, which is dropped without keep_base"
LORA = "calls what only LoRA has"
HALF = "half-precision factors stay so when loaded for inference; upcasting doubles their bytes"
EXPECTED = [
    # (part of the test's name, part of its parameters, reason)
    ("disable_adapter", "dropped", W),
    ("unload_adapter", "dropped", W),
    ("active_adapter", "dropped", "two active adapters: " + W),
    ("delete_adapter", "dropped", "deletes the last adapter: " + W),
    ("delete_inactive_adapter", "dropped", "deletes the last adapter: " + W),
    ("delete_merged_adapter", "dropped", "deletes the last adapter: " + W),
    ("get_base_model_state_dict", "dropped", W),
    ("merge_layers_multi", "dropped", "merges two adapters: " + W),
    ("multiple_active_adapters_with", "[ReparamConfig]", "two active adapters: " + W),
    ("set_adapter_non_overlapping_modules", "[ReparamConfig]", "an adapter that leaves a layer without any weight: " + W),
    ("adapter_dtype_autocast", "-True-dtype0", HALF),
    ("adapter_dtype_autocast", "-True-dtype1", HALF),
    ("get_base_model_state_dict", "MlpUsingParameters", "state dicts name the layers that a parameter is opened into"),
    ("rank_pattern_for_moe", "", LORA),
    ("targeting_module_and_targeting_param", "", LORA),
    ("target_multiple_parameters_on_same_module", "", LORA),
    ("forward_under_autocast", "", LORA),
    ("existing_parametrization", "", LORA),
    ("result_caching", "", LORA),
    ("on_top_level_module_raises", "", "parameters of the model itself can be targets"),
    ("parameters_after_loading_model", "MLP 1 kept", "diverges at this learning rate, as OSF: all of W is trained"),
]
def pytest_collection_modifyitems(items):
    for item in items:
        config = getattr(item, "callspec", None) and item.callspec.params.get("config_kwargs")
        kind = " dropped" if config and not config.get("keep_base") else ""
        for test, parameters, reason in EXPECTED:
            if test in item.name and parameters in item.name + kind:
                item.add_marker(pytest.mark.xfail(reason=reason))
"""
# For each file of PEFT's suite, what the names in it are replaced by.
PATCHES = {
    "test_custom_models.py": {
        "TEST_CASES": "reparam_cases.TEST_CASES",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "reparam_cases.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    },
    "test_decoder_models.py": {
        "PEFT_DECODER_MODELS_TO_TEST": '["models/tiny-LlamaForCausalLM", "models/tiny-gpt2", "models/tiny-OPTForCausalLM"]',
        "SMALL_GRID_MODELS": '["models/tiny-LlamaForCausalLM", "models/tiny-gpt2"]',
        "ALL_CONFIGS": 'reparam_cases.configs("CAUSAL_LM")',
    },
    "test_encoder_decoder_models.py": {
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": '["models/tiny-t5", "models/tiny-bart"]',
        "ALL_CONFIGS": 'reparam_cases.configs("SEQ_2_SEQ_LM")',
    },
    "test_feature_extraction_models.py": {
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": '["models/tiny-BertModel", "models/tiny-RobertaModel"]',
        "ALL_CONFIGS": 'reparam_cases.configs("FEATURE_EXTRACTION")',
    },
    "test_seq_classifier.py": {
        "PEFT_SEQ_CLS_MODELS_TO_TEST": '["models/tiny-BertForSequenceClassification"]',
        "ALL_CONFIGS": 'reparam_cases.configs("SEQ_CLS")',
    },
    "test_target_parameters.py": {"ALL_CONFIGS": "reparam_cases.PARAMETERS"},
}
# The same for texts. The base models are folders of this machine, which our cards do not name.
TEXTS = {
    "testing_common.py": {'dct["base_model"] == model.config.to_dict()["_name_or_path"]': '"base_model" not in dct'},
    "test_target_parameters.py": {
        "trl-internal-testing/": "models/",
        "hf-internal-testing/tiny-random-": "models/tiny-",
        " = LoraConfig(": " = reparam_cases.in_place_of_lora(",
        "from peft.tuners.lora.layer import ParamWrapper": "from reparam_peft.tuner.layer import ReparamLayer as ParamWrapper",
        "set(module.lora_A.keys())": "set(module.reparam_factors)",
        "set(module.lora_B.keys())": "set(module.reparam_factors)",
    },
}


def main() -> int:
    """Fetch, patch, run."""
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*command, f"peft=={version}"], check=True)
        with tarfile.open(Path(folder, f"peft-{version}.tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        root = Path(folder, f"peft-{version}")
        tests = root / "tests"
        (tests / "__init__.py").touch()
        (tests / "conftest.py").write_text(CONFTEST)
        (tests / "reparam_cases.py").write_text(CASES)
        for file, names in PATCHES.items():
            text = (tests / file).read_text()
            for name, value in names.items():
                ours = f"from tests import reparam_cases\n{name} = {value}\n_UPSTREAM_{name} = ["
                text, replaced = re.subn(rf"^{name} = \[", ours, text, flags=re.MULTILINE)
                assert replaced == 1, f"PEFT {version} no longer defines {name} in {file}"
            (tests / file).write_text(text)
        for file, texts in TEXTS.items():
            text = (tests / file).read_text()
            for old, new in texts.items():
                assert old in text, f"PEFT {version} no longer has {old!r} in {file}"
                text = text.replace(old, new)
            (tests / file).write_text(text)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", MODELS, str(root / "models")], check=True, env=environment)
        arguments = [
            "-k",
            "(Reparam or config_kwargs or test_target_parameters) and not prompt_learning",
            "-o",
            "addopts=",
            "-o",
            "filterwarnings=default",
            "-q",
            "-p",
            "no:cacheprovider",
            *sys.argv[1:],
        ]
        files = [f"tests/{file}" for file in PATCHES]
        return subprocess.run([sys.executable, "-m", "pytest", *files, *arguments], cwd=root, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
