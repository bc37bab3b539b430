"""How a measurement is made and kept: records, replay checkpoints, memory limits, figures."""
