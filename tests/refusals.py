"""What cannot be loaded as a model, and the one line that says so."""

import pytest

from jdm.errors import UsageError
from jdm.library import load_model


def refused(name, message: str) -> None:
    """Asserts that loading this file or folder ends in one line that matches the message."""
    with pytest.raises(UsageError, match=message) as caught:
        load_model(str(name))
    assert "\n" not in str(caught.value)
