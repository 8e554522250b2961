"""Which source line an instruction of a compiled kernel came from: DWARF 4 line tables."""

import bisect
import struct
from collections.abc import Iterator
from pathlib import Path


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
    minimum, _, _, line_base, line_range, opcode_base = (reader.fixed(f) for f in ("B", "B", "B", "b", "B", "B"))
    operand_counts = [reader.fixed("B") for _ in range(opcode_base - 1)]
    files = _file_names(reader)
    reader.at = start
    machine = _Machine(files)
    while reader.at < end:
        opcode = reader.fixed("B")
        if opcode >= opcode_base:
            step = opcode - opcode_base
            machine.address += step // line_range * minimum
            machine.line += line_base + step % line_range
            yield machine.row()
        elif opcode == _COPY:
            yield machine.row()
        elif opcode == 0:
            yield from machine.extended(reader)
        elif opcode == _CONST_ADD_PC:
            machine.address += (255 - opcode_base) // line_range * minimum
        else:
            machine.standard(opcode, reader, minimum, operand_counts[opcode - 1])


def _file_names(reader: _Reader) -> list[bytes]:
    while reader.string():  # the include directories
        pass
    files = []
    while name := reader.string():
        files.append(name)
        for _ in range(3):  # directory, time and length
            reader.unsigned()
    return files


_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE, _CONST_ADD_PC, _FIXED_ADVANCE_PC = 1, 2, 3, 4, 8, 9
_END_SEQUENCE, _SET_ADDRESS = 1, 2


class _Machine:
    """The registers of the line-number state machine."""

    def __init__(self, files: list[bytes]) -> None:
        self._of_unit = [name.endswith((b"<stdin>", b"-")) for name in files]
        self._reset()

    def _reset(self) -> None:
        self.address, self.line, self._file = 0, 1, 1

    def row(self) -> tuple[int, int]:
        in_unit = 0 < self._file <= len(self._of_unit) and self._of_unit[self._file - 1]
        return self.address, self.line if in_unit else 0

    def extended(self, reader: _Reader) -> Iterator[tuple[int, int]]:
        size = reader.unsigned()
        following = reader.at + size
        opcode = reader.fixed("B")
        if opcode == _END_SEQUENCE:
            yield self.row()
            self._reset()
        elif opcode == _SET_ADDRESS:
            self.address = reader.fixed("Q")
        reader.at = following

    def standard(self, opcode: int, reader: _Reader, minimum: int, operands: int) -> None:
        if opcode == _ADVANCE_PC:
            self.address += reader.unsigned() * minimum
        elif opcode == _ADVANCE_LINE:
            self.line += reader.signed()
        elif opcode == _SET_FILE:
            self._file = reader.unsigned()
        elif opcode == _FIXED_ADVANCE_PC:
            self.address += reader.fixed("H")
        else:
            for _ in range(operands):
                reader.unsigned()
