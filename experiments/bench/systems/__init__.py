"""What a whole system takes, against what the disk, the wire and the processor allow."""
