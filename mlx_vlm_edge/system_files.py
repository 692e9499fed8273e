"""Files that macOS puts into folders which a user only looked at or copied: no one's content."""

_FINDER = ".DS_Store"  # in any folder that was looked at
_DOUBLE = "._"  # AppleDouble: what NAME has besides, on disks that keep no such things (exFAT, SMB)


def of_the_system(name: str) -> bool:
    """Whether a file of this name belongs to macOS, and to nobody who asks for a folder's files.

    ".DS_Store" and "._photo.jpg" do; ".photo.jpg" does not.
    """
    return name == _FINDER or name.startswith(_DOUBLE)
