"""What is said of a line of JSON can be printed, whatever the line holds."""

from pmd.tasks.lines import read_lines


def test_a_key_with_half_a_character_is_named_in_text_that_can_be_printed(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(r'{"a\ud83d": [NaN]}' + "\n")
    lines, [problem] = read_lines(path)
    assert lines == []
    assert "the line has a key that holds half a character" in problem
    assert r"a\ud83d[0]=NaN can never be reached" in problem
    assert problem.encode("utf-8")
