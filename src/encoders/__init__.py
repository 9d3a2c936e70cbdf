"""Text encoders, VAE and tokenizers of Stable Diffusion 3. A leaf: imports small libraries and nothing of ours."""

from encoders.clip import CLIPConfig, CLIPOutput, CLIPText
from encoders.conditioning import Conditioner, Conditioning, TextRules, TokenSpan, checked_prompts
from encoders.t5 import T5Config, T5Encoder
from encoders.tokenize import CLIPTokenizer, T5Tokenizer, Tokenizers
from encoders.vae import VAE, DiagonalGaussian, VAEConfig

__all__ = [
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
]
