"""Hub models, served by a small local server that answers like the hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dse.models import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of `root` as repositories; `tiny/gated` requires access."""

    root: Path
    answers = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if path == "stop-answering":
            type(self).answers = False
            return self.reply(200)
        if not self.answers:
            self.close_connection = True  # simulates a lost connection
            return None
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "tiny/gated":
            return self.reply(403, error="GatedRepo")
        folder = self.root / name
        if not folder.is_dir():
            return self.reply(404, error="RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.reply(404, error="RevisionNotFound")
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if path.startswith("api/models/") and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": file.name} for file in files]
            return self.reply_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        if path.startswith("api/models/") and rest[:1] == ["tree"]:
            return self.reply_json(
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self.etag(f)} for f in files]
            )
        if rest[:1] == ["resolve"] and (folder / rest[2]).is_file():
            file = folder / rest[2]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(file)}"', "Accept-Ranges": "bytes"}
            return self.reply(200, file.read_bytes(), headers)
        return self.reply(404, error="EntryNotFound", headers={"X-Repo-Commit": COMMIT})

    @staticmethod
    def etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def reply_json(self, content: Any) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, error: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def add_custom_model(llama: Path, folder: Path) -> None:
    """The same weights with a class that only the repository's own code defines."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "tiny_custom",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\nclass TinyConfig(LlamaConfig):\n    model_type = 'tiny_custom'\n"
    )
    (folder / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )


@pytest.fixture
def hub(llama_folder: Path, tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "hub"
    (root / "tiny").mkdir(parents=True)
    llama_folder.rename(root / "tiny" / "llama")
    pickles = root / "tiny" / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_bytes((root / "tiny" / "llama" / "config.json").read_bytes())
    (pickles / "pytorch_model.bin").write_bytes(b"never opened")
    add_custom_model(root / "tiny" / "llama", root / "tiny" / "custom")
    handler = type("Handler", (Hub,), {"root": root, "answers": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_models(hub: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    script = Path(__file__).parents[2] / "support" / "hub_session.py"
    finished = subprocess.run(
        [sys.executable, str(script), hub], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    local = load_model(str(tmp_path / "hub" / "tiny" / "llama"))
    assert results["good"]["fingerprint"] == local.fingerprint
    assert results["good"]["revision"] is None
    assert results["branch"]["fingerprint"] == local.fingerprint
    assert results["branch"]["revision"] == "main"
    assert "the hub must know the model, but it has no 'tiny/nothing'" in results["unknown"]["error"]
    assert "'tiny/gated' is gated: ask for access" in results["gated"]["error"]
    assert "'tiny/llama' has no 'no-such-branch'" in results["revision"]["error"]
    assert "PyTorch files only, which are never opened" in results["pickles"]["error"]
    assert "needs its own Python code, which is not run unless you allow it" in results["own code"]["error"]
    assert results["own code allowed"]["architecture"] == "TinyForCausalLM"
    assert tuple(results["own code allowed"]["roles"]) == local.topology.roles
    assert results["config"]["parameters"] == local.topology.parameters_dense
    # Without the network, cached models still load and others are refused, both quickly.
    assert results["cached"]["fingerprint"] == local.fingerprint
    assert "neither a local folder nor in the local hub cache" in results["not cached"]["error"]
    for name, result in results.items():
        assert result.get("seconds", 0) < 10, name
        assert "\n" not in result.get("error", "")
