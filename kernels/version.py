"""The pack's version, as it stands in every file that the pack makes."""

VERSION = "0.1.0"
CREATED_BY = f"intrinsic-reward {VERSION}"
