"""No list says what an image is; what is left out is counted by ending and reason, in constant memory."""

import pickle

import pytest

from igpt_ds.data.left_out import LOOSE, BadImageError, LeftOut, Tally, ending_of, why_not


@pytest.mark.parametrize(
    "name", ["a.avif", "a.JFIF", "a.jp2", "a.pgm", "a.HEIC", "a.heif", "a.unheard", "photo", "a.jpg~", "a.1"]
)
def test_anything_may_be_an_image(name):
    assert why_not(f"folder.txt/{name}") is None


@pytest.mark.parametrize(
    "name", ["a.txt", "a.JSON", "a.cls", "Thumbs.db", "desktop.ini", "README", "a.tar.gz", ".DS_Store", "._a.jpg"]
)
def test_what_is_known_to_be_something_else(name):
    assert why_not(name) in ("not images by name", "hidden")


def test_endings():
    names = ["x/a.v2.JPG", "a", ".jpg", "x.y/a", "a.", "a.a_long_word_behind_a_dot"]
    assert [ending_of(name) for name in names] == [".jpg", "", "", "", ".", ""]


def test_rows_stay_few_and_join():
    tally = Tally()
    for number in range(1000):
        tally.add(f"{number}.{number}", LOOSE)
    tally.add("a.txt", "hidden", lost=False)
    rows = tally.rows()
    assert len(rows) <= 203
    assert sum(row.n for row in rows) == 1001
    assert tally.n_lost == 1000
    assert max(len(row.names) for row in rows) == 5
    again = Tally(rows)
    assert (again.rows(), again.n_lost) == (rows, 1000)
    with pytest.raises(
        ValueError, match=r"photos: 1000 left out, more than the 0.1 of 1500 .*beside.*; 196 more kinds; move .*--labels"
    ):
        tally.check("photos", 500, 0.1)
    tally.check("photos", 500, 0.7)


def test_a_reason_travels_between_processes():
    error = pickle.loads(pickle.dumps(BadImageError("it is empty", "empty")))
    assert (str(error), error.reason) == ("it is empty", "empty")


def test_a_line_break_in_a_name_makes_no_second_line():
    assert "\n" not in str(LeftOut(".x", "cannot be decoded", 1, ["a\nleft out    nothing"], True))
