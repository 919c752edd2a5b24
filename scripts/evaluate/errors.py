"""The errors of an evaluation, one tree.

EvaluationError
├── DataInvalid              a file of questions can't be read, or holds none that could be asked
├── ItemUnfit                a question can't be asked of this model: its context is too long for the window
├── MethodUnknown            no recipe of that name
├── ResultsInvalid           results on disk are damaged, of another run, in use, or can't be written
└── EmbeddingsUnavailable    the sentence embedding model can't be had
"""

from __future__ import annotations


class EvaluationError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class DataInvalid(EvaluationError):
    """A file of questions can't be used at all."""


class ItemUnfit(EvaluationError):
    """A question can't be asked of this model."""


class MethodUnknown(EvaluationError):
    """There is no method of that name."""


class ResultsInvalid(EvaluationError):
    """The directory of results can't be used as it is, or not written."""


class EmbeddingsUnavailable(EvaluationError):
    """The sentence embedding model can't be fetched or loaded."""
