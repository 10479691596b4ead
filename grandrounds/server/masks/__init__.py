"""The server's end of a masked sum."""
