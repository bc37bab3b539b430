"""Feed-forward units of dense models as bricks: retrieved by what they do on a text, merged, updated, grown."""
