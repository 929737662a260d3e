"""The `<answer>` tag: a completion enters, the text that a verifier compares leaves."""


def tagged_answer(completion_text: str) -> str:
    """Return the text after the last `<answer>` up to the first following `</answer>`, stripped.

    Tags are not required: a completion without `<answer>` counts from its start, one without `</answer>` to its end.
    """
    return completion_text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()
