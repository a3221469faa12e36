"""Messages between GPUs of one machine: the collectives and sends of a step, in GB a second for each rank.

::

    torchrun --nproc-per-node 2 benchmarks/gpu/messages.py

Tensors in bf16: a small one, a micro-batch of 4096 tokens at hidden size 8192, and a bucket of 40 million gradients.
Bytes are those of the whole tensor.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, write_numbers
from measuring.device_clock import Clock, machine

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices

ELEMENTS = {"small": 2**10, "hidden states": 4096 * 8192, "bucket of gradients": 40_000_000}


def calls(elements: int) -> dict:
    """Functions that send a tensor of so many elements, by the name of the collective."""
    size, rank, device = dist.get_world_size(), dist.get_rank(), devices.device()
    part = -(-elements // size)
    whole, shard = (torch.ones(count, dtype=torch.bfloat16, device=device) for count in (part * size, part))

    def to_next() -> None:
        received = torch.empty_like(shard)
        sends = dist.P2POp(dist.isend, shard, (rank + 1) % size)
        receives = dist.P2POp(dist.irecv, received, (rank - 1) % size)
        for request in dist.batch_isend_irecv([sends, receives]):
            request.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, shard),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(shard, whole),
        "send and receive": to_next,
    }


def main() -> None:
    """Measure every collective at every size, and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=10, help="measured; the median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    results = []
    with process_groups.process_groups(DistributedArguments(), 1):
        for label, elements in ELEMENTS.items():
            for name, call in calls(elements).items():
                clock, readings = Clock(), []
                for _ in range(2 + options.repeat):
                    with clock:
                        call()
                    readings.append(clock.take())
                seconds = median_of(readings[2:])["wall"]
                results.append({"call": name, "size": label, "bytes": 2 * elements, "seconds": seconds})
        if process_groups.is_main():
            print(f"{dist.get_world_size()} ranks; {machine()}\n\n| call | MB | ms | GB/s |\n|---|---:|---:|---:|")
            for row in results:
                size, seconds = row["bytes"], row["seconds"]
                speed = size / seconds / 1e9
                print(f"| {row['call']}, {row['size']} | {size / 1e6:.3f} | {1e3 * seconds:.3f} | {speed:.1f} |")
            write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
