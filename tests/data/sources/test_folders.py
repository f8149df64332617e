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
    source = open_source(f"imagefolder:{directory}")
    assert list(source.entries()) == entries
    assert source.classes == ["cat", "owl"]
    assert [(row.ending, row.reason, row.names, row.lost) for row in source.left_out.rows()] == [
        (".png", "beside the class folders", ["flat.png"], True),
        (".png", "deeper than a class folder", ["owl/deeper/0.png"], True),
        (".txt", "not images by name", ["cat/notes.txt", "empty/notes.txt"], False),
        ("", "classes without images", ["empty"], False),
        ("", "hidden", [".cache"], False),
        (".png", "hidden", ["cat/._0.png"], False),
    ]
    assert [entry.key for entry in entries] == [f"{name}/{file}" for name in ("cat", "owl") for file in names]
    assert [entry.label for entry in entries] == [0] * 5 + [1] * 5
    assert {entry.split for entry in entries} == {"train"}
    assert results == [files[entry.key] for entry in entries]


@pytest.mark.parametrize("with_test", [True, False])
def test_train_and_test_folders_are_splits(tree, everything, with_test):
    files = {"train/cat/0.jpg": b"1", "train/dog/0.jpg": b"2", "train/dog/1.jpg": b"3", "train/none/notes.txt": b"-"}
    files |= {"test/dog/0.jpg": b"4"} if with_test else {}
    entries, results = everything(f"imagefolder:{tree('raw', files)}")
    expected = [("train", "cat/0.jpg", 0), ("train", "dog/0.jpg", 1), ("train", "dog/1.jpg", 1)]
    assert [entry[:3] for entry in entries] == expected + [("test", "test/dog/0.jpg", 1)] * with_test
    assert results == [b"1", b"2", b"3", b"4"][: len(entries)]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_validation_images_of_their_own(tree, val):
    files = {"train/cat/0.jpg": b"1", "train/dog/0.jpg": b"2", f"{val}/dog/0.jpg": b"3", "test/cat/0.jpg": b"4"}
    source = open_source(f"imagefolder:{tree('raw', files)}")
    assert source.val_fraction == 0
    assert [(entry.split, entry.key, entry.label) for entry in source.entries()] == [
        ("train", "cat/0.jpg", 0),
        ("train", "dog/0.jpg", 1),
        ("val", "val/dog/0.jpg", 1),
        ("test", "test/cat/0.jpg", 0),
    ]


def test_splits_without_classes(tree):
    source = open_source(f"imagefolder:{tree('raw', {'train/0.jpg': b'1', 'val/1.jpg': b'2', 'test/2.jpg': b'3'})}")
    assert source.classes == ["unlabelled"]
    assert [(entry.split, entry.key) for entry in source.entries()] == [
        ("train", "0.jpg"),
        ("val", "val/1.jpg"),
        ("test", "test/2.jpg"),
    ]


@pytest.mark.parametrize("labels", ["use", "ignore"])
def test_keys_and_splits_do_not_depend_on_the_layout(tree, labels):
    images = {f"{name}/{number}.jpg": f"{name}{number}".encode() for name in ("cat", "dog", "test") for number in range(20)}
    others = {"test/cat/3.jpg": b"1", "val/cat/3.jpg": b"2"}
    layouts = [images, {f"train/{name}": data for name, data in images.items()}]
    layouts.append(layouts[1] | {name.replace("val", "valid"): data for name, data in others.items()})
    found = [list(open_source(f"imagefolder:{tree(f'raw{i}', files)}", labels).entries()) for i, files in enumerate(layouts)]
    keys = [[entry.key for entry in entries if entry.split == "train"] for entries in found]
    assert keys[0] == keys[1] == keys[2] == sorted(images)
    assert {entry.key for entry in found[2] if entry.split != "train"} == set(others)


def test_two_images_never_share_a_key(tree):
    files = ["train/0.jpg", "0.jpg", "train/test/a/1.jpg", "test/a/1.jpg", "train/test/2.jpg", "train/train/0.jpg"]
    directory = tree("raw", {name: name.encode() for name in files})
    entries = list(open_source(f"imagefolder:{directory}", "ignore").entries())
    assert {entry.key for entry in entries} == {
        "./0.jpg",
        "0.jpg",
        "./test/a/1.jpg",
        "test/a/1.jpg",
        "test/2.jpg",
        "./train/0.jpg",
    }
    assert len(entries) == len(files)


