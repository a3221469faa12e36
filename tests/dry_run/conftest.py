"""A process with a simulated GPU, shared by the tests of a worker."""

import pytest

from tests.dry_run.simulated import Simulation


@pytest.fixture(scope="session")
def simulation(tmp_path_factory):
    """Reports of ranks on a simulated H100."""
    running = Simulation(tmp_path_factory.mktemp("simulated"))
    yield running
    running.close()
