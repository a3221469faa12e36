"""Reports of single ranks: bytes that follow from the model, messages of each layout, waits that are planted."""

import functools
import json

import pytest
import torch
from packaging.version import Version

from mft_megatron.dry_run.rank_report import ACTIVATIONS, CATEGORIES, COMMUNICATION, GRADIENTS, OPTIMIZER, WEIGHTS
from tests.dry_run.simulated import MODEL, report_of_rank

SMALL = f"{MODEL} --global-batch-size 2"


def rounded(size):
    return -(-size // 512) * 512


def test_bytes_of_what_stays_follow_from_the_parameters(simulation):
    report = simulation.report("--use-distributed-optimizer", world_size=2)
    parameters = report.parameters
    # buffers are padded, so that each rank's shard is aligned
    assert 2 * parameters <= report.resident[WEIGHTS] <= 2 * parameters + 2**13
    assert 4 * parameters <= report.resident[GRADIENTS] <= 4 * parameters + 2**13
    # main weights and two states of half of the parameters, each weight rounded
    assert 6 * parameters <= report.resident[OPTIMIZER] <= 6 * parameters + 3 * 512 * 64
    for step in report.steps:
        assert sum(step.memory.by_category.values()) == step.memory.peak
        assert set(step.memory.by_category) == set(CATEGORIES)
        assert step.memory.by_category[GRADIENTS] == report.resident[GRADIENTS]
        assert step.micro_batches == 4
        assert sum(one.bytes for one in step.memory.largest) <= step.memory.peak
    assert (report.save, report.save_host) == (None, None)  # nothing is saved without --save


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "world_size", "rank", "layers", "expected"),
    [
        ("", 1, 0, (1, 2, 3, 4), set()),
        ("--tensor-model-parallel-size 2", 2, 1, (1, 2, 3, 4), {("all-reduce", "tensor")}),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel",
            2,
            0,
            (1, 2, 3, 4),
            {("all-gather", "tensor"), ("reduce-scatter", "tensor")},
        ),
        ("--pipeline-model-parallel-size 2", 2, 0, (1, 2), {("send", "pipeline"), ("receive", "pipeline")}),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            2,
            1,
            (2, 4),
            # of two stages Megatron-Core sends one way in the group of all ranks, so that both ways overlap
            {("send", "world"), ("receive", "pipeline")},
        ),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2, 1, (2, 3, 4), set()),
        ("--context-parallel-size 2", 2, 1, (1, 2, 3, 4), {("all-gather", "context"), ("reduce-scatter", "context")}),
        ("", 2, 1, (1, 2, 3, 4), {("all-reduce", "data with cp")}),
        (
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            2,
            1,
            (1, 2, 3, 4),
            {("all-gather", "data with cp"), ("reduce-scatter", "data with cp")},
        ),
    ],
)
def test_layouts(simulation, words, world_size, rank, layers, expected):
    report = simulation.report(words, world_size, rank)
    assert report.layers == layers
    # a pipeline stage keeps its last input; gathered inputs are in a buffer that stays
    assert report.resident[ACTIVATIONS] < 2**16
    assert report.resident[COMMUNICATION] > 2**12 or "sequence-parallel" not in words
    assert expected <= {(one.kind, one.group) for one in report.steps[-1].messages if one.ranks == world_size}


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
            "--num-layers-per-virtual-pipeline-stage 1",
            8,
        ),
        ("--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall", 2),
    ],
)
def test_counts_of_a_step_follow_from_some_of_its_micro_batches(simulation, words, world_size):
    """Messages and sums of data parallelism are once a step, also where they overlap with a micro-batch."""
    of_rank = 16 * world_size // (4 if "tensor" in words else 1)
    whole = simulation.report(f"{words} --global-batch-size {of_rank}", world_size).steps[-1]
    some = simulation.report(
        f"{words} --global-batch-size {of_rank // 4}",
        world_size,
        function=functools.partial(report_of_rank, micro_batches=16),
    ).steps[-1]
    assert (whole.micro_batches, whole.computed, some.micro_batches, some.computed) == (16, 16, 16, 4)
    assert sorted(map(str, some.messages)) == sorted(map(str, whole.messages))
    assert some.waits == whole.waits
    # a few kernels are in a schedule and once a step; samples differ in length, and attention's work with them
    assert some.kernels == pytest.approx(whole.kernels, rel=0.01)
    assert some.operations == pytest.approx(whole.operations, rel=0.05)
    (some_copies,), (copies,) = some.copies, whole.copies
    assert (some_copies.count, some_copies.in_micro_batches) == (copies.count, copies.in_micro_batches)
    assert some_copies.bytes == pytest.approx(copies.bytes, rel=0.1)


