"""Private visits: differential privacy of a site's units, enforced where the data are."""
