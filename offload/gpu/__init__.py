"""The GPU tier: experts in GPU memory, above the RAM slots and the disk of the CPU path."""
