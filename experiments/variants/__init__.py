"""What can be trained and compared: router and architecture variants by name."""
