"""ImageNet: class folders and the original tars give the same; the validation set has ground truth or is refused."""

import io

import numpy as np
import pytest
from scipy.io import savemat

from igpt_ds.data.sources import open_source

WNIDS = ["n01440764", "n01443537", "n02085620"]
TRAIN = {f"{wnid}/{wnid}_{number}.JPEG": f"{wnid} {number}".encode() for wnid in WNIDS for number in (18, 36, 5)}
TRUTH = [2, 0, 0, 1]  # class of each validation image
VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": b"%d" % number for number in range(1, 5)}
IDS = {wnid: number for number, wnid in zip((7, 2, 900), WNIDS, strict=True)}  # ILSVRC2012_ID, in no order
ROWS = [f"{name[:-5]},{WNIDS[k]} 1 2 3 4 \n" for name, k in zip(VAL, TRUTH, strict=True)]
CSV = "ImageId,PredictionString\n" + "".join(reversed(ROWS))


def kit():
    """The two files of the development kit, with a parent synset after the leaves as in the original."""
    rows = [(IDS[wnid], wnid, "a, b", "gloss", 0) for wnid in sorted(IDS, key=IDS.get)]
    rows += [(1001, "n00001740", "entity", "gloss", 3)]
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    numbers = "".join(f"{IDS[WNIDS[k]]}\n" for k in TRUTH).encode()
    return {"data/ILSVRC2012_validation_ground_truth.txt": numbers, "data/meta.mat": buffer.getvalue(), "readme.txt": b"-"}


def train_tar(directory, write_tar):
    """The tar of tars, the classes and images in no order."""
    tars = {}
    for wnid in reversed(WNIDS):
        images = {name.split("/")[1]: data for name, data in TRAIN.items() if name.startswith(wnid)}
        tars[f"{wnid}.tar"] = write_tar(directory / "inner.tar", images).read_bytes()
    (directory / "inner.tar").unlink()
    return write_tar(directory / "ILSVRC2012_img_train.tar", tars)


def val_tar(directory, write_tar):
    return write_tar(directory / "ILSVRC2012_img_val.tar", dict(reversed(VAL.items())))


def in_folders(below=""):
    return {f"{below}train/{name}": data for name, data in TRAIN.items()}


def flat(below=""):
    return {f"{below}val/{name}": data for name, data in VAL.items()}


@pytest.fixture
def forms(tree, write_tar, archive, tmp_path):
    """The same images in every layout; the first has the validation set in class folders."""
    sorted_val = {f"val/{WNIDS[k]}/{name}": data for (name, data), k in zip(VAL.items(), TRUTH, strict=True)}
    a = tree("a", in_folders() | sorted_val)
    b = tree("b", in_folders() | flat() | {"LOC_val_solution.csv": CSV.encode(), "train/.DS_Store": b"-", "val/notes.txt": b"-"})
    c = tree("c", {f"ILSVRC2012_devkit_t12/{name}": data for name, data in kit().items()})
    train_tar(c, write_tar)
    val_tar(c, write_tar)
    d = tree("d", flat())
    train_tar(d, write_tar)
    archive(c / "ILSVRC2012_devkit_t12", "w:gz", d / "ILSVRC2012_devkit_t12.tar.gz")
    cls_loc = "ILSVRC/Data/CLS-LOC/"
    e = tree("e", in_folders(cls_loc) | flat(cls_loc) | {f"{cls_loc}test/1.JPEG": b"-", "LOC_val_solution.csv": CSV.encode()})
    return a, b, c, d, e


def test_every_layout_gives_the_same(forms, everything):
    train = [("train", f"train/{name}", WNIDS.index(name[:9])) for name in sorted(TRAIN)]
    val = [("test", f"val/{name}", k) for name, k in zip(VAL, TRUTH, strict=True)]
    for directory in forms:
        entries, results = everything(f"imagenet:{directory}")
        assert open_source(f"imagenet:{directory}").classes == WNIDS
        expected = train + (sorted(val, key=lambda entry: entry[2]) if directory.name == "a" else val)
        assert [entry[:3] for entry in entries] == expected
        images = {f"train/{name}": data for name, data in TRAIN.items()} | {f"val/{name}": data for name, data in VAL.items()}
        assert results == [images[entry.key] for entry in entries]


