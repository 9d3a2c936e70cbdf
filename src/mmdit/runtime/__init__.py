"""Execution of a model: devices, precision, compilation, fast path and offloading; results stay the same."""
