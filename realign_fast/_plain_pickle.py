"""`scan_pickle` without the extension: the rules of csrc/pickle_scan.cpp, which says why, in its order and words."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NoReturn

_MAX_DEPTH = 32
# Longer numbers than this are no data; CPython converts decimal ones in quadratic time.
_MAX_NUMBER_BYTES = 64

_PLAIN, _STRING, _GLOBAL, _TUPLE, _LIST, _DICT, _OBJECT = range(7)
# Values without depth that never change share one node a kind: its number is the kind.
_KEYS = (_PLAIN, _STRING, _OBJECT)
_UNSET = 0xFFFFFFFF


def scan_pickle(data: Any) -> None:
    """Walk the opcodes of a pickle without running it; ValueError, naming the byte, where it is not plain data."""
    _Scanner(data if isinstance(data, bytes) else bytes(memoryview(data))).run()


class _Scanner:
    """Values are numbers of nodes, in few bytes each: a hostile pickle makes one a byte."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._opcode_at = 0
        self._kinds = bytearray((_PLAIN, _STRING, _GLOBAL))
        self._depths = bytearray(3)  # levels of containers, itself included
        self._contained = bytearray(3)  # it lies in another container and may not change any more
        self._stack = array("I")
        self._marks = array("Q")
        self._memo = array("I")
        self._num_puts = 0

    def run(self) -> None:
        data, steps = self._data, _STEPS
        opcode = None
        while opcode != _STOP:
            self._opcode_at = self._position
            if self._position == len(data):
                self._fail("truncated: the pickle does not end")
            opcode = data[self._position]
            self._position += 1
            step = steps.get(opcode)
            if step is None:
                self._fail(f"opcode 0x{opcode:02x}, which plain values and NumPy arrays do not need")
            step(self)
        if self._position != len(data):
            self._fail("bytes follow its end (more than one pickle in a file?)")

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(f"byte {self._opcode_at}: {what}")

    def _left(self) -> int:
        return len(self._data) - self._position

    def _skip(self, count: int) -> None:
        if count > self._left():
            self._fail(f"truncated: expected {count} more bytes, found {self._left()}")
        self._position += count

    def number(self, num_bytes: int) -> int:
        begin = self._position
        self._skip(num_bytes)
        return int.from_bytes(self._data[begin : self._position], "little")

    def line(self) -> tuple[int, int]:
        """Return where a line begins and ends, and go behind it."""
        begin, end = self._position, self._data.find(b"\n", self._position)
        if end < 0:
            self._fail("truncated: a line does not end")
        self._position = end + 1
        return begin, end

    def index_line(self) -> int:
        begin, end = self.line()
        digits = self._data[begin : min(end, begin + 11)]
        if not digits.isdigit() or len(digits) > 10:  # of bytes, 0 to 9 alone are digits
            self._fail("a memo index is no number")
        return int(digits)

    def push(self, node: int) -> None:
        self._stack.append(node)

    def push_skipping(self, node: int, num_bytes: int) -> None:
        self._skip(num_bytes)
        self._stack.append(node)

    def push_new(self, kind: int, depth: int) -> None:
        self._check_depth(depth)
        if len(self._kinds) == _UNSET:
            self._fail("too many containers")
        self._stack.append(len(self._kinds))
        self._kinds.append(kind)
        self._depths.append(depth)
        self._contained.append(False)

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self._fail(f"nested deeper than {_MAX_DEPTH} levels")

    def last(self, count: int) -> int:
        """Return where the `count` topmost values above the last mark begin."""
        if len(self._stack) < (self._marks[-1] if self._marks else 0) + count:
            self._fail("takes values where there are none")
        return len(self._stack) - count

    def top(self) -> int:
        return self._stack[self.last(1)]

    def pop(self) -> int:
        self.last(1)
        return self._stack.pop()

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_mark(self) -> int:
        if not self._marks:
            self._fail("no mark to go back to")
        return self._marks.pop()

    def contain(self, begin: int) -> int:
        """Take the values from there on, which become contents of a container; return the depth of that container."""
        depth = 0
        for node in self._stack[begin:]:
            self._contained[node] = True
            depth = max(depth, self._depths[node])
        del self._stack[begin:]
        return depth + 1

    def contain_items(self, begin: int) -> int:
        """As `contain`, for keys and values in turn.

        A tuple of tuples that repeat is small, but hashing it as a key is not.
        """
        if any(self._kinds[node] not in _KEYS for node in self._stack[begin::2]):
            self._fail("a key that is a container")
        return self.contain(begin)

    def extend(self, kind: int, depth: int) -> None:
        """Give the container on top of the stack contents that make it `depth` deep."""
        node = self.top()
        if self._kinds[node] != kind:
            self._fail("adds to a value of another kind")
        if self._contained[node]:
            self._fail("changes a container that another one holds")
        self._check_depth(depth)
        self._depths[node] = max(self._depths[node], depth)

    def put(self, index: int) -> None:
        # Picklers number memo entries in order, from 0 (Python 2: from 1).
        if index > self._num_puts + 1:
            self._fail(f"memo index {index} is out of order")
        while len(self._memo) <= index:
            self._memo.append(_UNSET)
        if self._memo[index] == _UNSET:
            self._num_puts += 1
        self._memo[index] = self.top()

    def memoize(self) -> None:
        self.put(self._num_puts)

    def get(self, index: int) -> None:
        if index >= len(self._memo) or self._memo[index] == _UNSET:
            self._fail(f"memo entry {index} is not set")
        self.push(self._memo[index])

    def stop(self) -> None:
        self.pop()
        if self._stack or self._marks:
            self._fail("ends with values left over")

    def proto(self) -> None:
        if self.number(1) > 5:
            self._fail("a protocol above 5")

    def frame(self) -> None:
        if self.number(8) > self._left():
            self._fail("a frame longer than the file")

    def number_line(self) -> None:
        begin, end = self.line()
        self._check_number(end - begin)
        self.push(_PLAIN)

    def long(self, length: int) -> None:
        self._check_number(length)
        self.push_skipping(_PLAIN, length)

    def _check_number(self, length: int) -> None:
        if length > _MAX_NUMBER_BYTES:
            self._fail("a number is too long")

    def string_line(self) -> None:
        self.line()
        self.push(_STRING)

    def global_lines(self) -> None:
        self.line()
        self.line()
        self.push(_GLOBAL)

    def stack_global(self) -> None:
        for _ in range(2):
            if self._kinds[self.pop()] != _STRING:
                self._fail("a global without a name")
        self.push(_GLOBAL)

    def reduce(self) -> None:
        if self._kinds[self.top()] != _TUPLE:
            self._fail("a call without arguments")
        depth = self.contain(self.last(1))
        if self._kinds[self.pop()] != _GLOBAL:
            self._fail("a call of something that is no function")
        self.push_new(_OBJECT, depth)


