"""Files appear whole or not at all, and a file that cannot be read gives one clear line."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds import files
from igpt_ds.arrays import new_array
from igpt_ds.data.images import decode_image
from igpt_ds.data.palette import load_palette
from igpt_ds.data.palette_table import load_table
from igpt_ds.data.sources.tars import tar_window, walk
from igpt_ds.errors import error_text
from igpt_ds.evaluate.features.files import _open_array
from igpt_ds.evaluate.probes.sgd_state import read_state
from igpt_ds.evaluate.report.page import Picture, _figure
from igpt_ds.files import atomic_dir, atomic_file, check_writable, sha256_file
from igpt_ds.json_files import json_line, read_json, read_json_lines, refuse_changed, seal, write_json, write_json_lines
from igpt_ds.model.interchange.hf import _open_tensors
from igpt_ds.model.store import _read_file, read_tensors, write_tensors
from igpt_ds.plain_files import beside, is_missing, open_plain, utf8_path
from igpt_ds.train.checkpoint.restricted import refuse_foreign_names
from igpt_ds.train.checkpoint.torch_files import read_torch_file


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def fail(_):
    raise RuntimeError("half way")


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    check_writable(tmp_path / "new" / "a.json", tmp_path / "file", None, directories=[tmp_path / "dir", tmp_path / "x" / "y"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "file"]
    for path in (tmp_path / "file" / "a.json", tmp_path / "dir", Path("/proc/a.json")):
        with pytest.raises(ValueError, match=str(path)):
            check_writable(path)
    with pytest.raises(ValueError, match="is a file; choose another path"):
        check_writable(directories=[tmp_path / "file" / "run"])


def test_atomic_file_replaces_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path, "w") as file:
        file.write("old")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path, "w") as file:
        fail(file.write("new"))
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.txt"]


def test_atomic_dir_appears_whole(tmp_path):
    path = tmp_path / "new" / "d"
    with atomic_dir(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("a")
        assert not path.exists()
        assert partial.parent == path.parent  # the same file system, so that the rename is atomic
    assert (path / "sub" / "a.txt").read_text() == "a"
    assert names(path.parent) == ["d"]


def test_atomic_dir_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), atomic_dir(tmp_path / "d") as partial:
        fail((partial / "a.txt").write_text("a"))
    assert names(tmp_path) == []


def test_atomic_dir_takes_an_empty_directory_and_refuses_a_full_one(tmp_path):
    path = tmp_path / "d"
    path.mkdir()
    with atomic_dir(path) as partial:
        (partial / "a.txt").write_text("first")
    with pytest.raises(ValueError, match=r"/d exists already; choose another name or remove it$"), atomic_dir(path):
        pass
    with pytest.raises(ValueError, match=r"a\.txt exists already"), atomic_dir(path / "a.txt"):
        pass
    assert (path / "a.txt").read_text() == "first"


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_dir"])
def test_killed_in_the_block_leaves_the_name_free_for_the_next(tmp_path, kind):
    path = tmp_path / "target"
    program = (
        f"import os, pathlib, signal\nfrom igpt_ds.files import {kind}\n"
        f"with {kind}(pathlib.Path({str(path)!r})) as opened:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert not path.exists()
    with getattr(files, kind)(path):
        pass
    assert path.exists()


def test_two_processes_of_the_same_number_do_not_share_a_partial(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # two containers, or two nodes on a shared disk
    with atomic_dir(tmp_path / "d") as first:
        (first / "a.txt").write_text("first")
        with atomic_dir(tmp_path / "d") as second:
            (second / "a.txt").write_text("second")
        assert (tmp_path / "d" / "a.txt").read_text() == "second"
        (tmp_path / "d" / "a.txt").unlink()
    assert (tmp_path / "d" / "a.txt").read_text() == "first"


def test_sha256_of_a_file_longer_than_a_piece(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert files._sha256(io.BytesIO(content)) == hashlib.sha256(content).hexdigest()  # Python 3.10's way


def test_json_round_trip(tmp_path):
    value = {"lr": 0.003, "betas": [0.9, 0.95], "name": "größe"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "recipe") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"^recipe .*/a\.json does not exist$"),
        (b"{", r"^recipe .*/a\.json is not valid JSON: "),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"^recipe .*/a\.json has 'c' twice in one object; remove one of them$"),
        (b"\xff", r"^recipe .*/a\.json is not valid JSON: "),
        (b"\xef\xbb\xbf{}", r"^recipe .*/a\.json begins with a byte order mark; save it as UTF-8 without one$"),
        (b'{"a": NaN}', r"/a\.json is not valid JSON: NaN is not a finite number; correct the file"),
        (b'{"a": -1e999}', r"/a\.json is not valid JSON: -1e999 is not a finite number; correct the file"),
        (b'{"a": 1' + b"0" * 5000 + b"}", r"/a\.json is not valid JSON: .*4300.*; correct the file"),
        (b"[" * 65 + b"]" * 65, r"/a\.json is not valid JSON: it is nested more than 64 deep; correct the file"),
        (b"[" * 100_000, r"/a\.json is not valid JSON: .*; correct the file"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_json(tmp_path / "a.json", "recipe")


def test_json_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"^recipe .*/a\.json is not valid JSON of its kind: it has more than 100 bytes; fix$"):
        read_json(path, "recipe", "fix", limit=100)


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    for write in (lambda value: write_json(tmp_path / "a.json", value), seal):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write({"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_seal_is_that_of_the_content_alone():
    sealed = seal({"b": (1, 2.5), "a": {10: "ä", 2: None}})
    refuse_changed(dict(reversed(sealed.items())), "f.json", "fix")  # the order of the keys says nothing
    assert seal(sealed) == sealed
    for changes in ({"b": [1, 2.6]}, {"a": {}}, {"c": 1}, {"sha256": None}):
        with pytest.raises(ValueError, match=r"^f\.json was changed since it was written: .*edited by hand.*; fix$"):
            refuse_changed(sealed | changes, "f.json", "fix")


def test_a_row_that_says_its_sha256_is_compared_with_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json_line({"step": 1, "loss": 2.5}) + '{"step": 2}\n')
    assert read_json_lines(path) == [{"step": 1, "loss": 2.5}, {"step": 2}]
    path.write_text(path.read_text().replace("2.5", "2.4"))
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 was changed since it was written"):
        read_json_lines(path)


def test_json_that_is_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"^recipe .* cannot be read: Is a directory; name a file$"):
        read_json(tmp_path, "recipe")


def test_names_that_are_not_utf8_survive_in_json_and_are_escaped_in_text(tmp_path):
    value = {"gr\xf6\xdfe": os.fsdecode(b"\xff.png"), "half": "\ud800"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "names") == value
    write_json_lines(tmp_path / "a.jsonl", [value])
    assert read_json_lines(tmp_path / "a.jsonl") == [value]
    with atomic_file(tmp_path / "a.md", "w") as file:
        file.write("gr\xf6\xdfe " + os.fsdecode(b"\xff"))
    assert (tmp_path / "a.md").read_bytes() == "gr\xf6\xdfe \\udcff".encode()


def test_json_lines_round_trip_and_missing(tmp_path):
    rows = [{"step": 1}, {"step": 2}]
    assert read_json_lines(tmp_path / "a.jsonl") == []
    write_json_lines(tmp_path / "a.jsonl", rows)
    assert read_json_lines(tmp_path / "a.jsonl") == rows


def test_json_lines_leave_out_a_torn_last_line_only(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_json_lines(path) == [{"step": 1}]
    assert capsys.readouterr().err == f"{path} line 2 is torn and was left out\n"
    path.write_text('{"step": 1}\n\0\0\0\0')  # what some file systems leave after a loss of power
    assert read_json_lines(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("content", "number"),
    [(b'{"st\n{"step": 2}\n', 1), (b'{"step": 1}\n{"st\n', 2), (b"my notes\n", 1), (b"my notes", 1)],
)
def test_json_lines_of_somebody_else_are_refused(tmp_path, content, number):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl line {number} is not valid JSON: .*; remove the line, or name"):
        read_json_lines(path)


def test_json_lines_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"a\.jsonl is not valid JSON: .*; name another file$"):
        read_json_lines(tmp_path / "a.jsonl")


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_file(tmp_path / "out.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out.bin")
    assert not list(tmp_path.iterdir())


READERS = {
    "JSON": lambda path: read_json(path, "recipe"),
    "rows": read_json_lines,
    "hash": sha256_file,
    "palette": load_palette,
    "table": lambda path: load_table(path, "0" * 64, fail_with),
    "torch file": read_torch_file,
    "checkpoint": lambda path: refuse_foreign_names([path]),
    "state of a probe": lambda path: read_state(path, {}, "cpu"),
    "weights": lambda path: _open_tensors(path),
    "tar": lambda path: list(walk_tar(path)),
    "features": lambda path: _open_array(path, np.dtype("<f4"), (1,)),
    "picture": lambda path: _figure(Picture(path, "caption")),
    "image": lambda path: decode_image(path.read_bytes(), str(path)),
}


def fail_with(words):
    raise ValueError(words)


def walk_tar(path):
    with tar_window(path) as window:
        yield from walk(window, str(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s9--0\n", "git annex get"),
    ],
)
def test_a_pointer_is_told_wherever_a_file_is_read(tmp_path, reader, content, fix):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.safetensors.* is a pointer of .*{fix}"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("image", "weights")])
def test_a_fifo_and_a_device_are_refused_and_not_read(tmp_path, reader):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ValueError, match=rf"{path} .*not a file"):
            READERS[reader](path)


def test_a_link_of_git_annex_without_its_content(tmp_path):
    path = tmp_path / "a.json"
    path.symlink_to(".git/annex/objects/aa/bb/SHA256E-s9--0/SHA256E-s9--0")
    with pytest.raises(ValueError, match=r"a\.json is .*git annex get"):
        read_json(path, "recipe")


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from igpt_ds import cli
from igpt_ds.arrays import new_array, save_array
from igpt_ds.files import atomic_dir
from igpt_ds.json_files import write_json

def directory(path):
    with atomic_dir(path) as partial:
        (partial / "a").write_bytes(bytes(1 << 20))

def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    path = Path(sys.argv[2])
    {
        "map": lambda: new_array(path, np.dtype("<f4"), (1 << 20,)),
        "array": lambda: save_array(path, np.zeros(1 << 20)),
        "JSON": lambda: write_json(path, "a" * (1 << 20)),
        "directory": lambda: directory(path),
    }[sys.argv[1]]()

cli.run(main)
"""


