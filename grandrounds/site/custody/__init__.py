"""Real sites: what a site keeps in its own hands, and what a consortium sets up."""
