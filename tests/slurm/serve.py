"""`python -m tests.slurm.serve ... --uds PATH`: a server that speaks vLLM's routes, as a process of its own."""

import json
import os
import sys
import threading
from pathlib import Path

from tests.support.fake_server import FakeServer

if __name__ == "__main__":
    model, path = (Path(sys.argv[sys.argv.index(option) + 1]) for option in ("--model", "--uds"))
    server = FakeServer("default", uds=path)
    server.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    server.key = os.environ["VLLM_API_KEY"]
    threading.Event().wait()
