"""The key of the model servers. It is in no record, log or error."""

from __future__ import annotations

import os
from dataclasses import dataclass

from captioner.errors import UsageError

VARIABLES = ("CAPTIONER_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, repr=False)
class ApiKey:
    """A key, or "" for none. Its `repr` does not show it."""

    value: str = ""

    @classmethod
    def from_environment(cls) -> ApiKey:
        """Return the key of CAPTIONER_API_KEY, else of OPENAI_API_KEY. Raises UsageError where it is not a key."""
        for name in VARIABLES:
            value = os.environ.get(name, "").strip()
            if value:
                if not value.isascii() or not value.isprintable() or " " in value:
                    raise UsageError(f"{name}: holds characters that no key has; set it again")
                return cls(value)
        return cls()

    def __repr__(self) -> str:
        return f"ApiKey({'***' if self.value else ''})"

    def headers(self) -> dict[str, str]:
        """Return the header that a request carries."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}

    def hidden_in(self, text: str) -> str:
        """Return the text of a server without the key, which some servers repeat."""
        return text.replace(self.value, "***") if self.value else text
