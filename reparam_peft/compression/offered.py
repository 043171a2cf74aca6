"""What matrices can be stored as where their numbers may be in few bits, by a config and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config.reparam_config import ReparamConfig
from ..layers.schemes import SCHEME_OF
from ..layers.wrapper import kind_and_layer
from ..planning.byte_options import ByteOption, Bytes
from ..planning.ranks import resolve_rank
from ..tuner.matrices import base_dtype
from ..tuner.targets import Target


def offered(config: ReparamConfig, forms: Sequence[str] | None, targets: Mapping[str, Target]) -> Bytes | None:
    """What each target can be stored as, in bytes; None where no numbers are in few bits.

    Args:
        config: with its choices resolved.
        forms: of products, under a budget of bytes; None: all.
        targets: by name.

    Raises:
        ValueError: a field has no effect under a budget of bytes.
        ImportError: the library that computes with numbers of some width is not installed.
    """
    if not config.chooses_bits:
        return None
    storages = {name: target.storage for name, target in targets.items()}
    itemsizes = {name: base_dtype(target.module).itemsize for name, target in targets.items()}
    if config.budget == "bytes":
        for name in ("floor", "ceiling"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` bounds parameters, and `budget='bytes'` shares out bytes; leave it out.")
        is_linear = {name: kind_and_layer(target.module)[0].linear for name, target in targets.items()}
        made = Bytes.of(config, forms, storages, itemsizes, is_linear)
    else:  # corrected at one rank
        ranks = {name: resolve_rank(config, name, storage) for name, storage in storages.items()}
        options = {
            name: [ByteOption(rank, storage, storage.bytes(rank, itemsizes[name]))]
            for name, storage in storages.items()
            if (rank := ranks[name]) is not None
        }
        dense = {name: storage.dense * itemsizes[name] for name, storage in storages.items()}
        made = Bytes(dense, dense, options)
    used = (bits for options in made.options.values() for o in options if o.rank for bits in o.storage.widths(o.rank).values())
    for bits in sorted({*used}):
        SCHEME_OF[bits].imported()
    return made
