"""Many files of records read like one array."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.shards.mapped import MappedRecords
from igpt_ds.data.shards.record import END, pack, record_dtype


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), n_px=st.integers(1, 6), data=st.data())
def test_every_field_of_any_records_in_any_order(tmp_path_factory, counts, n_px, data):
    path, random = tmp_path_factory.mktemp("mapped"), np.random.default_rng(len(counts))
    n = sum(counts)
    records = pack(np.arange(n), random.integers(0, 65536, (n, n_px, n_px)).astype(np.uint16), random.integers(0, 999, n))
    files, first = [], 0
    for number, count in enumerate(counts):
        files.append(path / str(number))
        files[-1].write_bytes(records[first : first + count].tobytes() + END)
        first += count
    mapped = MappedRecords(files, counts, record_dtype(n_px))
    assert mapped.n_records == n
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), dtype=np.int64)
    for name in records.dtype.names:
        found = mapped.field(name, ids)
        assert found.dtype == records[name].dtype
        np.testing.assert_array_equal(found, records[name][ids])
    for image in ids.tolist():
        file, row, byte = mapped.place(image)
        content = file.read_bytes()[byte : byte + records.dtype.itemsize]
        assert content == records[image : image + 1].tobytes()
        assert (file, row) == (
            files[int(np.searchsorted(np.cumsum(counts), image, side="right"))],
            image - sum(counts[: files.index(file)]),
        )
