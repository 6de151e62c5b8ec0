"""The one table: which member of which object names a host resource, and how that is handed over. Pure."""
