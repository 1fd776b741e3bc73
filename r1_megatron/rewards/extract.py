"""Finding the answer in a completion. Linear in the length of the text, whatever the text."""

from __future__ import annotations


def tagged_answer(text: str) -> str | None:
    """What the last complete ``<answer>...</answer>`` holds, white space stripped."""
    end = text.rfind("</answer>")
    if end < 0:
        return None
    start = text.rfind("<answer>", 0, end)
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def boxed_answer(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, with the braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
    return None


def final_answer(text: str) -> str | None:
    r"""The answer of a completion: the last ``<answer>`` block, else the last ``\boxed{}`` after the thinking.

    A ``\boxed{}`` inside the ``<answer>`` block counts as its content.
    """
    answer = tagged_answer(text)
    if answer is None:
        return boxed_answer(text[text.rfind("</think>") + 1 :])
    boxed = boxed_answer(answer)
    return answer if boxed is None else boxed
