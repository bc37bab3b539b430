"""The HTTP server: who may ask, how an answer is sent while it grows, what the server says about itself."""
