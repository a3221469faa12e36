"""Check that batches can be split over the data-parallel ranks."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch_sizes import step_schedule
from mft_megatron.errors import InputError
from mft_megatron.options import is_given


def check_batch_schedule(a: Arguments) -> str | None:
    """Check the schedule of batch sizes; before and after completion."""
    t = a.training
    if t.rampup_batch_size is not None and t.step_batch_size_schedule is not None:
        return "--rampup-batch-size and --step-batch-size-schedule both set the batch sizes; give one of them"
    if t.step_batch_size_schedule is not None:
        try:
            last = step_schedule(t.step_batch_size_schedule, a.data.seq_length).sizes[-1]
        except InputError as error:
            return str(error)
        if is_given(t, "global_batch_size") and t.global_batch_size != last:
            return (
                f"--global-batch-size {t.global_batch_size}: with --step-batch-size-schedule it is the last size "
                f"there, {last}; leave it out"
            )
    if t.rampup_batch_size is None:
        return None
    start, increment, samples = t.rampup_batch_size
    ramp = f"--rampup-batch-size {start} {increment} {samples}"
    if min(t.rampup_batch_size) < 1:
        return f"{ramp}: START, INCREMENT and SAMPLES must be at least 1"
    if not is_given(t, "global_batch_size"):
        return f"{ramp} grows to --global-batch-size; give that, too"
    if start >= t.global_batch_size:
        return f"{ramp} does not start below --global-batch-size {t.global_batch_size}; lower START, or leave it out"
    if (t.global_batch_size - start) % increment:
        return (
            f"{ramp} does not end at --global-batch-size {t.global_batch_size}: INCREMENT {increment} does not divide "
            f"the difference of {t.global_batch_size - start}; change one of them"
        )
    return None


def check_batches(a: Arguments) -> str | None:
    """Check that the batch sizes of the steps to come are multiples of :attr:`.Arguments.batch_multiple`."""
    consumed = a.progress[1]
    # Earlier steps of a resumed run may have had a different parallel layout.
    sizes = a.batch_sizes.remaining(consumed)
    wrong = next((size for size in sizes if size % a.batch_multiple), None)
    if wrong is None:
        return None
    factors = f"--micro-batch-size {a.training.micro_batch_size} × data-parallel size {a.data_parallel_size}"
    if a.distributed.interleaved:
        factors += f" × --pipeline-model-parallel-size {a.distributed.pipeline_model_parallel_size} (interleaved)"
    not_multiple = f"is not a multiple of {factors} = {a.batch_multiple}"
    if a.training.step_batch_size_schedule is not None:
        return f"--step-batch-size-schedule: the size {wrong} {not_multiple}; change it"
    if a.training.rampup_batch_size is not None:
        ramp = " ".join(map(str, a.training.rampup_batch_size))
        return (
            f"--rampup-batch-size {ramp}: on the way to --global-batch-size {a.training.global_batch_size} the size "
            f"{wrong} {not_multiple}; choose START, INCREMENT and --global-batch-size as multiples of it"
        )
    return f"--global-batch-size {wrong} {not_multiple}"
