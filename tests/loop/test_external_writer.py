"""Whole runs whose behaviours an external model writes, or fails to write; the key is nowhere afterwards."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import ROOT, SMALL

pytestmark = pytest.mark.slow
KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    """Writes, in the tiny world's language, the first strategy that it is shown; or answers 500."""

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = payload["messages"][0]["content"].split()
        text = " ".join(words[words.index("use") :][:3])
        right = self.server.works and self.headers["Authorization"] == f"Bearer {KEY}"
        body = json.dumps({"choices": [{"message": {"content": text}}]}) if right else f"broken; you sent {KEY}"
        self.send_response(200 if right else 500)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_): ...


@pytest.mark.parametrize("works", [True, False])
def test_a_run_with_an_external_writer(tmp_path, works):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.works = works
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run_dir = tmp_path / "run"
    writer = {
        "base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "large", "api_key_env": "WRITER_KEY",
        "max_calls_per_step": 3,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pmd", "fit", "--config", "configs/tiny.yaml", *SMALL, "--trainer.max_epochs=3",
         f"--run_dir={run_dir}", *(f"--reflection.behaviour_writer.{key}={value}" for key, value in writer.items())],
        cwd=ROOT, env=os.environ | {"WRITER_KEY": KEY, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("memory/behaviour_calls")]
    assert len(rows) == 3
    assert sum(float(row["memory/behaviour_calls"]) for row in rows) > 0
    failed = sum(float(row["memory/behaviour_calls_failed"]) for row in rows)
    behaviours = sqlite3.connect(run_dir / "memory" / "memory.sqlite").execute("SELECT content FROM behaviours")
    if works:
        assert failed == 0
        assert all(content.startswith("pattern use ") for (content,) in behaviours.fetchall())
        assert "behaviour_writer:" not in done.stderr
    else:
        assert failed > 0
        assert behaviours.fetchall() == []
        assert 1 <= done.stderr.count("reflection.behaviour_writer:") <= 3  # once an epoch
    assert KEY not in done.stdout + done.stderr
    assert [path for path in run_dir.rglob("*") if path.is_file() and KEY.encode() in Path(path).read_bytes()] == []
