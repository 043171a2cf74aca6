"""Make PEFT and transformers know the method. PEFT has no plug-in interface: its registry demands a member of an enum."""

from __future__ import annotations

import warnings
from typing import Any

from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .arguments import ReparamWarning

NAME = "reparam"  # transformers derives the adapter's key prefix from it


def extend_peft_types(name: str) -> None:
    """Add the member `name` (upper case) to `peft.PeftType`; does nothing where it exists.

    The member behaves as one of the class body's: by name, by value, in iteration, compared with and hashed as its string.
    """
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)  # Any: its types are made for class bodies
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType refuses assignment of members, so go around it.
    type.__setattr__(PeftType, name, member)


def register() -> None:
    """Register method REPARAM with PEFT. Idempotent; yields, with a warning, where PEFT has a method of this name itself.

    PEFT's reading of `adapter_config.json` is replaced by one that tells by name which file is damaged, of any method.
    """
    extend_peft_types(NAME.upper())
    # Imported here because the config's class body needs the enum's member.
    from .compression.loading import register_loading
    from .config.adapter_file import reading_adapter_config
    from .config.reparam_config import ReparamConfig
    from .runtime.hosts import NEWEST_TRIED, extend, is_untried, names_that_went, serve_state_dicts
    from .standalone.checkpoint import register_checkpoints
    from .standalone.from_config import register_from_config
    from .standalone.parallel import register_parallel
    from .tuner.base_state import register_base_state
    from .tuner.host_checks import register_host_checks
    from .tuner.model import ReparamModel

    register_checkpoints()
    register_from_config()
    register_parallel()
    register_host_checks()
    register_base_state()
    register_loading()
    went = names_that_went() if is_untried() else []
    if went:
        warnings.warn(
            f"{' '.join(went)} This version of reparam_peft was tried up to {NEWEST_TRIED}; upgrade it, or install those.",
            ReparamWarning,
            stacklevel=2,
        )
    extend(PeftConfigMixin, "from_json_file", reading_adapter_config)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME.upper()])
    if registered is None:
        register_peft_method(name=NAME, config_cls=ReparamConfig, model_cls=ReparamModel)
        serve_state_dicts(ReparamModel, PeftType[NAME.upper()])
    elif registered.__module__ != ReparamConfig.__module__:
        warnings.warn(
            f"PEFT already has a method REPARAM ({registered.__module__}); reparam_peft leaves it in place. Its own "
            "checkpoints cannot be loaded in this process.",
            ReparamWarning,
            stacklevel=2,
        )
