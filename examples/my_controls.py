"""Your own control: copy this file, change `h`, and train with `--method.control my_controls.py:Posterize`."""

import torch
from torch import Tensor

from jdm.controls import Control


class Posterize(Control):
    """c = grey posterised to four levels: 0, 1/3, 2/3 and 1, with soft steps between them.

    A hard step has no gradient to learn from; a sum of sigmoids has one. If h cannot be softened like this,
    keep it hard and override `log_prob`, as jdm.controls.Canny does.
    """

    name = "posterize"
    channels = 1  # 1 or 3
    softness = 0.03  # width of a step, in units of grey

    def h(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> c [B, 1, H, W] in [0, 1]. Torch only: numpy has no gradient."""
        red, green, blue = images.unbind(1)
        grey = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        return sum(torch.sigmoid((grey - step) / self.softness) for step in (0.25, 0.5, 0.75)) / 3
