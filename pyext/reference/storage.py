"""How tensors are kept in less memory, in plain PyTorch: stochastic rounding, correction bits, 8-bit blocks; noise.

Everything works on the bits of float32 numbers, held in int64 tensors, and equals csrc/formula/random.h and storage.h
bit for bit.  "Memory order" of a tensor: its elements as they lie in memory if it is dense, else in row-major order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
ROUNDING, NOISE = 1, 2  # purposes of random words: each has a stream of its own
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def philox(a: np.ndarray, b: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Philox-2x32-10 (Salmon et al. 2011) of counters (a, b), as uint64 arrays of 32-bit values."""
    for _ in range(10):
        product = a * np.uint64(0xD256D193)
        a, b = (product >> np.uint64(32)) ^ np.uint64(key) ^ b, product & np.uint64(_MASK32)
        key = (key + 0x9E3779B9) & _MASK32
    return a, b


def stream_key(seed: int, step: int, purpose: int) -> int:
    """The key that a seed, what a step has beyond 24 bits, and a purpose make: the finaliser of splitmix64."""
    x = (seed + 0x9E3779B97F4A7C15 * ((step >> 24) * 4 + purpose)) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x >> 32


def random_words(index: Tensor, *, seed: int, step: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (int64 tensors) for each element number; they depend on nothing else."""
    counter = index.numpy().astype(np.uint64)
    low = counter & np.uint64(_MASK32)
    high = (counter >> np.uint64(32)) & np.uint64(0xFF) | np.uint64((step & 0xFFFFFF) << 8)
    a, b = philox(low, high, stream_key(seed, step, purpose))
    return torch.from_numpy(np.asarray(a, np.int64)), torch.from_numpy(np.asarray(b, np.int64))


def memory_index(p: Tensor) -> Tensor:
    """Each element's place in memory order; int64, shaped like p."""
    dense = sorted((stride, size) for size, stride in zip(p.shape, p.stride()) if size != 1)
    expected = 1
    for stride, size in dense:
        if stride != expected:
            return torch.arange(p.numel()).reshape(p.shape)
        expected *= size
    return torch.arange(p.numel()).as_strided(p.shape, p.stride())


def bits(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & _MASK32


def from_bits(u: Tensor) -> Tensor:
    u = u & _MASK32
    return torch.where(u > 0x7FFFFFFF, u - (1 << 32), u).to(torch.int32).view(torch.float32)


# --- noise
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _polynomial(coefficients, x: Tensor) -> Tensor:
    value = _f32(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + _f32(c)
    return value


def log_of(x: Tensor) -> Tensor:
    """log of float32 x in [2^-126, 1] from float32 operations alone: 2 atanh((m - 1) / (m + 1)) + e log 2."""
    u = bits(x) - 0x3F3504F3
    e = (u >> 23).to(torch.float32)
    m = from_bits((u & 0x7FFFFF) + 0x3F3504F3)
    s = (m - 1) / (m + 1)
    series = _polynomial((0.2222222239, 0.2857142985, 0.4000000060, 0.6666666865, 2.0), s * s)
    return e * _f32(0.6931471825) + s * series


def normal(word: Tensor) -> Tensor:
    """Standard normals from 32-bit words: sqrt(2) erfinv((2 k + 1 - 2^23) / 2^23), k the upper 23 bits; Giles 2010."""
    x = (2 * (word >> 9) + 1 - (1 << 23)).to(torch.float32) * _f32(2.0**-23)
    w = -log_of((1 - x) * (1 + x))
    root = w.clamp(min=0).double().sqrt().float()
    p = torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, root - 3))
    return _f32(1.4142135624) * (p * x)


def noise_deviation(eta: float, gamma: float, step: int) -> float:
    """Annealed: the variance is eta / (1 + step)^gamma (Neelakantan et al. 2015)."""
    return (eta / (1.0 + step) ** gamma) ** 0.5


# --- rounding and splitting
def round_stochastic(x: Tensor, random16: Tensor) -> Tensor:
    """bfloat16: one of the two neighbours, the nearer the likelier; inf and NaN stay."""
    u = bits(x)
    rounded = from_bits((u + (random16 & 0xFFFF)) & 0xFFFF0000)
    return torch.where(x.float().isfinite(), rounded, x.float()).to(torch.bfloat16)


def join(high: Tensor, residual: Tensor) -> Tensor:
    """float32 from a bfloat16 and its int16 or int8 residual."""
    width = 8 * residual.element_size()
    rest = torch.where(high == 0, residual.clamp(min=0), residual).to(torch.int64)  # somebody may have zeroed it
    return from_bits(bits(high.float()) + (rest << (16 - width)))


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """bfloat16 and residual (int16: all of float32; int8: its upper 24 bits), each rounded to nearest, halves up."""
    width = 8 * dtype.itemsize
    u = torch.where(x.isnan(), 0x7FC00000, bits(x))
    dropped = 16 - width
    kept = (u + ((1 << dropped) >> 1)) >> dropped
    high = ((kept + (1 << (width - 1))) >> width) & 0xFFFF
    residual = kept - (high << width)
    # A negative number's bits reach beyond 2^31: the difference is taken modulo 2^(32 - dropped).
    span = 1 << (32 - dropped)
    residual = (residual + span // 2) % span - span // 2
    return from_bits(high << 16).to(torch.bfloat16), residual.to(dtype)


# --- 8-bit blocks
def _blocks(x: Tensor, index: Tensor) -> Tensor:
    """Memory order, padded with zeros to whole blocks: (blocks, 128)."""
    flat = torch.zeros(-(-x.numel() // BLOCK) * BLOCK, dtype=x.dtype)
    flat[index.reshape(-1)] = x.reshape(-1)
    return flat.view(-1, BLOCK)


def _like(blocks: Tensor, index: Tensor) -> Tensor:
    return blocks.reshape(-1)[index.reshape(-1)].reshape(index.shape)


def block8_exponents(x: Tensor, index: Tensor, magnitude: bool) -> Tensor:
    """uint8 biased exponent per block of 128: the largest magnitude's, a code up; 255 where not all are finite."""
    largest = (bits(_blocks(x.float(), index)) & 0x7FFFFFFF).amax(1)
    exponent = ((largest + 0xFFFFF) >> 23).clamp(33 if magnitude else 17, 254)
    return torch.where(largest >= 0x7F800000, 255, exponent).to(torch.uint8)


def block8_decode(codes: Tensor, exponents: Tensor, index: Tensor, magnitude: bool) -> Tensor:
    """float32 from codes (uint8, shaped like index) and their blocks' exponents."""
    code = codes.to(torch.int64)
    exponent = _like(exponents.to(torch.int64)[:, None].expand(-1, BLOCK), index)
    base = (exponent - (31 if magnitude else 15)) << 23
    body = code if magnitude else code & 0x7F
    value = from_bits(torch.where(body == 0, 0, (body << 20) + base))
    value = value if magnitude else torch.where(code >= 0x80, -value, value)
    return torch.where(exponent == 255, torch.nan, value)


def block8_encode(x: Tensor, exponents: Tensor, index: Tensor, magnitude: bool, random16: Tensor) -> Tensor:
    """uint8 codes: sign, 4 bits of exponent below the block's and 3 of significand; or 5 + 3; rounded at random."""
    exponent = _like(exponents.to(torch.int64)[:, None].expand(-1, BLOCK), index)
    full, random16 = bits(x), random16 & 0xFFFF
    u = full & 0x7FFFFFFF
    base = (exponent - (31 if magnitude else 15)) << 23
    smallest = base + (1 << 20)
    if magnitude:
        low = (u > 0).long()
    else:
        low = (from_bits(u) > random16.to(torch.float32) * _f32(2.0**-16) * from_bits(smallest)).long()
    code = ((u - base + (random16 << 4) + 8) >> 20).clamp(max=0xFF if magnitude else 0x7F)
    code = torch.where(u < smallest, low, code)
    code = code if magnitude else code | ((full >> 24) & 0x80)
    return torch.where(exponent == 255, 0, code).to(torch.uint8)
