"""The options of ``pretrain_mft.py``: Megatron's names, meanings and defaults, as frozen dataclasses.

::

    command line ─► given values ─┐
    checkpoint's architecture ────┼─► Arguments ─► check (no device, no process group) ─► training
    Megatron's defaults ──────────┘

What can be refused without a device is refused by :mod:`.argument_checks`, in one line that names the numbers and the
remedy. Where an option differs from Megatron's, its help says so.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .argument_checks import CHECKS, check_batch_schedule, check_ranges, check_virtual_stages
from .batch_sizes import BatchSizes, ramp_up, step_schedule
from .errors import InputError
from .loss_names import FOCAL, LOSSES
from .options import build_parser, fill, option, parse, spelling
from .run_folder import CheckpointInfo, is_checkpoint, latest_checkpoint

# values of MFTCoder's --weighted_loss_mode that name a balancer
MFTCODER_BALANCERS = {"coba": "coba", "selfpaced": "self-paced"}
_DRAW_HELP = (
    "Validation packs of a draw; more if a pack cannot hold every task. In MFTCoder: micro-batches of each rank."
)


@dataclasses.dataclass(frozen=True)
class NetworkArguments:
    """The model's shape. With --load it comes from the checkpoint and need not be given."""

    num_layers: int | None = option(None, "Number of transformer layers.", type=int, at_least=1)
    hidden_size: int | None = option(None, "Size of the hidden states.", type=int, at_least=1)
    ffn_hidden_size: int | None = option(
        None,
        "Size of the MLP. Not given: 4 × hidden size, or 2/3 of that in steps of 64 with --swiglu.",
        type=int,
        at_least=1,
    )
    num_attention_heads: int | None = option(None, "Number of attention heads.", type=int, at_least=1)
    group_query_attention: bool = option(False, "Grouped-query attention.")
    num_query_groups: int = option(1, "Key/value heads of --group-query-attention.", at_least=1)
    kv_channels: int | None = option(
        None, "Size of a head. Not given: hidden size / attention heads.", type=int, at_least=1
    )
    max_position_embeddings: int | None = option(
        None, "Longest sequence the model is made for. Not given: --seq-length.", type=int, at_least=1
    )
    position_embedding_type: str = option(
        "learned_absolute",
        "Position embedding. Megatron's default is not what code LLMs use: they want rope.",
        choices=("learned_absolute", "rope", "none"),
    )
    rotary_base: int = option(10000, "Base of the rotary frequencies.", at_least=2)
    rotary_percent: float = option(1.0, "Share of each head that is rotated.", above=0, at_most=1)
    normalization: str = option("LayerNorm", "Normalisation layers.", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "Epsilon of the normalisation layers.", above=0)
    swiglu: bool = option(False, "Gated linear units with SiLU in the MLP instead of GELU.")
    add_bias_linear: bool = option(True, "No bias in the linear layers.", flag="--disable-bias-linear")
    add_qkv_bias: bool = option(False, "Bias in the query/key/value projection only.")
    qk_layernorm: bool = option(False, "Normalise queries and keys.")
    tie_embeddings: bool = option(
        True,
        "Output layer with weights of its own; by default it shares the embedding's.",
        flag="--untie-embeddings-and-output-weights",
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "The vocabulary is padded to a multiple of this times the tensor-parallel size. Unlike in Megatron, padded "
        "rows are left out of the softmax, so that the padding does not change the loss.",
        at_least=1,
    )


