"""The embedded model's world: scenes of simple shapes, captions, a scorer that reads pictures, tokenizers, training."""

from mmdit.embedded import EMBEDDED

__all__ = ["EMBEDDED"]
