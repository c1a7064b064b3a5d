"""The catalog and the command: what is listed, found, refused, fetched."""

from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data_formats import FRAMES, HTML, chardata_bytes, idx_bytes, mat_bytes, npy_bytes

from gpvae.data import catalog, cli, fetch, load_dataset, locate, names, places
from gpvae.data.sources import SOURCES, File, Source
from gpvae.data.sums import ORIGINS, SUMS
from gpvae.errors import DataError

TRAIN = np.random.default_rng(1).integers(0, 256, (30, 28, 28), np.uint8)
TEST = TRAIN[:7]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPVAE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("GPVAE_CACHE", raising=False)
    return tmp_path / "data"


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


IDX = {"train-images-idx3-ubyte": idx_bytes(TRAIN), "t10k-images-idx3-ubyte": idx_bytes(TEST)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Source:
    """MNIST's record with the sums and counts of a small set."""
    files = tuple(
        File(
            f"{name}.gz",
            sums=(f"sha256:{sha256(gzip.compress(data, mtime=0))}", f"content-md5:{md5(data)}"),
            also=(name,),
        )
        for name, data in IDX.items()
    )
    source = replace(SOURCES["mnist"], layouts=(files,), train=len(TRAIN), test=len(TEST))
    monkeypatch.setitem(SOURCES, "mnist", source)
    return source


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    return args.run(args)


# --- records ----------------------------------------------------------------------------------


def test_records_are_complete() -> None:
    assert set(names()) == {
        "celeba", "cifar10", "cifar10-subset", "digits", "fashion-mnist", "frey", "mnist",
        "omniglot", "omniglot-28x28-rederived", "omniglot-images", "svhn",
    }  # fmt: skip
    for source in SOURCES.values():
        assert callable(catalog.find_reader(source))
        assert source.citation and source.title and source.train > 0
        for file in (file for layout in source.layouts for file in layout):
            assert file.sums or (source.name, file.name) in {
                ("frey", "frey_rawface.mat"), ("celeba", "img_align_celeba/"),
            }  # fmt: skip
            assert not Path(file.name).is_absolute()
            assert all(url.startswith(("http://", "https://")) for url in file.urls)


def test_every_sum_has_its_length_a_file_and_an_origin() -> None:
    digits = {"md5": 32, "content-md5": 32, "sha256": 64}
    for name, files in SUMS.items():
        assert ORIGINS[name]
        used = {Path(f.name).name for layout in SOURCES[name].layouts for f in layout}
        assert set(files) <= used
        for value in (value for values in files.values() for value in values):
            kind, _, hexadecimal = value.partition(":")
            assert len(bytes.fromhex(hexadecimal)) * 2 == digits[kind]


def test_the_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys, argparse, gpvae.data, gpvae.data.cli as c; "
        "c.add_parser(argparse.ArgumentParser().add_subparsers()); "
        "print([m for m in ('torch', 'numpy', 'scipy', 'PIL', 'pooch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_root(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    assert places.data_root() == places.cache_root() == root
    monkeypatch.setenv("GPVAE_CACHE", "/somewhere")
    assert places.cache_root() == Path("/somewhere")
    monkeypatch.setenv("GPVAE_DATA", "")
    assert places.data_root() == places.user_cache()
    assert "gpvae" in str(places.data_root())
    assert "not set" in places.describe_root()


# --- finding and checking ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits"}))
def test_a_missing_set_names_place_command_and_sum(name: str, root: Path) -> None:
    with pytest.raises(DataError) as info:
        load_dataset(name)
    message, source = str(info.value), SOURCES[name]
    assert str(root / source.folder) in message
    if locate.fetchable(source):
        assert f"gpvae data fetch {name}" in message
    else:
        assert "cannot be fetched" in message
    assert "MD5" in message or "SHA-256" in message or "no published sum" in message


def test_unknown_name_suggests() -> None:
    with pytest.raises(DataError, match="Did you mean 'mnist'"):
        load_dataset("mnits")
    with pytest.raises(DataError, match="Did you mean 'celeba'"):
        run("fetch", "celebra")


@pytest.mark.parametrize("packing", ["published", "recompressed", "plain"])
def test_any_packing_of_the_published_content(root: Path, small: Source, packing: str) -> None:
    for name, data in IDX.items():
        if packing == "plain":
            put(root, f"mnist/{name}", data)
        else:
            level, time_ = (9, 0) if packing == "published" else (1, 12345)
            put(root, f"mnist/{name}.gz", gzip.compress(data, level, mtime=time_))
    data = load_dataset("mnist", valid_size=3)
    np.testing.assert_array_equal(data.test.pixels.numpy(), TEST[:, None])
    assert len(data.train) == 27
    assert "verified" in locate.state(small).text


def test_a_changed_file_is_refused(root: Path, small: Source) -> None:
    for name, data in IDX.items():
        put(root, f"mnist/{name}.gz", gzip.compress(data[:-1] + b"\0"))
    with pytest.raises(DataError, match=r"not the published file.*Delete it"):
        load_dataset("mnist")
    put(root, "mnist/train-images-idx3-ubyte.gz", HTML)
    with pytest.raises(DataError, match="HTML"):
        load_dataset("mnist")
    assert not locate.state(small).present


def test_wrong_counts_are_refused(root: Path, small: Source, monkeypatch) -> None:
    for name, data in IDX.items():
        put(root, f"mnist/{name}", data)
    monkeypatch.setitem(SOURCES, "mnist", replace(small, train=31))
    with pytest.raises(DataError, match=r"30 train images.*expected 31"):
        load_dataset("mnist")


def test_two_sets_with_the_same_file_name_are_told_apart(root: Path, monkeypatch) -> None:
    data = chardata_bytes()
    path = put(root, "omniglot/chardata.mat", data)
    record = SOURCES["omniglot-28x28-rederived"]
    layouts = ((File("chardata.mat", sums=(f"sha256:{sha256(data)}",)),),)
    rederived = replace(record, layouts=layouts, train=5, test=2)
    monkeypatch.setitem(SOURCES, record.name, rederived)
    assert len(load_dataset(record.name, valid_size=1).test) == 2
    with pytest.raises(DataError, match="is the file of 'omniglot-28x28-rederived'"):
        load_dataset("omniglot")
    assert "holds omniglot-28x28-rederived" in locate.state(SOURCES["omniglot"]).text
    path.write_bytes(mat_bytes(data=np.zeros((784, 2)), testdata=np.zeros((784, 2))))
    with pytest.raises(DataError, match="not the published file"):
        load_dataset(record.name)


def test_options_that_a_set_does_not_take() -> None:
    with pytest.raises(DataError, match="digits takes no skip_corrupt"):
        load_dataset("digits", skip_corrupt=True)


def test_frey_prefers_the_file_with_a_sum(root: Path, monkeypatch) -> None:
    data = npy_bytes(FRAMES)
    record = SOURCES["frey"]
    first = (File("freyfaces.npy", sums=(f"sha256:{sha256(data)}",)),)
    monkeypatch.setitem(
        SOURCES, "frey", replace(record, layouts=(first, record.layouts[1]), train=len(FRAMES))
    )
    put(root, "freyfaces/frey_rawface.mat", mat_bytes(ff=FRAMES.reshape(6, -1).T))
    assert "no published sum recorded" in locate.state(SOURCES["frey"]).text
    original = load_dataset("frey", valid_size=1)
    put(root, "freyfaces/freyfaces.npy", data)
    assert "verified" in locate.state(SOURCES["frey"]).text
    assert load_dataset("frey", valid_size=1).hash == original.hash


# --- the command ------------------------------------------------------------------------------


def test_list(root: Path, small: Source, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in IDX.items():
        put(root, f"mnist/{name}", data)
    put(root, "svhn/train_32x32.mat", b"")
    assert run("list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert str(root) in lines["data"]
    assert "present, verified" in lines["mnist"]
    assert "built in" in lines["digits"]
    assert "incomplete: only train_32x32.mat" in lines["svhn"]
    assert "absent" in lines["celeba"]
    assert run("list", "--files") == 0
    out = capsys.readouterr().out
    assert "no published sum recorded" in out and "https://" in out and "Licence" in out
    assert run("list", "--json") == 0
    assert capsys.readouterr().out.count("\n") == len(SOURCES)


def test_a_file_that_cannot_be_read_is_said_in_its_line(
    root: Path, small: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in IDX.items():
        put(root, f"mnist/{name}", data)

    def broken(path: Path, kind: str) -> str:
        raise DataError(f"cannot read {path}")

    monkeypatch.setattr(locate, "file_sum", broken)
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "unreadable: cannot read" in out and "present (built in)" in out


def test_a_root_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPVAE_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="a file; expected the folder that holds the sets"):
        places.data_root()


def test_verify(root: Path, small: Source, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in IDX.items():
        put(root, f"mnist/{name}", data)
    assert run("verify") == 0
    out = capsys.readouterr().out
    assert f"mean intensity {TRAIN.mean() / 255:.4f}" in out
    put(root, "mnist/t10k-images-idx3-ubyte", b"junk")
    assert run("verify", "mnist", "digits") == 1
    out = capsys.readouterr().out
    assert "mnist: FAILED" in out and "digits: built in" in out


def test_only_large_sets_have_a_cache() -> None:
    with pytest.raises(DataError, match="needs no cache"):
        run("cache", "digits")


# --- fetching, from a server on this machine --------------------------------------------------


class Server:
    """Files by path; a path may fail, be cut short, or stop half way until told to go on."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.short: set[str] = set()
        self.slow: set[str] = set()
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                data = outer.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.path in outer.short:
                    self.wfile.write(data[: len(data) // 2])
                    return
                half = len(data) // 2 if self.path in outer.slow else len(data)
                self.wfile.write(data[:half])
                self.wfile.flush()
                if self.path in outer.slow:
                    time.sleep(30)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.server.shutdown()


@pytest.fixture
def online(server: Server, small: Source, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The small MNIST with two addresses for each file."""
    files = tuple(
        replace(file, urls=(f"{server.address}/a/{file.name}", f"{server.address}/b/{file.name}"))
        for file in small.layouts[0]
    )
    for name, data in IDX.items():
        for mirror in "ab":
            server.files[f"/{mirror}/{name}.gz"] = gzip.compress(data, mtime=0)
    source = replace(small, layouts=(files,))
    monkeypatch.setitem(SOURCES, "mnist", source)
    return source


def there(root: Path) -> set[str]:
    """Files and folders in the set's folder, apart from the lock."""
    return {path.name for path in (root / "mnist").iterdir()} - {".lock"}


BOTH = {f"{name}.gz" for name in IDX}


def test_fetch(root: Path, server: Server, online: Source, capsys) -> None:
    assert run("fetch", "mnist") == 0
    assert there(root) == BOTH
    assert all(path.startswith("/a/") for path in server.asked)
    load_dataset("mnist", valid_size=3)
    assert run("fetch", "mnist") == 0
    assert len(server.asked) == 2, "what is there is not fetched again"
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["missing", "short", "page", "other"])
def test_fetch_goes_to_the_next_address(
    root: Path, server: Server, online: Source, trouble: str
) -> None:
    first = "/a/train-images-idx3-ubyte.gz"
    if trouble == "missing":
        del server.files[first]
    elif trouble == "short":
        server.short.add(first)
    else:
        server.files[first] = HTML if trouble == "page" else gzip.compress(IDX[first[3:-3]] + b"x")
    fetch.fetch(online, progress=False)
    assert there(root) == BOTH
    assert [path for path in server.asked if "train" in path][1].startswith("/b/")
    load_dataset("mnist", valid_size=3)


def test_fetch_that_fails_leaves_nothing(root: Path, server: Server, online: Source) -> None:
    good = dict(server.files)
    for path in server.files:
        server.files[path] = HTML
    with pytest.raises(DataError, match=r"could not be fetched.*yourself.*SHA-256"):
        fetch.fetch(online, progress=False)
    assert there(root) == set()
    server.files = good
    fetch.fetch(online, progress=False)
    assert there(root) == BOTH


def test_fetch_does_not_overwrite_unasked(root: Path, server: Server, online: Source) -> None:
    path = put(root, "mnist/train-images-idx3-ubyte.gz", b"mine")
    with pytest.raises(DataError, match="--replace"):
        fetch.fetch(online, progress=False)
    assert path.read_bytes() == b"mine"
    assert run("fetch", "mnist", "--replace") == 0
    assert there(root) == BOTH
    load_dataset("mnist", valid_size=3)


def test_fetch_without_a_server(root: Path, online: Source) -> None:
    files = tuple(replace(f, urls=("http://127.0.0.1:9/nothing",)) for f in online.layouts[0])
    with pytest.raises(DataError, match="ConnectionError"):
        fetch.fetch(replace(online, layouts=(files,)), progress=False)
    assert there(root) == set()


def test_a_file_without_a_sum_is_judged_by_its_content(
    root: Path, server: Server, monkeypatch
) -> None:
    source = SOURCES["frey"]
    urls = (f"{server.address}/frey_rawface.mat",)
    layout = (replace(source.layouts[1][0], urls=urls),)
    source = replace(source, layouts=(source.layouts[0], layout), train=len(FRAMES))
    monkeypatch.setitem(SOURCES, "frey", source)
    for wrong in (HTML, mat_bytes(ff=np.zeros((560, 2), np.uint8)), b""):
        server.files["/frey_rawface.mat"] = wrong
        with pytest.raises(DataError, match="could not be fetched"):
            fetch.fetch(source, progress=False)
        assert {p.name for p in (root / "freyfaces").iterdir()} == {".lock"}
    server.files["/frey_rawface.mat"] = mat_bytes(ff=FRAMES.reshape(6, -1).T)
    fetch.fetch(source, progress=False)
    assert len(load_dataset("frey", valid_size=1).train) == 4


def test_fetch_without_space_or_permission(
    root: Path, server: Server, online: Source, monkeypatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "replace", full)
        patch.setattr(shutil, "move", full)
        with pytest.raises(DataError, match="no space is left"):
            fetch.fetch(online, progress=False)
    assert there(root) == set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPVAE_DATA", "/proc/no/such/place")
        with pytest.raises(DataError, match=r"cannot write /proc.*GPVAE_DATA"):
            fetch.fetch(online, progress=False)
    fetch.fetch(online, progress=False)
    assert there(root) == BOTH


FETCH = """
import sys
from dataclasses import replace
from gpvae.data import fetch, sources
source = sources.SOURCES["mnist"]
file = sources.File("train-images-idx3-ubyte.gz", (sys.argv[1],), ("sha256:" + sys.argv[2],))
fetch.fetch(replace(source, layouts=((file,),)), progress=False)
"""


def test_fetch_that_is_killed_can_be_done_again(root: Path, server: Server, online: Source) -> None:
    path = "/a/train-images-idx3-ubyte.gz"
    server.files[path] = os.urandom(3 * fetch.CHUNK)
    server.slow.add(path)
    words = [f"{server.address}{path}", sha256(server.files[path])]
    process = subprocess.Popen([sys.executable, "-c", FETCH, *words])
    staging = root / "mnist" / fetch.STAGING
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (staging.exists() and list(staging.iterdir())):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert there(root) == {fetch.STAGING}
    with pytest.raises(DataError, match="is missing"):
        load_dataset("mnist")
    server.slow.clear()
    server.files[path] = gzip.compress(IDX["train-images-idx3-ubyte"], mtime=0)
    fetch.fetch(online, progress=False)
    assert there(root) == BOTH


def test_sets_that_cannot_be_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cifar10-subset", "omniglot-28x28-rederived"):
        with pytest.raises(DataError, match="cannot be fetched"):
            run("fetch", name)
    assert run("fetch", "digits") == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_loading_never_opens_a_connection(
    root: Path, small: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a connection was opened"))
    with pytest.raises(DataError, match="is missing"):
        load_dataset("mnist")
    for name, data in IDX.items():
        put(root, f"mnist/{name}", data)
    load_dataset("mnist", valid_size=3)
    load_dataset("digits")
