"""What a run is: its settings and their ranges, the file that says them, sizes and rates that can be asked for."""
