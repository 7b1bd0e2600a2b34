"""Check that the weights in DIR fit its config.json: `python -m captioner.models DIR`. If not: exit code 1."""

from __future__ import annotations

import sys

from captioner.errors import ERROR, OK, ModelError
from captioner.models.checking import check_directory


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__)
        return ERROR
    try:
        check_directory(argv[0])
    except ModelError as error:
        print(error)
        return ERROR
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
