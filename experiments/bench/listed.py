"""Numbers that a benchmark's option lists with commas between them."""


def listed(text: str, option: str, least: int = 1) -> list[int]:
    """The numbers of a text such as `2,4,6`.

    Args:
        text: as the user wrote it.
        option: its name, for the message.
        least: the smallest number that is taken.

    Raises:
        ValueError: if a part is no whole number, or too small.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < least:
            raise ValueError(f"{option} takes whole numbers from {least} on with commas between them; got {part!r}")
    return [int(part) for part in parts]


def listed_ratios(text: str, option: str, least: float, most: float) -> list[float]:
    """The numbers of a text such as `0.5,1,2`.

    Args:
        text: as the user wrote it.
        option: its name, for the message.
        least, most: the range of numbers that are taken.

    Raises:
        ValueError: if a part is no number, or out of range.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise ValueError(f"{option} takes numbers from {least} to {most} with commas between them; got {text!r}")
    return numbers
