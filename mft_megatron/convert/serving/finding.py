"""The result of one check of a folder before it is served."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        verdict: ``ok``; ``missing``: a server can do without; ``wrong``: a server fails, or sends what was not trained;
            ``note``: worth knowing.
        subject: the file or feature that was checked.
        text: the result in words.
    """

    verdict: Literal["ok", "missing", "wrong", "note"]
    subject: str
    text: str
