"""The networks, one in each file. Each has a frozen Config without defaults, and the public checkpoint's names."""
