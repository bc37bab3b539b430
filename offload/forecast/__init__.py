"""Measures this machine (`calibrate`) and predicts memory and speed (`fit`)."""
