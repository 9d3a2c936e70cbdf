"""The embedded model and its world: scenes of simple shapes, their captions, a scorer that reads pictures, tokenizers.

`EMBEDDED` is the model's folder, which `Pipeline.demo()` loads. Nothing else is imported here, so `import mmdit` stays
light: `from mmdit.demo import scenes, captions, score, vocab`.
"""

from pathlib import Path
from typing import Final

EMBEDDED: Final = Path(__file__).parent / "weights"
