"""
Samples, written as they come by several processes, such that an interrupted run can go on.

    output = Output(Path("a.npy.partial"), {Path("a.npy"): (600, 64, 768)}, made_with)
    output.write(first=32 * rank, arrays={Path("a.npy"): rows})
    output.publish()  # the folder stays, for other files in it
"""

import json
import os
import shutil

import numpy as np

from plumbing.distributed import RANK, WORLD_SIZE, barrier


class Output:
    """.npy files that several processes write together, a batch of rows at a time.

    They are built in a temporary folder. There made_with.json records what determines their
    content, and process_<rank> holds a byte for each batch that the process has written. When the
    same is asked for again, by as many processes, it goes on from there; anything else starts anew.

    folder: the temporary one
    files: {path: shape}, a path in the folder for a file that goes with it
    made_with: all that determines the content, plain values
    done: how many batches this process has written

    Rows are written, not memory-mapped: a full disk is then an OSError, not a SIGBUS.
    """

    def __init__(self, folder, files, made_with):
        self.folder = folder
        self.files = files
        manifest = folder / "made_with.json"
        text = json.dumps([made_with, WORLD_SIZE, *files.values()])
        if RANK == 0 and not (manifest.exists() and manifest.read_text() == text):
            if folder.exists():
                print(f"{folder} was made with something else: starting anew")
                shutil.rmtree(folder)
            folder.mkdir()
            for path, shape in files.items():  # headers; the rows take no space yet
                np.lib.format.open_memmap(folder / path.name, "w+", np.float32, shape)
            manifest.write_text(text)
        barrier()
        self.progress = open(folder / f"process_{RANK}", "ab", buffering=0)
        self.done = self.progress.tell()

    def write(self, first, arrays):
        """Write {path: rows} from row `first` on, as far as the files reach; then note that a batch
        is done."""
        for path, rows in arrays.items():
            n = max(self.files[path][0] - first, 0)  # rows of the file from `first` on
            with open(self.folder / path.name, "r+b") as f:
                # counted from the end, since the header's length is unknown
                f.seek(-n * rows[0].nbytes, os.SEEK_END)
                f.write(np.ascontiguousarray(rows[:n]))
        self.progress.write(b".")

    def publish(self):
        """Once all processes have written everything, give the files their names."""
        barrier()
        for path in self.files:
            made = self.folder / path.name
            if RANK == 0 and made.exists():  # not yet done
                made.replace(path)
