"""Images, subjects, and batches of subjects; `formats` reads and writes them."""
