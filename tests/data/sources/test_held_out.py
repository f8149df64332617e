"""A source whose test images are another source: `imagefolder:DIR,test=DIR2`."""

from __future__ import annotations

import pytest

from igpt_ds.data.left_out import COPY
from igpt_ds.data.shards.index import SPLITS
from igpt_ds.data.sources import has_classes, open_source


def test_test_images_of_another_folder(tree, everything):
    train = tree("photos", {"cat/0.jpg": b"1", "dog/0.jpg": b"2", "dog/notes.txt": b"-"})
    other = tree("others", {"dog/0.jpg": b"3", "dog/more.txt": b"-", "dog/1.jpg": b"4"})
    spec = f"imagefolder:{train},test={other}"
    entries, results = everything(spec)
    assert [(entry.split, entry.key, entry.label) for entry in entries] == [
        ("train", "cat/0.jpg", 0),
        ("train", "dog/0.jpg", 1),
        ("test", "test/dog/0.jpg", 1),
        ("test", "test/dog/1.jpg", 1),
    ]
    assert results == [b"1", b"2", b"3", b"4"]
    source = open_source(spec)
    assert (source.name, source.val_fraction, source.classes, has_classes(source)) == (spec, 0.1, ["cat", "dog"], True)
    assert list(source.read(entries[::-1])) == results[::-1]
    assert len(list(source.entries())) == 4
    assert sum(row.n for row in source.left_out.rows()) == 2
    ignored = open_source(spec, "ignore")
    assert (ignored.classes, has_classes(ignored), len(list(ignored.entries()))) == (["unlabelled"], False, 4)


def test_a_folder_may_have_such_a_name(tree):
    named = tree("a,test=b", {"cat/0.jpg": b"1", "dog/0.jpg": b"2"})
    assert [entry.split for entry in open_source(f"imagefolder:{named}").entries()] == ["train", "train"]


def test_images_that_would_be_in_two_splits(tree):
    train = tree("photos", {"cat/0.jpg": b"1", "test/0.jpg": b"2"})
    for other in (train, train / "test", train / "cat" / ".."):
        with pytest.raises(ValueError, match=r"are not apart, so an image would be in two splits; move one"):
            open_source(f"imagefolder:{train},test={other}")
    divided, other = tree("divided", {"train/cat/0.jpg": b"1", "test/cat/0.jpg": b"2"}), tree("other", {"cat/0.jpg": b"3"})
    with pytest.raises(ValueError, match=r"divided has test images of its own, such as test/cat/0.jpg; leave out ',test='"):
        list(open_source(f"imagefolder:{divided},test={other}").entries())
    wrong = tree("wrong", {"owl/0.jpg": b"3"})
    with pytest.raises(ValueError, match=r"wrong has the class 'owl', which .*photos lacks; remove or rename it"):
        open_source(f"imagefolder:{train},test={wrong}")


@pytest.mark.parametrize("layout", ["folders", "another folder"])
def test_a_copy_of_a_test_image_is_left_out_and_counted(tree, layout):
    rest = {"cat/0.jpg": b"1", "dog/copy.jpg": b"9", "dog/0.jpg": b"2", "dog/again.jpg": b"2"}
    tests = {"dog/9.jpg": b"9", "cat/3.jpg": b"3"}
    if layout == "folders":
        vals = {"val/cat/copy.jpg": b"3", "val/cat/4.jpg": b"4"}
        files = {f"train/{name}": content for name, content in rest.items()} | {f"test/{name}": it for name, it in tests.items()}
        source = open_source(f"imagefolder:{tree('divided', files | vals)}")
        copies = {"train/dog/copy.jpg", "val/cat/copy.jpg"}
    else:
        source = open_source(f"imagefolder:{tree('photos', rest)},test={tree('others', tests)}")
        copies = {"dog/copy.jpg"}
    entries = list(source.entries())
    contents = list(source.read(entries))
    of_split = {split: {raw for entry, raw in zip(entries, contents, strict=True) if entry.split == split} for split in SPLITS}
    assert of_split["test"] == {b"9", b"3"}
    assert of_split["train"] == {b"1", b"2"}
    assert not of_split["val"] & (of_split["train"] | of_split["test"])
    (row,) = [row for row in source.left_out.rows() if row.reason == COPY]
    assert (set(row.names), row.n, row.lost) == (copies, len(copies), False)
    assert sum(entry.split == "train" for entry in entries) == 3  # equal images within one split stay
