"""Keys of the counter-based generator."""

from __future__ import annotations

import hashlib


class Key:
    """A 64-bit Philox key for `seed` and a stream of names and numbers.

    `Key(seed, "noise", epoch)` always is the same key, and another stream an unrelated one. What
    is drawn under a key depends on it and on the counters alone: not on the device, the batch,
    the process or what was drawn before.

    Args:
        seed: any integer.
        stream: strings and integers.

    Raises:
        TypeError: for a seed or a word of the stream of another type.
    """

    def __init__(self, seed: int, *stream: int | str):
        for word in (seed, *stream):
            if isinstance(word, bool) or not isinstance(word, int | str):
                raise TypeError(f"Key: seed and stream must be integers and strings, got {word!r}")
        if isinstance(seed, str):
            raise TypeError(f"Key: seed must be an integer, got {seed!r}")
        text = repr((seed, *stream)).encode()
        self.value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self.words = (seed, *stream)

    @property
    def signed(self) -> int:
        """The 64 bits as a signed integer, which is what an op's schema takes."""
        return self.value - (1 << 64) if self.value >> 63 else self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"Key({', '.join(map(repr, self.words))})"
