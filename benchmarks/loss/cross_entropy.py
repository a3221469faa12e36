"""Output layer and cross entropy: ``--cross-entropy-impl fused-linear`` against ``megatron``, time and peak memory.

::

    hidden states [T, H] ─┬─► megatron      output linear, vocab_parallel_cross_entropy of all logits ─┬─► Σ c_t·l_t
                          ├─► fused-linear  supervised tokens, block by block, slope known before  ─┤   backward
                          ├─► recomputed    the same, slope unknown: focal-sample's way ──────────────┤
                          └─► liger         Liger-Kernel's, on a GPU where it is installed ───────────┘

Each runs forward and backward under Megatron's data parallelism, which gathers the weight's gradient in fp32. Time: in
turn in one process, medians of rounds. Memory: each in a fresh process, peak resident memory (VmHWM of Linux) above the
resident memory before; torch's counters with a GPU.
"""

import argparse
import functools
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock
from measuring.peak_memory import peak_memory_of

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.losses.objective import Slope
from mft_megatron.mcore.kernels.mixed_products import add_weight_gradient
from mft_megatron.mcore.model.config import TransformerConfig
from mft_megatron.mcore.output_layer.cross_entropy import FusedOutputLayer, Targets, vocab_parallel_nll
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.data_parallel import DistributedDataParallel, DistributedDataParallelConfig
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.megatron_fixes import sum_weight_gradients_without_apex
from mft_megatron.mcore.platform.optional_packages import importable
from mft_megatron.mcore.platform.precisions import DTYPES

MEGATRON, FUSED, RECOMPUTED, LIGER = "megatron", "fused-linear", "recomputed", "liger"
VARIANTS = (MEGATRON, FUSED, RECOMPUTED, *([LIGER] if devices.HAS_CUDA and importable("liger_kernel") else []))
IGNORED = -100  # labels that Liger-Kernel passes over
# what models are trained in; fp16 would need a loss scale
TRAINED = ("fp32", "bf16")


