"""The model card's section: what it says, and that writing it again replaces it and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import peft
import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from support.models import llama, token_inputs
from transformers import LlamaForCausalLM

from reparam_peft import ReparamConfig, compress
from reparam_peft.config.model_card import (
    AUTO_CLASSES,
    BEGIN,
    END,
    model_card_section,
    update_model_card,
    write_standalone_card,
)


def resolved(**options: object) -> ReparamConfig:
    """A config as a model leaves it."""
    values = {
        "base_model_name_or_path": "org/base",
        "keep": 0.4,
        "method": "svd",
        "allocation": "uniform",
        "form": "factors",
        "rank_pattern": {"a": 4, "b": 2},
        "dense_modules": ["c"],
        "dense_parameters": 10_000,
        "stored_parameters": 4_500,
        "dense_bytes": 20_000,
        "stored_bytes": 9_000,
    }
    return ReparamConfig(**{**values, **options})


def rows(section: str) -> dict[str, str]:
    """The table, without its head."""
    found = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {name: value for name, value in found if name != "---"}


def test_says_what_was_done() -> None:
    assert rows(model_card_section(resolved(evaluation={"dense perplexity": 19.38123456, "perplexity": 25}))) == {
        "base model": "org/base",
        "method": "svd",
        "rank allocation": "uniform",
        "form": "factors",
        "size asked for": "keep = 0.4",
        "matrices factorised": "2",
        "matrices left dense": "1",
        "targeted parameters before": "10,000",
        "stored parameters": "4,500 (45.0%)",
        "targeted bytes before": "20,000",
        "stored bytes": "9,000 (45.0%)",
        "dense perplexity": "19.3812",
        "perplexity": "25",
    }


def test_says_how_many_matrices_lost_neurons() -> None:
    config = resolved()
    name, rank = next(iter(config.rank_pattern.items()))
    config.sizes = {name: [rank, rank]}
    assert rows(model_card_section(config))["matrices that lost neurons"] == "1"


def test_says_what_a_calibrated_checkpoint_was_made_with() -> None:
    calibrated = {"method": "whitened", "allocation": "loss", "form": "pivot", "calibration_tokens": 24_576}
    table = rows(model_card_section(resolved(**calibrated, gradient_tokens=8_192, seed=3, predicted_loss=0.12345)))
    assert [table[name] for name in ("method", "rank allocation", "form")] == ["whitened", "loss", "pivot"]
    assert table["calibration tokens"] == "24,576"
    assert table["labels sampled for gradients"] == "8,192, seed 3"
    assert table["predicted increase of the loss"] == "0.123 nats per token"
    without_gradients = rows(model_card_section(resolved(**calibrated, gradient_tokens=0, seed=3)))
    assert table.keys() - without_gradients.keys() == {"labels sampled for gradients", "predicted increase of the loss"}
    chosen = {"output_metric": "none", "shrinkage": 0.02, "rank_multiple": 16, "floor": 0.0}
    found = rows(model_card_section(resolved(**calibrated, **chosen)))
    assert {name: found[name.replace("_", " ")] for name in chosen} == {name: str(value) for name, value in chosen.items()}
    assert "input metric" not in found


def test_says_the_rank_where_one_was_asked_for() -> None:
    assert rows(model_card_section(resolved(r=64)))["size asked for"] == "r = 64"
    assert rows(model_card_section(resolved(r="full")))["size asked for"] == "r = full"


def test_says_what_is_not_known() -> None:
    table = rows(model_card_section(ReparamConfig(method="svd", allocation="uniform", form="factors")))
    assert table["base model"] == "not known"
    assert not any("bytes" in name or "parameters" in name for name in table)


@pytest.mark.parametrize("task_type", [None, *AUTO_CLASSES])
def test_loading_code_imports_the_package_first_and_names_a_class_of_peft(task_type: str | None) -> None:
    section = model_card_section(resolved(task_type=task_type))
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    first, second, *_ = ast.parse(code).body
    assert [alias.name for alias in first.names] == ["reparam_peft"]
    assert second.module == "peft"
    names = [alias.name for alias in second.names]
    assert names == [AUTO_CLASSES.get(task_type, "AutoPeftModel"), "PeftModel"]
    assert all(hasattr(getattr(peft, name), "from_pretrained") for name in names)
    assert f"{names[0]}.from_pretrained(" in code


def test_every_task_type_with_an_auto_class_of_peft_is_known() -> None:
    # Task types of PEFT for which its auto classes exist, each by the class that it names.
    named = {name for name in dir(peft) if name.startswith("AutoPeftModelFor")}
    assert set(AUTO_CLASSES.values()) == named
    assert set(AUTO_CLASSES) <= {task.value for task in peft.TaskType}


def test_a_new_card_has_the_section_on_top_and_the_tags(tmp_path: Path) -> None:
    update_model_card(str(tmp_path), resolved())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.lstrip().startswith(BEGIN)
    assert {"reparam", "low-rank"} <= set(card.data.tags)
    assert card.data.library_name == "peft"


def test_writing_again_replaces_the_section_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nBefore.\n")
    update_model_card(str(tmp_path), resolved())
    text = path.read_text().replace("# My model", "# Our model") + "\nAfter.\n"
    path.write_text(text)
    update_model_card(str(tmp_path), resolved(evaluation={r"C:\1 \g<0> perplexity": 7.5}))
    card = ModelCard.load(path)
    assert (card.text.count(BEGIN), card.text.count(END)) == (1, 1)
    assert r"| C:\\1 \\g&lt;0&gt; perplexity | 7.5 |" in card.text
    without = re.sub(f"{BEGIN}.*{END}", "", card.text, flags=re.DOTALL)
    assert without.split() == ["#", "Our", "model", "Before.", "After."]
    assert card.data.license == "mit"
    assert sorted(card.data.tags) == ["low-rank", "mine", "reparam"]
    before = path.read_bytes()
    update_model_card(str(tmp_path), resolved(evaluation={r"C:\1 \g<0> perplexity": 7.5}))
    assert path.read_bytes() == before, "writing the same again changes nothing"


def test_save_pretrained_of_a_model_writes_its_own_figures(tmp_path: Path) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj", "k_proj"], keep=0.5))
    model.peft_config["default"].evaluation = {"perplexity": 12.5}
    model.save_pretrained(tmp_path)
    table = rows((tmp_path / "README.md").read_text())
    targets = model.size_report().to_dict()["targets"]
    assert table["targeted parameters before"] == f"{targets['dense_parameters']:,}"
    assert table["stored bytes"].startswith(f"{targets['stored_bytes']:,} (")
    assert table["matrices factorised"] == "4"
    assert table["perplexity"] == "12.5"


def test_save_pretrained_of_a_calibrated_model_says_so(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=["q_proj", "up_proj"], keep=0.5, floor=0.1)
    model = compress(llama(), config, [token_inputs()], seed=7, progress=False)
    model.save_pretrained(tmp_path)
    table = rows((tmp_path / "README.md").read_text())
    assert [table[name] for name in ("method", "rank allocation", "form")] == ["whitened", "loss", "pivot"]
    assert table["size asked for"] == "keep = 0.5"
    assert (table["calibration tokens"], table["labels sampled for gradients"], table["floor"]) == ("24", "24, seed 7", "0.1")
    assert table["predicted increase of the loss"] == f"{model.peft_config['default'].predicted_loss:.3g} nats per token"
    assert int(table["matrices factorised"]) + int(table["matrices left dense"]) == 4


@pytest.mark.parametrize("self_contained", [False, True])
def test_the_card_of_a_standalone_checkpoint(self_contained: bool, tmp_path: Path) -> None:
    write_standalone_card(tmp_path, resolved(), "AutoModelForCausalLM", 2, self_contained)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "org/base"
    assert card.data.tags == [*(["custom_code"] if self_contained else []), "low-rank", "reparam"]
    assert card.data.pipeline_tag == "text-generation"
    assert rows(card.text)["stored parameters"] == "4,500 (45.0%)"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    assert names == (set() if self_contained else {"reparam_peft"})
    assert ("trust_remote_code=True" in code) == self_contained


def test_a_path_of_this_machine_is_no_base_model_on_the_hub(tmp_path: Path) -> None:
    write_standalone_card(tmp_path, resolved(base_model_name_or_path=str(tmp_path)), "AutoModel", 2)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


HOSTILE = "x |\n\n# Injected `code` [a](b)\n<script>alert(1)</script> <!-- reparam_peft: end -->"


def test_text_of_a_config_stays_in_its_cell(tmp_path: Path) -> None:
    config = resolved(base_model_name_or_path=HOSTILE, evaluation={HOSTILE: 1.0})
    for _ in range(3):
        update_model_card(str(tmp_path), config)
    (tmp_path / "standalone").mkdir()
    write_standalone_card(tmp_path / "standalone", config, "AutoModel", 2)
    for path in (tmp_path / "README.md", tmp_path / "standalone" / "README.md"):
        text = ModelCard.load(path).text
        assert (text.count(BEGIN), text.count(END)) == (1, 1)
        assert "<script" not in text
        assert [line for line in text.splitlines() if "Injected" in line] == [
            r"| x \| # Injected \`code\` \[a\](b) &lt;script&gt;alert(1)&lt;/script&gt; &lt;!-- reparam_peft: end --&gt; | 1 |"
        ]


def test_the_card_of_a_model_of_this_machine_holds_no_path(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, ReparamConfig(target_modules=["q_proj"], keep=0.5)).save_pretrained(tmp_path / "small")
    assert str(tmp_path) not in (tmp_path / "small" / "README.md").read_text()
    assert str(tmp_path) in (tmp_path / "small" / "adapter_config.json").read_text(), "from which it is loaded again"
