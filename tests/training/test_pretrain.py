"""Opening the data set: who reads how much of it."""

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.training import pretrain
from tests.ranks import run_on_ranks

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --micro-batch-size 1 --train-iters 1 --lr 1"


@pytest.fixture
def damaged(dataset_prefix, tmp_path):
    """Arguments for a copy of the data set with one byte changed."""
    shutil.copytree(Path(dataset_prefix).parent, tmp_path / "copy")
    prefix = tmp_path / "copy" / "mixed"
    file = Path(f"{prefix}_loss_mask.bin")
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    return parse_arguments(f"{MODEL} --data-path {prefix} --seq-length 128".split())


def test_the_main_rank_reads_every_byte(damaged):
    with pytest.raises(InputError, match="content differs"):
        pretrain.open_dataset(damaged, main_rank=True)
    assert pretrain.open_dataset(damaged, main_rank=False)[1]


@pytest.mark.parametrize(
    ("words", "folder", "named"),
    [
        ("--save runs", "runs", "--save"),
        ("--tensorboard-dir board", "board", "--tensorboard-dir"),
        ("", ".", "--tensorboard-dir"),
    ],
)
def test_a_run_folder_that_cannot_be_written_ends_the_run_before_training(dataset_prefix, words, folder, named):
    arguments = parse_arguments(f"{MODEL} --data-path {dataset_prefix} --seq-length 128 {words}".split())
    with pytest.raises(InputError) as caught, pretrain._run_folder_reported(arguments):
        raise OSError(errno.EROFS, "Read-only file system", f"{folder}/x")
    said = f"{folder}/x: the file system is read-only; nothing was trained. Choose another "
    assert str(caught.value).startswith(said + named)


def refusal_of_the_main_rank(words):
    """Return the refusal that this rank of two gets where the main one alone cannot write the run folder."""
    arguments = parse_arguments(words.split(), 2)
    with process_groups.process_groups(arguments.distributed, seed=1):
        try:
            with pretrain._reported_on_all_ranks(), pretrain._run_folder_reported(arguments):
                if process_groups.is_main():
                    raise OSError(errno.EROFS, "Read-only file system", "runs/metrics.jsonl")
        except InputError as error:
            return str(error)


def test_no_rank_waits_for_a_main_one_that_cannot_write_the_run_folder(dataset_prefix):
    words = f"{MODEL} --data-path {dataset_prefix} --seq-length 128 --save runs"
    said = "runs/metrics.jsonl: the file system is read-only; nothing was trained. Choose another --save"
    assert run_on_ranks(2, refusal_of_the_main_rank, words) == [said, said]


def test_a_tokenizer_that_cannot_be_read_is_not_the_fault_of_the_run_folder(dataset_prefix, tmp_path, monkeypatch):
    arguments = parse_arguments(f"{MODEL} --data-path {dataset_prefix} --seq-length 128 --save {tmp_path}".split())
    dataset, _ = pretrain.open_dataset(arguments, main_rank=False)

    def copy(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(InputError) as caught, pretrain._run_folder_reported(arguments):
        pretrain._describe_run(tmp_path, arguments, dataset, None, None)
    assert str(caught.value).endswith("tokenizer.json: permission denied; nothing was trained")


def test_the_length_of_a_run_that_does_not_train_is_not_said(dataset_prefix):
    arguments = parse_arguments(f"{MODEL} --data-path {dataset_prefix} --seq-length 128".split())
    assert pretrain._length(arguments, 2) == "--train-iters 1: 1 packs, 0.50 epochs"
    validation = dataclasses.replace(arguments.validation, skip_train=True)
    assert pretrain._length(dataclasses.replace(arguments, validation=validation), 2) is None


def test_of_a_large_data_set_it_reads_sizes_only_and_knows_it(damaged, monkeypatch):
    monkeypatch.setattr(pretrain, "HASHED_BYTES", 1000)
    assert pretrain.open_dataset(damaged, main_rank=True)[1] is False
