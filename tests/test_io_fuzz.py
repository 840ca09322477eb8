"""Mutated files either read to the end or raise an error of ours: no crash, no hang, no memory that is not there."""

import random
import struct
import subprocess
import sys

import numpy as np
import pytest

COUNT = 1000
SUFFIXES = [".npy", ".parquet", ".arrow", ".safetensors", ".pkl", ".tar"]
LARGE = [b"\xff" * 4, b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 62), struct.pack("<I", (1 << 31) - 1), b"\x80" * 8]

# One line a file; what kills the process is found by the file that has no line.
READ = """
import faulthandler, os, resource, sys
from pathlib import Path
faulthandler.enable()
import numpy, pyarrow.parquet, pyarrow.ipc
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import open_shard
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    faulthandler.dump_traceback_later(10, exit=True)
    try:
        rows = sum(len(chunk.rows.values) for chunk in open_shard(path).chunks(Blocks(200, 3), columns=True))
        outcome = "read"
    except (ValueError, TypeError, OSError) as error:
        outcome = "refused" if path.name in str(error) else f"unnamed {type(error).__name__} {str(error)[:200]!r}"
    except BaseException as error:
        outcome = f"{type(error).__name__} {str(error)[:200]!r}"
    path.unlink()
    print(path.name, outcome, flush=True)
"""


def header_span(data, suffix):
    """Where the bytes lie that say how to read the others."""
    match suffix:
        case ".npy" | ".safetensors":
            return 0, 128
        case ".parquet":
            return len(data) - 8 - struct.unpack("<I", data[-8:-4])[0], len(data)
        case ".arrow":
            return (0, 600) if random.Random(len(data)).random() < 0.5 else (len(data) - 700, len(data))
        case ".tar":
            return 512 * 4, 512 * 4 + 512
    return 0, len(data)


def flip_bytes(rng, data, other, span):
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)


def flip_bits_of_the_header(rng, data, other, span):
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(max(0, span[0]), min(span[1], len(data)))] ^= 1 << rng.randrange(8)


def put_large_numbers(rng, data, other, span):
    number = rng.choice(LARGE)
    place = rng.randrange(max(0, span[0]), min(span[1], len(data)))
    data[place : place + len(number)] = number


def cut(rng, data, other, span):
    del data[rng.randrange(len(data)) :]


def take_out(rng, data, other, span):
    place = rng.randrange(len(data))
    del data[place : place + rng.randint(1, 64)]


def repeat(rng, data, other, span):
    place = rng.randrange(len(data))
    data[place:place] = data[place : place + rng.randint(1, 64)] * rng.randint(1, 5)


def splice(rng, data, other, span):
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def edit_digits(rng, data, other, span):
    places = [i for i in range(max(0, span[0]), min(span[1], len(data))) if 48 <= data[i] < 58]
    if places:
        place = rng.choice(places)
        data[place : place + 1] = rng.choice(
            [b"-1", b"0", b"99", b"1e3", b"9" * 19, b"9" * 400, b" ", b"True", b"None"]
        )


MUTATIONS = [
    flip_bytes, flip_bits_of_the_header, put_large_numbers, cut, take_out, repeat, splice, edit_digits,
]  # fmt: skip


def originals(folder, write_shard, suffix):
    rng = np.random.default_rng(0)
    for index, (count, dim, dtype) in enumerate([(7, 5, "f4"), (30, 3, "f2"), (2, 17, "f8")]):
        path = folder / f"original_{index}{suffix}"
        ids = [f"row-{i}" for i in range(count)] if index else None
        write_shard(path, rng.normal(size=(count, dim)).astype(dtype), ids)
        yield path.read_bytes()


def mutated(rng, sources, suffix):
    first, other = rng.choice(sources), rng.choice(sources)
    data = bytearray(first)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if data:
            rng.choice(MUTATIONS)(
                rng, data, other, header_span(first, suffix) if len(data) >= len(first) else (0, len(data))
            )
    return bytes(data)


def outcomes(tmp_path, write_shard, suffix, seed, count):
    """What comes of every mutated file; a file that kills the reader is told apart, and the others go on."""
    sources = list(originals(tmp_path, write_shard, suffix))
    rng = random.Random(f"{seed}{suffix}")
    folder = tmp_path / "mutated"
    folder.mkdir()
    for index in range(count):
        (folder / f"m{index:06}{suffix}").write_bytes(mutated(rng, sources, suffix))
    found = {}
    while left := sorted(folder.iterdir()):
        result = subprocess.run([sys.executable, "-c", READ, folder], capture_output=True, text=True, timeout=600)
        found |= dict(line.split(" ", 1) for line in result.stdout.splitlines())
        if result.returncode:
            killer = next(path for path in left if path.name not in found)
            found[killer.name] = f"killed the reader ({result.returncode}): {result.stderr[-1500:]}"
            killer.unlink(missing_ok=True)
        assert len(found) < count or not list(folder.iterdir())
    return found


def check(found, count):
    assert len(found) == count
    assert {name: outcome for name, outcome in found.items() if outcome not in ("read", "refused")} == {}
    assert {"read", "refused"} == set(found.values())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mutated_files_are_read_or_refused(tmp_path, write_shard, suffix):
    check(outcomes(tmp_path, write_shard, suffix, 0, COUNT), COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_more_mutated_files_are_read_or_refused(tmp_path, write_shard, suffix, seed):
    check(outcomes(tmp_path, write_shard, suffix, seed, 2 * COUNT), 2 * COUNT)
