"""A model in 4 bits on CUDA: bitsandbytes' kernels against the reference, a run against the CPU's, and memory."""

import pytest
import torch

from tests.gpu import device_worker
from tests.gpu.device_runs import worst

LARGE = "--hidden-size 1024 --ffn-hidden-size 2816 --bf16 --micro-batch-size 1"


def on(device, function, *arguments):
    """Call one of this file's functions in the process of ``cpu`` or ``cuda``."""
    return device_worker.on(device, f"tests.gpu.test_cuda_qlora:{function}", *arguments)


def curve(prefix, options):
    """Train two steps; returns loss and gradient norm of each, and the name of the kernels of the first level."""
    from mft_megatron.mcore.adapters import nf4
    from mft_megatron.mcore.parallel import process_groups
    from tests.parallel.run import TASK_WEIGHTS, data_seed, open_dataset, plans_of
    from tests.parallel.test_qlora import make_trainer, qlora_arguments

    arguments = qlora_arguments(prefix, options, 1)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = make_trainer(arguments, dataset)
        reports = [trainer.train_step(split, plan, TASK_WEIGHTS) for plan in plans_of(split, data_seed(split), 2)]
        return [[[report.loss, float(report.grad_norm)] for report in reports], nf4.kernels().name]


def memory(prefix, options, peft):
    """Measure memory.

    Returns:
        bytes on the GPU after the base model is loaded, the peak until then, the peak of a step; elements in 4 bits,
        and those of the largest matrix.
    """
    import numpy as np

    from mft_megatron.mcore.adapters import quantized_linear
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from tests.parallel.run import data_seed, open_dataset, plans_of
    from tests.parallel.test_qlora import KnownBase, qlora_arguments

    arguments = qlora_arguments(prefix, options, 1, peft)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        fill_weights(trainer, KnownBase(arguments.network, False))
        filled, filling = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step(split, next(iter(plans_of(split, data_seed(split), 1))), np.ones(4))
        layers = quantized_linear.quantized_layers(trainer.chunks[0].module).values()
        elements = [layer.weight.numel() for layer in layers]
        return [filled, filling, torch.cuda.max_memory_allocated(), sum(elements), max(elements, default=0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (300, 192), (1024, 2816), (3, 128)])
def test_kernels(shape, dtype):
    """Codes are the reference's except for elements halfway between two values; dequantised weights are equal."""
    pytest.importorskip("bitsandbytes")
    from mft_megatron.mcore.adapters import nf4

    weight = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    kernels, reference = nf4.Bitsandbytes(), nf4.Reference()
    codes, magnitudes = (tensor.cpu() for tensor in kernels.quantize(weight.cuda()))
    ours = reference.quantize(weight)
    assert magnitudes.equal(ours[1])
    assert (codes != ours[0]).sum() <= codes.numel() // 10000
    again = kernels.dequantize(codes.cuda(), magnitudes.cuda(), shape, dtype)
    assert again.cpu().equal(reference.dequantize(codes, magnitudes, shape, dtype))
    assert again.shape == shape


def test_second_level():
    """The order of summation differs, so a magnitude halfway between two 8-bit values may be rounded to either."""
    from mft_megatron.mcore.adapters import nf4
    from tests.mcore.adapters.magnitudes import expand_all

    magnitudes = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) + 0.01
    on_cpu, on_gpu = nf4.compress(magnitudes), nf4.compress(magnitudes.cuda())
    assert (on_cpu.codes != on_gpu.codes.cpu()).sum() <= 20
    torch.testing.assert_close(on_gpu.largest.cpu(), on_cpu.largest, rtol=1e-5, atol=0)
    difference = expand_all(on_gpu).cpu() - expand_all(on_cpu)
    assert (difference.abs() > 1e-6).sum() <= 20


@pytest.mark.parametrize(
    "options", ["", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"]
)
def test_a_run(dataset_prefix, options, within):
    pytest.importorskip("bitsandbytes")
    on_gpu, kernels = on("cuda", "curve", dataset_prefix, options)
    on_cpu, reference = on("cpu", "curve", dataset_prefix, options)
    assert kernels.startswith("bitsandbytes")
    assert reference == "torch"
    within(worst(on_gpu, on_cpu), 1e-3)


def test_memory(dataset_prefix):
    """The base model takes little more than 4 bits an element, loaded and between forward and backward passes."""
    pytest.importorskip("bitsandbytes")
    filled, filling, step, elements, largest = on("cuda", "memory", dataset_prefix, LARGE, "qlora")
    whole, _, whole_step, *_ = on("cuda", "memory", dataset_prefix, LARGE, "lora")
    saved = 0.98 * (2 - 0.53) * elements
    assert whole - filled > saved
    # one matrix at a time: as read, in fp32, and with the buffers of quantising
    assert filling - filled < 12 * largest
    # one matrix at a time in 16 bits, with fp32 magnitudes of its blocks
    assert whole_step - step > saved - 4 * largest
