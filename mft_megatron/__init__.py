"""mft_megatron: multi-task fine-tuning of large code models on Megatron-Core.

Each folder is a stage the data pass through, and knows only the stages below it (docs/ARCHITECTURE.md): ``data``,
``losses`` and ``arguments`` (floor 1), ``mcore`` (floor 2), ``convert`` and ``training`` (floor 3).
"""

__version__ = "0.1.0"
