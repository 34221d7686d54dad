"""Images, subjects, data sets, and batches of subjects."""
