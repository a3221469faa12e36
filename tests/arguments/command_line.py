"""What tests of the command line share: enough options for a run, how one is refused, a checkpoint to go on from."""

import contextlib
import dataclasses

import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.errors import InputError
from mft_megatron.run_folder import TRACKER, CheckpointInfo, write_info

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --data-path data --seq-length 128 --micro-batch-size 2 "
    "--train-iters 10 --lr 1e-3"
)
WITHOUT_SHAPE = "--data-path data --seq-length 128 --micro-batch-size 2 --train-iters 10 --lr 1e-3"


def parse(extra="", world_size=1, base=BASE, lengths=lambda prefix: [128]):
    return parse_arguments(f"{base} {extra}".split(), world_size, lengths)


@contextlib.contextmanager
def refused(words):
    """What is done within is refused, in one line that has these words."""
    with pytest.raises(InputError) as refusal:
        yield
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def checkpoint(folder, **changes):
    network = dataclasses.asdict(parse("--swiglu --position-embedding-type rope").network)
    info = CheckpointInfo(
        iteration=5,
        consumed_samples=10,
        architecture=network,
        vocab_size=100,
        tokenizer={},
        dataset_hash="abc",
        seed=7,
        global_batch_size=2,
    )
    path = folder / "iter_0000005"
    path.mkdir(parents=True)
    write_info(path, dataclasses.replace(info, **changes))
    (folder / TRACKER).write_text("5\n")
    return folder
