"""Decide what runs where: numbers and values in, a plan or a refusal out."""
