"""A volume that is stored in many ways."""

import numpy as np
import torch

AFFINE = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
SHAPE = (40, 30, 20)
VOXELS = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.uint16)
TENSOR = torch.from_numpy(VOXELS.astype(np.int32))[None]
