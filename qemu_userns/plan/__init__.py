"""The plan of a launch: identity maps, grants, rewritten words. Pure."""
