"""Text encoders, VAE and tokenizers of Stable Diffusion 3. A leaf: it imports no other package of this library."""

from encoders.clip import CLIPConfig, CLIPOutput, CLIPText
from encoders.conditioning import Conditioner, Conditioning, TokenSpan, checked_prompts, run_encoder
from encoders.rules import COMFYUI, DIFFUSERS, REFERENCE, TextRules
from encoders.t5 import T5Config, T5Encoder
from encoders.tiling import decode_tiled, encode_tiled
from encoders.tokenize import CLIPTokenizer, T5Tokenizer, Tokenizers
from encoders.vae import VAE, DiagonalGaussian, VAEConfig

__all__ = [
    "COMFYUI",
    "DIFFUSERS",
    "REFERENCE",
    "VAE",
    "CLIPConfig",
    "CLIPOutput",
    "CLIPText",
    "CLIPTokenizer",
    "Conditioner",
    "Conditioning",
    "DiagonalGaussian",
    "T5Config",
    "T5Encoder",
    "T5Tokenizer",
    "TextRules",
    "TokenSpan",
    "Tokenizers",
    "VAEConfig",
    "checked_prompts",
    "decode_tiled",
    "encode_tiled",
    "run_encoder",
]
