"""The ranks among themselves: groups, and what they exchange."""
