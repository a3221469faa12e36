"""The options of ``pretrain_mft.py``: Megatron's names, meanings and defaults, as frozen dataclasses.

To add an option, write its field in a file of ``groups/``: name, type, default, bounds and help. Then, only if needed:
its value when it is not given in ``completion.py``, what it needs to have an effect in ``without_effect.py``, and a
check against other options in ``checks/``. An option of Megatron's is removed from ``megatron_only.py``. ``make docs``
writes the reference; the tests of the table cover parsing, bounds, help and config.yaml.
"""
