"""`webdataset:`: tars as img2dataset writes them, on disk and out of commands; nothing is lost without a word."""

import json
import os
import tarfile
import tracemalloc

import pytest
import webdataset

from igpt_ds.data.sources import open_source
from igpt_ds.data.sources.tars import tar_window, walk


@pytest.fixture
def web(tmp_path, write_tar, encoded):
    """Three tars of img2dataset's making with what lies beside them, and the images by key."""
    images = {}
    for shard, count in enumerate((4, 3, 0)):
        members = {}
        for index in range(count):
            key, (extension, form) = f"{shard:05d}{index:04d}", [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][index % 3]
            images[f"{shard:05d}/{key}"] = data = encoded(10 * shard + index, form)
            members |= {f"{key}.{extension}": data, f"{key}.json": json.dumps({"key": key}).encode(), f"{key}.txt": b"a caption"}
        write_tar(tmp_path / "web" / f"{shard:05d}.tar", members)
        (tmp_path / "web" / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / "web" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    (tmp_path / "web" / "._00000.tar").write_bytes(b"left by another system")
    return tmp_path / "web", images


def test_every_way_to_name_the_tars_gives_the_same(web, everything):
    directory, images = web
    specs = [str(directory), f"{directory}/{{00000..00002}}.tar", f"pipe:cat {directory}/{{00000..00002}}.tar"]
    specs += [f"pipe:gzip -c '{directory}/{{00000..00002}}.tar' | gunzip"]
    for spec in specs:
        entries, results = everything(f"webdataset:{spec}")
        assert {(entry.split, entry.label) for entry in entries} == {("train", 0)}
        assert dict(zip((entry.key for entry in entries), results, strict=True)) == images
        assert [entry.key for entry in entries] == list(images)
        assert open_source(f"webdataset:{spec}").classes == ["unlabelled"]
    entries, _ = everything(f"webdataset:{directory}/00001.tar")
    assert [entry.key for entry in entries] == [key for key in images if key.startswith("00001/")]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars to the garbage collector
def test_webdataset_reads_the_same_images(web):
    directory, images = web
    read = {}
    for shard in ("00000", "00001"):
        for sample in webdataset.WebDataset(str(directory / f"{shard}.tar"), shardshuffle=False, empty_check=False):
            read[f"{shard}/{sample['__key__']}"] = next(sample[name] for name in ("jpg", "png", "webp") if name in sample)
    assert read == images
    source = open_source(f"webdataset:{directory}")
    assert list(source.read(list(source.entries()))) == list(read.values())


def test_labels_come_from_cls_members(tmp_path, write_tar, everything):
    members = {
        "b/1.cls": b"3",
        "b/1.jpg": b"x",
        "a.jpg": b"y",
        "a.cls": b" 1\n",
        "a.seg.png": b"-",
        "./.c.jpg": b"-",
        "d.txt": b"-",
    }
    members |= {"e.JPG": b"z", "e.cls": b"0"}
    path = write_tar(tmp_path / "shard.v2.tar", members)
    for spec in (path, f"pipe:cat {path}"):
        entries, results = everything(f"webdataset:{spec}")
        assert open_source(f"webdataset:{spec}").classes == ["0", "1", "2", "3"]
        assert [entry[1:3] for entry in entries] == [("shard.v2/b/1", 3), ("shard.v2/a", 1), ("shard.v2/e", 0)]
        assert results == [b"x", b"y", b"z"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\nowl\n")
    assert everything(f"webdataset:{path}")[0][0].label == 3
    assert open_source(f"webdataset:{path}").classes == ["cat", "dog", "emu", "owl"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    with pytest.raises(ValueError, match=rf"{path}: b/1 has the label 3, but {tmp_path}/classes.txt names 3 classes"):
        list(open_source(f"webdataset:{path}").entries())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a.cls holds b'cat' where a class number should stand"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, r"a.cls holds b'-1' where a class number should stand"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x"}, r"b has no .cls member, unlike the first image; label all or none"),
        ({"a.jpg": b"x", "b.jpg": b"x", "b.cls": b"1"}, r"b has a .cls member, unlike the first image; label all or none"),
        ({"a.jpg": b"x", "a.png": b"x"}, r"holds two images of the key 'a'; give each a name of its own"),
        ({"a.jpg": b"x", "b.jpg": b"x", "a.png": b"x"}, r"holds two images of the key 'a'; give each a name of its own"),
        ({"a.json": b"x", ".notes": b"x"}, r"holds no images; expected members that end in .jpg, .jpeg, .png, .webp"),
    ],
)
@pytest.mark.parametrize("pipe", [False, True])
def test_contradictions_are_named(tmp_path, write_tar, members, message, pipe):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=rf"{path}:? {message}|{path}: {message}"):
        list(open_source(f"webdataset:pipe:cat {path}" if pipe else f"webdataset:{path}").entries())


