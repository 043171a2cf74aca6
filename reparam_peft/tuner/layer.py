"""The PEFT layer: factorised modules, one per adapter, around the shell of the layer that they replace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..layers.kinds import Wrapper, layer_kind
from ..layers.product import Product
from ..numerics.decompositions import factorize

BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"  # PEFT's words, which its users match
W_IS_GONE = "the original weight was dropped when it was factorised"
DAMAGED = "the checkpoint is damaged or of another model"
REMEDY = "create the model with `keep_base=True`, or reload the base model"


class ReparamLayer(Wrapper, BaseTunerLayer):
    """A layer whose weight W (out, in) is the product A B of the active adapter.

    `base_layer` stays as a shell that holds the bias. Its weight is None once W is dropped: `drop_base_weight`. As long as W
    is there, the layer is additive, as PEFT's other layers: with adapters i active it computes W + Σ (A_i B_i − W).

    Args:
        base_layer: a layer of one of the kinds of `factorized.KINDS`.
    """

    adapter_layer_names = ("reparam_factors",)
    other_param_names = ("r",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer = layer_kind(base_layer).shell(base_layer)
        self.kind = layer_kind(base_layer)
        self.out_features, self.in_features = self.kind.shape(base_layer)
        self.reparam_factors = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.base_weight_dropped = False
        # Adapters whose factors a loader has yet to fill in, and whether W goes when the last of them has arrived.
        self.awaited: set[str] = set()
        self.drop_when_loaded = False
        weight = base_layer.weight
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        # Follows `.to()` and tells device and dtype when W is gone. Not a parameter: PEFT and its users count those.
        self.register_buffer("placeholder", torch.full((), torch.nan, dtype=weight.dtype, device=device), persistent=False)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)
        self.weight_shape = weight.shape

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base model here, and of the factors in a checkpoint."""
        return self.placeholder.dtype

    @property
    def weight(self) -> Tensor:
        """The base weight where there is one; else NaN in its shape, dtype and device, which takes no memory.

        transformers reads `weight.dtype` and `weight.device` of some layers in each forward pass. For the values use
        `dense_matrix`.
        """
        weight = self.base_layer.weight
        return self.placeholder.expand(self.weight_shape) if weight is None else weight

    def dense_matrix(self, adapter_name: str) -> Tensor:
        """A B of an adapter, shape (out, in), in the base dtype; computed anew at each call."""
        self.check_loaded()
        A, B = self.reparam_factors[adapter_name].factors
        precision = torch.promote_types(A.dtype, torch.float32)
        return (A.to(precision) @ B.to(precision)).to(self.base_dtype)

    def computed_matrix(self) -> Tensor:
        """The matrix (out, in) that the layer computes with: A B, or with several adapters active W + Σ (A_i B_i − W)."""
        active = [name for name in self.active_adapters if name in self.reparam_factors]
        self.check_active(active)
        return _combined([self.dense_matrix(name) for name in active], self._base_matrix)

    @property
    def source(self) -> str | None:
        """The adapter whose product a further adapter factorises, once W is gone; before, None."""
        if not self.base_weight_dropped:
            return None
        return next(name for name in [*self.active_adapters, *self.reparam_factors] if name in self.reparam_factors)

    @property
    def source_has_bias(self) -> bool:
        """Whether what a further adapter starts from has a bias in place of the base layer's."""
        return self.source is not None and self.reparam_factors[self.source].bias is not None

    def source_matrix(self) -> Tensor:
        """What a further adapter factorises: W or, once W is gone, the product of `source`."""
        return self._base_matrix() if self.source is None else self.dense_matrix(self.source)

    def source_bias(self) -> Tensor | None:
        """The bias that a further adapter starts from."""
        return self._bias(self.source) if self.source_has_bias else self._base_bias()

    def update_layer(
        self,
        adapter_name: str,
        rank: int,
        product: Product | None,
        inference_mode: bool = False,
        form: str = "factors",
        bias: bool = False,
        nested: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            rank: r.
            product: its factors and, with `bias`, its bias; None where a loader is about to fill them in.
            inference_mode: whether the factors are frozen.
            form: "factors" or "pivot".
            bias: whether it has a bias in place of the base layer's.
            nested: whether it has the mean of its features, too.
        """
        # On meta a module takes no memory until it is given its factors, which are not copied.
        device = self.placeholder.device if product is None else torch.device("meta")
        module = self.kind.factorized(self.base_layer, rank, form, bias, device=device, dtype=self.base_dtype)
        if product is None:
            # Parameters that were never filled in must not look like weights.
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(torch.nan)
                if nested:
                    module.feature_mean = torch.full((rank,), torch.nan, device=device, dtype=self.base_dtype)
            self.awaited.add(adapter_name)
        else:
            module.set_factors(product.factors)
            if bias:
                module.set_bias(product.bias)
            if nested:
                module.feature_mean = product.feature_mean.to(module.dtype)
        self.r[adapter_name] = rank
        self.reparam_factors[adapter_name] = module.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def drop_base_weight(self) -> None:
        """Forget W; with factors still on their way, as soon as they have arrived."""
        if self.awaited:
            self.drop_when_loaded = True
        elif not self.base_weight_dropped:
            self.base_layer.weight = None
            self.base_weight_dropped = True

    def has_arrived(self, adapter_name: str) -> bool:
        """Whether a loader has filled in the factors: they are not on meta, nor still the NaN of `update_layer`."""
        parameters = self.reparam_factors[adapter_name].parameters()
        return all(parameter.device.type != "meta" and not parameter.isnan().all() for parameter in parameters)

    def receive(self, adapter_name: str) -> None:
        """Take the factors that a loader has filled in.

        Raises:
            ValueError: they hold NaN or inf, or a mask of the pivot form does not fit the rank.
        """
        module = self.reparam_factors[adapter_name]
        module.refresh()
        means = [] if module.feature_mean is None else [module.feature_mean]
        if not all(tensor.isfinite().all() for tensor in [*module.parameters(), *means]):
            raise ValueError(f"the loaded factors of adapter {adapter_name!r} contain NaN or infinite values; {DAMAGED}.")
        self.release(adapter_name)

    def receive_arrived(self) -> None:
        """Take the factors of every adapter that has stopped waiting for them."""
        for adapter_name in sorted(self.awaited):
            if self.has_arrived(adapter_name):
                self.receive(adapter_name)

    def release(self, adapter_name: str) -> None:
        """Stop waiting for an adapter's factors; W goes with the last of them."""
        self.awaited.discard(adapter_name)
        if self.drop_when_loaded and not self.awaited:
            self.drop_when_loaded = False
            self.drop_base_weight()

    def check_loaded(self) -> None:
        """Raise `RuntimeError` where an adapter still waits for its factors; take those that have arrived."""
        self.receive_arrived()
        if self.awaited:
            raise RuntimeError(
                f"the factors of adapter {min(self.awaited)!r} were never loaded: {DAMAGED}, or it was not loaded at all. Load "
                "a whole one with `PeftModel.from_pretrained` or `load_adapter`, onto a fresh base model."
            )

    def factorize_base(self, adapter_name: str) -> None:
        """Fill in factors that no loader has brought, from W; the parameters stay the same objects."""
        module = self.reparam_factors[adapter_name]
        module.set_factors(factorize(self._base_matrix(), self.r[adapter_name]))
        if module.bias is not None:
            module.set_bias(self._base_bias())
        if module.feature_mean is not None:
            module.feature_mean = torch.zeros_like(module.feature_mean)  # the bias is that of W at every rank
        self.receive(adapter_name)

    def train(self, mode: bool = True) -> ReparamLayer:
        # Every loader ends with `eval()`: the moment to see which factors have arrived, so that W can go.
        self.receive_arrived()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if self.awaited:
            self.check_loaded()
        active = [name for name in self.active_adapters if name in self.reparam_factors]
        if len(active) == 1:
            return self._product(active[0], x)
        self.check_active(active)
        base = self.base_layer(x, *args, **kwargs)
        return sum((self._product(name, x) - base for name in active), start=base)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put A B into the base layer's weight, in addition to the factors; several adapters as W + Σ (A_i B_i − W).

        Args:
            safe_merge: check that the result is finite before anything is changed.
            adapter_names: which; None: the active ones.

        Raises:
            ValueError: the result is not finite, or several adapters are to be merged and W is gone.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.reparam_factors]
        if not adapter_names:
            return
        self.check_mergeable(adapter_names, safe_merge)
        names = [*self.merged_adapters, *adapter_names]
        matrix = _combined([self.dense_matrix(name) for name in names], self._base_matrix)
        weight = self.kind.weight(matrix, self.weight_shape)
        bias = self._base_bias()
        if any(self.reparam_factors[name].bias is not None for name in names):
            merged_bias = _combined([self._bias(name) for name in names], self._base_bias)
            if self.unmerged_bias is None:
                self.unmerged_bias = bias
            self.base_layer.bias.data = merged_bias.to(bias.dtype).clone()
        if self.base_weight_dropped:
            self.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            if not self.merged:
                self.unmerged_weight = self.base_layer.weight.data
            self.base_layer.weight.data = weight
        self.merged_adapters.extend(adapter_names)

    def check_mergeable(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Raise `ValueError` where merging these adapters of the layer would fail; changes nothing."""
        if self.base_weight_dropped and len(self.merged_adapters) + len(adapter_names) > 1:
            raise ValueError(
                f"adapters {[*self.merged_adapters, *adapter_names]} cannot be merged together: {W_IS_GONE}, and the sum of "
                f"several is defined by it only. Merge one, or {REMEDY}."
            )
        for name in adapter_names if safe_merge else ():
            if not torch.isfinite(self.dense_matrix(name)).all():
                raise ValueError(BROKEN.format(name))

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.base_weight_dropped:
            self.base_layer.weight = None
        else:
            self.base_layer.weight.data = self.unmerged_weight
            self.unmerged_weight = None
        if self.unmerged_bias is not None:
            self.base_layer.bias.data = self.unmerged_bias
            self.unmerged_bias = None
        self.merged_adapters.clear()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_active(names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_base_weight("adapters cannot be disabled")
        elif not self.disable_adapters:
            return  # `disable_adapter()` ends here also when it could not begin
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        if list(self.reparam_factors) == [adapter_name]:
            self.check_base_weight(f"adapter {adapter_name!r} is the last one and cannot be deleted")
        self.awaited.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def check_base_weight(self, what: str) -> None:
        """Raise `ValueError`, that `what` cannot be done, if W is gone."""
        if self.base_weight_dropped:
            raise ValueError(f"{what}: {W_IS_GONE}. To do this, {REMEDY}.")

    def check_active(self, adapter_names: list[str]) -> None:
        """Raise `ValueError` unless one of these adapters has factors here, or W is there to stand in."""
        active = [name for name in adapter_names if name in self.reparam_factors]
        if self.base_weight_dropped and len(active) != 1:
            raise ValueError(
                f"exactly one adapter must be active in a layer, got {active} of {list(self.reparam_factors)}: {W_IS_GONE}. "
                f"Activate one of them, or {REMEDY}."
            )

    def _product(self, adapter_name: str, x: Tensor) -> Tensor:
        """A B x + b in the dtype that the base layer would return."""
        factors = self.reparam_factors[adapter_name]
        bias = getattr(self.base_layer, "bias", None)
        if not x.is_floating_point():
            return factors(x, bias).to(self.base_dtype)
        y = factors(self._cast_input_dtype(x, factors.dtype), bias)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _base_matrix(self) -> Tensor:
        """W, shape (out, in), of a layer that has kept it, merged or not."""
        weight = self.base_layer.weight if self.unmerged_weight is None else self.unmerged_weight
        return self.kind.matrix(weight.detach())

    def _base_bias(self) -> Tensor | None:
        """The base layer's own bias, merged or not."""
        bias = getattr(self.base_layer, "bias", None)
        return None if bias is None else (bias.detach() if self.unmerged_bias is None else self.unmerged_bias)

    def _bias(self, adapter_name: str) -> Tensor | None:
        """The bias that an adapter computes with."""
        own = self.reparam_factors[adapter_name].bias
        return self._base_bias() if own is None else own.detach()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.placeholder.device, self.base_dtype

    def __repr__(self) -> str:
        return "reparam." + super().__repr__()


def _combined(products: list[Tensor], base: Callable[[], Tensor]) -> Tensor:
    """base + Σ (product − base); of a single product, that product to the bit."""
    if len(products) == 1:
        return products[0]
    original = base()
    return sum((product - original for product in products), start=original)


class Linear(ReparamLayer):
    """`ReparamLayer` of an `nn.Linear` or a `Conv1D`; PEFT's "all-linear" finds it by its name."""


class Conv2d(ReparamLayer):
    """`ReparamLayer` of an `nn.Conv2d`."""


class Embedding(ReparamLayer):
    """`ReparamLayer` of an `nn.Embedding`."""


def reparam_layer(module: nn.Module) -> ReparamLayer:
    """The layer around a module of a known kind.

    Raises:
        TypeError, ValueError: as for `factorized.layer_kind`.
    """
    classes = {nn.Conv2d: Conv2d, nn.Embedding: Embedding}
    return classes.get(layer_kind(module).layer_class, Linear)(module)


def reparam_layers(model: nn.Module) -> Iterator[tuple[str, ReparamLayer]]:
    """The tuner layers by name; names as in a state dict, also under FSDP."""
    for name, module in model.named_modules():
        if isinstance(module, ReparamLayer):
            yield name.replace("_fsdp_wrapped_module.", ""), module
