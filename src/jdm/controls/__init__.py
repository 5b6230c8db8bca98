"""Controls: measurements h that the teacher never knew."""

from jdm.controls.base import Control, checked, load_control
from jdm.controls.canny import Canny

__all__ = ["Canny", "Control", "checked", "load_control"]
