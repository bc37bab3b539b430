"""What all importers share: opening files from outside, joining rows, and the recording with its account."""
