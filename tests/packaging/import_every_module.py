"""Import every module of the package and every command, each of which needs no more than the base dependencies.

Run as a script in an environment without the extras: no pytest here. An installed package goes before the checkout's.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Import, and print the count."""
    sys.path.append(str(ROOT))  # last: a checkout has no extension where the package was built elsewhere
    names = ["pretrain_mft"]
    for folder in ("mft_megatron", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules imported by Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
