"""Rows of a data set on the Hugging Face hub, and one error for the many ways in which it cannot be had."""

from tnlib.wheel import AssetError


def hub_rows(repository, configuration, split, instead, **more):
    """All rows of a split, as dictionaries.

    instead: what to do where no hub is reached, for the error; more: for datasets.load_dataset, such as revision
    Returns: list of dict
    Raises: AssetError, whatever it was that datasets, the hub's client or the file system raised
    """
    try:
        import datasets

        return list(datasets.load_dataset(repository, configuration, split=split, **more))
    except Exception as error:  # each of those raises its own
        reason = next(iter(str(error).splitlines()), "")
        raise AssetError(
            f"hub data {repository}, configuration {configuration}, split {split!r}: the hub gave {type(error).__name__}: "
            f"{reason}. Needed: a network that reaches the Hugging Face hub; else {instead}"
        ) from error