def test_either_set_may_be_absent(tree, write_tar, everything):
    only_train, _ = everything(f"imagenet:{tree('train_only', in_folders())}")
    assert {entry.split for entry in only_train} == {"train"}
    for name in ("val_only", "val_tar_only"):
        directory = tree(name, {"LOC_val_solution.csv": CSV.encode()} | (flat() if name == "val_only" else {}))
        if name == "val_tar_only":
            val_tar(directory, write_tar)
        only_val, results = everything(f"imagenet:{directory}")
        assert [entry[:3] for entry in only_val] == [("test", f"val/{file}", k) for file, k in zip(VAL, TRUTH, strict=True)]
        assert results == list(VAL.values())
    folders = tree("val_folders", {f"val/{wnid}/{wnid}.JPEG": b"x" for wnid in WNIDS})
    assert [entry.label for entry in everything(f"imagenet:{folders}")[0]] == [0, 1, 2]


@pytest.mark.parametrize("tar", [False, True])
def test_validation_images_without_ground_truth_are_refused(tree, write_tar, tar):
    directory = tree("x", in_folders() if tar else in_folders() | flat())
    if tar:
        val_tar(directory, write_tar)
    where = "ILSVRC2012_img_val.tar" if tar else "val"
    message = rf"{directory}/{where} holds validation images, but no ground truth for them lies in {directory}; "
    with pytest.raises(ValueError, match=message + r"put LOC_val_solution.csv \(Kaggle\) or ILSVRC2012_devkit_t12.tar.gz"):
        open_source(f"imagenet:{directory}")


def problem(directory):
    with pytest.raises(ValueError, match=str(directory)) as caught:
        list(open_source(f"imagenet:{directory}").entries())
    return str(caught.value)


def test_what_is_no_imagenet_is_refused(tree):
    said = problem(tree("x", {"cat/0.jpg": b"-"}))
    assert "holds no ImageNet; expected in it train/<wnid>/*.JPEG, ILSVRC2012_img_train.tar" in said
    half = tree("half", in_folders() | flat() | {"val/n01440764/0.JPEG": b"-"})
    assert "half/val holds both loose images and class folders; finish moving them" in problem(half)


def test_classes_must_agree(tree):
    csv = {"LOC_val_solution.csv": CSV.encode().replace(b"n01440764", b"n09999999")}
    said = problem(tree("flat", in_folders() | flat() | csv))
    assert "the image val/ILSVRC2012_val_00000002.JPEG is of the class n09999999, which the training set lacks" in said
    said = problem(tree("folders", in_folders() | {"val/n09999999/0.JPEG": b"-"}))
    assert "the folder val/n09999999 is of the class n09999999, which the training set lacks; add or remove the class" in said
    said = problem(tree("short", in_folders() | flat() | {"LOC_val_solution.csv": CSV[: CSV.rindex("ILSVRC")].encode()}))
    assert "LOC_val_solution.csv has no class for the image ILSVRC2012_val_00000001.JPEG; remove the image or" in said


def test_an_empty_class_is_named(tree, write_tar):
    said = problem(tree("folders", in_folders() | {"train/n01530575/notes.txt": b"-"}))
    assert "train/n01530575 holds no images; fill it or remove it" in said
    directory = tree("tars", {"notes.txt": b"-"})
    inner = write_tar(directory / "inner.tar", {"notes.txt": b"-"}).read_bytes()
    write_tar(directory / "ILSVRC2012_img_train.tar", {"n01440764.tar": inner})
    assert "ILSVRC2012_img_train.tar (n01440764.tar) holds no images; download it again" in problem(directory)


