"""The unpickler builds data and nothing else: no forged pickle gets a function called, whatever it names."""

import codecs
import os
import pickle
import pickletools
import resource
import struct
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.data.sources.unpickle import load_pickle


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i8", ">i4", "<f4", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", ["python 2", 0, 1, 2, 3, 4])
def test_arrays_come_back_equal(python2_pickle, dtype, order, protocol):
    array = np.asarray(np.random.default_rng(0).integers(0, 100, (3, 4)).astype(dtype), order=order)
    value = {b"data": array, b"labels": [1, -2], b"text": b"a\xff", b"nested": {b"x": (1.5, None)}}
    data = python2_pickle(value) if protocol == "python 2" else pickle.dumps(value, protocol)
    loaded = load_pickle(data, "file")
    np.testing.assert_array_equal(loaded.pop("data"), array, strict=True)
    assert loaded == {"labels": [1, -2], "text": b"a\xff", "nested": {b"x": (1.5, None)}}


def test_the_names_of_both_numpys_are_known(python2_pickle):
    old = python2_pickle({b"data": np.arange(3)})
    new = old.replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    assert old != new
    for data in (old, new):
        np.testing.assert_array_equal(load_pickle(data, "file")["data"], np.arange(3))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (Call(os.system, "touch MARK"), r"posix\.system"),
        (Call(os.mkdir, "MARK"), r"posix\.mkdir"),
        (Call(eval, "open('MARK', 'w')"), r"(builtins|__builtin__)\.eval"),
        (Call(exec, "open('MARK', 'w')"), r"(builtins|__builtin__)\.exec"),
        (Call(open, "MARK", "w"), rf"{open.__module__}\.open"),
        (Call(getattr, "x", "upper"), r"(builtins|__builtin__)\.getattr"),
        (Call(subprocess.getoutput, "touch MARK"), r"(subprocess|commands)\.getoutput"),
        (Call(np.save, "MARK", 1), r"numpy\.save"),
        (Call(np.load, "MARK"), r"numpy\.load"),
        (Call(np.memmap, "MARK", "u1", "w+", 0, (9,)), r"numpy\.memmap"),
        (Call(np.frombuffer, b"x"), r"numpy\.\S*frombuffer"),
        (Call(pickle.loads, b"N."), r"\w+\.loads"),
        (Call(codecs.decode, b"x"), r"_codecs\.decode"),
        (np.float64(1), r"numpy\.\w+\.multiarray\.scalar"),
        (np.ma.masked_array([1]), r"numpy\.ma\.core\._mareconstruct"),
        (1j, r"(builtins|__builtin__)\.complex"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_are_refused_and_not_made(tmp_path, monkeypatch, call, named, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^file is not plain data: it asks for {named}; nothing of it was run. Download"):
        load_pickle(pickle.dumps({"data": call}, protocol), "file")
    assert not (tmp_path / "MARK").exists()


def test_the_forged_pickles_would_have_worked(tmp_path):
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'mark'}")))
    assert (tmp_path / "mark").exists()


RECONSTRUCT = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"


def _dtype(name):
    return b"cnumpy\ndtype\n(X" + struct.pack("<I", len(name)) + name + b"K\x00K\x01tR"


DTYPE_STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
U1 = _dtype(b"u1") + DTYPE_STATE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({"data": np.array([1, "x"], dtype=object)}, 2), r"not plain data: it holds an array of 'O8'"),
        (pickle.dumps({"data": np.zeros(2, "V8")}, 2), r"not plain data: it holds an array of 'V8'"),
        (pickle.dumps({"data": np.zeros(2, "c16")}, 2), r"not plain data: it holds an array of 'c16'"),
        (pickle.dumps({"data": np.zeros(2, [("a", "u1")])}, 2), r"not plain data: it holds an array of 'V1'"),
        (pickle.dumps({"data": np.array(["x"])}, 2), r"not plain data: it holds an array of 'U1'"),
        (pickle.dumps({"data": Call(np.dtype, 5)}, 2), r"not plain data: it holds an array of 5"),
        (U1.replace(b"|NNN", b"|N(U\x01atN") + b".", r"not plain data: it holds an array of records"),
        (U1.replace(b"U\x01|", b"U\x01O") + b".", r"not plain data: it holds an array of records"),
        (b"\x80\x02" + ARRAY[2:] + b"(K\x01K\x01\x85" + U1 + b"\x89K\x07tb.", r"not plain data: it holds an array of int"),
        (b"\x80\x02" + ARRAY[2:] + b"(K\x01K\x01\x85K\x07\x89U\x01xtb.", r"not plain data: it holds an array of bytes"),
        (b"\x80\x02" + ARRAY[2:] + b"(K\x01K\x02\x85" + U1 + b"\x89U\x01xtb.", r"cannot be read as a pickle: .*reshape"),
        (RECONSTRUCT + b"}U\x08__call__K\x01sb.", r"not plain data: it sets the state of a name"),
        (RECONSTRUCT + b"N}U\x08__call__K\x01s\x86b.", r"not plain data: it sets the state of a name"),
        (b"\x80\x02cnumpy\nndarray\n)R.", r"cannot be read as a pickle: '_Name' object is not callable; download it again"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", r"cannot be read as a pickle: "),
        (pickle.dumps(Call(codecs.encode, "x", "rot13"), 2), r"not plain data: it encodes as b?'rot13'"),
        (pickle.dumps(Call(codecs.encode, 5, "latin1"), 2), r"not plain data: it encodes as b?'latin1'"),
        (b"Pnumber\n.", r"not plain data: it refers to objects outside"),
        (b"\x80\x02\x82\x01.", r"cannot be read as a pickle: unregistered extension code 1"),
        (pickle.dumps([1, 2], 2), r"holds a list where a dict should stand; download it again"),
        (pickle.dumps(np.zeros(3), 2), r"holds a array where a dict should stand"),
        (b"", r"cannot be read as a pickle: EOFError"),
        (b"\x1f\x8bnot a pickle", r"cannot be read as a pickle: "),
    ],
)
def test_arrays_of_anything_else_and_tricks_are_refused(data, reason):
    with pytest.raises(ValueError, match=rf"^file (is )?{reason}") as caught:
        load_pickle(data, "file")
    assert "\n" not in str(caught.value)