@dataclasses.dataclass(frozen=True)
class RegularizationArguments:
    """Megatron's defaults: dropout 0.1 is on unless you turn it off."""

    attention_dropout: float = option(0.1, "Dropout of attention weights.", at_least=0, below=1)
    hidden_dropout: float = option(0.1, "Dropout of hidden states.", at_least=0, below=1)
    weight_decay: float = option(0.01, "Weight decay; biases and norms have none.", at_least=0)
    start_weight_decay: float | None = option(
        None, "Weight decay of the first step, with --weight-decay-incr-style.", type=float, at_least=0
    )
    end_weight_decay: float | None = option(
        None, "Weight decay after --train-iters steps, with --weight-decay-incr-style.", type=float, at_least=0
    )
    weight_decay_incr_style: str = option(
        "constant",
        "How weight decay grows over the --train-iters optimizer steps: not at all, or from --start-weight-decay to "
        "--end-weight-decay.",
        choices=("constant", "linear", "cosine"),
    )
    apply_wd_to_qk_layernorm: bool = option(False, "Weight decay for the norms of --qk-layernorm, too.")
    clip_grad: float = option(1.0, "Clip gradients to this global norm; 0 turns it off.", at_least=0)
    adam_beta1: float = option(0.9, "First coefficient of Adam's running averages.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Second coefficient of Adam's running averages.", at_least=0, below=1)
    adam_eps: float = option(1e-8, "Term that keeps Adam's denominator from zero.", above=0)


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


@dataclasses.dataclass(frozen=True)
class InitializationArguments:
    """The same seed gives the same weights on every layout (Megatron: on the same layout only)."""

    seed: int = option(1234, "Seed of weights, dropout and data order.", at_least=0, below=2**63)
    init_method_std: float = option(0.02, "Standard deviation of the initial weights.", at_least=0)


