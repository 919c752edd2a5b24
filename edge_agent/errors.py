"""The errors of an agent, one tree.

AgentError
├── BundleInvalid          a model bundle is missing, truncated, or of a version this agent does not know
├── ModelUnsupported       the exported graph lacks an input or output the agent needs, or the cache does not fit it
├── ModelFailed            a run of the model failed (out of memory, say)
├── MemoryShort            a buffer for a context would not fit the free memory
├── ContextTooLong         the tokens do not fit the model's window
├── ContextEmpty           there is nothing to prefill
├── ContextUnknown         no context of that id or name is held
├── BudgetExceeded         a cache does not fit the cache budget, or not beside what is in use
├── SpillFailed            a cache could not be written to disk, or the folder for them can't be used
├── PartFailed             neither a transfer nor any holder of its text brought a context
├── RecipeInvalid          bits outside 1-8, an unknown rung
├── CacheInvalid           a cache holds a NaN or an infinity, or its shapes disagree
├── CalibrationInvalid     a calibration is damaged, of another version, or not for these models
└── PayloadRejected        received bytes are not a payload this agent can use; names the field
    └── WrongModel         the payload was made by another model
"""

from __future__ import annotations


class AgentError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class BundleInvalid(AgentError):
    """A model bundle can't be used."""


class ModelUnsupported(AgentError):
    """The exported graph lacks something, or is asked for something it can't do."""


class ModelFailed(AgentError):
    """A run of the model failed."""


class MemoryShort(AgentError):
    """A buffer would not fit the memory that is free."""

    def __init__(self, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"a context's buffer of {wanted_bytes / 1e6:.0f} MB does not fit the {free_bytes / 1e6:.0f} MB of memory "
            "that are free; ask with shorter contexts or fewer of them"
        )
        self.wanted_bytes, self.free_bytes = wanted_bytes, free_bytes


class ContextTooLong(AgentError):
    """Tokens do not fit the model's window."""

    def __init__(self, tokens: int, window: int) -> None:
        super().__init__(f"{tokens} tokens do not fit the model's window of {window}; shorten or split the context")
        self.tokens, self.window = tokens, window


class ContextEmpty(AgentError):
    """There is nothing to prefill."""


class ContextUnknown(AgentError):
    """No such context is held."""


class BudgetExceeded(AgentError):
    """A single cache is larger than the whole budget."""


class SpillFailed(AgentError):
    """A cache could not be written to disk."""


class PartFailed(AgentError):
    """Neither the transfer nor any holder of the text brought the context."""


class RecipeInvalid(AgentError, ValueError):
    """A recipe or rung that does not exist, or bits outside 1-8."""


class CacheInvalid(AgentError, ValueError):
    """A cache holds a NaN or an infinity, or its shapes disagree."""


class CalibrationInvalid(AgentError):
    """A calibration between two models can't be made, written or used."""


class PayloadRejected(AgentError):
    """Received bytes are not a payload that can be used here. `field` names what is wrong."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"payload refused, {field}: {why}")
        self.field, self.why = field, why


class WrongModel(PayloadRejected):
    """The payload was made by another model."""

    def __init__(self, theirs: str, ours: str) -> None:
        super().__init__("fingerprint", f"made by model {theirs}, this agent runs {ours}")
        self.theirs, self.ours = theirs, ours
