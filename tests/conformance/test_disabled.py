# SPDX-License-Identifier: MIT
"""The store that keeps nothing is no store: only its own promise is tested."""

from __future__ import annotations

import time

import pytest

from miniq.backends.base import StoredResult, backend_class
from miniq.exceptions import ImproperlyConfigured


def test_disabled_backend_takes_everything_and_has_nothing() -> None:
    backend = backend_class("disabled://")("disabled://", {"any": 1}, time.time)
    assert backend.enabled is False
    backend.store([StoredResult("a", "SUCCESS", b"", "", "", None)])
    assert backend.fetch(["a"]) == {}
    assert list(backend.wait(["a"], None)) == []
    backend.forget(["a"])
    assert backend.expire() == 0
    assert not backend.counts_chords
    with pytest.raises(ImproperlyConfigured, match="group 'g'.*no result backend is configured"):
        backend.save_group("g", b"{}", None)
    backend.close()