_STOP = ord(".")

# What each opcode does; those that are not here are refused.
_STEPS: dict[int, Callable[[_Scanner], None]] = {
    _STOP: _Scanner.stop,
    0x80: _Scanner.proto,
    0x95: _Scanner.frame,
    ord("N"): lambda s: s.push(_PLAIN),
    0x88: lambda s: s.push(_PLAIN),  # True
    0x89: lambda s: s.push(_PLAIN),  # False
    ord("K"): lambda s: s.push_skipping(_PLAIN, 1),
    ord("M"): lambda s: s.push_skipping(_PLAIN, 2),
    ord("J"): lambda s: s.push_skipping(_PLAIN, 4),
    ord("G"): lambda s: s.push_skipping(_PLAIN, 8),
    ord("I"): _Scanner.number_line,
    ord("L"): _Scanner.number_line,
    ord("F"): _Scanner.number_line,
    0x8A: lambda s: s.long(s.number(1)),
    0x8B: lambda s: s.long(s.number(4)),
    ord("C"): lambda s: s.push_skipping(_PLAIN, s.number(1)),  # bytes
    ord("B"): lambda s: s.push_skipping(_PLAIN, s.number(4)),
    0x8E: lambda s: s.push_skipping(_PLAIN, s.number(8)),
    0x96: lambda s: s.push_skipping(_PLAIN, s.number(8)),
    ord("S"): _Scanner.string_line,
    ord("V"): _Scanner.string_line,
    ord("U"): lambda s: s.push_skipping(_STRING, s.number(1)),  # text
    0x8C: lambda s: s.push_skipping(_STRING, s.number(1)),
    ord("T"): lambda s: s.push_skipping(_STRING, s.number(4)),
    ord("X"): lambda s: s.push_skipping(_STRING, s.number(4)),
    0x8D: lambda s: s.push_skipping(_STRING, s.number(8)),
    ord("("): _Scanner.mark,
    ord(")"): lambda s: s.push_new(_TUPLE, 1),
    ord("]"): lambda s: s.push_new(_LIST, 1),
    ord("}"): lambda s: s.push_new(_DICT, 1),
    0x85: lambda s: s.push_new(_TUPLE, s.contain(s.last(1))),
    0x86: lambda s: s.push_new(_TUPLE, s.contain(s.last(2))),
    0x87: lambda s: s.push_new(_TUPLE, s.contain(s.last(3))),
    ord("t"): lambda s: s.push_new(_TUPLE, s.contain(s.pop_mark())),
    ord("l"): lambda s: s.push_new(_LIST, s.contain(s.pop_mark())),
    ord("d"): lambda s: s.push_new(_DICT, s.contain_items(s.pop_mark())),
    ord("a"): lambda s: s.extend(_LIST, s.contain(s.last(1))),
    ord("e"): lambda s: s.extend(_LIST, s.contain(s.pop_mark())),
    ord("s"): lambda s: s.extend(_DICT, s.contain_items(s.last(2))),
    ord("u"): lambda s: s.extend(_DICT, s.contain_items(s.pop_mark())),
    ord("p"): lambda s: s.put(s.index_line()),
    ord("q"): lambda s: s.put(s.number(1)),
    ord("r"): lambda s: s.put(s.number(4)),
    0x94: _Scanner.memoize,
    ord("g"): lambda s: s.get(s.index_line()),
    ord("h"): lambda s: s.get(s.number(1)),
    ord("j"): lambda s: s.get(s.number(4)),
    ord("c"): _Scanner.global_lines,
    0x93: _Scanner.stack_global,
    ord("R"): _Scanner.reduce,
    ord("b"): lambda s: s.extend(_OBJECT, s.contain(s.last(1))),
}
