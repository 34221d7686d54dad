"""The plan of a prediction: what comes out, in what order patches come, and what fits into memory."""
