"""A dozen of the kills of ``make test-faults``: each job is resumed by the same command and compared."""

import random

import pytest

from tests.faults.chains import References, run_chain
from tests.faults.jobs import fork_server
from tests.faults.scenarios import SCENARIOS, Material

# scenario and most kills, by the seed of the chain
CHAINS = {1: ("one rank", 3), 2: ("coba", 3), 3: ("packing", 4), 4: ("preprocessing", 2)}


@pytest.fixture(scope="module")
def server():
    with fork_server() as server:
        yield server


@pytest.fixture(scope="module")
def references(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return References(folder, Material(folder, server), SCENARIOS)


@pytest.mark.parametrize("seed", CHAINS)
def test_a_killed_job_is_resumed_as_if_nothing_had_been(server, references, tmp_path, seed):
    name, kills = CHAINS[seed]
    reference, done = references.of(name, server), []
    for attempt in range(5):  # a job may be over before it is to be killed
        generator, out = random.Random(f"{seed}/{attempt}"), tmp_path / f"out{attempt}"
        report = run_chain(server, references.material, SCENARIOS[name], reference, generator, kills, out)
        assert report.problems == [], f"seed {seed}, attempt {attempt}: {report.kills}"
        done += report.kills
        if done:
            return
    pytest.fail("every job was over before it was killed")
