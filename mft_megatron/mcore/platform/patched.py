"""Import this module before Megatron-Core: it makes ``import megatron.core`` work on this machine.

Every module of ``mcore/`` that imports ``megatron`` imports this one first, which the architecture test checks; modules
that need no Megatron-Core leave it out and stay cheap to import.
"""

from mft_megatron.mcore.platform import devices

devices.prepare()
