"""Print docs/config.md, made from the fields of `ReparamConfig`.

python docs/generate_config.py > docs/config.md
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from peft import PeftConfig

from reparam_peft import ReparamConfig
from reparam_peft.config import fields
from reparam_peft.numerics.methods import METHODS

INTRODUCTION = """\
<!-- Made by docs/generate_config.py; do not edit. -->

# ReparamConfig

`ReparamConfig` says what to factorise, to which size, and how. It is a dataclass and a `peft.PeftConfig`. Every field is
checked when the config is made: a wrong type raises `TypeError`, a wrong value `ValueError`.

```python
from reparam_peft import ReparamConfig

config = ReparamConfig(target_modules=["query", "key", "value"], r=64)
assert config.keep == 0.8  # the default; not used, because `r` is given

try:
    ReparamConfig(keep=1.5)
except ValueError as error:
    assert "`keep` must be in (0, 1]" in str(error)
```

Three fields depend on who reads the config where they are None:

| field | None in `get_peft_model` | None in `compress` |
| --- | --- | --- |
| `method` | `"svd"` | `"whitened"` |
| `allocation` | `"uniform"` | `"loss"`, or `"uniform"` where `r` is given |
| `form` | `"factors"` | `"pivot"` |

`get_peft_model` has no data. It raises `ValueError` for a calibrated method, for `allocation="loss"`, and for the fields that
belong to them. A field that would have no effect is refused:

```python
for fields in ({"method": "svd", "shrinkage": 0.1}, {"allocation": "uniform", "floor": 0.2}, {"r": 8, "allocation": "loss"}):
    try:
        ReparamConfig(**fields)
    except ValueError:
        pass
    else:
        raise AssertionError(fields)
```

The rank of a target is decided in this order: `dense_modules`, `rank_pattern`, `r`, `keep`. With `allocation="loss"`, `keep` is
a budget for all targets together.

`get_peft_model` and `compress` copy the config, resolve it, and keep the copy in `model.peft_config[adapter_name]`. The copy
names the `method`, `allocation` and `form` that were used, one rank per module in `rank_pattern`, and the sizes. It is what
`save_pretrained` writes to `adapter_config.json`. Your own config is not changed, except one that is passed to
`PeftModel.from_pretrained(…, config=…)`, which PEFT keeps.
"""


def main() -> None:
    """Print the page."""
    print(page(), end="")


def page() -> str:
    """The whole page as Markdown."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    declared = dataclasses.fields(ReparamConfig)
    ours = section("Fields of this package", (field for field in declared if field.name not in inherited))
    peft = section("Fields of every PEFT config", (field for field in declared if field.name in inherited))
    return "\n".join([INTRODUCTION, methods(), ours, peft])


def methods() -> str:
    """A heading, and a row for each method."""
    head = "| method | needs data | ranks are nested | it gives | source |\n| --- | --- | --- | --- | --- |\n"
    rows = (
        f"| `{method.name}` | {'yes' if method.needs_data else 'no'} | {'yes' if method.nested else 'no'} "
        f"| {method.summary} | {method.source} |\n"
        for method in METHODS.values()
    )
    return "## Methods\n\n" + head + "".join(rows)


def section(title: str, declared: Iterable[dataclasses.Field]) -> str:
    """A heading, and an entry per field: name, type, default, help."""
    entries = (
        f"### `{field.name}`\n\n`{type_name(field)}`, default `{default(field)}`\n\n{sentence(field)}\n" for field in declared
    )
    return f"## {title}\n\n" + "\n".join(entries)


def type_name(field: dataclasses.Field) -> str:
    """The annotation as the source writes it, with what aliases stand for."""
    if not isinstance(field.type, str):
        return getattr(field.type, "__name__", str(field.type))
    choices = {name: get_args(alias) for name, alias in vars(fields).items() if get_origin(alias) is Literal}
    return re.sub(r"\w+", lambda word: f"Literal{[*choices[word[0]]]}" if word[0] in choices else word[0], field.type)


def default(field: dataclasses.Field) -> str:
    """The default as Python writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)


def sentence(field: dataclasses.Field) -> str:
    """The field's help, with a full stop."""
    return field.metadata["help"].rstrip(".") + "."


if __name__ == "__main__":
    main()
