"""Model cards of standalone models: saved, loaded and saved again, with code, and on the Hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import get_peft_model
from support.models import llama
from support.standalone import small
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.utils import hub

from reparam_peft import ReparamConfig
from reparam_peft.config.model_card import BEGIN, END
from reparam_peft.standalone.self_contained import save_self_contained


def evaluated(folder: Path) -> PreTrainedModel:
    """A standalone model of a base that is a folder here, with figures."""
    llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, ReparamConfig(target_modules=["q_proj"], keep=0.5))
    model.peft_config["default"].evaluation = {"dense perplexity": 9.0, "perplexity, test.txt": 12.5}
    return model.base_model.to_standalone()


def check(card: ModelCard, folder: Path) -> None:
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "base_model" not in card.data.to_dict(), "no folder of this machine"
    assert str(folder) not in str(card)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("test.txt", "perplexity", 12.5)
    assert "| method | svd |" in card.text
    assert (card.text.count(BEGIN), card.text.count(END)) == (1, 1)


def test_saved_loaded_and_saved_again(tmp_path: Path) -> None:
    model = evaluated(tmp_path)
    model.save_pretrained(tmp_path / "small")
    check(ModelCard.load(tmp_path / "small" / "README.md"), tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "again")
    check(ModelCard.load(tmp_path / "again" / "README.md"), tmp_path)
    save_self_contained(model, tmp_path / "contained")
    contained = ModelCard.load(tmp_path / "contained" / "README.md")
    check(contained, tmp_path)
    assert "custom_code" in contained.data.tags
    assert "trust_remote_code=True" in contained.text
    assert "import reparam_peft" not in contained.text


def test_what_others_have_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\npipeline_tag: other\n---\n\n# Mine\n")
    small().to_standalone().save_pretrained(tmp_path)
    card = ModelCard.load(path)
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "other")
    assert "# Mine" in card.text
    assert BEGIN in card.text


def test_models_of_others_get_no_card(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


class FakeHub:
    """What of `HfApi` an upload asks for; keeps the card."""

    card: ModelCard

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **kwargs: Any) -> None:
        (path,) = [one.path_or_fileobj for one in operations if one.path_in_repo == "README.md"]
        self.card = ModelCard.load(path)


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_pushed_to_the_hub(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    template = ModelCard.from_template(ModelCardData(tags=["mine"], library_name="transformers"))
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: template)
    model = evaluated(tmp_path)
    if by == "push_to_hub":
        model.push_to_hub("me/small")
    else:
        model.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="me/small")
        check(ModelCard.load(tmp_path / "small" / "README.md"), tmp_path)
    check(fake.card, tmp_path)
    assert fake.card.data.tags == ["low-rank", "mine", "reparam"]
    assert "More Information Needed" not in fake.card.text
