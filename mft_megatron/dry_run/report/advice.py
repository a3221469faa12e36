"""Advice where a rank does not fit its GPU: options that make the largest categories of its peak smaller."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.dry_run.rank_report import ACTIVATIONS, GRADIENTS, LOGITS, OPTIMIZER, WEIGHTS, RankReport


def advice(arguments: Arguments, report: RankReport) -> list[str]:
    """List what the run does not use yet, in the order of the bytes that it concerns; empty where all is used."""
    layout, training = arguments.distributed, arguments.training
    steps = [step.memory for step in report.steps] + ([] if report.longest is None else [report.longest])
    peak = max(steps, key=lambda memory: memory.peak).by_category
    states = peak[OPTIMIZER] + peak[GRADIENTS]
    trained = arguments.adapters is None
    tries = [
        (sum(peak.values()), arguments.precision.name == "fp32", "--bf16"),
        (
            peak[ACTIVATIONS],
            layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel,
            "--sequence-parallel, which shards activations between matrix products as well",
        ),
        (
            peak[ACTIVATIONS],
            arguments.recompute.recompute_granularity != "full",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1, which keeps one input a "
            "layer and computes each layer twice",
        ),
        (peak[ACTIVATIONS], training.micro_batch_size > 1, "a smaller --micro-batch-size"),
        (
            peak[OPTIMIZER],
            not layout.use_distributed_optimizer and arguments.data_parallel_size > 1,
            "--use-distributed-optimizer, which shards states over the data-parallel ranks",
        ),
        (
            peak[OPTIMIZER],
            arguments.data_parallel_size == 1 and trained,
            "--use-distributed-optimizer with a larger --world-size: its states are sharded over data-parallel ranks",
        ),
        (states, trained, "--peft-type lora, which trains small matrices beside frozen ones"),
        (peak[LOGITS], training.cross_entropy_impl != "fused-linear", "--cross-entropy-impl fused-linear"),
        (
            states + peak[WEIGHTS],
            True,
            "more ranks for the model: --tensor-model-parallel-size, --pipeline-model-parallel-size",
        ),
    ]
    # a twentieth of the peak changes no verdict
    worth = [(size, words) for size, usable, words in tries if usable and size > report.peak / 20]
    return [words for _, words in sorted(worth, key=lambda one: -one[0])]
