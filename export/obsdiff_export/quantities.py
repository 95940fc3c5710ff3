"""Numbers as people read them."""


def size(value: float) -> str:
    """Bytes with a binary unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def count(value: float) -> str:
    """A count with a unit of thousands: 1.23 M."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def seconds(value: float) -> str:
    """0.42 s, 12.3 s, 3 min 20 s."""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else seconds(value / 1000)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def small(value: float) -> str:
    """An error or a loss, three digits: 0.0123, 4.5e-06."""
    return f"{value:.3g}"
