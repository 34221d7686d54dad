"""Names of the entries of images, patches and batches."""

__all__ = [
    "AFFINE",
    "CHANNELS_DIMENSION",
    "DATA",
    "HISTORY",
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

# Entry of a subject: the transforms of TorchIO that were applied to it
HISTORY = "applied_transforms"

# Entries of a patch: `patch[LOCATION]`
LOCATION = "location"
PATCH_LOCATION = "patch_location"
INDEX_INI = "index_ini"

# Of a batch `(B, C, I, J, K)`
CHANNELS_DIMENSION = 1
