"""Print how much of each architecture of transformers can be compressed: every model type at its published default size.

    python tests/benchmarks/reach.py RESULTS.jsonl [MODEL_TYPE …]

Models are built on the meta device, so that nothing is downloaded or computed; about half an hour of one core for all, most of
it for the largest mixtures. A run goes on where RESULTS.jsonl ends. Model types that are only a part of another one, as the
encoder of images in a model of images and text, are not counted by themselves.

Counted are parameters in matrices, without embeddings (tables, codes of positions, learned queries, heads that predict tokens),
norms and biases. Printed are, for each model type, the parameters and the shares that are reached by linear layers alone (plain
`nn.Linear` and Conv1D); by `target_modules="all-linear"` with `target_parameters="all-experts"`; and with modules and
parameters that are named; then what only names reach and what nothing does; at last the table of docs/experts.md, by families.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from reparam_peft import ReparamConfig
from reparam_peft.runtime.modules import kept_in_lists, parameter_owners
from reparam_peft.tuner.opening import check_openable, experts_of
from reparam_peft.tuner.refusals import refused_by_kind, refused_by_place
from reparam_peft.tuner.selection import take_targets
from reparam_peft.tuner.targets import is_target

ENOUGH = 0.95
WAYS = ("linear", "words", "named")
# Parameters that are no layer's weight and are added or looked up, not multiplied by.
TABLE = re.compile(r"embed|pos_|rel_pos|position|token|quer(y|ies)|latents|prototypes|codebook|bias|mask")


@dataclass
class Reach:
    """Parameters in matrices of a model type, outside of embeddings, and how many are reached in each of the `WAYS`.

    Attributes:
        model_type: of transformers.
        mixture: whether it has fused experts.
        total, linear, words, named: parameters.
        needs_names: class of a module → parameters that only names reach.
        left: class of a module → parameters that nothing reaches.
        error: why it could not be built, in place of figures.
    """

    model_type: str
    mixture: bool = False
    total: int = 0
    linear: int = 0
    words: int = 0
    named: int = 0
    needs_names: dict[str, int] | None = None
    left: dict[str, int] | None = None
    error: str = ""

    def share(self, way: str) -> float:
        return getattr(self, way) / self.total


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    file, *wanted = sys.argv[1:]
    path = Path(file)
    rows = [Reach(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    names = dict(classes())
    rows = [row for row in rows if row.model_type in names]
    done = {row.model_type for row in rows}
    for model_type, class_name in names.items():
        if model_type in done or (wanted and model_type not in wanted):
            continue
        try:
            row = reach(model_type, class_name)
        except Exception as error:
            row = Reach(model_type, error=" ".join(f"{type(error).__name__}: {error}".split())[:160])
        rows.append(row)
        with path.open("a") as results:
            results.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
    print_types(rows)
    print_families([row for row in rows if row.total], names)


def classes() -> Iterator[tuple[str, str]]:
    """Model types that stand by themselves, each with the name of a class: the model without a head, where there is one."""
    configs = [getattr(transformers, name, None) for name in CONFIG_MAPPING_NAMES.values()]
    parts = [part for config in configs for part in (getattr(config, "sub_configs", None) or {}).values()]
    seen = {part.model_type for part in parts if part is not transformers.AutoConfig}
    mappings = [modeling_auto.MODEL_MAPPING_NAMES]
    mappings += [value for key, value in vars(modeling_auto).items() if re.fullmatch("MODEL_.*MAPPING_NAMES", key)]
    for mapping in mappings:
        for model_type, names in mapping.items():
            if model_type in CONFIG_MAPPING_NAMES and model_type not in seen:
                seen.add(model_type)
                yield model_type, names if isinstance(names, str) else names[0]


def build(model_type: str, class_name: str) -> nn.Module:
    """A model at the default size of its config, on the meta device."""
    cls = getattr(transformers, class_name)
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    own = getattr(cls, "config_class", None)
    config = own() if own is not None and own is not config_class and own.model_type else config_class()
    with torch.device("meta"), initialization.no_init_weights():
        model: Any = cls(config)
    model.tie_weights()
    return model.eval()


def reach(model_type: str, class_name: str) -> Reach:
    """What is reached of a model type."""
    model = build(model_type, class_name)
    sizes = matrices(model)
    kinds = {name: described(model, name) for name in sizes}
    plain = {f"{name}.weight" for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    mixture = bool(experts_of(model))
    by_words = taken_by_words(model, sizes, mixture)
    by_name = taken_by_name(model, [name for name in sizes if name not in by_words])
    needs_names: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for name, size in sizes.items():
        if name not in by_words:
            (needs_names if name in by_name else left)[kinds[name]] += size
    linear, words, named = (sum(sizes[n] for n in names if n in sizes) for names in (plain, by_words, by_words | by_name))
    return Reach(model_type, mixture, sum(sizes.values()), linear, words, named, dict(needs_names), dict(left))


def matrices(model: nn.Module) -> dict[str, int]:
    """Name and size of each parameter that counts."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters(recurse=False)}
    with suppress(Exception):
        tables |= {id(p) for p in model.get_output_embeddings().parameters()}
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim >= 2 and max(p.shape) < p.numel() and id(p) not in tables and not is_table(name)
    }


