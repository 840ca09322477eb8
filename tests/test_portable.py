"""A small job from files to files, on systems as they are and with less: also what a wheel is tried with."""

import os
import subprocess
import sys

import pytest

# What Windows lacks, and macOS in part.
NOT_EVERYWHERE = (
    "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED RWF_NOWAIT fchmod fork "
    "getpgid getuid posix_fadvise posix_fallocate pread preadv pwrite register_at_fork sched_getaffinity sendfile "
    "setsid sysconf sysconf_names"
)

JOB = """
import importlib.util, io, json, os, pickle, sys, tarfile
import numpy as np
from safetensors.numpy import save_file
has_torch = importlib.util.find_spec("torch") is not None
if has_torch:
    import torch.utils.data
for name in sys.argv[1:]:
    vars(os).pop(name, None)

import realign_fast as rf
from realign_fast import reference
from realign_fast.cli import main
from realign_fast.io.sources import open_source

rng = np.random.default_rng(0)
text, image = (rng.normal(size=70) + rng.normal(size=(400, 70)).astype(np.float32) for _ in range(2))
text, image = text.astype(np.float32), image.astype(np.float32)
os.mkdir("text")
np.save("text/part_1.npy", text[:100])
save_file({"embedding": text[100:200]}, "text/part_2.safetensors")
with open("text/part_3.pkl", "wb") as file:
    pickle.dump([{"id": f"ü{i}", "embed": row} for i, row in enumerate(text[200:300])], file)
with tarfile.open("text/part_4.tar", "w") as tar:
    for i, row in enumerate(text[300:]):
        data = io.BytesIO()
        np.save(data, row)
        member = tarfile.TarInfo(f"{i:03}.npy")
        member.size = data.tell()
        data.seek(0)
        tar.addfile(member, data)
np.save("image.npy", image)

def run(*command):
    assert main(command) == 0, command

run("fit", "text", "image.npy", "-o", "a.safetensors")
run("stats", "text", "-o", "text.moments.safetensors", "--covariance")
run("apply", "a.safetensors", "text", "-o", "aligned")
run("apply", "a.safetensors", "text", "-o", "aligned", "--resume")
run("verify", "aligned")
run("inspect", "a.safetensors")
alignment = rf.Alignment.load("a.safetensors")
wanted = reference.row_transform(text.astype(np.float64), alignment.scale, alignment.shift, alignment.correction)
found = np.concatenate([batch.rows.values.copy() for batch in open_source("aligned", name="aligned").batches()])
np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)
if has_torch:
    files = ["text/part_1.npy", "text/part_2.safetensors", "text/part_4.tar"]
    stream = rf.data.EmbeddingStream(files, alignment, batch_size=64)
    batches = torch.utils.data.DataLoader(stream, batch_size=None)
    rows = np.concatenate([batch["embedding"].numpy() for batch in batches])
    np.testing.assert_allclose(rows, np.delete(wanted, range(200, 300), axis=0), rtol=0, atol=2e-7)
    dataset = rf.data.EmbeddingDataset(files, alignment)
    np.testing.assert_allclose(dataset[150]["embedding"].numpy(), wanted[150], rtol=0, atol=2e-7)
"""


@pytest.mark.parametrize("without", ["", "extension"])
@pytest.mark.parametrize("missing", ["", NOT_EVERYWHERE], ids=["all of os", "less of os"])
def test_a_job_from_files_to_files(tmp_path, without, missing):
    environment = {**os.environ, "REALIGN_FAST_NO_EXTENSION": without, "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", JOB, *missing.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