@pytest.mark.parametrize("pipe", [False, True])
def test_every_cut_and_every_damaged_header_is_named(tmp_path, write_tar, pipe):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 600, "b.jpg": b"y" * 512, "c.jpg": b"z" * 10})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    spec = f"webdataset:pipe:cat {path}" if pipe else f"webdataset:{path}"
    name = f"cat {path}" if pipe else str(path)
    for length in [*range(0, end + 512, 128), end + 511]:  # then comes the first block of the mark, and padding
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"^{name} (was cut or damaged at byte \d+: |is not a plain tar \()"):
            list(open_source(spec).entries())
    path.write_bytes(whole[: end + 512])
    assert len(list(open_source(spec).entries())) == 3
    second = 512 + 1024
    path.write_bytes(whole[: second + 3] + b"!" + whole[second + 4 :])  # tarfile takes this for the end of the archive
    with pytest.raises(
        ValueError, match=rf"^{name} was cut or damaged at byte {second}: neither a header nor the end of the archive"
    ):
        list(open_source(spec).entries())
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match=rf"^{name} continues after the end of its archive at byte {end}; tars joined by cat"):
        list(open_source(spec).entries())


def test_a_compressed_tar_is_no_plain_tar(tmp_path, archive, web):
    path = archive(web[0], "w:gz", tmp_path / "web.tar")
    with pytest.raises(ValueError, match=rf"{path} is not a plain tar \(.*\); decompress it, or copy it again"):
        list(open_source(f"webdataset:{path}").entries())


def test_a_failing_command_is_named(web, tmp_path):
    directory, _ = web
    whole = f"cat {directory}/00000.tar"
    for command, status in ((f"{whole}; exit 7", 7), (f"head -c 1500 {directory}/00000.tar; exit 22", 22), ("exit 3", 3)):
        with pytest.raises(ValueError, match=rf"^the command '{command}' failed with exit status {status}; run it by hand"):
            list(open_source(f"webdataset:pipe:{command}").entries())
    switch = tmp_path / "switch"
    source = open_source(f"webdataset:pipe:{whole}; test ! -e {switch}")
    entries = list(source.entries())
    switch.touch()
    assert next(iter(source.read(entries[:1])))  # was ended before it failed
    with pytest.raises(ValueError, match=r"failed with exit status 1"):
        list(source.read([entries[0]._replace(place=[entries[0].place[0], 99])]))


def test_a_command_runs_once_for_images_in_order_and_ends_when_they_are_read(web, tmp_path):
    directory, images = web
    log = tmp_path / "log"
    source = open_source(f"webdataset:pipe:echo run >> {log}; cat {directory}/00000.tar; echo end >> {log}; sleep 100")
    entries = []
    for entry in source.entries():  # the walk would wait for the command's end, so leave it at the last image
        entries.append(entry)
        if len(entries) == 3:
            break
    log.write_text("")
    assert list(source.read(entries)) == list(images.values())[:3]
    assert log.read_text().splitlines().count("run") == 1
    log.write_text("")
    assert list(source.read(entries[::-1])) == list(images.values())[2::-1]
    assert log.read_text().splitlines().count("run") == 3


