"""Scenes: near-field sources seen by a base station through the surface, simulated in batches on the device.

    y_l = H diag(c_l) A s_l + n_l,   l = 1..L

with y [B, L, M], H [B, M, N], c [B, L, N], A [B, N, K], s [B, L, K]. The sensing matrix of a snapshot is
T_l = H diag(c_l); G_l = T_l A is what the receiver sees of the sources.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.physics.array import Geometry, require_sector, steering
from ris_hpo.physics.random import SceneRandom
from ris_hpo.physics.sources import Sources

if TYPE_CHECKING:
    from ris_hpo.physics.grid import Region

Interval = tuple[float, float]
_ATTEMPTS = 1000  # draws of a direction before the sources are taken to have no room
SECTOR: Final = ("azimuth_deg", "elevation_deg", "range_m")
"""Keys that say where sources are."""


class SceneSpec(Spec):
    """The distribution that scenes are drawn from; intervals are uniform.

    A coordinate whose interval has no width is known beforehand: bounds and scores leave it out.
    """

    geometry: Geometry = Geometry()
    num_antennas: int = Field(16, ge=1, le=1024, description="antennas M of the base station")
    num_snapshots: int = Field(16, ge=1, le=4096, description="snapshots L of a scene, each with a code of its own")
    max_sources: int = Field(5, ge=1, le=8, description="slots of the truth, K_max")
    num_sources: tuple[int, int] = Field((1, 5), description="fewest and most sources in a scene")
    azimuth_deg: Interval = Field((-60.0, 60.0), description="where sources are drawn, from +x toward +y")
    elevation_deg: Interval = Field((-30.0, 30.0), description="where sources are drawn, from x-y toward +z")
    range_m: Interval = Field((0.5, 10.0), description="where sources are drawn, from the surface's centre")
    snr_db: Interval = Field((-5.0, 20.0), description="received signal power of all sources over the noise power")
    min_separation_deg: float = Field(0.0, ge=0, le=90, description="least angle between two sources of a scene")
    power_law: Literal["equal", "path_loss"] = Field(
        "equal",
        description="one level for all sources up to the spread, or a power that falls with the square of the range",
    )
    power_spread_db: float = Field(
        3.0, ge=0, le=30, description="source powers are log-uniform within +- this; power_law = equal alone"
    )
    symbols: Literal["independent", "coherent"] = Field(
        "independent", description="sources send Gaussian symbols of their own, or all the same ones"
    )
    rician_factor: Interval = Field(
        (0.5, 10.0), description="power of the channel's direct path over its scattered one, linear"
    )
    codes: Literal["random", "dft", "hadamard"] = Field(
        "random", description="phases of the elements, snapshot by snapshot"
    )
    channel: Literal["constant", "per_snapshot"] = Field(
        "constant", description="scattered part of H: one in a scene, or another in each snapshot"
    )
    code_bits: int = Field(3, ge=1, le=8, description="bits of a random phase")
    channel_error_db: Interval | None = Field(
        None, description="power of the error of the known channel over the mean power of its entries; unset: no error"
    )
    noise_power_error_db: float = Field(0.0, ge=0, le=30, description="the noise power is known to within +- this")

    @model_validator(mode="after")
    def _check(self) -> SceneSpec:
        for name in ("num_sources", "snr_db", "rician_factor", "channel_error_db"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ValueError(f"{name}: lower bound {low} is above upper bound {high}")
        require_sector(self.azimuth_deg, self.elevation_deg, self.range_m)
        if not 0 <= self.num_sources[0] <= self.num_sources[1] <= self.max_sources:
            raise ValueError(f"num_sources: {self.num_sources} must lie within 0..max_sources={self.max_sources}")
        if self.codes == "dft" and self.geometry.positions_m is not None:
            raise ValueError(
                "codes 'dft' are beams of rows and columns; with geometry.positions_m choose random or hadamard"
            )
        if self.rician_factor[0] < 0:
            raise ValueError(f"rician_factor: lower bound {self.rician_factor[0]} must not be negative")
        return self


@dataclass(frozen=True, slots=True)
class Scenes:
    """A batch of scenes: what the receiver has, and the truth where it is known.

    Attributes:
        geometry: the surface.
        y: complex64 [B, L, M] snapshots.
        bs_ris_channel: complex64 [B, M, N], H as the receiver knows it; [B, L, M, N] with another in each snapshot.
        ris_codes: complex64 [B, L, N], unit modulus.
        noise_power: float32 [B], per complex entry of y, as the receiver knows it.
        truth: the sources, or None where they are not known, or not completely.
        snr_db: float32 [B], or None.
        symbols: complex64 [B, L, K_max] as sent (power included), or None; the deterministic bound needs them.
        true_channel: of the shape of ``bs_ris_channel`` where it differs from the known one, else None.
        true_noise_power: float32 [B] where it differs from the known one, else None.
        partial_truth: the sources where a coordinate is not known; it is NaN there, and ``truth`` is None.
    """

    geometry: Geometry
    y: Tensor
    bs_ris_channel: Tensor
    ris_codes: Tensor
    noise_power: Tensor
    truth: Sources | None = None
    snr_db: Tensor | None = None
    symbols: Tensor | None = None
    true_channel: Tensor | None = None
    true_noise_power: Tensor | None = None
    partial_truth: Sources | None = None

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: Any) -> Scenes:
        """Select scenes by slice, boolean mask or index tensor."""
        return self._map(lambda value: value[index])

    @property
    def device(self) -> torch.device:
        """Where the scenes live."""
        return self.y.device

    def to(self, device: torch.device | str) -> Scenes:
        """Move to a device."""
        return self._map(lambda value: value.to(device))

    def single(self) -> Scenes:
        """The same in single precision, which is what files hold and networks take."""

        def converted(value: Tensor) -> Tensor:
            if value.is_complex():
                return value.to(torch.complex64)
            return value.float() if value.is_floating_point() else value

        return self._map(converted)

    def in_unit_levels(self) -> tuple[Scenes, Tensor]:
        """The same scenes in units in which y has mean square 1 and H mean square 1 / M per entry, to a factor of 2.

        The units are powers of two, so that nothing is rounded; what is computed in these units does not depend on the
        units of the input and neither overflows nor loses small numbers. Truth, symbols and SNR stay as they are.

        Returns:
            the scenes, and what a power in these units is to be multiplied with, float64 [B].
        """
        received = _power_of_two(self.y, 1)
        channel = _power_of_two(self.bs_ris_channel, self.bs_ris_channel.shape[-2])
        true, noise = self.true_channel, self.true_noise_power
        scaled = dataclasses.replace(
            self,
            y=self.y / received.to(self.y.real.dtype)[:, None, None],
            bs_ris_channel=_divided(self.bs_ris_channel, channel),
            noise_power=(self.noise_power / received.square()).to(self.noise_power.dtype),
            true_channel=None if true is None else _divided(true, channel),
            true_noise_power=None if noise is None else (noise / received.square()).to(noise.dtype),
        )
        return scaled, (received / channel).square()

    def sensing_matrices(self) -> Tensor:
        """T_l = H diag(c_l), complex [B, L, M, N]."""
        channel = self.bs_ris_channel
        return (channel if channel.dim() == 4 else channel.unsqueeze(1)) * self.ris_codes.unsqueeze(2)

    def require_truth(self) -> Sources:
        """The true sources, all of their coordinates.

        Raises:
            ConfigError: the scenes carry no truth, or lack a coordinate.
        """
        if self.truth is None and self.partial_truth is not None:
            lacking = [
                name
                for name in ("azimuth", "elevation", "range_m")
                if bool(getattr(self.partial_truth, name)[self.partial_truth.mask].isnan().any())
            ]
            raise ConfigError(f"the truth of these scenes lacks {', '.join(lacking)}, which is needed here")
        return self.known_truth()

    def knowing(self, sector: SceneSpec | Region) -> Scenes:
        """The same scenes with the coordinates that a sector fixes known beforehand, unless the truth says which."""
        truth = self.truth
        if truth is None or truth.given is not None or (given := _given(sector, truth)) is None:
            return self
        return dataclasses.replace(self, truth=dataclasses.replace(truth, given=given))

    def known_truth(self) -> Sources:
        """What is known of the true sources; a coordinate that is not known is NaN for every source.

        Raises:
            ConfigError: the scenes carry no truth.
        """
        known = self.partial_truth if self.truth is None else self.truth
        if known is None:
            raise ConfigError("these scenes carry no truth (num_sources, azimuth, elevation, range_m); cannot score")
        return known

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        """Join batches of one geometry and shape; an optional field is kept where every part has it."""
        fields: dict[str, Any] = {"geometry": parts[0].geometry}
        for field in dataclasses.fields(Scenes)[1:]:
            values = [getattr(part, field.name) for part in parts]
            if any(value is None for value in values):
                fields[field.name] = None
            else:
                fields[field.name] = Sources.cat(values) if isinstance(values[0], Sources) else torch.cat(values)
        return Scenes(**fields)

    def _map(self, function: Any) -> Scenes:
        fields: dict[str, Any] = {"geometry": self.geometry}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, Sources):
                fields[field.name] = value._map(function)
            else:
                fields[field.name] = None if value is None else function(value)
        return Scenes(**fields)


def _given(sector: SceneSpec | Region, truth: Sources) -> Tensor | None:
    """Which coordinates have an interval without width, bool [B, 3]; None for none."""
    fixed = [low == high for low, high in (getattr(sector, name) for name in SECTOR)]
    return torch.tensor(fixed, device=truth.mask.device).expand(len(truth), -1) if any(fixed) else None


def _divided(values: Tensor, unit: Tensor) -> Tensor:
    """Each scene's values over its own unit [B]."""
    return values / unit.to(values.real.dtype).view(-1, *(1,) * (values.dim() - 1))


