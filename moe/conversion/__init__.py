"""One checkpoint written as another: export, factorise, upcycle, prune, join, merge."""
