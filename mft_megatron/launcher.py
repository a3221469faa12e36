"""The rank of this process as its launcher gives it: in torchrun's variables, or in those of srun or mpirun.

torchrun sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` in every process that it
starts, and torch reads them. srun and mpirun have variables of their own; where torchrun's are missing, they are made
from those.
"""

import dataclasses
import re
from collections.abc import Mapping, MutableMapping

from mft_megatron.errors import InputError

# ports that Linux gives to nobody who does not ask for one of them
FIRST_PORT, PORTS = 20_000, 12_000


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A program that starts one process for each rank, and the names of the variables that it sets.

    Attributes:
        name: of the program.
        rank: variable with the index of the process.
        size: variable with the number of processes.
        local_rank: variable with the index of the process among those of its machine.
        local_size: variable with the number of processes of its machine, or a name that is never set.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


# Slurm has SLURM_NTASKS in a batch script too, which is one process; the number of a step's tasks is set by srun alone.
LAUNCHERS = (
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def complete(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables that are missing, from those of another launcher; none for a process by itself.

    Args:
        environment: of the process.

    Raises:
        InputError: only one of RANK and WORLD_SIZE is set, or processes of several machines have no address to meet at.
    """
    launcher = _launcher(environment)
    if ("RANK" in environment) != ("WORLD_SIZE" in environment):
        one, other = ("RANK", "WORLD_SIZE") if "RANK" in environment else ("WORLD_SIZE", "RANK")
        raise InputError(f"{one} is set and {other} is not; start with torchrun, or export both", always=True)
    if launcher is None:
        return
    if "RANK" in environment:
        if environment["WORLD_SIZE"] == environment[launcher.size]:
            environment.setdefault("LOCAL_RANK", environment[launcher.local_rank])
        return
    address, port = _meeting_point(environment, launcher)
    environment.update(
        RANK=environment[launcher.rank],
        WORLD_SIZE=environment[launcher.size],
        LOCAL_RANK=environment[launcher.local_rank],
        MASTER_ADDR=environment.get("MASTER_ADDR", address),
        MASTER_PORT=environment.get("MASTER_PORT", port),
    )


def rank_variable(environment: Mapping[str, str]) -> str | None:
    """Variable with this process's rank that a launcher set, which it has not itself; ``None`` without a launcher."""
    if "TORCHELASTIC_RUN_ID" in environment and "RANK" in environment:
        return "RANK"
    launcher = _launcher(environment)
    return None if launcher is None else launcher.rank


def local_rank(environment: Mapping[str, str]) -> int:
    """Index of this process among those of its machine, also before :func:`complete`; 0 for a process by itself."""
    launcher = _launcher(environment)
    default = "0" if launcher is None else environment[launcher.local_rank]
    return int(environment.get("LOCAL_RANK", default))


def gpu_index(environment: Mapping[str, str], visible: int) -> int:
    """Index of this process's GPU among those that it can see.

    Args:
        environment: of the process, completed.
        visible: number of GPUs that the process can see, at least 1.

    Raises:
        InputError: there is no GPU for this process, or nothing says which.
    """
    index = environment.get("LOCAL_RANK")
    if index is None:
        if visible == 1 or environment.get("WORLD_SIZE", "1") == "1":
            return 0
        raise InputError(
            f"LOCAL_RANK is not set, so that all processes of this machine would take the first of its {visible} GPUs; "
            "start with torchrun or srun, or export LOCAL_RANK=<index of the process on its machine>",
            always=True,
        )
    if int(index) < visible:
        return int(index)
    # a launcher may show each process its own GPU alone
    shown = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("NVIDIA_VISIBLE_DEVICES", "all")
    if visible == 1 and shown != "all":
        return 0
    raise InputError(
        f"process {index} of this machine (LOCAL_RANK, counted from 0) has no GPU: {visible} can be seen here; start "
        "one process for each GPU",
        always=True,
    )


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started several processes like this one, each with its rank; ``None`` without one."""
    for launcher in LAUNCHERS:
        if {launcher.rank, launcher.size, launcher.local_rank} <= environment.keys() and environment[
            launcher.size
        ] != "1":
            return launcher
    return None


def _meeting_point(environment: Mapping[str, str], launcher: Launcher) -> tuple[str, str]:
    """Address and port at which the processes of a launcher find rank 0.

    Raises:
        InputError: they are on several machines, of which the launcher names none, and MASTER_ADDR is not set.
    """
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    numbers = [int(number) for number in (job, step) if number.isdigit()]
    port = str(FIRST_PORT + (97 * numbers[0] + numbers[-1]) % PORTS if numbers else FIRST_PORT)
    nodes = environment.get("SLURM_STEP_NODELIST") if launcher.name == "srun" else None
    if nodes is not None:
        return first_host(nodes), port
    if environment.get(launcher.local_size) == environment[launcher.size]:
        return "127.0.0.1", port
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], port
    raise InputError(
        f"{launcher.name} does not say on which machine rank 0 is; export MASTER_ADDR=<its name> and "
        "MASTER_PORT=<a free port there>, or start with torchrun",
        always=True,
    )


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation: ``node003`` of ``node[003-010,12],other1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)
