"""The headers of tar files: ustar with the extensions of pax and GNU, read a window at a time.

Data are skipped, not read: what a header claims is only compared with the size of the file. Of the kinds of members
there may be plain files and folders; links, devices and sparse files are refused, and so are names that lead out of a
folder.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from .._os import pread

BLOCK_BYTES = 512
# Windows grow to this where headers lie close together, and begin small anew after large data that are skipped.
_WINDOW_BYTES = 256 << 10
_FIRST_WINDOW_BYTES = 4 << 10
_MAX_NAME_BYTES = 4096  # of which no system makes a longer path
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name, or of what a pax header states
_SIZE, _CHECKSUM, _KIND, _MAGIC, _PREFIX = 124, 148, 156, 257, 345
_FILES, _FOLDERS = b"0\x007", b"5"
_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK = b"xgLK"
_EXTENSIONS = (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK)
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "sparse",
}  # fmt: skip
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Of eleven octal digits, and of six.
_WEIGHTS = 8 ** np.arange(10, -1, -1, dtype=np.int64)


class Member(NamedTuple):
    """A plain file in a tar: where its header lies, its data `size` bytes from `data` on.

    `sized` tells whether a pax header states its size.
    """

    name: str
    header: int
    data: int
    size: int
    sized: bool


class Window(NamedTuple):
    """Members whose headers lie in one window of a tar, and the bytes `data` of it from `start` on."""

    members: list[Member]
    data: bytes
    start: int


def read_windows(path: Path, fd: int) -> Generator[Window, None, None]:
    """Yield all members in order; of the data of each, the first block lies in its window.

    Raises
    ------
    ValueError
        If the tar is damaged, compressed or cut short, has bytes after its end, or holds what is refused.
    """
    return _Headers(path, fd).windows()


def padded(size: int) -> int:
    """Return how many bytes `size` bytes take in a tar."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def shown(name: str | bytes) -> str:
    """Return a name for an error, which may be of any length."""
    return repr((name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name)[:200])


def with_size(header: bytes, size: int) -> bytes:
    """Return a header that states another size."""
    parts = bytearray(header)
    parts[_SIZE : _SIZE + 12] = b"%011o\0" % size
    parts[_CHECKSUM : _CHECKSUM + 8] = b" " * 8
    parts[_CHECKSUM : _CHECKSUM + 8] = b"%06o\0 " % sum(parts)
    return bytes(parts)


