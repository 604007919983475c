"""What a researcher need not edit: settings, files, batches, checkpoints, processes."""

import sys

if sys.platform == "win32":  # before what Windows lacks is imported: fcntl, say
    sys.exit("error: this runs on Linux and macOS; on Windows use WSL")
