import os
import socket
import sys
import time

import pytest

from vllm_metal_hub.server_process import ServerProcess, ServerStoppedError, free_port, port_is_free

# A stand-in for a server: starts a child as vLLM does, prints, and answers /health when told to.
SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
mode, port = sys.argv[1], int(sys.argv[2])
if mode == "fails":
    raise ValueError("weights are missing")
if mode == "sleeps":
    time.sleep(600)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("INFO:     Application startup complete.", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def start(tmp_path):
    def run(mode):
        port = free_port()
        return ServerProcess(
            [sys.executable, "-c", SERVER, mode, str(port)], port, tmp_path / "log" / "x.log", os.environ
        )

    return run


def child_of(server):
    for _ in range(200):
        server.read_log()
        for line in server.log.tail:
            if line.startswith("child"):
                return int(line.split()[1])
        time.sleep(0.05)
    raise AssertionError("no child")


def gone(pid):
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().split()[2] == "Z":
                    return True
        except OSError:
            pass
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ready_then_gone_with_its_children(start):
    stages = []
    with start("serves") as server:
        server.wait_ready(60.0, stages.append)
        child = child_of(server)
        assert stages[0] == "starting Python and vLLM"
        assert not port_is_free(server.port)
    assert gone(child)
    assert port_is_free(server.port)


def test_a_failed_start_says_why_and_leaves_nothing(start):
    with pytest.raises(ServerStoppedError, match="ValueError: weights are missing"), start("fails") as server:
        server.wait_ready(60.0, lambda stage: None)
    assert gone(child_of_closed(server))


def child_of_closed(server):
    return next(int(line.split()[1]) for line in server.log.tail if line.startswith("child"))


def test_too_slow(start):
    with pytest.raises(ServerStoppedError, match="within 1 s"), start("sleeps") as server:
        server.wait_ready(1.0, lambda stage: None)


def test_a_port_in_use_is_seen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not port_is_free(taken.getsockname()[1])
