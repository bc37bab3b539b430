"""Text files and tables as documents, and documents as tokens."""
