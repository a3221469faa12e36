"""Attention of a packed micro-batch: every kernel of ``--attention-backend`` that is available, and two other ways.

::

    query, key, value [T, heads, d] ─┬─► local, varlen, flash, fused   the kernels, given the slices ─┬─► backward
                                     ├─► repeated keys                 one call a segment, keys and   │
                                     │                                 values repeated for each head ─┤
                                     └─► explicit mask                 one call, block-diagonal mask ─┘

Forward and backward, in turn in one process, medians of rounds. All are compared with ``local`` before the first
measurement. With ``--context-parallel-size`` the queries are those of the busiest rank, and the other two are left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.mcore.attention.backends import KERNELS, choose, unavailable
from mft_megatron.mcore.parallel.attention_spans import SegmentSlices, Spans, slice_segments
from mft_megatron.mcore.parallel.context_parallel import rank_ranges
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.precisions import DTYPES

LOCAL, REPEATED, MASK = "local", "repeated keys", "explicit mask"
# largest difference between two computations, relative to the largest element
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


def segments(tokens: int, mean_length: int, seed: int) -> np.ndarray:
    """Starts of samples with lognormal lengths, then the number of tokens, int64; mean length 0: one sample."""
    if mean_length == 0:
        return np.array([0, tokens])
    generator, ends = np.random.default_rng(seed), [0]
    while ends[-1] < tokens:
        # the mean of a lognormal length is exp(mu + sigma² / 2)
        ends.append(min(ends[-1] + max(int(generator.lognormal(np.log(mean_length) - 0.5)), 1), tokens))
    return np.array(ends)


def repeated_keys(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *options) -> Tensor:
    """Attention of each segment with keys and values repeated for every query head; shapes as of the kernels."""
    repeat = query.shape[1] // key.shape[1]
    parts = (
        tensor.repeat_interleave(times, dim=1).transpose(0, 1).split(spans.lengths_q, dim=1)
        for tensor, times in ((query, 1), (key, repeat), (value, repeat))
    )
    outputs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def explicit_mask(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *options) -> Tensor:
    """Attention of all segments in one call under a block-diagonal causal mask; shapes as of the kernels."""
    segment = torch.repeat_interleave(spans.cu_q.diff())
    mask = (segment[:, None] == segment[None]).tril()
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class Case:
    """Queries, keys and values of a rank, and the attention functions that are compared."""

    def __init__(self, options: argparse.Namespace, mean_length: int):
        cu_seqlens, size = segments(options.tokens, mean_length, options.seed), options.context_parallel_size
        slices = [slice_segments(cu_seqlens, rank_ranges(options.tokens, rank, size)) for rank in range(size)]
        busiest = max(slices, key=_pairs)
        self.pairs, self.spans = _pairs(busiest), busiest.spans(devices.device())
        self.dtype, self.tolerance = DTYPES[options.precision], TOLERANCE[options.precision]
        generator = torch.Generator().manual_seed(options.seed)
        queries, keys = sum(self.spans.lengths_q), sum(self.spans.lengths_k)
        heads, groups, width = options.heads, options.groups, options.head_size
        shapes = ((queries, heads, width), (keys, groups, width), (keys, groups, width), (queries, heads, width))
        *inputs, self.upstream = (
            torch.randn(shape, generator=generator).to(devices.device(), self.dtype) for shape in shapes
        )
        self.inputs = [tensor.requires_grad_() for tensor in inputs]
        shape = AttentionShape(options.precision, width, context_parallel=size > 1, grouped_queries=heads != groups)
        self.variants = {name: choose(name, shape).kernel for name in KERNELS if unavailable(name, shape) is None}
        if size == 1:
            self.variants |= {REPEATED: repeated_keys, MASK: explicit_mask}
        self.why_not = {name: unavailable(name, shape) for name in KERNELS if name not in self.variants}

    def once(self, name: str) -> list[Tensor]:
        """Run forward and backward; returns output and gradients."""
        for tensor in self.inputs:
            tensor.grad = None
        output = self.variants[name](*self.inputs, self.spans, None, None, 0.0)
        output.backward(self.upstream)
        return [output.detach(), *(tensor.grad for tensor in self.inputs)]

    def compare(self) -> None:
        """End the program where a variant computes something else."""
        expected = self.once(LOCAL)
        for name in self.variants:
            for ours, theirs in zip(self.once(name), expected, strict=True):
                error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
                if not error < self.tolerance:
                    raise SystemExit(f"{name} differs from {LOCAL} by {error:.1e}")


def _pairs(slices: SegmentSlices) -> int:
    """Pairs of a query and a key that it attends to."""
    queries, keys = slices.end - slices.start, slices.end - slices.segment
    return int((queries * keys - queries * (queries - 1) // 2).sum())


def measure(options: argparse.Namespace, mean_length: int) -> dict:
    """Readings of all variants for one mean length of samples."""
    case = Case(options, mean_length)
    case.compare()
    clock, readings = Clock(), {name: [] for name in case.variants}
    for _ in range(options.repeat):
        for name in case.variants:
            with clock:
                case.once(name)
            readings[name].append(clock.take())
    return {
        "mean_length": mean_length,
        "slices": len(case.spans.lengths_q),
        # relative to one causal sample of all tokens, for one rank
        "fraction_of_pairs": 2 * case.pairs * options.context_parallel_size / (options.tokens * (options.tokens + 1)),
        "why_not": case.why_not,
        "variants": {
            name: {"milliseconds": median_of(taken, 1e3), "to_local": ratio_of(taken, readings[LOCAL])}
            for name, taken in readings.items()
        },
    }


def table(result: dict) -> str:
    """Format one case as Markdown rows."""
    length = result["mean_length"] or "one sample"
    return "\n".join(
        f"| {length}, {result['slices']} | {result['fraction_of_pairs']:.1%} | {name} "
        f"| {numbers['milliseconds'][main_clock()]:.1f} | {numbers['to_local'][main_clock()]:.2f} |"
        for name, numbers in result["variants"].items()
    )


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the micro-batch")
    parser.add_argument("--mean-lengths", type=int, nargs="+", default=[50, 500, 0], help="of samples; 0: one sample")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2, help="heads of keys and values")
    parser.add_argument("--head-size", type=int, default=64)
    precision = "bf16" if devices.HAS_CUDA else "fp32"
    parser.add_argument("--precision", choices=DTYPES, default=precision)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the median is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    devices.use_device()
    print(machine())
    print(
        f"{options.tokens} tokens over {options.context_parallel_size} rank(s), {options.heads} heads of "
        f"{options.head_size}, {options.groups} of keys, {options.precision}, {main_clock()} time\n"
    )
    print("| mean length, slices | of all pairs | | ms | × local |")
    print("|---|---:|---|---:|---:|", flush=True)
    results = []
    for mean_length in options.mean_lengths:
        results.append(measure(options, mean_length))
        print(table(results[-1]), flush=True)
    for name, reason in results[-1]["why_not"].items():
        print(f"\nnot here: {name} {reason}")
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
