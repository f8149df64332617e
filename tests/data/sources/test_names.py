"""The name of the images is that of their source."""

from __future__ import annotations

import pytest

from igpt_ds.data.sources.names import dataset_name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("imagefolder:photos", "photos"),
        ("imagefolder:my/photos/", "photos"),
        ("imagefolder:photos,test=others", "photos"),
        ("imagefolder:a|b c", "a|b c"),
        ("imagefolder:.", "here"),
        ("imagefolder:/", "imagefolder"),
        ("cifar10:cifar-10-batches-bin", "cifar10"),
        ("imagenet:ILSVRC2012", "imagenet"),
        ("digits:", "digits"),
        ("webdataset:web", "web"),
        ("webdataset:laion-a.tar", "laion-a"),
        ("webdataset:web/{00000..00099}.tar", "web"),
        ("webdataset:web/train-{00000..00099}.tar", "web"),
        ("webdataset:web/laion-{00000..00099}.tar", "laion"),
        ("webdataset:{00000..00099}.tar", "here"),
        ("webdataset:pipe:curl -sL https://host/laion/{000..009}.tar", "laion"),
        ("webdataset:pipe:cat 'web/birds-{000..009}.tar'", "birds"),
        ("webdataset:pipe:make-tars", "webdataset"),
    ],
)
def test_names(spec, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert dataset_name(spec) == name
