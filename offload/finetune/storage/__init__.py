"""Where experts lie that change: records beside the checkpoint, visits to slots, the finished model."""
