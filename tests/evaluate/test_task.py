from typing import Any

import pytest

from openmint.errors import InvalidRequest
from openmint.evaluate.task import encode_task, parse_task, task_digest


def raw_task(**changes: Any) -> dict[str, Any]:
    items = [
        {"prompt": "2+2=", "answer": 4},
        {"messages": [{"role": "user", "content": "3+3?"}], "answer": "6"},
    ]
    return {"name": "sums", "scorer": "number", "items": items, **changes}


def test_a_task_survives_its_own_json() -> None:
    task = parse_task(raw_task())
    assert parse_task(encode_task(task)) == task
    assert task.items[0].answer == "4"
    assert task.items[1].prompt == (("user", "3+3?"),)


def test_the_digest_follows_the_content_alone() -> None:
    task = parse_task(raw_task())
    reordered = dict(reversed(raw_task(max_tokens=256).items()))
    assert task_digest(parse_task(reordered)) == task_digest(task)
    assert task_digest(parse_task(raw_task(max_tokens=255))) != task_digest(task)
    assert task_digest(task).startswith("sha256:")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "../x"}, "name"),
        ({"name": "x" * 300}, "name"),
        ({"scorer": "eval"}, "scorer"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"surprise": 1}, "surprise"),
        ({"items": []}, "items"),
        ({"items": [{"prompt": "x"}]}, "answer"),
        ({"items": [{"prompt": "x", "messages": [], "answer": "1"}]}, "not both"),
        ({"items": [{"prompt": "x", "answer": "none"}]}, "number"),
        ({"items": [{"prompt": "x", "answer": float("nan")}]}, "finite"),
        ({"items": [{"messages": [{"role": "tool", "content": "x"}], "answer": "1"}]}, "role"),
        ({"choices": ["A"]}, "choices"),
        ({"scorer": "choice", "choices": ["A"]}, "one of the task's choices"),
        ({"scorer": "regex", "items": [{"prompt": "x", "answer": "(a+)+"}]}, "repeat"),
        ({"stop": [""]}, "stop"),
        ({"name": "\ud800"}, "name"),
        ({"stop": ["\ud800"]}, "stop holds a lone surrogate"),
        ({"scorer": "choice", "choices": ["\ud800"]}, "choices holds a lone surrogate"),
        ({"items": [{"prompt": "\ud800", "answer": "1"}]}, r"items\[0\].prompt holds a lone"),
        ({"items": [{"prompt": "x", "answer": "1\ud800"}]}, r"items\[0\].answer holds a lone"),
        (
            {"items": [{"messages": [{"role": "user", "content": "\ud800"}], "answer": "1"}]},
            r"items\[0\].messages holds a lone",
        ),
    ],
)
def test_bad_tasks_are_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        parse_task(raw_task(**changes))
