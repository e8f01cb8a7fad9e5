"""Tests of files without permissions, which root could read anyway."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux, see prctl(2)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root's rights over files until the context ends."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no permissions of POSIX")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def folder_of_another_user() -> Iterator[Path]:
    """Make a folder that `unprivileged` code may use; `tmp_path` belongs to root only."""
    with tempfile.TemporaryDirectory() as name:
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def obey_permissions() -> None:
    """Let the program that this process runs next obey permissions, also as root.

    It is a `preexec_fn` of a child process. The user stays: another one may not read the Python of
    this user.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl failed")
