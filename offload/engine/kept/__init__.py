"""Keys and values of tokens that were computed: forked for a new sequence, kept in RAM and on disk."""
