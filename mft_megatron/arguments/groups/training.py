"""Batches, steps and how they are computed."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """One pack is one sample of Megatron's batch sizes."""

    micro_batch_size: int | None = option(
        None, "Packs of one forward pass on one data-parallel rank.", type=int, at_least=1
    )
    global_batch_size: int | None = option(
        None, "Packs of one optimizer step. Not given: micro-batch size × data-parallel size.", type=int, at_least=1
    )
    rampup_batch_size: tuple[int, ...] | None = option(
        None,
        "Packs of the first step, by how many packs a step grows at a time, and over how many packs in all it grows to "
        "--global-batch-size. Unlike in Megatron it goes with --train-iters, which stay optimizer steps.",
        type=int,
        many=3,
        metavar=("START", "INCREMENT", "SAMPLES"),
    )
    step_batch_size_schedule: str | None = option(
        None,
        "Packs of a step by the tokens consumed before it, padding counted in: '0:16 2.4B:320' takes 16 until 2.4e9 / "
        "--seq-length packs are consumed, then 320 (K, M, B, T: 1e3 … 1e12). The last size is --global-batch-size.",
        type=str,
        metavar="'THRESHOLD:SIZE …'",
    )
    optimizer: str = option("adam", "Optimizer; Adam with decoupled weight decay.", choices=("adam",))
    train_iters: int | None = option(
        None, "Number of optimizer steps in all, steps before a resume counted in.", type=int, at_least=1
    )
    exit_interval: int | None = option(
        None,
        "Save and stop after an iteration divisible by this; the learning-rate schedule is unaffected.",
        type=int,
        at_least=1,
    )
    cross_entropy_impl: str = option(
        "fused-linear",
        "How token losses are made of hidden states. fused-linear: of supervised tokens alone, chunk by chunk, so that "
        "the logits of a micro-batch are never held: less memory, no more time, the same numbers to fp32 rounding. "
        "megatron: Megatron-Core's output layer and cross entropy on the logits of all tokens, for comparison.",
        choices=("fused-linear", "megatron"),
    )
