"""How much the Gaussians of voxloom, nnU-Net and MONAI differ, by a smooth network whose output for the whole is known."""

from pathlib import Path

import nilearn
import torch
from monai.inferers import sliding_window_inference
from torch import nn

import voxloom as vx

PATCH, OVERLAP = 48, 0.5


def main():
    """Print, for each, how far it is from the network applied to the whole at once, and from voxloom."""
    torch.manual_seed(0)
    path = Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    data = vx.ScalarImage(path)[:, 40:136, 50:146, 40:136].data.float()
    data = (data - data.mean()) / data.std()
    layers = [nn.Conv3d(1, 8, 5, padding=2), nn.Tanh(), nn.Conv3d(8, 8, 5, padding=4, dilation=2), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Conv3d(8, 4, 5, padding=4, dilation=2)).eval()
    with torch.inference_mode():
        whole = network(data[None])[0]
        results = {
            "voxloom": vx.predict(network, data, PATCH, OVERLAP, "gaussian").data,
            "nnU-Net's": vx.predict(network, data, PATCH, OVERLAP, "nnunet").data,
            "MONAI": sliding_window_inference(data[None], PATCH, 1, network, OVERLAP, mode="gaussian", sigma_scale=0.125)[0],
        }
    print("differences in parts of the standard deviation of the output, and labels that differ")
    for name, made in results.items():
        print(f"{name:10}", end="")
        for other, reference in (("the whole", whole), ("voxloom", results["voxloom"])):
            distance = (made - reference).abs() / whole.std()
            labels = (made.argmax(0) != reference.argmax(0)).float().mean()
            print(f"  from {other}: mean {distance.mean():.4f}, most {distance.max():.3f}, {100 * labels:.2f} %", end="")
        print()


if __name__ == "__main__":
    main()
