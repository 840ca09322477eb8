"""Files in stores: an S3 server and an HTTP server on this machine, which fail, stall and truncate on purpose."""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import realign_fast as rf
from realign_fast.alignment import gather_moments
from realign_fast.cli import main
from realign_fast.io import _remote
from realign_fast.io._remote import AT_ONCE, FetchAhead, list_files
from realign_fast.io.sources import file_paths, open_source

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

DIM = 48
COUNTS = (300, 1, 0, 77, 1200)
SUFFIXES = ("npy", "safetensors", "parquet", "arrow", "pkl", "tar")


def make(count, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.1, 1, (count, DIM)).astype(dtype)


def names_of(start, count):
    return [f"image {start + i}" for i in range(count)]


@pytest.fixture(scope="module")
def whole():
    return make(sum(COUNTS), seed=5)


@pytest.fixture(scope="module")
def local(tmp_path_factory, whole, write_shard):
    """Return a folder with the same rows in a folder of each format, a folder with a sidecar, and other files."""
    root = tmp_path_factory.mktemp("local")
    starts = np.cumsum((0, *COUNTS))
    for suffix in SUFFIXES:
        (root / suffix).mkdir()
        for number, count in enumerate(COUNTS):
            if not (count == 0 and suffix == "pkl"):
                ids = names_of(int(starts[number]), count)
                rows = whole[starts[number] :][:count]
                write_shard(root / suffix / f"part_{number * 4}.{suffix}", rows, ids if suffix != "npy" else None)
    (root / "fortran").mkdir()
    np.save(root / "fortran" / "a.npy", np.asfortranarray(whole))
    (root / "more").mkdir()
    np.save(root / "more" / "a.npy", whole[:50])
    parquet.write_table(pa.table({"id": names_of(0, 50)}), root / "more" / "a.columns.parquet")
    (root / "more" / "readme.txt").write_text("nothing")
    wide = pa.FixedSizeListArray.from_arrays(pa.array(whole.ravel()), DIM)
    filler = pa.array([os.urandom(400) for _ in range(len(whole))])
    (root / "wide").mkdir()
    parquet.write_table(
        pa.table({"before": filler, "embedding": wide, "after": filler}),
        root / "wide" / "a.parquet",
        row_group_size=500,
        use_dictionary=False,
    )
    return root


class Faults:
    """What a server does to the next requests for ranges of bytes, and what it has seen."""

    def __init__(self):
        self.lock = threading.Lock()
        self.clear()

    def clear(self):
        self.todo, self.always, self.seen, self.sent = [], None, Counter(), 0
        self.at_once = self.most_at_once = 0

    def next(self):
        with self.lock:
            return self.always or (self.todo.pop(0) if self.todo else None)

    def begin(self):
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)

    def end(self, sent):
        with self.lock:
            self.at_once -= 1
            self.sent += sent


class WebServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def web_handler(root, faults, ranges=True, etags=True):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()

        def do_HEAD(self):
            self.send(with_body=False)

        def do_GET(self):
            self.send(with_body=True)

        def send(self, with_body):
            faults.seen[self.command] += 1
            path = root / self.path.split("?")[0].strip("/")
            if "secret" in self.path:
                return self.answer(403)
            if path.is_dir():
                links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in path.iterdir()).encode()
                self.answer(200, links, Content_Type="text/html")
                return self.wfile.write(links) if with_body else None
            if not path.is_file():
                return self.answer(404)
            data = path.read_bytes()
            extra = {"ETag": f'"{path.stat().st_mtime_ns}"'} if etags else {}
            if not with_body:
                return self.answer(200, data, Accept_Ranges="bytes", **extra)
            asked = self.headers.get("Range")
            status = 200
            if asked and ranges:
                begin, end = asked.removeprefix("bytes=").split("-")
                status, total = 206, len(data)
                data = data[int(begin) : int(end) + 1]
                extra["Content-Range"] = f"bytes {begin}-{int(begin) + len(data) - 1}/{total}"
            fault = faults.next() if asked else None
            faults.begin()
            try:
                if fault == "fail":
                    return self.answer(503)
                if fault == "stall":
                    time.sleep(2)
                self.answer(status, data, **extra)
                if fault == "truncate":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)
            except OSError:  # the client has given up
                self.close_connection = True
            finally:
                faults.end(len(data))

    return Handler


