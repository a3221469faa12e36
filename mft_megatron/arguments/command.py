"""The options of ``pretrain_mft.py``, read, completed and checked.

::

    command line ─► given values ─┐
    checkpoint's architecture ────┼─► Arguments ─► check (no device, no process group) ─► training
    Megatron's defaults ──────────┘

What can be refused without a device is refused by :mod:`.checks`, in one line that names the numbers and the
remedy. Where an option differs from Megatron's, its help says so.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.loss_names import FOCAL
from mft_megatron.options import build_parser, fill, parse, spelling
from mft_megatron.run_folder import CheckpointInfo, is_checkpoint, latest_checkpoint

from .checks import CHECKS
from .checks.batches import check_batch_schedule
from .checks.layout import check_virtual_stages
from .checks.ranges import check_ranges
from .groups.multi_task import MFTCODER_BALANCERS
from .groups.network import NetworkArguments
from .table import GROUPS, Arguments


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
