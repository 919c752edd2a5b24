"""Models for all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from edge_agent.errors import BundleInvalid
from scripts.prepare_model import PreparationError, default_bundle, prepare
from tests import tiny

# Whether a property holds does not depend on how busy the machine is.
settings.register_profile("kvbus", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("kvbus")

# Started in the background of a script, we and all we start would ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """A random Llama of 3 layers with 2 KV heads of 16, window 1,024, as a bundle."""
    return tiny.tiny_bundle()


@pytest.fixture(scope="session")
def other_tiny_bundle() -> Path:
    """Another random Llama of the same shape: same tokenizer, other weights."""
    return tiny.tiny_bundle(seed=tiny.SEED + 1)


@pytest.fixture(scope="session")
def tiny_gemma_bundle() -> Path:
    """A random Gemma 3 of the same shape, whose first and last layer have a sliding window, as a bundle."""
    return tiny.tiny_gemma_bundle()


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The real SmolLM2 bundle. Mark tests that ask for it with `bundle`."""
    try:
        return default_bundle()
    except BundleInvalid as error:
        pytest.fail(f"{error} (or leave these tests out with -m 'not bundle')")


@pytest.fixture(scope="session")
def exact_bundle() -> Path:
    """The real SmolLM2 with float32 weights, for claims that hold up to rounding. Mark tests with `bundle`."""
    try:
        return prepare(None, weights="fp32").path
    except PreparationError as error:
        pytest.fail(f"{error} (or leave these tests out with -m 'not bundle')")