def is_table(name: str) -> bool:
    key = name.rpartition(".")[2]
    return key != "weight" and TABLE.search(key) is not None


def described(model: nn.Module, name: str) -> str:
    """The class of torch's or of transformers' that a parameter is in."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    base = next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn"))
    if isinstance(model.get_submodule(owner.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer"
    return f"nn.{base}" if base != "Module" else f"{type(module).__name__}.{key}"


def taken_by_words(model: nn.Module, names: Collection[str], mixture: bool) -> set[str]:
    """Those of some parameters that are targets of "all-linear" and "all-experts". Opens experts, in place."""
    config = ReparamConfig(target_modules="all-linear", target_parameters="all-experts" if mixture else None, keep=0.5)
    if not mixture and not any(isinstance(module, (nn.Linear, Conv1D)) for module in model.modules()):
        return set()
    targets = take_targets(config, model, partial(is_target, config))
    return {name for target in targets for name in (f"{target}.weight", target.rpartition(".")[0]) if name in names}


def taken_by_name(model: nn.Module, names: Collection[str]) -> set[str]:
    """Those of some parameters that can be targeted by name, as weights of layers or else opened."""
    owners, in_lists = parameter_owners(model), kept_in_lists(model)
    found = set()
    for name in names:
        owner, _, key = name.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(name)
        if key == "weight" and refused_by_kind(module) is None:
            if refused_by_place(model, owner, module, owners, in_lists, may_share=False) is None:
                found.add(name)
        elif parameter.is_floating_point():
            with suppress(ValueError):
                check_openable(module, key, owners[id(parameter)])
                found.add(name)
    return found


def print_types(rows: list[Reach]) -> None:
    """A line for each model type, and how many of them have enough."""
    print("\n| model type | parameters | linear layers | words | with names | only by name | not |\n" + "| --- " * 7 + "|")
    for row in sorted(rows, key=lambda row: row.model_type):
        if row.total:
            cells = [f"{row.share(way):.1%}" for way in WAYS] + [
                most(counts or {}, row.total) for counts in (row.needs_names, row.left)
            ]
            print(f"| {row.model_type} | {row.total:,} | {' | '.join(cells)} |")
        else:
            print(f"| {row.model_type} | {row.error or 'no matrices'} |" + " |" * 5)
    counted = [row for row in rows if row.total]
    for way in WAYS:
        enough = sum(row.share(way) >= ENOUGH for row in counted)
        print(f"{way}: {enough} of {len(counted)} model types ({enough / len(counted):.1%}) with {ENOUGH:.0%} or more")


def most(counts: dict[str, int], total: int) -> str:
    """The largest of some parameters, by kind, with their shares in percent."""
    return ", ".join(f"{kind} {size / total:.1%}" for kind, size in Counter(counts).most_common(3) if size > 0.005 * total)


def print_families(rows: list[Reach], names: dict[str, str]) -> None:
    """The table of docs/experts.md: medians, numbers of model types with enough, and what needs a name in how many of them."""
    families = defaultdict(list)
    for row in rows:
        families["mixtures of experts" if row.mixture else family_of(row.model_type, names[row.model_type])].append(row)
    titles = ("architectures", "model types", "by linear layers alone", "by the two words", "with names", "what needs a name")
    print("\n| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for family, members in sorted(families.items(), key=lambda item: -len(item[1])):
        shares = [
            f"{statistics.median(row.share(way) for row in members):.1%}, {sum(row.share(way) >= ENOUGH for row in members)}"
            for way in WAYS
        ]
        kinds = Counter(
            kind for row in members for kind, size in (row.needs_names or {}).items() if size > (1 - ENOUGH) * row.total
        )
        named = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(4))
        print(f"| {family} | {len(members)} | {' | '.join(shares)} | {named} |")


def family_of(model_type: str, class_name: str) -> str:
    """By what a model reads, and of text by what it is for."""
    modalities = getattr(getattr(transformers, class_name), "input_modalities", None) or ()
    kinds = {modalities} if isinstance(modalities, str) else {*modalities}
    if "text" in kinds and len(kinds) > 1:
        return "several of text, images and sound"
    if kinds & {"image", "video"}:
        return "images and video"
    if "audio" in kinds:
        return "speech and sound"
    if model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoders of text"
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoders of text"
    return "encoders of text, and others" if kinds == {"text"} else "others"


if __name__ == "__main__":
    main()
