"""What `trace show` prints and draws."""
