"""Trying again what a store refused and may grant a moment later."""

from __future__ import annotations

import errno
import functools
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

RETRY_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and fourth try
_sleep = time.sleep  # replaced in tests

# Trying again gives the same answer.
_FINAL_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG}
# pyarrow gives a store's answers as OSErrors without a number.
_REFUSED = re.compile(
    r"(?i:access.?denied|access_key_id|signature|expired.?token|permission|forbidden|unauthorized|credentials|"
    r"no.?such.?bucket|invalid.?bucket)"
)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def may_pass(error: OSError) -> bool:
    """Whether the same request may succeed later: a store that is busy, a connection that broke."""
    if isinstance(error, _FINAL_ERRORS) or error.errno in _FINAL_NUMBERS:
        return False
    return error.errno is not None or not _REFUSED.search(str(error))


def retried(function: FunctionT) -> FunctionT:
    """The function, called again after each of RETRY_SECONDS while it raises an OSError that may pass."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for seconds in RETRY_SECONDS:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if not may_pass(error):
                    raise
            _sleep(seconds)
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
