"""NIfTI, Analyze and MGH: read through nibabel, written block by block."""
