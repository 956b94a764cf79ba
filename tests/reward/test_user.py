import re

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import Score, make_reward

USER_MODULE = """
from megatron_fipo.reward import Score

def lengths(responses, ground_truths, data_sources):
    return [len(response) for response in responses]

def by_source(responses, ground_truths, data_sources):
    return [Score(0.25, float(source == "aime"), "x") for source in data_sources]

def one_short(responses, ground_truths, data_sources):
    return [1.0] * (len(responses) - 1)

def not_a_number(responses, ground_truths, data_sources):
    return [1.0, float("nan")]

def words(responses, ground_truths, data_sources):
    return ["good"] * len(responses)

def half_right(responses, ground_truths, data_sources):
    return [Score(1.0, 0.5)] * len(responses)

class Closing:
    closed = False
    def __call__(self, responses, ground_truths, data_sources):
        return [0.0] * len(responses)
    def close(self):
        self.closed = True

closing = Closing()
CONSTANT = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, importable for this test."""
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def call(name):
    reward = make_reward(RewardConfig(function=f"user_rewards:{name}"))
    return reward(["ab", ""], ["1", "2"], ["dapo", "aime"])


@pytest.mark.usefixtures("module")
def test_numbers_become_scores():
    """A number is the reward, and counts as right from 0.5 on."""
    assert call("lengths") == [Score(2.0, 1.0), Score(0.0, 0.0)]


@pytest.mark.usefixtures("module")
def test_scores_are_kept():
    """A Score passes as it is; the function sees the data sources."""
    assert call("by_source") == [Score(0.25, 0.0, "x"), Score(0.25, 1.0, "x")]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_short", "user_rewards:one_short returned 1 results for 2 responses"),
        ("not_a_number", "user_rewards:not_a_number returned reward nan for response 1"),
        ("words", "user_rewards:words returned 'good' for response 0: must be a number or a Score"),
        ("half_right", "user_rewards:half_right returned accuracy 0.5 for response 0: must be 0 or 1"),
    ],
)
def test_bad_results_name_the_function(name, message):
    """The result of a user function is checked, and the error says which function and which response."""
    with pytest.raises(ValueError, match=re.escape(message)):
        call(name)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user_rewards:missing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        (":f", "cannot be imported"),
        ("user_rewards:CONSTANT", "must be a function, got int"),
        ("dappo", "must be one of dapo, math, exact, package.module:function"),
    ],
)
def test_unknown_functions(path, message):
    """A name that leads nowhere is a ValueError when the reward is made, not at the first step."""
    with pytest.raises(ValueError, match=message):
        make_reward(RewardConfig(function=path))


@pytest.mark.usefixtures("module")
def test_close_reaches_the_users_object():
    """`close()` of a user's callable object is called; a plain function needs none."""
    import user_rewards

    make_reward(RewardConfig(function="user_rewards:closing")).close()
    assert user_rewards.closing.closed
    make_reward(RewardConfig(function="user_rewards:lengths")).close()


GRADES = """
def grades(responses, ground_truths, data_sources):
    return [0.2, 0.9, 0.5]

def binary(responses, ground_truths, data_sources):
    return [0, 1, -1]
"""


@pytest.fixture
def graded(tmp_path, monkeypatch):
    """A module of functions that give grades."""
    (tmp_path / "user_grades.py").write_text(GRADES)
    monkeypatch.syspath_prepend(tmp_path)


def _graded(name, **settings):
    reward = make_reward(RewardConfig(function=f"user_grades:{name}", **settings))
    return reward(["", "", ""], ["1"] * 3, [""] * 3)


@pytest.mark.usefixtures("graded")
def test_grades_count_as_right_from_a_threshold_on():
    """The reward is the grade itself; accuracy asks whether it reaches reward.accuracy_threshold, 0.5 if not given."""
    assert _graded("grades") == [Score(0.2, 0.0), Score(0.9, 1.0), Score(0.5, 1.0)]
    assert [s.accuracy for s in _graded("grades", accuracy_threshold=0.8)] == [0.0, 1.0, 0.0]


@pytest.mark.usefixtures("graded")
@pytest.mark.parametrize(
    ("name", "settings", "warnings"),
    [("grades", {}, 1), ("grades", {"accuracy_threshold": 0.5}, 0), ("binary", {}, 0)],
)
def test_grades_without_a_threshold_are_warned_of_once(caplog, name, settings, warnings):
    """The warning names the function, the grade and the setting; 0, 1 and -1 are no grades."""
    _graded(name, **settings)
    found = [r.getMessage() for r in caplog.records]
    assert len(found) == warnings
    assert all(
        text in message
        for message in found
        for text in ("user_grades:grades", "returned 0.2", "reward.accuracy_threshold")
    )
