"""
The folder of a run: its lock, its config.py and its log.

    lock = claim_folder(Path("out"), replace=False)
    open_run(Path("out"), config, code_version(), iteration=0, resume=False)
    append_log(Path("out"), {"iter": 0, "loss": 1.0})
"""

import contextlib
import fcntl
import json
import subprocess
from pathlib import Path

from plumbing.checkpoint import replace_file
from plumbing.distributed import RANK, print0

ROOT = Path(__file__).parents[1]


def code_version():
    """The git commit of this code, "-dirty" if files differ from it."""
    status, commit = subprocess.getstatusoutput(
        f"git -C '{ROOT}' describe --always --dirty --abbrev=12"
    )
    return commit if status == 0 else "an unknown commit"


def claim_folder(folder, replace):
    """Make the folder if it is missing, and lock it. Raises ValueError if it holds a run, unless
    that may be replaced or gone on with, and if another process has the lock.

    Returns an open file: the lock lasts until it is closed or the process ends, however that ends.
    """
    if list(folder.glob("ckpt_*.pt")) and not replace:
        raise ValueError(
            f"{folder} already holds a run: --init_from=auto goes on with it, --overwrite=True "
            "replaces it, or choose another --out_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        if RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ValueError(f"another run is writing to {folder}; choose another --out_dir") from e
    except OSError as e:  # a file system without locks
        print0(f"WARNING: {folder} cannot be locked ({e}): start no other run there")
    return lock


# what train.py, sample.py and report.plot write
NAMES = """
ckpt_*.pt generated*.npy interpolation*.npy interpolation*.png metrics*.json samples*.png curves.png
"""


def open_run(folder, config, version, iteration, resume):
    """Begin a run at an iteration, or go on: write config.py, and keep of log.jsonl what came
    before. Of a run that is replaced, checkpoints, samples, metrics and pictures are removed.
    Raises OSError."""
    log = folder / "log.jsonl"
    text = f"# The settings of this run, for the code at {version}.\n"
    for key, value in config.items():
        text += f"{key} = {value!r}\n"
    kept = ""
    if resume and log.exists():
        for record in read_log(folder):
            if record["iter"] < iteration:
                kept += f"{json.dumps(record)}\n"
    replace_file(folder / "config.py", lambda f: f.write(text.encode()))
    replace_file(log, lambda f: f.write(kept.encode()))
    if not resume and list(folder.glob("ckpt_*.pt")):  # it replaces a run
        for name in NAMES.split():
            for path in folder.glob(name):
                path.unlink()


def read_log(folder):
    """Yield the records of a run's log.jsonl. A line that a kill or a full disk cut short is left
    out."""
    for line in (folder / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def append_log(folder, record):
    """Add a line to a run's log.jsonl, or a warning to the console where that fails."""
    log = f"{folder}/log.jsonl"
    # JSON has no NaN
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)
    try:
        with open(log, "a") as f:
            f.write(f"{json.dumps(record)}\n")
    except OSError as e:
        print0(f"WARNING: {log} not written ({e})")
