"""A disk that takes no more, for tests: a limit on the size of files, which root is held to as well."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Let no file of this process, and of those that it starts, grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
