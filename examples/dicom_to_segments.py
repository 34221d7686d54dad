"""From a folder of DICOM files to a label map that opens in 3D Slicer, with a model that knows what it expects.

The MNI152 head, which comes with nilearn, is written as a DICOM series of thick slices whose axes point to left, back and up. A
small network learns grey and white matter in another space: RAS, voxels of 2 mm, intensities of mean 0 and deviation 1. That is
written into the model's file. Then one call reads the series, brings it there, and the labels back onto the slices.

    pip install 'voxloom[plot,dicom]' nilearn
    python examples/dicom_to_segments.py [--folder slicer] [--steps 60]
"""

import argparse
from pathlib import Path

import numpy as np
import pydicom
import torch
from matplotlib.figure import Figure
from nilearn import datasets
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from torch import nn

import voxloom as vx
from voxloom.integrations.dicom_seg import save_dicom_seg

LABELS = (
    vx.Label(1, "grey matter", (220, 160, 60), ("SCT", "389080008", "Gray matter")),
    vx.Label(2, "white matter", (90, 160, 220), ("SCT", "389081007", "White matter")),
)
SPEC = vx.ModelSpec(
    channels=("T1",),
    orientation="RAS",
    spacing=(2, 2, 2),
    intensity=(vx.Intensity(scale="z-score", over="nonzero"),),
    patch_size=48,
    patch_overlap=0.25,
    reduce="argmax",
    labels=LABELS,
)


def heads() -> list[vx.ScalarImage]:
    """Give the scan, and how much of each voxel is grey and white matter."""
    load = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    return [vx.ScalarImage(image) for image in (each(resolution=1) for each in load)]


def write_series(scan: vx.ScalarImage, folder: Path) -> None:
    """Write slices of 1 × 1 × 3 mm."""
    folder.mkdir(exist_ok=True)
    slices = scan.reoriented("LPS").resampled((1, 1, 3))
    values = (slices.data[0] * 1000 / slices.data.max()).round().to(torch.int16).numpy()
    origin = np.diag([-1, -1, 1]) @ slices.affine[:3, 3]
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for number in range(values.shape[2]):
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID, data.Modality = CTImageStorage, generate_uid(), "MR"
        data.PatientName, data.PatientID, data.StudyID = "MNI152^Head", "MNI152", "1"
        for name, uid in uids.items():
            setattr(data, name, uid)
        data.InstanceNumber, data.SliceThickness = number + 1, 3
        data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        data.ImagePositionPatient = [float(f"{place:.6g}") for place in (*origin[:2], origin[2] + 3 * number)]
        data.Columns, data.Rows = values.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit = 15
        data.PixelData = np.ascontiguousarray(values[:, :, number].T).tobytes()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)


def train(scan: vx.ScalarImage, grey: vx.ScalarImage, white: vx.ScalarImage, steps: int) -> nn.Module:
    """Train a network on patches of the head in the space of the spec."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 12, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(12, 12, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(12, 3, 1)
    )
    shares = torch.cat([torch.full_like(grey.data, 0.5), grey.data, white.data])
    truth = vx.LabelMap(shares.argmax(0, keepdim=True).to(torch.uint8), affine=grey.affine)
    brought = [image.reoriented("RAS").resampled(2) for image in (scan, truth)]
    inside = brought[0].data[brought[0].data != 0]
    scaled = brought[0].new_like(torch.where(brought[0].data == 0, 0, (brought[0].data - inside.mean()) / inside.std()))
    subject = vx.Subject(scan=scaled, truth=vx.LabelMap(brought[1].data, affine=brought[1].affine))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    queue = vx.Queue(vx.SubjectsDataset([subject] * steps), 64, 4, vx.LabelSampler(32, label_name="truth"))
    for number, batch in enumerate(vx.SubjectsLoader(queue, batch_size=4), start=1):
        loss = nn.functional.cross_entropy(network(batch.scan.data), batch.truth.data[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == steps:
            break
    return network.eval()


def draw(series: Path, labels: vx.LabelMap, path: Path) -> None:
    """Draw the labels on some slices."""
    scan = vx.ScalarImage(series)
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, share in zip(figure.subplots(1, 4), (0.35, 0.5, 0.6, 0.7), strict=True):
        number = int(share * scan.spatial_shape[2])
        axes.imshow(scan.data[0, :, :, number].T.numpy(), cmap="gray")
        for label in LABELS:
            mask = (labels.data[0, :, :, number] == label.value).T.float().numpy()
            color = [each / 255 for each in label.color or (255, 0, 0)]
            axes.imshow(np.dstack([np.broadcast_to(color, (*mask.shape, 3)), mask * 0.5]))
        axes.set_title(f"slice {number}")
        axes.axis("off")
    figure.savefig(path, dpi=100)


def main(folder: Path, steps: int) -> float:
    """Go all the way, and give the Dice of the white matter on the slices."""
    folder.mkdir(exist_ok=True, parents=True)
    scan, grey, white = heads()
    write_series(scan, folder / "series")
    network = train(scan, grey, white, steps)
    batches = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (torch.zeros(2, 1, 48, 48, 48),), dynamic_shapes=({0: batches},))
    torch.export.save(program, folder / "tissue.pt2", extra_files={"voxloom.json": str(SPEC)})
    # From here on it is what a user does with a model of someone else's.
    print(vx.plan(folder / "tissue.pt2", folder / "series"))
    labels = vx.predict(folder / "tissue.pt2", folder / "series", output=folder / "tissue.seg.nrrd")
    save_dicom_seg(labels, folder / "series", folder / "tissue.dcm", LABELS)
    draw(folder / "series", labels, folder / "tissue.png")
    expected = white.resampled(like=labels).data > 0.5
    found = labels.data == 2
    return float(2 * (found & expected).sum() / (found.sum() + expected.sum()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("slicer"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(f"Dice of the white matter: {main(options.folder, options.steps):.3f}; see {options.folder}")
