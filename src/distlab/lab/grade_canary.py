"""Tests that must fail. Where one passes, the student's code has changed the test tools."""

from types import ModuleType

import numpy as np
import pytest


def test_canary_assert(student: ModuleType) -> None:
    assert not student


def test_canary_raises(student: ModuleType) -> None:
    with pytest.raises(ValueError, match="never raised"):
        pass


def test_canary_approx(student: ModuleType) -> None:
    assert pytest.approx(2.0) == 1.0


def test_canary_allclose(student: ModuleType) -> None:
    np.testing.assert_allclose(np.ones(2), np.zeros(2))


def test_canary_numpy(student: ModuleType) -> None:
    assert np.abs(np.ones(2) - np.zeros(2)).max() < 1e-9
