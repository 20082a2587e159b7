"""The encoder: pictures, crops and sentences to unit vectors, with any open_clip model."""

from upclose.encode.encoder import Encoder, bf16_on_cpu, embed_text, identity, load

__all__ = ["Encoder", "bf16_on_cpu", "embed_text", "identity", "load"]
