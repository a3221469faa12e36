"""The loss and balancer tables agree with the names on the command line."""

import dataclasses

from mft_megatron import loss_names
from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.losses.table import LOSSES


def choices(option):
    """The values that an option of the objective takes."""
    fields = {field.name: field for field in dataclasses.fields(MultiTaskArguments)}
    return tuple(fields[option].metadata["choices"])


def test_the_losses_are_the_values_of_the_option():
    assert tuple(LOSSES) == loss_names.LOSSES == choices("mft_loss")


def test_the_options_and_the_table_know_the_same_kinds_of_losses():
    assert tuple(name for name, loss in LOSSES.items() if loss.weighted) == loss_names.WEIGHTED
    assert tuple(name for name, loss in LOSSES.items() if loss.focal) == loss_names.FOCAL
