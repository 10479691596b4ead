"""Studies: recipes x seeds x arms in a file, played cell by cell, and the tables made of them."""
