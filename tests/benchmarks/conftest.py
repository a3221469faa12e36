"""Tests of the benchmarks: all are slow but those marked ``smoke``, one for each folder of benchmarks."""

from tests.slow_folder import mark_slow


def pytest_collection_modifyitems(items):
    mark_slow(items, __file__)