def test_a_command_that_changed_after_listing_is_an_error(web):
    directory, _ = web
    spec = f"webdataset:pipe:cat {directory}/00000.tar"
    source = open_source(spec)
    entries = list(source.entries())
    path = directory / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes((directory / "00002.tar").read_bytes())
    with pytest.raises(ValueError, match=rf"the command 'cat {path}' gives no member 0 any more; it was changed"):
        list(source.read(entries))
    path.write_bytes(whole[:600])
    with pytest.raises(ValueError, match=rf"cat {path} was cut in 000000000.jpg; copy it again"):
        list(source.read(entries))


def test_keys_begin_with_what_tells_the_tars_apart(tmp_path, write_tar):
    for folder in "ab":
        write_tar(tmp_path / folder / "0.tar", {"x.jpg": b"x"})
    braces = f"{tmp_path}/{{a,b}}/0.tar"
    with pytest.raises(
        ValueError, match=r"two tars are called 0.tar, so that keys would not be unique; give each a name of its own"
    ):
        open_source(f"webdataset:{braces}")
    assert [entry.key for entry in open_source(f"webdataset:pipe:cat {braces}").entries()] == ["0/x", "1/x"]
    nameless = f"pipe:cd {tmp_path}/{{a,b}} && cat *"
    assert [entry.key for entry in open_source(f"webdataset:{nameless}").entries()] == ["0/x", "1/x"]


def test_a_path_may_hold_braces(tmp_path, write_tar):
    path = write_tar(tmp_path / "{a,b}.tar", {"x.jpg": b"x"})
    assert [entry.key for entry in open_source(f"webdataset:{path}").entries()] == ["{a,b}/x"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "{tmp}/{{0..2}}.tar",
            r"tar {tmp}/0.tar does not exist; name a tar, a folder of tars, or several as \{00000..00099\}.tar",
        ),
        ("{tmp}", r"source directory {tmp} holds no tars; expected {tmp}/<name>.tar"),
        (
            "https://host/0.tar",
            r"webdataset:https://host/0.tar is not on disk; write for example 'webdataset:pipe:curl",
        ),
        ("s3://host/0.tar", "'webdataset:pipe:aws s3 cp s3://host/0.tar -'"),
        ("hf://host/0.tar", "hf://host/0.tar is not on disk; copy the tars to a disk"),
        ("{tmp}/{{0..99999999999}}.tar", "{tmp}/.* more than 1048576 tars"),
        ("{tmp}/{{0..2.tar", r"webdataset: the braces of '{tmp}/\{0..2.tar' do not match; write for example \{00000..00099\}"),
    ],
)
def test_specs_that_name_nothing_are_refused(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message.replace("{tmp}", str(tmp_path))):
        open_source(f"webdataset:{spec.format(tmp=tmp_path)}")


def test_a_walk_keeps_nothing(tmp_path, write_tar):
    peaks = []
    for n in (200, 4000):
        path = write_tar(tmp_path / f"{n}.tar", {f"{index:09d}.jpg": b"x" for index in range(n)})
        tracemalloc.start()
        with tar_window(path) as window:
            assert sum(1 for _ in walk(window, str(path))) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    small, large = peaks
    assert large < 1.1 * small


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"a.jpg": b"x", "b.jpg": b"y", "a.cls": b"1", "b.cls": b"2"},
            "the label of a does not lie beside its image; pack the tar",
        ),
        ({"a.cls": b"1", "b.jpg": b"y"}, "the label of a does not lie beside its image; pack the tar sorted by name"),
        (
            {"no.1.jpg": b"x", "no.2.jpg": b"y"},
            "holds two images of the key 'no'; give each a name of its own up to the first dot: no.1.jpg and no.2.jpg",
        ),
        ({"a.jpg": b"x", "a.cls": b"99999999999999"}, "a.cls holds the class number 99999999999999; at most 999999"),
        ({"a.jpg": b"x", "a.cls": b"1000000"}, "a.cls holds the class number 1000000; at most 999999"),
    ],
)
def test_what_would_be_lost_or_fill_the_memory(tmp_path, write_tar, members, message):
    path = write_tar(tmp_path / "web.tar", members)
    for spec in (path, f"pipe:cat {path}"):
        with pytest.raises(ValueError, match=message):
            list(open_source(f"webdataset:{spec}").entries())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_tars_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = kind, "b.jpg"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"web.tar holds the link or sparse file a.jpg; pack the tar again with plain files"):
        list(open_source(f"webdataset:{tmp_path / 'web.tar'}").entries())


