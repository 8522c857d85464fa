"""iMixer: an MLP-Mixer whose token mixer is an implicit layer. Importing it registers the models with timm."""

from imixer.certificate import IMLPCertificate, certify, format_certificates
from imixer.checkpoint import load_checkpoint, translate_published_keys
from imixer.convergence import IMLPConvergence, format_convergence, measure_convergence
from imixer.hopfield import HierarchicalHopfield
from imixer.imixer import IMixer, IMixerBlock
from imixer.imlp import IMLP
from imixer.imlp_options import IMLPOptions

__all__ = [
    "HierarchicalHopfield",
    "IMLP",
    "IMLPCertificate",
    "IMLPConvergence",
    "IMLPOptions",
    "IMixer",
    "IMixerBlock",
    "certify",
    "format_certificates",
    "format_convergence",
    "load_checkpoint",
    "measure_convergence",
    "translate_published_keys",
]
