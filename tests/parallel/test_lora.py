"""Adapters: gradients follow by the chain rule from the whole model's, and are the same on every parallel layout."""

import functools

import numpy as np
import pytest

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from tests.parallel.adapters import KnownAdapters, train_adapters, trainer_of, whole_adapters
from tests.parallel.layouts import ParallelLayout
from tests.parallel.run import FOR_GRADIENTS, TASK_WEIGHTS, arguments_for, data_seed, open_dataset, plans_of
from tests.ranks import run_on_ranks

SHARED = "--lora-rank 4 --lora-alpha 8"
# no adapter on keys and gates; each of the others has a separate A
APART = f"{SHARED} --use-rslora --lora-target-modules q_proj v_proj o_proj up_proj down_proj"
# a seed with which no router's choice is so close that rounding decides it
ATTENTION = f"{SHARED} --lora-target-modules q_proj linear_proj --seed 5"
CASES = [
    (ParallelLayout("TP2 SP MB2", quick=True), SHARED),
    (ParallelLayout("TP2 PP2", quick=True), APART),
    (ParallelLayout("CP2 TP2 SP"), APART),
    (ParallelLayout("TP2 MB2"), APART),
    (ParallelLayout("PP2 VPP2 MB2", quick=True), SHARED),
    (ParallelLayout("DP2 overlap", quick=True), SHARED),
    (ParallelLayout("DP2 DO"), APART),
    (ParallelLayout("TP2 PP2 DP2 SP"), SHARED),
    (ParallelLayout("TP2 PP2 VPP2"), APART),
    (ParallelLayout("TP2 SP full"), SHARED),
    (ParallelLayout("TP2 SP selective"), APART),
    (ParallelLayout("TP2 norms SP"), APART),
    (ParallelLayout("PP2 full", "tied", quick=True), SHARED),
    (ParallelLayout("TP2 PP2", "tied"), SHARED),
    (ParallelLayout("PP2 first3"), APART),
    (ParallelLayout("TP2 PP2", "Megatron's defaults"), SHARED),
    (ParallelLayout("TP2 PP2", "q/k norm"), SHARED),
    (ParallelLayout("DP2 EP2", "experts"), ATTENTION),
    (ParallelLayout("TP2 SP EP2 DP2", "experts", quick=True), ATTENTION),
]


@pytest.fixture(scope="module")
def one_process(dataset_prefix):
    return functools.cache(lambda shape, options: run_on_ranks(1, train_adapters, dataset_prefix, options, 1, shape)[0])


@pytest.mark.parametrize(
    ("layout", "options"),
    [pytest.param(*case, id=str(case[0]), marks=() if case[0].quick else pytest.mark.slow) for case in CASES],
)
def test_layouts_agree(one_process, dataset_prefix, layout, options):
    curve, gradients, adapters = one_process(layout.shape, options)
    words = f"{options} {layout.options}"
    ranks = run_on_ranks(layout.world_size, train_adapters, dataset_prefix, words, layout.world_size, layout.shape)
    for other, _, _ in ranks:
        assert other == [pytest.approx(step, rel=1e-6) for step in curve]
    expected, found = whole_adapters([adapters]), whole_adapters([rank[2] for rank in ranks])
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix, expected[name], rtol=0, atol=1e-6, err_msg=str(name))
    if "overlap" in layout.name or "DO" in layout.name:
        return
    expected, found = whole_adapters([gradients]), whole_adapters([rank[1] for rank in ranks])
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(matrix, expected[name], rtol=0, atol=3e-6 * largest, err_msg=str(name))


