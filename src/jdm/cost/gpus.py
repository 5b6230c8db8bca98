"""GPUs by name, with the numbers of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet.

    By PyTorch's defaults float32 convolutions run in TF32 and float32 products do not.

    Attributes:
        memory: bytes, as the driver reports them.
        bfloat16, tf32, float32: peak dense FLOP/s.
    """

    name: str
    memory: float
    bfloat16: float
    tf32: float
    float32: float

    def rate(self, kind: str) -> float:
        """Peak FLOP/s of a kind of arithmetic, named as in `Meter.flops`."""
        if kind.endswith("16"):
            return self.bfloat16
        return self.tf32 if kind.startswith("convolution") else self.float32


GIB = 2.0**30
GPUS = {
    "4080": GPU("RTX 4080", 16.0 * GIB, 97.5e12, 48.7e12, 48.7e12),
    "4090": GPU("RTX 4090", 24.0 * GIB, 165e12, 82.6e12, 82.6e12),
    "5090": GPU("RTX 5090", 31.8 * GIB, 209.5e12, 104.8e12, 104.8e12),
    "l40s": GPU("L40S", 45.0 * GIB, 362e12, 183e12, 91.6e12),
    "a100": GPU("A100 80 GB SXM", 80.0 * GIB, 312e12, 156e12, 19.5e12),
    "h100": GPU("H100 80 GB SXM", 79.6 * GIB, 989e12, 494e12, 67e12),
    "h200": GPU("H200 141 GB SXM", 140.4 * GIB, 989e12, 494e12, 67e12),
}
