"""The package's commands, one file each."""
