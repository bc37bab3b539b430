"""Which experts are read before a layer asks for them."""
