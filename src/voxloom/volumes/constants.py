"""Names of the entries of images, patches and batches."""

__all__ = [
    "AFFINE",
    "CHANNELS_DIMENSION",
    "DATA",
    "INDEX_INI",
    "INTENSITY",
    "LABEL",
    "LOCATION",
    "PATCH_LOCATION",
    "PATH",
    "SAMPLING_MAP",
    "STEM",
    "TYPE",
]

# Types of images
INTENSITY = "intensity"
LABEL = "label"
SAMPLING_MAP = "sampling_map"

# Entries of an image: `image[DATA]`
DATA = "data"
AFFINE = "affine"
TYPE = "type"
PATH = "path"
STEM = "stem"

# Entries of a patch: `patch[LOCATION]`
LOCATION = "location"
PATCH_LOCATION = "patch_location"
INDEX_INI = "index_ini"

# Of a batch `(B, C, I, J, K)`
CHANNELS_DIMENSION = 1
