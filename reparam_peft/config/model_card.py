"""The part of a checkpoint's README.md that says what was done and how to load it."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..runtime.files import write_whole
from .fields import OF_ALLOCATION, OF_METRICS, Fields

if TYPE_CHECKING:
    from peft import PeftModel

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
PIPELINES = {  # tags of tasks on the Hub
    "AutoModel": "feature-extraction",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForTokenClassification": "token-classification",
}
TAGS = ["low-rank", "reparam"]
OF_TEMPLATE = "[More Information Needed]"  # in the cards that transformers makes for the Hub where there is none
DATASET = "custom"  # the type of data sets in results that are written here
BEGIN, END = "<!-- reparam_peft: begin -->", "<!-- reparam_peft: end -->"


def model_card_section(config: Fields) -> str:
    """Markdown on the base model, the method, the sizes, calibration, evaluation and how to load an adapter.

    The config is a resolved one, as a model leaves it.
    """
    return _section(_rows(config), _loads_adapter(config))


def _rows(config: Fields) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("base model", name_of_base(config.base_model_name_or_path) or "not known"),
        ("method", config.method),
        ("rank allocation", config.allocation),
        ("form", config.form),
        ("size asked for", f"keep = {config.keep}" if config.r is None else f"r = {config.r}"),
        ("matrices factorised", len(config.rank_pattern)),
        ("matrices left dense", len(config.dense_modules or [])),
    ]
    if config.sizes:
        rows.append(("matrices that lost neurons", len(config.sizes)))
    if config.dense_parameters and config.dense_bytes:
        rows += [
            ("targeted parameters before", f"{config.dense_parameters:,}"),
            ("stored parameters", _fraction(config.stored_parameters, config.dense_parameters)),
            ("targeted bytes before", f"{config.dense_bytes:,}"),
            ("stored bytes", _fraction(config.stored_bytes, config.dense_bytes)),
        ]
    rows += _calibration_rows(config)
    return [*rows, *((_escaped(name), f"{value:.6g}") for name, value in (config.evaluation or {}).items())]


def _section(rows: Sequence[tuple[str, object]], load: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""{BEGIN}
## Low-rank reparameterisation

Each targeted weight W (out × in) of the base model is replaced by a product A B of low rank.

| | |
| --- | --- |
{table}

### How to load

```python
{load}
```
{END}"""


def _loads_adapter(config: Fields) -> str:
    auto_class = AUTO_CLASSES.get(config.task_type or "", "AutoPeftModel")
    return f"""import reparam_peft  # registers the method with PEFT; needed before loading
from peft import {auto_class}, PeftModel

model = {auto_class}.from_pretrained("<this repository or folder>")
# or, onto a base model that is at hand:
model = PeftModel.from_pretrained(base_model, "<this repository or folder>")"""


def write_standalone_card(
    folder: str | Path, config: Fields | None, auto_class: str, layers: int, self_contained: bool = False
) -> None:
    """Write the README.md of a standalone checkpoint; of one that somebody has written, the section alone.

    Args:
        folder: of the checkpoint.
        config: of the adapter that it was made from, resolved; None where it is not known.
        auto_class: of transformers, that loads it.
        layers: how many of its layers are factorised.
        self_contained: whether the code that it needs is in it.
    """
    line = (
        ""
        if self_contained
        else "import reparam_peft  # lets transformers build the factorised layers; needed before loading\n"
    )
    option = ", trust_remote_code=True" if self_contained else ""
    load = f"""{line}from transformers import {auto_class}

model = {auto_class}.from_pretrained("<this repository or folder>"{option})"""
    section = _section([("matrices factorised", layers)] if config is None else _rows(config), load)
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else None
    if card is None or OF_TEMPLATE in card.text:
        card = ModelCard(f"---\n{card.data.to_yaml() if card else '{}'}\n---\n\n{section}\n")
    else:
        card.text = _with_section(card.text, section)
    data = cast(ModelCardData, card.data)
    data.library_name = "transformers"
    data.pipeline_tag = data.pipeline_tag or PIPELINES.get(auto_class)
    data.tags = sorted({*(data.tags or []), *TAGS, *(["custom_code"] if self_contained else [])})
    if config is not None:
        data.base_model = data.base_model or name_of_base(config.base_model_name_or_path)
        _note_results(data, config)
    write_whole(path, str(card))


