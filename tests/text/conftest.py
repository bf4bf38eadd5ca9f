from __future__ import annotations

import pytest

from text.vocabularies import SCHEMES, Vocabulary, vocabulary


@pytest.fixture(params=SCHEMES)
def any_vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return vocabulary(request.param)


@pytest.fixture
def v3_vocabulary() -> Vocabulary:
    return vocabulary("deepseek-v3")
