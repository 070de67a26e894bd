"""The libraries that the benchmarks compare with."""

import warnings

import pytest


def optional(name):
    """An optional rival, imported without the warnings of its own import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
