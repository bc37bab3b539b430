"""RAM slots, and one layer call computed from them."""
