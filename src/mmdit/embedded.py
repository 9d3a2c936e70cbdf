"""Where the embedded model is: the folder that `Pipeline.demo()` loads."""

from pathlib import Path
from typing import Final

EMBEDDED: Final = Path(__file__).parent / "demo" / "weights"
