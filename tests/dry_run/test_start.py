"""A start without computing: what is filled in, which ranks are reported on, and every start problem in one line."""

import json

import numpy as np
import pytest

from mft_megatron.arguments.command import read_command_line
from mft_megatron.arguments.groups.dry_run import DRY_RUN, refuse_without_dry_run
from mft_megatron.data.loading.step_plan import plan_longest, row_costs
from mft_megatron.dry_run.start import started
from mft_megatron.errors import InputError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
RANDOM = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 1000 --seq-length 64"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def start(words):
    command_line = read_command_line(["--dry-run", *words.split()], more=DRY_RUN)
    with started(command_line) as ready:
        return ready


def test_config_json_and_a_length_are_enough(config):
    ready = start(f"--hf-checkpoint {config} --seq-length 128 --pipeline-model-parallel-size 4 --bf16")
    a = ready.arguments
    assert (a.network.num_layers, a.network.hidden_size, a.resume.info.vocab_size) == (8, 64, 32000)
    assert (a.world_size, a.training.micro_batch_size, ready.ranks) == (4, 1, (0, 1, 3))
    assert ready.dataset.vocab_size == 32000
    assert a.resume.info.precision == "fp16"
    assert list(ready.notes) == ["--micro-batch-size is not given; it is 1 here"]
    # the folder of mock data and of the run that would be saved is gone
    assert not list(config.parent.glob("*.safetensors"))
    assert a.checkpoint.save is not None


