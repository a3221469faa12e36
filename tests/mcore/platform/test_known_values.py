"""Values on the simulated GPU: what is known follows operators and views, what is unknown is forgotten."""

import torch

from mft_megatron.mcore.platform.simulation.expert_load import ExpertLoad
from mft_megatron.mcore.platform.simulation.known_values import KnownValues

aten = torch.ops.aten


def known(values, content):
    tensor = torch.empty(content.shape, dtype=content.dtype, device="meta")
    values.give(tensor, content)
    return tensor


def run(values, operator, *arguments, **options):
    out = operator(*arguments, **options)
    values.follow(operator, arguments, options, [out])
    return out


def test_operators_and_views():
    values = KnownValues()
    numbers = known(values, torch.tensor([[3, 1], [2, 5]]))
    total = run(values, aten.sum.dim_IntList, numbers, [0])
    assert values.of(total).tolist() == [5, 6]
    assert values.of(numbers.t()).tolist() == [[3, 2], [1, 5]]
    run(values, aten.add_.Scalar, numbers[1], 10)
    assert values.of(numbers).tolist() == [[3, 1], [12, 15]]
    zeros = run(values, aten.zeros_like.default, torch.empty(2, dtype=torch.int32, device="meta"))
    assert values.of(zeros).tolist() == [0, 0]
    large = run(values, aten.zeros_like.default, torch.empty(2**21, dtype=torch.int32, device="meta"))
    assert values.of(large) is None
    # bytes that were copied together
    content = torch.tensor([7, 8], dtype=torch.int32)
    copied = known(values, content.view(torch.uint8))
    assert values.of(copied.view(torch.int32)).tolist() == [7, 8]


def test_what_is_unknown_is_not_guessed():
    values, unknown = KnownValues(), torch.empty(2, 2, dtype=torch.int64, device="meta")
    numbers = known(values, torch.tensor([[3, 1], [2, 5]]))
    assert values.of(run(values, aten.add.Tensor, numbers, unknown)) is None
    assert values.of(numbers) is not None
    run(values, aten.add_.Tensor, numbers, unknown)
    assert values.of(numbers) is None
    # an operator that changes its arguments and returns nothing
    numbers, steps = known(values, torch.tensor([4])), known(values, torch.tensor([1]))
    aten._foreach_add_.List([numbers], [steps])
    values.follow(aten._foreach_add_.List, ([numbers], [steps]), {}, [])
    assert values.of(numbers).tolist() == [5]
    unknown = torch.empty(1, dtype=torch.int64, device="meta")
    aten._foreach_add_.List([numbers], [unknown])
    values.follow(aten._foreach_add_.List, ([numbers], [unknown]), {}, [])
    assert values.of(numbers) is None


def test_the_load_of_experts_is_as_stated():
    even = torch.bincount(ExpertLoad(8, 2).chosen(4096).flatten(), minlength=8)
    assert even.tolist() == [1024] * 8
    skewed = ExpertLoad(8, 2, busiest=3.0, which=5).chosen(4096)
    assert (skewed[:, 0] != skewed[:, 1]).all()
    counts = torch.bincount(skewed.flatten(), minlength=8)
    assert counts[5] == 3 * 1024
    others = counts[[0, 1, 2, 3, 4, 6, 7]]
    assert counts.sum() == 2 * 4096
    assert others.max() - others.min() <= 1
    # no expert is chosen twice by a token
    assert torch.bincount(ExpertLoad(4, 2, busiest=9.0).chosen(100).flatten(), minlength=4)[0] == 100