def _of_the_whole_model(prefix, options, shape):
    """Compute the loss and the gradients, by name and layer, of the whole model's matrices with the adapters merged."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    adapted = arguments_for(prefix, f"{FOR_GRADIENTS} --peft-type lora {options}", 1, shape).adapters
    arguments = arguments_for(prefix, FOR_GRADIENTS, 1, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        model = trainer.chunks[0].module
        for module, weight, weight_key in _matrices(model):
            weight.data += _update(adapted, module, weight.shape, weight_key, arguments.network)
        trainer.optimizer.reload_model_params()
        report = trainer.train_step(split, plans_of(split, data_seed(split), 1)[0], TASK_WEIGHTS)
        return report.loss, {weight_key: weight.main_grad.numpy().copy() for _, weight, weight_key in _matrices(model)}


def _matrices(model):
    """Yield matrices that may have an adapter: module name, weight, and the weight's name and layer in a checkpoint."""
    for number, layer in enumerate(model.decoder.layers):
        for part, of in (("self_attention", layer.self_attention), ("mlp", layer.mlp)):
            for module in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
                if hasattr(of, module):
                    yield module, getattr(of, module).weight, (f"decoder.layers.{part}.{module}", number)


def _source(module, row, network):
    """Index of the Hugging Face matrix that a row of Megatron's comes from, by counting."""
    if module == "linear_qkv":
        head, queries = network.kv_channels, network.num_attention_heads // network.num_query_groups
        within = row // head % (queries + 2)
        return max(0, within - queries + 1)
    return int(module == "linear_fc1" and network.swiglu and row >= network.ffn_hidden_size)


def _factors(lora, module, shape, weight_key, network):
    """A of each row, fp64 [out, r, in], and B, fp64 [out, r]; 0 where a row is not adapted, ``None`` if none is."""
    target = lora.target(module)
    if target is None:
        return None
    name, layer = weight_key
    rank = lora.rank
    shapes = {"lora_a": (len(target.parts) * rank, shape[1]), "lora_b": (shape[0], rank)}
    a, b = (
        KnownAdapters().read(WeightSlice(f"{name}.{key}", (layer,), (0, 0), size)).double().numpy()
        for key, size in shapes.items()
    )
    of_row = np.zeros((shape[0], rank, shape[1]))
    for row in range(shape[0]):
        for number, part in enumerate(target.parts):
            if _source(module, row, network) in part:
                of_row[row] = a[number * rank : (number + 1) * rank]
    return of_row, b * of_row.any((1, 2))[:, None]


def _update(lora, module, shape, weight_key, network):
    import torch

    factors = _factors(lora, module, shape, weight_key, network)
    if factors is None:
        return 0
    of_row, b = factors
    return torch.from_numpy(lora.scale * np.einsum("or,ori->oi", b, of_row)).float()


@pytest.mark.parametrize(
    ("options", "shape"), [(SHARED, "llama"), (APART, "llama"), (SHARED, "Megatron's defaults")], ids=str
)
def test_gradients_follow_from_those_of_the_whole_model(one_process, dataset_prefix, options, shape):
    """dA = scale · Σ B^T dW over the rows that an A serves, dB = scale · dW A^T; in fp64 of the whole model's dW."""
    curve, gradients, _ = one_process(shape, options)
    loss, of_matrices = run_on_ranks(1, _of_the_whole_model, dataset_prefix, options, shape)[0]
    assert curve[0][0] == pytest.approx(loss, rel=1e-6)
    found, checked = whole_adapters([gradients]), set()
    arguments = arguments_for(dataset_prefix, f"--peft-type lora {options}", 1, shape)
    lora, network = arguments.adapters, arguments.network
    for (name, layer), gradient in of_matrices.items():
        module = name.rsplit(".", 1)[1]
        factors = _factors(lora, module, gradient.shape, (name, layer), network)
        if factors is None:
            continue
        of_row, b = factors
        expected_b = lora.scale * np.einsum("oi,ori->or", gradient.astype(np.float64), of_row)
        expected_a = np.zeros_like(found[f"{name}.lora_a", layer], dtype=np.float64)
        for number, part in enumerate(lora.target(module).parts):
            rows = [row for row in range(gradient.shape[0]) if _source(module, row, network) in part]
            expected_a[number * lora.rank : (number + 1) * lora.rank] = lora.scale * b[rows].T @ gradient[rows]
        for kind, expected in (("a", expected_a), ("b", expected_b)):
            key = f"{name}.lora_{kind}", layer
            np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=key)
            checked.add(key)
    assert checked == found.keys()


