"""Balance losses, capacity limits and the statistics they are computed from."""
