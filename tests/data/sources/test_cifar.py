"""CIFAR: the two versions, unpacked or not, give the same; what is cut or forged is named."""

import numpy as np
import pytest

from igpt_ds.data.sources import open_source


def test_every_form_gives_the_same_images(cifar, archive, everything, kind, tmp_path):
    images, labels, python, binary = cifar(kind)
    parents = tmp_path / "1", tmp_path / "2"
    for parent, folder in zip(parents, (python, binary), strict=True):
        parent.mkdir()
        (parent / folder.name).symlink_to(folder)
    forms = [python, binary, *parents, tmp_path, archive(python, "w:gz", tmp_path / "python.tar.gz")]
    forms += [archive(binary, "w:xz", tmp_path / "binary.tar.xz"), archive(binary, "w:bz2", tmp_path / "binary.tar.bz2")]
    forms += [archive(python, "w", tmp_path / "python.tar")]
    first = None
    for path in forms:
        entries, results = everything(f"{kind}:{path}")
        np.testing.assert_array_equal(np.stack(results), images)
        assert [entry.label for entry in entries] == labels
        assert open_source(f"{kind}:{path}").classes == [f"class{i:02d}" for i in range(100 if kind == "cifar100" else 10)]
        first = first or entries
        assert entries == first
    assert [entry.key for entry in first] == [f"train/{i:05d}" for i in range(20)] + [f"test/{i:05d}" for i in range(3)]


@pytest.mark.parametrize("version", [2, 3])
def test_the_test_batch_may_be_absent_and_no_other(cifar, version):
    folder = cifar("cifar10")[version]
    ending = ".bin" if version == 3 else ""
    (folder / f"test_batch{ending}").unlink()
    assert {entry.split for entry in open_source(f"cifar10:{folder}").entries()} == {"train"}
    (folder / f"data_batch_3{ending}").unlink()
    with pytest.raises(ValueError, match=rf"{folder}/data_batch_3{ending} does not exist; unpack or download the dataset again"):
        open_source(f"cifar10:{folder}")


def test_an_absent_meta_file_is_named(cifar, kind):
    folder = cifar(kind)[2]
    meta = folder / ("meta" if kind == "cifar100" else "batches.meta")
    meta.unlink()
    with pytest.raises(ValueError, match=f"{meta} does not exist"):
        open_source(f"{kind}:{folder}")


def test_cut_binary_files_are_named(cifar, kind):
    folder = cifar(kind)[3]
    file = folder / ("train.bin" if kind == "cifar100" else "data_batch_2.bin")
    whole = file.read_bytes()
    record = len(whole) // (20 if kind == "cifar100" else 4)
    for length in (0, 1, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{file} has {length} bytes, which is not a multiple of {record}: it was cut"):
            list(open_source(f"{kind}:{folder}").entries())


@pytest.mark.parametrize("version", [2, 3])
def test_batches_of_different_length_are_refused(cifar, python2_pickle, version):
    folder = cifar("cifar10")[version]
    if version == 3:
        file = folder / "data_batch_2.bin"
        file.write_bytes(file.read_bytes()[:3073])  # cut between two records, which no other check sees
    else:
        file = folder / "data_batch_2"
        file.write_bytes(python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}))
    with pytest.raises(ValueError, match=rf"{file} holds 1 images, unlike the 4 of those before it; download it again"):
        list(open_source(f"cifar10:{folder}").entries())


