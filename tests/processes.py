"""Python processes for tests, forked from one that has imported torch and nothing of ours: an import of a second."""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


@functools.cache
def parent(module):
    """The process that forks; it ends with this one, which closes its input."""
    command = [sys.executable, "-P", __file__, module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(code, imported="torch", timeout=300, cwd=".", env=os.environ):
    """What subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) gives."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("code.py", "stdout", "stderr")]
        files[0].write_text(code)
        forks = parent(imported)
        request = [[str(file) for file in files], timeout, os.path.abspath(cwd), dict(env)]
        print(json.dumps(request), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files[1:]))


if __name__ == "__main__":
    __import__(sys.argv[1])
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        (script, *outputs), timeout, folder, environment = json.loads(line)
        signal.alarm(timeout)
        for number, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        runpy.run_path(script, run_name="__main__")
        break
