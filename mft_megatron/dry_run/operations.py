"""Floating-point operations of torch's operators: matrix products, and attention by the pairs that it computes.

A product of two numbers and its addition are two operations. Causal attention counts what a query sees only, and each
segment by itself; a backward pass of attention has 5 products where the forward pass has 2.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# position of queries among the arguments, of those that say whether it is causal, and products of a pair
_DENSE = {
    "aten::_scaled_dot_product_flash_attention": (0, 4, 2),
    "aten::_scaled_dot_product_efficient_attention": (0, 6, 2),
    "aten::_scaled_dot_product_flash_attention_backward": (1, 11, 5),
    "aten::_scaled_dot_product_efficient_attention_backward": (1, 10, 5),
}
# position of queries, of the bounds of segments of queries and keys, of causal, of the window, and products of a pair
_SEGMENTS = {
    "torch_attn::_varlen_attn": (0, 3, 4, 7, 9, 2),
    "torch_attn::_varlen_attn_backward": (1, 6, 7, 10, 13, 5),
}


def operations_of(
    operator: Any, arguments: tuple[Any, ...], outputs: list[Tensor], values: Callable[[Tensor], Tensor | None]
) -> int:
    """Operations of an operator; 0 for those that are neither products nor attention.

    Args:
        operator: an overload.
        arguments: positional ones.
        outputs: its results.
        values: gives a CPU tensor with a tensor's values, ``None`` where they are unknown: then attention is computed
            as if there was one segment.
    """
    name = operator._schema.name
    if name in _DENSE:
        first, causal_at, products = _DENSE[name]
        query, key = arguments[first], arguments[first + 1]
        causal = bool(_at(arguments, causal_at, False))
        pairs = visible_pairs(np.array([query.shape[2]]), np.array([key.shape[2]]), causal)
        return 2 * products * pairs * query.shape[0] * query.shape[1] * query.shape[3]
    if name in _SEGMENTS:
        first, q_at, k_at, causal_at, window_at, products = _SEGMENTS[name]
        query, key = arguments[first], arguments[first + 1]
        lengths_q, lengths_k = (
            np.array([total]) if (bounds := values(arguments[at])) is None else np.diff(bounds.numpy())
            for at, total in ((q_at, query.shape[0]), (k_at, key.shape[0]))
        )
        window = (_at(arguments, window_at, None) or [-1, -1])[0]
        causal = bool(_at(arguments, causal_at, False)) or window >= 0
        pairs = visible_pairs(lengths_q, lengths_k, causal, None if window < 0 else window)
        return 2 * products * pairs * query.shape[1] * query.shape[2]
    # torch's formula for addmm does not expect the argument out_dtype
    arguments = tuple(argument for argument in arguments if not isinstance(argument, torch.dtype))
    count = flop_registry.get(operator._overloadpacket)
    return 0 if count is None else int(count(*arguments, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs)))


def visible_pairs(lengths_q: np.ndarray, lengths_k: np.ndarray, causal: bool, window: int | None = None) -> int:
    """Count the pairs of a query and a key that it sees.

    Args:
        lengths_q: int [segments], queries of each segment, the last of which is at the last key.
        lengths_k: int [segments], keys of each.
        causal: a query sees no key after it.
        window: keys before its own that a query sees; ``None`` for all.
    """
    queries, keys = lengths_q.astype(np.int64), lengths_k.astype(np.int64)
    if not causal:
        return int((queries * keys).sum())
    seen = queries * keys - queries * (queries - 1) // 2
    if window is not None:
        # queries from the position window + 1 on miss the keys further away, as many as they are beyond it
        last, first = keys - 1 - window, np.maximum(keys - queries - window, 1)
        missed = np.where(last >= first, (first + last) * (last - first + 1) // 2, 0)
        seen = seen - missed
    return int(seen.sum())


def _at(arguments: tuple[Any, ...], position: int, default: Any) -> Any:
    return arguments[position] if position < len(arguments) else default
