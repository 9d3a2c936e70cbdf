"""A check that the host runs ahead of a GPU."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting(device="cuda"):
    """Whatever makes the host wait for the GPU, an event aside, is an error; a CPU is not checked."""
    if torch.device(device).type == "cpu":
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
