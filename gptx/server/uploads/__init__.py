"""Models that come by upload: the store, its routes, the client."""
