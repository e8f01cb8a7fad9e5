"""The page as a static site, which computes in the browser."""