@dataclasses.dataclass(frozen=True)
class LearningRateArguments:
    """Schedules count optimizer steps, so they do not depend on batch or world size. The first step has the rate at 0
    steps, which is --lr-warmup-init where there is a warm-up; step n the rate at n - 1."""

    lr: float | None = option(None, "Learning rate at its peak.", type=float, at_least=0)
    lr_decay_style: str = option(
        "linear",
        "Decay of the learning rate from the end of the warm-up on. WSD (warm-up, stable, decay) keeps --lr until the "
        "last --lr-wsd-decay-iters of the decay steps.",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None,
        "Optimizer steps until the decay is over, the warm-up counted in; --min-lr from then on. Not given: "
        "--train-iters.",
        type=int,
        at_least=1,
    )
    lr_wsd_decay_style: str = option(
        "exponential",
        "Decay in the last steps of WSD.",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(
        None, "Optimizer steps of WSD's decay, the last of the decay steps.", type=int, at_least=1
    )
    lr_warmup_iters: int = option(0, "Optimizer steps of linear warm-up.", at_least=0)
    lr_warmup_fraction: float | None = option(
        None, "Share of the decay steps to warm up in.", type=float, at_least=0, below=1
    )
    lr_warmup_init: float = option(0.0, "Learning rate the warm-up starts from.", at_least=0)
    min_lr: float = option(0.0, "Learning rate at the end of the decay, and the lowest of it.", at_least=0)
    decoupled_lr: float | None = option(
        None,
        "Learning rate at its peak of the word embedding and the output layer. Not given: --lr.",
        type=float,
        at_least=0,
    )
    decoupled_min_lr: float | None = option(
        None, "Their learning rate at the end of the decay. Not given: --min-lr.", type=float, at_least=0
    )

    @property
    def warmup_steps(self) -> float:
        """As the schedule takes them; a share of the decay steps is not rounded, as in Megatron."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.lr_decay_iters
        return self.lr_warmup_iters


@dataclasses.dataclass(frozen=True)
class CheckpointArguments:
    """Megatron-Core distributed checkpoints: whatever layout wrote one, any other loads it."""

    save: str | None = option(None, "Run folder: checkpoints, metrics, configuration.", type=str, metavar="DIR")
    save_interval: int | None = option(
        None,
        "Save after this many steps; the last step is always saved.",
        type=int,
        aliases=("--persistent-save-interval",),
        at_least=1,
    )
    load: str | None = option(
        None,
        "Continue from the newest checkpoint of this folder (or from one iter_NNNNNNN folder). Unlike in Megatron a "
        "folder without a checkpoint is an error, except when it is also the --save folder: then the run starts anew.",
        type=str,
        metavar="DIR",
    )
    finetune: bool = option(False, "Load the weights alone and start at iteration 0 with a fresh optimizer.")
    save_optim: bool = option(True, "Leave the optimizer out of checkpoints.", flag="--no-save-optim")
    load_optim: bool = option(True, "Do not load the optimizer from the checkpoint.", flag="--no-load-optim")
    save_rng: bool = option(True, "Leave the random-number state out of checkpoints.", flag="--no-save-rng")
    load_rng: bool = option(True, "Do not load the random-number state.", flag="--no-load-rng")
    save_best: bool = option(
        False,
        "Also save at the evaluation that is best by --early-stopping-metric so far, and keep that checkpoint: "
        "best_checkpointed_iteration.txt in the --save folder names it.",
    )
    ckpt_format: str = option("torch_dist", "Format of checkpoints.", choices=("torch_dist",))


@dataclasses.dataclass(frozen=True)
class MixedPrecisionArguments:
    """fp32 where nothing is given."""

    bf16: bool = option(False, "bfloat16 weights and activations, with fp32 main weights.")
    accumulate_allreduce_grads_in_fp32: bool = option(
        False, "Accumulate and reduce gradients in fp32; always on with --bf16, as in Megatron."
    )

    @property
    def name(self) -> str:
        """fp32 or bf16."""
        return "bf16" if self.bf16 else "fp32"


@dataclasses.dataclass(frozen=True)
class DistributedArguments:
    """Data-parallel size is what is left: world size / (tensor × pipeline)."""

    tensor_model_parallel_size: int = option(1, "Ranks that share each layer.", at_least=1)
    pipeline_model_parallel_size: int = option(1, "Ranks that share the stack of layers.", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Interleave the pipeline in virtual stages of this many layers.", type=int, at_least=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "Interleave the pipeline in this many virtual stages on each rank.", type=int, at_least=1
    )
    sequence_parallel: bool = option(False, "Split norms and dropout over the tensor-parallel ranks, too.")
    distributed_backend: str = option(
        "auto",
        "Process-group backend. Unlike in Megatron the default is nccl with CUDA and gloo without.",
        choices=("auto", "nccl", "gloo"),
    )
    distributed_timeout_minutes: int = option(10, "How long a collective may take.", at_least=1)

    @property
    def interleaved(self) -> bool:
        """Whether each rank has several stages, which take turns with those of the other ranks."""
        return self.num_virtual_stages_per_pipeline_rank is not None


@dataclasses.dataclass(frozen=True)
class ValidationArguments:
    """Evaluation goes through the validation split in order, every sample once."""

    eval_interval: int = option(1000, "Evaluate after this many steps, and after the last.", at_least=1)
    eval_iters: int | None = option(
        None,
        "Evaluate on this many global batches only; 0 turns evaluation off. Unlike in Megatron the default is the "
        "whole validation split, exactly once.",
        type=int,
        at_least=0,
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after this many evaluations in a row without a better result; with --save it implies --save-best.",
        type=int,
        at_least=1,
        aliases=("--early_stopping_stall_num",),
    )
    early_stopping_metric: str = option(
        "macro",
        "What is to get better: the mean of the tasks' validation losses (macro), the training objective over the "
        "validation split (objective; only where weights do not change), or the validation loss of a task, by its "
        "name (not a task called macro or objective).",
        metavar="macro|objective|TASK",
    )
    early_stopping_min_delta: float = option(
        0.0, "A loss is better when it is below the best one by more than this, of the run or of a task.", at_least=0
    )
    task_early_stopping_patience: int | None = option(
        None,
        "Give a task weight 0 after this many evaluations in a row in which its own validation loss was not better "
        "than its best one, see --early-stopping-min-delta.",
        type=int,
        at_least=1,
    )


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """A data set written by tools/preprocess_data.py."""

    data_path: str | None = option(
        None, "Prefix of the data set: its --output-prefix.", type=str, aliases=("--data_paths",), metavar="PREFIX"
    )
    seq_length: int | None = option(
        None,
        "Tokens of a row; the data set must be packed for it. Not given: the one it is packed for.",
        type=int,
        at_least=1,
    )
    tokenizer_type: str | None = option(
        None,
        "Checked against the data set's; may be left out.",
        type=str,
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"),
    )
    tokenizer_model: str | None = option(
        None, "Checked against the data set's by content; may be left out.", type=str, metavar="PATH"
    )


@dataclasses.dataclass(frozen=True)
class LoggingArguments:
    """Everything logged also goes to metrics.jsonl in the --save folder, in full precision."""

    log_interval: int = option(100, "Log after this many steps.", at_least=1)
    tensorboard_dir: str | None = option(
        None, "TensorBoard folder. Not given: tensorboard/ in the --save folder.", type=str, metavar="DIR"
    )
    wandb_project: str | None = option(
        None, "Log to this project of Weights & Biases, too; needs pip install wandb.", type=str, metavar="NAME"
    )
    wandb_exp_name: str | None = option(
        None, "Name of the run there. Not given: the --save folder's name.", type=str, metavar="NAME"
    )


@dataclasses.dataclass(frozen=True)
class MultiTaskArguments:
    """The objective and its balancers: docs/LOSSES.md."""

    mft_loss: str = option(
        "task-token",
        "What counts equally: every token, every sample, or every task (by its tokens or by its samples); or a focal "
        "loss, by samples or by tasks. MFTCoder's values coba and selfpaced mean task-token with that --task-balance.",
        choices=LOSSES,
        aliases=("--weighted_loss_mode",),
        values={
            **{"case1": "token", "case2": "sample", "case3": "task-token", "case4": "task-sample"},
            **{name: name for name in MFTCODER_BALANCERS},
        },
    )
    mft_normalization: str = option(
        "global",
        "Over what a task is normalised: the global batch, whatever the layout, or each micro-batch as in MFTCoder, "
        "for comparison; task weights then count for little when micro-batches are small.",
        choices=("global", "micro-batch"),
    )
    task_weights: tuple[str, ...] | None = option(
        None,
        "Weight of each task for task-token and task-sample: name=number …, else that of the data set's task file, "
        "else 1; or one list in the data set's order of tasks, as in MFTCoder: '[1.0, 2.0]'.",
        type=str,
        many=True,
        aliases=("--task_weights",),
        metavar="NAME=W",
    )
    task_balance: str = option(
        "static",
        "Where the weights of task-token and task-sample come from: --task-weights, or the validation losses.",
        choices=("static", "self-paced", "famo", "coba"),
    )
    focal_gamma: float = option(2.0, "Exponent of the focal losses; 0 turns them into task-sample.", at_least=0)
    focal_alpha: tuple[str, ...] | None = option(
        None,
        "Weight of each task in the focal losses, given as in --task-weights; above 0.",
        type=str,
        many=True,
        metavar="NAME=A",
    )
    focal_detach: bool = option(False, "Take the modulating factor of the focal losses as a constant.")
    self_paced_history_length: int = option(
        100, "Draws in the window of slopes.", at_least=2, aliases=("--selfpaced_history_length",)
    )
    self_paced_update_interval: int = option(
        1, "Steps from one draw to the next.", at_least=1, aliases=("--selfpaced_interval",)
    )
    self_paced_sample_valid_num: int = option(1, _DRAW_HELP, at_least=1, aliases=("--selfpaced_sample_valid_num",))
    self_paced_scale_factor: float = option(
        50.0, "Gain before the last softmax.", above=0, aliases=("--selfpaced_scale_factor",)
    )
    famo_lr: float = option(0.025, "Learning rate of FAMO's logits.", at_least=0)
    famo_weight_decay: float = option(0.01, "L2 weight decay of FAMO's logits.", at_least=0)
    famo_beta1: float = option(0.9, "First coefficient of FAMO's Adam.", at_least=0, below=1)
    famo_beta2: float = option(0.999, "Second coefficient of FAMO's Adam.", at_least=0, below=1)
    famo_min_losses: tuple[str, ...] | None = option(
        None,
        "Lowest loss that each task can reach, given as in --task-weights; 0 where not named.",
        type=str,
        many=True,
        metavar="NAME=B",
    )
    famo_update_interval: int = option(1, "Steps from one draw to the next.", at_least=1)
    famo_sample_valid_num: int = option(1, f"{_DRAW_HELP} FAMO draws the same samples every time.", at_least=1)
    coba_variant: str = option(
        "paper", "CoBa's arithmetic: as published, or as released in MFTCoder v0.5.", choices=("paper", "release")
    )
    coba_warmup_steps: int = option(100, "Steps with uniform weights.", at_least=0, aliases=("--coba_warmup_steps",))
    coba_history_length: int = option(
        200, "Draws in the window of slopes.", at_least=2, aliases=("--coba_history_length",)
    )
    coba_tau: float = option(5.0, "Temperature of the divergence factor.", above=0, aliases=("--coba_tau",))
    coba_update_interval: int = option(
        1, "Steps from one draw to the next.", at_least=1, aliases=("--coba_update_interval",)
    )
    coba_sample_valid_num: int = option(1, _DRAW_HELP, at_least=1, aliases=("--coba_sample_valid_num",))


GROUPS: tuple[tuple[str, type], ...] = (
    ("network", NetworkArguments),
    ("regularization", RegularizationArguments),
    ("training", TrainingArguments),
    ("initialization", InitializationArguments),
    ("learning rate", LearningRateArguments),
    ("checkpointing", CheckpointArguments),
    ("mixed precision", MixedPrecisionArguments),
    ("distributed", DistributedArguments),
    ("validation", ValidationArguments),
    ("data", DataArguments),
    ("logging", LoggingArguments),
    ("multi-task fine-tuning", MultiTaskArguments),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """All options of a run, complete and checked.

    ``resume``: the checkpoint ``--load`` found: its folder and description; ``None`` for a run that starts anew.
    """

    network: NetworkArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    initialization: InitializationArguments
    learning_rate: LearningRateArguments
    checkpoint: CheckpointArguments
    precision: MixedPrecisionArguments
    distributed: DistributedArguments
    validation: ValidationArguments
    data: DataArguments
    logging: LoggingArguments
    multi_task: MultiTaskArguments
    world_size: int
    resume: tuple[str, CheckpointInfo] | None = None

    @property
    def data_parallel_size(self) -> int:
        layout = self.distributed
        return self.world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)

    @property
    def batch_multiple(self) -> int:
        """A batch has a multiple of this many packs: one micro-batch of each data-parallel rank, or, since interleaved
        stages take turns after as many micro-batches as the pipeline has ranks, so many of each."""
        micro_batches = self.distributed.pipeline_model_parallel_size if self.distributed.interleaved else 1
        return self.training.micro_batch_size * self.data_parallel_size * micro_batches

    @property
    def batch_sizes(self) -> BatchSizes:
        """Packs of each step, by the packs consumed before it."""
        training = self.training
        if training.step_batch_size_schedule is not None:
            return step_schedule(training.step_batch_size_schedule, self.data.seq_length)
        if training.rampup_batch_size is not None:
            return ramp_up(*training.rampup_batch_size, training.global_batch_size)
        return BatchSizes([0], [training.global_batch_size])

    def as_options(self) -> dict[str, Any]:
        """Every option's effective value by Megatron's name, for ``config.yaml``."""
        return {
            field.name: getattr(getattr(self, group.name), field.name)
            for group in dataclasses.fields(self)
            if dataclasses.is_dataclass(getattr(self, group.name))
            for field in dataclasses.fields(getattr(self, group.name))
        }


def parse_arguments(command_line: Sequence[str], world_size: int = 1, packed_lengths: Any = None) -> Arguments:
    """Read, complete and check the command line of ``pretrain_mft.py``.

    Args:
        command_line: the words after the program's name.
        world_size: number of ranks, torchrun's ``WORLD_SIZE``.
        packed_lengths: function from a data prefix to the sequence lengths it is packed for; used where
            ``--seq-length`` is not given.

    Raises:
        InputError: an unknown, misspelt, missing or contradictory option, or a ``--load`` without a checkpoint.
    """
    parser = build_parser(
        GROUPS,
        prog="pretrain_mft.py",
        description="Multi-task fine-tuning on Megatron-Core. Start it with torchrun; option names, meanings and "
        "defaults are Megatron's unless the help says otherwise.",
    )
    given = parse(parser, command_line, GROUPS)
    resume = _find_checkpoint(given)
    _need(given, "data_path", "--data-path PREFIX: the --output-prefix given to tools/preprocess_data.py")
    if "seq_length" not in given and packed_lengths is not None:
        given["seq_length"] = _only_packed_length(given["data_path"], packed_lengths(given["data_path"]))
    if resume is not None:
        given = {**_architecture_from(resume, given), **given}
        if not given.get("finetune"):
            given["seed"] = _seed_from(resume, given)
    for name, hint in _REQUIRED.items():
        _need(given, name, hint)
    if "num_query_groups" in given and not given.get("group_query_attention") and resume is None:
        raise InputError("--num-query-groups has no effect without --group-query-attention; give both or neither")
    _expand_mftcoder_balancer(given)
    _refuse(_options_without_effect(given))
    groups = {
        field.name: fill(group, given) for field, (_, group) in zip(dataclasses.fields(Arguments), GROUPS, strict=False)
    }
    arguments = Arguments(**groups, world_size=world_size, resume=resume)
    # before anything is derived from these numbers; again below for the derived ones
    for check in (check_ranges, check_virtual_stages, check_batch_schedule):
        _refuse(check(arguments))
    arguments = _complete(arguments)
    for check in CHECKS:
        _refuse(check(arguments))
    return arguments


def _refuse(problem: str | None) -> None:
    if problem:
        raise InputError(problem)


def _expand_mftcoder_balancer(given: dict[str, Any]) -> None:
    """``--weighted_loss_mode coba``: a loss and a balancer in one value."""
    balancer = MFTCODER_BALANCERS.get(given.get("mft_loss"))
    if balancer is None:
        return
    if given.get("task_balance", balancer) != balancer:
        raise InputError(
            f"the loss {given['mft_loss']} means --task-balance {balancer}, not {given['task_balance']}; leave one of "
            "them out"
        )
    given.update(mft_loss="task-token", task_balance=balancer)


def _options_without_effect(given: Mapping[str, Any]) -> str | None:
    """Options of a loss, a balancer, a schedule or a criterion that is not in use."""
    loss, balance = given.get("mft_loss", "task-token"), given.get("task_balance", "static")
    decay, growth = given.get("lr_decay_style", "linear"), given.get("weight_decay_incr_style", "constant")
    best = {"early_stopping_patience", "save_best"} & given.keys()
    owners = (
        ("focal_", loss in FOCAL, "--mft-loss focal-sample or focal-task"),
        ("self_paced_", balance == "self-paced", "--task-balance self-paced"),
        ("famo_", balance == "famo", "--task-balance famo"),
        ("coba_", balance == "coba", "--task-balance coba"),
        ("early_stopping_metric", best, "--early-stopping-patience or --save-best"),
        (
            "early_stopping_min_delta",
            best or "task_early_stopping_patience" in given,
            "--early-stopping-patience, --task-early-stopping-patience or --save-best",
        ),
        ("lr_wsd_", decay == "WSD", "--lr-decay-style WSD"),
        ("min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", decay != "constant", "a decay, and --lr-decay-style constant has none"),
        ("decoupled_min_lr", "decoupled_lr" in given, "--decoupled-lr"),
        ("weight_decay", growth == "constant", "--weight-decay-incr-style constant, which is the default"),
        ("start_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
        ("end_weight_decay", growth != "constant", "--weight-decay-incr-style linear or cosine"),
    )
    for field in (field for _, group in GROUPS for field in dataclasses.fields(group)):
        for prefix, in_use, wanted in owners:
            owned = field.name.startswith(prefix) if prefix.endswith("_") else field.name == prefix
            if owned and field.name in given and not in_use:
                return f"{spelling(field)} has no effect without {wanted}; add that, or leave it out"
    return None


_REQUIRED = {
    "num_layers": "--num-layers N, or --load a checkpoint that knows it",
    "hidden_size": "--hidden-size N, or --load a checkpoint that knows it",
    "num_attention_heads": "--num-attention-heads N, or --load a checkpoint that knows it",
    "seq_length": "--seq-length N: the length the data set is packed for",
    "micro_batch_size": "--micro-batch-size N",
    "train_iters": "--train-iters N",
    "lr": "--lr X",
}


def _need(given: Mapping[str, Any], name: str, hint: str) -> None:
    if given.get(name) is None:
        raise InputError(f"missing option: give {hint}")


def _find_checkpoint(given: Mapping[str, Any]) -> tuple[str, CheckpointInfo] | None:
    load = given.get("load")
    if load is None:
        return None
    # The idiom of a job that is restarted with the same command line: nothing saved yet means "start".
    same = given.get("save") is not None and os.path.abspath(load) == os.path.abspath(given["save"])
    if same and not is_checkpoint(load):
        return None
    path, info = latest_checkpoint(load)
    return str(path), info


def _architecture_from(resume: tuple[str, CheckpointInfo], given: Mapping[str, Any]) -> dict[str, Any]:
    path, info = resume
    known = {field.name: field for field in dataclasses.fields(NetworkArguments)}
    architecture = {name: value for name, value in info.architecture.items() if name in known}
    # these shape no weight: the length, where positions are not learned, follows --seq-length when it is not given
    free = {"make_vocab_size_divisible_by"}
    if architecture.get("position_embedding_type") != "learned_absolute":
        free.add("max_position_embeddings")
        longest = max(architecture.pop("max_position_embeddings", 0), given.get("seq_length", 0))
        architecture["max_position_embeddings"] = longest or None
    for name, value in architecture.items():
        if name not in free and name in given and given[name] != value:
            raise InputError(
                f"{spelling(known[name])} gives {name} = {given[name]}, but the checkpoint {path} has {value}; leave "
                "the option out, the architecture comes from the checkpoint"
            )
    return architecture


def _seed_from(resume: tuple[str, CheckpointInfo], given: Mapping[str, Any]) -> int:
    """The seed fixes the order of the data, which a resumed run goes on following."""
    path, info = resume
    if given.get("seed", info.seed) != info.seed:
        raise InputError(
            f"--seed {given['seed']}: the checkpoint {path} follows the data order of seed {info.seed}; leave "
            "the option out, or start a new pass with --finetune"
        )
    return info.seed


def _only_packed_length(prefix: str, lengths: Sequence[int]) -> int:
    if len(lengths) != 1:
        raise InputError(
            f"missing option: give --seq-length; {prefix} is packed for {', '.join(map(str, lengths)) or 'no length'}"
        )
    return lengths[0]


def _complete(arguments: Arguments) -> Arguments:
    """Fill in what follows from other options."""
    network, training = arguments.network, arguments.training
    if network.ffn_hidden_size is None:
        size = 4 * network.hidden_size
        size = int(size * 2 / 3) // 64 * 64 if network.swiglu else size
        network = dataclasses.replace(network, ffn_hidden_size=size)
    if network.kv_channels is None:
        network = dataclasses.replace(network, kv_channels=network.hidden_size // network.num_attention_heads)
    if not network.group_query_attention:
        network = dataclasses.replace(network, num_query_groups=network.num_attention_heads)
    if network.max_position_embeddings is None:
        network = dataclasses.replace(network, max_position_embeddings=arguments.data.seq_length)
    if training.step_batch_size_schedule is not None:
        training = dataclasses.replace(training, global_batch_size=arguments.batch_sizes.sizes[-1])
    elif training.global_batch_size is None:
        # too few ranks for the layout are refused later, in words of their own
        size = training.micro_batch_size * max(arguments.data_parallel_size, 1)
        training = dataclasses.replace(training, global_batch_size=size)
    layout = arguments.distributed
    stages, layers = layout.num_virtual_stages_per_pipeline_rank, layout.num_layers_per_virtual_pipeline_stage
    if layers is not None:
        stages = network.num_layers // (layout.pipeline_model_parallel_size * layers)
    layout = dataclasses.replace(
        layout,
        num_layers_per_virtual_pipeline_stage=None,  # says the same in other words
        num_virtual_stages_per_pipeline_rank=None if stages == 1 else stages,
    )
    schedule = arguments.learning_rate
    if schedule.lr_decay_iters is None:
        schedule = dataclasses.replace(schedule, lr_decay_iters=training.train_iters)
    precision = arguments.precision
    if precision.bf16:
        precision = dataclasses.replace(precision, accumulate_allreduce_grads_in_fp32=True)
    return dataclasses.replace(
        arguments,
        network=network,
        training=training,
        distributed=layout,
        learning_rate=schedule,
        precision=precision,
    )
