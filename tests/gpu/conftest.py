"""Marks and fixtures for the tests of this folder, which need a CUDA device, and the table that ends them."""

from pathlib import Path

import pytest
import torch

from tests.gpu.summary import NO_DEVICE, row_of, table
from tests.made_dataset import write_dataset

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and skip them without a CUDA device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_DEVICE))
            item.user_properties.append(("row", row_of(item)))


def pytest_terminal_summary(terminalreporter):
    """Print the table, where there is a device."""
    reports = [
        report for kind in ("passed", "failed", "skipped", "error") for report in terminalreporter.stats.get(kind, ())
    ]
    for line in table(reports) if torch.cuda.is_available() else ():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def dataset_prefix(tmp_path_factory):
    """A data set of four imbalanced tasks, packed for 128 tokens; needs no tokenizer."""
    prefix = str(tmp_path_factory.mktemp("dataset") / "bytes")
    write_dataset(prefix, 128, longest=120, split=(80, 20, 0))
    return prefix


@pytest.fixture
def within(record_property):
    """A function that asserts that an error is at most a bound, and keeps both for the table."""

    def check(error, bound):
        record_property("error", [error, bound])
        assert error <= bound, f"{error:.3g} is above {bound:.3g}"

    return check