class _Headers:
    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self._end = os.fstat(fd).st_size
        # What extension headers say of the next member.
        self._extended = False
        self._name: bytes | None = None
        self._size: int | None = None

    def windows(self) -> Generator[Window, None, None]:
        position, size = 0, _FIRST_WINDOW_BYTES
        while True:
            data = self._read(position, min(size, _WINDOW_BYTES, self._end - position))
            members: list[Member] = []
            found = self._members(data, position, members)
            yield Window(members, data, position)
            if found is None:
                return
            went_on = len(data) - BLOCK_BYTES <= found - position <= 2 * len(data)
            size = min(4 * size, _WINDOW_BYTES) if went_on else _FIRST_WINDOW_BYTES
            position = found

    def _members(self, data: bytes, start: int, members: list[Member]) -> int | None:
        """Append the members of a window; return where the next one begins, None at the end of the tar."""
        num_blocks = len(data) // BLOCK_BYTES
        last = start + len(data) == self._end
        if num_blocks == 0:
            self._fail(start, "it ends without the mark of its end: cut short, or no tar file")
        blocks = np.frombuffer(data, np.uint8, num_blocks * BLOCK_BYTES).reshape(num_blocks, BLOCK_BYTES)
        chain, sizes = _chain(blocks, num_blocks if last else num_blocks - 1)
        heads = blocks[chain]
        sound = _have_their_checksum(heads)
        kinds = heads[:, _KIND].tolist()
        names, magics, prefixes = (
            np.ascontiguousarray(heads[:, begin:end]).view(f"S{end - begin}")[:, 0].tolist()
            for begin, end in ((0, 100), (_MAGIC, _MAGIC + 6), (_PREFIX, _PREFIX + 155))
        )
        at = start
        for k, block in enumerate(chain):
            header = start + block * BLOCK_BYTES
            head = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if not sound[k]:
                if not head.strip(b"\0"):
                    self._check_end(header)
                    return None
                self._check_sum(head, header)
            size, kind = sizes[k], kinds[k]
            regular = size >= 0
            if not regular:
                size = self._number(head[_SIZE : _SIZE + 12], header)
            if kind in _EXTENSIONS:
                self._extend(kind, header, size, data, start)
            else:
                name = names[k] if magics[k] != b"ustar" or not prefixes[k] else prefixes[k] + b"/" + names[k]
                if self._name is not None:
                    name = self._name
                text = self._checked(name, header)
                sized = self._size is not None
                if self._size is not None:
                    regular, size = regular and self._size == size, self._size
                self._extended, self._name, self._size = False, None, None
                if kind in _FILES and not (kind == 0 and text.endswith("/")):
                    members.append(Member(text, header, header + BLOCK_BYTES, size, sized))
                else:
                    self._check_folder(kind, text, size)
            at = header + BLOCK_BYTES + padded(size)
            if at > self._end:
                self._fail(header, f"it claims {size} bytes, the file has {self._end - header - BLOCK_BYTES} more")
            if not regular:  # the chain went on from another size
                break
        return at

    def _extend(self, kind: int, header: int, size: int, window: bytes, start: int) -> None:
        """Take in what an extension header says."""
        if size > min(_MAX_EXTENSION_BYTES, self._end - header - BLOCK_BYTES):
            self._fail(header, f"an extended header claims {size} bytes, expected at most {_MAX_EXTENSION_BYTES}")
        begin = header + BLOCK_BYTES - start
        data = window[begin : begin + size]
        if len(data) < size:
            data = self._read(header + BLOCK_BYTES, size)
        if kind == _PAX_FOR_ALL:
            if any(
                key in (b"path", b"size") or key.startswith(b"GNU.sparse") for key, _ in self._records(data, header)
            ):
                self._fail(header, "a header for all members states the name or size of one")
            return
        self._extended = True
        if kind == _LONG_NAME:
            self._name = data.partition(b"\0")[0]
        elif kind == _PAX:
            for key, value in self._records(data, header):
                if key == b"path":
                    self._name = value
                elif key == b"size":
                    self._size = self._decimal(value, header)
                elif key.startswith(b"GNU.sparse"):
                    self._fail(header, "a member is sparse, which is refused")

    def _records(self, data: bytes, header: int) -> list[tuple[bytes, bytes]]:
        """Return the records of a pax header: `LENGTH KEY=VALUE` and a line end each."""
        found, position = [], 0
        while position < len(data):
            space = data.find(b" ", position, position + 20)
            length = self._decimal(data[position:space], header) if space > 0 else 0
            key, equals, value = data[space + 1 : position + length - 1].partition(b"=")
            end = position + length
            if space < 0 or end > len(data) or data[end - 1 : end] != b"\n" or not equals:
                self._fail(header, "its pax header is damaged")
            found.append((key, value))
            position = end
        return found

    def _decimal(self, text: bytes, header: int) -> int:
        if not text.isdigit() or len(text) > 19:
            self._fail(header, f"its pax header states the number {text[:40]!r}")
        return int(text)

    def _number(self, field: bytes, header: int) -> int:
        """Return the number in a header's field, octal in any of the ways it is written, or base 256."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        text = field.partition(b"\0")[0].strip(b" ")
        if not text or text.strip(b"01234567"):
            self._fail(header, f"it holds {field!r}, expected an octal number")
        return int(text, 8)

    def _check_sum(self, head: bytes, header: int) -> None:
        """Check what is not written as usual, or of signed bytes, as by some old writers."""
        expected = self._number(head[_CHECKSUM : _CHECKSUM + 8], header)
        rest = head[:_CHECKSUM] + b" " * 8 + head[_CHECKSUM + 8 :]
        signed = int(np.frombuffer(rest, np.int8).sum(dtype=np.int64))
        if expected not in (sum(rest), signed):
            self._fail(header, f"its checksum is {sum(rest)}, it states {expected}")

    def _checked(self, name: bytes, header: int) -> str:
        """Return a member's name, if a file of that name would lie in the folder where the tar is unpacked."""
        if b"\0" in name:
            name = name.partition(b"\0")[0]
        if not 0 < len(name) <= _MAX_NAME_BYTES:
            self._fail(header, f"it has a name of {len(name)} bytes, expected 1 to {_MAX_NAME_BYTES}")
        if name[0] == 0x2F or (b".." in name and b".." in name.split(b"/")):
            raise ValueError(f"{self._path}: member {shown(name)} leaves the folder: refused")
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}: the name of member {shown(name)} is no UTF-8") from None

    def _check_folder(self, kind: int, name: str, size: int) -> None:
        what = _REFUSED.get(bytes((kind,)))
        if what is None and kind not in (0, *_FOLDERS):
            what = f"of the unknown kind {bytes((kind,))!r}"
        if what is None and size:
            what = f"a folder of {size} bytes"
        if what is not None:
            raise ValueError(f"{self._path}: member {shown(name)} is {what}, which is refused")

    def _check_end(self, position: int) -> None:
        """Raise ValueError unless all is zeros from `position` on: other tools would leave out what follows."""
        if self._extended:
            self._fail(position, "it ends after an extended header")
        while position < self._end:
            data = self._read(position, min(_WINDOW_BYTES, self._end - position))
            if data.strip(b"\0"):
                self._fail(position, "there are bytes after the mark of its end: is it several tars in one?")
            position += len(data)

    def _read(self, position: int, size: int) -> bytes:
        data = pread(self._fd, size, position)
        if len(data) < size:
            raise ValueError(f"{self._path} was truncated while it was read")
        return data

    def _fail(self, position: int, what: str) -> NoReturn:
        if position == 0:
            begin = pread(self._fd, 8, 0)
            for magic, name in _COMPRESSED.items():
                if begin.startswith(magic):
                    raise ValueError(f"{self._path} is compressed with {name}: decompress it first")
        raise ValueError(f"{self._path} is damaged or no tar file, at the header at byte {position}: {what}")


