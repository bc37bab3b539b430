"""Several models averaged, or their task vectors; several experts of one model averaged."""
