"""`lfm fetch` from a small hub on this machine, which answers the client's requests."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef" * 2 + "01234567"
FILES = {"data/part.parquet": b"rows", "README.md": b"a card", "notes.txt": b"not wanted", "tokenizer.json": b"{}"}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            body = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
        elif path.endswith(f"/tree/{COMMIT}"):
            files = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in FILES.items()]
            body = json.dumps(files).encode()
        elif path in ("/api/datasets/some/questions", "/api/models/some/words"):
            body = json.dumps({"id": path.split("/", 3)[3], "sha": COMMIT, "siblings": [], "tags": []}).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (("Content-Length", len(body)), ("X-Repo-Commit", COMMIT), ("ETag", f'"{COMMIT}"')):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def fetch(tmp_path):
    """Run `lfm fetch` with options, from the hub or from a port without one."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()

    def run(*options: str, port: int = hub.server_port) -> subprocess.CompletedProcess:
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [
            sys.executable,
            "-m",
            "launcher.cli",
            "fetch",
            "--tokenizer",
            "some/words",
            "--out",
            str(tmp_path / "hub"),
        ]
        environment = {**os.environ, **endpoint, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)

    yield run
    hub.shutdown()
    hub.server_close()


@pytest.mark.slow
def test_a_dataset_comes_with_a_note_of_its_revision(fetch, tmp_path):
    result = fetch("--dataset", "some/questions")
    assert result.returncode == 0, result.stderr
    dataset, tokenizer = tmp_path / "hub" / "dataset", tmp_path / "hub" / "tokenizer"
    assert (dataset / "data" / "part.parquet").read_bytes() == b"rows" and (tokenizer / "tokenizer.json").exists()
    assert not (dataset / "notes.txt").exists()
    note = json.loads((dataset / "dataset-origin.json").read_text())
    assert note == {"dataset": "some/questions", "revision": COMMIT}


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "port"), [("some/other", None), ("some/questions", 9), ("no name", None)])
def test_a_failed_download_is_an_error_of_one_sentence(fetch, dataset, port):
    result = fetch("--dataset", dataset, **({"port": port} if port else {}))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"cannot download {dataset} from the hub" in result.stderr
