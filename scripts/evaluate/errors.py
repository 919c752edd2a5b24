"""The errors of an evaluation, one tree.

EvaluationError
├── DataInvalid              a file of questions can't be read, or holds none that could be asked
├── JobLost                  a process of several ended unexpectedly
├── MethodUnknown            no recipe of that name
├── ExtraMissing             a package is not installed
├── PairUnfit                no calibration makes one model's caches the other's, or they are one model
├── ResultsInvalid           results on disk are damaged, of another run, in use, or can't be written
└── EmbeddingsUnavailable    the sentence embedding model can't be had
"""

from __future__ import annotations


class EvaluationError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class DataInvalid(EvaluationError):
    """A file of questions can't be used at all."""


class ExtraMissing(EvaluationError):
    """A package that evaluations need is not installed."""


class JobLost(EvaluationError):
    """A process of several ended unexpectedly."""


class MethodUnknown(EvaluationError):
    """There is no method of that name."""


class PairUnfit(EvaluationError):
    """Two models can't be evaluated together."""


class ResultsInvalid(EvaluationError):
    """The directory of results can't be used as it is, or not written."""


class EmbeddingsUnavailable(EvaluationError):
    """The sentence embedding model can't be fetched or loaded."""
