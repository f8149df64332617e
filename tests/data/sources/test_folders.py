"""`imagefolder:`: one folder a class, with or without train and test above them."""

import os

import pytest

from igpt_ds.data.sources import open_source


def test_classes_and_images_are_ordered_by_name(tree, everything, encoded):
    names = ["0.png", "1.png", "10.png", "2.jpg", "Z.JPEG"]
    files = {f"owl/{name}": encoded(i) for i, name in enumerate(names)} | {f"cat/{name}": b"not looked at" for name in names}
    extra = ["cat/notes.txt", "cat/._0.png", ".cache/0.png", "empty/notes.txt", "flat.png", "owl/deeper/0.png"]
    directory = tree("raw", files | dict.fromkeys(extra, b"no image of a class"))
    entries, results = everything(f"imagefolder:{directory}")
    assert open_source(f"imagefolder:{directory}").classes == ["cat", "owl"]
    assert [entry.key for entry in entries] == [f"{name}/{file}" for name in ("cat", "owl") for file in names]
    assert [entry.label for entry in entries] == [0] * 5 + [1] * 5
    assert {entry.split for entry in entries} == {"train"}
    assert results == [files[entry.key] for entry in entries]


@pytest.mark.parametrize("with_test", [True, False])
def test_train_and_test_folders_are_splits(tree, everything, with_test):
    files = {"train/cat/0.jpg": b"1", "train/dog/0.jpg": b"2", "train/dog/1.jpg": b"3", "train/none/notes.txt": b"-"}
    files |= {"test/dog/0.jpg": b"4"} if with_test else {}
    entries, results = everything(f"imagefolder:{tree('raw', files)}")
    expected = [("train", "train/cat/0.jpg", 0), ("train", "train/dog/0.jpg", 1), ("train", "train/dog/1.jpg", 1)]
    assert [entry[:3] for entry in entries] == expected + [("test", "test/dog/0.jpg", 1)] * with_test
    assert results == [b"1", b"2", b"3", b"4"][: len(entries)]


def test_classes_may_be_called_train_and_test(tree, everything):
    directory = tree("raw", {"train/0.jpg": b"1", "test/0.jpg": b"2", "test/deeper/0.jpg": b"-"})
    entries, results = everything(f"imagefolder:{directory}")
    assert [entry[:3] for entry in entries] == [("train", "test/0.jpg", 0), ("train", "train/0.jpg", 1)]
    assert results == [b"2", b"1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/cat/0.jpg", "train/1.jpg"],
            r"raw/train holds both images and folders.*neither a class nor a split; move",
        ),
        (
            ["train/cat/0.jpg", "val/cat/0.jpg"],
            r"raw/train holds class folders, but .*raw/val lies beside it: only train",
        ),
        (["train/cat/0.jpg", "test/dog/0.jpg"], r"raw/test has the class 'dog', which .*raw/train lacks; remove or rename it"),
        (["flat.jpg", "class/notes.txt"], r"source directory .*raw holds no images; expected .*raw/<class>/<image>.jpg"),
    ],
)
def test_layouts_that_say_two_things_or_nothing_are_refused(tree, files, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"imagefolder:{tree('raw', dict.fromkeys(files, b'x'))}")


def test_a_file_that_cannot_be_read_comes_back_as_an_error(tree):
    directory = tree("raw", {f"cat/{i}.jpg": b"%d" % i for i in range(3)})
    source = open_source(f"imagefolder:{directory}")
    entries = list(source.entries())
    (directory / "cat/1.jpg").unlink()
    first, second, third = source.read(entries)
    assert (first, third) == (b"0", b"2")
    assert isinstance(second, ValueError)
    assert str(second) == f"{directory}/cat/1.jpg cannot be read: No such file or directory"


def test_what_only_looks_like_an_image_is_counted(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "good.jpg").write_bytes(b"x")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    source = open_source(f"imagefolder:{tmp_path}")
    entries = list(source.entries())
    gone, good, pipe = source.read(entries)
    assert [entry.key for entry in entries] == ["cat/gone.jpg", "cat/good.jpg", "cat/pipe.jpg"]
    assert good == b"x"
    assert "gone.jpg cannot be read: No such file" in str(gone)
    assert "pipe.jpg cannot be read: it is not a file" in str(pipe)


@pytest.mark.parametrize("place", ["/etc/hostname", "../outside.png", "red/../../outside.png"])
def test_a_list_of_images_leads_nowhere_else(tiny_images, place):
    source = open_source(f"imagefolder:{tiny_images}")
    entry = next(source.entries())
    with pytest.raises(ValueError, match=f"names '{place}', which is not below"):
        list(source.read([entry, entry._replace(place=[place])]))
