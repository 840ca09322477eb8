"""XXH64 without the extension: by the package xxhash where it is installed, else in Python."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

_xxhash: Any
try:
    import xxhash as _xxhash
except ImportError:
    _xxhash = None

_MASK = 0xFFFFFFFFFFFFFFFF
_PRIME1, _PRIME2, _PRIME3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME4, _PRIME5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_STRIPE = 32
# Of so many words Python makes integers at a time.
_BLOCK_BYTES = 1 << 16


class Hash(Protocol):
    """What hashes."""

    def update(self, data: Any, /) -> None: ...
    def intdigest(self) -> int: ...
    def hexdigest(self) -> str: ...


def XXH64(seed: int = 0) -> Hash:  # noqa: N802 (a class in the extension)
    """Return the 64-bit xxHash, streaming."""
    if _xxhash is None:
        return PythonXXH64(seed)
    found: Hash = _xxhash.xxh64(seed=seed)
    return found


class PythonXXH64:
    """The 64-bit xxHash, streaming, in Python; written from its public specification."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        lanes = seed + _PRIME1 + _PRIME2, seed + _PRIME2, seed, seed - _PRIME1
        self._lanes = [lane & _MASK for lane in lanes]
        self._rest = b""
        self._total = 0

    def update(self, data: Any) -> None:
        """Hash a contiguous buffer."""
        view = np.frombuffer(data, np.uint8).data
        self._total += len(view)
        missing = _STRIPE - len(self._rest)
        if len(view) < missing:
            self._rest += view
            return
        if self._rest:
            self._consume(memoryview(self._rest + view[:missing]))
            view = view[missing:]
        whole = len(view) // _STRIPE * _STRIPE
        for begin in range(0, whole, _BLOCK_BYTES):
            self._consume(view[begin : min(whole, begin + _BLOCK_BYTES)])
        self._rest = bytes(view[whole:])

    def _consume(self, stripes: memoryview) -> None:
        words = np.frombuffer(stripes, "<u8").reshape(-1, 4) * np.uint64(_PRIME2)  # modulo 2^64, as all that follows
        for number, lane in enumerate(self._lanes):
            for word in words[:, number].tolist():
                lane = lane + word & _MASK
                lane = (lane << 31 | lane >> 33) * _PRIME1 & _MASK
            self._lanes[number] = lane

    def intdigest(self) -> int:
        """Return the hash of what has come."""
        found = self._seed + _PRIME5
        if self._total >= _STRIPE:
            found = sum(_rotate(lane, bits) for lane, bits in zip(self._lanes, (1, 7, 12, 18), strict=True))
            for lane in self._lanes:
                found = (found ^ _round(lane * _PRIME2)) * _PRIME1 + _PRIME4
        found = found + self._total & _MASK
        rest = self._rest
        while len(rest) >= 8:
            found = _rotate(found ^ _round(int.from_bytes(rest[:8], "little") * _PRIME2), 27) * _PRIME1 + _PRIME4
            rest = rest[8:]
        if len(rest) >= 4:
            found = _rotate(found ^ int.from_bytes(rest[:4], "little") * _PRIME1, 23) * _PRIME2 + _PRIME3
            rest = rest[4:]
        for byte in rest:
            found = _rotate(found ^ byte * _PRIME5, 11) * _PRIME1
        found &= _MASK
        found = (found ^ found >> 33) * _PRIME2 & _MASK
        found = (found ^ found >> 29) * _PRIME3 & _MASK
        return found ^ found >> 32

    def hexdigest(self) -> str:
        """Return it as 16 hexadecimal digits."""
        return f"{self.intdigest():016x}"


def _rotate(x: int, bits: int) -> int:
    x &= _MASK
    return (x << bits | x >> 64 - bits) & _MASK


def _round(product: int) -> int:
    return _rotate(product, 31) * _PRIME1 & _MASK