def _power_of_two(values: Tensor, count: int) -> Tensor:
    """The power of two nearest to the root of ``count`` times the mean square of each scene, float64 [B]; 1 for 0."""
    square = values.abs().double().square().flatten(1).mean(1) * count
    known = (square > 0) & square.isfinite()
    exponent = torch.round(torch.where(known, square, torch.ones_like(square)).log2() / 2)
    return torch.exp2(exponent)


def simulate(
    spec: SceneSpec,
    seed: int,
    index: Tensor | range,
    *,
    num_sources: Tensor | None = None,
    snr_db: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Draw scenes; scene i depends on (spec, seed, i) alone, never on the batch or the device.

    Args:
        spec: the distribution.
        seed: family of scenes; training, validation and test use different ones.
        index: scene indices [B], whole numbers, or a range.
        num_sources: [B] to fix K instead of drawing it, 0..max_sources.
        snr_db: [B] to fix the SNR instead of drawing it; without a source it is that of one source of unit power.
        device: where to compute.

    Returns:
        Scenes with truth, symbols and realised SNR: mean over (l, m) of |noise-free y|^2 / noise power. The noise power
        of a scene without a source is mean |H_mn|^2 / SNR: under codes of random phases a source of unit power would be
        received with mean |H_mn|^2.

    Raises:
        ConfigError: a source count outside 0..max_sources, or no room for the sources at their least separation.
    """
    where = torch.device(device)
    if isinstance(index, range):
        index = torch.arange(index.start, index.stop, index.step, device=where)
    random = SceneRandom(seed, index.to(where, torch.int64))
    geometry, k_max = spec.geometry, spec.max_sources
    num_snapshots, num_antennas = spec.num_snapshots, spec.num_antennas

    if num_sources is None:
        low, high = spec.num_sources
        num_sources = low + random.integers("num_sources", high - low + 1)
    elif bool(((num_sources < 0) | (num_sources > k_max)).any()):
        raise ConfigError(f"source counts {num_sources.unique().tolist()} must lie within 0..{k_max}")
    num_sources = num_sources.to(where)
    mask = torch.arange(k_max, device=where) < num_sources.unsqueeze(-1)
    azimuth, elevation = _directions(spec, random, mask)
    range_m = random.between("range", spec.range_m, k_max)
    if spec.power_law == "path_loss":
        power = range_m.pow(-2)
    else:
        power = 10 ** (random.between("power", (-spec.power_spread_db, spec.power_spread_db), k_max) / 10)
    power = power * mask
    truth = Sources(azimuth, elevation, range_m, power, mask)
    truth = dataclasses.replace(truth, given=_given(spec, truth))

    symbols = random.complex_normal("symbols", num_snapshots, k_max)
    if spec.symbols == "coherent":
        symbols = symbols[:, :1].expand(-1, num_snapshots, -1)
    symbols = symbols * power.sqrt().unsqueeze(1)

    channel = rician_channel(spec, random)
    codes = code_book(spec, random)
    wave = torch.einsum("bkn,blk->bln", steering(geometry, azimuth, elevation, range_m), symbols)
    per_snapshot = spec.channel == "per_snapshot"
    clean = torch.einsum("blmn,bln->blm" if per_snapshot else "bmn,bln->blm", channel, codes * wave)
    if snr_db is None:
        snr_db = random.between("snr", spec.snr_db)
    snr_db = snr_db.to(where, torch.float32)
    received = clean.abs().square().mean((1, 2))
    entries = channel.abs().square().mean(tuple(range(1, channel.dim())))
    received = torch.where(num_sources > 0, received, entries)
    noise_power = received / 10 ** (snr_db / 10)
    noise = random.complex_normal("noise", num_snapshots, num_antennas)
    y = clean + noise * noise_power.sqrt()[:, None, None]

    known, true_channel, true_noise_power = channel, None, None
    if spec.channel_error_db is not None:
        error_db = random.between("channel_error_db", spec.channel_error_db)
        scale = (10 ** (error_db / 10) * entries).sqrt()
        error = random.complex_normal("channel_error", *channel.shape[1:])
        known, true_channel = channel + scale.view(-1, *(1,) * (channel.dim() - 1)) * error, channel
    if spec.noise_power_error_db:
        bound = spec.noise_power_error_db
        true_noise_power = noise_power
        noise_power = noise_power * 10 ** (random.between("noise_power_error", (-bound, bound)) / 10)
    return Scenes(geometry, y, known, codes, noise_power, truth, snr_db, symbols, true_channel, true_noise_power)


def _directions(spec: SceneSpec, random: SceneRandom, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Azimuth and elevation [B, K] in rad; a source too near to an earlier one of its scene is drawn again."""
    least, slots = math.cos(math.radians(spec.min_separation_deg)), mask.shape[1]
    azimuth = random.between("azimuth", spec.azimuth_deg, slots).deg2rad()
    elevation = random.between("elevation", spec.elevation_deg, slots).deg2rad()
    for attempt in range(_ATTEMPTS if spec.min_separation_deg else 0):
        cos_el = elevation.cos()
        unit = torch.stack([cos_el * azimuth.cos(), cos_el * azimuth.sin(), elevation.sin()], -1)
        near = (unit @ unit.mT > least) & mask.unsqueeze(1) & mask.unsqueeze(2)
        again = near.tril(-1).any(-1)
        if not bool(again.any()):
            return azimuth, elevation
        azimuth = torch.where(again, random.between(f"azimuth {attempt}", spec.azimuth_deg, slots).deg2rad(), azimuth)
        drawn = random.between(f"elevation {attempt}", spec.elevation_deg, slots).deg2rad()
        elevation = torch.where(again, drawn, elevation)
    if spec.min_separation_deg:
        raise ConfigError(
            f"min_separation_deg {spec.min_separation_deg:g}: no room for {int(mask.sum(-1).max())} sources in azimuth "
            f"{spec.azimuth_deg}, elevation {spec.elevation_deg} in {_ATTEMPTS} attempts; ask for fewer or nearer ones"
        )
    return azimuth, elevation


def grid_of_cells(
    spec: SceneSpec, seed: int, snr_db: Sequence[float], num_sources: Sequence[int], per_cell: int, **options: Any
) -> Scenes:
    """``per_cell`` scenes for every pair of SNR and source count, SNR outermost.

    Raises:
        ConfigError: a source count outside 0..max_sources.
    """
    snr = torch.tensor(list(snr_db), dtype=torch.float32).repeat_interleave(len(num_sources) * per_cell)
    count = torch.tensor(list(num_sources)).repeat_interleave(per_cell).repeat(len(snr_db))
    return simulate(spec, seed, range(len(snr)), num_sources=count, snr_db=snr, **options)


def rician_channel(spec: SceneSpec, random: SceneRandom) -> Tensor:
    """H [B, M, N] = (sqrt(kappa/(kappa+1)) a_bs a_ris^H + sqrt(1/(kappa+1)) W) / sqrt(M), W iid CN(0, 1).

    The line of sight leaves the surface as a plane wave inside the sources' sector and reaches a half-wavelength
    linear array at the base station from a direction uniform in its sine; |a_bs,m| = |a_ris,n| = 1. With a channel per
    snapshot W is another in each and H is [B, L, M, N]; the line of sight stays.
    """
    geometry, num_antennas = spec.geometry, spec.num_antennas
    kappa = random.between("rician", spec.rician_factor)[:, None, None]
    sine = random.between("bs_direction", (-1.0, 1.0)).unsqueeze(-1)
    elements = torch.arange(num_antennas, device=sine.device, dtype=sine.dtype)
    a_bs = torch.polar(torch.ones_like(sine * elements), math.pi * sine * elements)
    planar = geometry.model_copy(update={"wave": "planar"})  # known to be valid, and once a batch
    azimuth = random.between("ris_azimuth", spec.azimuth_deg).deg2rad()
    elevation = random.between("ris_elevation", spec.elevation_deg).deg2rad()
    a_ris = steering(planar, azimuth, elevation, torch.ones_like(azimuth)) * math.sqrt(geometry.num_elements)
    sight = a_bs.unsqueeze(-1) * a_ris.conj().unsqueeze(-2)
    if spec.channel == "per_snapshot":
        sight, kappa = sight.unsqueeze(1), kappa.unsqueeze(1)
        scattered = random.complex_normal("scattered", spec.num_snapshots, num_antennas, geometry.num_elements)
    else:
        scattered = random.complex_normal("scattered", num_antennas, geometry.num_elements)
    return ((kappa / (kappa + 1)).sqrt() * sight + (1 / (kappa + 1)).sqrt() * scattered) / math.sqrt(num_antennas)


def code_book(spec: SceneSpec, random: SceneRandom) -> Tensor:
    """Phase codes c [B, L, N] of unit modulus.

    ``random``: independent phases of ``code_bits`` bits. ``dft``: every (N/L)-th beam of the 2-D DFT from a random
    first one, quantised to ``code_bits``. ``hadamard``: likewise rows of the Sylvester matrix of order >= N, cut to N.
    """
    geometry, num_snapshots = spec.geometry, spec.num_snapshots
    n, levels = geometry.num_elements, 1 << spec.code_bits
    if spec.codes == "random":
        digits = 48 // spec.code_bits
        words = random.words("codes", -(-num_snapshots * n // digits))
        shifts = torch.arange(digits, device=words.device) * spec.code_bits
        steps = ((words.unsqueeze(-1) >> shifts) & (levels - 1)).flatten(1)[:, : num_snapshots * n]
        turns = torch.arange(levels, device=words.device, dtype=torch.float32) * (2 * math.pi / levels)
        table = torch.polar(torch.ones_like(turns), turns)
        result: Tensor = table[steps].unflatten(-1, (num_snapshots, n))
        return result
    order = n if spec.codes == "dft" else 1 << (n - 1).bit_length()
    stride = max(1, order // num_snapshots)
    first = random.integers("codes", order).unsqueeze(-1)
    row = (first + stride * torch.arange(num_snapshots, device=first.device)) % order
    element = torch.arange(n, device=first.device)
    if spec.codes == "hadamard":
        common = row.unsqueeze(-1) & element
        parity = torch.zeros_like(common)
        for bit in range(order.bit_length()):
            parity ^= (common >> bit) & 1
        return (1 - 2 * parity).to(torch.complex64)
    horizontal, vertical = geometry.num_horizontal, geometry.num_vertical
    cycles = (row % horizontal).unsqueeze(-1) * (element % horizontal) / horizontal
    cycles = cycles + (row // horizontal).unsqueeze(-1) * (element // horizontal) / vertical
    phase = torch.round(cycles * levels) * (2 * math.pi / levels)
    return torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