def _note_results(data: ModelCardData, config: Fields) -> None:
    """The figures of this model, not those of the dense one, as metadata in place of earlier ones; others' results stay.

    In the name of a figure what stands behind a comma is the data: "perplexity, test.txt".
    """
    others = [result for result in data.eval_results or [] if result.dataset_type != DATASET]
    ours = []
    for name, value in (config.evaluation or {}).items():
        measure, _, text = (" ".join(part.split()) for part in name.partition(","))
        if not name.startswith("dense "):
            task = data.pipeline_tag or "other"
            ours.append(
                EvalResult(task, DATASET, text or "not named", re.sub(r"\W+", "_", measure), float(value), metric_name=measure)
            )
    if others or ours:
        data.model_name = getattr(data, "model_name", None) or name_of_base(config.base_model_name_or_path) or "compressed"
        data.eval_results = [*others, *ours]


def _with_section(text: str, section: str) -> str:
    """The text of a card with a section in place of an earlier one, or at its top; the rest stays."""
    earlier = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    # A function, so that a backslash in the section is not read as a group reference.
    replaced, times = earlier.subn(lambda _: section, text)
    return replaced if times else f"\n{section}\n\n{text.lstrip()}"


def update_model_card(folder: str, config: Fields) -> None:
    """Write the section into `folder`/README.md: in place of an earlier one, else at the top; the rest stays."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(library_name="peft"))
    card.text = _with_section(card.text, model_card_section(config))
    _note_results(card.data, config)
    tags, base = {*(card.data.tags or []), *TAGS}, card.data.base_model
    if isinstance(base, str) and name_of_base(base) is None:  # where PEFT writes a path of this machine, too
        card.data.base_model = None
        tags -= {tag for tag in tags if tag.startswith("base_model:") and tag.endswith(f":{base}")}
    card.data.tags = sorted(tags)
    write_whole(path, str(card))


def upload_with_section(model: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel._upload_modified_files`, with the section in the card that `push_to_hub` has just written over ours."""
    config = model.peft_config.get("default")
    # At the top of the folder there is the adapter "default", if any.
    if Path(working_dir, "adapter_config.json").exists() and isinstance(config, Fields):
        update_model_card(working_dir, config)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)


def name_of_base(name: str | None) -> str | None:
    """A base model's Hub id; None where it is not known, or is a path of the machine that the model was made on."""
    is_hub_id = name is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not os.path.exists(name)
    return name if is_hub_id else None


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table, in one line, without a meaning for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _calibration_rows(config: Fields) -> list[tuple[str, str]]:
    """What a calibrated checkpoint was made with, and what it is predicted to lose; settings only where they were chosen."""
    if config.calibration_tokens is None:
        return []
    settings = {name: getattr(config, name) for name in (*OF_METRICS, *OF_ALLOCATION)}
    rows = [(name.replace("_", " "), value) for name, value in settings.items() if value is not None]
    rows.append(("calibration tokens", f"{config.calibration_tokens:,}"))
    if config.gradient_tokens:
        rows.append(("labels sampled for gradients", f"{config.gradient_tokens:,}, seed {config.seed}"))
    if config.predicted_loss is not None:
        rows.append(("predicted increase of the loss", f"{config.predicted_loss:.3g} nats per token"))
    return rows


def _fraction(part: int | None, whole: int) -> str:
    return f"{part or 0:,} ({(part or 0) / whole:.1%})"
