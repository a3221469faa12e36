"""A rehearsal of a save: it measures, leaves nothing, and refuses a run folder that a rank cannot write."""

import errno
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.exit_codes import STORAGE
from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks


def _fail(files):
    raise OSError(errno.EROFS, "", str(files[0][0]))


def _rehearse(prefix, folder, options, world):
    """Rehearse, and save after a step; then rehearse where one rank cannot write: sizes, and the error's facts."""
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.checkpointing.writers import rehearsal
    from mft_megatron.mcore.parallel import process_groups

    words = f"{options} --save {folder}"
    arguments = arguments_for(prefix, words, world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, words, world)
        size = rehearsal.bytes_of_save(trainer)
        measured = rehearsal.rehearse(Path(folder), size, arguments.checkpoint.async_save)
        left = sorted(path.name for path in Path(folder).iterdir())
        trainer.train_step(split, plans_of(split, 1)[0], np.ones(4))
        writer = checkpoint.Writer(arguments.checkpoint)
        writer.save(Path(folder), trainer, info_of_step(1))
        writer.finish()
        if not process_groups.is_main():
            rehearsal.write_files = _fail
        with pytest.raises(InputError) as error:
            rehearsal.rehearse(Path(folder), size, False)
        return size, writer._plans.bytes, measured.bytes, measured.seconds, left, str(error.value), error.value.code


@pytest.mark.parametrize("options", ["", "--bf16 --use-distributed-optimizer --async-save"])
def test_a_rehearsal_measures_and_leaves_nothing(dataset_prefix, tmp_path, options):
    for facts in run_on_ranks(2, _rehearse, dataset_prefix, str(tmp_path), options, 2):
        size, saved, written, seconds, left, said, code = facts
        assert size == pytest.approx(saved, rel=0.02)
        assert size - 2 <= written <= size
        assert 0 < seconds < 30
        assert left == []
        assert (
            f"{tmp_path}: cannot be written in a rehearsal of a save (the file system is read-only); nothing was"
            in said
        )
        assert code == STORAGE
    assert not list(tmp_path.glob(".saving*"))


def test_a_larger_save_takes_longer():
    from mft_megatron.mcore.checkpointing.writers.rehearsal import Rehearsal

    rehearsal = Rehearsal(bytes=10, seconds=0.5)
    assert [rehearsal.estimate(size) for size in (5, 10, 40)] == [0.5, 0.5, 2.0]
