"""Files that ITK reads: compared with their headers, or read by a process of its own, where it cannot be relied on."""
