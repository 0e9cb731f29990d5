"""Finding the final answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.rewards.answer import final_answer
from xrl.rewards.number import parse_number
from xrl.types import Prompt


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("48/2 = 24.\n#### 72", "72"),
        ("####72", "72"),
        ("##### 72", "72"),
        ("#### 5 #### 7", "7"),
        ("#### 72 ####", "72"),
        ("#### 72\n####\n", "72"),
        ("####\n72\n", "72"),
        ("#### 72\nThat took 5 steps.", "72"),
        (r"so \boxed{7}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} #### 8", "8"),
        (r"#### \boxed{8}", r"\boxed{8}"),
        ("The answer is 72.", None),
        ("72 ####", None),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        ("", None),
        (r"\boxed {72}", "72"),
        (r"\fbox{72}", "72"),
        (r"\boxed 7.", "7"),
        (r"\boxed{7} and then \boxed{8", None),
        # Headings are no answers; a number by itself is one, also before a box.
        (r"#### Final Answer" "\n" r"It is $\boxed{72}$.", "72"),
        ("#### Step 1: add\n5 + 67\n#### Step 2: result\n" r"\boxed{72}", "72"),
        ("##### 2. Add them\n" r"\boxed{72}", "72"),
        (r"\boxed{72}" "\n#### Note: prices vary", "72"),
        ("#### 72\n\n#### Check\nall is well", "72"),
        ("#### Answer\n72", "72"),
        ("#### **Final answer:**\n\n$x^2$\n", "$x^2$"),
        ("#### 72\n" r"or \boxed{71}", "72"),
        ("#### That makes 72\n" r"so \boxed{71}", "71"),
        ("#### Monday\nThanks for reading!", "Monday"),
        # Thinking is no answer.
        (r"<think>\boxed{5}</think> It is \boxed{4}.", "4"),
        (r"<think>\boxed{5}</think> I do not know.", None),
        (r"<think>a</think> no, <think>\boxed{5}", None),
        (r"<THINK>\boxed{5}</THINK> I do not know.", None),
        (r"<thought>\boxed{5}", None),
        (r"[THINK]\boxed{5}[/THINK] So \boxed{4}", "4"),
        (r"<seed:think>\boxed{5}</seed:think>", None),
        (r"◁think▷\boxed{5}◁/think▷", None),
        ("thinking on\n</think>\n#### 4", "4"),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


@given(
    st.integers(-(10**15), 10**15),
    st.sampled_from(["{:,}", "{}.00", "${}", "**{}**", "{} apples", r"\boxed{{{}}}", "{:,}."]),
)
def test_every_integer_survives_its_dress(value: int, dress: str) -> None:
    answer = final_answer(f"Some steps 1+1=2.\n#### {dress.format(value)}")
    assert answer is not None
    assert parse_number(answer) == value


@given(st.text(alphabet="0123456789#$%,.-/ \\boxed{}frac=eE*+\n", max_size=400))
def test_no_text_raises(text: str) -> None:
    answer = final_answer(text)
    parse_number(text if answer is None else answer)


@pytest.mark.parametrize(("response", "answer"), [("so #### 5", None), ("so 5 </think> #### 4", "4")])
def test_response_to_a_prompt_that_opens_the_thinking_begins_within_it(response: str, answer: str | None) -> None:
    prompt = Prompt(id=0, token_ids=[1], text="<|assistant|><think>\n", ground_truth="4")
    assert final_answer(response, prompt) == answer
