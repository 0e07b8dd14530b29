"""A byte string as a sequence of decisions."""

from __future__ import annotations

TOP = 2**64 - 1
EDGES = (0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 2**31, 2**32 - 1, 2**32, 2**47, 2**48, 2**62, 2**63 - 65536,
         2**63 - 1, 2**63, 2**63 + 1, TOP - 65536, TOP - 65535, TOP - 4096, TOP - 4095, TOP, TOP + 1, -1, -2**63)


class Choices:
    """Reads `data` from its begin. After the end of `data`, every decision is the first choice.

    atheris has such a class (FuzzedDataProvider), but the corpus is also replayed without atheris and must have the
    same meaning there.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, most: int) -> bytes:
        taken = self.data[self.at:self.at + most]
        self.at += len(taken)
        return taken

    def byte(self) -> int:
        return self.bytes(1)[0] if self.more else 0

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def below(self, n: int) -> int:
        return self.unsigned((n - 1).bit_length() + 7 >> 3) % n

    def pick(self, things):
        return things[self.below(len(things))]

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def number(self) -> int:
        """Any integer of about 64 bits: mostly small numbers and numbers near a limit."""
        kind = self.byte()
        if kind < 96:
            return kind
        if kind < 160:
            return self.unsigned(2)
        if kind < 224:
            return self.pick(EDGES) + self.byte() % 5 - 2
        return self.unsigned(8)

    def word(self) -> int:
        return self.number() & TOP
