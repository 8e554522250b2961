"""Which source line an instruction of a compiled kernel came from: DWARF 4 line tables."""

import bisect
import struct
from collections.abc import Iterator
from pathlib import Path

_FIXED_LENGTH = (
    12  # unit_length is 32-bit: 4; version 2; header_length 4; minimum length 1; maximum operations 1
)


class LineTable:
    """Addresses of one shared library, sorted, with their lines; 0 is no line of the unit."""

    def __init__(self, library: Path) -> None:
        rows = sorted(_rows(_section(library.read_bytes(), b".debug_line")))
        self._addresses = [address for address, _ in rows]
        self._lines = [line for _, line in rows]

    def line(self, address: int) -> int:
        """The line of the instruction before ``address``, where a call returns to; 0 if unknown."""
        index = bisect.bisect_right(self._addresses, address - 1) - 1
        while index >= 0 and self._lines[index] == 0:
            index -= 1
        return self._lines[index] if index >= 0 else 0


def _section(elf: bytes, name: bytes) -> bytes:
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        if elf[start : elf.index(b"\0", start)] == name:
            return elf[header[4] : header[4] + header[5]]
    return b""


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def fixed(self, form: str) -> int:
        value: int = struct.unpack_from("<" + form, self.data, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return value

    def string(self) -> bytes:
        end = self.data.index(b"\0", self.at)
        value, self.at = self.data[self.at : end], end + 1
        return value

    def unsigned(self) -> int:
        result = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return result

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _rows(section: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(section):
        length = struct.unpack_from("<I", section, at)[0]
        yield from _program_rows(section, at, at + 4 + length)
        at += 4 + length


def _program_rows(section: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """The rows of one line-number program (DWARF 4, section 6.2)."""
    reader = _Reader(section, at + 6)
    header_length = reader.fixed("I")
    start = reader.at + header_length
    minimum, _, _, line_base, line_range, opcode_base = (
        reader.fixed(f) for f in ("B", "B", "B", "b", "B", "B")
    )
    operand_counts = [reader.fixed("B") for _ in range(opcode_base - 1)]
    while reader.string():
        pass
    files = []
    while name := reader.string():
        files.append(name)
        for _ in range(3):
            reader.unsigned()
    reader.at = start
    address, line, file = 0, 1, 1

    def row() -> tuple[int, int]:
        in_unit = 0 < file <= len(files) and files[file - 1].endswith((b"<stdin>", b"-"))
        return address, line if in_unit else 0

    while reader.at < end:
        opcode = reader.fixed("B")
        if opcode >= opcode_base:
            step = opcode - opcode_base
            address += step // line_range * minimum
            line += line_base + step % line_range
            yield row()
        elif opcode == 0:
            size = reader.unsigned()
            following = reader.at + size
            extended = reader.fixed("B")
            if extended == 1:
                yield row()
                address, line, file = 0, 1, 1
            elif extended == 2:
                address = reader.fixed("Q")
            reader.at = following
        elif opcode == 1:
            yield row()
        elif opcode == 2:
            address += reader.unsigned() * minimum
        elif opcode == 3:
            line += reader.signed()
        elif opcode == 4:
            file = reader.unsigned()
        elif opcode == 8:
            address += (255 - opcode_base) // line_range * minimum
        elif opcode == 9:
            address += reader.fixed("H")
        else:
            for _ in range(operand_counts[opcode - 1]):
                reader.unsigned()
