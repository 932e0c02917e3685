"""Training written down a second time, from the papers and the fields' descriptions alone, and the product held against it."""
