"""What a rewrite refuses."""

from __future__ import annotations

from scripts.prepare_model.errors import PreparationError


class GraphNotUnderstood(PreparationError):
    """The exported graph has a form that the rewrite does not know; names the place."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"the exported graph is not understood at {where}: {what}")
        self.where, self.what = where, what
