"""CLIP, up close: how parts of an image match parts of a class description."""

import warnings

__version__ = "0.1.0"

warnings.filterwarnings("ignore", message="IProgress not found")  # open_clip imports tqdm's widgets; none are needed
