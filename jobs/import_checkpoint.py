"""Turns a checkpoint that the authors of the method released into NAME.safetensors and its card.

air import-checkpoint ps_7.pt air-p7.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.command import make_parser


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("import-checkpoint", __doc__)
    parser.add_argument("file", metavar="FILE", help="the released checkpoint, such as ps_7.pt; a local path")
    parser.add_argument(
        "out", metavar="OUT.safetensors", help="file for the weights; their card goes to OUT.json beside it"
    )
    given = parser.parse_args(arguments)
    if not given.out.endswith(".safetensors"):
        parser.error(f"{given.out}: give the output a name that ends in .safetensors")
    from air.predictor.checkpoint import save_checkpoint
    from air.predictor.dinov3.authors import read_authors_checkpoint

    read = read_authors_checkpoint(given.file)
    network, out = read.network, Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    notes = {"source": Path(given.file).name, "epoch": read.epoch, "not_imported": read.left_out}
    save_checkpoint(out, network, phase="imported", notes=notes)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(f"{network.num_stages} stages, patch size {network.patch_size}, {millions:.1f} M parameters. Output: {out}")
    if read.left_out:
        print(f"not imported: the quantiser ({len(read.left_out)} entries; the card lists them)")
    return 0
