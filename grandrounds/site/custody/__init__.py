"""Real sites: data, policy, state and audit log in the site's own custody."""
