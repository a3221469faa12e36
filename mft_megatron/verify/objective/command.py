"""``objective`` of ``tools/verify.py``: a certificate of the steps of a run, on its own parallel layout."""

import dataclasses
import os
from collections.abc import Sequence

from mft_megatron.arguments.command import make_arguments, read_command_line
from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.convert.run_start import open_start
from mft_megatron.data.loading.dataset import packed_lengths, training_packs
from mft_megatron.errors import InputError
from mft_megatron.options import option, out_of_range

from .terms import refuse_loss

COMMAND = {
    "prog": "verify.py objective",
    "usage": "torchrun … tools/verify.py objective PREFIX [--verify-steps N] [--verify-weights PATTERN …] "
    "<the options of pretrain_mft.py>",
    "description": "Certify loss, shares and gradients of a run. The first steps are run forward and backward by the "
    "run's own trainer on its own parallel layout, without updates, and compared with one process in fp64 that has "
    "every sample alone in a row and Eq. 1 written out. For a model of the run's shape with few layers "
    "(--num-layers 2): one process then has all of its weights and gradients in fp64, and CPUs compute it in minutes. "
    "Start it as the run is started, with the same options; nothing is written, and options for saving and logging do "
    "nothing. Dropout, losses that balance experts and the update are left out. "
    "Exit code 0: certified; 1: not; 2: bad input.",
}


@dataclasses.dataclass(frozen=True)
class CertificateArguments:
    """Options of the comparison."""

    verify_steps: int = option(1, "Steps to compare, from the one that the run starts or resumes at.", at_least=1)
    verify_weights: tuple[str, ...] | None = option(
        None,
        "Weights whose gradients are compared, by patterns such as 'decoder.layers.*.linear_qkv.weight'. Not given: "
        "embedding, output layer, final norm, and all of the first and the last layer.",
        metavar="PATTERN",
    )


def objective(command_line: Sequence[str]) -> int:
    """Compare the first steps of a run with their reference, print tables and the verdict.

    Returns:
        the exit code: 0 certified, 1 failed.

    Raises:
        InputError: the run could not start, or has no reference.
    """
    words = list(command_line)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data-path")
    read = read_command_line(words, COMMAND, [("certificate", CertificateArguments)])
    own = read.group(CertificateArguments)
    if problem := out_of_range(own):
        raise InputError(problem)
    start, model, adapter = open_start(read)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    given = make_arguments(read, start, world_size, packed_lengths, training_packs)
    _refuse(given)
    arguments, notes = comparable(given)
    # what follows loads torch
    from mft_megatron.training.saving.sources import Sources

    from .certificate import certify

    return certify(arguments, Sources(model, adapter), own.verify_steps, own.verify_weights, notes)


def _refuse(arguments: Arguments) -> None:
    """Refuse runs that one process cannot repeat.

    Raises:
        InputError: the reason.
    """
    refuse_loss(arguments.multi_task.mft_loss, arguments.multi_task.mft_normalization)
    network, moe = arguments.network, arguments.moe
    if arguments.validation.skip_train or arguments.finished:
        raise InputError("the run takes no step that could be certified: it is at its end, or --skip-train is given")
    experts = network.num_experts is not None
    reasons = {
        "--peft-type qlora: the reference has no weights in 4 bits; give --peft-type lora": (
            arguments.lora.peft_type == "qlora"
        ),
        "--fp8-format: no bound is known for fp8; leave it out": arguments.transformer_engine.fp8_format is not None,
        "--num-experts in 16 bits: where an expert's score is nearly that of another, rounding chooses between them, "
        "so no bound holds; leave --bf16 or --fp16 out": experts and arguments.precision.name != "fp32",
        "--moe-router-load-balancing-type sinkhorn distributes the tokens of a rank, so routing depends on the layout; "
        "give another": experts and "sinkhorn" in moe.moe_router_load_balancing_type,
        "--moe-expert-capacity-factor drops tokens by rank and micro-batch, so a step depends on the layout; leave it "
        "out": experts and (moe.moe_expert_capacity_factor or -1.0) >= 0,
        "--moe-router-enable-expert-bias: the reference has no such biases; leave it out": (
            experts and network.moe_router_enable_expert_bias
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(reason)


def comparable(arguments: Arguments) -> tuple[Arguments, list[str]]:
    """Leave out of a run what is random, what is no part of the objective, and everything that it would write.

    Returns:
        the arguments, and a line for each thing that is left out of what was asked for.
    """
    notes = []
    regularization, lora, moe = arguments.regularization, arguments.lora, arguments.moe
    if regularization.attention_dropout or regularization.hidden_dropout or lora.lora_dropout:
        notes.append("dropout is random; it is 0 here")
    adapters = arguments.adapters
    if adapters is not None:
        adapters = dataclasses.replace(adapters, dropout=0.0)
    if arguments.network.num_experts is not None:
        if any(moe.moe_aux_loss_coeff) or moe.moe_z_loss_coeff or moe.moe_input_jitter_eps:
            notes.append("losses that balance experts, and jitter, are no part of the objective; they are 0 here")
        zeros = tuple(0.0 for _ in moe.moe_aux_loss_coeff)
        moe = dataclasses.replace(moe, moe_aux_loss_coeff=zeros, moe_z_loss_coeff=None, moe_input_jitter_eps=None)
    checkpoint = dataclasses.replace(
        arguments.checkpoint, save=None, save_hf=None, load_optim=False, load_rng=False, async_save=False
    )
    left = dataclasses.replace(
        arguments,
        regularization=dataclasses.replace(regularization, attention_dropout=0.0, hidden_dropout=0.0),
        lora=dataclasses.replace(lora, lora_dropout=0.0),
        adapters=adapters,
        moe=moe,
        checkpoint=checkpoint,
        logging=LoggingArguments(),
    )
    return left, notes
