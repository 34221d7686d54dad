"""Trained models of nnU-Net v2, from their folders; nnU-Net itself is not needed.

Source: Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, Nature Methods
18, 203-211 (2021), https://doi.org/10.1038/s41592-020-01008-z.
"""

from .folder import cases_in, json_of
from .loading import load

__all__ = ["cases_in", "json_of", "load"]
