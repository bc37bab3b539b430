"""Which bytes of which file are which expert."""
