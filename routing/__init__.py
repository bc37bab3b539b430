"""Who goes where: routings, routers, balance losses, routing traces."""
