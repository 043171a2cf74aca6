"""`nn.MultiheadAttention`: opened, so that it calls linear layers in place of reading their weights, and closed again.

torch computes it in one function of its parameters, past hooks and factors. Opened, it projects queries, keys and values, each
by a layer of its own, attends, and calls its output layer: what serves linear layers then serves all four.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.modules import replace_forward, restore_forward
from .factorized import NESTED
from .kind import CALLED
from .parameters import OpenedParameter, Reading

PACKED, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")
OUTPUT = "out_proj"


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes as `nn.MultiheadAttention`, opened or not."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def is_open_attention(module: nn.Module) -> bool:
    """Whether a module is an opened `nn.MultiheadAttention`."""
    return is_attention(module) and CALLED in vars(module)


def projections_of(attention: nn.Module) -> dict[str, Reading]:
    """The parameters that project the inputs of an attention, open or not, each with how it makes matrices.

    They are one for queries, keys and values, three matrices in this order; or one for each, where their sizes differ.
    """
    held = {**attention._parameters, **attention._modules}
    if held.get(PACKED) is not None:
        return {PACKED: Reading(0, 1, 1, False, parts=3)}
    return {key: Reading(0, 1, 1, False) for key in SEPARATE if held.get(key) is not None}


def open_attentions(model: nn.Module, names: Iterable[str]) -> None:
    """Open the attentions of which some parameters or layers are a part, in place. What they compute stays the same.

    Args:
        model: whose they are.
        names: of parameters that project inputs, of output layers or of their weights; others are passed by.
    """
    modules = dict(model.named_modules())
    for name in names:
        owner, _, key = name.removesuffix(".weight").rpartition(".")
        attention = modules.get(owner)
        is_part = attention is not None and is_attention(attention) and key in (OUTPUT, PACKED, *SEPARATE)
        if attention is not None and is_part and not is_open_attention(attention):
            _open(attention)


def close_attentions(model: nn.Module) -> None:
    """Close all attentions whose parameters are not open and whose output layers are their own again, in place."""
    for attention in model.modules():
        if is_open_attention(attention):
            output = attention.get_submodule(OUTPUT)
            if CALLED in vars(output) and not any(isinstance(part, OpenedParameter) for part in attention.children()):
                del vars(output)[CALLED], vars(attention)[CALLED]
                restore_forward(attention)


def open_attentions_of(model: nn.Module) -> list[str]:
    """The names of a model's opened attentions."""
    return [name for name, module in model.named_modules() if is_open_attention(module)]


def _open(attention: nn.Module) -> None:
    # Attributes of the objects, not other classes: what notes attributes before an error puts them back.
    for module in (attention, attention.get_submodule(OUTPUT)):
        vars(module)[CALLED] = True
    replace_forward(attention, partial(_attend, attention))


def _attend(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What an opened attention computes: `nn.MultiheadAttention.forward`, of the same arguments."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(NESTED)
    if is_causal and attn_mask is None:
        raise ValueError("`is_causal=True` needs the `attn_mask` that it is a hint to, as in nn.MultiheadAttention.")
    is_batched = query.ndim == 3
    # To (sequences, positions, features), one tensor for one tensor: modules that read the same one share statistics.
    rearranged = {
        id(x): x[None] if not is_batched else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)
    }
    q, k, v = _projected(self, [rearranged[id(x)] for x in (query, key, value)])
    rows, length, features = q.shape
    # The hint counts there alone, and replaces the mask.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if is_causal else attn_mask
    mask = _mask(key_padding_mask if key_padding_mask is None or is_batched else key_padding_mask[None], attn_mask, q, self)
    if self.bias_k is not None:
        k, v = (torch.cat([x, bias.expand(rows, 1, -1)], 1) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
    q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if self.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None:  # of positions that were added nothing is masked
        mask = F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))
    dropout, weights = self.dropout if self.training else 0.0, None
    if need_weights:
        scores = q / math.sqrt(q.shape[-1]) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        attended = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    y = self.out_proj(attended.transpose(1, 2).reshape(rows, length, features))
    if not is_batched:
        return y[0], None if weights is None else weights[0]
    return y if self.batch_first else y.transpose(0, 1), weights


def _projected(attention: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values, each (sequences, positions, features), with the biases of an attention."""
    packed = attention.in_proj_weight
    is_one = all(x is inputs[0] for x in inputs)
    projected: Iterable[Tensor]
    if isinstance(packed, OpenedParameter) and packed.reading.parts == 3:
        projected = [layer(x) for layer, x in zip(packed.layers, inputs, strict=True)]
    elif packed is not None and is_one:
        projected = F.linear(inputs[0], packed).chunk(3, -1)
    else:
        weights = packed.chunk(3) if packed is not None else [getattr(attention, key) for key in SEPARATE]
        projected = [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    if attention.in_proj_bias is None:
        return list(projected)
    biases = attention.in_proj_bias.chunk(3)
    return [x + bias.to(x.dtype) for x, bias in zip(projected, biases, strict=True)]


def _mask(padding: Tensor | None, mask: Tensor | None, q: Tensor, attention: Any) -> Tensor | None:
    """What is added to the scores (sequences, heads, positions, positions of keys), in fewer numbers where it is the same."""
    added = [_added(one, q.dtype) for one in (padding, mask) if one is not None]
    if padding is not None:
        added[0] = added[0][:, None, None]
    if mask is not None and mask.ndim == 3:
        added[-1] = added[-1].unflatten(0, (-1, attention.num_heads))
    elif mask is not None:
        added[-1] = added[-1][None, None]
    return sum(added[1:], start=added[0]) if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, where True says which are left out, as what is added to scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)
