"""Options of batches and steps, and of how they are computed."""

import dataclasses

from mft_megatron.arguments.values.attention import BACKENDS
from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """One pack is one sample of Megatron's batch sizes."""

    micro_batch_size: int = option(
        None, "Packs of one forward pass on one data-parallel rank.", at_least=1, required="--micro-batch-size N"
    )
    global_batch_size: int = option(
        None, "Packs of one optimizer step. Not given: micro-batch size × data-parallel size.", at_least=1, derived=True
    )
    rampup_batch_size: tuple[int, int, int] | None = option(
        None,
        "Packs of the first step, the increment, and the number of consumed packs after which a step has "
        "--global-batch-size. Unlike in Megatron it is used with --train-iters or --num-train-epochs.",
        metavar=("START", "INCREMENT", "SAMPLES"),
    )
    step_batch_size_schedule: str | None = option(
        None,
        "Packs of a step by the tokens consumed before it, including padding: '0:16 2.4B:320' takes 16 until 2.4e9 "
        "/ --seq-length packs are consumed, then 320 (K, M, B, T: 1e3 … 1e12). The last size is "
        "--global-batch-size.",
        metavar="'THRESHOLD:SIZE …'",
    )
    optimizer: str = option(
        "adam", "adam: with decoupled weight decay. sgd: with --sgd-momentum.", choices=("adam", "sgd")
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep optimizer states in the host's memory and compute updates there, with --use-distributed-optimizer and "
        "--use-precision-aware-optimizer. CUDA only.",
    )
    optimizer_offload_fraction: float = option(
        1.0, "The fraction of the states that --optimizer-cpu-offload moves.", at_least=0, at_most=1
    )
    use_torch_optimizer_for_cpu_offload: bool = option(
        False, "With --optimizer-cpu-offload also use torch's optimizer for the states on the GPU."
    )
    overlap_cpu_optimizer_d2h_h2d: bool = option(
        False, "With --optimizer-cpu-offload overlap updates with the copies of gradients and weights."
    )
    train_iters: int = option(
        None,
        "Total number of optimizer steps, including those before a resume. This or --num-train-epochs is needed.",
        at_least=1,
        derived=True,
    )
    num_train_epochs: float | None = option(
        None,
        "Instead of --train-iters: passes over the packs of the training split, e.g. 3 or 0.5, including those before "
        "a resume. Schedules that count from --train-iters then count the steps of these epochs. The last step has the "
        "packs that remain, so that after 3 epochs every sample was used exactly 3 times. Not Megatron's.",
        above=0,
        at_most=1_000_000,
        metavar="E",
    )
    check_for_nan_in_loss_and_grad: bool = option(
        True,
        "Refused: losses and the gradient norm of each step are always checked, at no cost; see --on-bad-step.",
        flag="--no-check-for-nan-in-loss-and-grad",
    )
    exit_interval: int | None = option(
        None,
        "Save and stop after an iteration divisible by this; the learning-rate schedule is unaffected.",
        at_least=1,
    )
    attention_backend: str = option(
        "auto",
        "Kernel of attention. auto: on Hopper and Blackwell FlashAttention 3 or 4 if its package works in torch; "
        "else flash if its package works, else varlen, else local; the log says which. local: "
        "PyTorch's scaled dot-product attention, everywhere. varlen: the FlashAttention in torch, from "
        "2.12 on, or 2.11 without grouped queries. flash: the package flash-attn. fused: cuDNN's, through Transformer "
        "Engine. All but local need CUDA and --bf16 or --fp16. Unlike in Megatron unfused is refused.",
        choices=(*BACKENDS, "unfused"),
    )
    deterministic_mode: bool = option(
        False,
        "Take algorithms that give the same bits in each run with the same parallel layout, number of threads and "
        "versions: of torch, and on a GPU also of attention's backward passes, cuBLAS, NCCL and Transformer Engine; "
        "slower. An operation that has none ends the run.",
    )
    exit_duration_in_mins: float | None = option(
        None,
        "Save and stop after the first step that ends more than this many minutes after the start of the program. "
        "Megatron takes whole numbers only.",
        at_least=0,
    )
    exit_signal_handler: bool = option(
        False,
        "Save and stop on all ranks after the step in which any rank receives --exit-signal. Unlike in Megatron "
        "SIGTERM and SIGUSR1 do that with --save without this option.",
    )
    exit_signal: str = option(
        "SIGTERM", "Signal of --exit-signal-handler.", choices=("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    )
    manual_gc: bool = option(
        False,
        "Collect Python's garbage at the same steps on all ranks, see --manual-gc-interval, instead of automatically.",
    )
    manual_gc_interval: int = option(
        0,
        "Collect garbage after this many steps, with --manual-gc; 0: only at the start and around evaluations.",
        at_least=0,
    )
    manual_gc_eval: bool = option(
        True,
        "With --manual-gc: do not collect garbage before and after evaluations.",
        flag="--no-manual-gc-eval",
        aliases=("--disable-manual-gc-eval",),
    )
    cross_entropy_impl: str = option(
        "fused-linear",
        "How token losses are computed from hidden states. fused-linear: only for supervised tokens, block by "
        "block, so that the logits of a micro-batch are never in memory at once: less memory, in fp32 no more time, "
        "the same numbers up to fp32 rounding. megatron: Megatron-Core's output layer and cross entropy on the logits "
        "of all tokens, for comparison.",
        choices=("fused-linear", "megatron"),
    )
