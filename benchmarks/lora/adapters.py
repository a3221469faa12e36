"""Cost of adapters (``--peft-type``): time of a forward and backward pass, and peak memory, beside PEFT's.

::

    tokens [1, T] of equal segments ─► all layers, token losses ─► Σ l_t ─► backward      once for each kind of training

The peer is PEFT on transformers' Llama with the same weights, tokens and adapters; segments are its rows. Both must
compute the same loss. Time: all in turn in one process, medians of rounds. Memory: each in a fresh process, peak
resident memory (VmHWM of Linux) above the resident memory before the model; torch's counters with a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock
from measuring.peak_memory import peak_memory_of

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.batch import Batch
from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
from mft_megatron.mcore.checkpointing.load_weights import fill_models
from mft_megatron.mcore.model.gpt import build_model
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.device_batch import to_device
from mft_megatron.mcore.platform import devices

RANK = "--lora-rank 16 --lora-alpha 32"
OURS = {
    "the whole model": "",
    "lora": f"--peft-type lora {RANK}",
    "lora, all-linear": f"--peft-type lora {RANK} --lora-target-modules all-linear",
    "qlora, all-linear": f"--peft-type qlora {RANK} --lora-target-modules all-linear",
}
PEER = "PEFT, all-linear"
SAME = "lora, all-linear"
RUN = (
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --train-iters 1 --data-path none --micro-batch-size 1 "
    "--make-vocab-size-divisible-by 1"
)


class Ours:
    """This project's model in one way of training, and a micro-batch of one row of equal segments."""

    def __init__(self, variant: str, folder: Path, tokens_BS: np.ndarray, bf16: bool):
        source = HuggingFaceSource(str(folder))
        words = f"{RUN} {OURS[variant]} {'--bf16' * bf16} --seq-length {tokens_BS.size} --hf-checkpoint {folder}"
        arguments = parse_arguments(words.split(), hf_model=source.info)
        (self.chunk,) = build_model(arguments, source.info.vocab_size)
        fill_models([self.chunk.module], source)
        self.chunk.train()
        length = tokens_BS.shape[1]
        positions, segments = np.arange(tokens_BS.size) % length, np.arange(tokens_BS.size) // length
        mask, task = np.ones((1, tokens_BS.size), np.uint8), np.zeros((1, tokens_BS.size), np.int64)
        ends = np.arange(0, tokens_BS.size + 1, length).astype(np.int32)
        flat, labels = tokens_BS.reshape(1, -1), np.roll(tokens_BS, -1, 1).reshape(1, -1)
        self.batch = to_device(Batch(flat, labels, mask, positions[None], segments[None], task, ends, length))

    def run(self) -> float:
        """Run forward and backward; gradients are summed in DDP's buffers. Returns the sum of the token losses."""
        self.chunk.zero_grad_buffer()
        loss = self.chunk.module.run(self.batch).sum()
        loss.backward()
        return loss.item()


class Peft:
    """PEFT's adapters on transformers' model."""

    def __init__(self, folder: Path, tokens_BS: np.ndarray, bf16: bool):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if bf16 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config).to(devices.device()).train()
        self.tokens = torch.from_numpy(tokens_BS).to(devices.device())
        self.labels = torch.from_numpy(np.roll(tokens_BS, -1, 1)).to(devices.device())

    def run(self) -> float:
        """Run forward and backward. Returns the sum of the token losses."""
        self.model.zero_grad(set_to_none=False)
        logits = self.model(self.tokens, use_cache=False).logits.flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, self.labels.flatten(), reduction="sum")
        loss.backward()
        return loss.item()


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 3,
        num_hidden_layers=options.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.segment_length,
    )
    LlamaForCausalLM(config).to(torch.bfloat16 if options.bf16 else torch.float32).save_pretrained(folder)


def case_of(variant: str, folder: Path, options: argparse.Namespace) -> Ours | Peft:
    """Build a variant with the same tokens, int64 [segments, length]."""
    tokens_BS = np.random.default_rng(options.seed).integers(
        0, options.vocab_size, (options.segments, options.segment_length)
    )
    if variant == PEER:
        return Peft(folder, tokens_BS, options.bf16)
    return Ours(variant, folder, tokens_BS, options.bf16)


def measure_time(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list], dict[str, float]]:
    """Measure each variant: seconds in each round by clock, and its loss."""
    cases = {variant: case_of(variant, folder, options) for variant in (*OURS, PEER)}
    readings, losses, clock = {variant: [] for variant in cases}, {}, Clock()
    for number in range(options.warmup + options.rounds):
        for variant, case in cases.items():
            with clock:
                losses[variant] = case.run()
            taken = clock.take()
            if number >= options.warmup:
                readings[variant].append(taken)
    return readings, losses


def measure_memory(variant: str, folder: Path) -> int:
    """Peak memory in bytes, model included, measured in a fresh process."""
    words = [sys.executable, __file__, *sys.argv[1:], "--peak-of", variant, "--model", str(folder)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return int(process.stdout.splitlines()[-1])


def table(result: dict) -> str:
    """Format all variants as Markdown."""
    lines = [
        f"| trained | pass, ms {main_clock()} | of {PEER} | peak, MiB | loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, numbers in result.items():
        lines.append(
            f"| {name} | {numbers['milliseconds'][main_clock()]:.0f} | {numbers['to_peer'][main_clock()]:.2f} | "
            f"{numbers['peak_bytes'] / 2**20:.0f} | {numbers['loss']:.6g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the clock counts")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each variant; the median is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--peak-of", choices=(*OURS, PEER), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    devices.use_device()
    layout = parse_arguments(
        f"{RUN} --num-layers 1 --hidden-size 64 --num-attention-heads 1 --seq-length 8".split()
    ).distributed
    with process_groups.process_groups(layout, options.seed), tempfile.TemporaryDirectory() as root:
        if options.peak_of:
            import peft  # noqa: F401  (imports do not count)

            print(peak_memory_of(lambda: case_of(options.peak_of, options.model, options).run()))
            return
        folder = Path(root) / "model"
        write_model(folder, options)
        print(machine())
        readings, losses = measure_time(folder, options)
        apart = abs(losses[SAME] / losses[PEER] - 1)
        if apart > (1e-2 if options.bf16 else 1e-5):
            sys.exit(f"error: the losses of {SAME} and {PEER} differ by a relative {apart:.1e}; nothing was measured")
        result = {
            variant: {
                "milliseconds": median_of(taken, 1000),
                "to_peer": ratio_of(taken, readings[PEER]),
                "peak_bytes": measure_memory(variant, folder),
                "loss": losses[variant],
            }
            for variant, taken in readings.items()
        }
    print(table(result))
    write_numbers(options, machine(), result)


if __name__ == "__main__":
    main()
