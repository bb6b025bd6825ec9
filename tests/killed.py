"""A command that dies by SIGKILL as soon as its first checkpoint is there."""

import signal
import subprocess
import time
from pathlib import Path


def kill_at_checkpoint(command: list[str], checkpoint: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    try:
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
