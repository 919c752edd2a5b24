"""What a person can get wrong here, as one line.

PoliciesError
"""

from __future__ import annotations


class PoliciesError(Exception):
    """The computation can't be done as asked."""
