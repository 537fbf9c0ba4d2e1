"""Files written whole or not at all, and one message when the disk does not take them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(RunError):
    """A file of the run cannot be written: the disk is full, read-only, or its folder is gone."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong in the block into a DiskError: the file, the reason, the free space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(f"cannot write {path}: {_reason(error, path)}") from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` and puts it there when it is whole; `write` gets the file's path.

    Raises DiskError, and leaves what was there before, if it cannot be written.
    """
    fresh = path.with_name(f"{path.name}.new")
    with writing(path):
        try:
            write(fresh)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes contiguous tensors as safetensors, readable for whom the umask lets read.

    Raises OSError or SafetensorError if it cannot be written.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)  # safetensors 0.8 makes a file that its owner alone reads


def _reason(error: OSError | SafetensorError, path: Path) -> str:
    """What happened in words; safetensors tells the system's number in its text only."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    what = os.strerror(number) if number is not None else str(error)
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if number == errno.ENOENT and folder != path.absolute().parent:
        return f"the folder {path.parent} is gone"
    if number in FULL:
        free = shutil.disk_usage(folder).free
        return f"{what}; {free / 1e6:,.1f} MB are free there. Make space, or raise the limit on a file's size"
    return what
