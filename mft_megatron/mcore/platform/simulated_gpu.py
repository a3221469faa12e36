"""A GPU that is not there, for dry runs: its properties, by which options and kernels are chosen.

Tensors are then on the ``meta`` device: they have shapes and no content.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SimulatedGPU:
    """A GPU that a dry run simulates.

    Attributes:
        name: for messages.
        capability: compute capability, major and minor.
        memory: bytes that torch reports of such a GPU, less than its name says.
    """

    name: str
    capability: tuple[int, int]
    memory: int


SIMULATED_GPUS = {
    "a100-40g": SimulatedGPU("NVIDIA A100 40 GB", (8, 0), int(39.4 * GIB)),
    "a100-80g": SimulatedGPU("NVIDIA A100 80 GB", (8, 0), int(79.1 * GIB)),
    "h100-80g": SimulatedGPU("NVIDIA H100 80 GB", (9, 0), int(79.1 * GIB)),
    "h200-141g": SimulatedGPU("NVIDIA H200 141 GB", (9, 0), int(139.7 * GIB)),
    "b200-180g": SimulatedGPU("NVIDIA B200 180 GB", (10, 0), int(178.3 * GIB)),
}
