"""From representations to residue frames, torsions and atoms (AF2 Algorithms 20-24)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pairformer_fast.config import StructureModuleConfig
from pairformer_fast.model.all_atom import NUM_TORSIONS, AllAtom
from pairformer_fast.model.invariant_point_attention import InvariantPointAttention
from pairformer_fast.model.primitives import linear
from pairformer_fast.model.rigid import EPSILON, Rigid, normalize, rotation_of

ANGSTROM_PER_UNIT = 10.0
"""The module works in nm; everything outside it in Å."""


@dataclass(frozen=True)
class Structure:
    """What the structure module returns.

    Attributes
    ----------
    frames : list of Rigid
        ``[B, N]`` residue frames after each block, Å.
    torsions : list of Tensor
        ``[B, N, 5, 2]`` sine and cosine after each block, not normalised.
    atom14 : Tensor
        ``[B, N, 14, 3]`` Å, from the last block.
    s : Tensor
        ``[B, N, C_s]`` single representation after the last block.
    """

    frames: list[Rigid]
    torsions: list[Tensor]
    atom14: Tensor
    s: Tensor


class BackboneUpdate(nn.Module):
    """Change of a residue frame: a quaternion (1, b, c, d) and a translation (AF2 Algorithm 23)."""

    def __init__(self, c_s: int) -> None:
        super().__init__()
        self.linear = linear(c_s, 6, bias=True, init="final")

    def forward(self, s: Tensor) -> Rigid:
        """Local update ``[B, N]`` (nm) from ``s [B, N, C_s]``."""
        vector, trans = self.linear(s).chunk(2, dim=-1)
        quaternion = normalize(torch.cat([torch.ones_like(vector[..., :1]), vector], dim=-1))
        return Rigid(rotation_of(quaternion), trans)


class TorsionHead(nn.Module):
    """Residual network for the five torsions of a residue (AF2 Algorithm 20, lines 11-14)."""

    def __init__(self, c_s: int, c_hidden: int) -> None:
        super().__init__()
        self.linear_in = linear(c_s, c_hidden, bias=True)
        self.linear_initial = linear(c_s, c_hidden, bias=True)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                linear(c_hidden, c_hidden, bias=True, init="relu"),
                nn.ReLU(),
                linear(c_hidden, c_hidden, bias=True, init="final"),
            )
            for _ in range(2)
        )
        self.linear_out = linear(c_hidden, 2 * NUM_TORSIONS, bias=True)

    def forward(self, s: Tensor, s_initial: Tensor) -> Tensor:
        """Sine and cosine ``[B, N, 5, 2]``, not normalised, from ``[B, N, C_s]`` twice."""
        x = self.linear_in(s.relu()) + self.linear_initial(s_initial.relu())
        for layer in self.layers:
            x = x + layer(x)
        return self.linear_out(x.relu()).unflatten(-1, (NUM_TORSIONS, 2))


class StructureModule(nn.Module):
    """Blocks with shared weights that move residue frames from the origin to their places.

    Runs in fp32 under any autocast: coordinates do not survive bf16.

    Parameters
    ----------
    config : StructureModuleConfig
        Dimensions.
    c_z : int
        Channels of the pair representation.
    """

    def __init__(self, config: StructureModuleConfig, c_z: int) -> None:
        super().__init__()
        c_s = config.c_s
        self.no_blocks = config.no_blocks
        self.layer_norm_s = nn.LayerNorm(c_s)
        self.layer_norm_z = nn.LayerNorm(c_z)
        self.linear_in = linear(c_s, c_s, bias=True)
        self.ipa = InvariantPointAttention(config, c_z)
        self.layer_norm_ipa = nn.LayerNorm(c_s)
        self.transition = nn.Sequential(
            linear(c_s, c_s, bias=True, init="relu"),
            nn.ReLU(),
            linear(c_s, c_s, bias=True, init="relu"),
            nn.ReLU(),
            linear(c_s, c_s, bias=True, init="final"),
        )
        self.layer_norm_transition = nn.LayerNorm(c_s)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone_update = BackboneUpdate(c_s)
        self.torsion_head = TorsionHead(c_s, config.c_angle)
        self.all_atom = AllAtom()

    def forward(self, s: Tensor, z: Tensor, aatype: Tensor, mask: Tensor) -> Structure:
        """Fold.

        Parameters
        ----------
        s : Tensor
            ``[B, N, C_s]`` single representation.
        z : Tensor
            ``[B, N, N, C_z]`` pair representation.
        aatype : Tensor
            ``[B, N]`` int64.
        mask : Tensor
            ``[B, N]`` bool.

        Returns
        -------
        Structure
            Frames and torsions after every block, atoms after the last.
        """
        with torch.autocast(s.device.type, enabled=False):
            s_initial = self.layer_norm_s(s.float())
            z = self.layer_norm_z(z.float())
            s = self.linear_in(s_initial)
            frames = Rigid.identity(tuple(mask.shape), s.device)
            all_frames, all_torsions = [], []
            for _ in range(self.no_blocks):
                s = self.layer_norm_ipa(self.dropout(s + self.ipa(s, z, frames, mask)))
                s = self.layer_norm_transition(self.dropout(s + self.transition(s)))
                moved = frames.compose(self.backbone_update(s))
                all_frames.append(Rigid(moved.rot, moved.trans * ANGSTROM_PER_UNIT))
                all_torsions.append(self.torsion_head(s, s_initial))
                frames = moved.detach_rotation()
            unit = normalize(all_torsions[-1])
            atom14 = self.all_atom(all_frames[-1], unit, aatype)
        return Structure(all_frames, all_torsions, atom14, s)


def torsion_norm(torsions: Tensor) -> Tensor:
    """Length of unnormalised sine-cosine pairs, ``[..., 2]`` to ``[...]``."""
    return (torsions.square().sum(-1) + EPSILON).sqrt()
