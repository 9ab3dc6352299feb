import numpy as np
from fake_runs import finding

from gradwatch_dashboard.marks import finding_marks, marks_height

STEPS = np.arange(0, 4000, 10)


def test_a_mark_stands_on_the_column_that_holds_the_step() -> None:
    (mark,) = finding_marks([finding("vanishing", "r", first_step=1237)], STEPS)
    assert mark.x == 1230
    assert mark.text == "Vanishing gradients, step 1,237"


def test_findings_of_one_column_share_a_mark_and_name_each_kind_once() -> None:
    found = [
        finding("vanishing", "r", first_step=101),
        finding("vanishing", "r", first_step=102),
        finding("dead_units", "r", first_step=103),
    ]
    (mark,) = finding_marks(found, STEPS)
    assert mark.text == "Vanishing gradients + Dead units, step 101"


def test_labels_that_would_meet_stand_on_different_levels() -> None:
    found = [finding("vanishing", "r", first_step=step) for step in (100, 200, 3900)]
    marks = finding_marks(found, STEPS)
    assert [mark.level for mark in marks] == [0, 1, 0]
    assert [mark.anchor for mark in marks] == ["left", "left", "right"]
    assert marks_height(marks) == 2 * marks_height(marks[:1])
    assert marks_height([]) == 0


def test_a_step_before_the_first_column_has_no_mark() -> None:
    assert finding_marks([finding("vanishing", "r", first_step=3)], STEPS + 100) == []


def test_a_title_cannot_bring_markup_of_its_own() -> None:
    (mark,) = finding_marks([finding("vanishing", "r", title="<b>x")], STEPS)
    assert mark.text.startswith("&lt;b&gt;x")
