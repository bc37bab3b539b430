"""Decoder layers computed for one token by one call of C, or by two around attention, bit-identical to the modules."""
