"""A spec is opened or refused; the digits are those that scikit-learn brings."""

import numpy as np
import pytest

from igpt_ds.data.sources import KINDS, open_source


@pytest.mark.parametrize("spec", ["", "digits", "digits:8", "imagefolder", "imagefolder:", "cifar:/data", "/data", "cifar10:"])
def test_unknown_source_is_refused(spec):
    with pytest.raises(ValueError, match=rf"source '{spec}' is unknown; known: imagenet:DIR, .*, imagefolder:DIR, .*digits:$"):
        open_source(spec)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "digits"])
def test_a_path_that_does_not_exist_is_named(kind, tmp_path):
    said = r"(does not exist|holds no ImageNet).* expected|does not exist; name a tar"
    with pytest.raises(ValueError, match=rf"{tmp_path}/none ({said})"):
        open_source(f"{kind}:{tmp_path}/none")


def test_digits_are_the_bundled_ones(everything):
    from sklearn.datasets import load_digits

    bundled = load_digits()
    entries, results = everything("digits:")
    assert open_source("digits:").classes == list("0123456789")
    assert [entry.key for entry in entries] == [f"{label}/{index:04d}" for index, label in enumerate(bundled.target)]
    assert [entry.label for entry in entries] == bundled.target.tolist()
    assert {entry.split for entry in entries} == {"train"}
    images = np.stack(results)
    assert (images.shape, images.dtype) == ((1797, 8, 8, 3), np.uint8)
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], np.rint(bundled.images * 255 / 16))
    assert {0, 255} <= set(np.unique(images).tolist())
