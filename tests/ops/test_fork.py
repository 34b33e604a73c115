"""A process that forks while its threads are in calls of the compiled kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, whose threads end with it. A lock that a thread holds at the moment of a fork stays
# locked in the child for ever; about one fork in a thousand met the one that there was, so that this is a
# sample: a longer one is `FORKS=5000`.
PROGRAM = """
import os, threading, time
import torch, layernorm

torch.set_num_threads(1)
module, x = layernorm.LayerNormLSTM(1, 256), torch.randn(1, 1, 1)  # whose packed weights take 1 MiB

def work():
    with torch.no_grad():
        while True:
            module(x)

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
hung = 0
for _ in range(int(os.environ.get("FORKS", 25))):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            module(x)
        os._exit(0)
    began = time.monotonic()
    while not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
        if time.monotonic() - began > 20:
            os.kill(child, 9)
            os.waitpid(child, 0)
            hung += 1
            break
print("hung:", hung, flush=True)
os._exit(0)
"""


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS's libraries do not survive a fork")
def test_the_children_of_forks_can_call_a_layer():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout == "hung: 0\n", done.stderr
