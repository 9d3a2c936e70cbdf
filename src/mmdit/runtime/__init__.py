"""Execution of a model: devices, precision, compilation, fast path and offloading; never what it computes."""
