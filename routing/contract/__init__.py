"""What a routing is and what a router must do: Routing, Router, Carry, RouterStats."""