@pytest.mark.parametrize("what", ["map", "array", "JSON", "directory"])
def test_a_write_that_the_system_refuses_names_the_file_and_leaves_nothing(tmp_path, what):
    (tmp_path / "program.py").write_text(LIMITED)
    path = tmp_path / "out" / "file"
    path.parent.mkdir()
    done = subprocess.run([sys.executable, tmp_path / "program.py", what, path], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"program.py: error: {path}: File too large; raise the limit (ulimit -f), or choose a file system without it\n"
    )
    assert what == "map" or not list(path.parent.iterdir())


def test_the_space_of_a_memory_map_is_taken_at_once(tmp_path):
    array = new_array(tmp_path / "a.npy", np.dtype("<f4"), (1 << 16,))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
    assert not array.any()


@pytest.mark.parametrize(("name", "fix"), [("a" * 300, "choose a shorter name"), ("file/a", "remove it, or choose another name")])
def test_a_name_that_cannot_be_written_is_told_without_the_temporary_name(tmp_path, name, fix):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r".") as caught:
        write_json(tmp_path / name, 1)
    assert error_text(caught.value).startswith(f"{tmp_path / name}: " if name[0] == "a" else f"{tmp_path}/file")
    assert fix in error_text(caught.value)
    assert "partial" not in error_text(caught.value)


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_file_of_a_fixed_name_is_not_written_through_a_link(tmp_path, mode):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=name):
            open(tmp_path / name, mode, opener=open_plain).close()
    assert victim.read_text() == "mine"
    with open(tmp_path / "new", mode, opener=open_plain) as file:
        file.write("words")
    assert (tmp_path / "new").read_text() == "words"