@pytest.fixture
def serve_web(local):
    """Return a function that starts a server of the local folder and returns its address and its faults."""
    servers = []

    def start(root=local, **options):
        faults = Faults()
        server = WebServer(("127.0.0.1", 0), web_handler(root, faults, **options))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", faults

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def s3_server():
    """Return the address of moto's server, and its faults."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    from werkzeug.serving import WSGIRequestHandler, make_server

    faults = Faults()
    app = moto.DomainDispatcherApplication(moto.create_backend_app)

    def with_faults(environ, start_response):
        faults.seen[environ["REQUEST_METHOD"]] += 1
        fault = faults.next() if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ else None
        if fault == "fail":
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        if fault == "stall":
            time.sleep(2)
        body = b"".join(app(environ, start_response))
        return [body[: len(body) // 2] if fault == "truncate" else body]

    class Quiet(WSGIRequestHandler):
        def log(self, *_, **__):
            pass

    server = make_server("127.0.0.1", 0, with_faults, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", faults
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bucket(s3_server, local):
    """Return the URL of a bucket with all local files."""
    address, _ = s3_server
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": address}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    fs = fsspec.filesystem("s3")
    fs.mkdir("rows")
    fs.put(os.fspath(local), "rows", recursive=True)
    yield f"s3://rows/{local.name}"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Make the pauses short and the parts small."""
    monkeypatch.setattr(_remote, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(_remote, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(_remote, "_TIMEOUT_S", 1)
    monkeypatch.setattr(_remote, "PART_BYTES", 10_000)


@pytest.fixture(params=["http", "s3"])
def store(request):
    """Return the URL of a server that has what `local` has, and its faults."""
    if request.param == "http":
        address, faults = request.getfixturevalue("serve_web")()
        yield address, faults
    else:
        url = request.getfixturevalue("bucket")
        _, faults = request.getfixturevalue("s3_server")
        faults.clear()
        yield url, faults
        faults.clear()


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*SUFFIXES, "fortran"])
def test_every_format_gives_the_rows_of_local_files(store, local, whole, suffix):
    url = f"{store[0]}/{suffix}"
    assert [path.name for path in file_paths(url)] == [path.name for path in file_paths(local / suffix)]
    assert gather_moments(url) == rf.Moments(DIM).update(whole)
    rows = [batch.rows.values.copy() for batch in open_source(url, name="x", batch_bytes=9_000).batches()]
    np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_globs_lists_and_single_files(store, local):
    url = store[0]
    assert [path.name for path in file_paths(f"{url}/npy/part_1*.npy")] == ["part_12.npy", "part_16.npy"]
    mixed = [f"{url}/npy/part_16.npy", local / "npy" / "part_0.npy"]
    assert [path.name for path in file_paths(mixed)] == ["part_16.npy", "part_0.npy"]
    assert gather_moments(mixed).count == COUNTS[0] + COUNTS[-1]


def test_sidecars_and_unknown_files_are_left_out(store):
    assert [path.name for path in file_paths(f"{store[0]}/more")] == ["a.npy"]


def test_a_signed_url_has_the_name_of_its_path(serve_web):
    url = serve_web()[0]
    (path,) = file_paths(f"{url}/npy/part_0.npy?signature=a*b/c.d")
    assert (path.name, path.stem, path.suffix) == ("part_0.npy", "part_0", ".npy")
    assert gather_moments(f"{url}/npy/part_0.npy?signature=a/c.d").count == COUNTS[0]


def test_a_fit_equals_that_of_local_files(store, local):
    url = store[0]
    there = rf.fit(f"{url}/parquet", f"{url}/npy/part_16.npy", refine=1)
    here = rf.fit(local / "parquet", local / "npy" / "part_16.npy", refine=1)
    assert there.fingerprint == here.fingerprint
    assert there.report == here.report
    assert there.fingerprints != here.fingerprints  # sizes and versions, as the store says


def test_limit_reads_no_more_than_it_must(serve_web):
    url, faults = serve_web()
    assert gather_moments(f"{url}/npy/part_16.npy", limit=5).count == 5
    assert faults.sent <= _remote._HEADER_BYTES * 2 + (AT_ONCE + 1) * 10_000


def test_only_the_column_of_embeddings_is_fetched(serve_web, whole, local):
    url, faults = serve_web()
    source = open_source(f"{url}/wide/a.parquet", name="x")
    footer = faults.sent
    moments = rf.Moments(DIM)
    for batch in source.batches():
        moments.update_rows(batch.rows, "raise")
    assert moments == rf.Moments(DIM).update(whole)
    assert faults.sent - footer < 1.1 * whole.nbytes + 2 * footer
    assert (local / "wide" / "a.parquet").stat().st_size > 4 * whole.nbytes


