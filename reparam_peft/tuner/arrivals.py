"""Arrivals: a loader fills in factors that an adapter was made without."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..layers.factorized import FactorizedModule
from ..layers.nearest import nearest_product

DAMAGED = "the checkpoint is damaged or of another model"


# Why a layer looks for arrivals, and is not told of them: four kinds of loaders fill in factors, and no call is common to
# them. PEFT's `from_pretrained` and `load_adapter` pass `_remap_adapter_state_dict_for_load`, where a whole checkpoint is
# checked; with `low_cpu_mem_usage` they put other parameters in place of those on meta. transformers' `load_adapter`, and its
# `from_pretrained` on a folder with an adapter, set parameters one by one, and call neither that nor `_load_from_state_dict`.
# Trainers that resume load a state dict of the whole model; under FSDP one process reads it, and the others get a broadcast.
# Two things hold for all of them: what nobody has filled in is on meta, or the NaN of `expect`, of numbers in few bits their
# scales; and a loader ends with `eval()`, or else a forward pass comes next. So a layer looks in `train`, in `forward`, and
# before its matrix is read.
class Arrivals:
    """Adapters of a layer that wait for their factors, and what is to be done once the last of them has arrived.

    Args:
        factors: the factorised modules of the layer by adapter; the layer adds and removes.

    Attributes:
        awaited: the adapters whose factors no loader has filled in yet.
    """

    def __init__(self, factors: nn.ModuleDict) -> None:
        self.awaited: set[str] = set()
        self._factors = factors
        self._when_complete: Callable[[], None] | None = None

    def expect(self, adapter_name: str, module: FactorizedModule) -> None:
        """Wait for the factors of an adapter. Fills its parameters with NaN: what never arrives must not look like weights."""
        with torch.no_grad():
            for tensor in module.filled_in:
                tensor.fill_(torch.nan)
        self.awaited.add(adapter_name)

    def postpone(self, action: Callable[[], None]) -> None:
        """Call `action` once, when the last awaited adapter has arrived."""
        self._when_complete = action

    @property
    def drops_base(self) -> bool:
        """Whether W is to go as soon as the last awaited adapter has arrived."""
        return self._when_complete is not None

    def has_arrived(self, adapter_name: str) -> bool:
        """Whether a loader has filled in the factors: they are not on meta, nor still the NaN of `expect`."""
        tensors = self._module(adapter_name).filled_in
        return all(tensor.device.type != "meta" and not tensor.isnan().all() for tensor in tensors)

    def accept(self, adapter_name: str) -> None:
        """Check the factors that a loader has filled in, and stop waiting for them.

        Raises:
            ValueError: they hold NaN or inf, or a mask of the pivot form does not fit the rank.
        """
        module = self._module(adapter_name)
        module.refresh()
        means = [] if module.feature_mean is None else [module.feature_mean]
        if not all(tensor.isfinite().all() for tensor in [*module.filled_in, *means]):
            raise ValueError(f"the loaded factors of adapter {adapter_name!r} contain NaN or infinite values; {DAMAGED}.")
        self.stop_waiting(adapter_name)

    def accept_arrived(self) -> None:
        """Accept the factors of every awaited adapter that a loader has filled in."""
        for adapter_name in sorted(self.awaited):
            if self.has_arrived(adapter_name):
                self.accept(adapter_name)

    def stop_waiting(self, adapter_name: str) -> None:
        """Take it that an adapter's factors have arrived, unseen; the postponed action goes with the last of them."""
        self.awaited.discard(adapter_name)
        if self._when_complete is not None and not self.awaited:
            action, self._when_complete = self._when_complete, None
            action()

    def forget(self, adapter_name: str) -> None:
        """Stop waiting for an adapter that is taken away: nothing has arrived."""
        self.awaited.discard(adapter_name)

    def check_complete(self) -> None:
        """Accept what has arrived.

        Raises:
            RuntimeError: an adapter still waits for its factors.
            ValueError: as for `accept`.
        """
        self.accept_arrived()
        if self.awaited:
            raise RuntimeError(
                f"the factors of adapter {min(self.awaited)!r} were never loaded: {DAMAGED}, or it was not loaded at all. Load "
                "a whole one with `PeftModel.from_pretrained` or `load_adapter`, onto a fresh base model."
            )

    def factorize(self, adapter_name: str, matrix: Tensor, bias: Tensor | None) -> None:
        """Fill in the product of W without data, which no loader has brought; the parameters stay the same objects.

        Args:
            adapter_name: of an awaited adapter.
            matrix: W, shape (out, in).
            bias: of the base layer, shape (out,); read where the adapter has a bias of its own.
        """
        module = self._module(adapter_name)
        product = nearest_product(matrix, module.rank, module.form, module.widths)
        module.set_factors(product.factors, product.scales)
        if module.bias is not None and bias is not None:
            module.set_bias(bias)
        if module.feature_mean is not None:
            module.feature_mean = torch.zeros_like(module.feature_mean)  # the bias is that of W at every rank
        self.accept(adapter_name)

    def _module(self, adapter_name: str) -> FactorizedModule:
        # No check at run time: FSDP puts a module of its own around it, which hands attributes through.
        return cast(FactorizedModule, self._factors[adapter_name])


def parameters_start_on_meta() -> bool:
    """Whether a loader has switched parameter creation to the meta device (accelerate's `init_empty_weights`)."""
    return nn.Linear(1, 1, bias=False, device="cpu").weight.device.type == "meta"
