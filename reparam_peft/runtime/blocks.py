"""The blocks of a model: which they are, and which module is in which."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def block_of(name: str, blocks: Iterable[str]) -> str | None:
    """The block that a module is in, by their names; None: in none.

    >>> block_of("layers.1.mlp", ["layers.0", "layers.1"]), block_of("layers.10.mlp", ["layers.1"])
    ('layers.1', None)
    """
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, by name: what the model itself says must not be split, or else repeated items of module lists.

    Args:
        model: a transformers model, whose `_no_split_modules` names classes, or any other that repeats a class of modules in
            an `nn.ModuleList` or `nn.Sequential`. Blocks inside of blocks do not count.

    Returns:
        Name → module, in the order of `named_modules`.

    Raises:
        ValueError: there are none.
    """
    blocks = _outermost(_unsplit(model)) or _outermost(_items(model))
    if not blocks:
        raise ValueError(
            f"a {type(model).__name__} has no blocks that follow each other: it names none in `_no_split_modules`, and repeats "
            "no class of modules in an nn.ModuleList. A single block that runs several times in a pass, as ALBERT's, has no "
            "place of its own. Leave out `sequential` and `refine`, which go block by block."
        )
    return blocks


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """All that could be repeated in a model, by name: what must not be split, and items of module lists, even single ones."""
    return _outermost({**_items(model, least=1), **_unsplit(model)})


def _unsplit(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a model of transformers says must not be split, by name."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in classes}


def _items(model: nn.Module, least: int = 2) -> dict[str, nn.Module]:
    """Items of module lists that have children of their own and occur at least so often in their list, by name."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": child
        for prefix, parent in model.named_modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for name, child in parent.named_children()
        if sum(type(other) is type(child) for other in parent) >= (least if isinstance(parent, nn.ModuleList) else 2)
        and any(True for _ in child.children())
    }


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if not any(name.startswith(f"{n}.") for n in modules)}
