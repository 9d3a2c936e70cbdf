"""The version of the distribution, in a file of its own so that nothing has to import the top for it."""

from typing import Final

__version__: Final = "0.1.0"
