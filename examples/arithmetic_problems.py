"""Two-step grade-school word problems of our own making, in GSM8K's schema.

    >>> Problem(question="Mia has 3 bags of 4 eggs and gives 5 eggs to Tom. How many eggs are left?",
    ...         answer="3*4=12\\n12-5=7\\n#### 7")

Questions stay short and numbers small (single digits in, two digits out), so that a model of a million
parameters half-learns them in a minute on a laptop and reinforcement learning has something to add.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from xrl.data.gsm8k import convert_row

NAMES = ("Tom", "Mia", "Sam", "Ana", "Ben", "Zoe", "Leo", "Eva", "Max", "Ivy", "Dan", "Amy")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "eggs", "toys", "cakes")
PACKS = ("boxes", "bags", "packs", "jars")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row of GSM8K: the question, and the worked answer that ends in `#### <number>`."""

    question: str
    answer: str

    @property
    def ground_truth(self) -> str:
        """The number after `####`."""
        return self.answer.rsplit("#### ", 1)[1]


class _Draw:
    """The words and numbers of one problem."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name, self.other = rng.sample(NAMES, 2)
        self.things, self.more_things = rng.sample(THINGS, 2)
        self.packs = rng.choice(PACKS)

    def amount(self) -> int:
        """Something to add."""
        return self.rng.randint(2, 9)

    def factor(self) -> int:
        """Something to multiply."""
        return self.rng.randint(2, 5)

    def part(self, whole: int) -> int:
        """Something to take away from `whole`."""
        return self.rng.randint(1, min(whole - 1, 9))


# Each template returns the question and its two steps, written as Python would read them.


def _buys_packs(d: _Draw) -> tuple[str, str, str]:
    a, x, y = d.amount(), d.factor(), d.factor()
    question = f"{d.name} has {a} {d.things} and buys {x} {d.packs} of {y}. How many {d.things} does {d.name} have now?"
    return question, f"{x}*{y}", f"{x * y}+{a}"


def _gives_away(d: _Draw) -> tuple[str, str, str]:
    x, y = d.factor(), d.factor()
    c = d.part(x * y)
    question = f"{d.name} has {x} {d.packs} of {y} {d.things} and gives {c} to {d.other}. How many {d.things} are left?"
    return question, f"{x}*{y}", f"{x * y}-{c}"


def _together(d: _Draw) -> tuple[str, str, str]:
    a, c = d.amount(), d.amount()
    question = (
        f"{d.name} has {a} {d.things}. {d.other} has {c} more than {d.name}. How many {d.things} do they have together?"
    )
    return question, f"{a}+{c}", f"{a + c}+{a}"


def _finds_and_loses(d: _Draw) -> tuple[str, str, str]:
    a, c = d.amount(), d.amount()
    lost = d.part(a + c)
    question = (
        f"{d.name} finds {a} {d.things} on Monday and {c} on Tuesday, then loses {lost}. How many {d.things} are left?"
    )
    return question, f"{a}+{c}", f"{a + c}-{lost}"


def _sells(d: _Draw) -> tuple[str, str, str]:
    x, y, price = d.factor(), d.factor(), d.factor()
    question = (
        f"{d.name} sells {x} {d.things} and {y} {d.more_things} for {price} dollars each. "
        f"How many dollars does {d.name} get?"
    )
    return question, f"{x}+{y}", f"{x + y}*{price}"


def _times_as_many(d: _Draw) -> tuple[str, str, str]:
    a, x, c = d.amount(), d.factor(), d.amount()
    question = (
        f"{d.name} has {a} {d.things}. {d.other} has {x} times as many and buys {c} more. "
        f"How many {d.things} does {d.other} have?"
    )
    return question, f"{a}*{x}", f"{a * x}+{c}"


TEMPLATES: tuple[Callable[[_Draw], tuple[str, str, str]], ...] = (
    _buys_packs,
    _gives_away,
    _together,
    _finds_and_loses,
    _sells,
    _times_as_many,
)


def _evaluate(step: str) -> int:
    """The value of one step, `a+b`, `a-b` or `a*b`."""
    for sign, apply in (("+", operator.add), ("-", operator.sub), ("*", operator.mul)):
        left, found, right = step.partition(sign)
        if found:
            return apply(int(left), int(right))
    raise ValueError(f"a step must be a+b, a-b or a*b, got {step!r}")


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem."""
    question, first, second = rng.choice(TEMPLATES)(_Draw(rng))
    result = _evaluate(second)
    return Problem(question=question, answer=f"{first}={_evaluate(first)}\n{second}={result}\n#### {result}")


def make_problems(num_problems: int, *, seed: int, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Draw problems whose questions differ from each other and from those of `exclude`."""
    rng = random.Random(seed)
    seen = {problem.question for problem in exclude}
    problems: list[Problem] = []
    while len(problems) < num_problems:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def to_row(problem: Problem, *, split: str, index: int) -> dict[str, Any]:
    """The training row: the same keys as `xrl gsm8k` writes."""
    row = convert_row(problem.question, problem.answer, split=split, index=index)
    return {**row, "data_source": "xrl/arithmetic"}
