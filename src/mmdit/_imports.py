"""Importing torch without the garbage collector."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import torch and what needs it without garbage collections, and leave all that is alive then out of later ones.

    The imports make 300,000 objects that stay until the end. Collections that walk over them are a fifth of the time
    from the start of Python to a loaded model. Where torch is there already, or nothing is collected, nothing changes.

    `gc.freeze` knows no parts: objects that the caller made before the import stay out of later collections too. Those
    without cycles are freed as ever; cycles among them are freed only after `gc.unfreeze()`.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if "torch" in sys.modules:
            gc.freeze()
        gc.enable()
