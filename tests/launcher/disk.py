"""A disk that is full."""


def fill(folder) -> None:
    """Take all the space there is, in a file `ballast`."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return
