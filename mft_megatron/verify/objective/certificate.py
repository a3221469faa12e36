"""The certificate of a run's first steps: computed on its layout, computed again in one process, compared, printed.

Ranks other than the main one leave as soon as they have given their gradients; none waits for the reference.
"""

import fnmatch
import os
from collections.abc import Sequence

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedSplit
from mft_megatron.errors import InputError
from mft_megatron.mcore.model import kernels
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.whole_tensors import gather_weights
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.reference_model import reference_model
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.training.evaluation import Evaluation
from mft_megatron.training.pretrain import open_dataset
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving.data_order import model_vocab_size, order_version, refuse_other_data
from mft_megatron.training.saving.resume import resume
from mft_megatron.training.saving.sources import NO_SOURCES, Sources

from .comparison import ROUNDINGS, Bounds, Line, bounds_of, compare, hint, note_of_zeros, table
from .plan import check_pass
from .steps import Chosen, Reference, first_plans, refuse_infinite, run_steps
from .terms import asked_weights

# of the reference in fp16, whose small gradients would be 0 without one
LOSS_SCALE = 1024.0


def certify(
    arguments: Arguments,
    sources: Sources = NO_SOURCES,
    num_steps: int = 1,
    patterns: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Compare the first steps of a run with their reference and print the result; a collective of all ranks.

    Args:
        arguments: of the run, without what is random (:func:`.command.comparable`).
        sources: the folders of ``--hf-checkpoint`` and ``--hf-adapter``, opened.
        num_steps: to compare.
        patterns: of the weights whose gradients are compared; ``None``: as the help of ``--verify-weights`` says.
        notes: lines to print first.

    Returns:
        the exit code, 0 certified or 1 failed; always 0 on ranks other than the main one.

    Raises:
        InputError: the data set, the weights or the checkpoint cannot be used, or no weight has one of the patterns.
    """
    main = os.environ.get("RANK", "0") == "0"
    dataset, _ = open_dataset(arguments, main)
    refuse_other_data(arguments, dataset)
    evaluation, split = Evaluation(arguments, dataset), dataset.split("train")
    vocab_size, chosen = model_vocab_size(arguments, dataset), _chosen(patterns, arguments.network.num_layers)
    if arguments.training.deterministic_mode:
        devices.make_deterministic()
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, vocab_size, len(dataset.tasks))
        log = RunLog(main)
        progress, state = resume(arguments, trainer, log, sources)
        evaluation.load(state, log, progress)
        # weights of the first step: a balancer's from its draws or the checkpoint, and 0 for tasks that were stopped
        evaluation.begin(trainer, log, progress)
        with trainer.weights.whole():
            weights = gather_weights(trainer.chunks)
        plans = list(first_plans(arguments, split, num_steps))
        steps = run_steps(trainer, split, plans, evaluation.balance.weight_K, chosen)
        facts = [
            f"run: {_layout(arguments)}, {arguments.precision.name}, on {devices.describe()}",
            f"     {kernels.describe(arguments, trainer.chunks[0].config)}",
        ]
    if not main:
        return 0
    del trainer
    given = evaluation.balance.weight_K
    if arguments.multi_task.task_balance == "static":
        # read again, by other code; tasks of a resumed run may have been stopped
        asked = asked_weights(arguments.multi_task, dataset.tasks, [task.weight for task in dataset.ledger.tasks])
        given = np.where(given > 0, asked, 0.0) if state else asked
    for line in _header(arguments, split, facts, notes):
        print(line, flush=True)
    failures = _of_plan(arguments, split)
    failures += [
        f"weight {name}: ranks have different copies of it" for name, one in weights.items() if one.disagreement
    ]
    bounds = bounds_of(arguments.precision.name, arguments.multi_task.mft_loss)
    reference = Reference(arguments, split, given, chosen)
    compared: list[Line] = []
    whole = {name: one.value for name, one in weights.items()}
    precision = arguments.precision.name
    with reference_model(arguments, vocab_size, whole, precision) as model:
        scale = LOSS_SCALE if precision == "fp16" else 1.0
        in_precision = [reference.step(model, plan, scale) for plan in plans]
    with reference_model(arguments, vocab_size, whole) as model:
        computed = zip(plans, steps, in_precision, strict=True)
        for number, (plan, step, rounded) in enumerate(computed, progress.step + 1):
            print(f"\nstep {number}: {plan.num_packs} packs, {len(reference.texts(plan)[0])} samples or parts of one\n")
            wanted = reference.step(model, plan)
            if step is None or wanted is None or rounded is None:
                failures += _skipped(number, step is None, wanted is None)
                continue
            if precision == "fp16":
                refuse_infinite(step)
            if not step.gradients:
                raise InputError("--verify-weights: no trained weight has such a name; try '*'")
            lines = compare(step, wanted, rounded.gradients, reference.targets(plan), dataset.tasks, bounds)
            print("\n".join(table(lines)), flush=True)
            failures += [f"step {number}: {line.failure}" for line in lines if not line.holds]
            compared += lines
    if note := note_of_zeros(compared):
        print(note)
    return _verdict(failures, hint(compared), bounds, precision, len(plans))


def _chosen(patterns: Sequence[str] | None, num_layers: int) -> Chosen:
    if patterns is None:
        ends = (f"decoder.layers.{layer}.*" for layer in (0, num_layers - 1))
        patterns = [*ends, "embedding.*", "output_layer.*", "decoder.final_layernorm.*"]
    known = tuple(patterns)
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in known)


def _layout(arguments: Arguments) -> str:
    layout = arguments.distributed
    also = {
        "sequence parallel": layout.sequence_parallel,
        "distributed optimizer": layout.use_distributed_optimizer,
        "overlapped": layout.overlap_grad_reduce,
    }
    words = [arguments.layout_in_words or "one process", *(name for name, on in also.items() if on)]
    return f"{arguments.world_size} rank(s), {', '.join(words)}, micro-batches of {arguments.training.micro_batch_size}"


def _header(arguments: Arguments, split: PackedSplit, facts: Sequence[str], notes: Sequence[str]) -> list[str]:
    options, dataset = arguments.multi_task, split.dataset
    start = "random weights" if arguments.resume is None else str(arguments.resume.path)
    return [
        f"objective: --mft-loss {options.mft_loss} --mft-normalization {options.mft_normalization}; model: {start}",
        f"data: {dataset.prefix}, {split.seq_length} tokens, {dataset.dataset_hash[:12]}",
        *facts,
        "reference: one process, fp64, every sample alone in a row, Eq. 1 term by term",
        *(f"note: {note}" for note in notes),
        *(
            ["note: targets hold over an epoch; a step gives a task what it has of it (docs/LOSSES.md §2.2)"]
            if options.mft_normalization == "epoch"
            else []
        ),
    ]


def _of_plan(arguments: Arguments, split: PackedSplit) -> list[str]:
    version = order_version(arguments, split.dataset)
    report = check_pass(split, arguments.initialization.seed, arguments.training.global_batch_size, version)
    state = "each as often as planned" if not report.problems else "NOT as planned"
    print(
        f"plan: {report.packs:,} packs of {report.slices:,} slices of {report.samples:,} samples, {state}", flush=True
    )
    return [f"plan: {problem}" for problem in report.problems]


def _skipped(number: int, by_run: bool, by_reference: bool) -> list[str]:
    if by_run and by_reference:
        print(f"step {number}: skipped, no supervised token of a weighted task")
        return []
    return [
        f"step {number}: {'the run' if by_run else 'the reference'} finds nothing to train on in it, and the other does"
    ]


def _verdict(failures: Sequence[str], look_at: str | None, bounds: Bounds, precision: str, steps: int) -> int:
    print(
        f"bounds ({precision}): shares {bounds.share:.0e}, losses {bounds.loss:.0e}, gradients {bounds.gradient:.0e} "
        f"or {ROUNDINGS} × rounding"
    )
    for failure in failures:
        print(failure)
    if failures:
        where = "" if look_at is None else f"; {look_at}"
        print(f"FAILED: {len(failures)} figure(s) are not what they should be{where}", flush=True)
        return 1
    print(f"certified: {steps} step(s), every figure within its bound", flush=True)
    return 0