@pytest.mark.parametrize("members", [{}, {"n01440764/1.JPEG": b"-"}])
def test_a_train_tar_of_anything_but_tars_is_refused(tree, write_tar, members):
    directory = tree("x", {"notes.txt": b"-"})
    write_tar(directory / "ILSVRC2012_img_train.tar", members)
    found = next(iter(members), "nothing")
    assert f"ILSVRC2012_img_train.tar holds {found}, expected only <wnid>.tar; download it again" in problem(directory)


def test_what_lies_beside_and_below_the_classes_is_counted(tree):
    wnid = f"train/{WNIDS[0]}"
    odd = {"train/loose.JPEG": b"-", f"{wnid}/deep/er.JPEG": b"-", f"{wnid}/notes.txt": b"-", f"{wnid}/odd.heic": b"-"}
    source = open_source(f"imagenet:{tree('x', in_folders() | odd | {'test/1.JPEG': b'-'})}")
    assert f"{wnid}/odd.heic" in {entry.key for entry in source.entries()}
    assert [(row.reason, row.names) for row in source.left_out.rows()] == [
        ("beside the class folders", ["train/loose.JPEG"]),
        ("deeper than a class folder", [f"{wnid}/deep/er.JPEG"]),
        ("test sets without labels", ["test"]),
        ("not images by name", [f"{wnid}/notes.txt"]),
    ]


def test_validation_images_need_no_ground_truth_without_labels(tree):
    source = open_source(f"imagenet:{tree('x', in_folders() | flat())}", "ignore")
    entries = list(source.entries())
    assert {entry.label for entry in entries} == {0}
    assert [entry.key for entry in entries if entry.split == "test"] == [f"val/{name}" for name in VAL]
    anywhere = {"train/loose.JPEG": b"-", f"train/{WNIDS[0]}/deep/er.JPEG": b"-", f"val/{WNIDS[0]}/0.JPEG": b"-"}
    source = open_source(f"imagenet:{tree('x', anywhere)}", "ignore")
    assert {entry.key for entry in source.entries()} - {entry.key for entry in entries} == {*list(anywhere)[:2], "val/0.JPEG"}
    assert source.left_out.rows() == []


def test_a_cut_tar_is_named(tree, write_tar):
    directory = tree("x", {"LOC_val_solution.csv": CSV.encode()})
    for make, ends in ((val_tar, 512 * 8), (train_tar, 3 * 512 + 3 * 10240)):  # what is left is padding
        path = make(directory, write_tar)
        whole = path.read_bytes()
        for length in (1, 511, 512, 700, 2000, ends - 1, ends):
            path.write_bytes(whole[:length])
            assert any(text in problem(directory) for text in ("was cut or damaged at byte", "is not a plain tar ("))
        path.unlink()
    path = write_tar(path, {"n01440764.tar": b"no tar" * 200})
    assert f"{path} (n01440764.tar) is not a plain tar" in problem(directory)


def test_damaged_ground_truth_is_named(tree):
    files = in_folders() | flat()
    assert "LOC_val_solution.csv is not a table of ImageId,PredictionString" in problem(
        tree("a", files | {"LOC_val_solution.csv": b"a,b\n1,2\n"})
    )
    parts = {f"ILSVRC2012_devkit_t12/{name}": data for name, data in kit().items()}
    meta, numbers = "ILSVRC2012_devkit_t12/data/meta.mat", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    said = problem(tree("b", files | parts | {meta: b"x"}))
    assert "meta.mat cannot be read as the development kit's table of classes: " in said
    said = problem(tree("c", files | parts | {numbers: b"7\n12\n"}))
    assert "ground_truth.txt holds b'12', a class number that meta.mat lacks" in said
    del parts[meta]
    assert "data/meta.mat does not exist; unpack or download the dataset again" in problem(tree("d", files | parts))


def test_a_tar_that_changed_after_listing_is_an_error(tree, write_tar):
    directory = tree("x", {"notes.txt": b"-"})
    path = train_tar(directory, write_tar)
    source = open_source(f"imagenet:{directory}")
    entries = list(source.entries())
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match=rf"{path} was listed up to byte \d+ \(train/.*JPEG\) but ends before; list it again"):
        list(source.read(entries))
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} cannot be read: No such file or directory"):
        list(source.read(entries))