def _chain(blocks: NDArray[np.uint8], num_blocks: int) -> tuple[list[int], list[int]]:
    """Return which of the first blocks are headers, and their sizes; the last one's is -1 where it needs a closer look.

    Sizes are taken from every block as if it were a header, which is far faster than one by one.
    """
    digits = blocks[:num_blocks, _SIZE : _SIZE + 11].astype(np.int64) - 48
    after = blocks[:num_blocks, _SIZE + 11]
    plain = ((digits >= 0) & (digits < 8)).all(axis=1) & ((after == 0) | (after == 32))
    found = np.where(plain, digits @ _WEIGHTS, -1)
    of_block = found.tolist()
    steps = (1 + (found + BLOCK_BYTES - 1) // BLOCK_BYTES).tolist()
    chain, sizes, block = [], [], 0
    while block < num_blocks:
        size = of_block[block]
        chain.append(block)
        sizes.append(size)
        if size < 0:
            break
        block += steps[block]
    return chain, sizes


def _have_their_checksum(heads: NDArray[np.uint8]) -> list[bool]:
    """Return which headers have the checksum that they state as six octal digits."""
    field = heads[:, _CHECKSUM : _CHECKSUM + 8].astype(np.int64)
    digits = field[:, :6] - 48
    stated = digits @ _WEIGHTS[-6:]
    plain = ((digits >= 0) & (digits < 8)).all(axis=1) & np.isin(field[:, 6], (0, 32))
    sums = heads.sum(axis=1, dtype=np.int64) - field.sum(axis=1) + 8 * 32
    found: list[bool] = (plain & (sums == stated)).tolist()
    return found