def test_a_plan_is_made_of_headers_alone(serve_web, whole):
    url, faults = serve_web()
    open_source(f"{url}/npy", name="x")
    assert faults.sent <= len(COUNTS) * _remote._HEADER_BYTES


def test_so_many_parts_at_once_and_no_more(serve_web):
    url, faults = serve_web()
    (path,) = list_files(f"{url}/npy/part_16.npy")
    ahead = FetchAhead([(path, 0, path.size)])
    deadline = time.monotonic() + 20
    while faults.seen["GET"] < AT_ONCE and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert faults.seen["GET"] == AT_ONCE  # nobody reads: nothing more is fetched
    with ahead.open(path) as file:
        assert file.readall() == path.fetch(0, path.size)
    ahead.close()
    assert faults.most_at_once <= AT_ONCE + 1


def test_reads_that_are_in_no_plan(serve_web, local):
    url, _ = serve_web()
    (path,) = list_files(f"{url}/npy/part_16.npy")
    data = (local / "npy" / "part_16.npy").read_bytes()
    ahead = FetchAhead([(path, 30_000, 90_000), (path, 120_000, 150_000)])
    with ahead.open(path) as file:
        for offset, count in ((29_990, 25_000), (0, 10), (70_000, 70_000), (125_000, 10), (200_000, 99)):
            file.seek(offset)
            assert file.read(count) == data[offset : offset + count]
        file.seek(-7, io.SEEK_END)
        assert file.read() == data[-7:]
    ahead.close()


# ---- loaders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_streams_and_rows_by_number(store, local, suffix):
    torch = pytest.importorskip("torch")
    url = f"{store[0]}/{suffix}"
    there, here = rf.data.EmbeddingDataset(url), rf.data.EmbeddingDataset(local / suffix)
    assert len(there) == len(here) == sum(COUNTS)
    numbers = [5, 6, 7, 1500, 0, 300, 301, -1, 5]
    for mine, theirs in zip(there.__getitems__(numbers), here.__getitems__(numbers), strict=True):
        assert torch.equal(mine["embedding"], theirs["embedding"])
    for options in ({}, {"shuffle": True, "buffer_rows": 256}):
        streams = [rf.data.EmbeddingStream(each, batch_size=100, **options) for each in (url, local / suffix)]
        for mine, theirs in zip(*streams, strict=True):
            assert torch.equal(mine["embedding"], theirs["embedding"])
            assert torch.equal(mine["id"], theirs["id"])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_read_from_a_store(bucket, whole, start_method):
    pytest.importorskip("torch")
    from torch.utils.data import DataLoader

    stream = rf.data.EmbeddingStream(f"{bucket}/npy", batch_size=128)
    next(iter(stream))  # the connections of this process are not those of the workers
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=start_method)
    rows = np.concatenate([batch["embedding"].numpy() for batch in loader])
    np.testing.assert_array_equal(rows, whole)


def test_ids_from_a_store(store, tmp_path):
    pytest.importorskip("torch")
    url = store[0]
    data = rf.data.EmbeddingDataset(f"{url}/npy", ids=f"{url}/parquet", index=tmp_path / "ids")
    assert data["image 301"]["id"] == "image 301"
    assert data.numbers_of(["image 1577"]).tolist() == [sum(COUNTS) - 1]
    with pytest.raises(ValueError, match=r"part_0\.npy has no ids"):
        rf.data.EmbeddingDataset(f"{url}/npy", index=tmp_path / "other")


def test_formats_that_must_be_decoded_are_refused_by_loaders(store):
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="realign convert"):
        rf.data.EmbeddingDataset(f"{store[0]}/arrow")


# ---- apply ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alignment(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "a.safetensors"
    rf.fit(make(200, seed=1), make(200, seed=2) + 1).save(path)
    return path


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "realign-manifest.json"}


@pytest.mark.parametrize("suffix", [*SUFFIXES, "wide"])
def test_apply_writes_the_files_of_a_local_job(store, local, alignment, tmp_path, suffix):
    for name, text in (("there", f"{store[0]}/{suffix}"), ("here", local / suffix)):
        assert main(["apply", str(alignment), str(text), "-o", str(tmp_path / name)]) == 0
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    assert main(["verify", str(tmp_path / "there")]) == 0