def test_a_pipe_without_a_command():
    with pytest.raises(ValueError, match="webdataset:pipe: names no command; write for example"):
        open_source("webdataset:pipe:")


@pytest.mark.parametrize("pipe", [False, True])
def test_a_list_of_images_runs_no_command_and_opens_no_other_tar(web, tmp_path, pipe):
    directory, _ = web
    spec = f"pipe:cat {directory}/00000.tar" if pipe else f"{directory}/00000.tar"
    source = open_source(f"webdataset:{spec}")
    entry = next(source.entries())
    for place in (f"touch {tmp_path}/ran", f"{directory}/00001.tar"):
        with pytest.raises(ValueError, match=r"which webdataset:.* does not; list the images again"):
            list(source.read([entry, entry._replace(place=[place, *entry.place[1:]])]))
    assert not (tmp_path / "ran").exists()


def left_out(source):
    """What a listing leaves out: [(ending, reason, n, lost)]."""
    list(source.entries())
    return [(row.ending, row.reason, row.n, row.lost) for row in source.left_out.rows()]


def test_keys_and_extensions_follow_webdataset(tmp_path, write_tar, everything):
    members = {"a.input.jpg": b"1", "a.input.json": b"-", "b.AVIF": b"2", "b.seg.png": b"-", "c.jpg": b"3", "c.emb": b"-"}
    path = write_tar(tmp_path / "web.tar", members | {"d.HEIC": b"4", ".e.jpg": b"-"})
    entries, results = everything(f"webdataset:{path}")
    assert [(entry.key, entry.ending) for entry in entries] == [
        ("web/a", ".jpg"),
        ("web/b", ".avif"),
        ("web/c", ".jpg"),
        ("web/d", ".heic"),
    ]
    assert results == [b"1", b"2", b"3", b"4"]
    beside = "beside an image of the same key"
    assert left_out(open_source(f"webdataset:{path}")) == [
        (".emb", beside, 1, False),
        (".jpg", "hidden", 1, False),
        (".json", "not images by name", 1, False),
        (".png", beside, 1, False),
    ]


def test_labels_that_are_read_are_not_left_out(tmp_path, write_tar):
    path = write_tar(tmp_path / "web.tar", {"a.jpg": b"x", "a.cls": b"0"})
    assert left_out(open_source(f"webdataset:{path}")) == []
    assert left_out(open_source(f"webdataset:{path}", labels="ignore")) == [(".cls", "not images by name", 1, False)]


