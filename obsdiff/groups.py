"""What can be pruned in a denoiser: its linears, and the units that are removed together.

Everything here is names and sizes. It is the same for a loaded model and for one on the meta device.

    in, out   a linear's input and output width
    tier      linears of one tier of one block do not read one another's outputs
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ToldGate:
    """A gate that a block is told, to which it may add a table of its own (adaLN-single).

    Attributes:
        block: the module.
        told: an argument of its forward, (rows, n out) or (rows, n, out); or (rows, parts, n, out) or
            (rows, parts, n out), one for each of so many equal parts of the tokens.
        row: of what is told and of the table, counted from 0.
        table: a parameter of the block, (n, out); None: it adds nothing.
    """

    block: str
    told: str
    row: int
    table: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkGate:
    """A gate that is one of several side by side in what a module gives.

    Attributes:
        module: gives (rows, chunks out).
        chunks: how many there are.
        chunk: which of them, counted from 0.
        told: argument of the block, (rows, tokens), which may be None; else the module gives twice as many rows, and a
            token's gate is of the first half where it is 0.
    """

    module: str
    chunks: int
    chunk: int
    told: str | None = None


@dataclass(frozen=True, kw_only=True)
class Write:
    """How a linear's output enters a residual stream: stream after = stream before + gate * output.

    Attributes:
        stream: module whose first input is the stream before it; it runs before the linear does.
        gate: module whose output holds the gate, (rows, out), and the gate's place in it, or a ToldGate or ChunkGate;
            None: the gate is 1.
    """

    stream: str
    gate: tuple[str, int] | ToldGate | ChunkGate | None = None


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One prunable linear; a convolution of one pixel is one over channels, with a token for each pixel.

    Attributes:
        name: the module's name inside the denoiser.
        block: index of its block, in forward order over the whole denoiser.
        tier: place inside the block, in forward order.
        reads: key of the input tensor. Linears with the same key read the very same tensor and share one gram.
        in_features, out_features: widths.
        tokens: which sequence it runs over, a key of Family.tokens(): "image", "text", or a resolution of a UNet.
        writes: where it writes to a residual stream; None: it does not, or another linear of its tier does.
        since: block whose result is the second half of what it reads (a skip connection), and is held until then.
    """

    name: str
    block: int
    tier: int
    reads: str
    in_features: int
    out_features: int
    tokens: str
    writes: Write | None = None
    since: int | None = None


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A linear (or a norm's vector, or a convolution of each channel alone) that loses the rows of a removed unit.

    Attributes:
        name: module name; its weight (and bias, where there is one) loses rows.
        parts: the output holds this many stacked copies of the unit axis, all cut alike (GEGLU: 2).
        start: its first row of the units, where it gives something else before them.
        free: whether its rows may change places inside a unit (neurons: among all) if the consumers' columns do.
        shared: how many columns of a unit stand for one of its rows: the heads of queries that read the same keys.
    """

    name: str
    parts: int = 1
    start: int = 0
    free: bool = True
    shared: int = 1


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear that loses the columns of a removed unit.

    Attributes:
        name: module name.
        start: its first column of the units, where it reads something else before them.
    """

    name: str
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number in a module that follows how many units there are: module.attribute = units * factor.

    Attributes:
        module: module name.
        attribute: of the module.
        index: its place in the attribute, where that is a list.
        factor: of it to a unit.
    """

    module: str
    attribute: str
    index: int | None = None
    factor: int = 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that share an index: producers lose rows, consumers lose columns.

    Attributes:
        name: stable name, such as "transformer_blocks.3.attn.heads".
        kind: "heads" or "ffn".
        block: index of its block, in forward order.
        units: how many there are.
        width: columns of a unit in each consumer: the head size, or 1 for a neuron.
        producers: linears that lose rows. A linear that gives several groups side by side is a producer of each, from
            another row on; one whose rows are free in part only (queries, keys and values in one) is there twice.
        consumers: linears that lose columns; one, or two where two streams share the heads. A linear that reads several
            groups side by side is a consumer of each, from another column on.
        sizes: numbers in modules that follow.
    """

    name: str
    kind: Literal["heads", "ffn"]
    block: int
    units: int
    width: int
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    sizes: tuple[Size, ...] = ()

    def height(self, producer: Producer) -> int:
        """Rows of a unit in each part of the producer."""
        return self.width // producer.shared

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the consumers."""
        return tuple(consumer.name for consumer in self.consumers)

    def start(self, reader: str) -> int | None:
        """The consumer's first column of the units; None where that linear reads none of them."""
        return next((consumer.start for consumer in self.consumers if consumer.name == reader), None)
