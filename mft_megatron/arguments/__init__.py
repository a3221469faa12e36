"""The options of ``pretrain_mft.py``: Megatron's names, meanings and defaults, as frozen dataclasses."""
