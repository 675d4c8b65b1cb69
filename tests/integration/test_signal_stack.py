"""A fault of OpenVINO that ``keep_openvino_cores`` of ``tests/conftest.py`` works around: is it still there?"""

import signal
import subprocess
import sys

import pytest

COMPILE_TWICE = """
import os
import signal
import time
import openvino

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))  # Python's handlers run on the signal stack

def compile_network():
    image = openvino.opset13.parameter([1, 4])
    network = openvino.Model([openvino.opset13.relu(image)], [image])
    return openvino.Core().compile_model(network, "CPU")

first, second = compile_network(), compile_network()
"""
RAISE = """
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.01)
"""


def run(destroy: str) -> subprocess.CompletedProcess:
    script = f"{COMPILE_TWICE}\n{destroy}\n{RAISE}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO replaces the signal stack on Linux only")
def test_openvino_still_leaves_a_signal_stack_that_does_not_exist():
    reverse = run("del second; del first")
    assert (reverse.returncode, reverse.stdout) == (0, "handled\n"), reverse.stderr
    assert run("del first; del second").returncode == -signal.SIGSEGV
