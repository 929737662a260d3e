"""Made-up questions for runs whose answers do not matter."""

import json
from pathlib import Path


def make_questions(folder: Path, count: int) -> Path:
    """Write made-up questions in SciKnowEval's format; answers are right only by chance."""
    rows = [
        {
            "question": f"Which element has {number} protons?",
            "choices": {"text": ["helium", "boron", "neon", "iron"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
            "type": "mcq-4-choices",
            "domain": "Chemistry",
            "details": {"level": "L3", "task": "t", "subtask": "s"},
        }
        for number in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
