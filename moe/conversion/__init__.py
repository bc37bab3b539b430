"""One checkpoint written as another: export, factorise, prune, join."""
