"""Models and objects of other projects. Each is imported when it is first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["dask", "dicom_seg", "lightning", "monai", "nnunet", "nnunet_cases", "torchio"]
)