def test_padded_rows_need_most_where_all_are_long(simulation):
    words = "--pipeline-model-parallel-size 2 --global-batch-size 2"
    padded = simulation.report(words, 2, padding_mode="padding")
    assert max(step.memory.by_category[ACTIVATIONS] for step in padded.steps) < padded.longest.by_category[ACTIVATIONS]
    assert padded.peak >= padded.longest.peak
    assert simulation.report(words, 2).longest is None


def planted():
    """Let each layer read a value of its output, and the step wait for the device at its end."""
    import torch

    from mft_megatron.mcore.attention.packed_attention import PackedAttention
    from mft_megatron.mcore.trainer import Trainer

    forward, step = PackedAttention.forward, Trainer.train_step

    def reads(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.sum().item()
        return output

    def waits(self, *arguments):
        report = step(self, *arguments)
        torch.cuda.synchronize()
        torch.cuda.Event().synchronize()
        return report

    PackedAttention.forward, Trainer.train_step = reads, waits


def report_of_planted(words, world_size, rank):
    from tests.dry_run.simulated import report_of_rank

    planted()
    return report_of_rank(words, world_size, rank)


def test_planted_waits_are_counted_with_their_line(simulation):
    report = simulation.report(function=report_of_planted)
    waits = {(wait.kind, wait.in_micro_batches, wait.outside) for wait in report.steps[-1].waits}
    # of four layers and eight micro-batches
    assert ("value", 32, 0) in waits
    assert {("device", 0, 1), ("event", 0, 1)} <= waits
    line = next(wait.line for wait in report.steps[-1].waits if wait.kind == "value")
    assert line.startswith("megatron/core/transformer/attention.py:")


def products(words, world_size, rank):
    """Names of matrix products that write fp32, and how many of each there are in a run."""
    from collections import Counter

    from mft_megatron.dry_run.step_counters import StepCounters
    from tests.dry_run.simulated import report_of_rank

    counted, ran = Counter(), StepCounters.ran

    def count(self, operator, arguments, outputs, values):
        counted[str(operator)] += 1
        ran(self, operator, arguments, outputs, values)

    StepCounters.ran = count
    report_of_rank(words, world_size, rank)
    return {name: number for name, number in counted.items() if "mm.dtype" in name}


@pytest.mark.skipif(Version(torch.__version__).release < (2, 10), reason="torch refuses an fp32 summand")
def test_gradients_of_weights_are_added_in_place(simulation):
    """Those of 4 matrices of 4 layers and of the output layer, in each of 2 steps of 8 micro-batches; no tensor.

    What torch can do is tried once. An evaluation of 4 micro-batches has logits and no gradients.
    """
    found = simulation.report(function=products)
    assert found == {"aten.addmm.dtype_out": 2 * 8 * (4 * 4 + 1) + 1, "aten.mm.dtype_out": 2 * 8 + 4 + 1}


def test_fp16_updates_weights(simulation):
    """The simulated loss scale finds no overflow, or the optimizer would not step and have no states."""
    fp16, bf16 = (simulation.report(model=model) for model in (SMALL.replace("--bf16", "--fp16"), SMALL))
    assert abs(fp16.resident[OPTIMIZER] - bf16.resident[OPTIMIZER]) < 2**12


def test_recomputing_keeps_less(simulation):
    sequence = "--tensor-model-parallel-size 2 --sequence-parallel"
    words = f"{sequence} --recompute-granularity"
    kept = [
        simulation.report(one, 2, model=MODEL.replace("-size 1 ", "-size 8 ")).steps[-1].memory
        for one in (
            sequence,
            f"{words} selective --recompute-modules core_attn layernorm mlp",
            f"{words} full --recompute-method uniform --recompute-num-layers 1",
        )
    ]
    assert kept[0].by_category[ACTIVATIONS] > kept[1].by_category[ACTIVATIONS] > kept[2].by_category[ACTIVATIONS]
    assert kept[0].peak > kept[1].peak > kept[2].peak


@pytest.mark.parametrize("dispatcher", [pytest.param("allgather", marks=pytest.mark.slow), "alltoall"])
def test_experts_take_the_load_that_is_given(simulation, dispatcher):
    words = (
        f"--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type {dispatcher}"
    )
    even, skewed = (simulation.report(words, 2, 0, SMALL, function) for function in (None, report_of_skewed))
    # two experts of four have 3/2 and 5/6 of the mean instead of 1 and 1
    assert even.steps[-1].operations < skewed.steps[-1].operations
    assert even.steps[-1].memory.peak < skewed.steps[-1].memory.peak
    assert {wait.kind for wait in even.steps[-1].waits} & {"size", "event", "copy"}


def report_of_skewed(words, world_size, rank):
    from tests.dry_run.simulated import report_of_rank

    return report_of_rank(words, world_size, rank, busiest_expert=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--attention-dropout 0.1 --hidden-dropout 0.1",
        "--group-query-attention --num-query-groups 2 --window-size 32,0",
        "--peft-type lora --lora-rank 4",
        "--cross-entropy-impl megatron --mft-loss focal-sample",
        "--optimizer sgd --mft-loss task-token --mft-normalization micro-batch",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1 --mft-loss focal-task",
    ],
)
def test_features_run(simulation, words):
    report = simulation.report(words)
    assert report.steps[-1].operations > 0
    assert not [wait for wait in report.steps[-1].waits if wait.kind == "device"]


