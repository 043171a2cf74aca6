"""The PEFT layer: factorised modules, one per adapter, around the shell of the layer that they replace."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..arguments import ReparamWarning
from ..layers.calling import call
from ..layers.computed_weight import ComputedWeight
from ..layers.factorized import FactorizedModule
from ..layers.kinds import KINDS, layer_kind, stored_weight
from ..layers.product import Product
from ..layers.quantized_bases import dequantized
from ..layers.wrapper import Wrapper
from ..numerics.storage import Storage
from .arrivals import Arrivals
from .combining import alone, combined

BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"  # PEFT's words, which its users match
W_IS_GONE = "the original weight was dropped when it was factorised"
REMEDY = "create the model with `keep_base=True`, or reload the base model"


class ReparamLayer(Wrapper, BaseTunerLayer):
    """A layer whose weight W (out, in) is the product A B of the active adapter.

    `base_layer` stays as a shell that holds the bias. Its weight is None once W is dropped: `drop_base_weight`. As long as W
    is there, the layer is additive, as PEFT's other layers: with adapters i active it computes W + Σ (A_i B_i − W).

    Args:
        base_layer: a layer of one of `layers.kinds.KINDS`.
        keeps_codes: whether a base layer that arrived quantised stays as it is, to be corrected.

    Attributes:
        kind: of the base layer.
        reparam_factors: the factorised modules by adapter.
        r: their ranks.
        arrivals: which of them a loader has yet to fill in.
        base_weight_dropped: whether W is gone.
        weight_shape: shape of the base layer's weight.
        name: in the model; "" where it is not known.
    """

    name = ""
    _quantized: nn.Module | None  # the base layer that arrived quantised, while another one is merged
    adapter_layer_names = ("reparam_factors",)
    other_param_names = ("r",)
    placeholder: Tensor

    def __init__(self, base_layer: nn.Module, keeps_codes: bool = False) -> None:
        super().__init__()
        self.keeps_codes, self._quantized = keeps_codes, None
        self.base_layer = base_layer = base_layer if keeps_codes else layer_kind(base_layer).shell(base_layer)
        self.kind = layer_kind(base_layer)
        self.out_features, self.in_features = self.kind.shape(base_layer)
        self.reparam_factors = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.base_weight_dropped = False
        self.arrivals = Arrivals(self.reparam_factors)
        weight = stored_weight(base_layer)
        # A hollow model, on meta, is about to be filled in by a loader. Loaders fill in what checkpoints hold, and `.to()` can
        # copy nothing out of meta: the placeholder, which is in no checkpoint, has its number from the start.
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        # Follows `.to()` and tells device and dtype when W is gone. Not a parameter: PEFT and its users count those.
        self.register_buffer("placeholder", torch.full((), torch.nan, dtype=self.kind.dtype(base_layer), device=device), False)
        self.weight_shape = torch.Size(self.kind.shape(base_layer)) if keeps_codes else weight.shape

    def factorized(self, adapter_name: str) -> FactorizedModule:
        """The factorised module of an adapter."""
        # No check at run time: FSDP puts a module of its own around it, which hands attributes through.
        return cast(FactorizedModule, self.reparam_factors[adapter_name])

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base model here, and of the factors in a checkpoint."""
        return self.placeholder.dtype

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, in the shape of the base layer's weight, for models that read it themselves.

        Where adapters compute, its numbers are made when they are used, with their gradients; shape, dtype and device, which
        transformers reads of some layers in each forward pass, cost nothing.
        """
        self._unmerge_disabled()
        active = [name for name in self.active_adapters if name in self.reparam_factors]
        dense = self.merged or self.disable_adapters or self.arrivals.awaited or not active
        if dense and self.base_layer.weight is not None:
            return self.base_layer.weight
        if torch.compiler.is_compiling():  # which leaves out what is not used
            return self._computed_weight()
        return ComputedWeight.of(self.placeholder, self.weight_shape, self._computed_weight, self.name)

    def _computed_weight(self) -> Tensor:
        return self.kind.weight(self.computed_matrix(), self.weight_shape)

    def dense_matrix(self, adapter_name: str) -> Tensor:
        """A B of an adapter, shape (out, in), in the base dtype; computed anew at each call."""
        self.arrivals.check_complete()
        return self.factorized(adapter_name).matrix(self.base_dtype)

    def computed_matrix(self) -> Tensor:
        """The matrix (out, in) that the layer computes with: A B, or with several adapters active W + Σ (A_i B_i − W)."""
        active = [name for name in self.active_adapters if name in self.reparam_factors]
        self.check_active(active)
        return combined([self.dense_matrix(name) for name in active], self._base_matrix)

    def computing(self) -> nn.Module | None:
        return alone(self)

    def computed_size(self) -> tuple[int, int] | None:
        """(out, in) of what is left of the matrix in the active adapter, where rows or columns are left out; None: all."""
        if self.merged or self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.reparam_factors]
        return self.factorized(active[0]).size if active else None

    @property
    def source(self) -> str | None:
        """The adapter whose product a further adapter factorises, once W is gone; before, None."""
        if not self.base_weight_dropped:
            return None
        return next(name for name in [*self.active_adapters, *self.reparam_factors] if name in self.reparam_factors)

    @property
    def source_has_bias(self) -> bool:
        """Whether what a further adapter starts from has a bias in place of the base layer's."""
        return self.source is not None and self.factorized(self.source).bias is not None

    def source_matrix(self) -> Tensor:
        """What a further adapter factorises: W or, once W is gone, the product of `source`."""
        return self._base_matrix() if self.source is None else self.dense_matrix(self.source)

    def source_bias(self) -> Tensor | None:
        """The bias that a further adapter starts from."""
        return self._base_bias() if self.source is None else self._bias(self.source)

    def update_layer(
        self,
        adapter_name: str,
        rank: int,
        product: Product | FactorizedModule | None,
        storage: Storage | None = None,
        inference_mode: bool = False,
        nested: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            rank: r.
            product: its factors and, with `bias`, its bias; or a factorised module that becomes the adapter's; None where a
                loader is about to fill them in.
            storage: how the product is stored, and whether a bias in place of the base layer's is; None: as factors alone.
            inference_mode: whether the factors are frozen.
            nested: whether it has the mean of its features, too.
        """
        if isinstance(product, FactorizedModule):
            module = product
        else:
            # On meta a module takes no memory until it is given its factors, which are not copied.
            device = self.placeholder.device if product is None else torch.device("meta")
            how = storage or Storage(self.out_features, self.in_features)
            made = (rank, how.form_at(rank), how.bias, how.size)
            module = self.kind.factorized(self.base_layer, *made, device, self.base_dtype, how.widths(rank))
            self._fill(adapter_name, module, product, how.bias, nested)
        self.r[adapter_name] = rank
        self.reparam_factors[adapter_name] = module.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def like(
        self, adapter_name: str, rank: int | None = None, form: str | None = None, bias: bool | None = None
    ) -> FactorizedModule:
        """A module as that of an adapter, without content, on meta and in the base dtype; where given, of another rank, say."""
        present = self.factorized(adapter_name)
        has_bias, widths = present.bias is not None if bias is None else bias, present.widths
        made = (rank or present.rank, form or present.form, has_bias, present.size)
        return self.kind.factorized(self.base_layer, *made, torch.device("meta"), self.base_dtype, widths)

    def _fill(self, adapter_name: str, module: FactorizedModule, product: Product | None, bias: bool, nested: bool) -> None:
        """Give a new module its product, or have it wait for a loader."""
        if product is None:
            if nested:
                device = self.placeholder.device
                module.feature_mean = torch.full((module.rank,), torch.nan, device=device, dtype=self.base_dtype)
            self.arrivals.expect(adapter_name, module)
            return
        if (bias and product.bias is None) or (nested and product.feature_mean is None):
            raise ValueError("`product` lacks the bias, or the mean of the features, that the adapter is to have.")
        module.set_factors(product.factors, product.scales)
        module.set_kept(product.rows, product.columns)
        if bias and product.bias is not None:
            module.set_bias(product.bias)
        if nested and product.feature_mean is not None:
            module.feature_mean = product.feature_mean.to(module.dtype)

    def drop_base_weight(self) -> None:
        """Forget W; with factors still on their way, as soon as they have arrived."""
        if self.base_weight_dropped or self.keeps_codes:
            return
        if self.arrivals.awaited:
            self.arrivals.postpone(self.drop_base_weight)
        else:
            # The layer stays as a shell: its bias and its geometry are read, and the state dict has no key for a None.
            self.base_layer.weight = None
            self.base_weight_dropped = True

    def factorize_base(self, adapter_name: str) -> None:
        """Fill in factors that no loader has brought, from W."""
        self.arrivals.factorize(adapter_name, self._base_matrix(), self._base_bias())

    def train(self, mode: bool = True) -> ReparamLayer:
        self.arrivals.accept_arrived()  # loaders end with `eval()`
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}base_layer.weight"
        if self.arrivals.drops_base and key not in state_dict:
            # W goes once the factors are here, and is not in the state dict of a model that has them: nothing is missing.
            state_dict[key] = self.base_layer.weight
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._combination(lambda: self.base_layer(x, *args, **kwargs), lambda name: self._product(name, x))

    def transposed(self, x: Tensor) -> Tensor:
        """Wᵀ x, of an embedding whose table serves a head, too: (…, features) → (…, tokens)."""

        def product(name: str) -> Tensor:
            factors: Any = self.factorized(name)  # of an embedding
            return cast(Tensor, factors.transposed(self._cast_input_dtype(x, factors.dtype))).to(x.dtype)

        return self._combination(lambda: F.linear(x, self.base_layer.weight), product)

    def _combination(self, base: Callable[[], Tensor], product: Callable[[str], Tensor]) -> Tensor:
        """What the active adapters make, of what the base layer does and what the product of each does."""
        self._unmerge_disabled()
        if self.disable_adapters or self.merged:
            return base()
        if self.arrivals.awaited:
            self.arrivals.check_complete()
        present = cast(nn.Module, self._modules["reparam_factors"])._modules
        active = [name for name in self.active_adapters if name in present]
        if len(active) == 1:
            return product(active[0])
        self.check_active(active)
        return combined([product(name) for name in active], base)

    def _unmerge_disabled(self) -> None:
        if self.disable_adapters and self.merged:  # as PEFT does where it computes
            self.unmerge()

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
        matrix = combined([self.dense_matrix(name) for name in names], self._base_matrix)
        weight = self.kind.weight(matrix, self.weight_shape)
        parameter = nn.Parameter(weight, requires_grad=False)
        bias = self._base_bias()
        moved = [self.factorized(name).whole_bias() for name in names]
        if bias is not None and any(vector is not None for vector in moved):
            merged_bias = combined([bias if vector is None else vector.detach() for vector in moved], lambda: bias)
            merged_bias = merged_bias.to(bias.dtype).clone()
            self._put_aside("unmerged_bias", bias)
            self.base_layer.bias.data = merged_bias
        if self.base_weight_dropped:
            self.base_layer.weight = parameter
        elif self.keeps_codes:
            if not self.merged_adapters:
                self._quantized = self.base_layer
            self.base_layer = dequantized(self.base_layer)
            self.base_layer.weight = parameter
        else:
            self._put_aside("unmerged_weight", self.base_layer.weight.data)
            self.base_layer.weight.data = weight
        self.merged_adapters.extend(adapter_names)

    def _put_aside(self, name: str, value: Tensor) -> None:
        """Keep what a merge replaces, unless an earlier merge has; as a buffer, which follows `.to()`."""
        if name not in self._buffers:
            self.register_buffer(name, value, persistent=False)

    def check_mergeable(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Raise `ValueError` where merging these adapters of the layer would fail; changes nothing."""
        if self.base_weight_dropped and len(self.merged_adapters) + len(adapter_names) > 1:
            raise ValueError(
                f"adapters {[*self.merged_adapters, *adapter_names]} cannot be merged together: {W_IS_GONE}, and the sum of "
                f"several is defined by it only. Merge one, or {REMEDY}."
            )
        self._check_alone([*self.merged_adapters, *adapter_names])
        # In half precision a product may be too large for a number although its factors are not.
        narrow = torch.finfo(self.base_dtype).max < torch.finfo(torch.bfloat16).max
        for name in adapter_names if safe_merge or narrow else ():
            if not torch.isfinite(self.dense_matrix(name)).all():
                raise ValueError(f"{BROKEN.format(name)}, or its product overflows {self.base_dtype}.")

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", ReparamWarning, stacklevel=2)
            return
        if self.base_weight_dropped:
            self.base_layer.weight = None
        elif self.keeps_codes:
            self.base_layer, self._quantized = self.own_layer, None
        else:
            self.base_layer.weight.data = self._buffers.pop("unmerged_weight")
        if "unmerged_bias" in self._buffers:
            self.base_layer.bias.data = self._buffers.pop("unmerged_bias")
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
        self.arrivals.forget(adapter_name)
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
        self._check_alone(active)

    def _check_alone(self, adapter_names: list[str]) -> None:
        """Raise `ValueError` where one of several adapters has lost neurons: outputs of other sizes cannot be added up."""
        narrow = [name for name in adapter_names if self.factorized(name).size is not None]
        if narrow and len(adapter_names) > 1:
            raise ValueError(
                f"adapters {adapter_names} cannot be active or merged together: {narrow[0]!r} has lost neurons, so that its "
                "outputs or inputs are others. Use one of them at a time."
            )

    def _product(self, adapter_name: str, x: Tensor) -> Tensor:
        """A B x + b in the dtype that the base layer would return."""
        modules = cast("dict[str, Any]", self._modules)  # by attribute, these look-ups would take as long as a small product
        base, factors = modules["base_layer"], modules["reparam_factors"]._modules[adapter_name]
        bias = base._parameters["bias"] if "bias" in base._parameters else getattr(base, "bias", None)
        if not x.is_floating_point():
            return cast(Tensor, factors(x, bias)).to(self.base_dtype)
        if self.keeps_codes and factors.form == "corrected":  # with the base layer's own bias
            bias = None
        y = call(factors, self._cast_input_dtype(x, factors.dtype), bias)
        return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _base_matrix(self) -> Tensor:
        """W, shape (out, in), of a layer that has kept it, merged or not."""
        if self.keeps_codes:
            return self.kind.own_matrix(self.own_layer)
        weight = self._buffers.get("unmerged_weight")
        return self.kind.matrix((self.base_layer.weight if weight is None else weight).detach())

    @property
    def own_layer(self) -> nn.Module:
        """The base layer as it is without adapters, merged or not, where it has kept its codes."""
        return self.base_layer if self._quantized is None else self._quantized

    def _base_bias(self) -> Tensor | None:
        """The base layer's own bias, merged or not."""
        bias = getattr(self.base_layer, "bias", None)
        return None if bias is None else self._buffers.get("unmerged_bias", bias.detach())

    def _bias(self, adapter_name: str) -> Tensor | None:
        """The bias that an adapter computes with."""
        bias = self.factorized(adapter_name).whole_bias()
        return self._base_bias() if bias is None else bias.detach()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.placeholder.device, self.base_dtype

    def __repr__(self) -> str:
        return "reparam." + super().__repr__()


@cache
def wrapper_class(name: str) -> type[ReparamLayer]:
    """The class of layers around those of a kind of this name, and an attribute of this module.

    It differs from `ReparamLayer` by its name, which is what PEFT's `"all-linear"` goes by and what users see in a printed
    model. It is made of the kind's name, so that a new kind needs no line here; pickle finds it under its name in this module.
    """
    taken = globals().get(name)
    if taken is not None and not (isinstance(taken, type) and issubclass(taken, ReparamLayer)):
        raise ValueError(f"a layer kind cannot be called {name!r}: {__name__} holds something else of this name.")
    made = type(name, (ReparamLayer,), {"__doc__": f"`ReparamLayer` of a layer of kind {name}.", "__module__": __name__})
    globals()[name] = made
    return made


for _kind in KINDS:
    wrapper_class(_kind.name)  # what another process has pickled is there before the first layer is made


def reparam_layer(module: nn.Module, keeps_codes: bool = False) -> ReparamLayer:
    """The layer around a module of a known kind; `keeps_codes` as for the layer.

    Raises:
        TypeError, ValueError: as for `layers.kinds.layer_kind`.
    """
    return wrapper_class(layer_kind(module).name)(module, keeps_codes)


def reparam_layers(model: nn.Module) -> Iterator[tuple[str, ReparamLayer]]:
    """The tuner layers by name; names as in a state dict, also under FSDP and checkpointing of activations."""
    for name, module in model.named_modules():
        if isinstance(module, ReparamLayer):
            yield re.sub(r"\b_(fsdp|checkpoint)_wrapped_module\.", "", name), module