def test_apply_to_another_format_takes_other_columns_along(bucket, local, alignment, tmp_path):
    for name, text in (("there", f"{bucket}/parquet"), ("here", local / "parquet")):
        assert main(["apply", str(alignment), str(text), "-o", str(tmp_path / name), "--format", "npy"]) == 0
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    assert "part_0.columns.parquet" in outputs(tmp_path / "there")


def test_apply_is_resumed_where_the_store_has_failed(serve_web, local, alignment, tmp_path, capsys):
    url, faults = serve_web()
    arguments = ["apply", str(alignment), f"{url}/parquet", "-o", str(tmp_path / "out")]
    sent = 0

    def fail_later():
        nonlocal sent
        sent += 1
        return "fail" if sent > 12 else None

    faults.next = fail_later
    assert main(arguments) == 1
    assert "gave up after 6 tries" in capsys.readouterr().err
    assert not [name for name in os.listdir(tmp_path / "out") if "copy" in name or "tmp" in name]
    assert main([*arguments, "--resume"]) == 1  # it still fails
    faults.next = lambda: None
    assert main([*arguments, "--resume"]) == 0
    assert main(["apply", str(alignment), str(local / "parquet"), "-o", str(tmp_path / "here")]) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "here")


def test_copies_of_a_killed_job_are_removed(serve_web, alignment, tmp_path):
    url, _ = serve_web()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".copy-0123abcd-part_0.npy").write_bytes(b"half")
    assert main(["apply", str(alignment), f"{url}/npy", "-o", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_bad_row_is_named_by_its_url(serve_web, local, alignment, tmp_path, capsys):
    root = tmp_path / "served"
    root.mkdir()
    rows = make(20)
    rows[13] = np.nan
    np.save(root / "a.npy", rows)
    (root / "b.pkl").write_bytes(b"no pickle")
    url, _ = serve_web(root)
    for name, expected in (("a.npy", "row 13 is bad"), ("b.pkl", "refused or damaged")):
        assert main(["apply", str(alignment), f"{url}/{name}", "-o", str(tmp_path / "out"), "--overwrite"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{url}/{name}" in line
        assert expected in line
        assert ".copy" not in line
        assert main(["stats", f"{url}/{name}", "-o", str(tmp_path / "m.safetensors")]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{url}/{name}" in line
        assert expected in line
        assert "/realign-" not in line


def test_a_full_disk_ends_a_copy_in_one_line(serve_web, alignment, tmp_path, capsys, monkeypatch):
    url, _ = serve_web()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert main(["apply", str(alignment), f"{url}/npy", "-o", str(tmp_path / "out")]) == 1
    assert "no copy of http://" in capsys.readouterr().err.splitlines()[-1]
    assert main(["stats", f"{url}/pkl", "-o", str(tmp_path / "m.safetensors")]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


# ---- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["fail", "stall", "truncate"])
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_store_that_fails_at_times_is_asked_again(store, whole, fault, suffix):
    url, faults = store
    source = open_source(f"{url}/{suffix}", name="x")
    faults.todo = [None, fault, None, fault]
    moments = rf.Moments(DIM)
    for batch in source.batches():
        moments.update_rows(batch.rows, "raise")
    assert moments == rf.Moments(DIM).update(whole)
    assert not faults.todo


@pytest.mark.parametrize("fault", ["fail", "truncate"])
def test_a_store_that_always_fails_ends_in_one_line(store, tmp_path, capsys, fault, monkeypatch):
    url, faults = store
    if url.startswith("s3"):
        monkeypatch.setattr(_remote, "_TRIES", 2)  # s3fs itself tries some times, with pauses of its own
    faults.always = fault
    assert main(["stats", f"{url}/npy", "-o", str(tmp_path / "m.safetensors")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("realign stats: ")
    assert f"{url}/npy/part_" in line
    assert "gave up after" in line
    assert not list(tmp_path.iterdir())


def test_a_server_that_hangs_is_given_up(serve_web, monkeypatch):
    url, faults = serve_web()
    (path,) = list_files(f"{url}/npy/part_0.npy")
    monkeypatch.setattr(_remote, "_TIMEOUT_S", 0.3)
    monkeypatch.setattr(_remote, "_TRIES", 2)
    faults.always = "stall"
    began = time.monotonic()
    with pytest.raises(OSError, match=r"part_0\.npy: gave up after 2 tries in \d+ s: FSTimeoutError"):
        path.fetch(0, 100)
    assert time.monotonic() - began < 5


def test_an_abandoned_read_does_not_wait_for_a_store(serve_web):
    url, faults = serve_web()
    source = open_source(f"{url}/npy/part_16.npy", name="x", batch_bytes=9_000)
    batches = source.batches()
    next(batches)
    faults.always = "fail"
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 2


def test_a_file_that_changes_while_it_is_read(serve_web, tmp_path):
    np.save(tmp_path / "a.npy", make(4000))
    url, _ = serve_web(tmp_path)
    for replacement in (make(4000, seed=9), make(2000)):  # of the same size, and shorter
        np.save(tmp_path / "a.npy", make(4000))
        batches = open_source(f"{url}/a.npy", name="x", batch_bytes=9_000).batches()
        next(batches)
        np.save(tmp_path / "a.npy", replacement)
        with pytest.raises(ValueError, match=r"a\.npy has changed while it was read"):
            list(batches)


def test_a_file_that_changes_under_a_loader(serve_web, tmp_path):
    pytest.importorskip("torch")
    np.save(tmp_path / "a.npy", make(40))
    data = rf.data.EmbeddingDataset(f"{serve_web(tmp_path)[0]}/a.npy")
    np.save(tmp_path / "a.npy", make(40, seed=1))
    with pytest.raises(ValueError, match=r"a\.npy has changed"):
        data[3]


def test_a_server_without_ranges(serve_web):
    url, _ = serve_web(ranges=False)
    with pytest.raises(ValueError, match="its server sends no ranges"):
        gather_moments(f"{url}/wide/a.parquet")


def test_a_file_that_a_server_sends_whole_does_not_take_the_memory(serve_web, tmp_path):
    """Nor the time: what is not asked for is not waited for."""
    with (tmp_path / "a.npy").open("wb") as file:
        file.truncate(200_000_000)
    url, _ = serve_web(tmp_path, ranges=False)
    (path,) = list_files(f"{url}/a.npy")
    tracemalloc.start()
    for begin in (0, 1000):
        with pytest.raises(ValueError, match="its server sends no ranges"):
            path.fetch(begin, begin + 100)
    assert tracemalloc.get_traced_memory()[1] < 300_000_000  # of which the server, in this process, has 200
    tracemalloc.stop()


def test_a_server_without_versions(serve_web, whole):
    url, _ = serve_web(etags=False)
    assert gather_moments(f"{url}/npy") == rf.Moments(DIM).update(whole)
    assert open_source(f"{url}/npy", name="x").fingerprint()


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("npy/missing.npy", FileNotFoundError, "does not exist"),
        ("npy/missing_*.npy", FileNotFoundError, "holds or matches no files"),
        ("secret.npy", OSError, "answers 403"),
    ],
)
def test_missing_and_forbidden_files(serve_web, path, error, text):
    url = serve_web()[0]
    with pytest.raises(error, match=text) as caught:
        gather_moments(f"{url}/{path}")
    assert f"{url}/{path}" in str(caught.value)


@pytest.mark.parametrize("path", ["s3://no-such-bucket/a.npy", "s3://no-such-bucket/*.npy", "s3://rows/nothing/"])
def test_missing_buckets_and_keys(bucket, path):
    with pytest.raises(FileNotFoundError) as caught:
        gather_moments(path)
    assert path in str(caught.value)


def test_missing_credentials_end_in_one_line(tmp_path):
    pytest.importorskip("s3fs")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    clean |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "realign_fast", "stats", "s3://rows/a.npy", "-o", str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("realign stats: s3://rows/a.npy: there are no credentials for it")


def test_an_unknown_store(tmp_path):
    with pytest.raises(ValueError, match="nowhere://a"):
        gather_moments("nowhere://a/b.npy")


@pytest.mark.parametrize(("missing", "url"), [("fsspec", "s3://rows/a.npy"), ("s3fs", "s3://rows/a.npy")])
def test_a_missing_package_is_named_in_one_line(missing, url, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from realign_fast.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "stats", url, "-o", str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("realign stats: s3://rows/a.npy")
    assert line.endswith("pip install 'realign-fast[remote]'")


def test_a_url_of_local_files(local, whole):
    assert gather_moments(f"file://{local}/npy") == rf.Moments(DIM).update(whole)
