"""Fill a disk."""


def fill(folder) -> None:
    """Use up all the space of a folder's disk with a file `ballast`."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return
