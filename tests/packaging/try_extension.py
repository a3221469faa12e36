"""Use the C++ extension of an installed wheel, with numpy and nothing else.

Run as a script in the wheel's environment: no pytest here.
"""

import itertools
import sys

import numpy as np

from mft_megatron.data._sample_index import best_fit_decreasing


def main() -> None:
    """Pack four samples, and print where the extension was loaded from."""
    indices, offsets = best_fit_decreasing(np.array([3, 5, 2, 6], np.int32), 8)
    packs = [indices[start:end].tolist() for start, end in itertools.pairwise(offsets)]
    if packs != [[3, 2], [1, 0]] or "torch" in sys.modules:
        sys.exit(f"error: wrong packs {packs}, or torch was imported")
    print(sys.modules["mft_megatron.data._sample_index"].__file__)


if __name__ == "__main__":
    main()