def test_a_path_that_is_not_utf8_reaches_a_library_that_takes_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"gr\xf6n.safetensors")
    write_tensors(path, {"a": torch.ones(2)})
    assert _read_file(path)["a"].tolist() == read_tensors(path, "")["a"].tolist() == [1, 1]
    assert _open_tensors(path)["a"]().tolist() == [1, 1]
    with utf8_path(tmp_path / "plain") as name:
        assert name == str(tmp_path / "plain")


def test_a_link_to_nothing_is_no_missing_file(tmp_path):
    path = tmp_path / "a.jsonl"
    assert is_missing(path)
    assert read_json_lines(path) == []
    path.symlink_to("nothing")
    for read in (is_missing, read_json_lines):
        with pytest.raises(ValueError, match=r"a\.jsonl is a link to nothing, which does not exist; restore"):
            read(path)


def test_a_torn_line_of_a_file_that_is_written_whole_is_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    for torn in ('{"a": ', "\0\0"):
        path.write_text(f'{{"a": 1}}\n{torn}')
        assert read_json_lines(path) == [{"a": 1}]
        with pytest.raises(ValueError, match=r"a\.jsonl line 2 is not valid JSON"):
            read_json_lines(path, strict=True)


@pytest.mark.parametrize("name", ["", ".", "..", "other", "other/."])
def test_what_lies_beside_a_directory_is_found_by_every_name_of_it(tmp_path, monkeypatch, name):
    (tmp_path / "run" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    expected = Path(name).resolve()
    assert beside(Path(name), ".making").resolve() == expected.parent / f"{expected.name}.making"
