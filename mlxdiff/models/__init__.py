"""The networks, one a file. Each has a frozen Config without defaults and parameters named as its public checkpoint."""
