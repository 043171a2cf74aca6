"""Training without dropout, whose noise is larger than what a student that is near its teacher has to learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

IN_CLASSES = ("drop", "stochasticdepth")  # whose rate is `p`: PyTorch's, torchvision's; elsewhere `p` is mostly that of a norm
IN_NAMES = "drop"  # of rates: `attention_dropout`, `resid_pdrop`, `layerdrop`, `drop_prob`
READ_IN_EVALUATION = {"moe_token_dropout"}  # by which NLLB-MoE then scales its outputs
OF_LORA = "lora_dropout"  # that a user has asked for


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this block no activations, paths or layers of a model are dropped in training, but by the dropout of a LoRA.

    Rates are found in modules of dropout and, by their names, in other modules and in configs, where some models read them as
    they run. Afterwards they are the same as before.
    """
    rates = [(held, name, rate) for held, names in _holders(model) for name in names if isinstance(rate := held[name], float)]
    try:
        for held, name, _ in rates:
            held[name] = 0.0
        yield
    finally:
        for held, name, rate in rates:
            held[name] = rate


def _holders(model: nn.Module) -> Iterator[tuple[dict[str, object], list[str]]]:
    """The attributes of each module and config, and the names of those that are rates by their names."""
    configs: dict[int, object] = {}
    for name, module in model.named_modules():
        if OF_LORA in name.split("."):
            continue
        held = vars(module)
        drops = any(part in type(module).__name__.lower() for part in IN_CLASSES)
        yield held, [key for key in held if _is_rate(key) or (key == "p" and drops)]
        config = held.get("config")
        if hasattr(config, "to_diff_dict"):
            configs[id(config)] = config
    for config in configs.values():
        held = vars(config)
        yield held, [key for key in held if _is_rate(key)]


def _is_rate(name: str) -> bool:
    return IN_NAMES in name and name not in READ_IN_EVALUATION
