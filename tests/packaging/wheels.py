"""Wheels with metadata and nothing else: what pip decides depends only on names, versions and requirements."""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path


def write_wheel(
    folder: Path, name: str, version: str, requires: Iterable[str] = (), extras: Iterable[str] = ()
) -> None:
    """Write a wheel of no files.

    Args:
        folder: gets the wheel.
        name: of the distribution.
        version: as in its metadata.
        requires: lines of ``Requires-Dist``.
        extras: names of extras that it provides.
    """
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    write_wheel_of(folder, name, version, "\n".join(lines) + "\n")


def write_wheel_of(folder: Path, name: str, version: str, metadata: str) -> None:
    """Write a wheel of no files with this METADATA."""
    stem = f"{re.sub('[-_.]+', '_', name)}-{version}"
    files = {
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{stem}.dist-info/RECORD": record}.items():
            wheel.writestr(path, text)
