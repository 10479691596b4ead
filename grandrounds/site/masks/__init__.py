"""A site's end of a masked sum, the same in process, in a simulation and in a site's custody."""
