"""JDM: one-step diffusion generators that learn new controls while they are distilled."""

__version__ = "0.2.0"
