"""Numbers by the definitions of their formats, in exact arithmetic: what instructions are compared with."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """Sign, exponent and fraction bits. `largest` is the largest finite number, `nan` the result of a NaN."""

    exponent_bits: int
    fraction_bits: int
    largest: Fraction
    nan: int

    def round(self, value: Fraction, negative: bool, saturate: bool = False) -> int:
        """The nearest code, ties to even; beyond the largest number infinity, or that number."""
        bias = (1 << (self.exponent_bits - 1)) - 1
        sign = negative << (self.exponent_bits + self.fraction_bits)
        magnitude = abs(value)
        smallest_exponent = 1 - bias
        exponent = smallest_exponent
        while magnitude >= Fraction(2) ** (exponent + 1):
            exponent += 1
        ulps = round(magnitude / Fraction(2) ** (exponent - self.fraction_bits))  # ties to even
        rounded = ulps * Fraction(2) ** (exponent - self.fraction_bits)
        if rounded > self.largest:
            return sign | (self.code_of_largest() if saturate else self.infinity())
        # A carry into the next exponent is a carry of the code.
        return sign | ((exponent - smallest_exponent) << self.fraction_bits) + ulps

    def infinity(self) -> int:
        """Its code, without sign."""
        return ((1 << self.exponent_bits) - 1) << self.fraction_bits

    def code_of_largest(self) -> int:
        """Without sign."""
        return self.round(self.largest, False)

    def convert(self, bits: int, saturate: bool = False) -> int:
        """From the bits of a float32."""
        value = f32(bits)
        if math.isnan(value):
            return self.nan
        negative = bool(bits >> 31)
        if math.isinf(value):
            sign = negative << (self.exponent_bits + self.fraction_bits)
            return sign | (self.code_of_largest() if saturate else self.infinity())
        return self.round(Fraction(value), negative, saturate)


F32 = Format(8, 23, Fraction(2**24 - 1) * 2**104, 0x7FFFFFFF)
F16 = Format(5, 10, Fraction(65504), 0x7FFF)
BF16 = Format(8, 7, Fraction(2**8 - 1) * 2**120, 0x7FFF)
E4M3 = Format(4, 3, Fraction(448), 0x7F)
E5M2 = Format(5, 2, Fraction(57344), 0x7F)


def f32(bits: int) -> float:
    """The number that float32 bits stand for."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def f64(bits: int) -> float:
    """The number that float64 bits stand for."""
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def f16(bits: int) -> float:
    """The number that float16 bits stand for."""
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def bits64(value: float) -> int:
    """The bits of a float64; of the GPU's NaN for NaN."""
    if math.isnan(value):
        return 0x7FFFFFFFFFFFFFFF
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


def bits32(value: float | Fraction, negative_zero: bool = False) -> int:
    """The float32 nearest to an exact value; of the GPU's NaN for NaN."""
    if isinstance(value, float):
        if math.isnan(value):
            return F32.nan
        if math.isinf(value):
            return (value < 0) << 31 | F32.infinity()
        negative_zero = math.copysign(1, value) < 0
    return F32.round(Fraction(value), value < 0 or (value == 0 and negative_zero))
