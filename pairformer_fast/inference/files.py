"""Files and folders of results: complete or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file through a temporary file in the same folder and ``os.replace``.

    Readers see the old content or all of the new one, whatever interrupts the writing.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def publish(scratch: Path, folder: Path, files: Iterable[str]) -> None:
    """Move finished files to their place and remove those of an earlier run that this one did not make."""
    folder.mkdir(exist_ok=True)
    for file in files:
        if (scratch / file).exists():
            os.replace(scratch / file, folder / file)
        else:
            (folder / file).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
