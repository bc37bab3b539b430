"""Several passes of one model side by side, so that each expert is visited once for all of them."""
