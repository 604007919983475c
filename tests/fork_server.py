"""Runs commands without the seconds that each process takes to import torch.

A line of stdin is a command: its arguments, its folder, the files for its output, and changes of
the environment, one for each of its processes. It runs as `python ARGS` would, but in forks of this
process, which has imported torch already. The answer is its exit code.
"""

import gc
import json
import os
import runpy
import signal
import sys

import torch._dynamo  # noqa: F401  which torch's optimizers import

gc.freeze()  # forks leave these objects alone, which saves half a second at their end
for line in sys.stdin:
    args, cwd, files, environments = json.loads(line)
    pids = []
    for environment in environments:
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= environment
            break
    if pids[-1] == 0:
        break
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(max(codes, key=abs), flush=True)
else:
    sys.exit()

# from here on this is a process of the command, which ends as any: atexit, excepthook, exit code
signal.alarm(300)  # in case it hangs
os.chdir(cwd)
for number, path in enumerate([os.devnull, *files]):
    os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
if args[0] == "-c":
    sys.argv, sys.path[0] = ["-c", *args[2:]], ""
    exec(args[1], {"__name__": "__main__"})
elif args[0] == "-m":
    sys.argv, sys.path[0] = args[1:], cwd
    runpy.run_module(args[1], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = args, os.path.dirname(os.path.abspath(args[0]))
    runpy.run_path(args[0], run_name="__main__")
