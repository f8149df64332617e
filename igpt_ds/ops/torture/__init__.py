"""What damaged files, killed tools and two writers lead to. Called by tools/torture.py."""