def _memory(prefix, options):
    """Count elements of gradient buffers, of optimizer states, and of trained parameters in a run with adapters."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"--peft-type lora {SHARED} {options}", 1)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = trainer_of(arguments, dataset)
        before = {name: p.detach().clone() for name, p in trainer.chunks[0].named_parameters() if not p.requires_grad}
        trainer.train_step(split, plans_of(split, 1, 1)[0], TASK_WEIGHTS)
        assert all(
            p.grad is None and p.equal(before[n]) for n, p in trainer.chunks[0].named_parameters() if n in before
        )
        buffers = sum(buffer.grad_data.numel() for buffer in trainer.chunks[0].buffers)
        (part,) = trainer.optimizer.chained_optimizers
        states = [state["exp_avg"].numel() for state in part.optimizer.state.values()]
        return buffers, sum(states), trainer.num_parameters(trained=True), trainer.num_parameters()


@pytest.mark.parametrize("options", ["", "--bf16 --use-distributed-optimizer"])
def test_the_base_has_no_gradients_and_no_states(dataset_prefix, options):
    buffers, states, trained, parameters = run_on_ranks(1, _memory, dataset_prefix, options)[0]
    # four layers of rank 4: qkv 64 -> 128, proj 64 -> 64, fc1 64 -> 2·128, fc2 128 -> 64
    assert trained == 4 * 4 * (64 + 128 + 64 + 64 + 64 + 256 + 128 + 64)
    assert parameters > 10 * trained
    assert trained <= buffers < trained + 1000  # gradient buffers are padded
    assert states == trained


def _starts(prefix, options, world_size, peft):
    """Return the loss of a first step, and the adapters before it."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from tests.parallel.adapters import adapter_shards

    arguments = arguments_for(prefix, f"{options} {peft}", world_size)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        adapters = adapter_shards(trainer, lambda parameter: parameter.detach())
        return trainer.train_step(split, plans_of(split, 1, 1)[0], np.ones(4)).loss, adapters


def test_adapters_change_nothing_at_first_and_are_the_same_on_every_layout(dataset_prefix):
    without, _ = run_on_ranks(1, _starts, dataset_prefix, "", 1, "")[0]
    lora = f"--peft-type lora {SHARED}"
    loss, adapters = run_on_ranks(1, _starts, dataset_prefix, "", 1, lora)[0]
    assert loss == without
    split = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    expected = whole_adapters([adapters])
    found = whole_adapters([parts for _, parts in run_on_ranks(4, _starts, dataset_prefix, split, 4, lora)])
    assert found.keys() == expected.keys()
    for (name, layer), matrix in expected.items():
        assert np.array_equal(found[name, layer], matrix), name
        assert matrix.any() == name.endswith("lora_a")
        if matrix.any():  # Kaiming's bound, as PEFT has it
            assert 0.9 < np.abs(matrix).max() * np.sqrt(matrix.shape[1]) <= 1
    initial = [matrix.tobytes() for matrix in expected.values() if matrix.any()]
    assert len(set(initial)) == len(initial)


RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def test_recomputed_layers_give_the_same_bits_with_dropout(one_process, dataset_prefix):
    """With a frozen base, recompute gives no gradients unless the first layer's input requires them."""
    dropped = f"{SHARED} --lora-dropout 0.3"
    curve, gradients, _ = one_process("llama", dropped)
    assert curve[0][0] != pytest.approx(one_process("llama", SHARED)[0][0][0], rel=1e-4)
    again = run_on_ranks(1, train_adapters, dataset_prefix, f"{dropped} {RECOMPUTED}", 1)[0]
    assert again[0] == curve
    for name, matrix in whole_adapters([gradients]).items():
        assert np.array_equal(matrix, whole_adapters([again[1]])[name]), name
    layout = "--tensor-model-parallel-size 2 --micro-batch-size 2"
    for parallel in ("", "--sequence-parallel"):
        plain = run_on_ranks(2, train_adapters, dataset_prefix, f"{dropped} {layout} {parallel}", 2)
        recomputed = run_on_ranks(2, train_adapters, dataset_prefix, f"{dropped} {layout} {parallel} {RECOMPUTED}", 2)
        assert [rank[0] for rank in plain] == [rank[0] for rank in recomputed]
        for ours, theirs in zip(
            whole_adapters([rank[1] for rank in plain]).items(),
            whole_adapters([rank[1] for rank in recomputed]).items(),
            strict=True,
        ):
            assert np.array_equal(ours[1], theirs[1]), ours[0]


