"""What a researcher need not edit: settings, files, batches, checkpoints, processes."""