def test_a_class_may_be_called_train(tree, everything):
    directory = tree("raw", {"train/0.jpg": b"1", "plane/0.jpg": b"2", "plane/deeper/0.jpg": b"-"})
    entries, results = everything(f"imagefolder:{directory}")
    assert [entry[:3] for entry in entries] == [("train", "plane/0.jpg", 0), ("train", "train/0.jpg", 1)]
    assert results == [b"2", b"1"]
    named = tree("named", {"train_station/0.jpg": b"1", "test tube/0.jpg": b"2"})
    assert open_source(f"imagefolder:{named}").classes == ["test tube", "train_station"]


def test_images_need_no_classes(tree, everything):
    flat = tree("flat", {"b.jpg": b"2", "a.JPG": b"1", "deep/er/c.jpg": b"-"})
    entries, results = everything(f"imagefolder:{flat}")
    assert [entry[:3] for entry in entries] == [("train", "a.JPG", 0), ("train", "b.jpg", 0)]
    assert results == [b"1", b"2"]
    assert open_source(f"imagefolder:{flat}").classes == ["unlabelled"]
    halves = tree("halves", {"train/0.jpg": b"1", "train/a/b/0.jpg": b"2", "test/0.jpg": b"3", "loose.jpg": b"4"})
    (halves / "train" / "a" / "up").symlink_to(halves / "train")
    source = open_source(f"imagefolder:{halves}", "ignore")
    assert [entry[:3] for entry in source.entries()] == [
        ("train", "loose.jpg", 0),
        ("train", "0.jpg", 0),
        ("train", "a/b/0.jpg", 0),
        ("test", "test/0.jpg", 0),
    ]
    assert [row.names for row in source.left_out.rows()] == [["train/a/up"]]
    assert open_source("digits:", "ignore").classes == source.classes == ["unlabelled"]
    assert {entry.label for entry in open_source("digits:", "ignore").entries()} == {0}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/cat/0.jpg", "train/1.jpg"],
            r"raw/train holds both images and folders.*neither a class nor a split; move",
        ),
        (
            ["train/cat/0.jpg", "extra/cat/0.jpg"],
            r"raw/train holds class folders, but .*raw/extra lies beside it: only train, val and test",
        ),
        (["train/0.jpg", "val/0.jpg", "valid/0.jpg"], r"raw holds train, val, valid, of which two are validation images; keep"),
        (["train/cat/0.jpg", "val/dog/0.jpg"], r"raw/val has the class 'dog', which .*raw/train lacks; remove or rename it"),
        (["train/cat/0.jpg", "test/dog/0.jpg"], r"raw/test has the class 'dog', which .*raw/train lacks; remove or rename it"),
        (["class/notes.txt"], r"source directory .*raw holds no images; expected .*raw/<class>/<image>.jpg"),
        (["a/b/0.jpg"], r"source directory .*raw holds no images; expected .*, found .*raw/a/b/0.jpg; name the folder above"),
        (["train2017/0.jpg", "val2017/0.jpg"], r"raw holds the splits train2017, val2017 instead of classes; call them"),
        (["Training/0.jpg", "TEST/0.jpg"], r"raw holds the splits TEST, Training instead of classes; call them"),
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
    assert str(second) == f"{directory}/cat/1.jpg cannot be read: No such file or directory; check the path"
    with open(directory / "cat/1.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)
    assert str(list(source.read(entries))[1]) == f"{directory}/cat/1.jpg is larger than 1 GiB, so it is not read as an image"
    (directory / "cat/1.jpg").unlink()
    os.mkfifo(directory / "cat/1.jpg")
    assert str(list(source.read(entries))[1]) == f"{directory}/cat/1.jpg cannot be read: it is not a file"


def test_what_only_looks_like_an_image_is_counted(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "cat" / "good.jpg").write_bytes(b"x")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    source = open_source(f"imagefolder:{tmp_path}")
    entries = list(source.entries())
    assert [entry.key for entry in entries] == ["cat/good.jpg"]
    assert [(row.ending, row.reason, row.n, row.lost) for row in source.left_out.rows()] == [
        ("", "dangling links", 2, True),
        (".jpg", "dangling links", 1, True),
        (".jpg", "fifos, sockets or devices", 1, True),
    ]


@pytest.mark.parametrize("place", ["/etc/hostname", "../outside.png", "red/../../outside.png"])
def test_a_list_of_images_leads_nowhere_else(tiny_images, place):
    source = open_source(f"imagefolder:{tiny_images}")
    entry = next(source.entries())
    with pytest.raises(ValueError, match=f"names '{place}', which is not below"):
        list(source.read([entry, entry._replace(place=[place])]))