@pytest.mark.parametrize(
    "words",
    ["--use-distributed-optimizer", *(pytest.param(one, marks=pytest.mark.slow) for one in ("", "--no-save-optim"))],
)
def test_saves_and_evaluations(simulation, words, tmp_path):
    report = simulation.report(f"{words} --save {tmp_path}", 2, split=(80, 20, 0))
    held = sum(report.resident.values())
    assert held < report.evaluation.peak < report.steps[-1].memory.peak
    assert held <= report.save.peak < held + 2**20
    assert report.evaluation.by_category[ACTIVATIONS] == report.resident[ACTIVATIONS]
    weights, states = report.resident[WEIGHTS], report.resident[OPTIMIZER]
    # Each of two ranks writes half; without the distributed optimizer, states of all weights are on each.
    expected = weights / 2 + (states if "use-dist" in words else states / 2 if not words else 0)
    assert expected * 0.95 < report.save_host < expected * 1.2 + 2**17


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 1000,
}


def report_of_start(words, world_size, rank):
    """Report on a start from a description of a model, with mock data."""
    from mft_megatron.arguments.command import read_command_line
    from mft_megatron.arguments.groups.dry_run import DRY_RUN
    from mft_megatron.dry_run.rank_run import run_rank
    from mft_megatron.dry_run.start import started

    words = ["--dry-run", "--world-size", str(world_size), *words[words.index("--hf-checkpoint") :]]
    with started(read_command_line(words, more=DRY_RUN)) as ready:
        return run_rank(ready.arguments, ready.dataset, rank)


def test_weights_in_4_bits(simulation, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = f"--hf-checkpoint {tmp_path} --seq-length 128 --bf16 --global-batch-size 4 --lora-rank 8 --peft-type"
    lora, qlora = (simulation.report(f"{words} {kind}", function=report_of_start) for kind in ("lora", "qlora"))
    matrices = 4 * (3 * 64 * 64 + 64 * 64 + 3 * 64 * 128)
    saved = lora.resident[WEIGHTS] - qlora.resident[WEIGHTS]
    # Two bytes become half of one; beside it 16 matrices have four tensors of magnitudes, indices, groups and offsets,
    # each of at most 1 KiB here.
    assert 1.5 * matrices - 16 * 4 * 1024 < saved < 1.5 * matrices - 16 * 4 * 256
    assert lora.parameters == qlora.parameters
    # a dequantised weight is not kept for the backward pass
    kept = [one.by_category[ACTIVATIONS] for one in (lora.steps[-1].memory, qlora.steps[-1].memory)]
    assert kept[1] < kept[0] + 2 * 64 * 256
    assert sum(lora.resident.values()) - saved == pytest.approx(sum(qlora.resident.values()), abs=2**14)
