"""Everything with weights, and the files that hold them."""
