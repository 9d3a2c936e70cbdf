"""The second pass of a drawing: enlarge the result of the first pass, add noise, and denoise it again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from jaxtyping import Float
from torch import Tensor

from encoders import VAE
from mmdit.pictures.checks import check_latent, check_picture
from mmdit.pictures.resize import LATENT_FILTERS, PICTURE_FILTERS, Filter, Size, resize, resize_latent, size_by
from mmdit.utils import number, whole
from samplers import SCHEDULES, SOLVERS, pick

Space = Literal["latent", "pixel"]
MOST_SCALE = 8.0


@dataclass(frozen=True)
class Hires:
    """A second pass at a larger size, with the defaults of ComfyUI's workflow templates.

    Raises:
        ValueError: a number is out of its range, or a name is unknown or not available in this space.
    """

    scale: int | float = 1.5  # factor of both sides, 1 to 8; see `size` for the rounding
    strength: int | float = 0.5  # strength of the second pass, 0 to 1; below 0.5, resized latents leave visible seams
    steps: int | None = None  # steps of the second pass; None takes the first pass's
    filter: Filter = "nearest-exact"  # "bislerp" for latents only, "lanczos" for pixels only
    space: Literal["latent", "pixel"] = "latent"  # resize the latents, or decode, resize and encode the picture
    sampler: str | None = None  # of the second pass, as are the next two fields; None takes the first pass's
    schedule: str | None = None
    seed: int | None = None  # seed of the second pass's noise; None uses the seeds of the first pass again

    def __post_init__(self) -> None:
        number("Hires.scale", self.scale, 1, MOST_SCALE)
        number("Hires.strength", self.strength, 0, 1)
        if self.steps is not None:
            whole("Hires.steps", self.steps, 1)
        pick(dict.fromkeys(get_args(Space)), self.space, "Hires.space")
        filters = LATENT_FILTERS if self.space == "latent" else PICTURE_FILTERS
        pick(dict.fromkeys(filters), self.filter, f"Hires.filter for space={self.space!r}")
        if self.sampler is not None:
            pick(SOLVERS, self.sampler, "Hires.sampler")
        if self.schedule is not None:
            pick(SCHEDULES, self.schedule, "Hires.schedule")

    def to_text(self) -> str:
        """All fields that are not None, as `from_text` parses them: "scale=1.5 strength=0.5 filter=bislerp ..."."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse words NAME=VALUE, or a single number, which is the scale.

        Raises:
            ValueError: a name is unknown or given twice, or a value cannot be parsed.
        """
        kinds: dict[str, Any] = {"scale": float, "strength": float, "steps": int, "seed": int}
        kinds |= dict.fromkeys(("filter", "space", "sampler", "schedule"), str)
        found: dict[str, Any] = {}
        for word in text.split():
            name, value = word.split("=", 1) if "=" in word else ("scale", word)
            kind = pick(kinds, name, "setting of Hires")
            if name in found:
                raise ValueError(f"Hires {word!r}: {name} is given twice")
            try:
                found[name] = kind(value)
            except ValueError as error:
                raise ValueError(f"Hires {word!r}: {name} is {value!r}, expected {kind.__name__}") from error
        return cls(**found)

    def size(self, height: int, width: int, unit: int = 1) -> Size:
        """The sides times `scale`, rounded half to even, to multiples of `unit`.

        Args:
            height, width: the present sides, in latent cells or in pixels.
            unit: the resulting sides are multiples of this number, such as the transformer's patch size for latents.
        """
        if unit == 1:
            return size_by(height, width, self.scale)
        return Size(*(max(1, round(side * self.scale / unit)) * unit for side in (height, width)))

    def enlarged_latent(self, latent: Tensor, vae: VAE, unit: int = 1) -> Float[Tensor, "b c h2 w2"]:
        """Resize latents to the size of the second pass, without adding noise.

        As in ComfyUI, latents are resized at the scale of the VAE, which affects the result of "bislerp".

        Args:
            latent: [b, c, h, w], in model space.
            vae: the VAE, which defines the scale and the shift.
            unit: see `size`, in cells.
        """
        check_latent("latent", latent)
        height, width = latent.shape[2:]
        size = self.size(height, width, unit)
        return vae.to_model(resize_latent(vae.from_model(latent), **size._asdict(), filter=self.filter))

    def enlarged_picture(self, picture: Tensor, unit: int = 8) -> Float[Tensor, "b h2 w2 c"]:
        """Resize pictures [b, h, w, c] in [0, 1] to the size of the second pass; `unit` is in pixels, see `size`."""
        check_picture("picture", picture)
        height, width = picture.shape[1:3]
        return resize(picture, **self.size(height, width, unit)._asdict(), filter=self.filter)
