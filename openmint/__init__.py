"""Train and serve many LoRA policies over a few resident base models."""

from importlib.metadata import version

__version__ = version("openmint")
