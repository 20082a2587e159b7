"""CLIP, up close: how parts of an image match parts of a class description."""

__version__ = "0.1.0"