def test_every_cut_is_an_error(python2_pickle):
    data = python2_pickle({b"data": np.arange(4, dtype=np.uint8).reshape(2, 2), b"labels": [1, 2]})
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"^file (cannot be read as a pickle|is not plain data|holds a)"):
            load_pickle(data[:length], "file")


NAMES = [b"os\nsystem\n", b"builtins\neval\n", b"numpy\nload\n", b"numpy\nndarray\n", b"numpy\ndtype\n", b"_codecs\nencode\n"]
NAMES += [b"numpy.core.multiarray\n_reconstruct\n"]


@given(st.lists(st.sampled_from(pickletools.opcodes), max_size=12), st.data())
def test_random_programs_end_in_data_or_one_error(opcodes, draw):
    """Opcodes with random arguments, and names that do harm among the names."""
    program = b"\x80\x02"
    for opcode in opcodes:
        argument = st.sampled_from(NAMES) if opcode.name in ("GLOBAL", "INST") else st.binary(max_size=5)
        program += opcode.code.encode("latin1") + draw.draw(argument)
    message = "file "
    try:
        value = load_pickle(program + b".", "file")
    except ValueError as error:
        message = str(error)
    else:
        assert type(value) is dict
    assert message.startswith("file ")
    assert "\n" not in message


def test_a_pickle_cannot_ask_for_more_memory_than_it_has_bytes():
    for opcode in (pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", pickle.BINBYTES8 + struct.pack("<Q", 1 << 62)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r"^file (cannot be read as a pickle|holds a int where)"):
            load_pickle(b"\x80\x02K\x01" + opcode + b".", "file")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # KiB