@pytest.mark.parametrize(
    ("words", "world_size", "ranks"),
    [
        ("", 1, (0,)),
        ("--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2", 4, (0, 2)),
        ("--pipeline-model-parallel-size 4 --context-parallel-size 2 --world-size 16", 16, (0, 4, 12)),
        ("--num-experts 4 --expert-model-parallel-size 4 --disable-bias-linear", 4, (0,)),
        ("--pipeline-model-parallel-size 4 --rank 3 1 3", 4, (3, 1)),
    ],
)
def test_ranks_of_a_layout(words, world_size, ranks):
    ready = start(f"{RANDOM} {words}")
    assert (ready.arguments.world_size, ready.ranks) == (world_size, ranks)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("--pipeline-model-parallel-size 2 --global-batch-size 64 --world-size 4", 8),
        ("--pipeline-model-parallel-size 2 --global-batch-size 8 --world-size 4", 8),
        ("--pipeline-model-parallel-size 2 --global-batch-size 64 --all-micro-batches", 64),
        ("--rampup-batch-size 2 2 100 --global-batch-size 64", 2),
        # the first step has one micro-batch, and later ones as many as there are stages
        ("--rampup-batch-size 1 1 100 --global-batch-size 8 --pipeline-model-parallel-size 4", 8),
        ("--rampup-batch-size 1 1 100 --global-batch-size 8 --all-micro-batches", 8),
        ("--global-batch-size 64 --micro-batch-size 4", 8),
        ("--global-batch-size 64 --mock-padding-mode padding", 64),
    ],
)
def test_no_more_micro_batches_are_computed_than_the_peak_needs(words, rows):
    ready = start(f"{RANDOM} {words}")
    assert ready.measured.batch_sizes.after(0) == rows
    largest = 64 if "64" in words else 8
    assert max(ready.arguments.batch_sizes.sizes) == largest
    of_rank = ready.arguments.training.micro_batch_size * ready.arguments.data_parallel_size
    assert (ready.micro_batches, ready.computed_micro_batches) == (largest // of_rank, rows // of_rank)


def test_the_longest_rows_are_found():
    split = start(f"{RANDOM} --mock-padding-mode padding --mock-data uniform:2:60").dataset.split("train")
    costs = np.sort(row_costs(split, np.arange(split.num_packs)))
    for rows in (4, split.num_packs + 2):
        found = row_costs(split, plan_longest(split, rows).packs_G)
        assert sorted(found[:4]) == costs[-4:].tolist()
        assert len(found) == rows


def test_the_length_of_rows_may_follow_from_mock_data():
    assert start(f"{RANDOM.replace('--seq-length 64', '')} --mock-data 96").dataset.seq_length == 96


def test_a_data_set_of_the_user_is_checked(dataset_prefix):
    ready = start(f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --data-path {dataset_prefix}")
    assert ready.mock is None
    assert ready.dataset.seq_length == 128


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--tensor-model-parallel-size 8", "--num-attention-heads 4"),
        ("--pipeline-model-parallel-size 3", "--num-layers 4"),
        ("--world-size 6 --pipeline-model-parallel-size 4", "6 ranks"),
        ("--global-batch-size 7 --micro-batch-size 2", "--global-batch-size 7"),
        ("--rank 4", "--rank 4: ranks are from 0 to 0; --world-size"),
        ("--rank -1", "--rank -1: ranks are from 0"),
        ("--data-path x --mock-data 64", "--data-path x: leave --mock-data out, or --data-path"),
        ("--data-path x", "--data-path x: leave --vocab-size out, or --data-path"),
        ("--num-train-epochs 2", "--num-train-epochs: mock data have no epochs"),
        ("--task-weights chat=2", "chat"),
        ("--hf-checkpoint nowhere", "nowhere: is no folder"),
        ("--hf-checkpoint nowhere/config.json", "--hf-checkpoint nowhere/config.json: no such file"),
        ("--world-size 3 --tensor-model-parallel-size 2", "(of a dry run: --world-size)"),
        ("--num-experts 4 --moe-router-topk 2 --disable-bias-linear --busiest-expert 3", "has 2 times its equal share"),
        ("--fp8-format hybrid --bf16 --transformer-impl transformer_engine", "cannot simulate --fp8-format hybrid"),
        ("--transformer-impl transformer_engine", "cannot simulate --transformer-impl transformer_engine"),
        ("--bf16 --use-distributed-optimizer --use-precision-aware-optimizer", "--use-precision-aware-optimizer"),
    ],
)
def test_problems_are_found_without_a_gpu(words, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        start(f"{RANDOM} {words}")
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "missing option: give --data-path PREFIX, or --seq-length N"),
        ("--mock-data uniform:9:99", "give --seq-length; --mock-data uniform:9:99 has many lengths"),
        ("--mock-data 64", "missing option: give --vocab-size N"),
        ("--data-path no_such", "--data-path no_such: no ledger no_such_dataset.json there"),
    ],
)
def test_lengths_and_vocabulary_must_be_known(words, line):
    with pytest.raises(InputError) as refusal:
        start(f"--num-layers 4 --hidden-size 64 --num-attention-heads 4 {words}")
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--busiest-expert 2", "--busiest-expert 2: the model has no experts; leave it out"),
        ("--skip-train", "--dry-run cannot simulate --skip-train"),
        ("--vocab-size 9", "--vocab-size 9: the model of --hf-checkpoint has 32000; leave it out"),
        ("--num-layers 4", "--num-layers gives num_layers = 4"),
    ],
)
def test_a_model_that_is_described_decides(words, line, config):
    with pytest.raises(InputError) as refusal:
        start(f"--hf-checkpoint {config.parent} --seq-length 64 {words}")
    assert line in str(refusal.value)


def test_other_files_than_config_json_are_named(config):
    with pytest.raises(InputError, match=r"--hf-checkpoint .*llama\.json: name the file config\.json"):
        start(f"--hf-checkpoint {config.rename(config.with_name('llama.json'))} --seq-length 64")


def test_options_of_a_dry_run_need_it():
    command_line = read_command_line("--lr 1 --gpu h100-80g".split(), more=DRY_RUN)
    with pytest.raises(InputError, match="--gpu has no effect without --dry-run"):
        refuse_without_dry_run(command_line.asked_for)
