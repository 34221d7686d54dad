"""Images in another space or with other intensities, computed where they are read."""
