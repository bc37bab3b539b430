"""Several variants trained under equal conditions, and the page about them."""
