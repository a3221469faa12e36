"""The loss and balancer tables agree with the names on the command line."""

import dataclasses

import pytest

from mft_megatron import loss_names
from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.losses.balancers.table import BALANCERS
from mft_megatron.losses.table import LOSSES
from mft_megatron.options import info_of


def choices(option):
    """The values that an option of the objective takes."""
    fields = {field.name: field for field in dataclasses.fields(MultiTaskArguments)}
    return info_of(fields[option]).choices


def test_the_losses_are_the_values_of_the_option():
    assert tuple(LOSSES) == loss_names.LOSSES == choices("mft_loss")


def test_the_options_and_the_table_know_the_same_kinds_of_losses():
    assert tuple(name for name, loss in LOSSES.items() if loss.weighted) == loss_names.WEIGHTED
    assert tuple(name for name, loss in LOSSES.items() if loss.focal) == loss_names.FOCAL


def test_the_balancers_are_the_values_of_the_option():
    assert ("static", *BALANCERS) == loss_names.BALANCERS == choices("task_balance")


@pytest.mark.parametrize("name", BALANCERS)
def test_the_fields_of_a_balancer_are_options_with_the_same_defaults(name):
    prefix = name.replace("-", "_") + "_"
    options = {
        field.name.removeprefix(prefix): field.default
        for field in dataclasses.fields(MultiTaskArguments)
        if field.name.startswith(prefix)
    }
    assert options == {field.name: field.default for field in dataclasses.fields(BALANCERS[name])}
    assert set(BALANCERS[name].task_options) <= options.keys()
