"""Stored forms that lose something: experts that `expertier pack` rounded."""
