"""Methods that quantise one matrix: by its weights alone, or by its inputs too."""
