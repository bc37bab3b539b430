"""What changes a running model beside its calls: one lock, reading ahead, streamed weights that are lent."""
