"""A model of what a plan costs, and the machines and models it knows."""
