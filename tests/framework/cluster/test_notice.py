"""Notice: SIGTERM as a request, with real signals to a process of its own."""

import signal
import subprocess
import sys
import time

LISTENS = """
import sys, time
from framework.cluster.notice import Notice
notice = Notice()
notice.then(lambda: print("leaving", flush=True))
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def test_what_is_to_be_done_is_done_once_however_often_the_signal_comes_and_the_process_lives_on():
    with subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(50):
            process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "leaving\n"
        time.sleep(0.2)
        assert process.poll() is None
        process.kill()
        assert process.stdout.read() == ""
