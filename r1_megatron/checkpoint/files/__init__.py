"""The formats on the disk: read row by row, validated before they are believed, nothing of theirs run."""
