"""The catalogue of routers, and the routers themselves in rooms by kind."""
