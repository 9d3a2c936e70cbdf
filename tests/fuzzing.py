"""What the fuzzers share: how long they run, seeds that failures can be repeated with, and broken values."""

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from full import FULL

SECONDS = float(os.environ.get("MMDIT_FUZZ_SECONDS", "8" if FULL else "0.25"))  # of each fuzzer
SLOW = 5.0  # seconds that one small input may take, on a machine with other work

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 8, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1e300, True, False),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    "",
    "a",
    "a\0b",
    "\u202e",
    "x" * 5000,
    [],
    {},
    [None],
    [[[]]],
    {"a": {}},
    [2**62] * 3,
)


def cases(least: int = 1) -> Iterator[tuple[int, random.Random]]:
    """Seeds and their random generators, at least so many, until the time is over; MMDIT_FUZZ_SEED runs one alone."""
    if (alone := os.environ.get("MMDIT_FUZZ_SEED")) is not None:
        yield int(alone), random.Random(int(alone))
        return
    end, seed = time.monotonic() + SECONDS, 0
    while seed < least or time.monotonic() < end:
        yield seed, random.Random(seed)
        seed += 1


def survives(call: Callable[[], object], allowed: tuple[type[Exception], ...], seed: object) -> bool:
    """Whether `call` succeeds; it may raise what is allowed, soon and in few words, and nothing else."""
    began = time.process_time()
    try:
        call()
        return True
    except allowed as error:
        if len(str(error)) > 20_000:
            pytest.fail(f"input {seed}: a message of {len(str(error))} characters")
        return False
    except Exception as error:
        raise AssertionError(f"input {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        if (taken := time.process_time() - began) > SLOW:
            pytest.fail(f"input {seed} took {taken:.1f} s")


def mutated(value: Any, random: random.Random) -> Any:
    """A JSON value with one place changed: replaced, left out, doubled, or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice([*value])
        found = dict(value)
        match random.randrange(5):
            case 0:
                del found[key]
            case 1:
                found[random.choice(("", "a", key + "x", key[:-1], "__metadata__"))] = found.pop(key)
            case _:
                found[key] = mutated(found[key], random)
        return found
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        return [*value[:place], mutated(value[place], random), *value[place + random.randrange(2) :]]
    return random.choice(VALUES)
