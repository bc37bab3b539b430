"""The benchmark of offloaded decoding against other engines."""
