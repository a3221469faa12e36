"""Ranks from the variables of srun and mpirun, and the GPU of a process."""

import pytest

from mft_megatron import launcher
from mft_megatron.errors import InputError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def _added(environment):
    completed = dict(environment)
    launcher.complete(completed)
    assert completed.items() >= environment.items()
    return {name: completed[name] for name in completed.keys() - environment.keys()}


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, {}),
        # torchrun decides, on its own and as the one task that srun starts on each node
        (TORCHRUN, {}),
        ({**SRUN, **TORCHRUN}, {}),
        (
            SRUN,
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"},
        ),
        # a batch script is one process, whatever it will start
        ({"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, {}),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {}),
        # a script that exports what torch needs, and forgets the GPU
        ({**SRUN, "RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"LOCAL_RANK": "1"}),
        # a world of its own in each task
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, {}),
        ({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}),
        (OPEN_MPI, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1"}),
        ({**INTEL_MPI, "MASTER_ADDR": "a"}, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}),
    ],
)
def test_missing_variables_come_from_the_launcher(environment, added):
    found = _added(environment)
    port = found.pop("MASTER_PORT", None)
    assert found == added
    assert (port is not None) == ("RANK" in added and "MASTER_PORT" not in environment)
    assert port is None or 1024 < int(port) < 32768


def test_all_processes_of_a_step_find_one_port_and_steps_differ():
    ports = {_added({**SRUN, "SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(8)}
    assert len(ports) == 1
    assert ports.isdisjoint(_added({**SRUN, "SLURM_STEP_ID": "1"})["MASTER_PORT"].split())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "^RANK is set and WORLD_SIZE is not; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE is set and RANK is not"),
        (INTEL_MPI, "^mpirun does not say on which machine rank 0 is; export MASTER_ADDR"),
    ],
)
def test_incomplete_variables_are_refused(environment, message):
    with pytest.raises(InputError, match=message):
        launcher.complete(dict(environment))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[003-010,12],other1", "node003"),
        ("r[1-2]n[10,12-14].cluster,r3n1", "r1n10.cluster"),
    ],
)
def test_first_host_of_a_list_of_slurm(nodes, first):
    assert launcher.first_host(nodes) == first


@pytest.mark.parametrize(("environment", "index"), [({}, 0), (TORCHRUN, 1), (SRUN, 1), (OPEN_MPI, 3)])
def test_local_rank(environment, index):
    assert launcher.local_rank(environment) == index


@pytest.mark.parametrize(
    ("environment", "visible", "index"),
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "3"}, 8, 3),
        ({"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 1, 0),
        ({"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, 3),
        ({"LOCAL_RANK": "1", "NVIDIA_VISIBLE_DEVICES": "GPU-1"}, 1, 0),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 0),
    ],
)
def test_gpu_of_a_process(environment, visible, index):
    assert launcher.gpu_index(environment, visible) == index


@pytest.mark.parametrize(
    ("environment", "visible", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, 8, "LOCAL_RANK is not set, so that all processes .* the first of its 8"),
        ({"LOCAL_RANK": "8"}, 8, "process 8 of this machine .* has no GPU: 8 can be seen"),
        ({"LOCAL_RANK": "1"}, 1, "process 1 of this machine .* has no GPU: 1 can be seen"),
        ({"LOCAL_RANK": "1", "NVIDIA_VISIBLE_DEVICES": "all"}, 1, "has no GPU"),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_refused(environment, visible, message):
    with pytest.raises(InputError, match=message) as refusal:
        launcher.gpu_index(environment, visible)
    assert refusal.value.always
