"""The two 8-bit floating point formats, in one table: their bits, torch's dtypes and the names that files use.

The formats are those of Micikevicius et al., "FP8 Formats for Deep Learning" (2022, arXiv 2209.05433, table 1), which
OCP's specification of 8-bit floating point took over. A code is sign S, exponent E, mantissa M:

    E4M3    S EEEE MMM    bias 7     no infinities; one NaN, all ones; the rest of exponent 15 are numbers, up to 448
    E5M2    S EEEEE MM    bias 15    as in IEEE 754, the upper byte of a float16; numbers up to 57344

    E > 0    (-1)^S * 2^(E - bias) * (1 + M / 2^mantissa_bits)    normal
    E = 0    (-1)^S * 2^(1 - bias) * (0 + M / 2^mantissa_bits)    subnormal, or zero
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch

Format = Literal["e4m3", "e5m2"]


@dataclass(frozen=True)
class Float8Format:
    """One format. The 128 codes without a sign bit are described; a code plus 128 is the negative of that code."""

    exponent_bits: int
    mantissa_bits: int
    largest_code: int  # the code of the largest finite number
    infinity_code: int | None
    nan_codes: range  # the last of them is the one that is written
    dtype: torch.dtype
    file_name: str  # the name in ComfyUI's quantization metadata

    def __post_init__(self) -> None:
        if self.exponent_bits + self.mantissa_bits != 7:
            raise ValueError(f"{self.exponent_bits} + {self.mantissa_bits} bits, expected 7 beside the sign")

    @property
    def bias(self) -> int:
        """The number that is added to an exponent before it is stored."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        exponent, mantissa = divmod(self.largest_code, 2**self.mantissa_bits)
        return math.ldexp(1 + mantissa / 2**self.mantissa_bits, exponent - self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number of full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)


FLOAT8_FORMATS: Final[dict[Format, Float8Format]] = {
    "e4m3": Float8Format(4, 3, 0x7E, None, range(0x7F, 0x80), torch.float8_e4m3fn, "float8_e4m3fn"),
    "e5m2": Float8Format(5, 2, 0x7B, 0x7C, range(0x7D, 0x80), torch.float8_e5m2, "float8_e5m2"),
}

# Columns of the table, and the way back from a dtype or from a file's name to the format.
DTYPES: Final[dict[Format, torch.dtype]] = {name: row.dtype for name, row in FLOAT8_FORMATS.items()}
LARGEST: Final[dict[Format, float]] = {name: row.largest for name, row in FLOAT8_FORMATS.items()}
FILE_NAMES: Final[dict[Format, str]] = {name: row.file_name for name, row in FLOAT8_FORMATS.items()}
FLOAT8: Final[tuple[torch.dtype, ...]] = tuple(DTYPES.values())
FORMAT_OF: Final[dict[torch.dtype, Format]] = {dtype: name for name, dtype in DTYPES.items()}
FORMAT_NAMED: Final[dict[str, Format]] = {file_name: name for name, file_name in FILE_NAMES.items()}
