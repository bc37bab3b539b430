"""What `expertier pack` does when it quantises: its options, and the steps from a text to a file."""
