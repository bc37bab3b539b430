"""The tuner, and the compiler that needs no device."""
