"""Users' files as arrays, and arrays as users' files: what domains and the preparation of sets share.

A form says how the raw data of a domain are brought to one kind of record; the preparation's options come from its
fields.
"""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field of a form, with what `--help` says of it."""
    return field(default=default, metadata={"help": text})
