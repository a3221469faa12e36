"""A file of options, in addition to the command line."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class ConfigFileArguments:
    """The command line overrides the file."""

    yaml_cfg: str | None = option(
        None,
        "Read options from this file, YAML or .json: a key is an option's name, as in a run's config.yaml, which can "
        "be read unchanged. Unlike in Megatron keys are flat, or in sections named like the groups here, and the "
        "command line may be used together with the file.",
        aliases=("--config-file",),
        metavar="FILE",
    )