class Case:
    """An output layer under Megatron's data parallelism, hidden states and a micro-batch's labels and coefficients."""

    def __init__(self, vocabulary: int, tokens: int, precision: str, supervised: float, hidden_size: int, seed: int):
        dtype, device = DTYPES[precision], devices.device()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden_size,
            num_attention_heads=1,
            params_dtype=dtype,
            bf16=precision == "bf16",
            use_cpu_initialization=not devices.HAS_CUDA,
            perform_initialization=False,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=precision == "bf16",
        )
        if config.gradient_accumulation_fusion:
            sum_weight_gradients_without_apex(add_weight_gradient)
        layer = FusedOutputLayer(hidden_size, vocabulary, config=config, init_method=None, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # by rows, so that initialisation does not set the peak of the fresh process that measures memory
            for rows in layer.weight.split(4096):
                rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
        layer.to(device)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.model = DistributedDataParallel(config, settings, layer)
        self.layer, self.vocabulary = layer, vocabulary
        self.hidden = torch.randn(tokens, 1, hidden_size, generator=generator).to(device, dtype).requires_grad_()
        self.labels_T = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        mask_T = torch.rand(tokens, generator=generator).argsort() < round(supervised * tokens)
        self.coefficient_T = (mask_T.double() / mask_T.sum()).to(device)
        self.supervised_N = mask_T.nonzero()[:, 0].to(device)
        self.masked_T = self.labels_T.masked_fill(~mask_T.to(device), IGNORED)

    def losses(self, variant: str) -> Tensor:
        """Token losses of a variant, fp32 [1, T]."""
        if variant == MEGATRON:
            logits, _ = self.layer(self.hidden)
            return vocab_parallel_nll(logits, self.labels_T[:, None], self.vocabulary).T
        slope = Slope(self.coefficient_T).take(self.supervised_N) if variant == FUSED else None
        return self.layer(self.hidden, targets=Targets(self.labels_T, self.supervised_N, slope, self.vocabulary))

    def liger(self) -> Tensor:
        """Mean loss of supervised tokens by Liger-Kernel, which has no coefficients; here those are all the same."""
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        found = Fused.apply(self.hidden.squeeze(1), self.layer.weight, self.masked_T)
        # newer releases give further values beside the loss
        return (found[0] if isinstance(found, tuple) else found).double()

    def once(self, variant: str) -> Tensor:
        """Run forward and backward; returns the value, a scalar. Gradients are in ``hidden.grad`` and ``main_grad``."""
        self.hidden.grad = None
        value = self.liger() if variant == LIGER else (self.coefficient_T * self.losses(variant)[0].double()).sum()
        value.backward()
        return value.detach()

    def compare(self) -> None:
        """End the program where variants differ; this also warms everything up."""
        expected = None
        for variant in VARIANTS:
            self.model.zero_grad_buffer()
            found = self.once(variant), self.hidden.grad.float(), self.layer.weight.main_grad
            expected = expected or (*found[:2], found[2].clone())
            # Liger adds the blocks' gradients of the weight in 16 bits
            near = 1e-5 if self.hidden.dtype == torch.float32 else 5e-2 if variant == LIGER else 1e-2
            for ours, theirs in zip(found, expected, strict=True):
                difference = (ours - theirs).norm() / theirs.norm()
                if difference > near:
                    sys.exit(f"{variant} differs from {MEGATRON} by {difference:.1e}")


def times(case: Case, repeat: int) -> dict[str, dict]:
    """Measure the seconds of each variant, and their ratio to Megatron-Core's."""
    clock, readings = Clock(), {variant: [] for variant in VARIANTS}
    for _ in range(repeat):
        for variant, taken in readings.items():
            with clock:
                case.once(variant)
            taken.append(clock.take())
    return {
        variant: {"seconds": median_of(taken), "to_megatron": ratio_of(taken, readings[MEGATRON])}
        for variant, taken in readings.items()
    }


def peak_in_fresh_process(words: list[str]) -> int:
    """Peak memory in bytes that this program measures in a fresh process."""
    process = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return int(process.stdout)


def measure(shape: tuple, hidden_size: int, seed: int, repeat: int) -> dict:
    """Time and peak memory of all variants for one vocabulary, number of tokens, precision and fraction supervised."""
    vocabulary, tokens, precision, supervised = shape
    case = Case(*shape, hidden_size, seed)
    case.compare()
    variants = times(case, repeat)
    if devices.HAS_CUDA:
        # torch counts what it allocates, whatever ran before
        for variant, numbers in variants.items():
            numbers["peak_bytes"] = peak_memory_of(functools.partial(case.once, variant))
    del case
    for variant, numbers in variants.items() if not devices.HAS_CUDA else ():
        words = ["--peak-of", variant, "--hidden-size", hidden_size, "--seed", seed, "--vocabularies", vocabulary]
        words += ["--tokens", tokens, "--precisions", precision, "--supervised", supervised]
        numbers["peak_bytes"] = peak_in_fresh_process([str(word) for word in words])
    for numbers in variants.values():
        numbers["peak_to_megatron"] = variants[MEGATRON]["peak_bytes"] / numbers["peak_bytes"]
    return dict(zip(("vocabulary", "tokens", "precision", "supervised"), shape, strict=True), variants=variants)


def table(result: dict) -> str:
    """Format one case as Markdown rows."""
    head = f"{result['vocabulary']}, {result['tokens']}, {result['precision']}, {result['supervised']:.0%}"
    clock, lines = main_clock(), []
    for variant, numbers in result["variants"].items():
        lines.append(
            f"| {head} | {variant} | {numbers['seconds'][clock]:.2f} | {numbers['to_megatron'][clock]:.2f} "
            f"| {numbers['peak_bytes'] / 1e6:.0f} | {numbers['peak_to_megatron']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 152064])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024], help="of a micro-batch, per vocabulary")
    parser.add_argument("--precisions", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--supervised", type=float, nargs="+", default=[0.5, 1.0], help="fraction of the tokens")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peak-of", choices=VARIANTS, help="run this variant once and print its peak memory in bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    if len(options.tokens) != len(options.vocabularies):
        parser.error("--tokens needs as many values as --vocabularies")
    shapes = [
        (vocabulary, tokens, precision, supervised)
        for vocabulary, tokens in zip(options.vocabularies, options.tokens, strict=True)
        for precision in options.precisions
        for supervised in options.supervised
    ]
    devices.use_device()
    with process_groups.process_groups(DistributedArguments(), options.seed):
        if options.peak_of:
            (shape,) = shapes
            # loads code and allocates buffers of libraries before the count
            Case(256, 64, *shape[2:], options.hidden_size, options.seed).once(options.peak_of)
            case = Case(*shape, options.hidden_size, options.seed)
            case.layer.weight.main_grad.fill_(0)
            print(peak_memory_of(lambda: case.once(options.peak_of)))
            return
        print(machine())
        print(f"hidden size {options.hidden_size}, {main_clock()} time; memory of a fresh process\n")
        print("| vocabulary, tokens, precision, supervised | | s | × megatron | peak, MB | times less |")
        print("|---|---|---:|---:|---:|---:|", flush=True)
        results = []
        for shape in shapes:
            results.append(measure(shape, options.hidden_size, options.seed, options.repeat))
            print(table(results[-1]), flush=True)
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
