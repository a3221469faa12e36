"""The engine room: the only place that imports Megatron-Core or asks for CUDA (docs/DESIGN.md §5).

::

    platform (device, backend, replacements) ─► parallel (ranks) ─► model, optimizer ─► step ─► checkpoint

Importing anything from this package first makes Megatron-Core fit for the machine: see :mod:`.platform`.
"""

from . import platform

platform.prepare()
