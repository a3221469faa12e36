"""Reports of single ranks, from a process that simulates a GPU and forks one process for each rank."""

import multiprocessing
import traceback

from mft_megatron.errors import InputError
from tests.made_dataset import write_dataset

LENGTH = 128
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    f"--max-position-embeddings {LENGTH} --lr 1e-3 --train-iters 4 --micro-batch-size 1 --global-batch-size 8 --bf16"
)


class Simulation:
    """A process with a simulated GPU; ``report`` forks from it."""

    def __init__(self, folder, gpu="h100-80g", setup=None):
        self._prefixes = {}
        self._folder = folder
        self._pipe, pipe = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(pipe, gpu, setup))
        self._process.start()
        pipe.close()

    def report(self, words="", world_size=1, rank=0, model=MODEL, function=None, **data):
        """Report on a rank of a small model; ``data``: options of the data set's packing."""
        key = repr(data)
        if key not in self._prefixes:
            prefix = str(self._folder / f"data{len(self._prefixes)}")
            write_dataset(prefix, LENGTH, **data)
            self._prefixes[key] = prefix
        command = f"{model} --data-path {self._prefixes[key]} {words}".split()
        self._pipe.send((function or report_of_rank, (command, world_size, rank)))
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe, gpu, setup):
    from mft_megatron.mcore.platform import devices
    from mft_megatron.mcore.platform.simulated_gpu import SIMULATED_GPUS

    if setup is not None:
        setup()
    devices.simulate(SIMULATED_GPUS[gpu])
    # imported once, before processes are forked
    import mft_megatron.dry_run.rank_run  # noqa: F401

    context = multiprocessing.get_context("fork")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        process = context.Process(target=_send, args=(pipe, function, arguments))
        process.start()
        process.join()
        if process.exitcode:
            pipe.send(RuntimeError(f"exit code {process.exitcode}"))


def _send(pipe, function, arguments):
    try:
        result = function(*arguments)
    except InputError as error:
        result = error
    except BaseException:
        result = RuntimeError(traceback.format_exc())
    pipe.send(result)


def arguments_of(words, world_size):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import packed_lengths

    return parse_arguments(words, world_size, packed_lengths)


def report_of_rank(words, world_size, rank, **options):
    """Report on a rank in this process, which simulates a GPU; ``options``: of ``run_rank``."""
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.dry_run.rank_run import run_rank

    arguments = arguments_of(words, world_size)
    dataset = PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)
    return run_rank(arguments, dataset, rank, **options)