@pytest.mark.parametrize("pipe", [False, True])
def test_a_torn_tar_among_others_is_counted(tmp_path, write_tar, everything, pipe):
    members = {f"{name}.jpg": b"x" * 600 for name in "abcd"}
    paths = [write_tar(tmp_path / "web" / f"{number}.tar", members) for number in range(3)]
    paths[1].write_bytes(paths[1].read_bytes()[:3200])
    (tmp_path / "web" / "4.tar.part").write_bytes(b"-")
    spec = f"webdataset:pipe:cat {tmp_path}/web/{{0..2}}.tar" if pipe else f"webdataset:{tmp_path}/web"
    entries, _ = everything(spec)
    assert [entry.key for entry in entries if entry.key.startswith("1/")] == ["1/a"]
    source = open_source(spec)
    assert left_out(source) == [("", "images in torn tars, estimated", 3, True)] + [(".part", "not in a tar", 1, True)] * (
        not pipe
    )
    assert f"{paths[1]} was cut or damaged at byte 3072" in source.left_out.rows()[0].names[0]
    for path in paths:
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"0.tar was cut or damaged at byte \d+"):
        list(open_source(spec).entries())


@pytest.mark.parametrize("pipe", [False, True])
def test_tars_of_several_splits(tmp_path, write_tar, pipe):
    def opened(*names):
        if pipe:
            return open_source(f"webdataset:pipe:cat {tmp_path}/my-train-set/{{{','.join(names)}}}.tar")
        return open_source(f"webdataset:{tmp_path}/my-train-set")

    def write(*names):
        for name in names:
            write_tar(tmp_path / "my-train-set" / f"{name}.tar", {"a.jpg": name.encode()})

    write("test_0", "train_0")
    assert [entry[:2] for entry in opened("test_0", "train_0").entries()] == [("train", "train_0/a"), ("test", "test_0/a")]
    write("Validation-0")
    with pytest.raises(ValueError, match=r"test_0.tar and .*Validation-0.tar are of different splits: validation images are"):
        opened("test_0", "train_0", "Validation-0")
    (only,) = open_source(f"webdataset:{tmp_path}/my-train-set/Validation-0.tar").entries()
    assert only.split == "train"


def test_what_beside_the_tars_may_hold_images_is_refused(tmp_path, write_tar):
    write_tar(tmp_path / "web" / "0.tar", {"a.jpg": b"x"})
    for name, program in (("1.tar.gz", "gunzip"), ("1.TGZ", "gunzip"), ("1.tar.xz", "unxz")):
        (tmp_path / "web" / name).write_bytes(b"x")
        with pytest.raises(
            ValueError, match=rf"{name} is compressed, .*decompress it \({program} {tmp_path}/web/{name}\), or move"
        ):
            open_source(f"webdataset:{tmp_path}/web")
        (tmp_path / "web" / name).unlink()
    write_tar(tmp_path / "web" / "more" / "1.tar", {"b.jpg": b"x"})
    with pytest.raises(ValueError, match=rf"{tmp_path}/web/more holds tars one folder too deep"):
        open_source(f"webdataset:{tmp_path}/web")


def test_fifos_and_devices_are_refused(tmp_path, write_tar):
    write_tar(tmp_path / "web" / "0.tar", {"a.jpg": b"x"})
    os.mkfifo(tmp_path / "web" / "1.tar")
    with pytest.raises(ValueError, match=r"1.tar .*not a file"):
        list(open_source(f"webdataset:{tmp_path}/web").entries())
    with pytest.raises(ValueError, match=r"1.tar .*not a file"):
        open_source(f"webdataset:{tmp_path}/web/1.tar")
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        device = tarfile.TarInfo("a.jpg")
        device.type = tarfile.FIFOTYPE
        tar.addfile(device)
    with pytest.raises(ValueError, match=r"web.tar holds the device or fifo a.jpg; pack the tar again"):
        list(open_source(f"webdataset:{tmp_path / 'web.tar'}").entries())


def test_labels_may_be_ignored(tmp_path, write_tar):
    members = {"a.jpg": b"x", "a.cls": b"cat", "b.jpg": b"x", "c.jpg": b"x", "c.cls": b"7"}
    path = write_tar(tmp_path / "web.tar", members)
    source = open_source(f"webdataset:{path}", "ignore")
    assert [entry[1:3] for entry in source.entries()] == [("web/a", 0), ("web/b", 0), ("web/c", 0)]
    assert source.classes == ["unlabelled"]
