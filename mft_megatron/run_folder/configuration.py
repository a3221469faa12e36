"""The content of ``config.yaml``."""

from collections.abc import Mapping

import yaml


def effective_configuration(options: Mapping[str, object], world_size: int) -> str:
    """The content of ``config.yaml``: the value of every option, for ``--yaml-cfg``, and the number of ranks."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return yaml.safe_dump({**plain, "world_size": world_size}, sort_keys=False)