DATA = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"labels": [1, 2]}, r"'data' is NoneType, expected uint8 \[n, 3072\]; download it again"),
        ({b"data": DATA.astype(np.int64), b"labels": [1, 2]}, r"'data' is int64 \[2, 3072\], expected uint8 \[n, 3072\]"),
        ({b"data": DATA[:, 1:], b"labels": [1, 2]}, r"'data' is uint8 \[2, 3071\], expected"),
        ({b"data": DATA[0], b"labels": [1, 2]}, r"'data' is uint8 \[3072\], expected"),
        ({b"data": DATA[:0], b"labels": []}, r"'data' is uint8 \[0, 3072\], expected"),
        ({b"data": DATA, b"labels": [1]}, r"'labels' is not a list of 2 integers; download it again"),
        ({b"data": DATA, b"labels": [1, b"2"]}, r"'labels' is not a list of 2 integers"),
        ({b"data": DATA, b"labels": [1, [DATA]]}, r"'labels' is not a list of 2 integers"),
        ({b"data": DATA, b"fine_labels": [1, 2]}, r"'labels' is not a list of 2 integers"),
        ({b"data": DATA, b"labels": [1, 10]}, r"holds the label 10; labels lie in 0..9. Download it again"),
        ({b"data": DATA, b"labels": [-1, 1]}, r"holds the label -1; labels lie in 0..9"),
    ],
)
def test_a_batch_that_is_none_is_refused(cifar, python2_pickle, batch, message):
    folder = cifar("cifar10", n=2)[2]
    (folder / "data_batch_1").write_bytes(python2_pickle(batch))
    with pytest.raises(ValueError, match=rf"{folder}/data_batch_1:? {message}"):
        list(open_source(f"cifar10:{folder}").entries())


def test_labels_out_of_range_in_binary_files_are_refused(cifar):
    folder = cifar("cifar10")[3]
    file = folder / "data_batch_4.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(ValueError, match=f"{file} holds the label 10"):
        list(open_source(f"cifar10:{folder}").entries())


def test_a_wrong_number_of_classes_is_refused(cifar, python2_pickle):
    _, _, python, binary = cifar("cifar10")
    (binary / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=rf"{binary}/batches.meta.txt names 2 classes, expected 10; download it again"):
        open_source(f"cifar10:{binary}")
    for names in ([b"cat"] * 9 + [1], b"cat"):
        (python / "batches.meta").write_bytes(python2_pickle({b"label_names": names}))
        with pytest.raises(ValueError, match=rf"{python}/batches.meta names \d classes, expected 10"):
            open_source(f"cifar10:{python}")


def test_paths_that_hold_something_else_are_refused(cifar, tmp_path, write_tar):
    cifar("cifar100")
    expected = "expected the folder cifar-10-batches-py or cifar-10-batches-bin, a folder that contains it, or its archive"
    for path in (tmp_path, write_tar(tmp_path / "other.tar", {"other": b"x"})):
        with pytest.raises(ValueError, match=f"{path} holds no file of this dataset; {expected}"):
            open_source(f"cifar10:{path}")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_cut_archive_is_never_shorter_in_silence(cifar, archive, tmp_path, mode):
    *_, python, _ = cifar("cifar10")
    (python / "test_batch").unlink()  # so that the reader looks for it up to the end of the archive
    path = archive(python, mode, tmp_path / "archive")
    whole = path.read_bytes()
    n_images = len(list(open_source(f"cifar10:{path}").entries()))
    ends = len(whole) - 10240 if mode == "w" else len(whole) - 40  # the padding of a tar may go, all else may not
    for length in np.linspace(1, ends, 12).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path} (was cut|is not a plain tar|holds no file)"):
            list(open_source(f"cifar10:{path}").entries())
    path.write_bytes(whole)
    assert len(list(open_source(f"cifar10:{path}").entries())) == n_images == 20


def test_an_archive_cut_inside_the_last_batch_is_named(cifar, archive, tmp_path):
    *_, binary = cifar("cifar10")
    names = sorted(file.name for file in binary.iterdir())
    path = archive(binary, "w", tmp_path / "archive.tar")
    whole = path.read_bytes()
    assert names[-1] == "test_batch.bin"
    last = max(whole.rfind(name.encode()) for name in names)  # the header of the member that lies last
    path.write_bytes(whole[: last + 512 + 100])
    with pytest.raises(ValueError, match=rf"{path} was cut in \w+|{path} was cut or damaged"):
        list(open_source(f"cifar10:{path}").entries())


def test_a_batch_that_changed_after_listing_is_an_error(cifar):
    *_, folder = cifar("cifar10")
    entries = list(open_source(f"cifar10:{folder}").entries())
    file = folder / "data_batch_5.bin"
    file.write_bytes(file.read_bytes()[:3073])
    with pytest.raises(ValueError, match=rf"{file} was listed with train/00017 but ends before; list it again"):
        list(open_source(f"cifar10:{folder}").read(entries))