def _dropped(prefix):
    """Apply the dropout before A to ones on this rank, in a column-parallel and a row-parallel layer."""
    import torch

    from mft_megatron.mcore.parallel import process_groups

    split = "--tensor-model-parallel-size 2 --peft-type lora --lora-dropout 0.5"
    arguments = arguments_for(prefix, split, 2)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = trainer_of(arguments, open_dataset(arguments))
        attention = trainer.chunks[0].train().module.decoder.layers[0].self_attention
        ones = torch.ones(4, 1, 32)
        layers = attention.linear_qkv, attention.linear_proj
        found = [layer.dropped(ones).flatten().tolist() for layer in layers]
        attention.eval()
        assert all(layer.dropped(ones) is ones for layer in layers)
        return found


def test_dropout_is_the_same_on_all_ranks_for_replicated_inputs_and_independent_for_split_ones(dataset_prefix):
    first, second = run_on_ranks(2, _dropped, dataset_prefix)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert set(first[0]) == {0.0, 2.0}


def _rates(prefix, options):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"--peft-type lora {SHARED} {options}", 1)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = trainer_of(arguments, dataset)
        before = {name: p.detach().clone() for name, p in trainer.chunks[0].named_parameters()}
        report = trainer.train_step(split, plans_of(split, 1, 1)[0], TASK_WEIGHTS)
        moved = {}
        for name, parameter in trainer.chunks[0].named_parameters():
            change = (parameter.detach() - before[name]).abs()
            moved.setdefault(name.rsplit(".", 1)[1], []).append(float(change.median()))
        return report.learning_rate, np.median(moved["lora_a"]), np.median(moved["lora_b"])


def test_lora_plus_has_larger_rates_for_b(dataset_prefix):
    """Adam's first step changes every element by the learning rate."""
    rate, a, b = run_on_ranks(1, _rates, dataset_prefix, "--loraplus-lr-ratio 16 --weight-decay 0 --adam-eps 1e-12")[0]
    assert (rate, a, b) == (1e-3, pytest.approx(1e-3, rel=1e-3), pytest.approx(16e-3, rel=1e-3))


def _biases(prefix):
    """Biases of experts' routers after a step of the whole model, and after one of adapters."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    found = []
    for peft in ("", f"--peft-type lora {ATTENTION}"):
        words = f"--moe-router-score-function sigmoid --moe-router-enable-expert-bias {peft}"
        arguments = arguments_for(prefix, words, 1, "experts")
        dataset = open_dataset(arguments)
        split = dataset.split("train")
        with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            trainer.train_step(split, plans_of(split, 1, 1)[0], np.ones(4))
            buffers = trainer.chunks[0].module.named_buffers()
            found.append([bool(buffer.any()) for name, buffer in buffers if name.endswith("expert_bias")])
    return found


def test_biases_of_experts_belong_to_the_frozen_model(dataset_prefix):
    """Megatron changes them after each step, and a checkpoint of adapters alone does not have them."""
    moved, frozen = run_on_ranks(1, _biases, dataset_prefix)[0]
    assert any(moved)
    assert frozen == [False] * len(moved)


@pytest.mark.slow
def test_stages_without_layers_have_nothing_to_train(one_process, dataset_prefix):
    """The first stage has the embedding one_process, the last one the loss."""
    stages = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|tt|tt|L"
    overlap = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    curve, _, adapters = one_process("llama", SHARED)
    ranks = run_on_ranks(4, train_adapters, dataset_prefix, f"{SHARED} {stages} {overlap}", 4)
    for other, _, _ in ranks:
        assert other == [pytest.approx(step, rel=1e-6) for step in curve]
    expected = whole_adapters([adapters])
    for name, matrix in whole_adapters([rank[2] for rank in ranks]).items():
        np.testing.assert_allclose(matrix, expected[name], rtol=0, atol=1e-6, err_msg=str(name))
